"""``ksvd-sae bench scaling``: how the time and memory of our coders grow with n, m, k and d.

One variable at a time is varied from a base case, on planted samples; ``table`` fits log(time) against log(variable).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from ksvd_sae.bench import ceilings, ours
from ksvd_sae.bench.measure import Job, limited_threads, measure
from ksvd_sae.bench.problems import Shape, planted_problem
from ksvd_sae.bench.rows import row
from ksvd_sae.bench.settings import Outcome, Settings
from ksvd_sae.learning.fvu import fvu

BASE = Shape("", n=4096, d=512, m=2048, k=16)
GRIDS = {
    "n": (1024, 2048, 4096, 8192, 16_384),
    "m": (512, 1024, 2048, 4096, 8192),
    "k": (4, 8, 16, 32, 64),
    "d": (128, 256, 512, 1024, 2048),
}
SMALL = Shape("", n=128, d=32, m=64, k=4)
SMALL_GRIDS = {"n": (64, 128, 256), "m": (32, 64, 128), "k": (2, 4, 8), "d": (16, 32, 64)}
_CODERS = ("mp", "omp")
_REPEATS = 5
_CONFIDENCE = 0.95
# A code: a float32 value and an int32 atom for each of k.
_CODE_BYTES = 8


@dataclass(frozen=True)
class Slope:
    """log(y) = exponent·log(x) + c by least squares, with the 95 % interval of the exponent (±).

    r_squared is that of the straight line y = a + per_unit·x.
    """

    exponent: float
    interval: float
    per_unit: float
    r_squared: float


def run(settings: Settings) -> Outcome:
    """Rows of our coders over the grids, a round of all points after the other."""
    base, grids = (SMALL, SMALL_GRIDS) if settings.small else (BASE, GRIDS)
    base = replace(base, n=settings.samples or base.n, d=settings.dim or base.d)
    base = replace(base, m=settings.atoms or base.m, k=settings.k or base.k)
    points = [(name, _with(base, name, value)) for name, grid in grids.items() for value in grid]
    outcome = Outcome()
    with limited_threads(settings.threads):
        jobs = [(varied, shape, job) for varied, shape in points for job in _jobs(shape, settings)]
        # The first call is the warm-up.
        all_measured = measure([job for _, _, job in jobs], settings.repeats or _REPEATS, outcome.failures)
        for (varied, shape, job), measured in zip(jobs, all_measured, strict=True):
            outcome.rows.append(
                row(
                    "scaling",
                    f"{varied} = {getattr(shape, varied)}",
                    job.who,
                    **shape.sizes,
                    seconds=measured.seconds,
                    warmups=1,
                    seed=settings.seed,
                    fvu=measured.scores["fvu"],
                    peak_mib=measured.peak_mib,
                    floor_s=ceilings.coding_floor_s(shape, settings.device),
                    dictionary="the planted atoms",
                    varied=varied,
                    output_mib=shape.n * shape.k * _CODE_BYTES / 2**20,
                )
            )
    return outcome


def _with(base: Shape, name: str, value: int) -> Shape:
    sizes: dict[str, Any] = {name: value}
    return replace(base, **sizes)


def _jobs(shape: Shape, settings: Settings) -> list[Job]:
    """Each coder on the backend that 'auto' takes."""
    problem = planted_problem(shape, 0, settings.seed)
    x_ND, atoms_MD = problem.x_ND.to(settings.device), problem.atoms_MD.to(settings.device)
    jobs = []
    for config in _CODERS:
        contender = ours.coder(config, shape.k, ours.auto_backend(shape, settings.device), settings.device)
        call = contender.prepare(x_ND, atoms_MD)

        def score(code: Any, contender: Any = contender) -> dict[str, Any]:
            return {"fvu": fvu(problem.x_ND, contender.rebuild(code, atoms_MD).cpu(), "bench scaling")}

        jobs.append(Job(contender.who, shape.n, lambda _, call=call: call(), score))  # type: ignore[misc]
    return jobs


def slope(x: Sequence[float], y: Sequence[float]) -> Slope | None:
    """Fit y against x; None for fewer than three points, which leave no interval."""
    if len(x) < 3:
        return None
    power = stats.linregress(np.log(x), np.log(y))
    straight = stats.linregress(x, y)
    interval = stats.t.ppf((1 + _CONFIDENCE) / 2, len(x) - 2) * power.stderr
    return Slope(float(power.slope), float(interval), float(straight.slope), float(straight.rvalue**2))
