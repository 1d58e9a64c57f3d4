"""Paired differences: who is compared with whom (three ways to choose), and one table of rows and one way to show it.

A row is one score of one against another, seed by seed; see ``COLUMNS``. Columns before these say where it holds.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.base import Column
from ksvd_sae.report.headline import HEADLINES
from ksvd_sae.report.scores import check_table, typed_frame
from ksvd_sae.report.sections import Section
from ksvd_sae.report.statistics import SEEDS, difference
from ksvd_sae.report.tables import headline_scores, shown_headlines, summary
from ksvd_sae.store import atomic_path

# of minus against, mean over n pairs of seeds (``over`` which), half_width of its 95 % interval; verdict: better,
# worse, within noise, or no error bar where there is a single pair.
COLUMNS = ["score", "of", "against", "difference", "half_width", "n", "over", "verdict"]
ANY = "any"
_SETTING = ["entry", "coding", "coding_k"]
_STUDY_SCORES = {"nats lost": "nats_lost", "FVU": "fvu"}
_IN_PERCENT = {headline.label for headline in HEADLINES if headline.style == "percent"}


def _row(
    score: str, better: Literal["lower", "higher"], of: tuple[str, pd.DataFrame], against: tuple[str, pd.DataFrame]
) -> dict[str, Any]:
    """One row. Args: of, against: a name, and scores as ``statistics.difference`` takes them."""
    compared = difference(of[1], against[1], better)
    gap = compared.estimate
    facts = {"difference": gap.mean, "half_width": gap.half_width, "n": gap.n, "over": gap.over}
    return {"score": score, "of": of[0], "against": against[0], **facts, "verdict": compared.verdict}


# ---------------------------------------------------------------- whom to compare


def against_best(frame: pd.DataFrame, baselines: frozenset[str]) -> pd.DataFrame:
    """Every dictionary against the baseline that does best in the score among those of the same budget k.

    This leans towards the baselines: the best of several is partly the luckiest.

    Args:
        frame: the scores, see ``scores.COLUMNS``.
        baselines: names of the SAEs to compare with. A dictionary is not compared with itself.
    Returns: view, k and COLUMNS, for each headline score that has a better direction, dictionary by dictionary; empty
        if nothing can be compared.
    """
    check_table(frame)
    typed, table = typed_frame(frame), summary(frame)
    rows = [
        row
        for headline in shown_headlines(typed)
        if headline.better
        for row in _against_best_in(headline, headline.better, typed, table, baselines)
    ]
    order = {name: rank for rank, name in enumerate(dict.fromkeys(table["dictionary"]))}
    differences = pd.DataFrame(rows, columns=["view", "k", *COLUMNS])
    return differences.sort_values("of", key=lambda names: names.map(order), kind="stable").reset_index(drop=True)


def _against_best_in(
    headline: Column,
    better: Literal["lower", "higher"],
    typed: pd.DataFrame,
    table: pd.DataFrame,
    baselines: frozenset[str],
) -> list[dict[str, Any]]:
    scores = dict(list(headline_scores(typed, headline).groupby(["dictionary", "view"])[[*SEEDS, "value"]]))
    rows: list[dict[str, Any]] = []
    for own in table.dropna(subset=[headline.label]).to_dict("records"):
        same = (table["k"] == own["k"]) & table["dictionary"].isin(baselines) & table[headline.label].notna()
        rivals = table[same & ~((table["dictionary"] == own["dictionary"]) & (table["view"] == own["view"]))]
        if rivals.empty:
            continue
        best = rivals.loc[rivals[headline.label].idxmin() if better == "lower" else rivals[headline.label].idxmax()]
        of, against = ((r["dictionary"], scores[r["dictionary"], r["view"]]) for r in (own, best))
        rows.append({"view": own["view"], "k": own["k"], **_row(headline.label, better, of, against)})
    return rows


def between(frame: pd.DataFrame, ones: Sequence[str], others: Sequence[str]) -> pd.DataFrame:
    """The mean score of ``ones`` minus that of ``others``, for every score that all of them have.

    Args: frame: the scores, see ``scores.COLUMNS``. Of a dictionary with two views the first counts.
    Returns: COLUMNS.
    Raises: EvaluationError: no such dictionary, none given, or no score that all have.
    """
    check_table(frame)
    typed = typed_frame(frame)
    known = list(dict.fromkeys(typed["dictionary"]))
    for name in [*ones, *others]:
        if name not in known:
            near = get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
            raise EvaluationError(
                f"contrast: no scores of a dictionary {name!r}",
                cure=f"did you mean {' or '.join(map(repr, near))}?",
            )
    if not ones or not others:
        raise EvaluationError("contrast: nothing to compare", cure="name at least one dictionary on either side")
    rows = []
    for headline in shown_headlines(typed):
        of, against = ((", ".join(names), _mean(typed, headline, names)) for names in (ones, others))
        if headline.better and not of[1].empty and not against[1].empty:
            rows.append(_row(headline.label, headline.better, of, against))
    if not rows:
        raise EvaluationError("contrast: there is no score that all of these have", got=", ".join([*ones, *others]))
    return pd.DataFrame(rows, columns=COLUMNS)


def _mean(typed: pd.DataFrame, headline: Column, names: Sequence[str]) -> pd.DataFrame:
    """Mean over dictionaries, seed by seed; only seeds that all of them have a finite score of."""
    scores = headline_scores(typed, headline)
    scores = scores[scores["dictionary"].isin(names)].dropna(subset=["value"])
    first = scores.groupby("dictionary")["view"].transform(lambda views: min(views, key=lambda view: view == "split"))
    scores = scores[scores["view"] == first]
    by_seed = scores.groupby(SEEDS, dropna=False, sort=True)["value"].agg(["mean", "size"]).reset_index()
    return by_seed[by_seed["size"] == len(set(names))].rename(columns={"mean": "value"})[[*SEEDS, "value"]]


def of_study(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """A study's best dictionary against its best SAE, for each layer, k and weighting, and for any weighting.

    On either side stands the setting with the least mean nats lost, so both are the best of several and equally lucky.

    Args: rows: as a study writes them. Only settings that code as many atoms as they learned with take part.
    Returns: layer, k, weighting and COLUMNS, for nats lost and FVU.
    """
    frame = pd.DataFrame(rows)
    frame = frame[frame["coding_k"] == frame["k"]]
    is_sae = frame["sae"].astype(bool)
    lines = []
    for (layer, k), group in frame.groupby(["layer", "k"], sort=True):
        for weighting in [*dict.fromkeys(group["weighting"]), ANY]:
            of_it = group if weighting == ANY else group[group["weighting"] == weighting]
            saes, dictionaries = of_it[is_sae[of_it.index]], of_it[~is_sae[of_it.index]]
            if saes.empty or dictionaries.empty:
                continue
            place = {"layer": layer, "k": k, "weighting": weighting}
            own, theirs = _best(dictionaries), _best(saes)
            lines += [
                {**place, **_row(score, "lower", *((_name(g), _seeded(g, column)) for g in (own, theirs)))}
                for score, column in _STUDY_SCORES.items()
            ]
    return pd.DataFrame(lines, columns=["layer", "k", "weighting", *COLUMNS])


def _best(settings: pd.DataFrame) -> pd.DataFrame:
    """Rows of the setting whose mean nats lost are least, of those with the most seeds."""
    groups = [group for _, group in settings.groupby(_SETTING, sort=False)]
    most = max(group["seed"].nunique() for group in groups)
    return min((g for g in groups if g["seed"].nunique() == most), key=lambda group: float(group["nats_lost"].mean()))


def _name(group: pd.DataFrame) -> str:
    row = group.iloc[0]
    return str(row["entry"]) if row["coding"] == "own" else f"{row['entry']}, {row['coding']}"


def _seeded(group: pd.DataFrame, column: str) -> pd.DataFrame:
    return pd.DataFrame({"seed": group["seed"], "eval_seed": float("nan"), "value": group[column]})


# ---------------------------------------------------------------- to keep and to show


def write_verdicts(differences: pd.DataFrame, path: Path) -> None:
    """Write ``against_best``'s rows as CSV, who is compared under ``dictionary`` and with whom under ``baseline``."""
    table = differences.rename(columns={"of": "dictionary", "against": "baseline"})
    columns = ["dictionary", "view", "k", "score", "baseline", "difference", "half_width", "n", "over", "verdict"]
    with atomic_path(path) as temporary:
        table[columns].to_csv(temporary, index=False, float_format="%.6g")


