"""Rows for the table from an eval's results."""

import math
from pathlib import Path

from ksvd_sae.evals.base import EvalResults
from ksvd_sae.evals.panel import tidy_rows


def test_tidy_rows() -> None:
    results = EvalResults(
        "core",
        "some-text",
        33,
        {"a": Path("made/core/settings/a-0.json")},
        {"a": {"ce_loss_score": 0.5, "kl_div_score": None}},
    )
    facts = {"a": {"dictionary": "a", "view": "signed", "d_sae": 8, "k": 2, "l0": 1.5, "seed": 4}}
    first, second = tidy_rows(results, facts, Path("made"))
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
        "source": "settings/a-0.json",
    }
    assert second["metric"] == "kl_div_score"
    assert math.isnan(second["value"])


def test_rows_of_two_views_have_the_dictionarys_name() -> None:
    files = {"a": Path("heldout/a-0.json"), "a.split": Path("heldout/a.split-1.json")}
    results = EvalResults("heldout", "", 9, files, {"a": {"l0": 2.0}, "a.split": {"l0": 2.0}})
    facts = {
        "a": {"dictionary": "a", "view": "signed", "d_sae": 8, "k": 2, "l0": 2.0, "seed": 0},
        "a.split": {"dictionary": "a", "view": "split", "d_sae": 16, "k": 2, "l0": 2.0, "seed": 0},
    }
    rows = tidy_rows(results, facts, Path())
    assert [(row["dictionary"], row["view"], row["d_sae"], row["source"]) for row in rows] == [
        ("a", "signed", 8, "a-0.json"),
        ("a", "split", 16, "a.split-1.json"),
    ]
