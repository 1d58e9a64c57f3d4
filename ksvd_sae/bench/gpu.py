"""The GPU to-do list: everything that wants a GPU and has not been measured on one, in one script.

``python -m ksvd_sae.bench gpu`` needs torch and numpy alone, makes its own data (planted dictionaries of the paper's
shapes), first checks that coders and update give on the GPU what they give on the CPU, then times them, appends rows to
results/bench/gpu.jsonl and prints a table. Not measured yet: every row below.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksvd_sae.device import resolve_device
from ksvd_sae.learning.atom_update import update_atoms_sums
from ksvd_sae.learning.dbksvd import DoubleBatchKSVD
from ksvd_sae.learning.sparse_coding import Code, matching_pursuit, mp_backend, orthogonal_matching_pursuit
from ksvd_sae.provenance import commit, versions

# H200: device-to-device copy as measured on one; float32 products without TF32 as the data sheet has it.
_COPY_BYTES_PER_S = 4.3e12
_FP32_FLOP_PER_S = 67e12
_REPEATS = 7


@dataclass(frozen=True)
class Shape:
    case: str
    n: int
    d: int
    m: int
    k: int


PAPER = (Shape("gemma-2-2b-4k", 65_536, 2304, 4096, 20), Shape("gemma-2-2b-16k", 65_536, 2304, 16_384, 80))
SMALL = (Shape("small", 512, 48, 96, 5),)


def planted(shape: Shape, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Samples made of k atoms each with coefficients 1 + U(0, 1) and noise 0.05 (KSVD.jl's synthetic problem)."""
    generator = torch.Generator().manual_seed(seed)
    atoms_MD = torch.nn.functional.normalize(torch.randn(shape.m, shape.d, generator=generator), dim=1)
    support_BK = torch.rand(shape.n, shape.m, generator=generator).topk(shape.k, dim=1).indices.int()
    values_BK = 1 + torch.rand(shape.n, shape.k, generator=generator)
    noise_BD = 0.05 * torch.randn(shape.n, shape.d, generator=generator)
    return Code(values_BK, support_BK).reconstruct(atoms_MD) + noise_BD, atoms_MD


def check(device: torch.device) -> list[str]:
    """Coders and update on ``device`` against the CPU in float64; returns what differs by more than float32 allows."""
    shape = Shape("check", 2048, 200, 700, 12)
    x_BD, _ = planted(shape)
    atoms_MD = torch.nn.functional.normalize(x_BD[: shape.m], dim=1)
    problems = []
    for name, coder in (("mp", matching_pursuit), ("omp", orthogonal_matching_pursuit)):
        wanted = coder(x_BD.double(), atoms_MD.double(), shape.k).reconstruct(atoms_MD.double())
        got = coder(x_BD.to(device), atoms_MD.to(device), shape.k).reconstruct(atoms_MD.to(device)).cpu().double()
        # Near ties may pick another atom: almost all samples must agree, and the error must.
        same = float(((got - wanted).norm(dim=1) < 1e-3 * wanted.norm(dim=1)).double().mean())
        errors = [float((x_BD - r).norm()) for r in (got, wanted)]
        if same < 0.99 or abs(errors[0] / errors[1] - 1) > 1e-3:
            problems.append(f"{name}: {same:.1%} of samples agree, errors {errors[0]:.5g} and {errors[1]:.5g}")
    code = matching_pursuit(x_BD, atoms_MD, shape.k, backend="torch")
    wanted_update = update_atoms_sums(x_BD.double(), Code(code.values_BK.double(), code.support_BK), atoms_MD.double())
    moved = Code(code.values_BK.to(device), code.support_BK.to(device))
    got_update = update_atoms_sums(x_BD.to(device), moved, atoms_MD.to(device))
    gap = float((got_update.atoms_MD.cpu().double() - wanted_update.atoms_MD).norm(dim=1).max())
    if gap > 1e-3:
        problems.append(f"update: an atom differs by {gap:.2g}")
    return problems


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[list[float], float]:
    """Seconds of each of the repeats after two warm-ups, and the peak memory in MiB."""
    cuda = device.type == "cuda"
    for _ in range(2):
        work()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(_REPEATS):
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds, torch.cuda.max_memory_allocated() / 2**20 if cuda else float("nan")


