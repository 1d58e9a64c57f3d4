"""Which dictionaries figures and atoms in context show where there are more than can be told apart: those of one k."""

import pandas as pd

# Bars, dots or labels that a reader still follows in one figure.
READABLE = 16


def of_one_budget(frame: pd.DataFrame, controls: frozenset[str] = frozenset()) -> tuple[pd.DataFrame, str]:
    """The rows to draw, and what the caption is to say of it.

    Up to ``READABLE`` dictionaries, and where real methods have one budget, all of them. Else those of the budget with
    the most trainings (of two, the smaller), with its controls and those that are of no real method's budget.
    """
    entries = frame.drop_duplicates(["dictionary", "view", "seed"])
    real = entries[~entries["dictionary"].isin(controls)]
    budgets = real["k"].dropna().value_counts()
    if len(entries.drop_duplicates(["dictionary", "view"])) <= READABLE or len(budgets) < 2:
        return frame, ""
    k = min(budgets[budgets == budgets.max()].index)
    shared = frame["dictionary"].isin(controls) & ~frame["k"].isin(budgets.index)
    return frame[(frame["k"] == k) | shared], f" At k = {k:g}; the table has the other budgets too."
