"""The metric that a dictionary is learned in: a linear map of the centred activations, undone on the way back.

K-SVD minimises ‖x − x̂‖². What the model's loss sees of an error e = x − x̂ is, to second order, eᵀ F e with
F = mean g gᵀ, g = gradient of the loss with respect to the activation (the Fisher or Gauss–Newton approximation of
the Hessian). Both are one method: with W Wᵀ = F and y = x·W, ‖y − ŷ‖² = (x − x̂) F (x − x̂)ᵀ, so learning and coding
run unchanged on y, and x̂ = ŷ·W⁻¹.

====================  ===========================================================  ==================================
kind                  W                                                            needs
====================  ===========================================================  ==================================
``std``               diagonal, (variance + ridge·mean variance)^(−power/2)        variances (every harvest has them)
``whiten``            (C + ridge·mean(eigenvalues)·1)^(−power/2), symmetric        the covariance C of the samples
``fisher_diag``       diagonal, (F_ii + ridge·mean F_ii)^½                         gradient moments
``fisher``            symmetric square root of F + ridge·mean(eigenvalues)·1       gradient moments
====================  ===========================================================  ==================================

``std`` with power 1 makes all dimensions equally loud, with power 0 changes nothing; ½ lies between. ``whiten`` does so
with the principal components: with power 1 it is PCA whitening (arXiv 2511.13981), rotated back to where it came from.
The maps are scaled to mean(W²) = 1, ‖W‖² / D of a full one: greedy coding does not see a scale, but tolerances and logs
do.

Which is best depends on the layer: on Gemma-3-270M, layer 9, ``fisher_diag`` takes the nats that reconstructions cost
from 0.480 to 0.285 and ``std`` with power ½ to 0.344; on layer 13 ``std`` is ahead (docs/weighting.md).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ksvd_sae.errors import ShapeError, WeightingError
from ksvd_sae.learning.products import products

WeightingKind = Literal["none", "std", "whiten", "fisher_diag", "fisher"]
WEIGHTING_KINDS: tuple[WeightingKind, ...] = ("none", "std", "whiten", "fisher_diag", "fisher")
DEFAULT_POWER = {"std": 0.5, "whiten": 1.0}
# Of 'whiten': a tenth of the least eigenvalue of Gemma-3-270M's activations, 1e-3 of their mean; it bounds the inverse.
DEFAULT_RIDGE = {"std": 1e-6, "whiten": 1e-4, "fisher_diag": 0.1, "fisher": 0.1}


@dataclass(frozen=True)
class Weighting:
    """An invertible map of activation space: ``apply`` before learning and coding, ``undo`` after decoding.

    Attributes:
        matrix: (D,) for a diagonal map, (D, D) symmetric for a full one; float32.
        inverse: of the same shape; kept beside it so that a saved map comes back bit for bit.
    """

    matrix: Tensor
    inverse: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.matrix.shape)
        if self.matrix.shape != self.inverse.shape or len(shape) not in (1, 2) or len(set(shape)) != 1:
            raise ShapeError(
                "Weighting: matrix and inverse do not fit",
                got=f"{shape} and {tuple(self.inverse.shape)}",
                limit="(D,) and (D,), or (D, D) and (D, D)",
            )
        if not bool(torch.isfinite(self.matrix).all() and torch.isfinite(self.inverse).all()):
            raise WeightingError(
                "Weighting: the map or its inverse is not finite",
                cause="dimensions without variance or gradient, and no ridge",
                cure="a larger ridge",
            )

    @property
    def d_in(self) -> int:
        return self.matrix.shape[0]

    @property
    def is_diagonal(self) -> bool:
        return self.matrix.ndim == 1

    def to(self, device: torch.device | str) -> "Weighting":
        return Weighting(self.matrix.to(device), self.inverse.to(device))

    def apply(self, x_BD: Tensor) -> Tensor:
        """Centred raw rows to weighted ones."""
        return _map(x_BD, self.matrix)

    def undo(self, y_BD: Tensor) -> Tensor:
        """Weighted rows to centred raw ones."""
        return _map(y_BD, self.inverse)


def _map(rows_BD: Tensor, matrix: Tensor) -> Tensor:
    matrix = matrix.to(rows_BD.device, rows_BD.dtype)
    return rows_BD * matrix if matrix.ndim == 1 else products(rows_BD, matrix.T)


def make_weighting(
    kind: WeightingKind,
    *,
    variance_D: Tensor | None = None,
    covariance_DD: Tensor | None = None,
    outer_DD: Tensor | None = None,
    power: float | None = None,
    ridge: float | None = None,
) -> Weighting | None:
    """The weighting of that name from the moments that it needs; None for 'none'.

    Args: variance_D for 'std'; covariance_DD for 'whiten'; outer_DD (mean g gᵀ) for the Fisher kinds; power for 'std'
        and 'whiten'; power, ridge: None takes ``DEFAULT_POWER`` and ``DEFAULT_RIDGE``.
    Raises: WeightingError if the moments are not given; else as the functions below.
    """
    if kind == "none":
        return None
    ridge = DEFAULT_RIDGE[kind] if ridge is None else ridge
    power = DEFAULT_POWER.get(kind, 1.0) if power is None else power
    if kind == "std" and variance_D is not None:
        return weighting_by_std(variance_D, power, ridge)
    if kind == "whiten" and covariance_DD is not None:
        return weighting_by_whitening(covariance_DD, power, ridge)
    if kind == "fisher_diag" and outer_DD is not None:
        return weighting_by_fisher_diagonal(outer_DD.diagonal(), ridge)
    if kind == "fisher" and outer_DD is not None:
        return weighting_by_fisher(outer_DD, ridge)
    raise WeightingError(
        f"weighting {kind!r}: the moments that it needs are not there",
        limit=", ".join(WEIGHTING_KINDS) if kind not in WEIGHTING_KINDS else None,
        cure="give the variances for 'std', the covariance for 'whiten'; collect gradients (harvest.gradient_tokens) "
        "for 'fisher_diag' and 'fisher'",
    )


def weighting_by_std(variance_D: Tensor, power: float = 0.5, ridge: float = DEFAULT_RIDGE["std"]) -> Weighting:
    """Each dimension divided by its standard deviation to the power ``power``.

    Args:
        variance_D: variance of each raw dimension.
        ridge: added to the variances as a fraction of their mean, so that a silent dimension is not blown up.
    Raises: WeightingError (no variance, negative or not finite).
    """
    variance_D = _checked(variance_D.double(), "weighting_by_std")
    _check_range(power, ridge, "weighting_by_std")
    return _diagonal((variance_D + ridge * variance_D.mean()) ** (-power / 2), "weighting_by_std")


def weighting_by_fisher_diagonal(square_D: Tensor, ridge: float = DEFAULT_RIDGE["fisher_diag"]) -> Weighting:
    """Each dimension by the root mean square of the loss's gradient along it.

    Args: square_D: mean g², raw units.  ridge: added as a fraction of its mean.
    Raises: WeightingError (no gradient, negative or not finite).
    """
    square_D = _checked(square_D.double(), "weighting_by_fisher_diagonal")
    return _diagonal((square_D + ridge * square_D.mean()) ** 0.5, "weighting_by_fisher_diagonal")


def weighting_by_whitening(
    covariance_DD: Tensor, power: float = DEFAULT_POWER["whiten"], ridge: float = DEFAULT_RIDGE["whiten"]
) -> Weighting:
    """Each principal component divided by its standard deviation to the power ``power``; nothing is rotated.

    Args: covariance_DD: of raw samples.  ridge: added to the eigenvalues as a fraction of their mean, so that a silent
        component is not blown up.
    Raises: ShapeError, WeightingError (not finite, no variance, singular with ridge 0, out of range).
    """
    where = "weighting_by_whitening"
    _check_range(power, ridge, where)
    eigenvalues_D, vectors_DD = _eigen(covariance_DD, ridge, where, "fewer samples than dimensions", "more samples")
    weight_D = eigenvalues_D ** (-power / 2)
    return _along(vectors_DD, weight_D / weight_D.square().mean().sqrt())


def weighting_by_fisher(outer_DD: Tensor, ridge: float = DEFAULT_RIDGE["fisher"]) -> Weighting:
    """The symmetric square root of mean g gᵀ, in float64 from its eigenvectors.

    Args: outer_DD: mean g gᵀ, raw units.  ridge: added to the eigenvalues as a fraction of their mean; without it the
        directions that the sampled loss does not see would be free to be anything.
    Raises: ShapeError, WeightingError (not finite, no gradient, singular with ridge 0).
    """
    cause, cure = "fewer gradient tokens than dimensions", "a larger harvest.gradient_tokens"
    eigenvalues_D, vectors_DD = _eigen(outer_DD, ridge, "weighting_by_fisher", cause, cure)
    return _along(vectors_DD, (eigenvalues_D / eigenvalues_D.mean()).sqrt())


def _along(vectors_DD: Tensor, weight_D: Tensor) -> Weighting:
    """The symmetric map that multiplies each eigenvector, a column, by its weight."""
    return Weighting(
        ((vectors_DD * weight_D) @ vectors_DD.T).float().contiguous(),
        ((vectors_DD / weight_D) @ vectors_DD.T).float().contiguous(),
    )


def _eigen(moments_DD: Tensor, ridge: float, where: str, cause: str, cure: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues with the ridge, and eigenvectors as columns; cause and cure where they are singular."""
    if moments_DD.ndim != 2 or moments_DD.shape[0] != moments_DD.shape[1]:
        raise ShapeError(f"{where}: moments must be square", got=str(tuple(moments_DD.shape)), limit="(D, D)")
    moments_DD = (moments_DD.double() + moments_DD.double().T) / 2
    _checked(moments_DD.diagonal(), where)
    eigenvalues_D, vectors_DD = torch.linalg.eigh(moments_DD)
    eigenvalues_D = eigenvalues_D.clamp(min=0)
    eigenvalues_D = eigenvalues_D + ridge * eigenvalues_D.mean()
    # Eigenvalues below the rounding of the largest are noise: their inverse would be too.
    if not float(eigenvalues_D.min()) > 1e-12 * float(eigenvalues_D.max()):
        raise WeightingError(
            f"{where}: the moments do not span all dimensions",
            got=f"eigenvalues from {float(eigenvalues_D.min()):.3g} to {float(eigenvalues_D.max()):.3g}",
            cause=f"{cause}, and no ridge",
            cure=f"a ridge above 0, or {cure}",
        )
    return eigenvalues_D, vectors_DD


