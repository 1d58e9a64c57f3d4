"""What a run's evals could see, and how many seeds and items they would need to see what matters."""

import math

import numpy as np
import pandas as pd
from scipy import stats

from ksvd_sae.evals import EVALS
from ksvd_sae.report.items import headline_items
from ksvd_sae.report.sections import Section
from ksvd_sae.report.statistics import LEVEL, POWER, SEEDS
from ksvd_sae.report.tables import headline_scores, shown_headlines

_KIND = {kind.name: kind for kind in EVALS}
_PAIR = ["dictionary", "view"]
_MOST = 100_000


def power(frame: pd.DataFrame, items: pd.DataFrame) -> pd.DataFrame:
    """A row a score with a better direction: spread over seeds and over items, and what follows from it.

    All is of one difference of two dictionaries, 80 % power at a level of 5 %, not corrected.

    Args: frame: the scores, typed. items: what they are means of, see ``items.COLUMNS``.
    Returns: score, items_are, seeds, items (how many there are), sd_seeds (of a dictionary's score over its trainings,
        pooled over dictionaries), sd_items (over items, of the difference of two dictionaries where they share items,
        pooled over pairs; else of one's own, times √2), visible (by these), matters, seeds_needed and items_needed
        (for what matters, were there no end of the other); NaN where it is not known.
    """
    rows = []
    for headline in shown_headlines(frame):
        if headline.better is None:
            continue
        sd_seeds, n_seeds, df_seeds = _over_seeds(headline_scores(frame, headline))
        values = headline_items(items, headline)
        own = _KIND[headline.eval].own_items
        sd_items, n_items, df_items = _of_own_items(values) if own else _of_shared_items(values)
        # Of a difference, squared, by parts. A training's own items are in the spread over seeds.
        parts = [(2 * sd_seeds**2 / n_seeds, df_seeds), (0.0 if own else sd_items**2 / n_items, df_items)]
        known = [(part, df) for part, df in parts if math.isfinite(part)]
        square = sum(part for part, _ in known)
        df = square**2 / sum(part**2 / n for part, n in known if part) if square else math.nan
        rows.append(
            {
                "score": headline.label,
                "items_are": _KIND[headline.eval].items_are,
                "seeds": n_seeds,
                "items": n_items,
                "sd_seeds": sd_seeds,
                "sd_items": sd_items,
                "visible": _factor(df) * math.sqrt(square) if square else math.nan,
                "matters": headline.matters,
                "seeds_needed": _needed(2**0.5 * sd_seeds, headline.matters),
                "items_needed": _needed(sd_items, headline.matters),
            }
        )
    return pd.DataFrame(rows)


def _factor(df: float) -> float:
    return float(stats.t.ppf(1 - LEVEL / 2, df) + stats.t.ppf(POWER, df))


def _needed(sd: float, matters: float | None) -> float:
    """The least n whose mean, of values of that spread, shows what matters."""
    if matters is None or not math.isfinite(sd):
        return math.nan
    n = np.arange(2, _MOST)
    seen = _factors(n - 1) * sd / np.sqrt(n) <= matters
    return float(n[seen.argmax()]) if seen.any() else math.inf


def _factors(df: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    factors: np.ndarray[tuple[int], np.dtype[np.float64]] = stats.t.ppf(1 - LEVEL / 2, df) + stats.t.ppf(POWER, df)
    return factors


def _over_seeds(scores: pd.DataFrame) -> tuple[float, int, int]:
    """Spread of a score over a dictionary's trainings, pooled; how many trainings most have; degrees of freedom."""
    by_seed = scores.dropna(subset=["value", "seed"]).groupby([*_PAIR, "seed"])["value"].mean()
    of_each = by_seed.groupby(_PAIR).agg(["var", "size"])
    several = of_each[of_each["size"] > 1]
    df = int((several["size"] - 1).sum())
    if not df:
        return math.nan, 1, 0
    pooled = float((several["var"] * (several["size"] - 1)).sum() / df)
    return math.sqrt(pooled), int(several["size"].mode()[0]), df


def _of_shared_items(values: pd.DataFrame) -> tuple[float, float, int]:
    """Spread of the difference of two dictionaries over items, each a mean over seeds, pooled over pairs; items."""
    if values.empty:
        return math.nan, math.nan, 0
    table = values.pivot_table(index=_PAIR, columns="item", values="value", aggfunc="mean").dropna(axis=1)
    n, n_items = table.shape
    if n < 2 or n_items < 2:
        return math.nan, float(n_items), 0
    cells = table.to_numpy() - table.to_numpy().mean(axis=0)
    # The mean over all pairs of their difference's variance is twice that about the mean of all.
    square = 2 * float(cells.var(axis=1, ddof=1).sum()) / (n - 1)
    return math.sqrt(square), float(n_items), n_items - 1


def _of_own_items(values: pd.DataFrame) -> tuple[float, float, int]:
    """√2 times the spread over the items of a training, pooled; how many items one has (median)."""
    if values.empty:
        return math.nan, math.nan, 0
    of_each = values.groupby([*_PAIR, *SEEDS], dropna=False)["value"].agg(["var", "size"])
    df = int((of_each["size"] - 1).sum())
    square = float((of_each["var"] * (of_each["size"] - 1)).sum() / df) if df else math.nan
    return math.sqrt(2 * square), float(of_each["size"].median()), df


def power_section(frame: pd.DataFrame, items: pd.DataFrame) -> Section | None:
    """What each eval could see; None where nothing is known of any."""
    table = power(frame, items)
    table = table[table["sd_seeds"].notna() | table["sd_items"].notna()]
    if table.empty:
        return None
    lead = (
        "Spread of scores over trainings (pooled over dictionaries that are no controls); spread of differences over "
        "items (of items of a dictionary's own: √2 times theirs); and the least difference of two dictionaries that a "
        "test at 5 %, not corrected, finds four times in five (visible). Needed to see what matters: so many seeds "
        "(were there no end of items), so many items (were there no end of seeds). Items unknown: the eval's results "
        "do not name them."
    )
    sizes = ("seeds", "items", "SD over seeds", "SD over items", "visible", "matters", "seeds needed", "items needed")
    rows = [
        [
            row["score"],
            str(row["seeds"]),
            f"{row['items']:.0f} {row['items_are']}" if row["items"] > 0 else "unknown",
            *(_text(row[name]) for name in ("sd_seeds", "sd_items", "visible", "matters")),
            *(_count(row[name]) for name in ("seeds_needed", "items_needed")),
        ]
        for row in table.to_dict("records")
    ]
    return Section("What the evals could see", "power", lead, ("score", *sizes), frozenset(sizes), rows)


def _text(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.2g}"


def _count(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:,.0f}" if math.isfinite(value) else f"over {_MOST:,}"