def measure(shape: Shape, device: torch.device) -> list[dict[str, Any]]:
    """Rows for coding and update of one batch."""
    x_BD, _ = planted(shape)
    x_BD = x_BD.to(device)
    atoms_MD = torch.nn.functional.normalize(x_BD[torch.randperm(shape.n)[: shape.m].to(device)], dim=1)
    code = matching_pursuit(x_BD, atoms_MD, shape.k)
    variance = float((x_BD - x_BD.mean(dim=0)).double().pow(2).sum())
    fvu = float((x_BD - code.reconstruct(atoms_MD)).double().pow(2).sum()) / variance
    update = update_atoms_sums(x_BD, code, atoms_MD)
    products_s = 2 * shape.n * shape.m * shape.d / _FP32_FLOP_PER_S
    gram_rows_s = 4 * shape.n * shape.m * shape.k / _COPY_BYTES_PER_S
    update_s = 3 * 4 * shape.n * shape.k * shape.d / _COPY_BYTES_PER_S
    cases: list[tuple[str, Callable[[], Any], float, float]] = [
        ("coding", lambda: matching_pursuit(x_BD, atoms_MD, shape.k), fvu, products_s + gram_rows_s),
        ("update", lambda: update_atoms_sums(x_BD, code, atoms_MD), update.error_after / variance, update_s),
    ]
    return [_row(suite, shape, device, work, found, floor) for suite, work, found, floor in cases]


def measure_training(shape: Shape, device: torch.device, batches: int) -> dict[str, Any]:
    """A row for DoubleBatchKSVD over ``batches`` batches of data that lie on the device."""
    x_BD, _ = planted(shape)
    x_BD = x_BD.to(device)
    ksvd = DoubleBatchKSVD(shape.m, shape.k, device=str(device))
    seconds = []
    for _ in range(batches):
        started = time.perf_counter()
        ksvd.partial_fit(x_BD)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else float("nan")
    return _fields("train", shape, device, seconds, ksvd.log[-1].fvu, peak, float("nan"))


def _row(
    suite: str, shape: Shape, device: torch.device, work: Callable[[], Any], fvu: float, floor_s: float
) -> dict[str, Any]:
    seconds, peak_mib = timed(device, work)
    return _fields(suite, shape, device, seconds, fvu, peak_mib, floor_s)


def _fields(
    suite: str, shape: Shape, device: torch.device, seconds: list[float], fvu: float, peak_mib: float, floor_s: float
) -> dict[str, Any]:
    ordered = sorted(seconds)
    row = {
        "suite": suite,
        "case": shape.case,
        "impl": "ksvd_sae",
        "backend": mp_backend(device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "n": shape.n,
        "d": shape.d,
        "m": shape.m,
        "k": shape.k,
        "dtype": "float32",
        "median_s": statistics.median(ordered),
        "q20_s": ordered[len(ordered) // 5],
        "q80_s": ordered[(4 * len(ordered)) // 5],
        "fvu": fvu,
        "peak_mib": peak_mib,
        "floor_s": floor_s,
        "commit": commit(),
        "versions": versions(),
    }
    # NaN is no JSON: what does not apply is null.
    return {key: None if isinstance(value, float) and value != value else value for key, value in row.items()}


def main(device_name: str, *, small: bool, output: Path) -> None:
    """Check, measure, append the rows, print the table. Exits non-zero if a check fails."""
    device = resolve_device(device_name)
    problems = check(device)
    rows = []
    for shape in SMALL if small else PAPER:
        rows += [*measure(shape, device), measure_training(shape, device, batches=5)]
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{'suite':<8} {'case':<16} {'median ms':>10} {'floor ms':>9} {'of floor':>9} {'FVU':>7} {'peak MiB':>9}")
    for row in rows:
        median_s, floor_s = row["median_s"], row["floor_s"] or float("nan")
        peak_mib = float("nan") if row["peak_mib"] is None else row["peak_mib"]
        times = f"{1e3 * median_s:>10.2f} {1e3 * floor_s:>9.2f} {floor_s / median_s:>9.0%}"
        print(f"{row['suite']:<8} {row['case']:<16} {times} {row['fvu']:>7.4f} {peak_mib:>9.0f}")
    print("checks:", "passed" if not problems else "; ".join(problems))
    if problems:
        raise SystemExit(1)