def verdict_section(differences: pd.DataFrame) -> Section | None:
    """``against_best``'s rows: a row a dictionary, a column a score; None if there are none.

    Above the dictionaries of each k stands which SAE was the baseline of each column.
    """
    if differences.empty:
        return None
    scores = [headline for headline in HEADLINES if headline.label in set(differences["score"])]
    labels = [headline.label for headline in scores]
    rows: list[list[str]] = []
    for k, group in differences.groupby("k", sort=True):
        best = group.groupby("score")["against"].agg(lambda names: names.mode()[0])
        rows.append(["best SAE", "", str(k), *(best.get(label, "") for label in labels)])
        rows += _pivot(group, ["of", "view", "k"], labels)
    seeds = "paired by training and evaluation seed; ±: half-width of the 95 % interval (Student's t)"
    lead = (
        "Each dictionary minus the SAE that does best in the column among those of the same k. Better and worse: the "
        f"interval of the difference leaves out 0 ({seeds}). A bare difference is of a single pair: no verdict."
    )
    heads = ("dictionary", "view", "k", *(headline.heading for headline in scores))
    return Section("Against the best SAE", "verdicts", lead, heads, frozenset({"k"}), rows)


def study_section(differences: pd.DataFrame) -> Section | None:
    """``of_study``'s rows: a row a layer, k and weighting; None if there are none."""
    if differences.empty:
        return None
    lead = (
        "The setting of least nats lost among the dictionaries minus that among the SAEs: mean over pairs of the same "
        "training seed ± half-width of the 95 % interval (Student's t). Better, worse: the interval leaves out 0; "
        "negative differences are in the dictionary's favour."
    )
    places = {"layer": "layer", "k": "k", "weighting": "weighting", "of": "dictionary", "against": "SAE", "n": "seeds"}
    rows = _pivot(differences, list(places), list(_STUDY_SCORES), {"nats lost": 3, "FVU": 4})
    heads = (*places.values(), *_STUDY_SCORES)
    return Section("Against the SAEs", "against", lead, heads, frozenset({"layer", "k", "seeds"}), rows)


