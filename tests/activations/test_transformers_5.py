"""Models whose parts transformers 5 has renamed are still found under the names that TransformerLens asks for."""

import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from ksvd_sae.activations.transformers_5 import make_loadable, unembedding


def test_the_unembedding_is_found_under_either_name() -> None:
    for name in ("embed_out", "lm_head"):
        model = nn.Module()
        setattr(model, name, nn.Linear(2, 3))
        assert unembedding(model) is getattr(model, name)


def test_pythias_unembedding_makes_its_logits() -> None:
    """Whichever transformers is installed."""
    make_loadable()
    make_loadable()
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 5,
    }
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).eval()
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        final = model.gpt_neox(tokens).last_hidden_state
        torch.testing.assert_close(model.embed_out(final), model(tokens).logits)
