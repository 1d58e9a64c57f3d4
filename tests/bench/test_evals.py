"""``bench evals`` on a tiny model: both run the same panel, ours asks the model less, and a difference is seen."""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from sae_bench.evals.absorption import main as absorption
from sae_bench.evals.core import main as core
from sae_bench.evals.sparse_probing import main as probing
from sklearn.exceptions import UndefinedMetricWarning
from threadpoolctl import threadpool_limits
from transformer_lens import HookedTransformer

from ksvd_sae.bench import tables
from ksvd_sae.bench.evals import EVALS, SAE_BENCH, TOGETHER, Panel, compare, largest_difference, run
from ksvd_sae.bench.rows import OURS, append
from ksvd_sae.bench.settings import Settings
from ksvd_sae.errors import ConfigError, EvaluationError
from ksvd_sae.evals import panel as evals_panel
from ksvd_sae.evals.absorption import AbsorptionEval
from ksvd_sae.evals.base import Eval, EvalSetting, Panelist
from ksvd_sae.evals.core import CoreEval
from ksvd_sae.evals.llm_cache import TensorCache
from ksvd_sae.evals.sparse_probing import SparseProbingEval
from ksvd_sae.offline import bbc_news
from tests.tiny_letters import (
    MODEL_NAME,
    WORDS,
    letters_db_ksvd_sae,
    letters_model,
    letters_tokenizer,
    letters_topk_sae,
)
from tests.tolerances import SAEBENCH_SCORE

# A latent that never fires has no precision: sklearn says so of most of them.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{UndefinedMetricWarning.__module__}.UndefinedMetricWarning"),
    pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning"),
]
TEXT = "letters-heldout"
ASKED: dict[str, Eval] = {
    "core": CoreEval(dataset=TEXT, context_tokens=12, batch_contexts=4, reconstruction_batches=2, sparsity_batches=2),
    "sparse_probing": SparseProbingEval(
        datasets=[bbc_news.NAME], train_set_size=20, test_set_size=10, context_tokens=12, k_values=[1, 2]
    ),
    "absorption": AbsorptionEval(max_k_value=2, k_sparse_probe_num_epochs=5, precalc_k_sparse_probe_sae_acts=True),
}
Row = dict[str, Any]


@pytest.fixture(autouse=True, scope="module")
def _one_blas_thread() -> Iterator[None]:
    with threadpool_limits(1):
        yield


