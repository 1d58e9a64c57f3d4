"""Intervals are scipy's, training seeds are the sample; a verdict needs a corrected p and a test that could see it."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ksvd_sae.report.statistics import Better, Difference, Items, difference, estimate, half_width, holm, judged


def verdict(found: Difference, better: Better, matters: float | None = None) -> str:
    (said,) = judged([found], better, matters)
    return said.verdict


def scores(rows: list[tuple[float | None, float | None, float]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["seed", "eval_seed", "value"])
    return frame.astype({"seed": "Int64", "eval_seed": "Int64"})


def test_half_width_is_scipys() -> None:
    values = [0.1, 0.4, 0.2, 0.5]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert half_width(values) == pytest.approx((high - low) / 2)
    assert math.isnan(half_width([0.3]))
    assert math.isnan(half_width([]))


def test_training_seeds_are_the_sample() -> None:
    found = estimate(scores([(0, 1, 1.0), (0, 2, 3.0), (1, 1, 4.0), (1, 2, 4.0)]))
    assert (found.mean, found.n, found.over) == (3.0, 2, "training seeds")
    assert found.half_width == pytest.approx(half_width([2.0, 4.0]))


def test_one_training_has_the_interval_of_its_evaluations() -> None:
    found = estimate(scores([(0, 1, 1.0), (0, 2, 2.0), (0, 3, 3.0)]))
    assert (found.mean, found.n, found.over) == (2.0, 3, "evaluation seeds")
    assert found.half_width == pytest.approx(half_width([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("seed", [0, None])
def test_one_score_has_no_interval(seed: int | None) -> None:
    found = estimate(scores([(seed, None, 0.5)]))
    assert (found.mean, found.n, found.over) == (0.5, 1, "nothing")
    assert math.isnan(found.half_width)


def test_digits_that_float32_has_not_are_no_spread() -> None:
    equal = estimate(scores([(0, None, 0.1 + 0.2), (1, None, 0.3), (2, None, 0.3 + 1e-9)]))
    assert equal.mean == pytest.approx(0.3)
    assert equal.half_width == 0
    assert estimate(scores([(0, None, 0.1), (1, None, -0.1 + 1e-9)])).mean == 0
    small = estimate(scores([(0, None, 1e-5), (1, None, 2e-5)]))
    assert small.mean == pytest.approx(1.5e-5)
    assert small.half_width > 0


def test_what_is_not_finite_is_left_out() -> None:
    found = estimate(scores([(0, None, 1.0), (1, None, math.nan), (2, None, math.inf), (3, None, 3.0)]))
    assert (found.mean, found.n) == (2.0, 2)
    assert math.isnan(estimate(scores([(0, None, math.nan)])).mean)


def test_a_shared_swing_does_not_hide_a_difference() -> None:
    """Luck that both have cancels in pairs: the means' intervals overlap, that of the difference is tight."""
    luck = np.random.default_rng(0).normal(0, 1, 5)
    ours = scores([(0, i, float(v)) for i, v in enumerate(luck + 0.1 + 0.001 * np.arange(5))])
    theirs = scores([(0, i, float(v)) for i, v in enumerate(luck)])
    assert estimate(ours).half_width > 0.5
    found = difference(ours, theirs)
    assert found.mean == pytest.approx(0.102)
    assert verdict(found, "higher") == "better"
    assert verdict(found, "lower") == "worse"
    assert verdict(difference(theirs, ours), "higher") == "worse"


def test_pairs_are_scipys() -> None:
    ours = scores([(0, None, 1.0), (1, None, 2.0), (2, None, 3.0)])
    theirs = scores([(0, None, 1.5), (1, None, 1.0), (2, None, 3.4)])
    found = difference(ours, theirs)
    assert verdict(found, "higher") == "cannot tell"
    test = stats.ttest_rel([1.0, 2.0, 3.0], [1.5, 1.0, 3.4])
    paired = test.confidence_interval(0.95)
    assert found.half_width == pytest.approx((paired.high - paired.low) / 2)
    assert found.p == pytest.approx(test.pvalue)


def test_one_pair_has_no_verdict() -> None:
    assert verdict(difference(scores([(0, None, 1.0)]), scores([(0, None, 2.0)])), "lower") == "no error bar"


