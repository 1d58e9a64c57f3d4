"""Scores of yes-or-no predictions are scikit-learn's, bit for bit where they are counts."""

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import metrics
from sklearn.exceptions import UndefinedMetricWarning

from ksvd_sae.evals.absorption import binary_metrics


@st.composite
def predictions(draw: st.DrawFn) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Truths and scores; few different scores, so that there are ties."""
    n = draw(st.integers(1, 40))
    true_N = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    return true_N, np.array(draw(st.lists(st.integers(-3, 3), min_size=n, max_size=n)), dtype=np.float32) / 7


def of_sklearn(name: str, true_N: Any, other_N: Any) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        return float(getattr(metrics, name)(true_N, other_N))


@pytest.mark.parametrize("name", ["f1_score", "precision_score", "recall_score"])
@given(case=predictions())
def test_counts(name: str, case: tuple[Any, Any]) -> None:
    true_N, score_N = case
    assert getattr(binary_metrics, name)(true_N, score_N > 0) == of_sklearn(name, true_N, score_N > 0)


@given(case=predictions())
def test_area_under_the_curve(case: tuple[Any, Any]) -> None:
    found, wanted = binary_metrics.roc_auc_score(*case), of_sklearn("roc_auc_score", *case)
    assert found == pytest.approx(wanted, abs=1e-12, nan_ok=True)
