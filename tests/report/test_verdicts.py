"""Against the best SAE of the same budget, pair by pair; no verdict without an interval."""

import math

import pandas as pd
import pytest

from ksvd_sae.report.verdicts import COLUMNS, verdict_section, verdicts


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


def row_of(found, dictionary, score):
    rows = found[(found["dictionary"] == dictionary) & (found["score"] == score)]
    assert len(rows) == 1
    return rows.iloc[0]


def test_differences_that_hold_in_every_pair(table_of, methods):
    found = verdicts(seeded(table_of, methods, {"db-ksvd": 0.001}), frozenset({"topk-sae"}))
    assert list(found.columns) == COLUMNS
    ours = row_of(found, "db-ksvd", "FVU")
    assert (ours["baseline"], ours["verdict"], ours["n"], ours["over"]) == ("topk-sae", "better", 3, "training seeds")
    assert ours["difference"] == pytest.approx(-0.016)
    assert ours["half_width"] == pytest.approx(4.3027 * 0.001 / 3**0.5, rel=1e-4)
    assert row_of(found, "random", "FVU")["verdict"] == "worse"
    assert row_of(found, "db-ksvd", "loss recovered")["verdict"] == "worse", "0.93 against 0.94"


def test_within_noise(table_of, methods):
    found = verdicts(seeded(table_of, methods, {"db-ksvd": 0.02}), frozenset({"topk-sae"}))
    assert row_of(found, "db-ksvd", "FVU")["verdict"] == "within noise"


def test_one_seed_has_differences_and_no_verdict(frame):
    found = verdicts(frame, frozenset({"topk-sae"}))
    ours = row_of(found, "db-ksvd", "FVU")
    assert (ours["n"], ours["verdict"]) == (1, "no error bar")
    assert ours["difference"] == pytest.approx(-0.016)
    assert math.isnan(ours["half_width"])


def test_the_baseline_is_the_best_in_each_column(frame):
    found = verdicts(frame, frozenset({"db-ksvd-refit", "topk-sae"}))
    assert row_of(found, "db-ksvd", "FVU")["baseline"] == "db-ksvd-refit"
    assert row_of(found, "db-ksvd", "loss recovered")["baseline"] == "topk-sae"
    assert row_of(found, "topk-sae", "loss recovered")["baseline"] == "db-ksvd-refit", "the next best, not itself"


def test_only_the_same_budget(frame):
    other = frame[frame["dictionary"] == "topk-sae"].assign(dictionary="topk-40", k=40, value=0.01)
    found = verdicts(pd.concat([frame, other]), frozenset({"topk-sae", "topk-40"}))
    assert row_of(found, "db-ksvd", "FVU")["baseline"] == "topk-sae"
    assert found[found["dictionary"] == "topk-40"].empty, "no other of its budget"


def test_nothing_to_compare_with(frame):
    assert verdicts(frame, frozenset()).empty


def test_section(table_of, methods):
    found = verdicts(seeded(table_of, methods, {"db-ksvd": 0.001}), frozenset({"topk-sae"}))
    section = verdict_section(found)
    rows = {row[0]: dict(zip(section.heads, row, strict=True)) for row in section.rows}
    assert rows["best SAE"]["FVU ↓"] == "topk-sae"
    assert rows["db-ksvd"]["FVU ↓"] == "better, -0.016 ± 0.0025"
    assert rows["random"]["FVU ↓"].startswith("worse, +0.469 ±")
    assert rows["db-ksvd"]["dead ↓"].endswith("points")
    assert "topk-sae" not in rows, "it has no other SAE to be compared with"
    assert verdict_section(verdicts(table_of(methods), frozenset())) is None


def test_section_of_one_seed_has_no_verdicts(frame):
    section = verdict_section(verdicts(frame, frozenset({"topk-sae"})))
    assert not any(word in cell for row in section.rows for cell in row for word in ("better", "worse", "noise"))
