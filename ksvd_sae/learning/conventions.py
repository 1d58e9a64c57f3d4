"""scikit-learn's conventions without scikit-learn: clone, pipelines and grid searches go by names alone."""

import inspect
import sys
from abc import ABC, abstractmethod
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ksvd_sae.errors import ShapeError
from ksvd_sae.learning.code import Code
from ksvd_sae.learning.sources import Samples, TensorSource, as_source
from ksvd_sae.learning.weighting import Weighting

Self = TypeVar("Self", bound="ScikitLearnConventions")
Array = NDArray[np.float32]


class ScikitLearnConventions(ABC):
    """What a scikit-learn transformer has, for a class with ``fit``, ``encode`` and ``decode``.

    Arrays go in and out in raw units: ``transform`` gives dense codes (N, M) in float32, as scikit-learn's own
    dictionary learners do, ``inverse_transform`` rebuilds samples, ``score`` is minus the FVU (larger is better).
    ``components_`` are the atoms in raw space: ``codes @ components_ + mean_`` rebuilds the samples; without a
    weighting they are unit rows.
    """

    weighting: Weighting | None

    @property
    @abstractmethod
    def atoms_MD(self) -> Tensor: ...

    @property
    @abstractmethod
    def centre_D(self) -> Tensor: ...

    @abstractmethod
    def fit(self: Self, samples: Samples, y: Any = None) -> Self: ...

    @abstractmethod
    def encode(self, x_BD: Tensor) -> Code: ...

    @abstractmethod
    def decode(self, code: Code) -> Tensor: ...

    @classmethod
    def _argument_names(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments, by name. No argument is an estimator itself, so deep changes nothing."""
        return {name: getattr(self, name) for name in self._argument_names()}

    def set_params(self: Self, **arguments: Any) -> Self:
        """Change arguments by name; the next ``fit`` checks them.

        Raises: ShapeError (a ValueError) for a name that is no argument.
        """
        names = self._argument_names()
        for name, value in arguments.items():
            if name not in names:
                what = f"{type(self).__name__}.set_params: Invalid parameter {name!r}"
                raise ShapeError(what, limit=", ".join(names))
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        """The class and its arguments that are not at their default."""
        parameters = inspect.signature(type(self).__init__).parameters
        shown = []
        for name, value in self.get_params().items():
            if type(value) is not type(parameters[name].default) or value != parameters[name].default:
                shown.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

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

    def fit_transform(self, samples: Samples, y: Any = None) -> Array:
        return self.fit(samples).transform(samples)

    def transform(self, samples: Any) -> Array:
        """Dense codes, (N, M) float32: for N·M that fits in memory; ``encode`` gives sparse ones."""
        x_ND = self._array(samples)
        return self.encode(x_ND).to_dense(len(self.atoms_MD)).cpu().numpy()

    def inverse_transform(self, codes: Any) -> Array:
        """Samples from dense codes, (N, D) float32."""
        codes_NM = np.asarray(codes, dtype=np.float32)
        if codes_NM.ndim != 2 or codes_NM.shape[1] != len(self.atoms_MD):
            what = "DoubleBatchKSVD.inverse_transform: codes do not fit"
            raise ShapeError(what, got=str(codes_NM.shape), limit=f"(N, {len(self.atoms_MD)})")
        return codes_NM @ self.components_ + self.mean_

    def score(self, samples: Any, y: Any = None) -> float:
        """Minus the FVU in raw units, Σ‖x − x̂‖² / Σ‖x − x̄‖², so that larger is better."""
        x_ND = self._array(samples)
        rebuilt_ND = self.decode(self.encode(x_ND))
        x_ND = x_ND.to(rebuilt_ND.device)
        error, variance = ((x_ND - other).double().square().sum() for other in (rebuilt_ND, x_ND.mean(dim=0)))
        return -float(error / variance)

    def _array(self, samples: Any) -> Tensor:
        source = as_source(samples)
        if not isinstance(source, TensorSource):
            raise ShapeError(f"{type(self).__name__}: not an array of samples", got=type(samples).__name__)
        x_ND = source.samples_ND
        if hasattr(self, "n_features_in_") and x_ND.shape[1] != self.n_features_in_:
            # scikit-learn's words, which its checks look for.
            expected = f"{type(self).__name__} is expecting {self.n_features_in_} features as input"
            what = f"X has {x_ND.shape[1]} features, but {expected}"
            raise ShapeError(what, cause="activations of another model or hook")
        return x_ND

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "n_features_in_")

    def __sklearn_tags__(self) -> Any:
        """Only scikit-learn calls this, so it is loaded; here it is no dependency."""
        utils = sys.modules["sklearn.utils"]
        return utils.Tags(
            estimator_type=None,
            target_tags=utils.TargetTags(required=False),
            transformer_tags=utils.TransformerTags(preserves_dtype=["float32"]),
        )
