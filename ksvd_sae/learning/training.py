"""One batch of training: code it, update the atoms from it, replace those of no use.

Training always codes by plain matching pursuit, with groups group by group, whatever coder the dictionary is for.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ksvd_sae.arguments import flag, number, shown, whole
from ksvd_sae.errors import InputTypeError, ShapeError
from ksvd_sae.learning import backends
from ksvd_sae.learning.atom_update import (
    AtomUpdate,
    update_atoms_exact,
    update_atoms_sweep,
    update_atoms_two_sweeps,
)
from ksvd_sae.learning.averaging import Average
from ksvd_sae.learning.checks import check_samples
from ksvd_sae.learning.coding import Coding
from ksvd_sae.learning.drift import Drift
from ksvd_sae.learning.fvu import variance
from ksvd_sae.learning.incoherence import pushed_apart
from ksvd_sae.learning.kernels import batch_triton
from ksvd_sae.learning.matryoshka import Stage, stages
from ksvd_sae.learning.products import PRECISIONS, Precision
from ksvd_sae.learning.redraw import ENOUGH_IDLE, REDRAWS, Redraw, near_duplicates, redrawn
from ksvd_sae.learning.sparse_coding import pursued
from ksvd_sae.learning.weighting import Weighting
from ksvd_sae.ranks import ALONE, Ranks

Update = Literal["sweep", "two_sweeps", "exact"]
Init = Literal["data", "random"]
# Batches where no size is asked for.
_BATCH_PER_ATOM, _FEWEST_IN_A_BATCH = 4, 1024
_MAY_BE_NONE = ("train_k", "batch_samples", "duplicate_cosine", "coherence")
# What torch's generators take.
_LEAST_SEED, _LARGEST_SEED = -(2**63), 2**64 - 1
# A variance below this share of the energy, from sums in float32, is taken again in float64.
_DOUBTFUL = 1e-4


@dataclass(frozen=True)
class LearnerOptions:
    """What a dictionary is to be and how it is learned: with the samples, all that its bits follow from.

    What the options are worth is measured in "What the options of DB-KSVD are worth" in the docs.

    Attributes:
        n_atoms: M.
        coding: most atoms a sample, groups, signs, rtol, tau and max_steps, in training and after; its coder is for
            after.
        train_k: most atoms a sample in training; None is the coding's k. Fewer leave less noise to fit: atoms that more
            seeds agree on, and a lower error for short codes.
        passes: times that ``fit`` goes over the samples.
        batch_samples: largest batch; ``fit`` makes batches of nearly equal size at most this. None is 4 × n_atoms, at
            least 1,024: the best of M, 2 M, 4 M and 8 M (the paper: 65,536).
        update: 'sweep' (one atom after the other, coefficients kept), 'two_sweeps' (coefficients fitted anew between
            them: for few large batches, as the paper's) or 'exact' (SVD, ten times as slow for no lower an error); see
            atom_update.py.
        atom_batch: atoms updated in parallel by 'exact'.
        init: 'data' (atoms start as random samples) or 'random' (uniform, as the paper: 2 to 4 % more error).
        redraw: what takes the place of atoms that were unused for long or that nearly repeat another: 'residual'
            (what is left of badly coded samples), 'data', 'random' (as the paper) or 'none'; see redraw.py.
        duplicate_cosine: |cos| above which the weaker of two atoms is replaced; None never (as the paper).
        coherence: bound on the |cos| of atoms that every update is followed by a push towards; None for none (as the
            paper). See incoherence.py.
        average: give the running average of the atoms over the batches, rather than those after the last batch: 7 %
            less error; see averaging.py (the paper does not).
        centre: subtract the mean of the samples first: 6 to 7 % less error (the paper does not).
        weighting: metric to learn and code in (weighting.py).
        precision: of the products in training's coding: 'float32' or 'bfloat16'; see products.py.
        seed: same seed, same data, same thread count: the same bits on CPU. On CUDA nothing here adds up in the order
            of atomics, so the same GPU, driver and torch should give the same bits too.
    Numbers may be numpy's; Python's own types are kept.
    Raises: InputTypeError (a ShapeError) for what is no number, no Coding or no Weighting.
    """

    n_atoms: int
    coding: Coding
    train_k: int | None = None
    passes: int = 1
    batch_samples: int | None = None
    update: Update = "sweep"
    atom_batch: int = 128
    init: Init = "data"
    redraw: Redraw = "residual"
    duplicate_cosine: float | None = 0.99
    coherence: float | None = None
    average: bool = True
    centre: bool = True
    weighting: Weighting | None = None
    precision: Precision = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        where = "DB-KSVD"
        if not isinstance(self.coding, Coding):
            raise InputTypeError(f"{where}: coding must be a Coding", got=shown(self.coding), cure="Coding(k=8)")
        if not isinstance(self.weighting, Weighting | None):
            limit = "a Weighting (ksvd_sae.learning.weighting) or None"
            raise InputTypeError(f"{where}: weighting must be a Weighting", got=shown(self.weighting), limit=limit)
        for names, taken in (
            (("n_atoms", "train_k", "passes", "batch_samples", "atom_batch", "seed"), whole),
            (("duplicate_cosine", "coherence"), partial(number, finite=False)),
            (("average", "centre"), flag),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None or name not in _MAY_BE_NONE:
                    object.__setattr__(self, name, taken(value, name, where))

    @property
    def largest_batch(self) -> int:
        """batch_samples, or what is taken where it is None."""
        return self.batch_samples or max(_FEWEST_IN_A_BATCH, _BATCH_PER_ATOM * self.n_atoms)

    def check(self, d_in: int | None = None) -> None:
        """Raise ShapeError for options that cannot work.

        Args: d_in: also check what depends on the width of the samples.
        """
        where, k = "DB-KSVD", self.coding.k
        choices: dict[str, tuple[str, ...]] = {
            "update": get_args(Update),
            "init": get_args(Init),
            "redraw": REDRAWS,
            "precision": PRECISIONS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                got = f"{name}={getattr(self, name)!r}"
                raise ShapeError(f"{where}: unknown option", got=got, limit=", ".join(allowed))
        if not 1 <= k <= self.n_atoms:
            raise ShapeError(f"{where}: k must be between 1 and n_atoms", got=f"k = {k}, n_atoms = {self.n_atoms}")
        # Without samples the width is not known: then one that k fits in.
        self.coding.check(self.n_atoms, max(k, d_in or 0), where)
        if min(self.passes, self.atom_batch) < 1 or (self.batch_samples is not None and self.batch_samples < 1):
            raise ShapeError(f"{where}: passes, batch_samples and atom_batch must be at least 1")
        if not _LEAST_SEED <= self.seed <= _LARGEST_SEED - self.passes:
            raise ShapeError(f"{where}: the seed is out of range", got=self.seed, limit="-2**63 to 2**64 - 1 - passes")
        if self.train_k is not None and not 1 <= self.train_k <= k:
            raise ShapeError(f"{where}: train_k must be between 1 and k", got=f"train_k = {self.train_k}, k = {k}")
        if self.duplicate_cosine is not None and not 0 < self.duplicate_cosine <= 1:
            raise ShapeError(f"{where}: duplicate_cosine must be in (0, 1] or None", got=self.duplicate_cosine)
        if self.coherence is not None and not 0 < self.coherence < 1:
            raise ShapeError(f"{where}: coherence must be between 0 and 1, or None", got=self.coherence)
        if d_in is not None and k > d_in:
            limit = f"d_in = {d_in} (n_features = {d_in})"
            raise ShapeError(f"{where}: k is above d_in", got=f"k = {k}", limit=limit)
        if self.weighting is not None and d_in is not None and self.weighting.d_in != d_in:
            raise ShapeError(
                f"{where}: the weighting is of another width", got=f"d_in = {self.weighting.d_in}", limit=d_in
            )


def learned_with(options: LearnerOptions) -> dict[str, Any]:
    """What the bits of a training follow from, by name: not the coder, which is for afterwards; and more passes may be
    asked for later."""
    arguments = {field.name: getattr(options, field.name) for field in fields(options)} | options.coding.as_json()
    for name in ("coding", "coder", "passes"):
        del arguments[name]
    return arguments


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
        options: what it was trained with, None where that is not known.
        passed_over: batches that told nothing, as all of their samples were the same.
        drift: where the centre was taken before the samples, how far these have gone from it.
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
    options: LearnerOptions | None = None
    passed_over: int = 0
    drift: Drift | None = None

    def copy(self) -> "TrainingState":
        """That stays as it is while training goes on: of tensors none is changed in place."""
        return replace(self, generator=self.generator.clone_state(), log=list(self.log))


@dataclass(frozen=True)
class Batch:
    """Samples that training may work on: finite, not all the same, of a scale whose squares are numbers.

    energy_B: ‖x‖², (B,), where it came with the look at them. variance: Σ‖x − x̄‖². exponent: x_BD is 2^−exponent times
    the samples as they came. n_samples: B, where several processes each have a part of the batch that of the whole, as
    are variance and exponent.
    """

    x_BD: Tensor
    energy_B: Tensor | None
    variance: float
    n_samples: int
    exponent: int = 0


def checked_batch(x_BD: Tensor, ranks: Ranks = ALONE) -> Batch:
    """The samples after a look at them: on a GPU one pass over them and one wait.

    Args: x_BD: a batch, or this process' part of one.
    Samples whose squares would vanish or overflow are multiplied by a power of two: exact, and atoms know no scale.
    Raises: ActivationError (NaN or infinity), ConstantSamplesError (no variance).
    """
    where = "DB-KSVD"
    no_kernel = not backends.on_gpu(x_BD.device) or batch_triton.why_not(x_BD.device, x_BD.dtype) is not None
    if no_kernel or ranks.size > 1:
        check_samples(x_BD, where)
        largest_1 = x_BD.abs().max() if x_BD.numel() else x_BD.new_zeros(())
        exponent = _unfair_exponent(float(ranks.largest(largest_1)))
        x_BD = _scaled(x_BD, exponent)
        n_samples = ranks.count(len(x_BD), x_BD.device)
        return Batch(x_BD, None, variance(x_BD, where, ranks), n_samples, exponent)
    energy_B, numbers = batch_triton.statistics(x_BD)
    largest, batch_variance, energy = numbers.tolist()
    if not math.isfinite(energy):
        check_samples(x_BD, where)
    exponent = _unfair_exponent(largest)
    if exponent:
        return replace(checked_batch(_scaled(x_BD, exponent)), exponent=exponent)
    if not batch_variance > _DOUBTFUL * energy:
        batch_variance = variance(x_BD, where)
    return Batch(x_BD, energy_B, batch_variance, len(x_BD))


def _unfair_exponent(largest: float) -> int:
    """The power of two that the samples are to be divided by, 0 where their squares are numbers as they are."""
    return 0 if not (0 < largest < 1e-6 or 1e6 < largest < float("inf")) else math.frexp(largest)[1]


def _scaled(x_BD: Tensor, exponent: int) -> Tensor:
    # In two steps: the factor itself may lie outside float32.
    return x_BD * 2.0 ** -(exponent // 2) * 2.0 ** -(exponent - exponent // 2) if exponent else x_BD


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
    redrawn: int


@torch.no_grad()
def learn_batch(
    batch: Batch,
    atoms_MD: Tensor,
    idle_M: Tensor,
    options: LearnerOptions,
    generator: torch.Generator,
    ranks: Ranks = ALONE,
) -> Step:
    """One K-SVD update from one batch, of each group on what the groups before it left.

    Args: batch: or this process' part of it.
    """
    new_MD, new_idle_M = torch.empty_like(atoms_MD), torch.empty_like(idle_M)
    fresh_M = torch.zeros(len(atoms_MD), dtype=torch.bool, device=atoms_MD.device)
    errors: list[Tensor] = []
    # L0, dead atoms, duplicates.
    counts_3 = torch.zeros(3, dtype=torch.float64, device=atoms_MD.device)
    for stage in _coded(batch, atoms_MD, options, ranks):
        rows = stage.rows
        update = _updated(stage, atoms_MD[rows], options, generator, ranks)
        unused_M, duplicate_M = update.usage_M == 0, _duplicates(update, options, ranks)
        stage_idle_M = torch.where(unused_M, idle_M[rows] + update.usage_M.double().mean(), 0)
        useless_M = ranks.agreed((stage_idle_M >= ENOUGH_IDLE) | duplicate_M)
        chosen = (options.redraw, stage.target_BD, update.residual_BD, generator, ranks)
        new_MD[rows], fresh_M[rows] = redrawn(update.atoms_MD, useless_M, *chosen)
        new_idle_M[rows] = torch.where(fresh_M[rows], 0, stage_idle_M)
        errors.append(update.errors)
        l0 = update.usage_M.sum().float() / max(1, batch.n_samples)
        counts_3 += torch.stack([l0, unused_M.sum(), duplicate_M.sum()])
    if options.coherence is not None:
        new_MD = ranks.agreed(pushed_apart(new_MD, options.coherence, signed=not options.coding.nonnegative))
    # All that the log wants of the device, in one wait.
    numbers = torch.cat([*errors, counts_3, fresh_M.sum()[None].double()]).tolist()
    l0, dead, duplicates, redrawn_atoms = numbers[-4:]
    return Step(
        atoms_MD=new_MD,
        idle_M=new_idle_M,
        fresh_M=fresh_M,
        errors=numbers[0 : 2 * len(errors) : 2],
        error_after=numbers[2 * len(errors) - 1],
        l0=l0,
        dead=int(dead),
        duplicates=int(duplicates),
        redrawn=int(redrawn_atoms),
    )


def _coded(batch: Batch, atoms_MD: Tensor, options: LearnerOptions, ranks: Ranks) -> Iterable[Stage]:
    """The batch's code, as one stage a group."""
    coding = options.coding
    options_of_mp: dict[str, Any] = {
        "max_steps": coding.max_steps,
        "rtol": coding.rtol,
        "tau": coding.tau,
        "tau_absolute": coding.tau_absolute,
        "nonnegative": coding.nonnegative,
        "precision": options.precision,
        "ranks": ranks,
    }
    k = options.train_k or coding.k
    if coding.groups is not None:
        options_of_mp["exact_budgets"] = coding.exact_budgets
        return stages(batch.x_BD, atoms_MD, coding.groups, k, checked=True, **options_of_mp)
    code, _ = pursued(batch.x_BD, atoms_MD, k, energy_B=batch.energy_B, **options_of_mp)
    return [Stage(slice(0, len(atoms_MD)), batch.x_BD, code)]


def _updated(
    stage: Stage, atoms_MD: Tensor, options: LearnerOptions, generator: torch.Generator, ranks: Ranks
) -> AtomUpdate:
    given = (stage.target_BD, stage.code, atoms_MD)
    if options.update == "sweep":
        return update_atoms_sweep(*given, ranks=ranks)
    if options.update == "two_sweeps":
        return update_atoms_two_sweeps(*given, nonnegative=options.coding.nonnegative, ranks=ranks)
    return update_atoms_exact(
        stage.target_BD,
        stage.code,
        atoms_MD,
        atom_batch=options.atom_batch,
        generator=generator,
        nonnegative=options.coding.nonnegative,
    )


def _duplicates(update: AtomUpdate, options: LearnerOptions, ranks: Ranks) -> Tensor:
    """Used atoms nearly parallel to a stronger one, (M,) bool."""
    used_M = update.usage_M > 0
    if options.duplicate_cosine is None:
        return torch.zeros_like(used_M)
    signed = not options.coding.nonnegative
    chosen = (options.duplicate_cosine, ranks)
    return used_M & near_duplicates(update.atoms_MD, update.energy_M, *chosen, signed=signed)
