"""Trained SAEs in raw units: what training saw is folded into the weights, whatever map that was.

The trainer sees z = ((x − centre)·W)·s, and gives an SAE with codes f = act((z − b)·E + e) and rebuilt ẑ = f·D + b. The
same SAE of x has decoder rows D_j·W⁻¹/s. SAEBench wants them of unit norm; with n_j = ‖D_j·W⁻¹‖:

    W_dec_j = D_j·W⁻¹/n_j        W_enc = W·E·diag(n)        b_dec = b·W⁻¹/s + centre        b_enc = n·e/s

and codes, and thresholds where there are some, are n_j/s times the old ones: the same latents, the same reconstruction.
Only TopK compares latents with each other, and must do so in the old codes: ``WeightedTopKSAE`` divides by n_j first.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import SAE
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from torch import Tensor
from typing_extensions import override

from ksvd_sae._registration import register_sae
from ksvd_sae.learning.weighting import Weighting
from ksvd_sae.store import write_json

ARCHITECTURE = "topk_weighted"
# Without `import ksvd_sae` SAELens answers with KeyError('<this>').
ARCHITECTURE_ON_DISK = "topk_weighted (run `import ksvd_sae` first, from the package ksvd-sae)"


@dataclass
class WeightedTopKSAEConfig(TopKSAEConfig):
    """As TopKSAE's."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


class WeightedTopKSAE(TopKSAE):
    """A TopK SAE that ranks its latents by pre-activation times ``selection_scale`` (d_sae,), positive.

    It comes from training in other coordinates, where latents compare by what they contribute there.
    """

    cfg: WeightedTopKSAEConfig
    selection_scale: Tensor

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.register_buffer("selection_scale", torch.ones(self.cfg.d_sae, dtype=self.dtype, device=self.device))

    @override
    def encode(self, x: Tensor) -> Tensor:
        """(..., d_in) to codes (..., d_sae), at most k nonzero, none negative."""
        before = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        chosen = (before * self.selection_scale).topk(self.cfg.k, dim=-1, sorted=False).indices
        acts = torch.zeros_like(before).scatter(-1, chosen, before.gather(-1, chosen).relu())
        return self.hook_sae_acts_post(acts)

    @override
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        weights_path, cfg_path = super().save_model(path)
        config = json.loads(cfg_path.read_text())
        config["architecture"] = ARCHITECTURE_ON_DISK
        write_json(cfg_path, config)
        return weights_path, cfg_path


@dataclass(frozen=True)
class TrainedSpace:
    """The coordinates that a trainer sees: z = ((x − centre)·W)·scale.

    centre_D: float32.  weighting: None is W = 1.
    """

    centre_D: Tensor
    scale: float
    weighting: Weighting | None = None

    def apply(self, x_BD: Tensor) -> Tensor:
        """Raw rows to the trainer's."""
        centred_BD = x_BD - self.centre_D
        return (centred_BD if self.weighting is None else self.weighting.apply(centred_BD)) * self.scale

    def to(self, device: torch.device | str) -> "TrainedSpace":
        weighting = None if self.weighting is None else self.weighting.to(device)
        return TrainedSpace(self.centre_D.to(device), self.scale, weighting)


@torch.no_grad()
def to_raw_units(sae: Any, space: TrainedSpace) -> SAE[Any]:
    """The SAE of raw activations that does what ``sae`` does of ``space.apply``'s; unit decoder rows.

    Args: sae: a SAELens TopKSAE or JumpReLUSAE, on the CPU; changed in place or used up.
    Numerics: folded in float64.
    """
    space, weighting = space.to("cpu"), space.weighting
    b_dec_D = sae.b_dec.double()[None]
    if weighting is not None:
        sae.W_enc.data = (_rows_times(weighting.matrix, sae.W_enc.double())).to(sae.dtype).contiguous()
        b_dec_D = weighting.undo(b_dec_D)
    sae.b_dec.data = (b_dec_D[0] / space.scale + space.centre_D).to(sae.dtype)
    rows_MD = sae.W_dec.double() if weighting is None else weighting.undo(sae.W_dec.double())
    norms_M = rows_MD.norm(dim=1)
    is_topk = isinstance(sae, TopKSAE)
    if is_topk and weighting is None:
        # SAELens has given TopK unit rows already: then only the biases change.
        norms_M = torch.ones_like(norms_M)
    sae.W_dec.data = (rows_MD / norms_M[:, None]).to(sae.dtype)
    sae.W_enc.data = (sae.W_enc.double() * norms_M).to(sae.dtype)
    sae.b_enc.data = (sae.b_enc.double() * norms_M / space.scale).to(sae.dtype)
    if not is_topk:
        sae.threshold.data = (sae.threshold.double() * norms_M / space.scale).to(sae.dtype)
    return sae if weighting is None or not is_topk else weighted_topk(sae, norms_M)


def _rows_times(matrix: Tensor, w_enc_DM: Tensor) -> Tensor:
    matrix = matrix.double()
    return matrix[:, None] * w_enc_DM if matrix.ndim == 1 else matrix @ w_enc_DM


def weighted_topk(sae: TopKSAE, norms_M: Tensor) -> WeightedTopKSAE:
    known = {field.name: getattr(sae.cfg, field.name) for field in fields(WeightedTopKSAEConfig)}
    # The choice has a scale of its own, and rows of unit norm need none.
    weighted = WeightedTopKSAE(WeightedTopKSAEConfig(**{**known, "rescale_acts_by_decoder_norm": False}))
    weighted.load_state_dict({**sae.state_dict(), "selection_scale": (1 / norms_M).to(sae.dtype)})
    return weighted


register_sae(WeightedTopKSAE, WeightedTopKSAEConfig, ARCHITECTURE, ARCHITECTURE_ON_DISK)
