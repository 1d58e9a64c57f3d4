"""Learns from shards on disk with a limit on its memory.

``python -m tests.survival.within_memory FOLDER MIB UPDATE GROUPS``: DB-KSVD on the harvest in FOLDER, two passes, with
MIB of private memory beyond what the process had once it had learned a little (RLIMIT_DATA: all that is not a file's or
shared, and private maps of files that are open). Then all is loaded at once, which must fail: else nothing was limited.

A process of its own, as a limit on memory cannot be taken back. Prints {"batches": learned, "grown": MiB of anonymous
pages at most, after any batch}.
"""

import ctypes
import json
import resource
import sys
from pathlib import Path
from typing import Any

from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.learning.coding import Coding
from ksvd_sae.learning.dbksvd import DictionaryLearner, LearnerOptions

N_ATOMS, K = 64, 2


def status_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith(f"{name}:"))


def main(folder: Path, mib: int, update: Any, groups: tuple[int, ...] | None) -> None:
    shards, batches, grown = ActivationShards.open(folder), 0, 0
    coding = Coding(K, groups=groups)
    options = LearnerOptions(N_ATOMS, coding, update=update, passes=2, batch_samples=512)
    few_ND = shards.read_shard(0)[:2048].clone()
    # Compiles; threads and their arenas.
    DictionaryLearner(options, device="cpu").fit(lambda: iter(few_ND.split(512)))
    ctypes.CDLL(None).malloc_trim(0)
    before_bytes = status_bytes("RssAnon")
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (status_bytes("VmData") + (mib << 20), hard))

    def note(_: Any) -> None:
        nonlocal batches, grown
        batches, grown = batches + 1, max(grown, status_bytes("RssAnon") - before_bytes)

    DictionaryLearner(options, device="cpu", on_batch=note).fit(shards)
    try:
        shards.tensor()
    except (RuntimeError, MemoryError):
        print(json.dumps({"batches": batches, "grown": grown / 2**20}))
    else:
        raise AssertionError("all was loaded within the limit")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], (16, 48) if sys.argv[4] == "groups" else None)
