"""The GPU to-do list: everything that wants a GPU and has not been measured on one, in one script.

``python -m ksvd_sae.bench gpu`` needs what learning/ needs and no more, makes its own data (planted dictionaries of the
paper's shapes), first checks that coders and update give on the GPU what they give on the CPU, then times them, appends
rows to results/bench/gpu.jsonl and prints a table. Suites: ``coding`` (each coder and precision, and the torch backend
beside Triton's), ``update``, ``batch`` (coding and update of one batch, as training does it) and ``train`` (all of the
paper's 2.6 million samples × 3 passes, data on the device). `ksvd-sae bench table` shows which
goals nobody has measured.

Floors: products at the device's rate for their precision, one Gram row read a step, three gathers of K·D floats a
sample for the update, at the copy rate. The rates are an H200's: on another device the share is of an H200's floor.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksvd_sae.bench.problems import Shape, planted
from ksvd_sae.bench.rows import OURS, Who, append, row
from ksvd_sae.device import resolve_device
from ksvd_sae.learning.atom_update import update_atoms_sums, update_atoms_sweep
from ksvd_sae.learning.backends import Precision, coder_backend
from ksvd_sae.learning.coding import Coding
from ksvd_sae.learning.dbksvd import DictionaryLearner, LearnerOptions
from ksvd_sae.learning.fvu import fvu, variance
from ksvd_sae.learning.sparse_coding import Choice, Code, matching_pursuit, orthogonal_matching_pursuit

# H200: copy and bfloat16 as measured on one; float32 (no tensor cores) and TF32 as the data sheet has them, TF32 at the
# share of its peak that bfloat16 reached.
_COPY_BYTES_PER_S = 4.3e12
_FLOP_PER_S = {"float32": 67e12, "tf32": 394e12, "bfloat16": 788e12}
_WARMUPS, _REPEATS = 2, 7
_UPDATES = {"sweep": update_atoms_sweep, "sums": update_atoms_sums}

PAPER = (Shape("gemma-2-2b-4k", 65_536, 2304, 4096, 20), Shape("gemma-2-2b-16k", 65_536, 2304, 16_384, 80))
SMALL = (Shape("small", 512, 48, 96, 5),)
# 40 batches of 65,536: the paper's 2,621,440 samples.
_BATCHES, _SMALL_BATCHES, _PASSES = 40, 3, 3


@dataclass(frozen=True)
class Case:
    """One thing to time: the row's suite, method and precision, what runs it, the error it reaches, its floor."""

    suite: str
    config: str
    dtype: str
    backend: str
    work: Callable[[], Any]
    fvu: float
    floor_s: float


@dataclass(frozen=True)
class Goal:
    """What a row of some suite, case and method must reach; the fastest of its precisions counts.

    most_s: seconds that the row's n samples may take.
    """

    what: str
    suite: str
    case: str
    config: str
    most_s: float


GOALS = (
    Goal("coding and update of a batch ≤ 40 ms", "batch", "gemma-2-2b-4k", "db-ksvd", 0.040),
    Goal("coding alone ≥ 3 million samples/s", "coding", "gemma-2-2b-4k", "mp", 65_536 / 3e6),
    Goal("2.6 million samples × 3 passes ≤ 10 s", "train", "gemma-2-2b-4k", "db-ksvd", 10.0),
    Goal("m = 16,384, k = 80, same data ≤ 60 s", "train", "gemma-2-2b-16k", "db-ksvd", 60.0),
)


