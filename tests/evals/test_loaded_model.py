"""The language model is loaded once for all evals, and each finds it as if it were new."""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens import HookedTransformer

from ksvd_sae.evals.base import EvalSetting
from ksvd_sae.evals.panel import run_evals
from ksvd_sae.evals.saebench.loaded_model import LoadedModel
from tests.evals.conftest import CountedPanel
from tests.evals.test_saebench import CORE, PROBING, run_core_on, run_probing_on
from tests.tiny_saes import MODEL_NAME, tiny_db_ksvd_sae, tiny_model, tiny_topk_sae
from tests.upstream import mended

# SAEBench's core pre-tokenises nothing.
pytestmark = pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning")
WORDS = "red blue iron gold"


@pytest.fixture
def loaded(model_loads: list[str]) -> Iterator[LoadedModel]:
    with LoadedModel().in_use() as loaded:
        yield loaded


def load(name: str = MODEL_NAME, **options: Any) -> HookedTransformer:
    return HookedTransformer.from_pretrained_no_processing(name, **options)


def test_same_model_is_loaded_once(loaded: LoadedModel, model_loads: list[str]) -> None:
    first = load(device="cpu", dtype=torch.float32)
    assert load(device=torch.device("cpu")) is first
    assert model_loads == [MODEL_NAME]


@pytest.mark.parametrize(
    "other", [{"name": "another"}, {"device": "meta"}, {"dtype": torch.bfloat16}, {"n_ctx": 64}], ids=str
)
def test_another_model_is_loaded(other: dict[str, Any], loaded: LoadedModel, model_loads: list[str]) -> None:
    first = load()
    assert load(**other) is not first
    assert len(model_loads) == 2


def test_released_model_is_loaded_again(loaded: LoadedModel, model_loads: list[str]) -> None:
    first = load()
    loaded.release()
    assert load() is not first
    assert len(model_loads) == 2


def fail() -> None:
    with LoadedModel().in_use():
        load()
        raise RuntimeError("an eval")


def test_loader_is_put_back(model_loads: list[str]) -> None:
    before = vars(HookedTransformer)["from_pretrained_no_processing"]
    with pytest.raises(RuntimeError, match="an eval"):
        fail()
    assert vars(HookedTransformer)["from_pretrained_no_processing"] is before
    assert load() is not load()


def test_tokenizer_and_hooks_are_as_new(loaded: LoadedModel) -> None:
    """sae-probes cuts texts on the left; the eval after it must not."""
    model = load()
    tokenizer: Any = model.tokenizer
    cut = tokenizer(WORDS, truncation=True, max_length=2)["input_ids"]
    tokenizer.truncation_side, tokenizer.pad_token = "left", "iron"
    model.add_hook("hook_embed", lambda value, hook: value * 0)
    assert tokenizer(WORDS, truncation=True, max_length=2)["input_ids"] != cut
    assert load() is model
    assert tokenizer(WORDS, truncation=True, max_length=2)["input_ids"] == cut
    assert tokenizer.pad_token == tiny_model().tokenizer.pad_token
    tokens = model.to_tokens(WORDS)
    assert torch.equal(model(tokens), tiny_model()(tokens))


def test_changed_weights_are_loaded_again(
    loaded: LoadedModel, model_loads: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = load()
    with torch.no_grad():
        model.W_E.mul_(2)
    with caplog.at_level(logging.WARNING):
        again = load()
    assert torch.equal(again.W_E, tiny_model().W_E)
    assert len(model_loads) == 2
    assert "changed the weights" in caplog.text


def test_loaded_in_inference_mode_may_still_have_gradients(loaded: LoadedModel) -> None:
    """sae-probes asks for the model under inference mode."""
    with torch.inference_mode():
        load()
    assert not any(weight.is_inference() for weight in load().state_dict().values())


def test_scores_of_evals_that_share_the_model(setting: EvalSetting, model_loads: list[str], tmp_path: Path) -> None:
    """Two evals load it once and score as each does by itself."""
    panel = CountedPanel({"topk": tiny_topk_sae, "ours": tiny_db_ksvd_sae})
    alone = [run_core_on(panel, setting, tmp_path / "core"), run_probing_on(panel, setting, tmp_path / "probing")]
    loader = "transformer_lens.HookedTransformer.from_pretrained_no_processing"
    assert len(model_loads) == 2, mended(loader)
    model_loads.clear()
    elsewhere = replace(setting, artifacts=tmp_path / "elsewhere")
    results = list(run_evals(panel.panelists(), [CORE, PROBING], elsewhere, tmp_path / "together"))
    assert model_loads == [MODEL_NAME]
    assert [r.eval for r in results] == ["core", "sparse_probing"]
    for result, files in zip(results, alone, strict=True):
        for name, path in files.items():
            scores = [json.loads(p.read_text())["eval_result_metrics"] for p in (path, result.files[name])]
            assert scores[0] == scores[1]
