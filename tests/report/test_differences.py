"""Paired differences: against the best SAE of the budget, between any dictionaries, and a study's two sides."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

from ksvd_sae.cli import app
from ksvd_sae.errors import EvaluationError
from ksvd_sae.report.differences import (
    COLUMNS,
    against_best,
    between,
    of_study,
    study_section,
    verdict_section,
    write_verdicts,
)
from ksvd_sae.report.scores import write_csv
from tests.report.test_pivot import frame_of, rows
from tests.report.test_study import row

# ---------------------------------------------------------------- against the best


def seeded(table_of, methods, shifts):
    """Three seeds; a method's FVU moves by its shift times the seed, and by a luck that all share."""
    parts = []
    for seed in (0, 1, 2):
        moved = {}
        for name, sizes in methods.items():
            values = list(sizes)
            values[4] += 0.05 * seed + shifts.get(name, 0.0) * (seed - 1)
            moved[name] = tuple(values)
        parts.append(table_of(moved, seed=seed))
    return pd.concat(parts, ignore_index=True)


def row_of(differences, dictionary, score):
    rows = differences[(differences["of"] == dictionary) & (differences["score"] == score)]
    assert len(rows) == 1
    return rows.iloc[0]


def test_differences_that_hold_in_every_pair(table_of, methods):
    differences = against_best(seeded(table_of, methods, {"db-ksvd": 0.001}), frozenset({"topk-sae"}))
    assert list(differences.columns) == ["view", "k", *COLUMNS]
    ours = row_of(differences, "db-ksvd", "FVU")
    assert (ours["against"], ours["verdict"], ours["n"], ours["over"]) == ("topk-sae", "better", 3, "training seeds")
    assert ours["difference"] == pytest.approx(-0.016)
    assert ours["half_width"] == pytest.approx(4.3027 * 0.001 / 3**0.5, rel=1e-4)
    assert row_of(differences, "random", "FVU")["verdict"] == "worse"
    assert row_of(differences, "db-ksvd", "loss recovered")["verdict"] == "worse", "0.93 against 0.94"


def test_cannot_tell(table_of, methods):
    differences = against_best(seeded(table_of, methods, {"db-ksvd": 0.02}), frozenset({"topk-sae"}))
    assert row_of(differences, "db-ksvd", "FVU")["verdict"] == "cannot tell"


def test_one_seed_has_differences_and_no_verdict(frame):
    differences = against_best(frame, frozenset({"topk-sae"}))
    ours = row_of(differences, "db-ksvd", "FVU")
    assert (ours["n"], ours["verdict"]) == (1, "no error bar")
    assert ours["difference"] == pytest.approx(-0.016)
    assert math.isnan(ours["half_width"])


def test_the_baseline_is_the_best_in_each_column(frame):
    differences = against_best(frame, frozenset({"db-ksvd-refit", "topk-sae"}))
    assert row_of(differences, "db-ksvd", "FVU")["against"] == "db-ksvd-refit"
    assert row_of(differences, "db-ksvd", "loss recovered")["against"] == "topk-sae"
    assert row_of(differences, "topk-sae", "loss recovered")["against"] == "db-ksvd-refit", "the next best, not itself"


def test_only_the_same_budget(frame):
    other = frame[frame["dictionary"] == "topk-sae"].assign(dictionary="topk-40", k=40, value=0.01)
    differences = against_best(pd.concat([frame, other]), frozenset({"topk-sae", "topk-40"}))
    assert row_of(differences, "db-ksvd", "FVU")["against"] == "topk-sae"
    assert differences[differences["of"] == "topk-40"].empty, "no other of its budget"


def test_nothing_to_compare_with(frame):
    assert against_best(frame, frozenset()).empty


def test_verdicts_csv(table_of, methods, tmp_path):
    differences = against_best(seeded(table_of, methods, {"db-ksvd": 0.001}), frozenset({"topk-sae"}))
    write_verdicts(differences, tmp_path / "verdicts.csv")
    first, second, *rest = (tmp_path / "verdicts.csv").read_text().splitlines()
    assert first == "dictionary,view,k,score,baseline,difference,half_width,n,items,over,p,visible,matters,verdict"
    assert (
        second
        == "db-ksvd,signed,20,FVU,topk-sae,-0.016,0.00248414,3,0,training seeds,0.00129955,0.00572781,0.005,better"
    )
    assert len(rest) == len(differences) - 1


def test_verdict_section(table_of, methods):
    differences = against_best(seeded(table_of, methods, {"db-ksvd": 0.001}), frozenset({"topk-sae"}))
    section = verdict_section(differences)
    rows = {row[0]: dict(zip(section.heads, row, strict=True)) for row in section.rows}
    assert rows["best SAE"]["FVU ↓"] == "topk-sae"
    assert rows["db-ksvd"]["FVU ↓"] == "better, -0.016 ± 0.0025"
    assert rows["random"]["FVU ↓"].startswith("worse, +0.469 ±")
    assert rows["db-ksvd"]["dead ↓"].endswith("points")
    assert "topk-sae" not in rows, "it has no other SAE to be compared with"
    assert verdict_section(against_best(table_of(methods), frozenset())) is None