def test_seeds_of_one_alone_are_left_out() -> None:
    ours = scores([(0, 7, 1.0), (1, 7, 2.0)])
    theirs = scores([(1, 7, 5.0), (2, 7, 9.0)])
    found = difference(ours, theirs)
    assert (found.mean, found.n) == (-3.0, 1)
    nothing = difference(ours, scores([(5, 7, 1.0)]))
    assert (nothing.n, verdict(nothing, "lower")) == (0, "no error bar")


@pytest.mark.parametrize("which", ["ours", "theirs"])
def test_without_a_training_seed_against_every_training(which: str) -> None:
    pca = scores([(None, 1, 1.0), (None, 2, 2.0)])
    trained = scores([(s, e, 10.0 + s + e) for s in (0, 1, 2) for e in (1, 2)])
    found = difference(pca, trained) if which == "ours" else difference(trained, pca)
    sign = 1 if which == "theirs" else -1
    assert (found.n, found.over) == (3, "training seeds")
    assert found.mean == pytest.approx(sign * 11.0)
    assert verdict(found, "higher") == ("better" if which == "theirs" else "worse")


def test_identical_scores_are_level() -> None:
    same = scores([(0, None, 1.0), (1, None, 2.0)])
    assert verdict(difference(same, same), "higher") == "cannot tell"
    assert verdict(difference(same, same), "higher", matters=0.01) == "level"


# ---------------------------------------------------------------- items


def items(cells_SI: "np.ndarray[Any, Any]", first_seed: int | None = 0, names: str = "") -> pd.DataFrame:
    rows = [
        (None if first_seed is None else first_seed + s, 42, f"{names}{i}", float(value))
        for s, row in enumerate(cells_SI)
        for i, value in enumerate(row)
    ]
    frame = pd.DataFrame(rows, columns=["seed", "eval_seed", "item", "value"])
    return frame.astype({"seed": "Int64", "eval_seed": "Int64"})


def means(of: pd.DataFrame) -> pd.DataFrame:
    return of.groupby(["seed", "eval_seed"], dropna=False)["value"].mean().reset_index()


def compared(ours: pd.DataFrame, theirs: pd.DataFrame, shared: bool = True) -> Difference:
    return difference(means(ours), means(theirs), Items(ours, theirs, shared))


def test_shared_items_and_seeds_are_both_in_the_error() -> None:
    """By the definition, slowly: variances of the means along either way, Welch and Satterthwaite's degrees."""
    draw = np.random.default_rng(3)
    ours, theirs = draw.normal(0, 1, (3, 8)) + 0.5, draw.normal(0, 1, (3, 8))
    found = compared(items(ours), items(theirs))
    gaps = [[ours[s][i] - theirs[s][i] for i in range(8)] for s in range(3)]
    of_seeds = [sum(row) / 8 for row in gaps]
    of_items = [sum(gaps[s][i] for s in range(3)) / 3 for i in range(8)]
    parts = []
    for values in (of_seeds, of_items):
        middle = sum(values) / len(values)
        parts.append(sum((v - middle) ** 2 for v in values) / (len(values) - 1) / len(values))
    square = sum(parts)
    df = square**2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 7)
    assert (found.n, found.n_items, found.over) == (3, 8, "seeds and items")
    assert found.mean == pytest.approx(sum(of_seeds) / 3)
    assert (found.error**2, found.df) == (pytest.approx(square), pytest.approx(df))
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, df) * square**0.5)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(found.mean) / square**0.5, df))


def test_one_training_has_an_interval_over_items_and_no_verdict() -> None:
    ours, theirs = np.arange(6.0)[None] + 10, np.arange(6.0)[None] * 1.01
    found = compared(items(ours), items(theirs))
    gaps = (ours - theirs)[0]
    assert (found.n, found.over) == (1, "items")
    assert found.half_width == pytest.approx(half_width(gaps.tolist()))
    assert verdict(found, "higher") == "cannot tell"


def test_items_of_each_dictionary_are_in_the_spread_over_seeds() -> None:
    draw = np.random.default_rng(4)
    ours, theirs = draw.normal(0, 1, (3, 50)), draw.normal(0, 1, (3, 40))
    found = compared(items(ours), items(theirs, names="other "), shared=False)
    assert (found.n, found.n_items, found.over) == (3, 40, "seeds and items")
    assert found.half_width == pytest.approx(difference(means(items(ours)), means(items(theirs))).half_width)
    one = compared(items(ours[:1]), items(theirs[:1], names="other "), shared=False)
    welch = stats.ttest_ind(ours[0], theirs[0], equal_var=False)
    assert (one.over, one.p) == ("items", pytest.approx(welch.pvalue))


