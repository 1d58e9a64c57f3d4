"""Which device a stage runs on, and what its process does with memory."""

import ctypes
import gc
import logging

import torch

from ksvd_sae.errors import ConfigError

logger = logging.getLogger(__name__)
# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def resolve_device(device: str) -> torch.device:
    """'auto' is CUDA if torch sees a GPU, else the CPU; a named device that is absent is an error."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"device {device!r} was asked for, but torch sees no GPU",
            cause="a machine without a GPU, or a torch build without CUDA",
            cure="use device 'auto' or 'cpu'; `ksvd-sae doctor` shows what torch sees",
        )
    return torch.device(device)


def keep_freed_memory() -> None:
    """From now on this process gives freed memory back to Linux only at its end.

    By itself glibc returns every large tensor as it is freed, and the next one of its size begins with a page fault for
    each of its pages: a quarter of a language model's time on two cores ("Speed" in the docs). For our own processes:
    it is a setting of a whole process, and not a library's to make. Without glibc it does nothing.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    # Large tensors come from the heap, which is not trimmed below 2 GiB.
    if not (set_option(_MMAP_MAX, 0) and set_option(_TRIM_THRESHOLD, 2**31 - 1)):
        logger.debug("malloc keeps its ways: mallopt refused")


def give_back_memory() -> None:
    """Give the memory that this process has freed back to Linux now, where others are to have it."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return
