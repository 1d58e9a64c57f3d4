"""The GPU to-do list: everything that wants a GPU and has not been measured on one, in one script.

``python -m ksvd_sae.bench gpu`` needs what learning/ needs and no more, and makes its own data (planted dictionaries of
the paper's shapes). A GPU's time is short, so it knows its deadline, does what matters most first, appends each row to
results/bench/gpu.jsonl as it is measured, and goes on where a step fails:

==============  ====================================================================================================
step            what
==============  ====================================================================================================
check           coders and updates against the CPU in float64, at a small size
goals           ``batch`` (coding and update), ``coding`` and ``train`` (the paper's 2.6 million samples × 3 passes,
                data on the device), at 4,096 and at 16,384 atoms, in both precisions
ceilings        ``ceiling``: copies, products at the real shapes in each precision, rows read at random
check at size   the same as check at the real shapes against float64 on the GPU, with heavy-tailed usage and dead
                atoms; two runs must give the same bits
stages          ``stage``: each stage of a batch by itself, with what the model (gpu_model.py) says of it
launches        ``launch``: warps, register limits and Gram types of the pursuit; the best go to launches.json beside
                the rows, which, copied to learning/kernels/, the launcher reads
harvest         Gemma-2-2B's layers up to the hook on random weights: a harvest beside the bare pass, where
                TransformerLens is
profile         the thirty most expensive kernels of a batch and its waits, in gpu-profile.txt
counters        hardware counters of one launch each by ncu, where there is one, in gpu-counters.txt
tests           ``pytest -m gpu``, where there is a pytest
==============  ====================================================================================================

Floors are the model's times. `ksvd-sae bench table` shows which goals nobody has measured.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ksvd_sae.bench import gpu_model
from ksvd_sae.bench.problems import Shape, planted
from ksvd_sae.bench.rows import OURS, Who, append, row
from ksvd_sae.device import resolve_device
from ksvd_sae.learning.atom_update import residual_of, sweep, sweep_sums, update_atoms_sweep
from ksvd_sae.learning.averaging import Average
from ksvd_sae.learning.backends import coder_backend
from ksvd_sae.learning.coding import Coding
from ksvd_sae.learning.dbksvd import DictionaryLearner, LearnerOptions
from ksvd_sae.learning.fvu import fvu, variance
from ksvd_sae.learning.kernels import pursuit_triton
from ksvd_sae.learning.products import Precision, products, times
from ksvd_sae.learning.redraw import near_duplicates, redrawn
from ksvd_sae.learning.sparse_coding import Choice, Code, matching_pursuit, orthogonal_matching_pursuit, pursued
from ksvd_sae.learning.training import checked_batch

_WARMUPS, _REPEATS = 2, 7

PAPER = (Shape("gemma-2-2b-4k", 65_536, 2304, 4096, 20), Shape("gemma-2-2b-16k", 65_536, 2304, 16_384, 80))
SMALL = (Shape("small", 512, 48, 96, 5), Shape("small-wide", 512, 12, 96, 5))
# 40 batches of 65,536: the paper's 2,621,440 samples.
_BATCHES, _SMALL_BATCHES, _PASSES = 40, 3, 3
# Samples that a check at the real shapes looks at.
_CHECKED = 2048
# Of the rows that bench/harvest.py gives.
HARVEST_CASE = "google/gemma-2-2b blocks.12.hook_resid_post"


@dataclass(frozen=True)
class Goal:
    """What a row of some suite, case and method must reach; the fastest of its precisions counts.

    most_s: seconds that the row's n samples may take. of_floor: part of its floor's speed that it must reach.
    """

    what: str
    suite: str
    case: str
    config: str
    most_s: float = float("inf")
    of_floor: float = 0.0


GOALS = (
    Goal("coding and update of a batch ≤ 15 ms", "batch", "gemma-2-2b-4k", "db-ksvd", 0.015),
    Goal("coding alone ≥ 8 million samples/s", "coding", "gemma-2-2b-4k", "mp", 65_536 / 8e6),
    Goal("the same by OMP ≤ 40 ms", "coding", "gemma-2-2b-4k", "omp", 0.040),
    Goal("2.6 million samples × 3 passes ≤ 2 s", "train", "gemma-2-2b-4k", "db-ksvd", 2.0),
    Goal("m = 16,384, k = 80: coding of a batch ≤ 60 ms", "coding", "gemma-2-2b-16k", "mp", 0.060),
    Goal("m = 16,384, k = 80, same data ≤ 12 s", "train", "gemma-2-2b-16k", "db-ksvd", 12.0),
    Goal("harvest, written ≥ 70 % of the bare model's pass", "harvest", HARVEST_CASE, "harvest", of_floor=0.7),
)


def check(device: torch.device) -> list[str]:
    """Coders and update on ``device`` against the CPU in float64; returns what differs by more than float32 allows."""
    shape = Shape("check", 2048, 200, 700, 12)
    x_BD, _ = planted(shape)
    atoms_MD = normalize(x_BD[: shape.m], dim=1)
    return _differences(x_BD, atoms_MD, shape.k, device, torch.device("cpu"))


def check_at_size(shape: Shape, device: torch.device) -> list[str]:
    """The same at a real shape against float64 on the device, where usage is heavy-tailed and some atoms are dead; and
    whether two trainings give the same bits."""
    x_BD, atoms_MD = planted(replace(shape, n=min(shape.n, _CHECKED)), device=device)
    # An atom as common as the mean of activations, and atoms that nobody picks.
    x_BD = x_BD + 3 * torch.randn(len(x_BD), 1, device=device).abs() * atoms_MD[0]
    atoms_MD = atoms_MD.clone()
    dead = slice(shape.m // 2, shape.m // 2 + max(1, shape.m // 50))
    span_DD = torch.linalg.svd(x_BD.double(), full_matrices=True).Vh
    if len(x_BD) < shape.d:
        # Orthogonal to all samples.
        unseen = torch.arange(dead.stop - dead.start) % (shape.d - len(x_BD))
        atoms_MD[dead] = span_DD[len(x_BD) :][unseen.to(device)].float()
    problems = _differences(x_BD, atoms_MD, shape.k, device, device)
    options = LearnerOptions(shape.m, Coding(shape.k), init="random")
    learners = [DictionaryLearner(options, device=str(device)) for _ in range(2)]
    for learner in learners:
        for _ in range(2):
            learner.partial_fit(x_BD)
    if not torch.equal(learners[0].atoms_MD, learners[1].atoms_MD):
        problems.append("training: two runs differ in their bits")
    return problems


def _differences(x_BD: Tensor, atoms_MD: Tensor, k: int, device: torch.device, truth: torch.device) -> list[str]:
    problems = []
    wide_BD, wide_MD = x_BD.to(truth).double(), atoms_MD.to(truth).double()
    here_BD, here_MD = x_BD.to(device), atoms_MD.to(device)
    for name, coder in _coders().items():
        wanted = coder(wide_BD, wide_MD, k).reconstruct(wide_MD)
        got = coder(here_BD, here_MD, k).reconstruct(here_MD).to(truth).double()
        # Near ties may pick another atom: almost all samples must agree, and the error must.
        same = float(((got - wanted).norm(dim=1) < 1e-3 * wanted.norm(dim=1)).double().mean())
        errors = [float((wide_BD - rebuilt).norm()) for rebuilt in (got, wanted)]
        if same < 0.99 or abs(errors[0] / errors[1] - 1) > 1e-3:
            problems.append(f"{name}: {same:.1%} of samples agree, errors {errors[0]:.5g} and {errors[1]:.5g}")
    code = matching_pursuit(wide_BD, wide_MD, k, backend="torch")
    moved = Code(code.values_BK.float().to(device), code.support_BK.to(device))
    wanted_MD = update_atoms_sweep(wide_BD, code, wide_MD).atoms_MD
    gap_M = (update_atoms_sweep(here_BD, moved, here_MD).atoms_MD.to(truth).double() - wanted_MD).norm(dim=1)
    # Nothing is taken off the error but what rounding keeps: atoms of next to no energy may go astray.
    typical = float(gap_M.quantile(0.95))
    # On CUDA a sweep's sums are of rounded codes: its step is a hundredth off, where float32's is exact.
    if typical > (2e-2 if device.type == "cuda" else 1e-3):
        problems.append(f"update by a sweep: atoms differ by {typical:.2g}")
    return problems


def _coders() -> dict[str, Callable[..., Code]]:
    by_error = partial(orthogonal_matching_pursuit, choice="error")
    return {"mp": matching_pursuit, "omp": orthogonal_matching_pursuit, "ormp": by_error}


class Clock:
    """Seconds of a piece of work on a device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cuda = device.type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def timed(self, work: Callable[[], Any]) -> tuple[list[float], float]:
        """Seconds of each of the repeats after two warm-ups, and the peak memory in MiB."""
        for _ in range(_WARMUPS):
            work()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(_REPEATS):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            seconds.append(time.perf_counter() - started)
        return seconds, torch.cuda.max_memory_allocated() / 2**20 if self.cuda else float("nan")


