"""Activations of a tiny GPT-NeoX at a hook: the right ones, of the right tokens, at no more work than needed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import Tensor

from ksvd_sae.activations.gradients import read_gradients
from ksvd_sae.activations.language import ActivationReader, check_bridgeable, check_contexts, has_hooked, hook_layer
from ksvd_sae.errors import ActivationError, ConfigError, HookError, HubError, KsvdSaeError, ShapeError
from ksvd_sae.evals.loss.splice import SpliceEvaluator
from ksvd_sae.run import data, pipeline
from ksvd_sae.run.config import parse_config
from tests import tiny_models, tolerances
from tests.strategies import generator

HOOK = "blocks.8.hook_resid_post"
BOS = 0
# "Quickly": far less than one retry over a network that is not there.
QUICK_S = 30.0


@pytest.fixture
def tokens_BL() -> Tensor:
    """Three contexts that start with BOS; the second holds another, between two documents."""
    tokens_BL = torch.randint(1, tiny_models.VOCABULARY_SIZE, (3, 20), generator=generator(0))
    tokens_BL[:, 0] = tokens_BL[1, 7] = BOS
    return tokens_BL


@pytest.mark.parametrize("hook", [HOOK, "blocks.0.hook_resid_pre", "blocks.9.mlp.hook_post", "hook_embed"])
def test_activations_are_those_of_the_whole_model(model: Any, tokens_BL: Tensor, hook: str) -> None:
    found_ND = ActivationReader(model, hook).read(tokens_BL)
    cache = model.run_with_cache(tokens_BL, names_filter=hook)[1]
    assert torch.equal(found_ND, cache[hook][tokens_BL != BOS])
    assert found_ND.shape[0] == 3 * 20 - 4
    assert found_ND.dtype == torch.float32
    assert not found_ND.requires_grad


def beyond(tokens_BL: Tensor, token: int) -> Tensor:
    """With one id, in two places, that is none of the model's."""
    tokens_BL = tokens_BL.clone()
    tokens_BL[1, 3] = tokens_BL[2, 0] = token
    return tokens_BL


@pytest.mark.parametrize("token", [tiny_models.VOCABULARY_SIZE, 10**6, -1])
@pytest.mark.parametrize(
    "run",
    [
        lambda model, tokens_BL: ActivationReader(model, HOOK).read(tokens_BL),
        lambda model, tokens_BL: read_gradients(ActivationReader(model, HOOK), tokens_BL),
        lambda model, tokens_BL: SpliceEvaluator(model, HOOK, tokens_BL, norm_limit=None),
    ],
    ids=["read", "read_gradients", "SpliceEvaluator"],
)
def test_token_ids_beyond_the_vocabulary(run: Any, token: int, model: Any, tokens_BL: Tensor) -> None:
    with pytest.raises(ShapeError, match="2 token ids are none of model") as caught:
        run(model, beyond(tokens_BL, token))
    assert f"{token}, at context 1, position 3" in str(caught.value)
    assert f"0 to {tiny_models.VOCABULARY_SIZE - 1}" in str(caught.value)


@pytest.mark.parametrize(
    "tokens",
    [torch.zeros(3, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.int64), torch.ones(2, 3), torch.ones(2, 3) > 0],
    ids=["one context", "none", "no integers", "a mask"],
)
def test_tokens_that_are_no_contexts(tokens: Tensor, model: Any) -> None:
    with pytest.raises(ShapeError, match="contexts of token ids"):
        ActivationReader(model, HOOK).read(tokens)


def test_any_integers_are_token_ids(model: Any, tokens_BL: Tensor) -> None:
    reader = ActivationReader(model, HOOK)
    assert torch.equal(reader.read(tokens_BL.to(torch.int32)), reader.read(tokens_BL))


def test_activations_are_those_of_transformers(model: Any, hf_model: Any, tokens_BL: Tensor) -> None:
    found_ND = ActivationReader(model, HOOK).read(tokens_BL)
    with torch.no_grad():
        # hidden_states[0] are the embeddings: [9] is what block 8 gives.
        true_ND = hf_model(tokens_BL, output_hidden_states=True).hidden_states[9][tokens_BL != BOS]
    bound = tolerances.HOOK_AGAINST_TRANSFORMERS * float(true_ND.abs().max())
    assert float((found_ND - true_ND).abs().max()) <= bound