def check(device: torch.device) -> list[str]:
    """Coders and update on ``device`` against the CPU in float64; returns what differs by more than float32 allows."""
    shape = Shape("check", 2048, 200, 700, 12)
    x_BD, _ = planted(shape)
    atoms_MD = torch.nn.functional.normalize(x_BD[: shape.m], dim=1)
    problems = []
    by_error = partial(orthogonal_matching_pursuit, choice="error")
    coders: dict[str, Callable[..., Code]] = {
        "mp": matching_pursuit,
        "omp": orthogonal_matching_pursuit,
        "ormp": by_error,
    }
    for name, coder in coders.items():
        wanted = coder(x_BD.double(), atoms_MD.double(), shape.k).reconstruct(atoms_MD.double())
        got = coder(x_BD.to(device), atoms_MD.to(device), shape.k).reconstruct(atoms_MD.to(device)).cpu().double()
        # Near ties may pick another atom: almost all samples must agree, and the error must.
        same = float(((got - wanted).norm(dim=1) < 1e-3 * wanted.norm(dim=1)).double().mean())
        errors = [float((x_BD - r).norm()) for r in (got, wanted)]
        if same < 0.99 or abs(errors[0] / errors[1] - 1) > 1e-3:
            problems.append(f"{name}: {same:.1%} of samples agree, errors {errors[0]:.5g} and {errors[1]:.5g}")
    code = matching_pursuit(x_BD, atoms_MD, shape.k, backend="torch")
    wide = Code(code.values_BK.double(), code.support_BK)
    moved = Code(code.values_BK.to(device), code.support_BK.to(device))
    for name, update in _UPDATES.items():
        wanted_MD = update(x_BD.double(), wide, atoms_MD.double()).atoms_MD
        got_MD = update(x_BD.to(device), moved, atoms_MD.to(device)).atoms_MD.cpu().double()
        gap = float((got_MD - wanted_MD).norm(dim=1).max())
        if gap > 1e-3:
            problems.append(f"update by {name}: an atom differs by {gap:.2g}")
    return problems


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[list[float], float]:
    """Seconds of each of the repeats after two warm-ups, and the peak memory in MiB."""
    cuda = device.type == "cuda"
    for _ in range(_WARMUPS):
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
    """Rows for coding, update and both of one batch."""
    x_BD, _ = planted(shape, device=device)
    atoms_MD = torch.nn.functional.normalize(x_BD[torch.randperm(shape.n)[: shape.m].to(device)], dim=1)
    rows = []
    for case in _cases(shape, device, x_BD, atoms_MD):
        seconds, peak_mib = timed(device, case.work)
        rows.append(_row(shape, device, case, seconds, peak_mib))
    return rows


def _precisions(device: torch.device) -> list[Precision]:
    return ["float32", "tf32", "bfloat16"] if device.type == "cuda" else ["float32", "bfloat16"]


def _cases(shape: Shape, device: torch.device, x_BD: Tensor, atoms_MD: Tensor) -> Iterator[Case]:
    def error_of(code: Code) -> float:
        return fvu(x_BD, code.reconstruct(atoms_MD), "bench gpu")

    def products_s(precision: str) -> float:
        return 2 * shape.n * shape.m * shape.d / _FLOP_PER_S[precision]

    gram_row_s = 4 * shape.n * shape.m / _COPY_BYTES_PER_S
    backend = coder_backend(device, n_atoms=shape.m, k=shape.k)
    precisions = _precisions(device)
    for precision in precisions:
        pursue = partial(matching_pursuit, x_BD, atoms_MD, shape.k, precision=precision)
        # The kernel reads a bfloat16 Gram matrix in that precision.
        steps_s = shape.k * gram_row_s / (2 if precision == "bfloat16" else 1)
        yield Case("coding", "mp", precision, backend, pursue, error_of(pursue()), products_s(precision) + steps_s)
    plain = partial(matching_pursuit, x_BD, atoms_MD, shape.k, backend="torch")
    floor_s = products_s("float32") + shape.k * gram_row_s
    yield Case("coding", "mp", "float32", "torch", plain, error_of(plain()), floor_s)
    refit = partial(matching_pursuit, x_BD, atoms_MD, shape.k, refit=True)
    yield Case("coding", "mp_refit", "float32", backend, refit, error_of(refit()), floor_s)
    omp_s = products_s("float32") + shape.k * (shape.k + 1) / 2 * gram_row_s
    omp_backend = coder_backend(device, n_atoms=shape.m, k=shape.k, method="omp")
    choices: dict[str, Choice] = {"omp": "product", "ormp": "error"}
    for config, choice in choices.items():
        orthogonal = partial(orthogonal_matching_pursuit, x_BD, atoms_MD, shape.k, choice=choice)
        yield Case("coding", config, "float32", omp_backend, orthogonal, error_of(orthogonal()), omp_s)
    code = matching_pursuit(x_BD, atoms_MD, shape.k)
    gather_s = 4 * shape.n * shape.k * shape.d / _COPY_BYTES_PER_S
    products_of_atoms_s = (2 * shape.n * shape.m**2 + shape.m**2 * shape.d) / _FLOP_PER_S["float32"]
    floors_s = {"sweep": 2 * gather_s + products_of_atoms_s, "sums": 3 * gather_s}
    for name, by in _UPDATES.items():
        updated_fvu = by(x_BD, code, atoms_MD).error_after / variance(x_BD, "bench gpu")
        yield Case("update", name, "float32", "torch", partial(by, x_BD, code, atoms_MD), updated_fvu, floors_s[name])
    update_s = floors_s["sweep"]
    for precision in precisions:
        learner = DictionaryLearner(LearnerOptions(shape.m, Coding(shape.k), precision=precision), device=str(device))
        learner.partial_fit(x_BD)
        both = partial(learner.partial_fit, x_BD)
        batch_s = products_s(precision) + shape.k * gram_row_s + update_s
        yield Case("batch", "db-ksvd", precision, backend, both, learner.log[-1].fvu, batch_s)


