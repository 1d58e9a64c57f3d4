"""Every dictionary against the best baseline, score by score: paired differences, and whether they are more than noise.

The baseline of a column is the SAE that does best in it among those of the same budget k, so the comparison leans
towards the SAEs: the best of several is partly the luckiest.
"""

import pandas as pd

from ksvd_sae.reporting.headline import HEADLINES, Headline
from ksvd_sae.reporting.scores import check_table, typed_frame
from ksvd_sae.reporting.statistics import SEEDS, difference
from ksvd_sae.reporting.tables import headline_scores, summary

COLUMNS = ["dictionary", "view", "k", "score", "baseline", "difference", "half_width", "n", "over", "verdict"]


def verdicts(frame: pd.DataFrame, baselines: frozenset[str]) -> pd.DataFrame:
    """One row a dictionary, view and headline score that has a better direction.

    Args:
        frame: the scores, see ``scores.COLUMNS``.
        baselines: names of the SAEs to compare with. A dictionary is not compared with itself.
    Returns: COLUMNS; difference is the dictionary's mean minus the baseline's, over paired seeds; half_width of its
        95 % interval; verdict 'better', 'worse', 'within noise', or 'no error bar' where there is a single pair. Empty
        if nothing can be compared.
    """
    check_table(frame)
    typed, table = typed_frame(frame), summary(frame)
    rows = [row for headline in HEADLINES if headline.better for row in _column(typed, table, headline, baselines)]
    found = pd.DataFrame(rows, columns=COLUMNS)
    order = {name: rank for rank, name in enumerate(dict.fromkeys(table["dictionary"]))}
    return found.sort_values("dictionary", key=lambda names: names.map(order), kind="stable").reset_index(drop=True)


def _column(
    typed: pd.DataFrame, table: pd.DataFrame, headline: Headline, baselines: frozenset[str]
) -> list[dict[str, object]]:
    assert headline.better is not None
    scores = dict(
        list(headline_scores(typed, headline)[["dictionary", "view", *SEEDS, "value"]].groupby(["dictionary", "view"]))
    )
    rows: list[dict[str, object]] = []
    for own in table.dropna(subset=[headline.label]).to_dict("records"):
        same = (table["k"] == own["k"]) & table["dictionary"].isin(baselines) & table[headline.label].notna()
        rivals = table[same & ~((table["dictionary"] == own["dictionary"]) & (table["view"] == own["view"]))]
        if rivals.empty:
            continue
        best = rivals.loc[
            rivals[headline.label].idxmin() if headline.better == "lower" else rivals[headline.label].idxmax()
        ]
        pair = (own["dictionary"], own["view"]), (best["dictionary"], best["view"])
        found = difference(scores[pair[0]], scores[pair[1]], headline.better)
        rows.append(
            {
                "dictionary": own["dictionary"],
                "view": own["view"],
                "k": own["k"],
                "score": headline.label,
                "baseline": best["dictionary"],
                "difference": found.estimate.mean,
                "half_width": found.estimate.half_width,
                "n": found.estimate.n,
                "over": found.estimate.over,
                "verdict": found.verdict,
            }
        )
    return rows
