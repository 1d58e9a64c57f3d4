"""``ksvd-sae bench update``: the time to update all atoms once from a coded batch, and the error after it.

Everyone gets the same samples, atoms (other samples, which have far to go yet, as in the first batches of a training)
and matching-pursuit code. ``fvu`` is that of the new atoms with the new coefficients, before the next coding hides a
bad update; ``fvu_before`` that of the code it started from. All take all samples: an update costs by the atom too, so
the time for fewer would say nothing.
"""

from dataclasses import replace
from typing import Any

from ksvd_sae.bench import ceilings, ours, peers
from ksvd_sae.bench.measure import Job, Measured, limited_threads, measure, tolerant
from ksvd_sae.bench.peers import Updater
from ksvd_sae.bench.problems import Problem, Shape, initial_atoms
from ksvd_sae.bench.rows import row
from ksvd_sae.bench.settings import Outcome, Settings
from ksvd_sae.learning.fvu import fvu
from ksvd_sae.learning.sparse_coding import Code, matching_pursuit

DEFAULT = Shape("", n=8192, d=640, m=2048, k=20)
SMALL = Shape("", n=512, d=48, m=96, k=5)
_REPEATS = 3


def run(settings: Settings) -> Outcome:
    """Rows of ours and of the peers asked for."""
    names = settings.peers_of("update")
    shape = settings.shape(DEFAULT, SMALL)
    problem = settings.problem(shape, n_heldout=shape.m, learn=False)
    atoms_MD = initial_atoms(problem.heldout_ND, shape.m, settings.seed)
    problem = replace(problem, atoms_MD=atoms_MD, dictionary="other samples")
    outcome = Outcome()
    with limited_threads(settings.threads):
        code = matching_pursuit(problem.x_ND, problem.atoms_MD, problem.shape.k)
        contenders = ours.updaters(problem, settings.device)
        for name in names:
            contenders += peers.load(name).updaters(problem, settings.device)
        jobs = []
        for contender in contenders:
            with tolerant(contender.who, outcome.failures):
                jobs.append(_job(contender, problem, code))
        for measured in measure(jobs, settings.repeats or _REPEATS, outcome.failures):
            outcome.rows.append(_row(measured, problem, code, settings))
    return outcome


def _job(contender: Updater, problem: Problem, code: Code) -> Job:
    device, rebuild = contender.who.device, contender.rebuild
    there = Code(code.values_BK.to(device), code.support_BK.to(device))
    setup, call = contender.prepare(problem.x_ND.to(device), there, problem.atoms_MD.to(device))

    def score(result: Any) -> dict[str, Any]:
        if rebuild is None:
            return {"fvu": None, "floor_s": None}
        floor_s = ceilings.update_floor_s(problem.shape, device)
        return {"fvu": fvu(problem.x_ND, rebuild(result).cpu(), "bench update"), "floor_s": floor_s}

    return Job(contender.who, problem.shape.n, call, score, setup)


def _row(measured: Measured, problem: Problem, code: Code, settings: Settings) -> dict[str, Any]:
    job, shape = measured.job, problem.shape
    return row(
        "update",
        shape.case,
        job.who,
        **shape.sizes,
        seconds=measured.seconds,
        warmups=1,
        seed=settings.seed,
        fvu=measured.scores["fvu"],
        peak_mib=measured.peak_mib,
        floor_s=measured.scores["floor_s"],
        data=problem.data,
        dictionary=problem.dictionary,
        fvu_before=fvu(problem.x_ND, code.reconstruct(problem.atoms_MD), "bench update"),
    )
