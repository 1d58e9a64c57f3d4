"""The panel's own results: computed once, and rows for the table."""

import json
import math
from pathlib import Path

import pytest
from torch import Tensor

from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.evals.heldout import heldout_metrics
from ksvd_sae.evals.panel import EvalResults, evaluate_heldout, tidy_rows
from ksvd_sae.sae import DBKSVDSAE
from tests.evals.conftest import CountedPanel
from tests.tiny_saes import tiny_db_ksvd_sae, tiny_topk_sae


@pytest.fixture
def heldout(shards: ActivationShards) -> ActivationShards:
    return ActivationShards.open(shards.folder, "heldout")


def test_heldout_scores_are_kept(heldout: ActivationShards, tmp_path: Path) -> None:
    counted = CountedPanel({"db-ksvd": tiny_db_ksvd_sae, "topk-sae": tiny_topk_sae})
    found = evaluate_heldout(counted.panelists(), heldout, "harvest", tmp_path)
    assert (found.eval, found.n) == ("heldout", 500)
    wanted = heldout_metrics(tiny_db_ksvd_sae(), heldout.batches(500))
    assert found.metrics["db-ksvd"] == pytest.approx(wanted.scores)
    stored = json.loads(found.files["db-ksvd"].read_text())
    assert stored["n_tokens"] == 500
    assert stored["density"] == pytest.approx(wanted.density_F.tolist(), abs=1e-6)
    counted.loads.clear()
    assert evaluate_heldout(counted.panelists(), heldout, "harvest", tmp_path) == found
    assert counted.loads == []


def test_heldout_scores_of_another_name_are_reused(heldout: ActivationShards, tmp_path: Path) -> None:
    counted = CountedPanel({"db-ksvd": tiny_db_ksvd_sae})
    found = evaluate_heldout(counted.panelists(), heldout, "harvest", tmp_path)
    named = CountedPanel({"db-ksvd.s0": tiny_db_ksvd_sae}, contents={"db-ksvd.s0": "content of db-ksvd"})
    again = evaluate_heldout(named.panelists(), heldout, "harvest", tmp_path)
    assert named.loads == []
    assert again.metrics == {"db-ksvd.s0": found.metrics["db-ksvd"]}
    assert again.files["db-ksvd.s0"].name.startswith("db-ksvd.s0-")


def test_heldout_scores_of_something_else_are_computed(heldout: ActivationShards, tmp_path: Path) -> None:
    counted = CountedPanel({"db-ksvd": tiny_db_ksvd_sae, "topk-sae": tiny_topk_sae})
    first = evaluate_heldout(counted.panelists(), heldout, "harvest", tmp_path)
    counted.contents["db-ksvd"] = "learned again"
    again = evaluate_heldout(counted.panelists(), heldout, "harvest", tmp_path)
    assert again.files["db-ksvd"] != first.files["db-ksvd"]
    assert again.files["topk-sae"] == first.files["topk-sae"]
    other = evaluate_heldout(counted.panelists(), heldout, "another harvest", tmp_path)
    assert not set(other.files.values()) & {*first.files.values(), *again.files.values()}
    assert sorted(counted.loads) == ["db-ksvd"] * 3 + ["topk-sae"] * 2


class NotANumber(DBKSVDSAE):
    def decode(self, feature_acts: Tensor) -> Tensor:
        return super().decode(feature_acts) * math.nan


def test_an_error_that_is_no_number_is_no_score(heldout: ActivationShards, tmp_path: Path) -> None:
    counted = CountedPanel({"broken": lambda: NotANumber(tiny_db_ksvd_sae().cfg)})
    found = evaluate_heldout(counted.panelists(), heldout, "harvest", tmp_path)
    assert found.metrics["broken"]["fvu"] is None
    assert found.metrics["broken"]["l0"] == pytest.approx(4)


def test_tidy_rows() -> None:
    results = EvalResults(
        "core", "some-text", 33, {"a": Path("made") / "a-0.json"}, {"a": {"ce_loss_score": 0.5, "kl_div_score": None}}
    )
    facts = {"a": {"dictionary": "a", "view": "signed", "d_sae": 8, "k": 2, "l0": 1.5, "seed": 4}}
    first, second = tidy_rows(results, facts)
    assert first == {
        "dictionary": "a",
        "view": "signed",
        "d_sae": 8,
        "k": 2,
        "l0": 1.5,
        "eval": "core",
        "data": "some-text",
        "metric": "ce_loss_score",
        "value": 0.5,
        "seed": 4,
        "eval_seed": None,
        "n": 33,
        "source": "a-0.json",
    }
    assert second["metric"] == "kl_div_score"
    assert math.isnan(second["value"])


def test_rows_of_two_views_have_the_dictionarys_name() -> None:
    files = {"a": Path("a-0.json"), "a.split": Path("a.split-1.json")}
    results = EvalResults("heldout", "", 9, files, {"a": {"l0": 2.0}, "a.split": {"l0": 2.0}})
    facts = {
        "a": {"dictionary": "a", "view": "signed", "d_sae": 8, "k": 2, "l0": 2.0, "seed": 0},
        "a.split": {"dictionary": "a", "view": "split", "d_sae": 16, "k": 2, "l0": 2.0, "seed": 0},
    }
    rows = tidy_rows(results, facts)
    assert [(row["dictionary"], row["view"], row["d_sae"], row["source"]) for row in rows] == [
        ("a", "signed", 8, "a-0.json"),
        ("a", "split", 16, "a.split-1.json"),
    ]
