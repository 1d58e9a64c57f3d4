"""``python -m ksvd_sae.bench processes``: one dictionary learned by 1 and by 2 processes, beside what sending costs.

Strong: the same batches by more processes. Weak: batches as many times as large. What goes round is counted as it is
sent; how long that takes follows from the latency and the bandwidth of sums alone, measured in the same processes. More
processes than cores tell nothing but how they share these.

``--predict`` prints the same model for GPUs: gpu_model.py's stages of each GPU's part of a batch, and what is sent.
Needs no more than learning/ does, as gpu.py.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ksvd_sae.bench import rows
from ksvd_sae.bench.gpu_model import SOLVED_ROWS, stages
from ksvd_sae.bench.problems import PLANTED, Shape, planted_problem
from ksvd_sae.bench.rows import OURS, Who, row
from ksvd_sae.learning.coding import Coding
from ksvd_sae.learning.dbksvd import BatchLog, DictionaryLearner, LearnerOptions
from ksvd_sae.learning.training import Update
from ksvd_sae.ranks import Ranks

BATCH, SMALL = Shape(PLANTED, n=8192, d=256, m=1024, k=8), Shape(PLANTED, n=256, d=16, m=32, k=2)
UPDATES: tuple[Update, ...] = ("sweep", "two_sweeps")
_BATCHES, _WARMUPS, _SEED = 6, 1, 0
# Numbers in a sum whose time is the latency, and in one whose time is the bandwidth.
_FEW, _MANY = 1, 1 << 22
_SUMS = 9


@dataclass(frozen=True)
class CountingRanks(Ranks):
    """Counts the messages of a process, and their bytes."""

    sent: list[int] = field(default_factory=list)

    def agreed(self, tensor: Tensor) -> Tensor:
        self.sent.append(tensor.nbytes)
        return super().agreed(tensor)

    def _reduced(self, tensor: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        self.sent.append(tensor.nbytes)
        return super()._reduced(tensor, how)


def measured(sizes: tuple[int, ...], *, small: bool) -> list[dict[str, Any]]:
    """Rows for each number of processes."""
    batch, found = SMALL if small else BATCH, list[dict[str, Any]]()
    alone_s: dict[tuple[str, int], float] = {}
    for size in sizes:
        cases = {"strong": batch, "weak": replace(batch, n=size * batch.n)}
        with tempfile.TemporaryDirectory() as folder:
            said = _by_processes(size, [asdict(shape) for shape in cases.values()], Path(folder))
        for case, shape in cases.items():
            for update in UPDATES:
                one = said[f"{update} {shape.n}"]
                alone_s.setdefault((update, shape.n), median(one["seconds"]) if size == 1 else float("nan"))
                sending_s = one["messages"] * said["latency_s"] + one["bytes"] / said["bytes_per_s"]
                base_s = alone_s[update, batch.n] / (size if case == "strong" else 1)
                found.append(
                    row(
                        "processes",
                        f"{case} {size}",
                        Who(OURS, update, "numba"),
                        **shape.sizes,
                        seconds=one["seconds"],
                        warmups=_WARMUPS,
                        seed=_SEED,
                        fvu=one["fvu"],
                        peak_mib=None,
                        floor_s=None,
                        processes=size,
                        cores=os.cpu_count(),
                        messages=one["messages"],
                        sent_bytes=one["bytes"],
                        latency_s=said["latency_s"],
                        bytes_per_s=said["bytes_per_s"],
                        model_s=base_s + sending_s,
                        efficiency=base_s / median(one["seconds"]),
                    )
                )
    return found


def _by_processes(size: int, shapes: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What rank 0 of so many processes measures."""
    command = [sys.executable, "-m", "ksvd_sae.bench.processes", str(size), json.dumps(shapes), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    processes = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(size)]
    try:
        for process in processes:
            if process.wait(timeout=600):
                raise RuntimeError(f"bench processes: a process of {size} failed, as it has said")
    finally:
        for process in processes:
            process.kill()
    found: dict[str, Any] = json.loads((folder / "said.json").read_text())
    return found


def _one(size: int, shapes: list[Shape], folder: Path, rank: int) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(minutes=5))
    few_s, many_s = (_sum_s(torch.ones(n)) if size > 1 else 0.0 for n in (_FEW, _MANY))
    n_bytes = 4 * _MANY
    said: dict[str, Any] = {"latency_s": few_s, "bytes_per_s": n_bytes / (many_s - few_s) if size > 1 else 1.0}
    for shape in shapes:
        x_ND = planted_problem(replace(shape, n=_BATCHES * shape.n), 0, _SEED).x_ND
        for update in UPDATES:
            ranks, of_batch = CountingRanks(rank, size), list[int]()

            def count(_: BatchLog, ranks: CountingRanks = ranks, of_batch: list[int] = of_batch) -> None:
                of_batch.append(len(ranks.sent))

            options = LearnerOptions(shape.m, Coding(shape.k), batch_samples=shape.n, update=update, seed=_SEED)
            learner = DictionaryLearner(options, device="cpu", ranks=ranks, on_batch=count).fit(x_ND)
            # Of the last batch: no atom is drawn anew then.
            last = ranks.sent[of_batch[-2] : of_batch[-1]]
            said[f"{update} {shape.n}"] = {
                "seconds": [line.seconds for line in learner.log[_WARMUPS:]],
                "fvu": learner.log[-1].fvu,
                "messages": len(last) if size > 1 else 0,
                "bytes": sum(last) if size > 1 else 0,
            }
    if rank == 0:
        (folder / "said.json").write_text(json.dumps(said))
    dist.destroy_process_group()


