"""How alike the images that a latent fires on most are to another model, as ViSAEBench 0.1 has it.

Source: Pach et al. 2025. A latent's score is Σ w_a w_b cos(e_a, e_b) / Σ w_a w_b over pairs of its top images, with w
its code on an image between its smallest (0) and largest (1), and e the mean of the image's patches in the other model.
"""

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ksvd_sae.activations.vision.model import ImageReader
from ksvd_sae.evals.base import EvalSetting, Heldout, Measured
from ksvd_sae.evals.vision.codes import largest_codes

if TYPE_CHECKING:
    from ksvd_sae.evals.vision import MonosemanticityEval

_BATCH = 32


def monosemanticity(config: "MonosemanticityEval", sae: Any, setting: EvalSetting, heldout: Heldout) -> Measured:
    """See ``MonosemanticityEval``."""
    code_IF = largest_codes(sae, heldout.images)
    embedding_IE = _embeddings(config, setting, heldout)
    live = (code_IF.amax(dim=0) > 0).nonzero().flatten().numpy()
    if len(live) > config.max_latents:
        live = np.sort(np.random.RandomState(config.seed).choice(live, size=config.max_latents, replace=False))
    scores = []
    for latent in live.tolist():
        score = similarity(code_IF[:, latent], embedding_IE, config.top_images)
        if score is not None:
            scores.append(score)
    mean = float(np.mean(scores)) if scores else float("nan")
    return Measured({"similarity": mean}, len(scores))


def similarity(code_I: Tensor, embedding_IE: Tensor, top: int) -> float | None:
    """Of one latent; None where only one image counts. Args: embedding_IE: unit rows."""
    values_T, images_T = code_I.topk(min(top, len(code_I)))
    lowest = code_I.min()
    weight_T = (values_T - lowest) / (code_I.max() - lowest).clamp(min=torch.finfo(code_I.dtype).tiny)
    cosine_TT = embedding_IE[images_T] @ embedding_IE[images_T].T
    weight_TT = (weight_T[:, None] * weight_T[None]).triu(diagonal=1)
    total = float(weight_TT.sum())
    return float((cosine_TT * weight_TT).sum()) / total if total > 0 else None


def _embeddings(config: "MonosemanticityEval", setting: EvalSetting, heldout: Heldout) -> Tensor:
    """Of every held-out image, in unit rows; made once for a panel."""
    kept, key = setting.between_calls, f"{config.name} {config.backbone} {heldout.harvest_hash}"
    if key not in kept:
        reader, images = ImageReader(config.backbone, torch.device(setting.device)), heldout.images
        means = []
        for first in range(0, images.n_images, _BATCH):
            some = images.pictures(range(first, min(first + _BATCH, images.n_images)))
            x_BTD = reader.read(reader.pixels(some))[:, reader.grid.others :]
            means.append(x_BTD.mean(dim=1).cpu())
        kept[key] = normalize(torch.cat(means), dim=1)
    return cast(Tensor, kept[key])
