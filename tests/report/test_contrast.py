"""Paired differences between any dictionaries of a table of scores."""

from pathlib import Path

import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

from ksvd_sae.cli import app
from ksvd_sae.errors import EvaluationError
from ksvd_sae.report.contrast import contrast
from ksvd_sae.report.scores import write_csv
from tests.report.test_pivot import frame_of, rows

SCORES = {"a": (0.10, 0.12, 0.11), "b": (0.20, 0.23, 0.20), "c": (0.30, 0.31, 0.36), "short": (0.5, None, 0.5)}


@pytest.fixture
def frame() -> pd.DataFrame:
    found = [row for seed in range(3) for row in rows(seed=seed, **{name: s[seed] for name, s in SCORES.items()})]
    return frame_of([{**row, "d_sae": 8, "k": 2, "n": 10, "source": "x.json"} for row in found])


def test_difference_and_interval_are_those_of_the_pairs(frame: pd.DataFrame) -> None:
    (row,) = contrast(frame, ["a"], ["b"]).to_dict("records")
    test = stats.ttest_rel(SCORES["a"], SCORES["b"])
    low, high = test.confidence_interval(0.95)
    assert row["score"] == "FVU"
    assert (row["difference"], row["half_width"]) == pytest.approx(((low + high) / 2, (high - low) / 2))
    assert (row["n"], row["verdict"]) == (3, "better")


def test_several_are_averaged_within_seeds(frame: pd.DataFrame) -> None:
    (row,) = contrast(frame, ["a", "b"], ["c"]).to_dict("records")
    means = [(a + b) / 2 - c for a, b, c in zip(SCORES["a"], SCORES["b"], SCORES["c"], strict=True)]
    assert row["difference"] == pytest.approx(sum(means) / 3)


def test_a_seed_that_one_lacks_is_left_out(frame: pd.DataFrame) -> None:
    (row,) = contrast(frame, ["a", "short"], ["b"]).to_dict("records")
    assert row["n"] == 2


def test_what_cannot_be_compared_is_refused(frame: pd.DataFrame) -> None:
    with pytest.raises(EvaluationError, match=r"no scores of a dictionary 'shorter'(?s:.*)did you mean 'short'"):
        contrast(frame, ["shorter"], ["a"])
    with pytest.raises(EvaluationError, match="at least one"):
        contrast(frame, [], ["a"])
    with pytest.raises(EvaluationError, match="no score that all of these have"):
        contrast(frame_of(rows(a=0.1) + rows("core", "kl_div_score", b=0.2)), ["a"], ["b"])


def test_the_command_prints_it(frame: pd.DataFrame, tmp_path: Path) -> None:
    write_csv(frame, tmp_path / "comparison.csv")
    arguments = ["contrast", str(tmp_path / "comparison.csv"), "--of", "a", "--against", "b"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    assert "3 pairs: better" in done.output
    missing = CliRunner().invoke(app, ["contrast", str(tmp_path / "none.csv"), "--of", "a", "--against", "b"])
    assert missing.exit_code == 1
