"""Moran's I of latents over the grid of patches (Moran 1950), as ViSAEBench 0.1's FeatureLocalization has it.

I = (P / S) · Σ_pq w_pq c_p c_q / Σ_p c_p² for the centred code c of a latent on an image, where w_pq is 1 for the eight
patches around a patch, P is the number of patches and S the sum of w. Differs: exactly the first ``max_images`` of a
latent count; and no score, not 0, where no latent has enough images.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ksvd_sae.evals.base import Heldout, Measured
from ksvd_sae.evals.vision.codes import coded_images

if TYPE_CHECKING:
    from ksvd_sae.evals.vision import SpatialEval

# Latents below it are scattered.
SCATTERED = 0.1


def localization(config: "SpatialEval", sae: Any, heldout: Heldout) -> Measured:
    """See ``SpatialEval``."""
    grid = heldout.images.grid
    most = int(config.max_active_fraction * grid.patches)
    sum_F = torch.zeros(len(sae.W_dec), dtype=torch.float64)
    n_F = torch.zeros(len(sae.W_dec), dtype=torch.int64)
    for coded in coded_images(sae, heldout.images):
        active_IF = (coded.code_IPF != 0).sum(dim=1)
        i_IF, varies_IF = morans_i(coded.code_IPF, grid.rows, grid.columns)
        valid_IF = (active_IF >= config.min_active_patches) & (active_IF <= most) & varies_IF
        # The first so many images of a latent, in their order.
        valid_IF &= valid_IF.cumsum(dim=0) + n_F.to(valid_IF.device) <= config.max_images
        sum_F += torch.where(valid_IF, i_IF, 0).double().sum(dim=0).cpu()
        n_F += valid_IF.sum(dim=0).cpu()
    able = (n_F >= config.min_images).nonzero().flatten().numpy()
    if len(able) > config.max_latents:
        able = np.sort(np.random.RandomState(config.seed).choice(able, size=config.max_latents, replace=False))
    i_A = (sum_F[able] / n_F[able]).numpy()
    nothing = float("nan")
    scores = {
        "morans_i": float(i_A.mean()) if len(i_A) else nothing,
        "scattered_fraction": float((i_A < SCATTERED).mean()) if len(i_A) else nothing,
        "scored_fraction": float((n_F >= config.min_images).double().mean()),
    }
    of_latents: list[JsonValue] = [[int(latent), round(float(i), 6)] for latent, i in zip(able, i_A, strict=True)]
    return Measured(scores, len(i_A), {"morans_i_of_latents": of_latents})


def morans_i(code_IPF: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """(I, F): Moran's I of each latent on each image, and whether its code varies there at all."""
    centred_IPF = code_IPF - code_IPF.mean(dim=1, keepdim=True)
    plane = centred_IPF.transpose(1, 2).reshape(len(code_IPF), -1, rows, columns)
    # The sum over three by three, without the patch itself; no neighbours beyond the edge.
    around = avg_pool2d(plane, 3, stride=1, padding=1, divisor_override=1) - plane
    n_pairs = 2 * (rows * (columns - 1) + columns * (rows - 1) + 2 * (rows - 1) * (columns - 1))
    squares_IF = plane.square().sum(dim=(2, 3))
    i_IF = rows * columns / n_pairs * (plane * around).sum(dim=(2, 3)) / squares_IF.clamp(min=1e-10)
    return i_IF, squares_IF > 1e-10
