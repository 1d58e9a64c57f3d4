"""What a harvest knows about its activations, summed in float64 as they stream by."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ksvd_sae.errors import ActivationError


@dataclass(frozen=True)
class Statistics:
    """Over all kept training tokens, raw units.

    Attributes:
        n_samples: tokens counted.
        centre_D: mean (float64).
        variance_D: variance of each dimension (float64, population).
        mean_norm, median_norm: of the raw activations; the median over all tokens, before outliers went.
    """

    n_samples: int
    centre_D: Tensor
    variance_D: Tensor
    mean_norm: float
    median_norm: float

    @property
    def scale(self) -> float:
        """√(mean ‖x − centre‖² / D): dividing by it makes the average dimension's variance 1."""
        return float(self.variance_D.mean().sqrt())


@dataclass(frozen=True)
class Moments:
    """Of some samples: how many, their mean, Σ(x − mean)² of each dimension, and the sum of their norms."""

    n: int
    mean_D: Tensor
    squares_D: Tensor
    norms: float

    @classmethod
    def of(cls, x_BD: Tensor) -> "Moments":
        x_BD = x_BD.double().cpu()
        mean_D = x_BD.mean(dim=0)
        squares_D = ((x_BD - mean_D) ** 2).sum(dim=0)
        return cls(len(x_BD), mean_D, squares_D, float(torch.linalg.vector_norm(x_BD, dim=1).sum()))

    def as_json(self) -> dict[str, Any]:
        """Every bit of it."""
        return {**vars(self), "mean_D": self.mean_D.tolist(), "squares_D": self.squares_D.tolist()}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Moments":
        tensors = {name: torch.tensor(found[name], dtype=torch.float64) for name in ("mean_D", "squares_D")}
        return cls(found["n"], norms=found["norms"], **tensors)


class RunningStatistics:
    """Means and variances of a stream; merging batches by Chan, Golub & LeVeque 1983."""

    def __init__(self, d_in: int):
        self.n = 0
        self._mean_D = torch.zeros(d_in, dtype=torch.float64)
        self._squares_D = torch.zeros(d_in, dtype=torch.float64)
        self._norms = 0.0

    def add(self, x_BD: Tensor) -> None:
        if len(x_BD):
            self.merge(Moments.of(x_BD))

    def merge(self, new: Moments) -> None:
        """What was summed elsewhere; sums depend on the order."""
        gap_D, total = new.mean_D - self._mean_D, self.n + new.n
        self._squares_D += new.squares_D + gap_D**2 * (self.n * new.n / total)
        self._mean_D += gap_D * (new.n / total)
        self._norms += new.norms
        self.n = total

    def result(self, median_norm: float) -> Statistics:
        if self.n == 0:
            raise ActivationError("statistics: no tokens left", cause="all tokens were special or outliers")
        return Statistics(self.n, self._mean_D.clone(), self._squares_D / self.n, self._norms / self.n, median_norm)


def row_norms(x_ND: Tensor) -> Tensor:
    """Of each row, (N,) float32; of rows whose squares float32 does not hold, too."""
    norms_N = torch.linalg.vector_norm(x_ND.float(), dim=1)
    odd_N = ~((norms_N > 0) & torch.isfinite(norms_N))
    norms_N[odd_N] = torch.linalg.vector_norm(x_ND[odd_N].double(), dim=1).float()
    return norms_N


def outlier_limit(norms_N: Tensor, factor: float | None) -> tuple[float, float]:
    """(median norm, the norm above which a token is an outlier): factor times the median, or infinity."""
    if len(norms_N) == 0:
        raise ActivationError("outlier filter: no tokens", cause="the text held only special tokens")
    median = float(norms_N.double().median())
    if not math.isfinite(median) or (factor is not None and median == 0 < float(norms_N.max())):
        raise ActivationError(
            "outlier filter: the median norm is no measure of what is large",
            got=median,
            cause="a hook that gives zeros for most tokens" if median == 0 else "overflow in the model",
            cure="harvest.outlier_factor: null keeps all tokens" if median == 0 else "another model.dtype or hook",
        )
    return median, float("inf") if factor is None else factor * median