def test_scores_of_other_items_are_not_paired_by_item() -> None:
    draw = np.random.default_rng(5)
    ours, theirs = draw.normal(0, 1, (3, 8)), draw.normal(0, 1, (3, 8))
    assert compared(items(ours), items(theirs[:, :7])).over == "training seeds"
    assert compared(items(ours)[1:], items(theirs)).over == "training seeds"


def test_without_a_training_seed_its_items_pair_with_every_training() -> None:
    draw = np.random.default_rng(6)
    ours, theirs = draw.normal(0, 1, (3, 8)), draw.normal(0, 1, (1, 8))
    found = compared(items(ours), items(theirs, first_seed=None))
    assert (found.n, found.over) == (3, "seeds and items")
    assert found.mean == pytest.approx(float(ours.mean() - theirs.mean()))


# Spread of seeds, items and what is left, in units of the last; share of intervals that hold the truth.
REGIMES = {"seeds": (1.0, 0.2), "items": (0.0, 1.0), "neither": (0.0, 0.0), "both": (3**0.5, None)}


@pytest.mark.slow
@pytest.mark.parametrize("n_items", [8, 40, 700])
@pytest.mark.parametrize("regime", REGIMES)
def test_intervals_cover_what_they_say(regime: str, n_items: int) -> None:
    """3 seeds; docs/results.md has the table. Where neither spreads, the interval is known to be wide."""
    of_seeds, of_items = REGIMES[regime]
    left = 1.0
    if of_items is None:
        # As much of the mean's variance from each.
        of_items, left = n_items**0.5, (3 * n_items) ** 0.5
    draw, n, held = np.random.default_rng(0), 400, 0
    theirs = items(np.zeros((3, n_items)))
    for _ in range(n):
        cells = draw.normal(0, of_seeds, (3, 1)) + draw.normal(0, of_items, (1, n_items))
        found = compared(items(cells + draw.normal(0, left, cells.shape)), theirs)
        held += abs(found.mean) <= found.half_width
    # Three standard errors of a share of 0.94 of 400 draws are 0.036, of 0.975 they are 0.023.
    assert 0.94 - 0.036 <= held / n <= (1.0 if regime == "neither" else 0.998)


# ---------------------------------------------------------------- verdicts


def test_holm_is_the_definition() -> None:
    ps = [0.01, 0.04, math.nan, 0.03, 0.005]
    # 4 · 0.005, 3 · 0.01, 2 · 0.03, and no smaller than the one before.
    assert holm(ps) == pytest.approx([0.03, 0.06, math.nan, 0.06, 0.02], nan_ok=True)
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def gap(mean: float, error: float, df: float = 20) -> Difference:
    return Difference(mean, error, df, 3, "training seeds")


def test_visible_is_found_four_times_in_five() -> None:
    """By the noncentral t distribution, which the formula comes near."""
    found = gap(0.0, 0.1, 30)
    shift = found.visible(0.05) / 0.1
    critical = stats.t.ppf(0.975, 30)
    assert 1 - stats.nct.cdf(critical, 30, shift) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(
    ("mean", "error", "among", "matters", "wanted"),
    [
        (0.10, 0.01, 1, 0.02, "better"),
        (-0.10, 0.01, 1, 0.02, "worse"),
        (0.005, 0.003, 1, 0.02, "level"),
        # Significant, and less than what matters.
        (0.010, 0.003, 1, 0.02, "level"),
        # Significant alone, not among ten; significant, but of a size that such a test misses more often than not.
        (0.025, 0.010, 1, 0.02, "cannot tell"),
        (0.025, 0.010, 1, None, "better"),
        (0.025, 0.010, 10, None, "cannot tell"),
        (0.0, 0.05, 1, 0.02, "cannot tell"),
    ],
)
def test_verdicts(mean: float, error: float, among: int, matters: float | None, wanted: str) -> None:
    gaps = [gap(mean, error), *[gap(0.0, 0.01)] * (among - 1), gap(1.0, math.nan)]
    said = judged(gaps, "higher", matters)
    assert said[0].verdict == wanted
    assert said[-1].verdict == "no error bar"
    assert said[0].visible == pytest.approx(gap(mean, error).visible(0.05 / among))