def measure_training(shape: Shape, device: torch.device, n_batches: int, precision: Precision) -> dict[str, Any]:
    """A row for a whole training on data that lie on the device: n is all samples, median_s the one training's time."""
    _, atoms_MD = planted(Shape("", 1, shape.d, shape.m, shape.k), device=device)
    batches = [planted(shape, 1 + i, device, atoms_MD)[0] for i in range(n_batches)]
    backend = coder_backend(device, n_atoms=shape.m, k=shape.k)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    options = LearnerOptions(shape.m, Coding(shape.k), passes=_PASSES, precision=precision)
    learner = DictionaryLearner(options, device=str(device))
    started = time.perf_counter()
    learner.fit(lambda: iter(batches))
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else float("nan")
    steps = _PASSES * n_batches
    gram_s = 4 * shape.n * shape.m * shape.k / _COPY_BYTES_PER_S
    update_s = 3 * 4 * shape.n * shape.k * shape.d / _COPY_BYTES_PER_S
    floor_s = steps * (2 * shape.n * shape.m * shape.d / _FLOP_PER_S[precision] + gram_s + update_s)
    case = Case("train", "db-ksvd", precision, backend, lambda: None, learner.log[-1].fvu, floor_s)
    whole = Shape(shape.case, n_batches * shape.n, shape.d, shape.m, shape.k)
    return _row(whole, device, case, [seconds], peak)


def _row(shape: Shape, device: torch.device, case: Case, seconds: list[float], peak_mib: float) -> dict[str, Any]:
    return row(
        case.suite,
        shape.case,
        Who(OURS, case.config, case.backend, dtype=case.dtype, device=device),
        **shape.sizes,
        seconds=seconds,
        warmups=0 if case.suite == "train" else _WARMUPS,
        seed=0,
        fvu=case.fvu,
        peak_mib=peak_mib,
        floor_s=case.floor_s,
    )


def _show(rows: list[dict[str, Any]]) -> None:
    for fields in rows:
        names = [fields[name] for name in ("suite", "case", "config", "dtype", "backend")]
        who = "{:<8} {:<16} {:<9} {:<9} {:<8}".format(*names)
        of_floor = fields["floor_s"] / fields["median_s"]
        peak = "" if fields["peak_mib"] is None else f"{fields['peak_mib']:.0f}"
        print(f"{who} {1e3 * fields['median_s']:>10.2f} {of_floor:>9.0%} {fields['fvu']:>8.4f} {peak:>8}", flush=True)


def main(device_name: str, *, small: bool, output: Path) -> None:
    """Check, measure, append the rows, print the table. Exits non-zero if a check fails."""
    device = resolve_device(device_name)
    problems = check(device)
    if problems and not small:
        # Wrong results need no timing; and a device's time is short.
        raise SystemExit("checks: " + "; ".join(problems))
    heads = ("suite", "case", "config", "dtype", "backend", "ms", "of floor", "FVU", "MiB")
    print("{:<8} {:<16} {:<9} {:<9} {:<8} {:>10} {:>9} {:>8} {:>8}".format(*heads))
    for shape in SMALL if small else PAPER:
        rows = measure(shape, device)
        append(output, rows)
        _show(rows)
    for shape in SMALL if small else PAPER:
        for precision in _precisions(device):
            rows = [measure_training(shape, device, _SMALL_BATCHES if small else _BATCHES, precision)]
            append(output, rows)
            _show(rows)
    print("checks:", "passed" if not problems else "; ".join(problems))
    if problems:
        raise SystemExit(1)
