"""Scores of a yes-or-no prediction, as scikit-learn defines them, without what it checks at every call.

Absorption asks for eight thousand of them on a thousand words for each dictionary; nine tenths of scikit-learn's time
is spent on looking at its arguments. Names and arguments are those of ``sklearn.metrics``, as SAEBench calls it.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Truth = NDArray[np.bool_]


def precision_score(true_N: Truth, predicted_N: Truth) -> float:
    """Share of the predicted that are true; 0 if none is predicted."""
    return _share(_hits(true_N, predicted_N), int(predicted_N.sum()))


def recall_score(true_N: Truth, predicted_N: Truth) -> float:
    """Share of the true that are predicted; 0 if none is true."""
    return _share(_hits(true_N, predicted_N), int(true_N.sum()))


def f1_score(true_N: Truth, predicted_N: Truth) -> float:
    """Harmonic mean of precision and recall; 0 if none is true and none predicted."""
    return _share(2 * _hits(true_N, predicted_N), int(true_N.sum()) + int(predicted_N.sum()))


def roc_auc_score(true_N: Truth, score_N: NDArray[np.float32]) -> float:
    """How often a true one has the higher score than a false one, ties counted half; NaN if one kind is missing."""
    n_true = int(true_N.sum())
    n_pairs = n_true * (len(true_N) - n_true)
    if n_pairs == 0:
        return float("nan")
    return float((rankdata(score_N)[true_N].sum() - n_true * (n_true + 1) / 2) / n_pairs)


def _hits(true_N: Truth, predicted_N: Truth) -> int:
    return int(np.count_nonzero(true_N & predicted_N))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
