"""A figure with too many dictionaries to tell apart shows those of one budget, and says so."""

import pandas as pd
import pytest

from ksvd_sae.report.budget import READABLE, of_one_budget

CONTROLS = frozenset({"pca", "random", "random-40", "identity"})


def frame_of(**ks: float) -> pd.DataFrame:
    """Two rows for each training: three seeds at k = 20, one at others."""
    rows = [
        {"dictionary": name.replace("_", "-"), "view": "signed", "k": k, "seed": seed, "metric": metric}
        for name, k in ks.items()
        for seed in range(3 if k == 20 else 1)
        for metric in ("fvu", "l0")
    ]
    return pd.DataFrame(rows)


def many(n: int, k: float, ending: str = "") -> dict[str, float]:
    return {f"method{i}{ending}": k for i in range(n)}


def test_few_are_all_shown() -> None:
    frame = frame_of(**many(READABLE - 1, 20), other=40)
    shown, which = of_one_budget(frame, CONTROLS)
    assert shown is frame
    assert which == ""


def test_many_of_one_budget_are_all_shown() -> None:
    frame = frame_of(**many(READABLE + 5, 20), identity=640)
    shown, which = of_one_budget(frame, CONTROLS)
    assert shown is frame
    assert which == ""


@pytest.mark.parametrize("more", [0, 5])
def test_the_budget_with_the_most_trainings(more: int) -> None:
    """Three seeds each at k = 20 outweigh more dictionaries of one seed at k = 40."""
    frame = frame_of(**many(8, 20), **many(8 + more, 40, "_40"), pca=20, random=20, random_40=40, identity=640)
    shown, which = of_one_budget(frame, CONTROLS)
    assert set(shown["dictionary"]) == {*many(8, 20), "pca", "random", "identity"}
    assert len(shown) == len(frame[frame["dictionary"].isin(shown["dictionary"])])
    assert which == " At k = 20; the table has the other budgets too."


def test_the_smaller_of_two_budgets() -> None:
    shown, which = of_one_budget(frame_of(**many(9, 10, "_10"), **many(9, 40, "_40")), CONTROLS)
    assert set(shown["k"]) == {10}
    assert "k = 10" in which
