"""Codes of held-out images, some images at a time.

Notation: I images, P patches of each, F latents, D dimensions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ksvd_sae.activations.vision.heldout import HeldoutImages

_CODE_BYTES = 64 << 20


@dataclass(frozen=True)
class CodedImages:
    """Some images. x_IPD: raw activations. code_IPF: their codes. present_IP: whether the harvest has a patch; where it
    was left out, both are zero."""

    x_IPD: Tensor
    code_IPF: Tensor
    present_IP: Tensor


@torch.no_grad()
def coded_images(sae: Any, images: HeldoutImages) -> Iterator[CodedImages]:
    """The held-out images in their order, on the SAE's device."""
    d_sae, device, dtype = len(sae.W_dec), sae.W_dec.device, sae.W_dec.dtype
    at_once = max(1, _CODE_BYTES // (4 * d_sae * images.grid.patches))
    for x_IPD, present_IP in images.batches(at_once):
        x_IPD, present_IP = x_IPD.to(device, dtype), present_IP.to(device)
        code_IPF = x_IPD.new_zeros(*present_IP.shape, d_sae)
        code_IPF[present_IP] = sae.encode(x_IPD[present_IP]).detach()
        yield CodedImages(x_IPD, code_IPF, present_IP)


def largest_codes(sae: Any, images: HeldoutImages) -> Tensor:
    """(I, F): the largest code of each latent over an image's patches, in units of ``scale``."""
    scale = images.shards.statistics.scale
    return torch.cat([coded.code_IPF.amax(dim=1).float().cpu() / scale for coded in coded_images(sae, images)])
