"""One batch of training: code it, update the atoms from it, replace those of no use."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ksvd_sae.errors import ActivationError
from ksvd_sae.learning.atom_update import AtomUpdate, update_atoms_exact, update_atoms_sums
from ksvd_sae.learning.averaging import Average
from ksvd_sae.learning.backends import Precision
from ksvd_sae.learning.matryoshka import Stage, stages
from ksvd_sae.learning.redraw import ENOUGH_IDLE, Redraw, draw_atoms, near_duplicates
from ksvd_sae.learning.sparse_coding import matching_pursuit
from ksvd_sae.learning.weighting import Weighting

Update = Literal["sums", "exact"]


@dataclass(frozen=True)
class BatchLog:
    """One batch of training, as a line of the JSONL log.

    All of the weighted space if there is a weighting, as that is where training minimises.

    fvu: Σ‖x − x̂‖² / Σ‖x − x̄‖² of the batch as coded, before the update; fvu_after_update: after it, before the next
    coding (with groups: of the last group, the others as they were). l0: mean nonzeros a sample. dead: atoms that no
    sample of the batch used. duplicates: atoms nearly parallel to a stronger one. redrawn: how many were replaced,
    of the duplicates and of those unused for long enough. prefix_fvu: with groups, the FVU after each group's part of
    the code; the last is ``fvu``.
    """

    pass_index: int
    batch: int
    samples_seen: int
    fvu: float
    fvu_after_update: float
    l0: float
    dead: int
    duplicates: int
    redrawn: int
    seconds: float
    prefix_fvu: list[float] = field(default_factory=list)

    def json(self) -> str:
        """The line, with its end."""
        return json.dumps(asdict(self)) + "\n"


@dataclass
class TrainingState:
    """All that training carries from batch to batch.

    Attributes:
        atoms_MD: what the next batch is coded with; None until the first batch has given the atoms to start from.
        idle_M: for each atom, how often an average one was used since it last was (float64).
        average: over the batches so far, if it is asked for.
        pass_index, batches_done: the pass, and how many of its batches are learned.
        pass_probe: digest of the rows that the pass began with, '' before it began.
    """

    generator: torch.Generator
    centre_D: Tensor
    weighting: Weighting | None = None
    atoms_MD: Tensor | None = None
    idle_M: Tensor | None = None
    average: Average | None = None
    samples_seen: int = 0
    pass_index: int = 0
    batches_done: int = 0
    pass_probe: str = ""
    log: list[BatchLog] = field(default_factory=list)


@dataclass(frozen=True)
class StepOptions:
    """What of the estimator's arguments a batch needs; see DoubleBatchKSVD."""

    k: int
    update: Update
    atom_batch: int
    groups: Sequence[int] | None
    rtol: float
    max_steps: int | None
    nonnegative: bool
    precision: Precision
    redraw: Redraw
    duplicate_cosine: float | None


@dataclass(frozen=True)
class Step:
    """What a batch gave: new atoms, how long each is idle, which are fresh, and numbers for the log.

    Errors are sums of squares; idle_M is as in TrainingState.
    """

    atoms_MD: Tensor
    idle_M: Tensor
    fresh_M: Tensor
    errors: list[float]
    error_after: float
    l0: float
    dead: int
    duplicates: int