def test_verdict_section_of_one_seed_has_no_verdicts(frame):
    section = verdict_section(against_best(frame, frozenset({"topk-sae"})))
    assert not any(word in cell for row in section.rows for cell in row for word in ("better", "worse", "noise"))


# ---------------------------------------------------------------- between any


SCORES = {"a": (0.10, 0.12, 0.11), "b": (0.20, 0.23, 0.20), "c": (0.30, 0.31, 0.36), "short": (0.5, None, 0.5)}


@pytest.fixture
def contrasted() -> pd.DataFrame:
    differences = [row for seed in range(3) for row in rows(seed=seed, **{name: s[seed] for name, s in SCORES.items()})]
    return frame_of([{**row, "d_sae": 8, "k": 2, "n": 10, "source": "x.json"} for row in differences])


def test_difference_and_interval_are_those_of_the_pairs(contrasted: pd.DataFrame) -> None:
    (row,) = between(contrasted, ["a"], ["b"]).to_dict("records")
    test = stats.ttest_rel(SCORES["a"], SCORES["b"])
    low, high = test.confidence_interval(0.95)
    assert row["score"] == "FVU"
    assert (row["difference"], row["half_width"]) == pytest.approx(((low + high) / 2, (high - low) / 2))
    assert (row["n"], row["over"], row["verdict"]) == (3, "training seeds", "better")
    assert (row["of"], row["against"]) == ("a", "b")


def test_several_are_averaged_within_seeds(contrasted: pd.DataFrame) -> None:
    (row,) = between(contrasted, ["a", "b"], ["c"]).to_dict("records")
    means = [(a + b) / 2 - c for a, b, c in zip(SCORES["a"], SCORES["b"], SCORES["c"], strict=True)]
    assert row["difference"] == pytest.approx(sum(means) / 3)


def test_a_seed_that_one_lacks_is_left_out(contrasted: pd.DataFrame) -> None:
    (row,) = between(contrasted, ["a", "short"], ["b"]).to_dict("records")
    assert row["n"] == 2


def test_what_cannot_be_compared_is_refused(contrasted: pd.DataFrame) -> None:
    with pytest.raises(EvaluationError, match=r"no scores of a dictionary 'shorter'(?s:.*)did you mean 'short'"):
        between(contrasted, ["shorter"], ["a"])
    with pytest.raises(EvaluationError, match="at least one"):
        between(contrasted, [], ["a"])
    with pytest.raises(EvaluationError, match="no score that all of these have"):
        between(frame_of(rows(a=0.1) + rows("core", "kl_div_score", b=0.2)), ["a"], ["b"])


