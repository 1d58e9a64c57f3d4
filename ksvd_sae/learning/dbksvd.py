"""Double-batch K-SVD (arXiv 2505.18441): alternate coding and atom updates, batch by batch.

"Double batch": samples come in batches, each coded once and used for one update of the atoms; and
inside the exact update the atoms come in batches too. So memory depends on the batch, not on the
number of samples.

This is the learner itself, on tensors and streams of them; ``ksvd_sae.estimator`` is the same as a scikit-learn
transformer.
"""

import logging
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksvd_sae.arguments import flag, path, shown, whole
from ksvd_sae.device import own_modes, resolve_device
from ksvd_sae.errors import ConstantSamplesError, InputTypeError, NotFittedError, ShapeError
from ksvd_sae.learning.averaging import Average
from ksvd_sae.learning.checkpoint import (
    PROBE_ROWS,
    Fingerprint,
    check_probe,
    digest,
    load_checkpoint,
    probe,
    save_checkpoint,
)
from ksvd_sae.learning.checks import check_code
from ksvd_sae.learning.code import Code
from ksvd_sae.learning.coding import Coding
from ksvd_sae.learning.drift import Drift
from ksvd_sae.learning.redraw import first_atoms
from ksvd_sae.learning.sources import (
    DividedSource,
    MappedSource,
    Samples,
    SampleSource,
    StreamSource,
    TensorSource,
    as_batch,
    as_source,
    kept_on_device,
    prefetched,
    reshaped,
    same_device,
)
from ksvd_sae.learning.training import (
    BatchLog,
    LearnerOptions,
    TrainingState,
    checked_batch,
    learn_batch,
    learned_with,
)
from ksvd_sae.learning.weighting import Weighting
from ksvd_sae.ranks import ALONE, Ranks
from ksvd_sae.store import content_hash

__all__ = ["BatchLog", "DictionaryLearner", "LearnerOptions"]

logger = logging.getLogger(__name__)
_WHERE = "DB-KSVD"


