"""Several seeds: one training each, scores side by side, means and intervals in the table."""

import math
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ksvd_sae.errors import ConfigError, EvaluationError
from ksvd_sae.evals import panel
from ksvd_sae.evals.config import EvaluationConfig, SparseProbingConfig
from ksvd_sae.evals.panel import EvalResults, evaluate_saebench, result_files, tidy_rows
from ksvd_sae.report.scores import read_csv
from ksvd_sae.report.tables import intervals, summary
from ksvd_sae.run.config import RunConfig, parse_config
from ksvd_sae.run.replicas import replicas
from tests.run.test_pipeline import RAW, place, run_in
from tests.tiny_saes import one_thread

__all__ = ["place"]  # a fixture


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def config_with(seeds: list[int], **dictionaries: dict[str, Any]) -> RunConfig:
    raw = deepcopy(RAW)
    raw["dictionaries"] |= dictionaries
    return parse_config({**raw, "training_seeds": seeds})


def test_one_training_a_seed_where_something_is_drawn() -> None:
    own = {**RAW["dictionaries"]["db-ksvd"], "seed": 7}
    found = {replica.label: replica for replica in replicas(config_with([3, 4], own=own))}
    assert list(found) == [
        "db-ksvd.s3",
        "db-ksvd.s4",
        "topk-sae.s3",
        "topk-sae.s4",
        "pca",
        "random.s3",
        "random.s4",
        "own",
    ]
    assert {replica.name for replica in found.values()} == {*RAW["dictionaries"], "own"}
    assert [found[label].config.seed for label in ("db-ksvd.s3", "random.s4", "own")] == [3, 4, 7]  # type: ignore[union-attr]
    assert found["pca"].seed is None


@pytest.mark.parametrize("seeds", [[], [5]])
def test_one_seed_keeps_the_names(seeds: list[int]) -> None:
    found = list(replicas(config_with(seeds)))
    assert [replica.label for replica in found] == list(RAW["dictionaries"])
    assert [replica.seed for replica in found] == [*([seeds[0] if seeds else 0] * 2), None, seeds[0] if seeds else 0]


def test_seed_named_twice() -> None:
    with pytest.raises(ConfigError, match="names a seed twice"):
        config_with([1, 1])


def test_name_that_a_training_would_have() -> None:
    with pytest.raises(ConfigError, match=r"a training of 'db-ksvd'"):
        config_with([1, 2], **{"db-ksvd.s2": {"kind": "pca", "k": 2}})
    assert config_with([1, 3], **{"db-ksvd.s2": {"kind": "pca", "k": 2}})


def test_seeds_to_the_table(place: Path) -> None:
    run = run_in(place, config_with([0, 1, 2]))
    trained = run.train()
    assert len({t.folder for t in trained}) == 3 * 3 + 1
    run.evaluate()
    run.compare()
    frame = read_csv(place / "results" / "tiny-run" / "comparison.csv")
    fvu = frame[(frame["eval"] == "heldout") & (frame["metric"] == "fvu")]
    by_seed = fvu[fvu["dictionary"] == "db-ksvd"].set_index("seed")["value"]
    assert sorted(by_seed.index) == [0, 1, 2]
    assert by_seed.nunique() == 3, "three different dictionaries"
    means, widths = (table.set_index("dictionary") for table in (summary(frame), intervals(frame)))
    assert means.loc["db-ksvd", "FVU"] == pytest.approx(by_seed.mean())
    assert widths.loc["db-ksvd", "FVU"] == pytest.approx(4.3027 * by_seed.std() / 3**0.5, rel=1e-4)
    assert math.isnan(float(widths.loc["pca", "FVU"]))  # type: ignore[arg-type]
    assert pd.isna(fvu[fvu["dictionary"] == "pca"]["seed"]).all()
    text = (place / "results" / "tiny-run" / "comparison.md").read_text()
    assert "Training seeds: 0, 1, 2." in text
    assert "One training seed" not in text


