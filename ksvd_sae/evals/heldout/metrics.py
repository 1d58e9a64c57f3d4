"""Own metrics on held-out activations, the same code for every SAE and dictionary."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ksvd_sae.errors import ShapeError
from ksvd_sae.learning.fvu import FVU
from ksvd_sae.learning.noise import SizeHistogram

_BATCH_BYTES = 64 << 20


@dataclass(frozen=True)
class HeldoutMetrics:
    """What a dictionary does on activations it has not seen.

    Attributes:
        scores: fvu = Σ‖y − ŷ‖² / Σ‖y − ȳ‖² over all tokens and dimensions; l0 = mean nonzero latents a token;
            dead_fraction = latents that no token used, of all d_sae; density_over_1_percent / _10_percent = fraction of
            latents that more than 1 % / 10 % of the tokens use; noise_gap = size of latents between noise and features,
            as a share of the token's about b_dec (learning/noise.py), NaN where sizes show none; coherence_max,
            coherence_mean_max = largest, and mean over atoms of the largest, |cosine| between an atom and another. In
            the split view of a signed dictionary each sign of an atom is a latent by itself, but no other atom.
        density_F: fraction of tokens that use each latent, either sign.
        n_tokens: tokens seen.
        error_I, variance_I: fvu's two sums, item by item; None where there are none.
    """

    scores: dict[str, float]
    density_F: Tensor
    n_tokens: int
    error_I: Tensor | None = None
    variance_I: Tensor | None = None


@torch.no_grad()
def heldout_metrics(sae: Any, batches: Iterator[Tensor], item_N: Tensor | None = None) -> HeldoutMetrics:
    """Measure a SAELens SAE on raw activations.

    Args:
        sae: anything with ``encode``, ``decode``, ``b_dec`` and ``W_dec`` (d_sae, d_in); coherence is of its
            ``atoms_MD`` if it has any, else of W_dec.
        batches: (B, d_in) tensors.
        item_N: which item each token is of, all tokens of the batches in a row; None: none.
    Raises: ShapeError (d_in does not match, no tokens), ActivationError (no variance).
    """
    d_sae, d_in = sae.W_dec.shape
    device, dtype = sae.W_dec.device, sae.W_dec.dtype
    step = max(1, _BATCH_BYTES // (4 * d_sae))
    sizes_F = torch.linalg.vector_norm(sae.W_dec.detach(), dim=1)
    histogram = SizeHistogram()
    fvu, fired_F = FVU(), torch.zeros(d_sae, dtype=torch.int64)
    by_item = None if item_N is None else _ByItem(item_N, d_in)
    for batch_BD in batches:
        if batch_BD.shape[1] != d_in:
            raise ShapeError(
                "heldout_metrics: the dictionary does not fit the activations",
                got=f"d_in = {d_in}",
                limit=f"activations of {batch_BD.shape[1]} dimensions",
                cause="a dictionary of another model or hook",
            )
        for start in range(0, len(batch_BD), step):
            y_BD = batch_BD[start : start + step]
            code_BF = sae.encode(y_BD.to(device, dtype))
            rebuilt_BD = sae.decode(code_BF)
            fvu.add(y_BD.cpu(), rebuilt_BD)
            if by_item is not None:
                by_item.add(y_BD.cpu(), rebuilt_BD.cpu())
            fired_F += (code_BF != 0).sum(dim=0).cpu()
            rows, latents = code_BF.nonzero(as_tuple=True)
            norms_B = torch.linalg.vector_norm(y_BD.to(device, dtype) - sae.b_dec, dim=1)
            histogram.add(code_BF[rows, latents].abs() * sizes_F[latents] / norms_B[rows])
    if fvu.n_samples == 0:
        raise ShapeError("heldout_metrics: no tokens")
    density_F = fired_F.double() / fvu.n_samples
    scores = {
        "fvu": fvu.value("heldout_metrics"),
        "l0": float(density_F.sum()),
        "noise_gap": float("nan") if (gap := histogram.gap()) is None else gap,
        "dead_fraction": float((fired_F == 0).double().mean()),
        "density_over_1_percent": float((density_F > 0.01).double().mean()),
        "density_over_10_percent": float((density_F > 0.1).double().mean()),
        # A split dictionary's decoder holds every atom twice, with either sign: the cosine of the two says nothing.
        **coherence(getattr(sae, "atoms_MD", sae.W_dec).detach()),
    }
    sums = (None, None) if by_item is None else by_item.sums()
    return HeldoutMetrics(scores, density_F, fvu.n_samples, *sums)


class _ByItem:
    """Squared error, and variance about the mean of all, of each item (I)."""

    def __init__(self, item_N: Tensor, d_in: int):
        self._item_N, self._seen = item_N, 0
        n_items = int(item_N.max()) + 1
        self._n_I, self._error_I, self._squares_I = torch.zeros(3, n_items, dtype=torch.float64)
        self._sum_ID = torch.zeros(n_items, d_in, dtype=torch.float64)

    def add(self, y_BD: Tensor, rebuilt_BD: Tensor) -> None:
        item_B = self._item_N[self._seen : self._seen + len(y_BD)]
        self._seen += len(y_BD)
        y_BD = y_BD.double()
        self._n_I.index_add_(0, item_B, torch.ones(len(y_BD), dtype=torch.float64))
        self._error_I.index_add_(0, item_B, (y_BD - rebuilt_BD.double()).square().sum(dim=1))
        self._squares_I.index_add_(0, item_B, y_BD.square().sum(dim=1))
        self._sum_ID.index_add_(0, item_B, y_BD)

    def sums(self) -> tuple[Tensor, Tensor]:
        mean_D = self._sum_ID.sum(dim=0) / self._n_I.sum()
        about_mean_I = self._squares_I - 2 * self._sum_ID @ mean_D + self._n_I * mean_D.square().sum()
        return self._error_I, about_mean_I


def coherence(atoms_MD: Tensor) -> dict[str, float]:
    """Largest |cosine| of each atom with another: its maximum and mean over atoms; rows in blocks, never M × M."""
    unit_MD = torch.nn.functional.normalize(atoms_MD.float(), dim=1)
    if len(unit_MD) < 2:
        return {"coherence_max": 0.0, "coherence_mean_max": 0.0}
    largest = []
    for start in range(0, len(unit_MD), 1024):
        cosines = (unit_MD[start : start + 1024] @ unit_MD.T).abs()
        own = torch.arange(len(cosines), device=cosines.device)
        cosines[own, own + start] = -1
        largest.append(cosines.max(dim=1).values)
    largest_M = torch.cat(largest).double()
    return {"coherence_max": float(largest_M.max()), "coherence_mean_max": float(largest_M.mean())}
