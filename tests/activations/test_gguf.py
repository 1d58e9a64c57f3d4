"""Weights in a GGUF file: the activations and the tokens of the model that it was written from."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ksvd_sae.activations.language import ActivationReader, ModelConfig, load_model
from ksvd_sae.errors import ConfigError
from tests import tiny_models
from tests.tolerances import HOOK_AGAINST_TRANSFORMERS

HOOK = "blocks.1.hook_resid_post"


def qwen_2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=tiny_models.VOCABULARY_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).eval()


def write_gguf(path: Path, model: Any, tokenizer: Any) -> Path:
    """As llama.cpp's converter does it, in float32."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    known = json.loads(tokenizer.backend_tokenizer.to_str())
    pieces = sorted(known["model"]["vocab"], key=known["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(pieces)
    writer.add_token_types([3 if piece == tiny_models.END_OF_TEXT else 1 for piece in pieces])
    writer.add_token_merges([" ".join(pair) for pair in known["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, weight in model.named_parameters():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    """The file, and what it was written from."""
    folder, model = tmp_path_factory.mktemp("gguf"), qwen_2()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KSVD_SAE_CACHE", str(folder / "cache"))
        yield write_gguf(folder / "tiny.gguf", model, tiny_models.byte_pair_tokenizer()), model


@pytest.mark.parametrize("given", ["file", "folder"])
def test_activations_and_tokens(written: tuple[Path, Any], given: str) -> None:
    path, model = written
    config = ModelConfig(name="tiny", hook=HOOK, weights=str(path if given == "file" else path.parent))
    loaded, text = load_model(config, torch.device("cpu")), tiny_models.documents(1)[0]
    wanted = tiny_models.byte_pair_tokenizer()(text, return_tensors="pt")["input_ids"]
    assert loaded.tokenizer(text, add_special_tokens=False)["input_ids"] == wanted[0].tolist()
    tokens_BL = wanted[:, :64]
    with torch.no_grad():
        true_ND = model.model(tokens_BL, output_hidden_states=True).hidden_states[1][0]
    found_ND = ActivationReader(loaded, "blocks.0.hook_resid_post").read(tokens_BL)
    bound = HOOK_AGAINST_TRANSFORMERS * float(true_ND.abs().max())
    torch.testing.assert_close(found_ND, true_ND, rtol=0, atol=bound)
    assert config.content_hash() == ModelConfig(name="tiny", hook=HOOK, weights=str(path)).content_hash()


def test_what_cannot_be_read(written: tuple[Path, Any], tmp_path: Path) -> None:
    def refused(place: Path, match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            ModelConfig(name="tiny", hook=HOOK, weights=str(place)).own_weights()

    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(written[0].read_bytes()[:2000])
    refused(tmp_path, "several GGUF files")
    refused(tmp_path / "a.gguf", "cannot be read")
    assert not list((tmp_path / "cache" / "gguf").glob("*"))