def test_special_tokens_are_kept_where_asked_for(model: Any, tokens_BL: Tensor) -> None:
    found_ND = ActivationReader(model, HOOK, keep_special=True).read(tokens_BL)
    assert len(found_ND) == tokens_BL.numel()
    ordinary_N = (tokens_BL != BOS).flatten()
    assert not bool(ordinary_N.all())
    assert torch.equal(found_ND[ordinary_N], ActivationReader(model, HOOK).read(tokens_BL))


def test_heads_are_flattened(model: Any, tokens_BL: Tensor) -> None:
    hook = "blocks.3.attn.hook_z"
    found_ND = ActivationReader(model, hook).read(tokens_BL)
    cache = model.run_with_cache(tokens_BL, names_filter=hook)[1]
    assert cache[hook].shape == (3, 20, tiny_models.N_HEADS, tiny_models.D_MODEL // tiny_models.N_HEADS)
    assert torch.equal(found_ND, cache[hook][tokens_BL != BOS].flatten(1))


def test_the_forward_pass_stops_at_the_hooks_layer(model: Any, tokens_BL: Tensor) -> None:
    fired = []
    model.add_hook("blocks.9.hook_resid_pre", lambda activation, hook: fired.append(hook.name))
    ActivationReader(model, HOOK).read(tokens_BL)
    assert fired == []
    ActivationReader(model, "blocks.9.hook_resid_post").read(tokens_BL)
    assert fired == ["blocks.9.hook_resid_pre"]


def test_reading_leaves_no_hook_behind(model: Any, tokens_BL: Tensor) -> None:
    ActivationReader(model, HOOK).read(tokens_BL)
    assert all(not point.fwd_hooks for point in model.hook_dict.values())


class TestContexts:
    def test_as_long_as_the_model_reads(self, model: Any) -> None:
        check_contexts(model, {"harvest.context_tokens": tiny_models.N_CONTEXT, "evaluation.core.context_tokens": 2})

    @pytest.mark.parametrize("key", ["harvest.context_tokens", "evaluation.core.context_tokens"])
    @pytest.mark.parametrize(
        ("positions", "cause"),
        [("rotary", "not trained on"), ("standard", "no embedding of")],
    )
    def test_longer(self, model: Any, key: str, positions: str, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(model.cfg, "positional_embedding_type", positions)
        n = tiny_models.N_CONTEXT
        with pytest.raises(ConfigError, match=rf"(?s)^{key}: .*got: {n + 1} tokens.*{n} tokens.*{cause}.*{n} or less"):
            check_contexts(model, {"evaluation.loss.context_tokens": 8, key: n + 1})

    def test_a_run_looks_before_it_harvests(self, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever asks for the long contexts: the harvest, or an eval that would come hours later."""
        monkeypatch.setattr(data, "load_model", lambda *_: model)
        raw: dict[str, Any] = {
            "name": "long",
            "model": {"name": tiny_models.PYTHIA, "hook": HOOK},
            "text": {"source": "folder", "dataset": str(tiny_models.write_text_folder(tmp_path / "texts", 100))},
            "harvest": {"train_tokens": 500, "heldout_tokens": 100, "context_tokens": 64},
            "dictionaries": {"pca": {"kind": "pca", "k": 4}},
        }
        for key, section in {
            "harvest.context_tokens": {"harvest": {**raw["harvest"], "context_tokens": 1024}},
            "evaluation.core.context_tokens": {"evaluation": {"core": {"context_tokens": 1024}}},
            "evaluation.loss.context_tokens": {"evaluation": {"loss": {"context_tokens": 513}}},
        }.items():
            run = pipeline.Run(parse_config({**raw, **section}), tmp_path / "results", tmp_path / "cache")
            with pytest.raises(ConfigError, match=key):
                run.harvest()
            assert not list((tmp_path / "cache").rglob("*.safetensors"))
        run = pipeline.Run(parse_config(raw), tmp_path / "results", tmp_path / "cache")
        assert run.harvest().n_samples >= 400


@pytest.mark.parametrize(
    ("hook", "layer"), [(HOOK, 8), ("blocks.11.attn.hook_z", 11), ("hook_embed", None), ("ln_final.hook_scale", None)]
)
def test_hook_layer(hook: str, layer: int | None) -> None:
    assert hook_layer(hook) == layer


@pytest.mark.parametrize("hook", ["blocks.8.hook_resid_pots", "blocks.10.hook_resid_post", "block.8.hook_resid_post"])
def test_hook_that_the_model_lacks(model: Any, hook: str) -> None:
    with pytest.raises(HookError) as caught:
        ActivationReader(model, hook)
    assert repr(hook) in str(caught.value)
    assert "blocks.0 to blocks.9" in str(caught.value)
    assert "hook_resid_post'" in str(caught.value.cure)


@pytest.mark.parametrize(
    "hook",
    [
        pytest.param("blocks.8.attn.hook_pattern", id="heads before positions"),
        pytest.param("blocks.8.attn.hook_result", id="fires only if use_attn_result is set"),
        pytest.param("blocks.8.hook_mlp_in", id="fires only if use_hook_mlp_in is set"),
        pytest.param("unembed.hook_out", id="after the end of the pass"),
    ],
)
def test_hook_without_a_row_for_each_token(model: Any, tokens_BL: Tensor, hook: str) -> None:
    with pytest.raises(HookError, match="hook_"):
        ActivationReader(model, hook).read(tokens_BL)


def test_attention_pattern_with_as_many_heads_as_positions(model: Any) -> None:
    with pytest.raises(HookError):
        ActivationReader(model, "blocks.8.attn.hook_pattern").read(torch.ones(1, tiny_models.N_HEADS, dtype=torch.int))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_activations_are_located(model: Any, tokens_BL: Tensor, value: float) -> None:
    tokens_BL[tokens_BL == 5] = 6
    tokens_BL[1, 3] = tokens_BL[2, 19] = 5
    model.embed.W_E.data[5] = value
    with pytest.raises(ActivationError) as caught:
        ActivationReader(model, "blocks.0.hook_resid_pre").read(tokens_BL)
    assert "2 of 56 activations of blocks.0.hook_resid_pre" in str(caught.value)
    assert "context 1 of the batch, position 3" in str(caught.value)


def test_broken_weights(model: Any, tokens_BL: Tensor) -> None:
    model.blocks[3].mlp.W_out.data[0, 0] = float("nan")
    with pytest.raises(ActivationError, match="56 of 56"):
        ActivationReader(model, HOOK).read(tokens_BL)
    # What lies before them is whole.
    ActivationReader(model, "blocks.3.hook_resid_pre").read(tokens_BL)


def test_broken_activations_of_special_tokens_do_not_matter(model: Any, tokens_BL: Tensor) -> None:
    """Whatever stands at BOS is left out, as long as it stays there."""
    model.embed.W_E.data[BOS] = float("nan")
    found_ND = ActivationReader(model, "blocks.0.hook_resid_pre").read(tokens_BL)
    assert bool(torch.isfinite(found_ND).all())


# ---------------------------------------------------------------- models by name


@pytest.mark.parametrize("name", [tiny_models.PYTHIA, "pythia-160m-deduped", tiny_models.GEMMA_2])
def test_known_model_names(name: str) -> None:
    assert has_hooked(name)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("EleutherAI/pythia-160m-dedupped", "'EleutherAI/pythia-160m-deduped'"),
        ("google/gemma2-2b", "'google/gemma-2-2b'"),
        ("pythia-160", "'pythia-160m'"),
    ],
)
def test_unknown_model_name(name: str, near: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not has_hooked(name)
    with pytest.raises(HubError) as caught:
        check_bridgeable(name)
    assert repr(name) in str(caught.value)
    assert near in str(caught.value.cure)


LOAD = """
import json, sys, time, torch, transformer_lens
from ksvd_sae.activations.language import load_model
from ksvd_sae.activations.language import ModelConfig
from ksvd_sae.errors import KsvdSaeError

started, error = time.perf_counter(), None
try:
    load_model(ModelConfig(name=sys.argv[1], hook="blocks.0.hook_resid_post"), torch.device("cpu"))
except KsvdSaeError as caught:
    error = caught
print(json.dumps([type(error).__name__, str(error), time.perf_counter() - started]))
"""


def test_known_model_without_network_or_cache(tmp_path: Path) -> None:
    """In a process of its own: the Hub libraries read where their cache is, and whether to be offline, at import."""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, tiny_models.PYTHIA], env=environment, capture_output=True, text=True, check=True
    )
    kind, message, seconds = json.loads(done.stdout.splitlines()[-1])
    assert kind == HubError.__name__
    assert issubclass(HubError, KsvdSaeError)
    assert repr(tiny_models.PYTHIA) in message
    assert "no network and no copy in the Hub cache" in message
    assert seconds < QUICK_S
