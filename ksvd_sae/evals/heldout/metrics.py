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
    """

    scores: dict[str, float]
    density_F: Tensor
    n_tokens: int


@torch.no_grad()
def heldout_metrics(sae: Any, batches: Iterator[Tensor]) -> HeldoutMetrics:
    """Measure a SAELens SAE on raw activations.

    Args:
        sae: anything with ``encode``, ``decode``, ``b_dec`` and ``W_dec`` (d_sae, d_in); coherence is of its
            ``atoms_MD`` if it has any, else of W_dec.
        batches: (B, d_in) tensors.
    Raises: ShapeError (d_in does not match, no tokens), ActivationError (no variance).
    """
    d_sae, d_in = sae.W_dec.shape
    device, dtype = sae.W_dec.device, sae.W_dec.dtype
    step = max(1, _BATCH_BYTES // (4 * d_sae))
    sizes_F = torch.linalg.vector_norm(sae.W_dec.detach(), dim=1)
    histogram = SizeHistogram()
    fvu, fired_F = FVU(), torch.zeros(d_sae, dtype=torch.int64)
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
            fvu.add(y_BD.cpu(), sae.decode(code_BF))
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
    return HeldoutMetrics(scores, density_F, fvu.n_samples)


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
