"""Several seeds: one training each, scores side by side, means and intervals in the table."""

import math
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ksvd_sae.errors import ConfigError, EvaluationError
from ksvd_sae.evals import EvaluationConfig
from ksvd_sae.evals.base import EvalResults, EvalSetting
from ksvd_sae.evals.core import CoreEval
from ksvd_sae.evals.panel import result_files, run_evals, tidy_rows
from ksvd_sae.evals.sparse_probing import SparseProbingEval
from ksvd_sae.report.compare import compare
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
    assert [found[label].method.own_seed for label in ("db-ksvd.s3", "random.s4", "own")] == [3, 4, 7]
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
    compare(run)
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

    def probe(self: SparseProbingEval, *_: Any) -> EvalResults:
        ran.append(self.seed)
        files = {"a": Path(f"sparse_probing/{ran[-1]}/a.json")}
        return EvalResults("sparse_probing", "texts", 9, files, {"a": {"accuracy": 0.5}}, self.seed)

    def core(*_: Any) -> EvalResults:
        return EvalResults("core", "texts", 9, {"a": Path("core/0/a.json")}, {"a": {"loss": 1.0}})

    monkeypatch.setattr(SparseProbingEval, "run", probe)
    monkeypatch.setattr(CoreEval, "run", core)
    setting = EvalSetting("some/model", "float32", "cpu", Path(), "", Path())
    config = EvaluationConfig(heldout=None, stability=None, sparse_probing=SparseProbingEval(seed=8), seeds=[1, 2])
    results = list(run_evals([], config.seeded(), setting, Path()))
    assert ran == [1, 2]
    assert [(r.eval, r.seed) for r in results] == [("core", None), ("sparse_probing", 1), ("sparse_probing", 2)]
    files = result_files(results, Path())
    assert files == {"core": {"a": "0/a.json"}, "sparse_probing": {"a, seed 1": "1/a.json", "a, seed 2": "2/a.json"}}
    facts = {"a": {"dictionary": "a", "view": "signed", "d_sae": 4, "k": 2, "l0": 2.0, "seed": 0}}
    assert [row["eval_seed"] for r in results for row in tidy_rows(r, facts, Path())] == [None, 1, 2]
    own = run_evals([], config.model_copy(update={"seeds": []}).seeded(), setting, Path())
    assert [r.seed for r in own] == [None, 8]


def test_an_eval_that_fails_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def failing(*_: Any) -> EvalResults:
        raise EvaluationError("core: no score for a", cause="the disk is full")

    def probe(self: SparseProbingEval, *_: Any) -> EvalResults:
        ran.append(f"probing {self.seed}")
        if self.seed == 2:
            raise EvaluationError("sparse_probing: no score for b")
        return EvalResults("sparse_probing", "texts", 9, {}, {}, self.seed)

    monkeypatch.setattr(CoreEval, "run", failing)
    monkeypatch.setattr(SparseProbingEval, "run", probe)
    setting = EvalSetting("some/model", "float32", "cpu", Path(), "", Path())
    with pytest.raises(EvaluationError, match="core: no score for a"):
        list(run_evals([], EvaluationConfig(heldout=None, seeds=[1]).seeded(), setting, Path()))
    assert ran == ["probing 1"]
    with pytest.raises(EvaluationError, match="2 evals failed") as raised:
        list(run_evals([], EvaluationConfig(heldout=None, seeds=[2, 3]).seeded(), setting, Path()))
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