def test_the_command_prints_it(contrasted: pd.DataFrame, tmp_path: Path) -> None:
    write_csv(contrasted, tmp_path / "comparison.csv")
    arguments = ["contrast", str(tmp_path / "comparison.csv"), "--of", "a", "--against", "b"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    assert "## a minus b" in done.output
    (row,) = between(contrasted, ["a"], ["b"]).to_dict("records")
    cells = [cell.strip() for line in done.output.splitlines() if line.startswith("| FVU") for cell in line.split("|")]
    shown = f"better, {row['difference']:+.4f} ± {row['half_width']:.4f}"
    assert cells == ["", "FVU", shown, "training seeds", f"{row['visible']:.3g}", "0.005", "3", ""]
    missing = CliRunner().invoke(app, ["contrast", str(tmp_path / "none.csv"), "--of", "a", "--against", "b"])
    assert missing.exit_code == 1


# ---------------------------------------------------------------- a study's two sides


def study_rows(
    entry: str, kind: str, nats: tuple[float, ...], weighting: str = "none", **changes: Any
) -> list[dict[str, Any]]:
    sae = kind.endswith("_sae")
    coding = "own" if sae else "omp"
    return [
        row(entry, seed, kind=kind, sae=sae, nats_lost=lost, weighting=weighting, **{"coding": coding, **changes})
        for seed, lost in enumerate(nats)
    ]


ROWS = [
    *study_rows("db-ksvd", "db_ksvd", (0.50, 0.52, 0.54), fvu=0.1),
    *study_rows("db-ksvd", "db_ksvd", (0.60, 0.62, 0.64), fvu=0.1, coding="mp"),
    # Fewer atoms than it learned with: no contestant, however good.
    *study_rows("db-ksvd", "db_ksvd", (0.10, 0.10, 0.10), fvu=0.1, coding_k=10),
    *study_rows("topk-sae", "topk_sae", (0.61, 0.60, 0.65), fvu=0.2),
    *study_rows("batchtopk-sae", "batchtopk_sae", (0.61, 0.62, 0.64), fvu=0.2),
    *study_rows("db-ksvd-std", "db_ksvd", (0.40, 0.45, 0.50), "std", fvu=0.1),
    *study_rows("topk-sae-std", "topk_sae", (0.44, 0.45, 0.46), "std", fvu=0.2),
]


def test_the_best_of_either_side_in_each_weighting_and_in_any() -> None:
    table = of_study(ROWS)
    assert list(table.columns) == ["layer", "k", "weighting", *COLUMNS]
    assert list(table["score"]) == ["nats lost", "FVU"] * 3
    names = table.loc[table["score"] == "nats lost", ["weighting", "of", "against", "n"]].to_numpy().tolist()
    assert names == [
        ["none", "db-ksvd, omp", "topk-sae", 3],
        ["std", "db-ksvd-std, omp", "topk-sae-std", 3],
        ["any", "db-ksvd-std, omp", "topk-sae-std", 3],
    ]
    plain, std = table.loc[0], table.loc[2]
    assert (plain["verdict"], plain["difference"]) == ("better", pytest.approx(-0.1))
    assert (std["verdict"], std["difference"]) == ("cannot tell", pytest.approx(0.0))
    # Three differences of standard deviation 0.04: t(2) = 4.303.
    assert std["half_width"] == pytest.approx(4.303 * 0.04 / 3**0.5, rel=1e-3)
    section = study_section(table)
    assert section is not None
    assert section.heads == ("layer", "k", "weighting", "dictionary", "SAE", "seeds", "nats lost", "FVU")
    assert section.rows[0][:6] == ["9", "20", "none", "db-ksvd, omp", "topk-sae", "3"]
    assert section.rows[0][6].startswith("better, -0.100 ± ")
    assert section.rows[0][7] == "better, -0.1000 ± 0.0000"
    assert len(section.rows) == 3


def test_means_over_places_are_those_of_each_seed() -> None:
    """Over two k, of the seeds that both have; where only one k has a weighting there is no mean."""
    ours = {20: (0.50, 0.52, 0.57), 40: (0.30, 0.31)}
    theirs = {20: (0.61, 0.60, 0.65), 40: (0.35, 0.37)}
    of_k = [
        *(row for k, nats in ours.items() for row in study_rows("db-ksvd", "db_ksvd", nats, k=k, coding_k=k)),
        *(row for k, nats in theirs.items() for row in study_rows("topk-sae", "topk_sae", nats, k=k, coding_k=k)),
    ]
    std = [row for row in ROWS if row["weighting"] == "std"]
    means = of_study([*of_k, *std]).query("k == 'mean of 2' and score == 'nats lost'")
    none, whatever = means.to_dict("records")
    assert (none["layer"], none["weighting"], whatever["weighting"]) == (9, "none", "any")
    by_seed = [((0.50 - 0.61) + (0.30 - 0.35)) / 2, ((0.52 - 0.60) + (0.31 - 0.37)) / 2]
    assert (none["of"], none["against"], none["n"]) == ("db-ksvd, omp", "topk-sae", 2)
    assert none["difference"] == pytest.approx(sum(by_seed) / 2)
    assert none["half_width"] == pytest.approx(stats.t.ppf(0.975, 1) * stats.sem(by_seed))
    assert whatever["of"] == "db-ksvd-std, omp, db-ksvd, omp"
    of_layers = of_study([{**row, "layer": layer} for layer in (9, 13) for row in of_k]).query("layer == 'all'")
    assert set(of_layers["k"]) == {"mean of 4"}
    assert of_layers["difference"].iloc[0] == pytest.approx(sum(by_seed) / 2)


def test_places_without_a_seed_in_common_have_no_mean() -> None:
    apart = [
        {**row, "seed": row["seed"] + 10 * (row["k"] == 40)}
        for k in (20, 40)
        for row in [
            *study_rows("db-ksvd", "db_ksvd", (0.5, 0.6), k=k, coding_k=k),
            *study_rows("topk-sae", "topk_sae", (0.7, 0.7), k=k, coding_k=k),
        ]
    ]
    assert set(of_study(apart)["k"]) == {20, 40}


def test_a_setting_of_fewer_seeds_does_not_stand_for_its_side() -> None:
    """In a study that is not done, its one lucky seed would."""
    lucky = study_rows("batchtopk-sae", "batchtopk_sae", (0.2,))
    table = of_study(
        [*study_rows("db-ksvd", "db_ksvd", (0.5, 0.6)), *study_rows("topk-sae", "topk_sae", (0.7, 0.7)), *lucky]
    )
    assert table.loc[0, "against"] == "topk-sae"


def test_nothing_to_compare_is_no_section() -> None:
    assert study_section(of_study(study_rows("db-ksvd", "db_ksvd", (0.5, 0.6)))) is None


def test_one_pair_has_no_verdict() -> None:
    table = of_study([*study_rows("db-ksvd", "db_ksvd", (0.5,)), *study_rows("topk-sae", "topk_sae", (0.7,))])
    section = study_section(table)
    assert section is not None
    assert section.rows[0][6] == "-0.200"
