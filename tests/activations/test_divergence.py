"""The divergence of a spliced run, and its gradient: what plain autograd gives in float64, parameters and all."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from ksvd_sae.activations import divergence
from ksvd_sae.activations.divergence import SplicedDivergence
from ksvd_sae.activations.language import ActivationReader
from ksvd_sae.errors import ActivationError, HookError, ShapeError
from tests.strategies import generator
from tests.tiny_models import hooked_gemma_2
from tests.tiny_saes import HOOK, tiny_model
from tests.tolerances import GRADIENT

BOS, LENGTH = 2, 10
HOOKS = [HOOK, "blocks.1.hook_resid_pre", "blocks.0.attn.hook_z", "blocks.1.mlp.hook_post", "hook_embed"]


def tokens(n_contexts: int = 3, seed: int = 0) -> Tensor:
    """A BOS at the beginning of each context, and another inside the first."""
    tokens_BL = torch.randint(4, 20, (n_contexts, LENGTH), generator=generator(seed))
    tokens_BL[:, 0] = BOS
    tokens_BL[0, 5] = BOS
    return tokens_BL


def in_float64(model: HookedTransformer) -> HookedTransformer:
    model.cfg.dtype = torch.float64
    return model.double().requires_grad_(True)


def plain(model: Any, hook: str, tokens_BL: Tensor, replaced_BL: Tensor, rebuilt_ND: Tensor) -> tuple[float, Tensor]:
    """Mean KL by TransformerLens' own logits of two whole runs, and its gradient."""
    leaf_ND = rebuilt_ND.clone().requires_grad_()

    def splice(activation: Tensor, hook: Any) -> Tensor:
        flat_BLD = activation.flatten(2)
        spliced_BLD = torch.where(
            replaced_BL[:, :, None],
            flat_BLD.new_zeros(flat_BLD.shape).masked_scatter(replaced_BL[:, :, None], leaf_ND),
            flat_BLD,
        )
        return spliced_BLD.reshape(activation.shape)

    log_p_BLV = model(tokens_BL).log_softmax(dim=-1)
    with model.hooks(fwd_hooks=[(hook, splice)]):
        log_q_BLV = model(tokens_BL).log_softmax(dim=-1)
    kl_BL = (log_p_BLV.exp() * (log_p_BLV - log_q_BLV)).sum(dim=-1)
    mean = kl_BL[:, :-1][tokens_BL[:, 1:] != BOS].mean()
    (gradient_ND,) = torch.autograd.grad(mean, leaf_ND)
    return float(mean.detach()), gradient_ND


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("capped", [False, True])
def test_is_plain_autograds(hook: str, capped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with logits softly capped, chunks of two rows, and an outlier that stays as it is."""
    model = in_float64(tiny_model())
    if capped:
        model.cfg.output_logits_soft_cap = 3.0
    monkeypatch.setattr(divergence, "GRADIENT_LOGITS_AT_ONCE", 2 * model.cfg.d_vocab_out)
    reader, tokens_BL = ActivationReader(model, hook), tokens()
    norms_N = torch.linalg.vector_norm(SplicedDivergence(reader, None).clean(tokens_BL).x_ND, dim=1)
    limit = float(norms_N.sort().values[-2:].mean())
    spliced = SplicedDivergence(reader, limit)
    clean = spliced.clean(tokens_BL)
    assert len(clean.x_ND) < len(norms_N) == int((tokens_BL != BOS).sum())
    assert len(clean.clean_PD) == int((tokens_BL[:, 1:] != BOS).sum())
    noise_ND = torch.randn(clean.x_ND.shape, generator=generator(1), dtype=torch.float64)
    rebuilt_ND = clean.x_ND + noise_ND
    kl, gradient_ND = spliced.gradient(clean, rebuilt_ND)
    wanted, wanted_ND = plain(model, hook, tokens_BL, clean.replaced_BL, rebuilt_ND)
    assert kl == pytest.approx(wanted, rel=GRADIENT[torch.float64])
    assert kl > 0.01
    assert float((gradient_ND - wanted_ND).abs().max()) <= 10 * GRADIENT[torch.float64] * float(wanted_ND.abs().max())


def test_leaves_the_model_as_it_was() -> None:
    model = tiny_model().requires_grad_(True)
    spliced = SplicedDivergence(ActivationReader(model, HOOK), None)
    clean = spliced.clean(tokens())
    kl, gradient_ND = spliced.gradient(clean, clean.x_ND)
    assert abs(kl) < 1e-6
    assert float(gradient_ND.abs().max()) < 1e-6
    assert all(weights.requires_grad and weights.grad is None for weights in model.parameters())
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_refused() -> None:
    model = tiny_model()
    spliced = SplicedDivergence(ActivationReader(model, HOOK), None)
    with pytest.raises(ShapeError, match="divergence: tokens must be contexts"):
        spliced.clean(tokens()[:, :1])
    with pytest.raises(HookError, match="one row a token"):
        SplicedDivergence(ActivationReader(model, "blocks.0.attn.hook_pattern"), None).clean(tokens())
    with torch.no_grad():
        model.W_E[7] = float("nan")
    with pytest.raises(ActivationError, match="NaN or infinity"):
        spliced.clean(torch.full((1, LENGTH), 7))


def test_groups_of_queries_and_caps() -> None:
    """Gemma-2's kind of model, which has caps of its own."""
    from tests.tiny_saes import tiny_tokenizer

    model = hooked_gemma_2(tiny_tokenizer(), torch.float64)
    spliced = SplicedDivergence(ActivationReader(model, "blocks.1.hook_resid_post"), None)
    tokens_BL = tokens()
    clean = spliced.clean(tokens_BL)
    rebuilt_ND = 0.8 * clean.x_ND
    kl, gradient_ND = spliced.gradient(clean, rebuilt_ND)
    wanted, wanted_ND = plain(model, "blocks.1.hook_resid_post", tokens_BL, clean.replaced_BL, rebuilt_ND)
    assert kl == pytest.approx(wanted, rel=1e-9)
    assert float((gradient_ND - wanted_ND).abs().max()) <= 10 * GRADIENT[torch.float64] * float(wanted_ND.abs().max())
