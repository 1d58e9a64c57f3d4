"""Evals at hooks other than a layer's output: what has heads is scored by its flattened activations."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens import HookedTransformer

from ksvd_sae.dictionary import Dictionary
from ksvd_sae.evals.base import Eval, EvalSetting
from ksvd_sae.evals.llm_cache import TensorCache
from ksvd_sae.learning.coding import Coding
from ksvd_sae.sae import DBKSVDSAE, sae_from_dictionary
from tests.evals.autointerp.tiny_autointerp import CONFIG as AUTOINTERP
from tests.evals.conftest import CountedPanel
from tests.evals.test_saebench import CORE, PROBING, SCR, TPP
from tests.strategies import generator, unit_atoms
from tests.tiny_saes import MODEL_NAME, WORDS, grouped_queries, heads_as_attention_output
from tests.tolerances import SAME_SCORE

pytestmark = pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning")
# Until probes have learned what is smaller here than a layer's output.
LONGER = {"probe_epochs": 60}
SAEBENCH: list[Eval] = [CORE, PROBING, SCR.model_copy(update=LONGER), TPP.model_copy(update=LONGER), AUTOINTERP]
HOOK_Z, ATTENTION = "blocks.0.attn.hook_z", "blocks.0.hook_attn_out"


def sae_at(hook: str, width: int) -> DBKSVDSAE:
    centre_D = 0.1 * torch.randn(width, generator=generator(1))
    dictionary = Dictionary(unit_atoms(3 * width, width, 0, torch.float32), centre_D, Coding(4))
    return sae_from_dictionary(dictionary, model_name=MODEL_NAME, hook_name=hook)


Scored = Callable[[Eval, Callable[[], HookedTransformer], str], dict[str, float | None]]


@pytest.fixture
def scored(setting: EvalSetting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Scored:
    """The metrics of an eval of a dictionary at a hook of a model."""

    def run(section: Eval, make: Callable[[], HookedTransformer], hook: str) -> dict[str, float | None]:
        monkeypatch.setattr(HookedTransformer, "from_pretrained_no_processing", lambda name, **options: make())
        _, cache = (model := make()).run_with_cache(model.to_tokens(WORDS[0]), names_filter=[hook])
        panel = CountedPanel({"db-ksvd": partial(sae_at, hook, cache[hook].flatten(2).shape[-1])}).panelists()
        shared = replace(setting, cache=TensorCache(tmp_path / "llm", 10**8), memory_bytes=1 << 20)
        return section.run(panel, replace(shared, artifacts=tmp_path / hook), tmp_path / hook).metrics["db-ksvd"]

    return run


def headlines(section: Eval, metrics: Mapping[str, Any]) -> set[str]:
    """What tables show, and SCR's scores, which none does."""
    shown = {column.metric for column in section.columns} or {name for name in metrics if name.startswith("scr_metric")}
    return shown & metrics.keys()


@pytest.mark.parametrize("section", SAEBENCH, ids=lambda section: section.name)
def test_scores_at_hook_z_are_those_of_the_flattened_heads(section: Eval, scored: Scored) -> None:
    """With the identity behind the heads, the attention's output is the heads flattened, without heads."""
    flat = scored(section, heads_as_attention_output, ATTENTION)
    assert headlines(section, flat)
    assert scored(section, heads_as_attention_output, HOOK_Z) == pytest.approx(flat, abs=SAME_SCORE, nan_ok=True)


@pytest.mark.parametrize("place", ["attn.hook_k", "attn.hook_v", "attn.hook_rot_q", "attn.hook_rot_k", "mlp.hook_post"])
@pytest.mark.parametrize("section", SAEBENCH, ids=lambda section: section.name)
def test_heads_of_grouped_queries_are_scored(section: Eval, place: str, scored: Scored) -> None:
    metrics = scored(section, grouped_queries, f"blocks.1.{place}")
    found = headlines(section, metrics)
    assert found
    assert all(isinstance(metrics[name], float) for name in found)