@dataclass
class Bench:
    """One run of the script: where, on what, and what came of it."""

    device: torch.device
    shapes: tuple[Shape, ...]
    n_batches: int
    output: Path

    def __post_init__(self) -> None:
        self.clock = Clock(self.device)

    def record(
        self,
        suite: str,
        shape: Shape,
        config: str,
        seconds: list[float],
        *,
        dtype: str = "float32",
        backend: str = "torch",
        floor_s: float | None = None,
        error: float | None = None,
        peak_mib: float | None = None,
        **facts: Any,
    ) -> None:
        """Append the row, and show it."""
        fields = row(
            suite,
            shape.case,
            Who(OURS, config, backend, dtype=dtype, device=self.device),
            **shape.sizes,
            seconds=seconds,
            warmups=0 if suite == "train" else _WARMUPS,
            seed=0,
            fvu=error,
            peak_mib=peak_mib,
            floor_s=floor_s,
            **facts,
        )
        append(self.output, [fields])
        share = "" if not floor_s else f"{floor_s / fields['median_s']:.0%} of the model"
        what = f"{suite:<8} {shape.case:<15} {config:<22} {dtype:<9} {backend:<7}"
        print(f"{what} {1e3 * fields['median_s']:>10.3f} ms  {share:<18} {facts or ''}", flush=True)

    def backend(self, shape: Shape, **what: Any) -> str:
        return coder_backend(self.device, n_atoms=shape.m, k=shape.k, **what)

    def problem(self, shape: Shape) -> tuple[Tensor, Tensor]:
        """Samples and atoms to code them with: other samples, as when training begins."""
        x_BD, _ = planted(shape, device=self.device)
        return x_BD, normalize(x_BD[torch.randperm(shape.n)[: shape.m].to(self.device)], dim=1)

    def time(self, suite: str, shape: Shape, config: str, work: Callable[[], Any], **fields: Any) -> None:
        seconds, peak_mib = self.clock.timed(work)
        self.record(suite, shape, config, seconds, peak_mib=peak_mib, **fields)

    def _learner(self, shape: Shape, precision: Precision) -> DictionaryLearner:
        """One whose ``partial_fit`` does what ``fit`` does with a batch: it need not follow how the mean moves."""
        options = LearnerOptions(shape.m, Coding(shape.k), precision=precision, centre=False)
        return DictionaryLearner(options, device=str(self.device))

    def batch(self, shape: Shape, precision: Precision) -> None:
        x_BD, _ = self.problem(shape)
        learner = self._learner(shape, precision)
        learner.partial_fit(x_BD)
        work = partial(learner.partial_fit, x_BD)
        facts = {"floor_s": gpu_model.predicted_s(shape, precision), "error": learner.log[-1].fvu}
        self.time("batch", shape, "db-ksvd", work, dtype=precision, backend=self.backend(shape), **facts)

    def coding(self, shape: Shape, precision: Precision, config: str) -> None:
        x_BD, atoms_MD = self.problem(shape)
        if config.startswith("mp"):
            coder: Callable[..., Code] = partial(matching_pursuit, refit=config == "mp_refit")
            floor_s = gpu_model.predicted_s(shape, precision, "statistics", "products", "gram", "pursuit")
            backend = self.backend(shape)
        else:
            choice: Choice = "error" if config == "ormp" else "product"
            coder = partial(orthogonal_matching_pursuit, choice=choice)
            floor_s, backend = gpu_model.orthogonal_s(shape), self.backend(shape, method="omp")
        work = partial(coder, x_BD, atoms_MD, shape.k, precision=precision)
        error = fvu(x_BD, work().reconstruct(atoms_MD), "bench gpu")
        self.time("coding", shape, config, work, dtype=precision, backend=backend, floor_s=floor_s, error=error)

    def update(self, shape: Shape) -> None:
        x_BD, atoms_MD = self.problem(shape)
        code = matching_pursuit(x_BD, atoms_MD, shape.k)
        floor_s = gpu_model.predicted_s(shape, "float32", "leave", "usage", "sums", "solve")
        error = update_atoms_sweep(x_BD, code, atoms_MD).error_after / variance(x_BD, "bench gpu")
        by = partial(update_atoms_sweep, x_BD, code, atoms_MD)
        self.time("update", shape, "sweep", by, floor_s=floor_s, error=error)

    def train(self, shape: Shape, precision: Precision) -> None:
        """A whole training on data that lie on the device: n is all samples, median_s the one training's time."""
        _, atoms_MD = planted(replace(shape, n=1), device=self.device)
        samples_ND = torch.empty(self.n_batches * shape.n, shape.d, dtype=torch.float32, device=self.device)
        for batch, rows_BD in enumerate(torch.split(samples_ND, shape.n)):
            rows_BD.copy_(planted(shape, 1 + batch, self.device, atoms_MD)[0])
        options = LearnerOptions(shape.m, Coding(shape.k), passes=_PASSES, precision=precision, batch_samples=shape.n)
        learner = DictionaryLearner(options, device=str(self.device))
        self.clock.wait()
        if self.clock.cuda:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        learner.fit(samples_ND)
        self.clock.wait()
        seconds = [time.perf_counter() - started]
        peak_mib = torch.cuda.max_memory_allocated() / 2**20 if self.clock.cuda else float("nan")
        floor_s = _PASSES * self.n_batches * gpu_model.predicted_s(shape, precision)
        whole, found = replace(shape, n=len(samples_ND)), {"error": learner.log[-1].fvu, "peak_mib": peak_mib}
        self.record(
            "train", whole, "db-ksvd", seconds, dtype=precision, backend=self.backend(shape), floor_s=floor_s, **found
        )

    def ceilings(self) -> None:
        """What this device gives: GB/s and TFLOP/s beside the model's."""
        shape = self.shapes[0]
        big = torch.ones(max(1024, shape.n * shape.m), device=self.device)
        other = torch.empty_like(big)
        n_bytes = 2 * big.nbytes
        self.rated("copy", shape, lambda: other.copy_(big), n_bytes / gpu_model.COPY_BYTES_PER_S, n_bytes=n_bytes)
        # Rows as long as those of the Gram matrix, from tables that fit into the L2 cache and that do not.
        for table_mib in (16, 32, 64, 128):
            for dtype in (torch.float32, torch.float16):
                rows = max(1, (table_mib << 20) // (shape.m * dtype.itemsize))
                table, out = torch.ones(rows, shape.m, dtype=dtype, device=self.device), big.view(dtype)
                picks = torch.randint(rows, (min(shape.n, len(out) // shape.m),), device=self.device)
                out_rows = out[: len(picks) * shape.m].view(-1, shape.m)
                read = table.element_size() * shape.m * len(picks)
                name = f"rows of {table_mib} MiB"
                work = partial(torch.index_select, table, 0, picks, out=out_rows)
                floor_s = read / gpu_model.L2_BYTES_PER_S + read / gpu_model.COPY_BYTES_PER_S
                self.rated(name, shape, work, floor_s, dtype=str(dtype)[6:], n_bytes=2 * read)
        a, b = (torch.randn(rows, shape.d, device=self.device) for rows in (shape.n, shape.m))
        flops = 2 * shape.n * shape.m * shape.d
        kinds: dict[str, tuple[Callable[[], Any], float]] = {
            "float32, plain": (lambda: a @ b.T, flops / gpu_model.FLOAT32_FLOP_PER_S),
            "float32, split": (partial(products, a, b), 3 * flops / gpu_model.BFLOAT16_FLOP_PER_S),
            "bfloat16": (partial(times(b, "bfloat16"), a), flops / gpu_model.BFLOAT16_FLOP_PER_S),
        }
        for name, (product, floor_s) in kinds.items():
            self.rated(f"product {name}", shape, product, floor_s, flops=flops)

    def rated(
        self,
        name: str,
        shape: Shape,
        work: Callable[[], Any],
        floor_s: float,
        *,
        dtype: str = "float32",
        suite: str = "ceiling",
        n_bytes: float = 0,
        flops: float = 0,
    ) -> None:
        """A row with the rates that follow from bytes and flops."""
        seconds, peak_mib = self.clock.timed(work)
        best_s = min(seconds)
        facts: dict[str, Any] = {"gb_per_s": round(n_bytes / best_s / 1e9, 1)} if n_bytes else {}
        facts |= {"tflop_per_s": round(flops / best_s / 1e12, 2)} if flops else {}
        self.record(suite, shape, name, seconds, dtype=dtype, floor_s=floor_s, peak_mib=peak_mib, **facts)

    def stages(self, shape: Shape, precision: Precision) -> None:
        """Each stage of a batch by itself, in the model's names."""
        x_BD, atoms_MD = self.problem(shape)
        code, _ = pursued(x_BD, atoms_MD, shape.k, precision=precision)
        order_B = torch.randperm(shape.n, device=self.device)
        centre_D, idle_M = x_BD.mean(dim=0), torch.rand(shape.m, device=self.device) < 0.01
        gram_MM = products(atoms_MD, atoms_MD)
        energy_B = torch.linalg.vector_norm(x_BD, dim=1).square()
        residual_BD, sums = sweep_sums(x_BD, code, atoms_MD)
        average, generator = Average.of(atoms_MD), torch.Generator().manual_seed(0)
        options = {"gram_MM": gram_MM, "energy_B": energy_B, "precision": precision}
        work: dict[str, Callable[[], Any]] = {
            "samples": lambda: x_BD[order_B] - centre_D,
            "statistics": lambda: checked_batch(x_BD),
            "products": lambda: times(atoms_MD, precision)(x_BD[: _rows(shape)]),
            "gram": lambda: products(atoms_MD, atoms_MD),
            "products + pursuit": lambda: pursued(x_BD, atoms_MD, shape.k, **options),
            "leave": lambda: residual_of(x_BD, code, atoms_MD),
            "leave + usage": lambda: sweep_sums(x_BD, code, atoms_MD),
            "sums + solve": lambda: sweep(atoms_MD, sweep_sums(x_BD, code, atoms_MD)[1]),
            "duplicates": lambda: near_duplicates(atoms_MD, sums.energy_M, 0.99),
            "redraw": lambda: redrawn(atoms_MD, idle_M, "residual", x_BD, residual_BD, generator),
            "average": lambda: average.with_next(atoms_MD, idle_M),
        }
        for name, call in work.items():
            names = tuple(name.split(" + "))
            if name == "sums + solve":
                names += ("leave", "usage")
            parts = [stage for stage in gpu_model.stages(shape, precision) if stage.name in names]
            share = _rows(shape) / shape.n if name == "products" else 1.0
            n_bytes = share * sum(stage.n_bytes + stage.gathered_bytes for stage in parts)
            flops = share * sum(stage.bfloat16_flops + stage.float32_flops for stage in parts)
            floor_s = share * sum(stage.seconds for stage in parts)
            self.rated(name, shape, call, floor_s, dtype=precision, suite="stage", n_bytes=n_bytes, flops=flops)

    def launches(self, shape: Shape) -> None:
        """Every sensible launch of the pursuit; the best for each Gram type go to launches.json beside the rows."""
        reason = pursuit_triton.why_not(self.device, shape.m, shape.k)
        if reason is not None:
            print(f"launches: none tried, as {reason}", flush=True)
            return
        x_BD, atoms_MD = self.problem(replace(shape, n=min(shape.n, 8 * _rows(shape))))
        rows = slice(0, _rows(shape))
        products_CM, energy_C = products(x_BD[rows], atoms_MD), x_BD[rows].square().sum(dim=1)
        best: dict[str, Any] = {}
        for gram_dtype in (torch.float32, torch.float16):
            gram_MM = products(atoms_MD, atoms_MD).to(gram_dtype)
            plain = pursuit_triton.launch(shape.m, shape.k)
            found: dict[float, dict[str, Any]] = {}
            for warps in (2, 4, 8, 16, 32):
                per_thread = plain["BLOCK_M"] / (32 * warps)
                for registers in (None, 48, 64, 80, 96, 128, 168):
                    if not 8 <= per_thread <= 64 or (registers and registers * 32 * warps > 65_536):
                        continue
                    options = {"num_warps": warps} | ({"maxnreg": registers} if registers else {})
                    code = Code.empty(x_BD[rows], shape.k)
                    out = (code.values_BK, code.support_BK, torch.zeros_like(code.values_BK))
                    chunk = (
                        products_CM,
                        energy_C,
                        torch.zeros_like(energy_C),
                        gram_MM,
                        shape.k,
                        4 * shape.k,
                        0.0,
                        False,
                    )
                    with pursuit_triton.launched_as(options):
                        work = partial(pursuit_triton.pursue, *chunk, *out)
                        seconds, _ = self.clock.timed(work)
                    name = ", ".join(f"{value} {name}" for name, value in options.items())
                    self.record("launch", replace(shape, n=len(energy_C)), name, seconds, dtype=str(gram_dtype)[6:])
                    found[min(seconds)] = options
            best[f"{plain['BLOCK_M']} {gram_dtype}".replace("torch.", "")] = found[min(found)]
        if self.clock.cuda:
            path = self.output.with_name("launches.json")
            known = json.loads(path.read_text()) if path.exists() else {}
            device = torch.cuda.get_device_name(self.device)
            known[device] = known.get(device, {}) | best
            path.write_text(json.dumps(known, indent=1) + "\n")
            print(f"launches: the best are in {path}; copied to {pursuit_triton.LAUNCHES}, they are used", flush=True)

    def harvest(self) -> None:
        if find_spec("transformer_lens") is None:
            print("harvest: no transformer_lens here", flush=True)
            return
        from ksvd_sae.bench.harvest import on_random_weights

        rows = on_random_weights(self.device, small=self.shapes == SMALL).rows
        append(self.output, rows)
        for fields in rows:
            share = f"{fields['floor_s'] / fields['median_s']:.0%} of the fastest bare pass"
            print(f"harvest  {fields['impl']:<17} {fields['samples_per_s']:>10,.0f} tokens/s  {share}", flush=True)

    def profile(self, shape: Shape, precision: Precision) -> None:
        """Where the time of a batch goes, kernel by kernel, and how often the host waits."""
        x_BD, _ = self.problem(shape)
        learner = self._learner(shape, precision)
        for _ in range(_WARMUPS):
            learner.partial_fit(x_BD)
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if self.clock.cuda else []
        with torch.profiler.profile(activities=activities) as profile:
            learner.partial_fit(x_BD)
            self.clock.wait()
        events = profile.key_averages()
        key = "device_time_total" if self.clock.cuda else "cpu_time_total"
        waits = {event.key: event.count for event in events if "Synchronize" in event.key or "DtoH" in event.key}
        path = self.output.with_name("gpu-profile.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"{shape} {precision}\nwaits: {waits}\n{events.table(sort_by=key, row_limit=30)}\n")
        print(f"profile: {path}, waits {waits}", flush=True)

    def counters(self, left_s: float) -> None:
        """Hardware counters of one launch of each kernel."""
        ncu = shutil.which("ncu")
        if ncu is None or not self.clock.cuda:
            print("counters: no ncu here", flush=True)
            return
        kernels = "regex:pursue_sample|leave_row|sum_rows"
        command = [ncu, "--kernel-name", kernels, "--launch-count", "3", "--set", "full"]
        with tempfile.TemporaryDirectory() as folder:
            # Under the profiler a batch takes as long as it takes: no row of ours.
            once = ["gpu", "--only", "once", "--output", str(Path(folder) / "gpu.jsonl")]
            command += [sys.executable, "-m", "ksvd_sae.bench", *once]
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, left_s))
        self.output.with_name("gpu-counters.txt").write_text(done.stdout + done.stderr)

    def tests(self, left_s: float) -> list[str]:
        """``pytest -m gpu`` of a checkout."""
        folder = Path(__file__).resolve().parents[2]
        if shutil.which("pytest") is None or not (folder / "tests").exists() or not self.clock.cuda:
            print("tests: no pytest, no tests or no GPU here", flush=True)
            return []
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        command += ["tests/learning/test_pursuit_triton.py", "tests/bench/test_gpu.py"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=max(1.0, left_s))
        self.output.with_name("gpu-tests.txt").write_text(done.stdout + done.stderr)
        return [] if done.returncode == 0 else [f"pytest -m gpu: {done.stdout.strip().splitlines()[-1:]}"]


def _rows(shape: Shape) -> int:
    """Samples whose products are a GiB: what the coder takes at a time."""
    return max(1, min(shape.n, (1 << 30) // (4 * shape.m)))


Step = tuple[str, float, Callable[[], list[str] | None]]


def steps(bench: Bench, left_s: Callable[[], float]) -> Iterator[Step]:
    """What to do in order of what it is worth: its name, the seconds that it may take on an H200, and itself.

    Args: left_s: seconds until the deadline.
    """
    narrow, wide = bench.shapes
    yield "check", 20, lambda: check(bench.device)
    for precision in ("bfloat16", "float32"):
        yield f"batch {precision}", 10, partial(bench.batch, narrow, precision)
        yield f"coding {precision}", 10, partial(bench.coding, narrow, precision, "mp")
        yield f"train {precision}", 25, partial(bench.train, narrow, precision)
    yield "omp", 15, partial(bench.coding, narrow, "bfloat16", "omp")
    yield "wide batch", 15, partial(bench.batch, wide, "bfloat16")
    yield "wide coding", 15, partial(bench.coding, wide, "bfloat16", "mp")
    yield "stages", 20, partial(bench.stages, narrow, "bfloat16")
    yield "profile", 15, partial(bench.profile, narrow, "bfloat16")
    yield "check at size", 30, lambda: check_at_size(narrow, bench.device)
    yield "wide train", 45, partial(bench.train, wide, "bfloat16")
    yield "harvest", 60, bench.harvest
    yield "ceilings", 15, bench.ceilings
    yield "launches", 60, partial(bench.launches, narrow)
    yield "wide launches", 60, partial(bench.launches, wide)
    yield "wide stages", 30, partial(bench.stages, wide, "bfloat16")
    yield "tests", 90, lambda: bench.tests(left_s())
    yield "stages, float32", 20, partial(bench.stages, narrow, "float32")
    for config in ("mp_refit", "omp", "ormp"):
        yield f"{config}, float32", 20, partial(bench.coding, narrow, "float32", config)
    yield "update", 20, partial(bench.update, narrow)
    yield "wide check at size", 40, lambda: check_at_size(wide, bench.device)
    yield "wide float32", 30, partial(bench.batch, wide, "float32")
    yield "counters", 90, lambda: bench.counters(left_s())
    # What a profiler is given: not in a run of all steps.
    yield "once", float("inf"), partial(bench.batch, narrow, "bfloat16")


def main(device_name: str, *, small: bool, output: Path, minutes: float, only: str | None = None) -> None:
    """Do the steps that there is time for. Exits non-zero if a check or a step fails.

    Args: minutes: from now on; a step whose time is not left is left out and said so. only: a step's name.
    """
    device = resolve_device(device_name)
    bench = Bench(device, SMALL if small else PAPER, _SMALL_BATCHES if small else _BATCHES, output)
    ends = monotonic() + 60 * minutes
    problems: list[str] = []
    for name, seconds, step in steps(bench, lambda: ends - monotonic()):
        if only is not None and name != only:
            continue
        left = ends - monotonic()
        if only is None and seconds > left and (seconds == float("inf") or not small):
            if seconds < float("inf"):
                print(f"{name}: left out, {left:.0f} s are left and it may take {seconds:.0f}", flush=True)
            continue
        if left < 0:
            print(f"{name}: left out, the time is over", flush=True)
            continue
        try:
            found = step() or []
        except Exception as error:  # one that fails must not take the others' time with it
            traceback.print_exc()
            found = [f"{type(error).__name__}: {error}"]
        problems += [f"{name}: {problem}" for problem in found]
        for problem in found:
            print(f"{name}: FAILED: {problem}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print("checks:", "passed" if not problems else "; ".join(problems))
    if problems:
        raise SystemExit(1)
