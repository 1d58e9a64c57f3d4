"""What a process of ours does with the memory that it has freed."""

import platform
import subprocess
import sys

import pytest

ALLOCATE = """
import resource, sys, torch
from ksvd_sae.device import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(12):
    torch.ones(16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(16 << 20)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults * resource.getpagesize() / (20 * (64 << 20)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_memory_that_was_freed_is_used_again_without_page_faults() -> None:
    """Pages brought in anew, of all that were asked for; where the system gives huge pages by itself, there are few."""
    share = {
        how: float(subprocess.run([sys.executable, "-c", ALLOCATE, how], capture_output=True, check=True).stdout)
        for how in ("give back", "keep")
    }
    assert share["keep"] < 0.01
    assert share["give back"] > 1 / 1024