@torch.no_grad()
def learn_batch(
    x_BD: Tensor, atoms_MD: Tensor, idle_M: Tensor, options: StepOptions, generator: torch.Generator
) -> Step:
    """One K-SVD update from one batch, of each group on what the groups before it left."""
    new_MD, new_idle_M = torch.empty_like(atoms_MD), torch.empty_like(idle_M)
    fresh_M = torch.zeros(len(atoms_MD), dtype=torch.bool, device=atoms_MD.device)
    errors: list[float] = []
    l0 = 0.0
    dead = duplicates = 0
    for stage in _coded(x_BD, atoms_MD, options):
        rows = stage.rows
        update = _updated(stage, atoms_MD[rows], options, generator)
        unused_M, duplicate_M = update.usage_M == 0, _duplicates(update, options)
        new_idle_M[rows] = torch.where(unused_M, idle_M[rows] + update.usage_M.double().mean(), 0)
        useless = ((new_idle_M[rows] >= ENOUGH_IDLE) | duplicate_M).nonzero().flatten()
        drawn_MD = draw_atoms(len(useless), options.redraw, stage.target_BD, update.residual_BD, generator)
        useless = useless[: len(drawn_MD)]
        new_MD[rows] = update.atoms_MD.index_copy(0, useless, drawn_MD)
        new_idle_M[rows] = new_idle_M[rows].index_fill(0, useless, 0)
        fresh_M[rows] = fresh_M[rows].index_fill(0, useless, True)
        errors.append(update.error_before)
        l0 += float(stage.code.l0().double().mean())
        dead += int(unused_M.sum())
        duplicates += int(duplicate_M.sum())
    return Step(new_MD, new_idle_M, fresh_M, errors, update.error_after, l0, dead, duplicates)


def _coded(x_BD: Tensor, atoms_MD: Tensor, options: StepOptions) -> Iterable[Stage]:
    """The batch's code, as one stage a group; training always codes by plain MP."""
    options_of_mp: dict[str, Any] = {
        "max_steps": options.max_steps,
        "rtol": options.rtol,
        "nonnegative": options.nonnegative,
        "precision": options.precision,
    }
    if options.groups is not None:
        return stages(x_BD, atoms_MD, options.groups, options.k, **options_of_mp)
    return [Stage(slice(0, len(atoms_MD)), x_BD, matching_pursuit(x_BD, atoms_MD, options.k, **options_of_mp))]


def _updated(stage: Stage, atoms_MD: Tensor, options: StepOptions, generator: torch.Generator) -> AtomUpdate:
    if options.update == "sums":
        return update_atoms_sums(stage.target_BD, stage.code, atoms_MD)
    return update_atoms_exact(
        stage.target_BD,
        stage.code,
        atoms_MD,
        atom_batch=options.atom_batch,
        generator=generator,
        nonnegative=options.nonnegative,
    )


def _duplicates(update: AtomUpdate, options: StepOptions) -> Tensor:
    """Used atoms nearly parallel to a stronger one, (M,) bool."""
    used_M = update.usage_M > 0
    if options.duplicate_cosine is None:
        return torch.zeros_like(used_M)
    signed = not options.nonnegative
    return used_M & near_duplicates(update.atoms_MD, update.energy_M, options.duplicate_cosine, signed=signed)


def at_fair_scale(x_BD: Tensor) -> Tensor:
    """Samples times a power of two where their squares would vanish or overflow: exact, and atoms know no scale."""
    largest = float(x_BD.abs().max()) if x_BD.numel() else 1.0
    if not (0 < largest < 1e-6 or 1e6 < largest < float("inf")):
        return x_BD
    # In two steps: the factor itself may lie outside float32.
    exponent = math.frexp(largest)[1]
    return x_BD * 2.0 ** -(exponent // 2) * 2.0 ** -(exponent - exponent // 2)


def variance_of(x_BD: Tensor) -> float:
    """Σ‖x − x̄‖² over the batch.

    Raises: ActivationError where all samples are the same.
    """
    variance = _energy(x_BD - x_BD.mean(dim=0))
    # Rounding leaves a variance of about 1e-14 of the energy where all samples are the same.
    if not variance > 1e-12 * _energy(x_BD):
        raise ActivationError(
            "DoubleBatchKSVD: all samples of the batch are the same: there is nothing to learn",
            cause="a hook that gives constants, or padding tokens",
            cure="check the hook name and the text",
        )
    return variance


def _energy(x_BD: Tensor) -> float:
    """Σ‖x‖²: norms as precise as the samples, their squares in float64."""
    return float(torch.linalg.vector_norm(x_BD, dim=1).double().square().sum())
