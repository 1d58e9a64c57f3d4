"""``ksvd-sae bench coding``: the time to code a batch with a given dictionary, and the error reached.

Everyone gets the samples and the atoms in the layout it likes best and gives back a code; whatever it computes of them
(the Gram matrix, the products) is on the clock. Slow implementations code fewer samples, and samples a second compare.
"""

import logging
import time
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from ksvd_sae.bench import ceilings, ours, peers
from ksvd_sae.bench.measure import WARMUPS, Job, Measured, limited_threads, measure, tolerant
from ksvd_sae.bench.peers import Coder
from ksvd_sae.bench.problems import Problem, Shape
from ksvd_sae.bench.rows import row
from ksvd_sae.bench.settings import Outcome, Settings
from ksvd_sae.learning.fvu import fvu

logger = logging.getLogger(__name__)
DEFAULT = Shape("", n=16_384, d=640, m=2048, k=20)
SMALL = Shape("", n=512, d=48, m=96, k=5)
_REPEATS = 5
# Samples to guess the speed from.
_PILOT = 128


def run(settings: Settings) -> Outcome:
    """Rows of ours and of the peers asked for."""
    names = settings.peers_of("coding")
    problem = settings.problem(settings.shape(DEFAULT, SMALL))
    outcome = Outcome()
    with limited_threads(settings.threads):
        contenders = ours.coders(problem, settings.device)
        for name in names:
            contenders += peers.load(name).coders(problem, settings.device)
        sized = []
        for contender in contenders:
            with tolerant(contender.who, outcome.failures):
                sized.append((contender, _affordable(contender, problem, settings.budget_s)))
        # The error on samples that all of them coded: on more, it is that of other samples.
        n_common = min(n for _, n in sized)
        jobs = [_job(contender, problem, n, n_common) for contender, n in sized]
        for measured in measure(jobs, settings.repeats or _REPEATS, outcome.failures):
            outcome.rows.append(_row(measured, problem, settings))
    return outcome


def _affordable(contender: Coder, problem: Problem, budget_s: float) -> int:
    """Samples that it codes within the budget, from its speed on few; doubles as the first warm-up."""
    n = problem.shape.n
    pilot = min(n, _PILOT)
    call = _prepared(contender, problem, pilot)
    call()
    started = time.perf_counter()
    call()
    seconds = time.perf_counter() - started
    wanted = int(pilot * budget_s / max(seconds, 1e-9))
    affordable = n if wanted >= n else max(pilot, wanted // _PILOT * _PILOT)
    if affordable < n:
        logger.info("%s: %.3g s on %d samples: timed on %d of %d", contender.who, seconds, pilot, affordable, n)
    return affordable


def _prepared(contender: Coder, problem: Problem, n: int) -> Any:
    device = contender.who.device
    return contender.prepare(problem.x_ND[:n].to(device), problem.atoms_MD.to(device))


def _job(contender: Coder, problem: Problem, n: int, n_common: int) -> Job:
    call, device = _prepared(contender, problem, n), contender.who.device

    def score(result: Any) -> dict[str, Any]:
        rebuilt_ND = contender.rebuild(result, problem.atoms_MD.to(device)).cpu()
        error = partial(_error, problem.x_ND, rebuilt_ND)
        floor_s = None
        if contender.greedy:
            floor_s = ceilings.coding_floor_s(replace(problem.shape, n=n), device, contender.who.dtype)
        return {"fvu": error(n), "fvu_common": error(n_common), "n_common": n_common, "floor_s": floor_s}

    return Job(contender.who, n, lambda _: call(), score)


def _error(x_ND: Tensor, rebuilt_ND: Tensor, n: int) -> float:
    return fvu(x_ND[:n], rebuilt_ND[:n], "bench coding")


def _row(measured: Measured, problem: Problem, settings: Settings) -> dict[str, Any]:
    job, shape = measured.job, replace(problem.shape, n=measured.job.n)
    scores = dict(measured.scores)
    return row(
        "coding",
        shape.case,
        job.who,
        **shape.sizes,
        seconds=measured.seconds,
        warmups=WARMUPS,
        seed=settings.seed,
        fvu=scores.pop("fvu"),
        peak_mib=measured.peak_mib,
        floor_s=scores.pop("floor_s"),
        case_n=problem.shape.n,
        scaled_from=job.n if job.n < problem.shape.n else None,
        data=problem.data,
        dictionary=problem.dictionary,
        **scores,
    )