class DictionaryLearner:
    """Learn a dictionary of unit atoms such that k of them, with signs, rebuild a sample.

    Args:
        options: the dictionary, and how it is learned.
        device: 'cpu', 'cuda', 'cuda:1' and so on, a torch.device, or 'auto'.
        keep_on_device: move all samples to the device first; None does on CUDA if they take at most half of its free
            memory (see ``kept_on_device``); of several processes each then reads its own rows of activation shards.
        log_path: JSONL file with a line a batch (see BatchLog); starts empty with each ``fit`` that does not resume.
        checkpoint_path: file that holds where training stands, for ``fit(..., resume=True)``; gone after the end.
        checkpoint_every: batches between checkpoints; None writes one after each pass. A KeyboardInterrupt writes one
            too.
        on_batch: called with each BatchLog (progress bars).
        ranks: the processes that learn this dictionary together (ranks.py): each calls ``fit`` with the same samples
            and options, takes its part of every batch, and ends with the same dictionary; log and checkpoint are rank
            0's to write.

    Attributes: as the arguments; ``state``, where training stands, None before the first batch was accepted.
        After fitting: ``atoms_MD`` (unit rows of the weighted space), ``centre_D``, ``samples_seen``, ``log`` (list of
        BatchLog; its FVUs are of the weighted space, and of the atoms before they are averaged),
        ``batches_passed_over`` (whose samples were all the same, or one: nothing to learn from).

    >>> learner = DictionaryLearner(LearnerOptions(512, Coding(k=8))).fit(x_ND)         # doctest: +SKIP
    >>> x_hat_ND = learner.decode(learner.encode(x_ND))                                 # doctest: +SKIP
    """

    def __init__(
        self,
        options: LearnerOptions,
        *,
        device: str | torch.device = "auto",
        keep_on_device: bool | None = None,
        log_path: Path | str | None = None,
        checkpoint_path: Path | str | None = None,
        checkpoint_every: int | None = None,
        on_batch: Callable[[BatchLog], None] | None = None,
        ranks: Ranks = ALONE,
    ):
        if not isinstance(options, LearnerOptions):
            cure = "LearnerOptions(n_atoms, Coding(k)); DoubleBatchKSVD takes them one by one"
            raise InputTypeError(f"{_WHERE}: options must be LearnerOptions", got=shown(options), cure=cure)
        if on_batch is not None and not callable(on_batch):
            raise InputTypeError(f"{_WHERE}: on_batch must be a function of a BatchLog", got=shown(on_batch))
        if not isinstance(ranks, Ranks):
            cure = "Ranks.of_process_group()"
            raise InputTypeError(f"{_WHERE}: ranks must be Ranks", got=shown(ranks), cure=cure)
        self.options, self.device, self.on_batch, self.ranks = options, device, on_batch, ranks
        self.keep_on_device = None if keep_on_device is None else flag(keep_on_device, "keep_on_device", _WHERE)
        self.log_path = None if log_path is None else path(log_path, "log_path", _WHERE)
        self.checkpoint_path = None if checkpoint_path is None else path(checkpoint_path, "checkpoint_path", _WHERE)
        self.checkpoint_every = (
            None if checkpoint_every is None else whole(checkpoint_every, "checkpoint_every", _WHERE)
        )
        self.state: TrainingState | None = None

    @property
    def coding(self) -> Coding:
        """How ``encode`` codes centred and weighted samples."""
        return self.options.coding

    @property
    def weighting(self) -> Weighting | None:
        return self.options.weighting

    @property
    def atoms_MD(self) -> Tensor:
        """Unit rows, of the weighted space if there is a weighting.

        Raises: NotFittedError (as ``centre_D``, ``encode`` and ``decode`` do).
        """
        state, atoms_MD = self._fitted
        return state.average.atoms_MD if self.options.average and state.average is not None else atoms_MD

    @property
    def centre_D(self) -> Tensor:
        """In raw space; 0 with centre=False."""
        return self._fitted[0].centre_D

    @property
    def log(self) -> list[BatchLog]:
        """A line for each batch so far."""
        return self.state.log if self.state is not None else []

    @property
    def samples_seen(self) -> int:
        return self.state.samples_seen if self.state is not None else 0

    @property
    def batches_passed_over(self) -> int:
        return self.state.passed_over if self.state is not None else 0

    @property
    def _fitted(self) -> tuple[TrainingState, Tensor]:
        if self.state is None or self.state.atoms_MD is None:
            raise NotFittedError("DB-KSVD: not fitted yet", cure="call fit or partial_fit first")
        return self.state, self.state.atoms_MD

    @own_modes()
    def fit(self, samples: Samples, *, resume: bool = False) -> "DictionaryLearner":
        """Learn from samples, starting afresh unless told to resume.

        Args:
            samples: a (N, D) tensor or array, a SampleSource (activation shards), an iterable of (B, D) batches, or a
                function that returns one for each pass. A stream's batches are taken as they come, whatever
                ``batch_samples``, and its centre is that of its first batch (see ``partial_fit``).
            resume: go on from ``checkpoint_path`` if there is a checkpoint; else start.
        A batch whose samples are all the same, or one, tells nothing: it is passed over, counted and logged.

        Raises: ShapeError (options or samples that do not fit, fewer samples than atoms, an iterator for several
            passes), ConfigError (a device that is not there), ActivationError (NaN or infinite samples, none that
            differ in any batch, a stream that drifts), ManifestError (a checkpoint of another run).
        """
        self._check()
        if resume and self.checkpoint_path is None:
            raise ShapeError("DB-KSVD: resume needs a checkpoint_path")
        _Fit(self, as_source(samples)).run(resume)
        return self

    @own_modes()
    def partial_fit(self, samples: Any) -> "DictionaryLearner":
        """One update from one batch, a tensor or array. The first batch sets the centre and the initial atoms.

        The centre stays that of the first batch: atoms are learned about it, and codes would change their meaning with
        it. So the mean of all samples so far must not go further from it than samples lie apart (drift.py).
        A batch whose samples are all the same, or one, tells nothing: it is passed over, counted and logged, unless no
        batch came before it.
        A refused batch changes nothing, so a caller may leave it out and go on.

        Raises: as ``fit``; ShapeError if an option that training follows from, or the device, is not what it was.
        """
        self._check()
        self._check_alone("partial_fit")
        batch_BD = as_batch(samples, f"{_WHERE}.partial_fit")
        if not batch_BD.numel():
            raise ShapeError(f"{_WHERE}: the batch is empty", got=str(tuple(batch_BD.shape)))
        if self.state is not None:
            self._check_unchanged(self.state)
            if self.state.drift is None and self.options.centre:
                # Learned about the mean of all samples: of those, each counts once.
                self.state.drift = Drift(self.state.samples_seen // max(1, self.state.pass_index))
        try:
            state = self._learn(batch_BD, 0)
        except ConstantSamplesError:
            if self.state is None or self.state.atoms_MD is None:
                raise
            self.state.passed_over += 1
            logger.warning("DB-KSVD: a batch of %d samples, all the same, is passed over", len(batch_BD))
            return self
        if self.on_batch is not None:
            self.on_batch(state.log[-1])
        return self

    @own_modes()
    def encode(self, x_BD: Any) -> Code:
        """Code raw samples, a tensor or array, with the coder of ``coding``."""
        atoms_MD = self.atoms_MD
        return self.coding.encode(self._mapped(as_batch(x_BD, f"{_WHERE}.encode"), self._fitted[0]), atoms_MD)

    @own_modes()
    def decode(self, code: Code) -> Tensor:
        """Rebuild raw samples, (B, D)."""
        state, atoms_MD = self._fitted
        check_code(code, len(atoms_MD), f"{_WHERE}.decode")
        rebuilt_BD = code.reconstruct(self.atoms_MD)
        if state.weighting is not None:
            rebuilt_BD = state.weighting.undo(rebuilt_BD)
        return rebuilt_BD + state.centre_D

    def _check_unchanged(self, state: TrainingState) -> None:
        """Raise ShapeError unless training can go on as it began."""
        device, changed = resolve_device(self.device), []
        if not same_device(device, state.centre_D.device):
            changed.append(f"device: {state.centre_D.device}, now {device}")
        if state.options is not None and state.options is not self.options:
            before, now = learned_with(state.options), learned_with(self.options)
            # Of the size of its batches the caller sees to himself.
            for name in before.keys() - {"batch_samples"}:
                if not _same(before[name], now[name]):
                    changed.append(f"{name}: {_brief(before[name])}, now {_brief(now[name])}")
        if changed:
            raise ShapeError(
                f"{_WHERE}.partial_fit: arguments are not what they were when training began",
                got="; ".join(sorted(changed)),
                cause="set_params, or other options, between two calls",
                cure="the arguments as they were; or fit, or a new learner, to begin again",
            )

    def _check(self) -> None:
        self.options.check()
        if self.checkpoint_every is not None and (self.checkpoint_path is None or self.checkpoint_every < 1):
            got = f"checkpoint_every={self.checkpoint_every}, checkpoint_path={self.checkpoint_path}"
            raise ShapeError("DB-KSVD: checkpoint_every must be at least 1 and needs a checkpoint_path", got=got)
        resolve_device(self.device)
        if self.options.update == "exact":
            self._check_alone("update='exact'")

    def _check_alone(self, what: str) -> None:
        if self.ranks.size > 1:
            raise ShapeError(
                f"{_WHERE}: {what} is for one process",
                got=f"{self.ranks.size} processes",
                cause="only sums over samples go round, which a sweep over a source of known size needs alone",
                cure="update='sweep' or 'two_sweeps', and fit with a tensor, a mapped array or activation shards",
            )

    def _started(self, centre_D: Tensor, atoms_MD: Tensor | None = None) -> TrainingState:
        device, weighting = resolve_device(self.device), self.weighting
        return TrainingState(
            generator=torch.Generator().manual_seed(self.options.seed),
            centre_D=centre_D.float().to(device) * float(self.options.centre),
            weighting=None if weighting is None else weighting.to(device),
            atoms_MD=atoms_MD,
            options=self.options,
        )

    def _learn(self, raw_BD: Tensor, pass_index: int) -> TrainingState:
        """One update from one batch of raw samples, with its line of the log."""
        started, options = time.perf_counter(), self.options
        state = self.state or self._started(TensorSource(raw_BD).centre_D)
        if self.state is None and options.centre:
            state.drift = Drift()
        x_BD = self._mapped(raw_BD, state)
        options.check(x_BD.shape[1])
        batch = checked_batch(x_BD, self.ranks)
        x_BD = batch.x_BD
        drift = None if state.drift is None else state.drift.with_next(x_BD, batch.variance, batch.exponent)
        if state.atoms_MD is None:
            state.atoms_MD = first_atoms(options.n_atoms, options.init, x_BD, state.generator, self.ranks)
        if state.idle_M is None:
            state.idle_M = torch.zeros(options.n_atoms, dtype=torch.float64, device=x_BD.device)
        step = learn_batch(batch, state.atoms_MD, state.idle_M, options, state.generator, self.ranks)
        state.atoms_MD, state.idle_M = step.atoms_MD, step.idle_M
        if options.average:
            state.average = (state.average or Average.of(state.atoms_MD)).with_next(step.atoms_MD, step.fresh_M)
        state.samples_seen += batch.n_samples
        state.drift = drift
        line = BatchLog(
            pass_index=pass_index,
            batch=len(state.log),
            samples_seen=state.samples_seen,
            fvu=step.errors[-1] / batch.variance,
            fvu_after_update=step.error_after / batch.variance,
            l0=step.l0,
            dead=step.dead,
            duplicates=step.duplicates,
            redrawn=step.redrawn,
            seconds=time.perf_counter() - started,
            prefix_fvu=[error / batch.variance for error in step.errors] if options.coding.groups is not None else [],
        )
        state.log.append(line)
        logger.debug("%s", line)
        if self.log_path is not None and self.ranks.rank == 0:
            with Path(self.log_path).open("a") as file:
                file.write(line.json())
        self.state = state
        return state

    def _mapped(self, raw_BD: Tensor, state: TrainingState) -> Tensor:
        """Raw samples to the space that the atoms live in."""
        if raw_BD.ndim != 2 or raw_BD.shape[1] != len(state.centre_D):
            raise ShapeError(
                "DB-KSVD: samples do not fit",
                got=str(tuple(raw_BD.shape)),
                limit=f"(B, {len(state.centre_D)})",
                cause="activations of another model or hook",
                cure=reshaped(tuple(raw_BD.shape)) if raw_BD.ndim != 2 else None,
            )
        if not raw_BD.is_floating_point():
            raise ShapeError("DB-KSVD: samples are not floating point", got=str(raw_BD.dtype))
        x_BD = raw_BD.detach().to(state.centre_D.device).float() - state.centre_D
        return x_BD if state.weighting is None else state.weighting.apply(x_BD)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Weighting) and isinstance(other, Weighting):
        return one is other or (one.matrix.shape == other.matrix.shape and torch.equal(one.matrix, other.matrix))
    return bool(one == other) if type(one) is type(other) else False


