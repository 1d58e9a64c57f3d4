"""DB-KSVD as a scikit-learn transformer: ``DictionaryLearner`` with flat arguments and arrays in and out."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from torch import Tensor

from ksvd_sae.errors import ShapeError
from ksvd_sae.learning.code import Code
from ksvd_sae.learning.coding import AnyCoder, Coding
from ksvd_sae.learning.dbksvd import BatchLog, DictionaryLearner, LearnerOptions
from ksvd_sae.learning.fvu import fvu
from ksvd_sae.learning.products import Precision
from ksvd_sae.learning.redraw import Redraw
from ksvd_sae.learning.sources import Samples, as_tensor
from ksvd_sae.learning.training import Init, Update
from ksvd_sae.learning.weighting import Weighting

Array = NDArray[np.float32]


class DoubleBatchKSVD(TransformerMixin, BaseEstimator):
    """Learn a dictionary of unit atoms such that k of them, with signs, rebuild a sample.

    Args:
        n_atoms, train_k, passes, batch_samples, update, atom_batch, init, redraw, duplicate_cosine, coherence, average,
            centre, weighting, precision, seed: see ``LearnerOptions``.
        k, coder, groups, nonnegative, rtol, tau, max_steps: see ``Coding``. Training always codes by plain MP, with
            groups group by group; the coder is that of ``encode``, ``transform`` and the dictionary.
        device, keep_on_device, log_path, checkpoint_path, checkpoint_every, on_batch: see ``DictionaryLearner``.

    Attributes after fitting: ``atoms_MD`` (unit rows of the weighted space), ``centre_D``, ``samples_seen``, ``log``
    (list of BatchLog); and in scikit-learn's terms, as arrays in raw units, ``components_`` and ``mean_``:
    ``codes @ components_ + mean_`` rebuilds the samples. Without a weighting the components are unit rows.

    >>> ksvd = DoubleBatchKSVD(n_atoms=512, k=8).fit(x_ND)         # doctest: +SKIP
    >>> x_hat_ND = ksvd.decode(ksvd.encode(x_ND))                  # doctest: +SKIP
    """

    # Not in __init__, which scikit-learn wants to set nothing but its arguments.
    _learner: DictionaryLearner | None = None

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
        seed: int = 0,
        device: str = "auto",
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
        groups = None if self.groups is None else tuple(self.groups)
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
                seed=self.seed,
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
        return self.learner.log

    @property
    def samples_seen(self) -> int:
        return self.learner.samples_seen

    @property
    def n_features_in_(self) -> int:
        """D; with ``fit``'s samples only, so that hasattr tells whether it was fitted."""
        return int(self.atoms_MD.shape[1])

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
        # Kept before it learns: on_batch may look at the atoms.
        self._learner = self.learner
        self._learner.fit(samples, resume=resume)
        return self

    def partial_fit(self, samples: Any, y: Any = None) -> "DoubleBatchKSVD":
        """One update from one batch; as ``DictionaryLearner.partial_fit``."""
        batch_BD = samples if isinstance(samples, Tensor) else self._array(samples)
        self._learner = self.learner
        self._learner.partial_fit(batch_BD)
        return self

    def encode(self, x_BD: Tensor) -> Code:
        """Code raw samples with ``coder``."""
        return self.learner.encode(x_BD)

    def decode(self, code: Code) -> Tensor:
        """Rebuild raw samples, (B, D)."""
        return self.learner.decode(code)

    def transform(self, samples: Any) -> Array:
        """Dense codes, (N, M) float32: for N·M that fits in memory; ``encode`` gives sparse ones."""
        x_ND = self._array(samples)
        return self.encode(x_ND).to_dense(len(self.atoms_MD)).cpu().numpy()

    def inverse_transform(self, codes: Any) -> Array:
        """Samples from dense codes, (N, D) float32."""
        codes_NM = np.asarray(codes, dtype=np.float32)
        if codes_NM.ndim != 2 or codes_NM.shape[1] != len(self.atoms_MD):
            what = f"{type(self).__name__}.inverse_transform: codes do not fit"
            raise ShapeError(what, got=str(codes_NM.shape), limit=f"(N, {len(self.atoms_MD)})")
        return codes_NM @ self.components_ + self.mean_

    def score(self, samples: Any, y: Any = None) -> float:
        """Minus the FVU in raw units, Σ‖x − x̂‖² / Σ‖x − x̄‖², so that larger is better.

        Raises: ActivationError if all samples are the same.
        """
        x_ND = self._array(samples)
        return -fvu(x_ND, self.decode(self.encode(x_ND)), f"{type(self).__name__}.score")

    def _array(self, samples: Any) -> Tensor:
        x_ND = as_tensor(samples)
        if hasattr(self, "n_features_in_") and x_ND.shape[1] != self.n_features_in_:
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
