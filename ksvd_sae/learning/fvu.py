"""FVU, the fraction of variance unexplained: Σ‖x − x̂‖² / Σ‖x − x̄‖² over all samples and dimensions.

The one definition behind logs, scores, tables and benchmarks. x̄ is the mean of all samples seen, so how a stream is cut
into batches changes nothing. Sums are in float64; the variance is Σx² − (Σx)²/n.
"""

import torch
from torch import Tensor

from ksvd_sae.errors import ConstantSamplesError, ShapeError
from ksvd_sae.ranks import ALONE, Ranks

# Rows taken to float64 at a time where all samples are there at once: they stay in a CPU's cache, and keep a GPU busy.
_ROWS = {"cpu": 1024, "cuda": 16_384}
# Samples that differ by rounding in float32 alone have a variance of some 1e-14 of their energy.
_NO_VARIANCE = 1e-12


class Variance:
    """Σ‖x − x̄‖² of a stream of (B, D) batches on one device."""

    def __init__(self) -> None:
        self.n_samples = 0
        self._sum_D: Tensor | float = 0.0
        self._squares_D: Tensor | float = 0.0

    @torch.no_grad()
    def add(self, x_BD: Tensor) -> None:
        x_BD = x_BD.double()
        self.n_samples += len(x_BD)
        self._sum_D = self._sum_D + x_BD.sum(dim=0)
        self._squares_D = self._squares_D + x_BD.square().sum(dim=0)

    def total(self, where: str, ranks: Ranks = ALONE) -> float:
        """Of the samples so far, of all processes if there are several.

        Args: where: the operation, for the error.
        Raises: ConstantSamplesError if there is none: no samples, or all of them the same.
        """
        sum_D, squares_D = (
            sums if isinstance(sums, Tensor) else torch.zeros(1, dtype=torch.float64, device="cpu")
            for sums in (self._sum_D, self._squares_D)
        )
        sum_D, squares_D = ranks.total(torch.stack([sum_D, squares_D]))
        n_samples = ranks.count(self.n_samples, sum_D.device)
        variance = float((squares_D - sum_D.square() / max(1, n_samples)).sum())
        # Not (… ≤ …): NaN must fail too.
        if not variance > _NO_VARIANCE * float(squares_D.sum()):
            raise ConstantSamplesError(
                f"{where}: all samples given are the same: there is no variance to explain",
                got=f"{n_samples} samples",
                cause="a hook that gives constants, padding tokens, or a single sample",
                cure="check the hook name and the text; give more samples",
            )
        return variance


class FVU:
    """The FVU of a stream: ``add`` each batch beside its reconstruction, then ask for the ``value``."""

    def __init__(self) -> None:
        self._variance = Variance()
        self._error: Tensor | float = 0.0

    @property
    def n_samples(self) -> int:
        return self._variance.n_samples

    @torch.no_grad()
    def add(self, x_BD: Tensor, rebuilt_BD: Tensor) -> None:
        """Count a batch; the reconstruction may be on another device.

        Raises: ShapeError if it is not of the batch's shape.
        """
        if x_BD.shape != rebuilt_BD.shape:
            got = f"{tuple(x_BD.shape)} and {tuple(rebuilt_BD.shape)}"
            raise ShapeError("FVU: samples and their reconstruction differ in shape", got=got)
        x_BD = x_BD.double()
        self._error = self._error + (x_BD - rebuilt_BD.to(x_BD.device).double()).square().sum()
        self._variance.add(x_BD)

    def add_rows(self, x_ND: Tensor, rebuilt_ND: Tensor) -> None:
        """Count many samples, some at a time."""
        for x_BD, rebuilt_BD in zip(torch.split(x_ND, _rows(x_ND)), torch.split(rebuilt_ND, _rows(x_ND)), strict=True):
            self.add(x_BD, rebuilt_BD)

    def value(self, where: str) -> float:
        """Of the samples so far; arguments and errors as ``Variance.total``."""
        return float(self._error) / self._variance.total(where)


def variance(x_ND: Tensor, where: str, ranks: Ranks = ALONE) -> float:
    """Σ‖x − x̄‖² of samples that are all there; arguments and errors as ``Variance.total``."""
    stream = Variance()
    for x_BD in torch.split(x_ND, _rows(x_ND)):
        stream.add(x_BD)
    return stream.total(where, ranks)


def fvu(x_ND: Tensor, rebuilt_ND: Tensor, where: str) -> float:
    """The FVU of samples that are all there; arguments and errors as ``Variance.total``."""
    stream = FVU()
    stream.add_rows(x_ND, rebuilt_ND)
    return stream.value(where)


def _rows(x_ND: Tensor) -> int:
    return _ROWS.get(x_ND.device.type, _ROWS["cpu"])
