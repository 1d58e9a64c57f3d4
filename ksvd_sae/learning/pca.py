"""Covariances and principal components from a stream of batches."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ksvd_sae.errors import ShapeError
from ksvd_sae.learning.checks import check_samples


def covariance(batches: Iterable[Tensor], centre_D: Tensor) -> Tensor:
    """(D, D) mean of (x − centre)ᵀ(x − centre), float64 on the CPU; products where the batches are.

    Args: as of ``principal_components``. Raises: ShapeError (no samples), ActivationError (NaN or infinity).
    """
    scatter_DD, n = _scatter(batches, centre_D, "covariance")
    return scatter_DD / n


def principal_components(batches: Iterable[Tensor], k: int, centre_D: Tensor) -> Tensor:
    """The k leading principal components, (k, D) orthonormal float32 rows.

    Exact, from the covariance summed in float64; memory D² whatever the number of samples.

    Args:
        batches: (B, D) tensors of raw activations.
        k: components, at most D.
        centre_D: the mean to subtract.
    Raises: ShapeError (k above D, no samples), ActivationError (NaN or infinity).
    """
    d_in = len(centre_D)
    if not 1 <= k <= d_in:
        raise ShapeError("principal_components: k must be between 1 and d_in", got=f"k = {k}", limit=f"1 to {d_in}")
    scatter_DD, _ = _scatter(batches, centre_D, "principal_components")
    vectors_DD = torch.linalg.eigh(scatter_DD).eigenvectors
    return vectors_DD[:, -k:].flip(1).T.contiguous().float()


@torch.no_grad()
def _scatter(batches: Iterable[Tensor], centre_D: Tensor, where: str) -> tuple[Tensor, int]:
    """Σ (x − centre)ᵀ(x − centre), and of how many samples."""
    d_in, n = len(centre_D), 0
    scatter_DD = torch.zeros(d_in, d_in, dtype=torch.float64, device="cpu")
    for batch_BD in batches:
        if batch_BD.ndim != 2 or batch_BD.shape[1] != d_in:
            raise ShapeError(
                f"{where}: a batch does not fit the centre", got=str(tuple(batch_BD.shape)), limit=f"(B, {d_in})"
            )
        check_samples(batch_BD, where)
        centred_BD = batch_BD.double() - centre_D.to(batch_BD.device).double()
        scatter_DD += (centred_BD.T @ centred_BD).cpu()
        n += len(batch_BD)
    if n == 0:
        raise ShapeError(f"{where}: no samples")
    return scatter_DD, n