def _brief(value: Any) -> str:
    return f"a Weighting of {tuple(value.matrix.shape)}" if isinstance(value, Weighting) else repr(value)


class _Fit:
    """One call of ``fit``: passes of a learner over a source, from the start or from a checkpoint."""

    def __init__(self, learner: DictionaryLearner, source: SampleSource | StreamSource):
        self.learner, self.options, self.ranks = learner, learner.options, learner.ranks
        self.checkpoint_path = None if learner.checkpoint_path is None else Path(learner.checkpoint_path)
        self.device = resolve_device(learner.device)
        self.source: SampleSource | StreamSource = source
        # All as it was after the last whole batch.
        self.after_batch: TrainingState | None = None
        if isinstance(source, StreamSource):
            learner._check_alone("a stream")
            self._check_stream(source)
        else:
            self._check_size(source)
            self.source = self._nearer(source)

    def run(self, resume: bool) -> None:
        self._begin(resume)
        learner = self.learner
        first_pass = 0 if learner.state is None else learner.state.pass_index
        try:
            for pass_index in range(first_pass, self.options.passes):
                self._learn_pass(pass_index)
        except KeyboardInterrupt:
            # Wherever in a batch it came.
            if self.after_batch is not None:
                self._save(self.after_batch)
            raise
        if self.checkpoint_path is not None and self.ranks.rank == 0:
            self.checkpoint_path.unlink(missing_ok=True)

    def _nearer(self, source: SampleSource) -> SampleSource:
        """On the device, if that is wanted; of several processes each reads its own part of each batch instead."""
        if self.ranks.size > 1 and self.learner.keep_on_device is None and isinstance(source, DividedSource):
            return source.checked(self.ranks.part)
        return kept_on_device(source, self.device, self.learner.keep_on_device)

    def _check_stream(self, source: StreamSource) -> None:
        if source.one_pass_only and self.options.passes > 1:
            raise ShapeError(
                "DB-KSVD: an iterator can be gone over only once",
                got=f"passes = {self.options.passes}",
                cure="pass a function that returns a fresh iterator, or passes=1",
            )

    def _check_size(self, source: SampleSource) -> None:
        self.options.check(source.d_in)
        if source.n_samples < self.options.n_atoms:
            raise ShapeError(
                "DB-KSVD: fewer samples than atoms",
                got=f"{source.n_samples} samples, n_atoms = {self.options.n_atoms}",
                cure="harvest more tokens or ask for fewer atoms",
            )

    def _begin(self, resume: bool) -> None:
        """The state to train from, and the files as they belong to it."""
        learner, path = self.learner, self.checkpoint_path
        if self.ranks.size > 1:
            self._check_same()
        # A stream's centre comes with its first batch.
        learner.state = None if isinstance(self.source, StreamSource) else learner._started(self.source.centre_D)
        # Whether all go on is rank 0's to say: the others may look later.
        there = path is not None and resume and path.exists()
        there = bool(self.ranks.agreed(torch.tensor(there, dtype=torch.uint8, device=self.device)))
        if path is not None and there:
            started = learner.state or learner._started(torch.zeros(1, device="cpu"))
            learner.state = load_checkpoint(path, self._fingerprint, started)
            # Rank 0 may replace it now.
            self.ranks.total(torch.zeros(1, device=self.device))
        elif path is not None and self.ranks.rank == 0:
            path.unlink(missing_ok=True)
        if learner.log_path is not None and self.ranks.rank == 0:
            Path(learner.log_path).parent.mkdir(parents=True, exist_ok=True)
            # A run that was stopped may have logged more than its checkpoint knows of.
            Path(learner.log_path).write_text("".join(line.json() for line in learner.log))

    def _check_same(self) -> None:
        """Raise ShapeError, in all processes, unless all were given the same samples and options."""
        assert not isinstance(self.source, StreamSource)
        arguments = int(content_hash(self._fingerprint["arguments"]), 16)
        own = torch.tensor([self.source.n_samples, self.source.d_in, arguments], device=self.device)
        differs = not torch.equal(own, self.ranks.agreed(own.clone()))
        # Whose centres are of one width, as all must know before they send them. Other machines round otherwise.
        if not self.ranks.count(differs, self.device):
            centre_D = self.source.centre_D.to(self.device, torch.float32)
            differs = not torch.allclose(centre_D, self.ranks.agreed(centre_D.clone()), rtol=1e-3, atol=1e-6)
        if others := self.ranks.count(differs, self.device):
            raise ShapeError(
                f"{_WHERE} in {self.ranks.size} processes: not all were given the same",
                got=f"{self.source.n_samples} samples of {self.source.d_in} dimensions in rank {self.ranks.rank}; "
                f"{others} processes differ from rank 0 in these, in their mean or in the options",
                cause="each process has samples of its own",
                cure="give all samples to every process: each takes its part of every batch",
            )

    @cached_property
    def _fingerprint(self) -> Fingerprint:
        """What the bits follow from, as JSON."""
        arguments = learned_with(self.options)
        weighting = self.options.weighting
        arguments["weighting"] = None if weighting is None else digest(weighting.matrix)
        if isinstance(self.source, StreamSource):
            return {"arguments": arguments, "samples": {"stream": True}}
        source = self.source
        samples = {
            "n_samples": source.n_samples,
            "d_in": source.d_in,
            "centre": digest(source.centre_D),
            # A source without an order of its own is shuffled otherwise once it is kept on the device.
            "shuffled_here": isinstance(source, TensorSource | MappedSource) and source.shuffled_here,
        }
        return {"arguments": arguments, "samples": samples}

    def _learn_pass(self, pass_index: int) -> None:
        learner = self.learner
        done = 0 if learner.state is None else learner.state.batches_done
        already, passed_over, samples, first = learner.batches_passed_over, 0, 0, ""
        with closing(self._batches(pass_index)) as batches:
            for number, batch_BD in enumerate(batches):
                if number == 0:
                    first = probe(self.ranks.first(batch_BD, PROBE_ROWS))
                    if learner.state is not None and done:
                        check_probe(learner.state, first)
                if number < done:
                    continue
                learned = True
                try:
                    learner._learn(batch_BD, pass_index)
                except ConstantSamplesError:
                    n_samples = self.ranks.count(len(batch_BD), batch_BD.device)
                    learned, passed_over, samples = False, passed_over + 1, samples + n_samples
                # A stream has none before its first batch that tells something.
                state = learner.state
                if state is not None:
                    state.batches_done, state.pass_probe, state.passed_over = number + 1, first, already + passed_over
                if state is None or not learned:
                    continue
                self.after_batch = state.copy()
                if learner.checkpoint_every is not None and len(state.log) % learner.checkpoint_every == 0:
                    self._save(state)
                if learner.on_batch is not None:
                    learner.on_batch(state.log[-1])
        if passed_over:
            logger.warning(
                "DB-KSVD: in pass %d, %d batches with %d samples, in each of them all the same, are passed over",
                *(pass_index, passed_over, samples),
            )
        if learner.state is None or learner.state.atoms_MD is None:
            raise ConstantSamplesError(
                "DB-KSVD: all samples of each batch are the same: there is no variance to explain",
                got=f"{passed_over} batches, {samples} samples",
                cause="a hook that gives constants, padding tokens, or batches of a single sample",
                cure="check the hook name and the text; give more samples, or larger batches",
            )
        state = learner.state
        state.pass_index, state.batches_done, state.pass_probe = pass_index + 1, 0, ""
        self.after_batch = state.copy()
        if learner.checkpoint_every is None:
            self._save(state)

    def _save(self, state: TrainingState) -> None:
        if self.checkpoint_path is not None and self.ranks.rank == 0:
            save_checkpoint(self.checkpoint_path, state, self._fingerprint)

    def _batches(self, pass_index: int) -> Generator[Tensor, None, None]:
        """Of several processes, this one's part of each."""
        if isinstance(self.source, StreamSource):
            return prefetched(self.source.batches(), self.device)
        # Batches of nearly equal size: a short last one would see many atoms unused and redraw them.
        n_batches = -(-self.source.n_samples // self.options.largest_batch)
        size = -(-self.source.n_samples // n_batches)
        seed = None if pass_index == 0 else self.options.seed + pass_index
        if self.ranks.size > 1 and isinstance(self.source, DividedSource):
            return prefetched(self.source.batches(size, seed=seed, part=self.ranks.part), self.device)
        if isinstance(self.source, TensorSource) and same_device(self.source.samples_ND.device, self.device):
            batches = self._parts(self.source.batches(size, seed=seed))  # nothing to wait for
            if pass_index + 1 < self.options.passes:
                self.source.prepare(self.options.seed + pass_index + 1)
            return batches
        return prefetched(self._parts(self.source.batches(size, seed=seed)), self.device)

    def _parts(self, batches: Iterator[Tensor]) -> Generator[Tensor, None, None]:
        return (batch_BD[self.ranks.part(len(batch_BD))] for batch_BD in batches)
