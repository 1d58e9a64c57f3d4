"""Hooks around the layers of a model to which TransformerLens has no bridge: transformers' own numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ksvd_sae.activations.language import ActivationReader, ModelConfig, is_bridge, load_model
from ksvd_sae.activations.layers import LayerModel
from ksvd_sae.activations.splicing import RunsFromHook, Unembedding
from ksvd_sae.activations.weights import has_bridge
from ksvd_sae.errors import ConfigError, HookError
from tests import tiny_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.helium(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    """Loaded as a run's config does it."""
    assert not has_bridge("HeliumForCausalLM"), "take another architecture"
    config = ModelConfig(name="helium", hook="blocks.1.hook_resid_post", weights=str(folder))
    return load_model(config, torch.device("cpu"))


@pytest.fixture(scope="module")
def tokens_BL() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, tiny_models.VOCABULARY_SIZE, (3, 9), generator=generator)


def test_activations_are_hidden_states(model: Any, tokens_BL: torch.Tensor) -> None:
    assert isinstance(model, LayerModel)
    assert is_bridge(model)
    with torch.no_grad():
        hidden = model.model(tokens_BL, output_hidden_states=True).hidden_states
    for layer in range(3):
        before = ActivationReader(model, f"blocks.{layer}.hook_resid_pre").read(tokens_BL)
        assert torch.equal(before, hidden[layer].flatten(0, 1))
        if layer < 2:
            after = ActivationReader(model, f"blocks.{layer}.hook_resid_post").read(tokens_BL)
            assert torch.equal(after, hidden[layer + 1].flatten(0, 1))


def test_a_reader_stops_behind_its_layer(model: Any, tokens_BL: torch.Tensor) -> None:
    ran: list[int] = []
    handles = [
        layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(model.model.model.layers)
    ]
    ActivationReader(model, "blocks.1.hook_resid_pre").read(tokens_BL)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]


@pytest.mark.parametrize("side", ["pre", "post"])
@torch.no_grad()
def test_a_change_at_a_hook_is_a_change_of_the_layer(model: Any, tokens_BL: torch.Tensor, side: str) -> None:
    runs = RunsFromHook(model, f"blocks.1.hook_resid_{side}")
    started, _, final_BLD = runs.first(tokens_BL)
    logits_BLV = Unembedding(model).logits(final_BLD.flatten(0, 1)).view(3, 9, -1)
    torch.testing.assert_close(logits_BLV, model(tokens_BL))
    assert torch.equal(runs.again(started, lambda x_BLD: x_BLD), final_BLD)

    layers = model.model.model.layers
    layer = layers[1 if side == "pre" else 2]
    handle = layer.register_forward_pre_hook(lambda _, given: (0.5 * given[0], *given[1:]))
    wanted_BLV = model.model(tokens_BL).logits
    handle.remove()
    changed_BLD = runs.again(started, lambda x_BLD: 0.5 * x_BLD)
    torch.testing.assert_close(Unembedding(model).logits(changed_BLD.flatten(0, 1)).view(3, 9, -1), wanted_BLV)


def test_no_other_hook(model: Any) -> None:
    with pytest.raises(HookError, match=r"(?s)has no hook 'blocks\.1\.hook_mlp_out'.*did you mean"):
        ActivationReader(model, "blocks.1.hook_mlp_out")


def test_what_is_no_stack_of_layers_is_refused(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, RobertaConfig, RobertaForCausalLM

    tokenizer = tiny_models.byte_pair_tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    with pytest.raises(ConfigError, match="its decoder layers are not found"):
        LayerModel(RobertaForCausalLM(RobertaConfig(vocab_size=64, is_decoder=True, **sizes)).eval(), tokenizer, "r")

    ahead = AutoModelForCausalLM.from_pretrained(folder).eval()
    ahead.lm_head.register_forward_hook(lambda *given: given[-1].flip(1))
    with pytest.raises(ConfigError, match="looks ahead"):
        LayerModel(ahead, tokenizer, "ahead")
    other = AutoModelForCausalLM.from_pretrained(folder).eval()
    other.model.layers[2].register_forward_pre_hook(lambda _, given: (given[0] + 1, *given[1:]))
    with pytest.raises(ConfigError, match="does not hand on"):
        LayerModel(other, tokenizer, "other")
