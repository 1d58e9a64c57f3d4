"""The memory that a call needs on top of what was there before it, and what there is.

CPU: growth of the resident set. Before the call, freed memory is given back to the system (glibc's ``malloc_trim``:
else the call could hide in it) and the kernel's mark of the peak is reset (5 written to ``/proc/self/clear_refs``);
after it, VmHWM − (VmRSS before). The kernel keeps the mark, so nothing samples and nothing is missed, also where a
library holds Python's lock throughout. Threads count, child processes do not. The result of the call is part of it.
Memory that a library took before and keeps for itself is not. Linux only: elsewhere the answer is None.

CUDA: ``torch.cuda.max_memory_allocated`` over the call, less what was allocated before it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from ksvd_sae.device import give_back_memory, memory_bytes

_T = TypeVar("_T")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_MEMINFO = Path("/proc/meminfo")


def peak_growth(call: Callable[[], _T], device: torch.device) -> tuple[_T, float | None]:
    """The result of ``call`` and the MiB that it needed at most; see the module's docstring."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before_bytes = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return result, (torch.cuda.max_memory_allocated(device) - before_bytes) / 2**20
    give_back_memory()
    if not _reset_peak():
        return call(), None
    before_kib = _status_kib("VmRSS")
    result = call()
    return result, max(0, _status_kib("VmHWM") - before_kib) / 2**10


def free_bytes(device: torch.device) -> int:
    """What can still be had of a GPU's memory; for other devices of the machine's, or of this process' part of it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    most = memory_bytes(device)
    if not _MEMINFO.is_file():
        return most
    (kib,) = (line.split()[1] for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable"))
    return min(most, int(kib) << 10)


def resident_bytes() -> int:
    """What this process has in memory now, mapped files included; 0 where Linux does not say."""
    return _status_kib("VmRSS") << 10 if _STATUS.is_file() else 0


def _reset_peak() -> bool:
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _status_kib(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])
