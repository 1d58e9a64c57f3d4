"""Which next tokens a direction of the residual stream speaks for: the logit lens."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ksvd_sae.activations.language import is_bridge
from ksvd_sae.activations.layers import LayerModel
from ksvd_sae.evals.atoms.token_texts import TokenTexts

if TYPE_CHECKING:
    from ksvd_sae.activations.language import AnyModel

# Tokens shown at either end.
SHOWN = 6
# Hooks whose activations are, or are added to, the residual stream.
_IN_THE_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "hook_embed")


@torch.no_grad()
def logit_lens(model: "AnyModel", hook: str, rows_AD: Tensor, texts: TokenTexts) -> list[dict[str, Any]] | None:
    """Tokens whose logits a direction raises and lowers most, strongest first; None for hooks outside the stream.

    The direction goes through what is linear in the final norm (LayerNorm's centring, the gain, not the division by
    the norm) and through the unembedding; ``raised_logits`` and ``lowered_logits`` are what it adds there. What the
    layers in between make of it is left out: from an early layer this says little. Special tokens are left out too.
    """
    # Of a model of layers alone the final norm is not known.
    inside = hook.endswith(_IN_THE_STREAM) and rows_AD.shape[1] == model.cfg.d_model
    if not inside or isinstance(model, LayerModel):
        return None
    rows_AD = rows_AD.to(model.W_U.device, model.W_U.dtype)
    if (model.cfg.normalization_type or "").startswith("LN"):
        rows_AD = rows_AD - rows_AD.mean(dim=1, keepdim=True)
    gain = getattr(getattr(model, "ln_final", None), "w", None)
    # transformers has what Gemma's gain is more than 1.
    if gain is not None and is_bridge(model) and model.cfg.rmsnorm_uses_offset:
        gain = 1 + gain
    logits_AV = (rows_AD if gain is None else rows_AD * gain) @ model.W_U
    special = torch.tensor(sorted(model.tokenizer.all_special_ids), device=logits_AV.device)
    special = special[special < logits_AV.shape[1]]
    tokens, logits = {}, {}
    for name, sign in (("raised", 1), ("lowered", -1)):
        signed_AV = sign * logits_AV
        signed_AV[:, special] = -torch.inf
        top = signed_AV.topk(min(SHOWN, logits_AV.shape[1] - len(special)), dim=1)
        tokens[name], logits[name] = top.indices.tolist(), (sign * top.values.float()).tolist()
    return [
        {name: texts.all(tokens[name][i]) for name in tokens}
        | {f"{name}_logits": [float(f"{value:.4g}") for value in logits[name][i]] for name in logits}
        for i in range(len(rows_AD))
    ]
