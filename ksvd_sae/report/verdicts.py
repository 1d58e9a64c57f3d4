"""Every dictionary against the best baseline, score by score: paired differences, and whether they are more than noise.

The baseline of a column is the SAE that does best in it among those of the same budget k, so the comparison leans
towards the SAEs: the best of several is partly the luckiest.
"""

import math
from collections.abc import Hashable
from typing import Any

import pandas as pd

from ksvd_sae.report.headline import HEADLINES, Headline
from ksvd_sae.report.scores import check_table, typed_frame
from ksvd_sae.report.sections import Section
from ksvd_sae.report.statistics import SEEDS, difference
from ksvd_sae.report.tables import headline_scores, shown_headlines, summary

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
    rows = [
        row
        for headline in shown_headlines(typed)
        if headline.better
        for row in _column(typed, table, headline, baselines)
    ]
    found = pd.DataFrame(rows, columns=COLUMNS)
    order = {name: rank for rank, name in enumerate(dict.fromkeys(table["dictionary"]))}
    return found.sort_values("dictionary", key=lambda names: names.map(order), kind="stable").reset_index(drop=True)


def _column(
    typed: pd.DataFrame, table: pd.DataFrame, headline: Headline, baselines: frozenset[str]
) -> list[dict[str, Any]]:
    assert headline.better is not None
    scores = dict(
        list(headline_scores(typed, headline)[["dictionary", "view", *SEEDS, "value"]].groupby(["dictionary", "view"]))
    )
    rows: list[dict[str, Any]] = []
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


def verdict_section(found: pd.DataFrame) -> Section | None:
    """The verdicts as a table: a row a dictionary, a column a score; None if there are none.

    Above the dictionaries of each k stands which SAE was the baseline of each column.
    """
    if found.empty:
        return None
    scores = [headline for headline in HEADLINES if headline.label in set(found["score"])]
    rows: list[list[str]] = []
    for k, group in found.groupby("k", sort=True):
        cells = {(row["dictionary"], row["view"], row["score"]): row for row in group.to_dict("records")}
        best = group.groupby("score")["baseline"].agg(lambda names: names.mode()[0])
        rows.append(["best SAE", "", str(k), *(best.get(headline.label, "") for headline in scores)])
        for name, view in dict.fromkeys((name, view) for name, view, _ in cells):
            texts = [_text(cells.get((name, view, headline.label)), headline) for headline in scores]
            rows.append([name, view, str(k), *texts])
    seeds = "paired by training and evaluation seed; ±: half-width of the 95 % interval (Student's t)"
    lead = (
        "Each dictionary minus the SAE that does best in the column among those of the same k. Better and worse: the "
        f"interval of the difference leaves out 0 ({seeds}). A bare difference is of a single pair: no verdict."
    )
    heads = ("dictionary", "view", "k", *(headline.heading for headline in scores))
    return Section("Against the best SAE", "verdicts", lead, heads, frozenset({"k"}), rows)


def _text(row: dict[Hashable, Any] | None, headline: Headline) -> str:
    if row is None:
        return "–"
    percent = headline.style == "percent"
    mean, width = (100 * row[name] if percent else row[name] for name in ("difference", "half_width"))
    unit = " points" if percent else ""
    if not math.isfinite(width):
        return f"{mean:+.3g}{unit}"
    return f"{row['verdict']}, {mean:+.3g} ± {width:.2g}{unit}"
