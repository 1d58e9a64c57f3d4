"""SAEBench and sae-probes load a model by its name: they get the run's own weights, and keep nothing of others."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_bench.evals.autointerp import main as autointerp
from sae_bench.evals.core import main as core
from sae_bench.evals.sparse_probing import main as probing
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from torch.nn.functional import normalize

from ksvd_sae.activations.weights import OwnWeights, find_weights
from ksvd_sae.evals.base import Eval, EvalSetting
from ksvd_sae.evals.llm_cache import TensorCache, model_fingerprint
from ksvd_sae.evals.panel import run_evals
from ksvd_sae.evals.sae_probes import SaeProbesEval
from ksvd_sae.evals.saebench.runner import read_metrics
from tests import tiny_models
from tests.evals.autointerp.tiny_autointerp import CONFIG as AUTOINTERP
from tests.evals.conftest import CLASSES, CountedPanel
from tests.evals.test_sae_probes import METAL, own_data  # noqa: F401
from tests.evals.test_saebench import CORE, PROBING
from tests.strategies import generator
from tests.tiny_hub import offline_hub
from tests.tiny_saes import CONTEXT_TOKENS, tiny_model, tiny_topk_sae

pytestmark = [
    pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning"),
    pytest.mark.filterwarnings("ignore:Inconsistent values. penalty=l1 with l1_ratio=0.0:UserWarning"),
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
]
EVALS: list[Eval] = [
    CORE,
    PROBING,
    SaeProbesEval(datasets=[METAL], k_values=[1]),
    AUTOINTERP.model_copy(update={"min_latents": 2, "n_latents": 4}),
]


def neox_sae() -> TopKSAE:
    """Random, of the tiny GPT-NeoX."""
    metadata = SAEMetadata(
        model_name=tiny_models.PYTHIA,
        hook_name="blocks.2.hook_resid_post",
        context_size=CONTEXT_TOKENS,
        prepend_bos=True,
    )
    sae = TopKSAE(TopKSAEConfig(d_in=tiny_models.D_MODEL, d_sae=24, k=4, metadata=metadata))
    with torch.no_grad():
        sae.W_dec.copy_(normalize(torch.randn(24, tiny_models.D_MODEL, generator=generator(0)), dim=1))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


@pytest.fixture
def place(data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvalSetting:
    """As the tiny model's, but with the model looked up by its name."""
    import datasets

    from ksvd_sae.evals.sparse_probing.run import LABELS

    monkeypatch.setitem(LABELS, CLASSES, ["0", "1", "2"])
    for module in (autointerp, core, probing):
        monkeypatch.setattr(module, "gc", SimpleNamespace(collect=lambda: 0))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return EvalSetting(
        tiny_models.PYTHIA,
        "float32",
        "cpu",
        data_folder,
        "0123456789ab",
        tmp_path / "artifacts",
        TensorCache(tmp_path / "llm", 10**8),
    )


def home_with(seed: int, folder: Path) -> Path:
    """A Hub cache in which the name's own weights are those of a seed."""
    snapshot = tiny_models.pythia_160m(folder)
    tiny_models.neox_model(seed).save_pretrained(snapshot)
    return folder / "hub"


def scores_of(setting: EvalSetting, output: Path) -> dict[str, Any]:
    panel = CountedPanel({"topk": neox_sae})
    return {
        results.eval: read_metrics(results.files["topk"])
        for results in run_evals(panel.panelists(), EVALS, setting, output)
    }


@pytest.mark.usefixtures("own_data")
def test_scores_are_those_of_the_models_own_weights(
    place: EvalSetting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the name stands for these weights; and what was kept of the name's own is not taken for them."""
    tiny_models.neox_model(seed=1).save_pretrained(tmp_path / "tuned")
    own = replace(place, weights=find_weights(str(tmp_path / "tuned"), None))
    offline_hub(home_with(0, tmp_path / "base"), monkeypatch)
    base, tuned = scores_of(place, tmp_path / "out"), scores_of(own, tmp_path / "out")
    elsewhere = tmp_path / "elsewhere"
    offline_hub(home_with(1, elsewhere), monkeypatch)
    there = replace(place, artifacts=elsewhere / "artifacts", cache=TensorCache(elsewhere / "llm", 10**8))
    assert tuned == scores_of(there, elsewhere / "out")
    assert base.keys() == tuned.keys() == {section.name for section in EVALS}
    assert all(base[name] != tuned[name] for name in base if name != "autointerp")


# ---------------------------------------------------------------- keys


WEIGHTS = OwnWeights(Path("folder"), "folder", None, "c0ffee")


def test_the_model_in_keys(setting: EvalSetting) -> None:
    """As before where it is what its name says."""
    assert setting.model == setting.model_name
    settings = [
        replace(setting, weights=WEIGHTS),
        replace(setting, weights=replace(WEIGHTS, content="decaf")),
        replace(setting, prepend_bos=False),
        replace(setting, prepend_bos=True),
        replace(setting, weights=WEIGHTS, prepend_bos=True),
    ]
    keys = {json.dumps(one.model, sort_keys=True) for one in settings}
    assert len(keys) == len(settings)


def test_weights_that_differ_where_nobody_looks() -> None:
    """A fingerprint reads some entries of each weight; two models that were tuned may differ in others."""
    model = tiny_model()
    plain = model_fingerprint(model)
    others = [model_fingerprint(model, replace(WEIGHTS, content=content)) for content in ("a", "b")]
    assert len({plain, *others}) == 3


def test_results_of_other_weights_are_not_reused(
    setting: EvalSetting, model_loads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two models at one path: neither scores nor activations, nor anything else by the model's name."""
    monkeypatch.setattr(OwnWeights, "hooked", lambda self, load, name, **options: load(name, **options))
    panel = CountedPanel({"topk": tiny_topk_sae})
    for content in ("a", "b", "a"):
        own = replace(setting, weights=replace(WEIGHTS, content=content))
        list(run_evals(panel.panelists(), [CORE, PROBING], own, tmp_path / "out"))
    for name in ("core", "sparse_probing"):
        assert len(list((tmp_path / "out" / name).glob("*/topk-*.json"))) == 2
    assert len(list((tmp_path / "artifacts").glob("sparse_probing-*"))) == 2
