"""Which device a stage runs on."""

import torch

from ksvd_sae.errors import ConfigError


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