@pytest.fixture
def block_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Makes the tiny model the one that is found by name; an entry for each run of its first block."""
    model, runs = letters_model(letters_tokenizer()), list[int]()
    model.blocks[0].register_forward_hook(lambda *_: runs.append(0))
    monkeypatch.setattr(HookedTransformer, "from_pretrained_no_processing", lambda *_, **__: model)
    for module in (absorption, core, probing):
        monkeypatch.setattr(module, "gc", SimpleNamespace(collect=lambda: 0))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return runs


def write_data(folder: Path) -> None:
    draw = random.Random(0)
    rows = {f"{TEXT}/train": [{"text": " ".join(draw.choices(WORDS, k=15))} for _ in range(60)]}
    for split, n in (("train", 30), ("test", 15)):
        rows[f"{bbc_news.NAME}/{split}"] = [
            {"text": " ".join(draw.choices([word for word in WORDS if word[0] in letters], k=8)), "label": label}
            for label, letters in enumerate(("abcde", "fghij", "klmno", "pqrst", "uvwxy"))
            for _ in range(n)
        ]
    for name, found in rows.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in found))


@pytest.fixture
def panel(block_runs: list[int], tmp_path: Path) -> Panel:
    write_data(tmp_path / "data")
    cache = TensorCache(tmp_path / "not-used", 10**8)
    setting = EvalSetting(MODEL_NAME, "float32", "cpu", tmp_path / "data", "0123", tmp_path / "not-used", cache)
    makers = {"db-ksvd": letters_db_ksvd_sae, "topk-sae": letters_topk_sae}
    panelists = [Panelist(name, name, make) for name, make in makers.items()]
    return Panel(panelists, {"n": 2, "d": 32, "m": 64, "k": 4}, ASKED, setting, "letters")


def test_both_give_the_same_scores_and_ours_asks_the_model_less(
    panel: Panel, block_runs: list[int], tmp_path: Path
) -> None:
    counts: dict[str, int] = {}
    rows: list[Row] = []
    for peers in ("none", "all"):
        (tmp_path / peers).mkdir()
        block_runs.clear()
        rows = compare(panel, Settings(peers=peers), tmp_path / peers, [])
        counts[peers] = len(block_runs)
        assert {row["impl"] for row in rows} == ({OURS} if peers == "none" else {OURS, SAE_BENCH})
    assert counts["all"] - counts["none"] > 1.5 * counts["none"], "two dictionaries, one asking"
    assert [(row["case"], row["impl"]) for row in rows] == [
        (case, impl) for case in (*EVALS, TOGETHER) for impl in (SAE_BENCH, OURS)
    ]
    for row in rows:
        assert row["largest_difference"] <= SAEBENCH_SCORE
        assert row["n_scores"] > 10
        assert row["repeats"] == 1
        assert row["versions"]["sae-bench"]
        assert 0 < row["further_s"] < row["median_s"]
    for impl in (OURS, SAE_BENCH):
        seconds = [row["median_s"] for row in rows if row["impl"] == impl]
        assert seconds[-1] == pytest.approx(sum(seconds[:-1]))
    assert not (tmp_path / "not-used").exists(), "a run found what another one left"
    append(tmp_path / "bench" / "evals.jsonl", rows)
    table = tables.render(tmp_path / "bench")
    assert f"| {TOGETHER} |" in table
    faster = rows[-2]["median_s"] / rows[-1]["median_s"]
    further = rows[-2]["further_s"] / rows[-1]["further_s"]
    assert f" {faster:.3g} × " in table
    assert f" {further:.3g} × " in table


def test_ours_side_by_side_as_the_config_asks(panel: Panel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here one after the other, as processes would not find the tiny model."""
    asked: list[int] = []

    def in_this_process(tasks: Iterable[Callable[[], Any]], processes: int) -> Iterator[Any]:
        asked.append(processes)
        return (task() for task in tasks)

    monkeypatch.setattr(evals_panel, "side_by_side", in_this_process)
    rows = compare(replace(panel, processes=2), Settings(), tmp_path, [])
    assert asked == [2]
    *_, stock_summed, ours_summed, stock, ours = rows
    assert ours["case"] == stock["case"] == f"{TOGETHER}, 2 at a time"
    assert stock["median_s"] == stock_summed["median_s"]
    assert ours["median_s"] != ours_summed["median_s"]
    assert ours["n_scores"] == ours_summed["n_scores"]
    assert ours["largest_difference"] <= SAEBENCH_SCORE
    assert ours["peak_mib"] is None
    append(tmp_path / "bench" / "evals.jsonl", rows)
    assert f"| {TOGETHER}, 2 at a time |" in tables.render(tmp_path / "bench")


def test_a_score_that_differs_is_seen(panel: Panel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours reading a hook's activation a thousandth too large."""
    get = TensorCache.get

    def altered(self: TensorCache, *arguments: Any) -> Any:
        kept = get(self, *arguments)
        return kept and {name: 1.001 * tensor for name, tensor in kept.items()}

    monkeypatch.setattr(TensorCache, "get", altered)
    only_core = replace(panel, evals={"core": ASKED["core"]})
    rows = compare(only_core, Settings(), tmp_path, [])
    assert [row["case"] for row in rows] == ["core", "core"]
    assert rows[0]["largest_difference"] == rows[1]["largest_difference"] > 1e-4


def test_differences_are_relative_for_large_values_and_numbers_must_be_in_both() -> None:
    assert largest_difference({"a": 0.5, "b": 2000.0, "c": None}, {"a": 0.501, "b": 2002.0, "c": None}) == (
        pytest.approx(1e-3, rel=0.01)
    )
    assert largest_difference({}, {}) == 0
    for ours, theirs in (({"a": 1.0}, {"a": None}), ({"a": None}, {"a": 1.0}), ({}, {"a": 1.0}), ({"a": 1.0}, {})):
        with pytest.raises(EvaluationError, match="1 scores are numbers in one run only, such as a"):
            largest_difference(ours, theirs)


@pytest.mark.parametrize("options", [{"samples": 10}, {"small": True}, {"data": "planted"}, {"k": 3}])
def test_options_without_meaning_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="has no meaning here"):
        run(Settings(**options))
