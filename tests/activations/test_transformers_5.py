"""Models whose parts transformers 5 has renamed are still found under the names that TransformerLens asks for."""

from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import nn
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_neox_weights
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from ksvd_sae.activations.transformers_5 import loadable, unembedding
from tests.upstream import still_raises

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 5}


def tiny_neox() -> Any:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)).eval()


def test_the_unembedding_is_found_under_either_name() -> None:
    for name in ("embed_out", "lm_head"):
        model = nn.Module()
        setattr(model, name, nn.Linear(2, 3))
        assert unembedding(model) is getattr(model, name)


def test_pythias_unembedding_makes_its_logits() -> None:
    """Whichever transformers is installed; a model may be loaded while an eval runs."""
    model, tokens = tiny_neox(), torch.tensor([[1, 2, 3]])
    with torch.no_grad(), loadable():
        with loadable():
            pass
        final = model.gpt_neox(tokens).last_hidden_state
        torch.testing.assert_close(model.embed_out(final), model(tokens).logits)


@pytest.mark.skipif(
    not version("transformer-lens").startswith("3.2."), reason="TransformerLens 3.9 asks for the new name as well"
)
def test_transformer_lens_asks_for_the_old_name() -> None:
    """Of a model as transformers 5 makes it; of 4's, the unembedding is put under its new name here."""
    model = tiny_neox()
    if not hasattr(model, "lm_head"):
        model.lm_head = model.embed_out
        del model.embed_out
    config = HookedTransformerConfig(n_layers=1, d_model=8, n_heads=2, d_head=4, n_ctx=8, d_vocab=5, act_fn="gelu")
    with still_raises(AttributeError, "embed_out", "transformers.GPTNeoXForCausalLM.embed_out"):
        convert_neox_weights(model, config)