def _check_range(power: float, ridge: float, where: str) -> None:
    if not 0 < power <= 2 or ridge < 0:
        got = f"power={power}, ridge={ridge}"
        raise WeightingError(f"{where}: out of range", got=got, limit="0 < power ≤ 2, ridge ≥ 0")


def _checked(square_D: Tensor, where: str) -> Tensor:
    if not bool(torch.isfinite(square_D).all() and (square_D >= 0).all()) or not float(square_D.sum()) > 0:
        raise WeightingError(
            f"{where}: second moments must be finite, not negative and not all zero",
            got=f"minimum {float(square_D.min()):.3g}, sum {float(square_D.sum()):.3g}",
            cause="constant activations, or a loss that does not depend on the hook",
            cure="check the hook; harvest again",
        )
    return square_D


def _diagonal(weight_D: Tensor, where: str) -> Weighting:
    if not bool(torch.isfinite(weight_D).all() and (weight_D > 0).all()):
        raise WeightingError(
            f"{where}: {int((~torch.isfinite(weight_D) | (weight_D <= 0)).sum())} of {len(weight_D)} dimensions have "
            "no finite positive weight",
            cause="dimensions without variance or gradient, and no ridge",
            cure="a ridge above 0",
        )
    weight_D = weight_D / weight_D.square().mean().sqrt()
    return Weighting(weight_D.float(), (1 / weight_D).float())
