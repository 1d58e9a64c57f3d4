"""What scores are means of: weighted means of the items are the scores, also where SAEBench keeps no items."""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_bench.evals.core import main as core

from ksvd_sae.evals import EVALS
from ksvd_sae.evals.base import EvalSetting
from ksvd_sae.evals.core import CONTEXTS, CoreEval
from ksvd_sae.evals.core.run import run_core
from ksvd_sae.evals.heldout import HeldoutEval
from ksvd_sae.evals.heldout.metrics import heldout_metrics
from ksvd_sae.evals.items import MOST_ITEMS, Item, neighbours, of_groups, of_ratios, of_values
from ksvd_sae.evals.llm_cache import TensorCache
from ksvd_sae.evals.saebench.adapters import working_directory
from ksvd_sae.evals.saebench.runner import read_metrics
from ksvd_sae.evals.tpp import TppEval
from tests.evals.conftest import TEXT, CountedPanel
from tests.evals.test_saebench import NotANumber
from tests.strategies import generator
from tests.tiny_saes import CONTEXT_TOKENS, D_MODEL, tiny_db_ksvd_sae, tiny_topk_sae
from tests.tolerances import HELDOUT_METRIC, SAEBENCH_SCORE
from tests.upstream import mended

CORE = CoreEval(
    dataset=TEXT, context_tokens=CONTEXT_TOKENS, batch_contexts=3, reconstruction_batches=2, sparsity_batches=1
)


def means(items: Iterable[Item]) -> dict[str, float]:
    """Metric -> Σ weight · value / Σ weight."""
    upper: dict[str, float] = defaultdict(float)
    lower: dict[str, float] = defaultdict(float)
    for item in items:
        upper[item.metric] += item.weight * item.value
        lower[item.metric] += item.weight
    return {metric: upper[metric] / lower[metric] for metric in upper}


# ---------------------------------------------------------------- core


@pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning")
@pytest.mark.parametrize("shared", [False, True], ids=["SAEBench's runs", "shared runs"])
def test_cores_contexts_give_its_scores(setting: EvalSetting, tmp_path: Path, shared: bool) -> None:
    if shared:
        setting = replace(setting, cache=TensorCache(tmp_path / "llm", 10**8), memory_bytes=1 << 20)
    makers: dict[str, Any] = {"mp": tiny_db_ksvd_sae, "topk": tiny_topk_sae}
    files = run_core(CountedPanel(makers).panelists(), CORE, setting, tmp_path).files
    for path in files.values():
        items, metrics = list(CoreEval.items(json.loads(path.read_text()))), read_metrics(path)
        found = means(items)
        assert set(found) == {"ce_loss_score", "ce_loss_with_sae", "ce_loss_without_sae", "kl_div_with_sae"}
        assert found == pytest.approx({name: metrics[name] for name in found}, rel=10 * SAEBENCH_SCORE)
        assert sum(item.metric == "ce_loss_score" for item in items) == 6


@pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning")
def test_contexts_that_core_cannot_score_are_no_items(setting: EvalSetting, tmp_path: Path) -> None:
    makers: dict[str, Any] = {"broken": lambda: NotANumber(tiny_db_ksvd_sae().cfg)}
    files = run_core(CountedPanel(makers).panelists(), CORE, setting, tmp_path).files
    assert set(means(CoreEval.items(json.loads(files["broken"].read_text())))) == {"ce_loss_without_sae"}


@pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning")
def test_cores_result_says_nothing_of_contexts(setting: EvalSetting, tmp_path: Path) -> None:
    with working_directory(setting.data_folder):
        core.multiple_evals(
            [("topk", tiny_topk_sae())],
            n_eval_reconstruction_batches=1,
            n_eval_sparsity_variance_batches=1,
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
            dataset=TEXT,
            context_size=CONTEXT_TOKENS,
            output_folder=str(tmp_path),
            device="cpu",
        )
    (path,) = tmp_path.glob("*_eval_results.json")
    result = json.loads(path.read_text())
    kept = {**result["eval_result_metrics"], **(result["eval_result_unstructured"] or {})}
    numbers = [value for group in kept.values() for value in group.values()]
    assert CONTEXTS not in result
    assert all(isinstance(n, int | float) for n in numbers), mended("sae_bench.evals.core.main.save_single_eval_result")


# ---------------------------------------------------------------- held-out activations


def test_errors_by_item_give_the_fvu() -> None:
    x_ND = torch.randn(90, D_MODEL, generator=generator(0)) + 5 * torch.linspace(-1, 1, D_MODEL)
    item_N = torch.randint(0, 7, (90,), generator=generator(1))
    sae = tiny_topk_sae()
    found = heldout_metrics(sae, iter(x_ND.split(40)), item_N)
    assert found.error_I is not None
    assert found.variance_I is not None
    x, rebuilt = x_ND.double().numpy(), sae.decode(sae.encode(x_ND)).detach().double().numpy()
    for item in range(7):
        rows = item_N.numpy() == item
        assert float(found.error_I[item]) == pytest.approx(((x - rebuilt)[rows] ** 2).sum(), rel=HELDOUT_METRIC)
        about_mean = ((x[rows] - x.mean(axis=0)) ** 2).sum()
        assert float(found.variance_I[item]) == pytest.approx(about_mean, rel=HELDOUT_METRIC)
    result = {"error_of_contexts": found.error_I.tolist(), "variance_of_contexts": found.variance_I.tolist()}
    assert means(HeldoutEval.items(result))["fvu"] == pytest.approx(found.scores["fvu"], rel=HELDOUT_METRIC)


# ---------------------------------------------------------------- all


@pytest.mark.parametrize("kind", EVALS, ids=[kind.name for kind in EVALS])
def test_results_without_items_have_none(kind: Any) -> None:
    assert list(kind.items({"scores": {}})) == []


def test_tpps_classes_give_its_score() -> None:
    metric = "tpp_threshold_20_total_metric"
    datasets = {"one": {"a": {metric: 0.1}, "b": {metric: 0.3}}, "two": {"c": {metric: 0.6}}}
    assert means(TppEval.items({"eval_result_unstructured": datasets})) == {metric: pytest.approx(0.4)}


def test_what_has_no_value_is_no_item() -> None:
    assert means(of_values("x", [("a", 1.0), ("b", None), ("c", 2.0)])) == {"x": 1.5}
    assert means(of_groups("x", {"g_results": {"a": 1.0, "b": None}, "h": {"c": 2.0, "d": 4.0}})) == {"x": 2.0}
    assert means(of_ratios("x", [1.0, None, 3.0, 4.0], [1.0, 1.0, 2.0, 0.0])) == {"x": pytest.approx(4 / 3)}


@pytest.mark.parametrize(("n", "at_least", "items"), [(1, 1, 1), (96, 97, 1), (970, 97, 10), (10**6, 10, MOST_ITEMS)])
def test_neighbours_are_taken_together(n: int, at_least: int, items: int) -> None:
    place_N = torch.randperm(n, generator=generator(0))
    found = neighbours(place_N, n, at_least)[place_N.argsort()].numpy()
    assert bool((np.diff(found) >= 0).all())
    sizes = np.bincount(found)
    assert len(sizes) == items
    assert sizes.max() - sizes.min() <= 1
