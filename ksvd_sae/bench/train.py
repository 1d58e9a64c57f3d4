"""``ksvd-sae bench train``: the time to learn a dictionary, and how well it codes samples that it has not seen.

Every dictionary, whoever learned it, codes the same held-out samples by our OMP; ``fvu`` is the error of that. Peers
start from the same random samples as atoms (the SAE from its own start). A peer's row has in ``ours_s`` the seconds
after which ours had reached its error, null if it never did; ours have the whole curve in ``curve``.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ksvd_sae.bench import ceilings, ours, peers
from ksvd_sae.bench.measure import Job, Measured, limited_threads, measure, tolerant
from ksvd_sae.bench.peers import Trainer
from ksvd_sae.bench.problems import Problem, Shape, initial_atoms
from ksvd_sae.bench.rows import OURS, Who, row
from ksvd_sae.bench.settings import Outcome, Settings
from ksvd_sae.learning.coding import Coding
from ksvd_sae.learning.dbksvd import BatchLog, DictionaryLearner, LearnerOptions
from ksvd_sae.learning.fvu import fvu
from ksvd_sae.learning.sparse_coding import orthogonal_matching_pursuit

# Small enough for the slow peers: each within about three minutes.
DEFAULT = Shape("", n=8192, d=640, m=512, k=10)
SMALL = Shape("", n=512, d=24, m=48, k=3)
_HELDOUT, _HELDOUT_SMALL = 4096, 128
_PASSES = (1, 3, 10)
_REPEATS = 1
_WARM_SAMPLES, _WARM_ATOMS = 256, 32


@dataclass(frozen=True)
class _Checkpoint:
    """The atoms after a batch, seconds after the start."""

    seconds: float
    samples_seen: int
    atoms_MD: Tensor


def run(settings: Settings) -> Outcome:
    """Rows of ours after several numbers of passes, and of the peers asked for."""
    names = settings.peers_of("train")
    n_heldout = _HELDOUT_SMALL if settings.small else _HELDOUT
    problem = settings.problem(settings.shape(DEFAULT, SMALL), n_heldout, learn=False)
    start_MD = initial_atoms(problem.x_ND, problem.shape.m, settings.seed)
    outcome = Outcome()
    with limited_threads(settings.threads):
        small_ND = problem.x_ND[:_WARM_SAMPLES]
        DictionaryLearner(LearnerOptions(_WARM_ATOMS, Coding(min(problem.shape.k, _WARM_ATOMS)))).fit(small_ND)
        jobs = [_our_job(problem, passes, settings) for passes in _PASSES]
        passes_of = dict(zip((str(job.who) for job in jobs), _PASSES, strict=True))
        for trainer in [trainer for name in names for trainer in peers.load(name).trainers(problem, settings.seed)]:
            with tolerant(trainer.who, outcome.failures):
                _warm_up(trainer, problem, start_MD)
                jobs.append(_peer_job(trainer, problem, start_MD))
                passes_of[str(trainer.who)] = trainer.passes
        measured = measure(jobs, settings.repeats or _REPEATS, outcome.failures, time_first=True)
        curve = next(m.scores["curve"] for m in reversed(measured) if m.job.who.impl == OURS)
        outcome.rows = [_row(m, problem, passes_of[str(m.job.who)], curve, settings) for m in measured]
    return outcome


def heldout_fvu(atoms_MD: Tensor, problem: Problem) -> float:
    """FVU of the held-out samples by our OMP with these atoms, of any norm; zero and non-finite ones are left out."""
    norms_M = torch.linalg.vector_norm(atoms_MD.double(), dim=1)
    used_MD = atoms_MD[torch.isfinite(norms_M) & (norms_M > 0)]
    unit_MD = torch.nn.functional.normalize(used_MD.double(), dim=1).float()
    code = orthogonal_matching_pursuit(problem.heldout_ND, unit_MD, min(problem.shape.k, len(unit_MD)))
    return fvu(problem.heldout_ND, code.reconstruct(unit_MD), "bench train")


def _our_job(problem: Problem, passes: int, settings: Settings) -> Job:
    m, k = problem.shape.m, problem.shape.k

    def train(_: Any) -> list[_Checkpoint]:
        checkpoints: list[_Checkpoint] = []
        started = time.perf_counter()

        def on_batch(entry: BatchLog) -> None:
            atoms_MD = learner.atoms_MD.detach().clone().cpu()
            checkpoints.append(_Checkpoint(time.perf_counter() - started, entry.samples_seen, atoms_MD))

        options = LearnerOptions(m, Coding(k), passes=passes, seed=settings.seed)
        learner = DictionaryLearner(options, device=str(settings.device), on_batch=on_batch)
        learner.fit(problem.x_ND)
        return checkpoints

    def score(checkpoints: list[_Checkpoint]) -> dict[str, Any]:
        curve = [[c.seconds, c.samples_seen, heldout_fvu(c.atoms_MD, problem)] for c in checkpoints]
        return {"fvu": curve[-1][2], "curve": curve}

    config = f"db-ksvd, {passes} pass" + "es" * (passes > 1)
    backend = ours.auto_backend(problem.shape, settings.device)
    who = Who(OURS, config, backend, device=settings.device, note="MP codes, default batches")
    return Job(who, problem.shape.n, train, score)


def _peer_job(trainer: Trainer, problem: Problem, start_MD: Tensor) -> Job:
    call = trainer.prepare(problem.x_ND, start_MD)

    def score(result: Any) -> dict[str, Any]:
        return {"fvu": heldout_fvu(trainer.atoms(result), problem)}

    return Job(trainer.who, problem.shape.n, lambda _: call(), score)


def _warm_up(trainer: Trainer, problem: Problem, start_MD: Tensor) -> None:
    """A tiny training, for what is compiled or loaded on first use."""
    m = max(_WARM_ATOMS, problem.shape.k)
    trainer.prepare(problem.x_ND[:_WARM_SAMPLES], start_MD[:m])()


def _row(
    measured: Measured, problem: Problem, passes: int, curve: list[list[float]], settings: Settings
) -> dict[str, Any]:
    job, shape = measured.job, problem.shape
    facts = {name: value for name, value in measured.scores.items() if name != "fvu"}
    floor_s = None
    if job.who.impl == OURS:
        batch = partial(replace, shape)
        floors = (
            floor(batch(n=passes * shape.n), job.who.device)
            for floor in (ceilings.coding_floor_s, ceilings.update_floor_s)
        )
        floor_s = sum(floors)
    else:
        facts["ours_s"] = next((seconds for seconds, _, error in curve if error <= measured.scores["fvu"]), None)
    return row(
        "train",
        shape.case,
        job.who,
        **shape.sizes,
        seconds=measured.seconds,
        warmups=1,
        seed=settings.seed,
        fvu=measured.scores["fvu"],
        peak_mib=measured.peak_mib,
        floor_s=floor_s,
        data=problem.data,
        dictionary="learned",
        passes=passes,
        samples_seen=passes * shape.n,
        n_heldout=len(problem.heldout_ND),
        **facts,
    )
