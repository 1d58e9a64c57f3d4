"""Intervals are scipy's, training seeds are the sample, and a verdict needs an interval without 0."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ksvd_sae.report.statistics import difference, estimate, half_width


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
    found = difference(ours, theirs, "higher")
    assert found.verdict == "better"
    assert found.estimate.mean == pytest.approx(0.102)
    assert difference(ours, theirs, "lower").verdict == "worse"
    assert difference(theirs, ours, "higher").verdict == "worse"


def test_within_noise() -> None:
    ours = scores([(0, None, 1.0), (1, None, 2.0), (2, None, 3.0)])
    theirs = scores([(0, None, 1.5), (1, None, 1.0), (2, None, 3.4)])
    found = difference(ours, theirs, "higher")
    assert found.verdict == "within noise"
    paired = stats.ttest_rel([1.0, 2.0, 3.0], [1.5, 1.0, 3.4]).confidence_interval(0.95)
    assert found.estimate.half_width == pytest.approx((paired.high - paired.low) / 2)


def test_one_pair_has_no_verdict() -> None:
    assert difference(scores([(0, None, 1.0)]), scores([(0, None, 2.0)]), "lower").verdict == "no error bar"


def test_seeds_of_one_alone_are_left_out() -> None:
    ours = scores([(0, 7, 1.0), (1, 7, 2.0)])
    theirs = scores([(1, 7, 5.0), (2, 7, 9.0)])
    found = difference(ours, theirs, "lower")
    assert (found.estimate.mean, found.estimate.n) == (-3.0, 1)
    nothing = difference(ours, scores([(5, 7, 1.0)]), "lower")
    assert (nothing.estimate.n, nothing.verdict) == (0, "no error bar")


@pytest.mark.parametrize("which", ["ours", "theirs"])
def test_without_a_training_seed_against_every_training(which: str) -> None:
    pca = scores([(None, 1, 1.0), (None, 2, 2.0)])
    trained = scores([(s, e, 10.0 + s + e) for s in (0, 1, 2) for e in (1, 2)])
    found = difference(pca, trained, "higher") if which == "ours" else difference(trained, pca, "higher")
    sign = 1 if which == "theirs" else -1
    assert (found.estimate.n, found.estimate.over) == (3, "training seeds")
    assert found.estimate.mean == pytest.approx(sign * 11.0)
    assert found.verdict == ("better" if which == "theirs" else "worse")


def test_identical_scores_are_within_noise() -> None:
    same = scores([(0, None, 1.0), (1, None, 2.0)])
    assert difference(same, same, "higher").verdict == "within noise"