def _sum_s(tensor: Tensor) -> float:
    def once() -> float:
        started = time.perf_counter()
        dist.all_reduce(tensor)
        return time.perf_counter() - started

    return median([once() for _ in range(_SUMS)])


# ---------------------------------------------------------------- GPUs, on paper

# A GPU's to the others of its machine, its share of the machine's network, and what a message takes before its bytes.
NVLINK_BYTES_PER_S, NETWORK_BYTES_PER_S = 450e9, 50e9
_ON_A_MACHINE, _MESSAGE_S = 8, {8: 15e-6, 64: 40e-6}
LARGE = Shape(PLANTED, n=262_144, d=2304, m=65_536, k=40)


# Multiplied by each process for a part of the atoms, whatever samples it has.
_BY_ATOMS = ("gram", "duplicates")


def sent_bytes(shape: Shape) -> tuple[int, float, float]:
    """Messages of a batch of ``sweep`` on CUDA, bytes of sums (of each block), and of what one gives all: the Gram
    matrix in 16 bits, and rank 0's atoms."""
    blocks = -(-shape.m // SOLVED_ROWS)
    return 2 * blocks + 10, 4.0 * shape.m * (shape.d + SOLVED_ROWS), 2.0 * shape.m**2 + 4.0 * shape.m * shape.d


def sending_s(shape: Shape, gpus: int) -> float:
    """Rings over each GPU's own network card, an eighth of the bytes each; in a machine all. Sums go round twice."""
    messages, summed, given = sent_bytes(shape)
    around = (gpus - 1) / gpus * (2 * summed + given)
    in_machine_s, between_s = around / NVLINK_BYTES_PER_S, around / _ON_A_MACHINE / NETWORK_BYTES_PER_S
    return messages * _MESSAGE_S[gpus] + (in_machine_s if gpus <= _ON_A_MACHINE else max(in_machine_s, between_s))


def memory_bytes(shape: Shape, gpus: int) -> dict[str, float]:
    """What a process holds, by name."""
    n = shape.n / gpus
    return {
        "Gram matrix, float16": 2.0 * shape.m**2,
        "products and codes of its part": 4.0 * n * shape.m + 8.0 * n * shape.k,
        "samples, twice, and residual": 12.0 * n * shape.d,
        "atoms, their average, gradients": 16.0 * shape.m * shape.d,
    }


def _stages_s(shape: Shape, gpus: int) -> dict[str, float]:
    some = stages(replace(shape, n=shape.n // gpus), "bfloat16")
    return {stage.name: stage.seconds / (gpus if stage.name in _BY_ATOMS else 1) for stage in some}


def prediction(shape: Shape = LARGE, samples: float = 1e9) -> str:
    """Markdown: milliseconds of a batch by 1, 8 and 64 H200, and hours of all samples."""
    counts = (1, 8, 64)
    of_each = [_stages_s(shape, gpus) for gpus in counts]
    lines = [
        "| ms a batch | " + " | ".join(f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in counts) + " |",
        "| --- |" + " ---: |" * len(counts),
    ]
    for name in of_each[0]:
        lines.append(f"| {name} | " + " | ".join(f"{1e3 * seconds[name]:.1f}" for seconds in of_each) + " |")
    sending = [0.0, *(sending_s(shape, gpus) for gpus in counts[1:])]
    totals = [sum(seconds.values()) + s for seconds, s in zip(of_each, sending, strict=True)]

    def line(name: str, values: list[float], style: Callable[[float], str]) -> str:
        return f"| **{name}** | " + " | ".join(map(style, values)) + " |"

    batches = samples / shape.n
    lines += [
        line("sending", sending, lambda s: f"{1e3 * s:.1f}"),
        line("batch", totals, lambda s: f"{1e3 * s:.0f}"),
        line(f"{samples:.0e} samples, minutes", totals, lambda s: f"{batches * s / 60:.0f}"),
        line("GB a GPU", [sum(memory_bytes(shape, gpus).values()) for gpus in counts], lambda b: f"{b / 1e9:.0f}"),
    ]
    return "\n".join(lines)


def main(output: Path, *, small: bool) -> None:
    """Append the rows, and print what they say."""
    found = measured((1, 2), small=small)
    rows.append(output, found)
    for one in found:
        print(
            f"{one['case']:9} {one['config']:10} {1e3 * one['median_s']:8.1f} ms a batch, model "
            f"{1e3 * one['model_s']:8.1f}; efficiency {one['efficiency']:.2f}; {one['messages']} messages of "
            f"{one['sent_bytes'] / 1e6:.2f} MB; {1e6 * one['latency_s']:.0f} µs, {one['bytes_per_s'] / 1e9:.2f} GB/s"
        )


if __name__ == "__main__":
    _size, _shapes, _folder, _rank = sys.argv[1:]
    _one(int(_size), [Shape(**shape) for shape in json.loads(_shapes)], Path(_folder), int(_rank))