def contrast_section(differences: pd.DataFrame) -> Section:
    """``between``'s rows: a row a score."""
    of, against = differences.iloc[0][["of", "against"]]
    rows = [[row["score"], difference_text(row, 4), str(row["n"])] for row in differences.to_dict("records")]
    lead = "Mean over pairs of seeds ± half-width of the 95 % interval (Student's t)."
    heads = ("score", "difference", "pairs")
    return Section(f"{of} minus {against}", "contrast", lead, heads, frozenset({"pairs"}), rows)


def _pivot(
    differences: pd.DataFrame, places: Sequence[str], scores: Sequence[str], decimals: Mapping[str, int] | None = None
) -> list[list[str]]:
    """A row for each value of the columns ``places``, and in it a text for each score."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for row in differences.to_dict("records"):
        texts = rows.setdefault(tuple(str(row[name]) for name in places), {})
        texts[row["score"]] = difference_text(row, (decimals or {}).get(row["score"]))
    return [[*place, *(texts.get(score, "–") for score in scores)] for place, texts in rows.items()]


def difference_text(row: Mapping[Hashable, Any], decimals: int | None = None) -> str:
    """A verdict with its difference and interval; a bare difference where there is a single pair.

    Args: decimals: None: three significant digits, and what is shown in percent as points.
    """
    percent = decimals is None and row["score"] in _IN_PERCENT
    mean, width = (100 * row[name] if percent else row[name] for name in ("difference", "half_width"))
    unit = " points" if percent else ""
    shown = f"{mean:+.3g}" if decimals is None else f"{mean:+.{decimals}f}"
    if not math.isfinite(width):
        return shown + unit
    return f"{row['verdict']}, {shown} ± {width:{'.2g' if decimals is None else f'.{decimals}f'}}{unit}"
