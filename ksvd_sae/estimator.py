"""DB-KSVD as a scikit-learn transformer: ``DictionaryLearner`` with flat arguments and arrays in and out."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import validate_data
from torch import Tensor

from ksvd_sae.errors import InputTypeError, NotFittedError, ShapeError
from ksvd_sae.learning.code import Code
from ksvd_sae.learning.coding import AnyCoder, Coding
from ksvd_sae.learning.dbksvd import BatchLog, DictionaryLearner, LearnerOptions
from ksvd_sae.learning.fvu import FVU
from ksvd_sae.learning.products import Precision
from ksvd_sae.learning.redraw import Redraw
from ksvd_sae.learning.sources import MappedSource, Samples, as_batch, as_tensor
from ksvd_sae.learning.training import Init, Update
from ksvd_sae.learning.weighting import Weighting

Array = NDArray[np.float32]


class DoubleBatchKSVD(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Learn a dictionary of unit atoms such that k of them, with signs, rebuild a sample.

    Args:
        n_atoms, train_k, passes, batch_samples, update, atom_batch, init, redraw, duplicate_cosine, coherence, average,
            centre, weighting, precision: see ``LearnerOptions``.
        seed: a whole number for the same bits every time; or what scikit-learn takes as random_state: None, a
            RandomState (and numpy's Generator), of which every ``fit`` draws a number.
        k, coder, groups, nonnegative, rtol, tau, max_steps: see ``Coding``. Training always codes by plain MP, with
            groups group by group; the coder is that of ``encode``, ``transform`` and the dictionary.
        device, keep_on_device, log_path, checkpoint_path, checkpoint_every, on_batch: see ``DictionaryLearner``.

    Attributes after fitting: ``atoms_MD`` (unit rows of the weighted space), ``centre_D``, ``samples_seen``, ``log``
    (list of BatchLog), ``batches_passed_over`` (see ``fit``); and in scikit-learn's terms, as arrays in raw units,
    ``components_`` and ``mean_``: ``codes @ components_ + mean_`` rebuilds the samples. Without a weighting the
    components are unit rows. ``feature_names_in_``: the columns of a frame that it was fitted with; frames with others,
    or in another order, are refused. ``set_output`` gives codes as frames.

    >>> ksvd = DoubleBatchKSVD(n_atoms=512, k=8).fit(x_ND)         # doctest: +SKIP
    >>> x_hat_ND = ksvd.decode(ksvd.encode(x_ND))                  # doctest: +SKIP
    """

    # Not in __init__, which scikit-learn wants to set nothing but its arguments.
    _learner: DictionaryLearner | None = None
    _seed: int | None = None

    def __init__(
        self,
        n_atoms: int,
        k: int,
        *,
        train_k: int | None = None,
        passes: int = 1,
        batch_samples: int | None = None,
        update: Update = "sweep",
        atom_batch: int = 128,
        init: Init = "data",
        redraw: Redraw = "residual",
        duplicate_cosine: float | None = 0.99,
        coherence: float | None = None,
        average: bool = True,
        centre: bool = True,
        weighting: Weighting | None = None,
        groups: Sequence[int] | None = None,
        nonnegative: bool = False,
        rtol: float = 0.0,
        tau: float = 0.0,
        max_steps: int | None = None,
        precision: Precision = "float32",
        coder: AnyCoder = "mp",
        seed: int | np.random.RandomState | np.random.Generator | None = 0,
        device: str | torch.device = "auto",
        keep_on_device: bool | None = None,
        log_path: Path | str | None = None,
        checkpoint_path: Path | str | None = None,
        checkpoint_every: int | None = None,
        on_batch: Callable[[BatchLog], None] | None = None,
    ):
        # Stored as given and checked by fit, as scikit-learn's clone and set_params want it.
        self.n_atoms, self.k, self.train_k = n_atoms, k, train_k
        self.passes, self.batch_samples = passes, batch_samples
        self.update, self.atom_batch, self.init = update, atom_batch, init
        self.redraw, self.duplicate_cosine, self.coherence, self.average = redraw, duplicate_cosine, coherence, average
        self.centre, self.weighting, self.groups, self.nonnegative = centre, weighting, groups, nonnegative
        self.rtol, self.tau, self.max_steps, self.precision = rtol, tau, max_steps, precision
        self.coder, self.seed = coder, seed
        self.device, self.keep_on_device, self.log_path, self.on_batch = device, keep_on_device, log_path, on_batch
        self.checkpoint_path, self.checkpoint_every = checkpoint_path, checkpoint_every

    def set_params(self, **arguments: Any) -> "DoubleBatchKSVD":
        """Change arguments by name; the next ``fit`` checks them.

        Raises: ShapeError (a ValueError) for a name that is no argument.
        """
        names = list(inspect.signature(type(self)).parameters)
        for name in arguments:
            if name not in names:
                what = f"{type(self).__name__}.set_params: Invalid parameter {name!r}"
                raise ShapeError(what, limit=", ".join(names))
        return super().set_params(**arguments)

    @property
    def coding(self) -> Coding:
        """How ``encode`` codes centred and weighted samples."""
        # A Coding takes any sequence.
        groups: Any = self.groups
        return Coding(self.k, self.coder, self.rtol, self.max_steps, self.nonnegative, groups, self.tau)

    @property
    def learner(self) -> DictionaryLearner:
        """The learner of the arguments as they are now, where training stands."""
        learner = DictionaryLearner(
            LearnerOptions(
                self.n_atoms,
                self.coding,
                train_k=self.train_k,
                passes=self.passes,
                batch_samples=self.batch_samples,
                update=self.update,
                atom_batch=self.atom_batch,
                init=self.init,
                redraw=self.redraw,
                duplicate_cosine=self.duplicate_cosine,
                coherence=self.coherence,
                average=self.average,
                centre=self.centre,
                weighting=self.weighting,
                precision=self.precision,
                seed=self._number_of_seed(),
            ),
            device=self.device,
            keep_on_device=self.keep_on_device,
            log_path=self.log_path,
            checkpoint_path=self.checkpoint_path,
            checkpoint_every=self.checkpoint_every,
            on_batch=self.on_batch,
        )
        learner.state = None if self._learner is None else self._learner.state
        return learner

    def _number_of_seed(self, *, draw: bool = False) -> Any:
        """The seed as the learner wants it: a whole number, of a source of them the one that was drawn last.

        Args: draw: draw a new one. To look at a fitted estimator must not.
        """
        seed: Any = self.seed
        if not (seed is None or seed is np.random or isinstance(seed, np.random.RandomState | np.random.Generator)):
            return seed
        if draw:
            if isinstance(seed, np.random.Generator):
                self._seed = int(seed.integers(2**31 - 1))
            else:
                self._seed = int(check_random_state(seed).randint(2**31 - 1))
        if self._seed is None:
            raise NotFittedError(
                "DB-KSVD: not fitted yet, so that no seed is drawn", cure="call fit or partial_fit first"
            )
        return self._seed

    @property
    def atoms_MD(self) -> Tensor:
        """Unit rows, of the weighted space if there is a weighting."""
        return self.learner.atoms_MD

    @property
    def centre_D(self) -> Tensor:
        """In raw space; 0 with centre=False."""
        return self.learner.centre_D

    @property
    def log(self) -> list[BatchLog]:
        """A line for each batch so far."""
        return [] if self._learner is None else self._learner.log

    @property
    def samples_seen(self) -> int:
        return 0 if self._learner is None else self._learner.samples_seen

    @property
    def batches_passed_over(self) -> int:
        return 0 if self._learner is None else self._learner.batches_passed_over

    @property
    def n_features_in_(self) -> int:
        """D; with ``fit``'s samples only, so that hasattr tells whether it was fitted."""
        return int(self._trained.atoms_MD.shape[1])

    def get_feature_names_out(self, input_features: Any = None) -> Any:
        """Names of the columns of ``transform``: the class's name and the atom's number."""
        _ = self._n_features_out  # our NotFittedError, rather than scikit-learn's
        return super().get_feature_names_out(input_features)

    @property
    def _n_features_out(self) -> int:
        """M, for the names of columns."""
        return len(self._trained.atoms_MD)

    @property
    def _trained(self) -> DictionaryLearner:
        """As it was trained, whatever the arguments are now."""
        if self._learner is None:
            raise NotFittedError("DB-KSVD: not fitted yet", cure="call fit or partial_fit first")
        return self._learner

    @property
    def components_(self) -> Array:
        atoms_MD = self.atoms_MD if self.weighting is None else self.weighting.undo(self.atoms_MD.cpu())
        return atoms_MD.cpu().numpy()

    @property
    def mean_(self) -> Array:
        return self.centre_D.cpu().numpy()

    def fit(self, samples: Samples, y: Any = None, *, resume: bool = False) -> "DoubleBatchKSVD":
        """Learn from samples, starting afresh unless told to resume; as ``DictionaryLearner.fit``.

        Args: y: ignored, as scikit-learn has it.
        """
        if resume and self.seed is None:
            what = f"{type(self).__name__}.fit: seed None draws another seed in every fit, and none can go on with it"
            raise ShapeError(what, cure="a whole number as seed")
        with self._names_of(samples, first=True):
            self._number_of_seed(draw=True)
            # Kept before it learns: on_batch may look at the atoms.
            self._learner = self.learner
            self._learner.fit(samples, resume=resume)
        return self

    def partial_fit(self, samples: Any, y: Any = None) -> "DoubleBatchKSVD":
        """One update from one batch; as ``DictionaryLearner.partial_fit``."""
        first = self._learner is None or self._learner.state is None
        with self._names_of(samples, first=first):
            if first:
                self._number_of_seed(draw=True)
            self._learner = self.learner
            self._learner.partial_fit(self._with_width(as_batch(samples, f"{type(self).__name__}.partial_fit")))
        return self

    def encode(self, x_BD: Any) -> Code:
        """Code raw samples with ``coder``."""
        learner = self.learner
        codes = [learner.encode(chunk_BD) for chunk_BD in self._chunks(x_BD, look=False)]
        if len(codes) == 1:
            return codes[0]
        return Code(torch.cat([code.values_BK for code in codes]), torch.cat([code.support_BK for code in codes]))

    def decode(self, code: Code) -> Tensor:
        """Rebuild raw samples, (B, D)."""
        return self.learner.decode(code)

    def transform(self, samples: Any) -> Array:
        """Dense codes, (N, M) float32: for N·M that fits in memory; ``encode`` gives sparse ones.

        A memory-mapped array is read, and coded, some rows at a time.
        """
        learner = self.learner
        n_atoms = len(learner.atoms_MD)
        parts = [learner.encode(chunk_ND).to_dense(n_atoms).cpu().numpy() for chunk_ND in self._chunks(samples)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def inverse_transform(self, codes: Any) -> Array:
        """Samples from dense codes, (N, D) float32."""
        n_atoms, what = self._n_features_out, f"{type(self).__name__}.inverse_transform: codes do not fit"
        # Whole numbers and bfloat16 are codes, too.
        codes_NM = as_batch(codes.float() if isinstance(codes, Tensor) else codes, what).numpy(force=True)
        if codes_NM.ndim != 2 or codes_NM.shape[1] != n_atoms:
            raise ShapeError(what, got=str(codes_NM.shape), limit=f"(N, {n_atoms})")
        return codes_NM.astype(np.float32, copy=False) @ self.components_ + self.mean_

    def score(self, samples: Any, y: Any = None) -> float:
        """Minus the FVU in raw units, Σ‖x − x̂‖² / Σ‖x − x̄‖², so that larger is better.

        Raises: ActivationError if all samples are the same.
        """
        learner, where = self.learner, f"{type(self).__name__}.score"
        stream = FVU()
        for chunk_ND in self._chunks(samples):
            stream.add_rows(chunk_ND, learner.decode(learner.encode(chunk_ND)))
        return -stream.value(where)

    @contextmanager
    def _names_of(self, samples: Any, *, first: bool = False) -> Iterator[None]:
        """scikit-learn's rule of column names: the first frame gives them, and those after must have the same.

        Args: first: these samples give the names, unless what is done with them fails.
        """
        before = vars(self).get("feature_names_in_")
        try:
            if not isinstance(samples, Tensor):
                validate_data(self, samples, reset=first, skip_check_array=True, ensure_2d=False)
        except TypeError as error:
            raise InputTypeError(str(error).rstrip(), cure="samples.columns = samples.columns.astype(str)") from error
        except ValueError as error:
            cure = "samples[list(ksvd.feature_names_in_)]: the columns as they were, in that order"
            raise ShapeError(str(error).rstrip(), cure=cure) from error
        try:
            if first and isinstance(samples, Tensor):
                self.__dict__.pop("feature_names_in_", None)
            yield
        except BaseException:
            self.__dict__.pop("feature_names_in_", None)
            if before is not None:
                self.feature_names_in_ = before
            raise

    def _chunks(self, samples: Any, *, look: bool = True) -> Iterator[Tensor]:
        """The samples, of the width that it was fitted with: all at once, or of a file some at a time.

        Args: look: at whether they are finite, before anything is done with them.
        """
        with self._names_of(samples):
            source = MappedSource.of(samples)
            if source is not None:
                self._with_width(torch.empty(0, source.d_in))
                yield from source.chunks()
            elif isinstance(samples, Tensor) and not look:
                yield samples
            else:
                yield self._with_width(as_tensor(samples))

    def _with_width(self, x_ND: Tensor) -> Tensor:
        if hasattr(self, "n_features_in_") and x_ND.ndim == 2 and x_ND.shape[1] != self.n_features_in_:
            # scikit-learn's words, which its checks look for.
            expected = f"{type(self).__name__} is expecting {self.n_features_in_} features as input"
            what = f"X has {x_ND.shape[1]} features, but {expected}"
            raise ShapeError(what, cause="activations of another model or hook")
        return x_ND

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "n_features_in_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags
