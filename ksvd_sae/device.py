"""Which device a stage runs on, and what its process does with memory."""

import ctypes
import gc
import logging
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

from ksvd_sae.errors import ConfigError, MemorySpaceError

logger = logging.getLogger(__name__)
T = TypeVar("T")
# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
# What a process may have of the machine's memory, in bytes or 'max', where Linux's control groups say.
_GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def resolve_device(device: str | torch.device) -> torch.device:
    """'auto' is CUDA if torch sees a GPU, else the CPU; a device that is absent or not worked on is an error.

    Raises: ConfigError.
    """
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    named = named_device(device)
    if named.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"device {str(device)!r} is not one to learn on",
            limit="'auto', 'cpu', 'cuda', 'cuda:0', 'cuda:1', …",
            cause="sums in float64 and kernels are for the CPU and CUDA alone",
            cure="use device 'cpu'",
        )
    return named


def named_device(device: str | torch.device) -> torch.device:
    """A device by its name, or as torch has it, that is there.

    Raises: ConfigError.
    """
    try:
        # A bare number is torch's for a GPU, and a mistake as often.
        named = torch.device(device) if isinstance(device, str | torch.device) else None
    except RuntimeError:
        named = None
    if named is None:
        raise ConfigError(
            "no device of this name",
            got=f"{device!r} ({type(device).__name__})",
            limit="text such as 'cpu' and 'cuda:0', or a torch.device",
        )
    if named.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device {str(device)!r} was asked for, but torch sees no GPU",
            cause="a machine without a GPU, or a torch build without CUDA",
            cure="use device 'auto' or 'cpu'; `ksvd-sae doctor` shows what torch sees",
        )
    if named.type == "cuda" and named.index is not None and named.index >= torch.cuda.device_count():
        raise ConfigError(f"device {str(device)!r} was asked for, but torch sees {torch.cuda.device_count()} GPUs")
    if named.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device {str(device)!r} was asked for, but torch sees none", cure="use device 'cpu'")
    return named


@cache
def memory_bytes(device: torch.device) -> int:
    """All memory of a GPU; for other devices the machine's, or the part of it that this process may have."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    # Windows has no such call: 16 GiB then.
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 16 << 30
    limit = _GROUP_LIMIT.read_text().strip() if _GROUP_LIMIT.is_file() else "max"
    return min(machine, int(limit)) if limit.isdigit() else machine


@contextmanager
def own_modes() -> Iterator[None]:
    """Here products have the precision that they say, whatever ``torch.autocast`` is around, and gradients are
    afterwards on or off as they were; a decorator, too, of what users call.

    Ctrl-C as ``torch.no_grad`` is about to switch gradients on again leaves them off, in a notebook for all that comes
    after.
    """
    gradients = torch.is_grad_enabled()
    try:
        with ExitStack() as stack:
            for device in ("cpu", "cuda"):
                # To disable it where it is not on may warn that there is no such device.
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        torch.set_grad_enabled(gradients)


@cache
def cpu_name() -> str:
    """The processor as it calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict[str, str | int]:
    """What numbers depend on beside versions: another kind of processor, or other threads, add in another order."""
    return {"cpu": cpu_name(), "threads": torch.get_num_threads()}


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


def in_parts_that_fit(
    n: int, size: int, work: Callable[[slice], T], what: str, cure: str, undo: Callable[[slice], object] | None = None
) -> Iterator[T]:
    """What ``work`` gives for ranges of n rows, ``size`` at a time; half as many from where the device lacks memory on.

    The rows' results are the same but for rounding (products of other shapes are summed in another order), which a
    pursuit of many steps makes larger.

    Args: what, cure: for the error. undo: what ``work`` had begun on a range when it failed.
    Raises: MemorySpaceError if there is too little for a single row.
    """
    start = 0
    while start < n:
        rows, said = slice(start, start + size), ""
        try:
            yield work(rows)
        except torch.OutOfMemoryError as error:
            # Only its words: the error keeps all that its frames held.
            said = str(error)
        if not said:
            start += size
            continue
        if undo is not None:
            undo(rows)
        size = min(size, n - start)
        if size == 1:
            raise MemorySpaceError(f"{what}: too little memory on the device for one", cause=said[:300], cure=cure)
        size //= 2
        gc.collect()
        torch.cuda.empty_cache()
        _say_smaller(what, size)


@cache
def _say_smaller(what: str, size: int) -> None:
    """Once: it may be so in every batch."""
    logger.warning("%s: the device has too little memory; going on with %d at a time", what, size)