def test_first_seed_is_the_training_that_there_was(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More seeds later cost only their own trainings and scores."""
    run = run_in(place)
    before = {t.name: t.folder for t in run.train()}
    more = {(t.name, t.seed): t.folder for t in run_in(place, config_with([0, 1])).train()}
    assert more["db-ksvd", 0] == before["db-ksvd"]
    assert more["random", 0] == before["random"]
    assert more["pca", None] == before["pca"]


# ---------------------------------------------------------------- evaluation seeds


def test_evals_that_draw_run_once_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    def probe(config: SparseProbingConfig, place: Any) -> EvalResults:
        ran.append(config.seed)
        return EvalResults("sparse_probing", "texts", 9, {"a": Path(f"a-{ran[-1]}.json")}, {"a": {"accuracy": 0.5}})

    def core(*_: Any) -> EvalResults:
        return EvalResults("core", "texts", 9, {"a": Path("a-core.json")}, {"a": {"loss": 1.0}})

    monkeypatch.setitem(panel._EVALS, "sparse_probing", probe)
    monkeypatch.setitem(panel._EVALS, "core", core)
    setting: Any = None
    config = EvaluationConfig(sparse_probing=SparseProbingConfig(seed=8), seeds=[1, 2])
    results = evaluate_saebench([], config, setting, "heldout", Path())
    assert ran == [1, 2]
    assert [(r.eval, r.seed) for r in results] == [("core", None), ("sparse_probing", 1), ("sparse_probing", 2)]
    assert result_files(results)["sparse_probing"] == {"a, seed 1": "a-1.json", "a, seed 2": "a-2.json"}
    assert result_files(results)["core"] == {"a": "a-core.json"}
    facts = {"a": {"dictionary": "a", "view": "signed", "d_sae": 4, "k": 2, "l0": 2.0, "seed": 0}}
    assert [row["eval_seed"] for r in results for row in tidy_rows(r, facts)] == [None, 1, 2]
    own = evaluate_saebench([], config.model_copy(update={"seeds": []}), setting, "heldout", Path())
    assert [r.seed for r in own] == [None, 8]


def test_an_eval_that_fails_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def failing(*_: Any) -> EvalResults:
        raise EvaluationError("core: no score for a", cause="the disk is full")

    def probe(config: SparseProbingConfig, place: Any) -> EvalResults:
        ran.append(f"probing {config.seed}")
        if config.seed == 2:
            raise EvaluationError("sparse_probing: no score for b")
        return EvalResults("sparse_probing", "texts", 9, {}, {})

    monkeypatch.setitem(panel._EVALS, "core", failing)
    monkeypatch.setitem(panel._EVALS, "sparse_probing", probe)
    setting: Any = None
    with pytest.raises(EvaluationError, match="core: no score for a"):
        evaluate_saebench([], EvaluationConfig(seeds=[1]), setting, "heldout", Path())
    assert ran == ["probing 1"]
    with pytest.raises(EvaluationError, match="2 evals failed") as raised:
        evaluate_saebench([], EvaluationConfig(seeds=[2, 3]), setting, "heldout", Path())
    assert ran == ["probing 1", "probing 2", "probing 3"]
    assert "the disk is full" in str(raised.value)
    assert "no score for b" in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("seeds", [1, 1], "names a seed twice"),
        ("seeds", [-1], "greater than or equal to 0"),
        ("llm_cache_gb", float("inf"), "finite"),
        ("llm_cache_gb", -1, "greater than or equal to 0"),
        ("llm_memory_gb", float("nan"), "finite|greater than or equal to 0"),
    ],
)
def test_bad_evaluation_settings_are_refused_before_anything_runs(key: str, value: Any, words: str) -> None:
    raw = deepcopy(RAW)
    raw["evaluation"][key] = value
    with pytest.raises(ConfigError, match=words):
        parse_config(raw)


def test_negative_training_seed() -> None:
    with pytest.raises(ConfigError, match="greater than or equal to 0"):
        config_with([-1])
