"""Double-batch K-SVD (arXiv 2505.18441): alternate coding and atom updates, batch by batch.

"Double batch": samples come in batches, each coded once and used for one update of the atoms; and
inside the exact update the atoms come in batches too. So memory depends on the batch, not on the
number of samples.

What the options are worth: held-out FVU by plain MP on Gemma-3-270M (M = 2,048, k = 20, 3 passes over 131,700 tokens,
one CPU core of two busy ones; mean of three seeds ± 95 % interval, one seed where there is none; `ksvd-sae study
eval_configs/study-options.yaml`). Batches and averages are in averaging.py, redraws in redraw.py.

===============================================  ===============  ===============  =======
one option changed                               layer 9          layer 13         seconds
===============================================  ===============  ===============  =======
none: the defaults                               0.0990 ± 0.0003  0.1861 ± 0.0007  18
update='exact'                                   0.1006                            174
init='random'                                    0.1030 ± 0.0001  0.1909 ± 0.0006  19
centre=False                                     0.1029 ± 0.0003  0.1939 ± 0.0008  19
the paper's settings, update='exact'             0.1356                            481
the same by 'sums'                               0.502 ± 0.144    0.4917 ± 0.0006  19
the same by 'sums', batches of 4,096             0.160 ± 0.010    0.2291 ± 0.0022  19
the same by 'sums', init='data'                  0.1228 ± 0.0017  0.2264 ± 0.0017  18
===============================================  ===============  ===============  =======

The paper's settings (random atoms, batches of 65,536, the last atoms, redraw='random', no centring, pairs kept) want
the exact update: 'sums' takes one step of each atom's SVD a batch. Here there are 9; 99 smaller ones are not enough
at layer 9 either.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ksvd_sae.device import resolve_device
from ksvd_sae.errors import NotFittedError, ShapeError
from ksvd_sae.learning.averaging import Average
from ksvd_sae.learning.backends import PRECISIONS, Precision
from ksvd_sae.learning.checks import check_samples
from ksvd_sae.learning.code import Code
from ksvd_sae.learning.coding import AnyCoder, Coding
from ksvd_sae.learning.conventions import ScikitLearnConventions
from ksvd_sae.learning.fitting import Fit
from ksvd_sae.learning.redraw import REDRAWS, Redraw, first_atoms
from ksvd_sae.learning.sources import Samples, SampleSource, TensorSource, as_source
from ksvd_sae.learning.training import (
    BatchLog,
    StepOptions,
    TrainingState,
    Update,
    at_fair_scale,
    learn_batch,
    variance_of,
)
from ksvd_sae.learning.weighting import Weighting

__all__ = ["BatchLog", "DoubleBatchKSVD", "SampleSource"]

logger = logging.getLogger(__name__)


class DoubleBatchKSVD(ScikitLearnConventions):
    """Learn a dictionary of unit atoms such that k of them, with signs, rebuild a sample.

    Args:
        n_atoms: M.
        k: most atoms a sample.
        passes: times that ``fit`` goes over the samples.
        batch_samples: largest batch; ``fit`` makes batches of nearly equal size at most this. None is 4 × n_atoms, at
            least 1,024: measured to be best, see averaging.py (the paper: 65,536).
        update: 'sums' (all atoms at once, with a line search) or 'exact' (SVD); see atom_update.py.
        atom_batch: atoms updated in parallel by 'exact'.
        init: 'data' (atoms start as random samples) or 'random' (uniform, as the paper).
        redraw: what takes the place of atoms that a batch leaves unused or that nearly repeat another: 'residual'
            (what is left of badly coded samples), 'data', 'random' (as the paper) or 'none'; see redraw.py.
        duplicate_cosine: |cos| above which the weaker of two atoms is replaced; None never (as the paper).
        average: give the running average of the atoms over the batches, rather than those after the last batch; see
            averaging.py (the paper does not).
        centre: subtract the mean of the samples first (the paper does not).
        weighting: metric to learn and code in (weighting.py); ``encode`` and ``decode`` stay in raw units.
        groups: sizes of Matryoshka groups, or None for one dictionary; see matryoshka.py.
        nonnegative: codes without negative coefficients.
        rtol, max_steps: see ``matching_pursuit``.
        precision: of the products in training's coding: 'float32', 'tf32' (CUDA) or 'bfloat16'; see backends.py.
        coder: the coder of ``encode`` and of the dictionary: one of ``encode``'s, or 'matryoshka' with groups.
            Training always codes by plain MP, with groups group by group.
        seed: same seed, same data, same thread count: the same bits on CPU. On CUDA nothing here adds up in the order
            of atomics, so the same GPU, driver and torch should give the same bits too.
        device: 'cpu', 'cuda' or 'auto'.
        keep_on_device: move all samples to the device first; None does on CUDA if they take at most half of its free
            memory (see ``kept_on_device``).
        log_path: JSONL file with a line a batch (see BatchLog); starts empty with each ``fit`` that does not resume.
        checkpoint_path: file that holds where training stands, for ``fit(..., resume=True)``; gone after the end.
        checkpoint_every: batches between checkpoints; None writes one after each pass.
        on_batch: called with each BatchLog (progress bars).

    Attributes after fitting: ``atoms_MD`` (unit rows of the weighted space), ``centre_D``, ``samples_seen``, ``log``
    (list of BatchLog; its FVUs are of the weighted space, and of the atoms before they are averaged).

    >>> ksvd = DoubleBatchKSVD(n_atoms=512, k=8).fit(x_ND)         # doctest: +SKIP
    >>> x_hat_ND = ksvd.decode(ksvd.encode(x_ND))                  # doctest: +SKIP
    """

    # Not in __init__, which scikit-learn wants to set nothing but its arguments.
    _state: TrainingState | None = None

    def __init__(
        self,
        n_atoms: int,
        k: int,
        *,
        passes: int = 1,
        batch_samples: int | None = None,
        update: Update = "sums",
        atom_batch: int = 128,
        init: Literal["data", "random"] = "data",
        redraw: Redraw = "residual",
        duplicate_cosine: float | None = 0.99,
        average: bool = True,
        centre: bool = True,
        weighting: Weighting | None = None,
        groups: Sequence[int] | None = None,
        nonnegative: bool = False,
        rtol: float = 0.0,
        max_steps: int | None = None,
        precision: Precision = "float32",
        coder: AnyCoder = "mp",
        seed: int = 0,
        device: str = "auto",
        keep_on_device: bool | None = None,
        log_path: Path | str | None = None,
        checkpoint_path: Path | str | None = None,
        checkpoint_every: int | None = None,
        on_batch: Callable[[BatchLog], None] | None = None,
    ):
        # Stored as given and checked by fit, as scikit-learn's clone and set_params want it.
        self.n_atoms, self.k, self.passes, self.batch_samples = n_atoms, k, passes, batch_samples
        self.update, self.atom_batch, self.init = update, atom_batch, init
        self.redraw, self.duplicate_cosine, self.average = redraw, duplicate_cosine, average
        self.centre, self.weighting, self.groups, self.nonnegative = centre, weighting, groups, nonnegative
        self.rtol, self.max_steps, self.precision, self.coder, self.seed = rtol, max_steps, precision, coder, seed
        self.device, self.keep_on_device, self.log_path, self.on_batch = device, keep_on_device, log_path, on_batch
        self.checkpoint_path, self.checkpoint_every = checkpoint_path, checkpoint_every

    def check(self, d_in: int | None = None) -> None:
        """Raise ShapeError or ConfigError for arguments that cannot work; ``fit`` does this first.

        Args:
            d_in: also check what depends on the width of the samples.
        """
        where = "DoubleBatchKSVD"
        choices = {"update": ("sums", "exact"), "init": ("data", "random"), "redraw": REDRAWS, "precision": PRECISIONS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                got = f"{name}={getattr(self, name)!r}"
                raise ShapeError(f"{where}: unknown option", got=got, limit=", ".join(allowed))
        if not 1 <= self.k <= self.n_atoms:
            got = f"k = {self.k}, n_atoms = {self.n_atoms}"
            raise ShapeError(f"{where}: k must be between 1 and n_atoms", got=got)
        # Without samples the width is not known: then one that k fits in.
        self._coding.check(self.n_atoms, max(self.k, d_in or 0), where)
        if min(self.passes, self.atom_batch) < 1 or (self.batch_samples is not None and self.batch_samples < 1):
            raise ShapeError(f"{where}: passes, batch_samples and atom_batch must be at least 1")
        if self.duplicate_cosine is not None and not 0 < self.duplicate_cosine <= 1:
            raise ShapeError(f"{where}: duplicate_cosine must be in (0, 1] or None", got=self.duplicate_cosine)
        if self.checkpoint_every is not None and (self.checkpoint_path is None or self.checkpoint_every < 1):
            got = f"checkpoint_every={self.checkpoint_every}, checkpoint_path={self.checkpoint_path}"
            raise ShapeError(f"{where}: checkpoint_every must be at least 1 and needs a checkpoint_path", got=got)
        resolve_device(self.device)
        if d_in is not None and self.k > d_in:
            raise ShapeError(
                f"{where}: k is above d_in", got=f"k = {self.k}", limit=f"d_in = {d_in} (n_features = {d_in})"
            )
        if self.weighting is not None and d_in is not None and self.weighting.d_in != d_in:
            raise ShapeError(
                f"{where}: the weighting is of another width", got=f"d_in = {self.weighting.d_in}", limit=d_in
            )

    @property
    def atoms_MD(self) -> Tensor:
        """Unit rows, of the weighted space if there is a weighting."""
        state, atoms_MD = self._fitted
        return state.average.atoms_MD if self.average and state.average is not None else atoms_MD

    @property
    def centre_D(self) -> Tensor:
        """In raw space; 0 with centre=False."""
        return self._fitted[0].centre_D

    @property
    def log(self) -> list[BatchLog]:
        """A line for each batch so far."""
        return self._state.log if self._state is not None else []

    @property
    def samples_seen(self) -> int:
        return self._state.samples_seen if self._state is not None else 0

    @property
    def _coding(self) -> Coding:
        groups = None if self.groups is None else tuple(self.groups)
        return Coding(self.k, self.coder, self.rtol, self.max_steps, self.nonnegative, groups)

    @property
    def _fitted(self) -> tuple[TrainingState, Tensor]:
        if self._state is None or self._state.atoms_MD is None:
            raise NotFittedError("DoubleBatchKSVD: not fitted yet", cure="call fit or partial_fit first")
        return self._state, self._state.atoms_MD

    def fit(self, samples: Samples, y: Any = None, *, resume: bool = False) -> "DoubleBatchKSVD":
        """Learn from samples, starting afresh unless told to resume.

        Args:
            samples: a (N, D) tensor or array, a SampleSource (activation shards), an iterable of (B, D) batches, or a
                function that returns one for each pass. A stream's batches are taken as they come, whatever
                ``batch_samples``, and its centre is that of its first batch.
            y: ignored, as scikit-learn has it.
            resume: go on from ``checkpoint_path`` if there is a checkpoint; else start.
        Raises: ShapeError (arguments or samples that do not fit, fewer samples than atoms, an iterator for several
            passes), ActivationError (NaN, infinite or constant samples), ManifestError (a checkpoint of another run).
        """
        self.check()
        if resume and self.checkpoint_path is None:
            raise ShapeError("DoubleBatchKSVD.fit: resume needs a checkpoint_path")
        Fit(self, as_source(samples)).run(resume)
        return self

    def partial_fit(self, samples: Any, y: Any = None) -> "DoubleBatchKSVD":
        """One update from one batch. The first batch sets the centre and the initial atoms.

        A refused batch changes nothing, so a caller may leave it out and go on.
        """
        self.check()
        if not isinstance(samples, Tensor):
            samples = self._array(samples)
        if not samples.numel():
            raise ShapeError("DoubleBatchKSVD.partial_fit: the batch is empty", got=str(tuple(samples.shape)))
        state = self._learn(samples, 0)
        if self.on_batch is not None:
            self.on_batch(state.log[-1])
        return self

    def encode(self, x_BD: Tensor) -> Code:
        """Code raw samples with ``coder``."""
        atoms_MD = self.atoms_MD
        return self._coding.encode(self._mapped(x_BD, self._fitted[0]), atoms_MD)

    def decode(self, code: Code) -> Tensor:
        """Rebuild raw samples, (B, D)."""
        state, _ = self._fitted
        rebuilt_BD = code.reconstruct(self.atoms_MD)
        if state.weighting is not None:
            rebuilt_BD = state.weighting.undo(rebuilt_BD)
        return rebuilt_BD + state.centre_D

    def _started(self, centre_D: Tensor, atoms_MD: Tensor | None = None) -> TrainingState:
        device = resolve_device(self.device)
        return TrainingState(
            generator=torch.Generator().manual_seed(self.seed),
            centre_D=centre_D.float().to(device) * float(self.centre),
            weighting=None if self.weighting is None else self.weighting.to(device),
            atoms_MD=atoms_MD,
        )

    def _learn(self, raw_BD: Tensor, pass_index: int) -> TrainingState:
        """One update from one batch of raw samples, with its line of the log."""
        started = time.perf_counter()
        state = self._state or self._started(TensorSource(raw_BD).centre_D)
        x_BD = self._mapped(raw_BD, state)
        self.check(x_BD.shape[1])
        check_samples(x_BD, "DoubleBatchKSVD")
        x_BD = at_fair_scale(x_BD)
        variance = variance_of(x_BD)
        if state.atoms_MD is None:
            state.atoms_MD = first_atoms(self.n_atoms, self.init, x_BD, state.generator)
        if state.idle_M is None:
            state.idle_M = torch.zeros(self.n_atoms, dtype=torch.float64, device=x_BD.device)
        options = StepOptions(**{field.name: getattr(self, field.name) for field in fields(StepOptions)})
        step = learn_batch(x_BD, state.atoms_MD, state.idle_M, options, state.generator)
        state.atoms_MD, state.idle_M = step.atoms_MD, step.idle_M
        if self.average:
            state.average = (state.average or Average.of(state.atoms_MD)).with_next(step.atoms_MD, step.fresh_M)
        state.samples_seen += len(x_BD)
        line = BatchLog(
            pass_index=pass_index,
            batch=len(state.log),
            samples_seen=state.samples_seen,
            fvu=step.errors[-1] / variance,
            fvu_after_update=step.error_after / variance,
            l0=step.l0,
            dead=step.dead,
            duplicates=step.duplicates,
            redrawn=int(step.fresh_M.sum()),
            seconds=time.perf_counter() - started,
            prefix_fvu=[error / variance for error in step.errors] if self.groups is not None else [],
        )
        state.log.append(line)
        logger.debug("%s", line)
        if self.log_path is not None:
            with Path(self.log_path).open("a") as file:
                file.write(line.json())
        self._state = state
        return state

    def _mapped(self, raw_BD: Tensor, state: TrainingState) -> Tensor:
        """Raw samples to the space that the atoms live in."""
        if raw_BD.ndim != 2 or raw_BD.shape[1] != len(state.centre_D):
            raise ShapeError(
                "DoubleBatchKSVD: samples do not fit",
                got=str(tuple(raw_BD.shape)),
                limit=f"(B, {len(state.centre_D)})",
                cause="activations of another model or hook",
            )
        if not raw_BD.is_floating_point():
            raise ShapeError("DoubleBatchKSVD: samples are not floating point", got=str(raw_BD.dtype))
        x_BD = raw_BD.detach().to(state.centre_D.device).float() - state.centre_D
        return x_BD if state.weighting is None else state.weighting.apply(x_BD)
