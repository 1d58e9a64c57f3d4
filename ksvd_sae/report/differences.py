"""Paired differences: who is compared with whom (three ways to choose), and one table of rows and one way to show it.

A row is one score of one against another, seed by seed; see ``COLUMNS``. Columns before these say where it holds.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals import EVALS
from ksvd_sae.evals.base import Column
from ksvd_sae.report.headline import HEADLINES
from ksvd_sae.report.items import headline_items
from ksvd_sae.report.scores import check_table, typed_frame
from ksvd_sae.report.sections import Section
from ksvd_sae.report.statistics import SEEDS, Better, Items, difference, judged
from ksvd_sae.report.tables import headline_scores, shown_headlines, summary
from ksvd_sae.store import atomic_path

# of minus against, mean over n pairs of seeds, half_width of its 95 % interval, which is over seeds, items or both
# (``over``; items: how many). p: corrected for the number of verdicts in a score's column. visible: the difference that
# such a test finds four times in five. matters: see Column. verdict: see ``statistics.judged``.
_GAP = ["score", "of", "against", "difference", "half_width", "n", "items", "over"]
COLUMNS = [*_GAP, "p", "visible", "matters", "verdict"]
ANY = "any"
_SETTING = ["entry", "coding", "coding_k"]
_STUDY_SCORES = {"nats lost": "nats_lost", "FVU": "fvu"}
# Of scores by their headlines.
MATTERS = {headline.label: headline.matters for headline in HEADLINES}
ITEMS_ARE = {kind.name: kind.items_are for kind in EVALS}
OWN_ITEMS = {kind.name: kind.own_items for kind in EVALS}
_IN_PERCENT = {headline.label for headline in HEADLINES if headline.style == "percent"}


@dataclass(frozen=True)
class _Pair:
    """Two scores to compare: a name, and scores as ``statistics.difference`` takes them. place: further columns."""

    place: dict[str, Any]
    of: tuple[str, pd.DataFrame]
    against: tuple[str, pd.DataFrame]
    items: Items | None = None


def _rows(score: str, better: Better, matters: float | None, pairs: Sequence[_Pair]) -> list[dict[str, Any]]:
    """A score's rows: verdicts of a column are corrected for their number together."""
    gaps = [difference(pair.of[1], pair.against[1], pair.items) for pair in pairs]
    rows = []
    for pair, gap, said in zip(pairs, gaps, judged(gaps, better, matters), strict=True):
        names = {"score": score, "of": pair.of[0], "against": pair.against[0]}
        facts = {"difference": gap.mean, "half_width": gap.half_width, "n": gap.n, "items": gap.n_items}
        verdict = {"p": said.p, "visible": said.visible, "matters": matters, "verdict": said.verdict}
        rows.append({**pair.place, **names, **facts, "over": gap.over, **verdict})
    return rows


# ---------------------------------------------------------------- whom to compare


def against_best(frame: pd.DataFrame, baselines: frozenset[str], items: pd.DataFrame | None = None) -> pd.DataFrame:
    """Every dictionary against the baseline that does best in the score among those of the same budget k.

    This leans towards the baselines: the best of several is partly the luckiest.

    Args:
        frame: the scores, see ``scores.COLUMNS``.
        baselines: names of the SAEs to compare with. A dictionary is not compared with itself.
        items: what scores are means of, see ``items.COLUMNS``; None: intervals are over seeds alone.
    Returns: view, k and COLUMNS, for each headline score that has a better direction, dictionary by dictionary; empty
        if nothing can be compared.
    """
    check_table(frame)
    typed, table = typed_frame(frame), summary(frame)
    rows = [
        row
        for headline in shown_headlines(typed)
        if headline.better
        for row in _against_best_in(headline, headline.better, typed, table, baselines, items)
    ]
    order = {name: rank for rank, name in enumerate(dict.fromkeys(table["dictionary"]))}
    differences = pd.DataFrame(rows, columns=["view", "k", *COLUMNS])
    return differences.sort_values("of", key=lambda names: names.map(order), kind="stable").reset_index(drop=True)


def _against_best_in(
    headline: Column,
    better: Better,
    typed: pd.DataFrame,
    table: pd.DataFrame,
    baselines: frozenset[str],
    items: pd.DataFrame | None,
) -> list[dict[str, Any]]:
    scores = dict(list(headline_scores(typed, headline).groupby(["dictionary", "view"])[[*SEEDS, "value"]]))
    item_values = _item_values(items, headline)
    pairs: list[_Pair] = []
    for own in table.dropna(subset=[headline.label]).to_dict("records"):
        same = (table["k"] == own["k"]) & table["dictionary"].isin(baselines) & table[headline.label].notna()
        rivals = table[same & ~((table["dictionary"] == own["dictionary"]) & (table["view"] == own["view"]))]
        if rivals.empty:
            continue
        best = rivals.loc[rivals[headline.label].idxmin() if better == "lower" else rivals[headline.label].idxmax()]
        of, against = ((r["dictionary"], scores[r["dictionary"], r["view"]]) for r in (own, best))
        both = [item_values.get((r["dictionary"], r["view"])) for r in (own, best)]
        pairs.append(_Pair({"view": own["view"], "k": own["k"]}, of, against, _items(headline, *both)))
    return _rows(headline.label, better, headline.matters, pairs)


def _item_values(items: pd.DataFrame | None, headline: Column) -> dict[Any, pd.DataFrame]:
    """(dictionary, view) -> seed, eval_seed, item, value."""
    if items is None:
        return {}
    return dict(list(headline_items(items, headline).groupby(["dictionary", "view"])[[*SEEDS, "item", "value"]]))


def _items(headline: Column, of: pd.DataFrame | None, against: pd.DataFrame | None) -> Items | None:
    if of is None or against is None or of.empty or against.empty:
        return None
    return Items(of, against, shared=not OWN_ITEMS[headline.eval])


def between(
    frame: pd.DataFrame, ones: Sequence[str], others: Sequence[str], items: pd.DataFrame | None = None
) -> pd.DataFrame:
    """The mean score of ``ones`` minus that of ``others``, for every score that all of them have.

    Args: frame: the scores, see ``scores.COLUMNS``. Of a dictionary with two views the first counts. items: as for
        ``against_best``.
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
        scores = headline_scores(typed, headline)
        of, against = ((", ".join(names), _mean(scores, names)) for names in (ones, others))
        if headline.better and not of[1].empty and not against[1].empty:
            both = []
            # Latents of several dictionaries have no mean.
            if items is not None and not (OWN_ITEMS[headline.eval] and max(len(ones), len(others)) > 1):
                values = headline_items(items, headline)
                both = [_mean(values, names, [*SEEDS, "item"]) for names in (ones, others)]
            pair = _Pair({}, of, against, _items(headline, *both) if both else None)
            rows += _rows(headline.label, headline.better, headline.matters, [pair])
    if not rows:
        raise EvaluationError("contrast: there is no score that all of these have", got=", ".join([*ones, *others]))
    return pd.DataFrame(rows, columns=COLUMNS)


def _mean(scores: pd.DataFrame, names: Sequence[str], keys: Sequence[str] = tuple(SEEDS)) -> pd.DataFrame:
    """Mean over dictionaries, seed by seed; only seeds (and items) that all of them have a finite value of."""
    scores = scores[scores["dictionary"].isin(names)].dropna(subset=["value"])
    first = scores.groupby("dictionary")["view"].transform(lambda views: min(views, key=lambda view: view == "split"))
    scores = scores[scores["view"] == first]
    by_seed = scores.groupby([*keys], dropna=False, sort=True)["value"].agg(["mean", "size"]).reset_index()
    return by_seed[by_seed["size"] == len(set(names))].rename(columns={"mean": "value"})[[*keys, "value"]]


def of_study(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """A study's best dictionary against its best SAE, for each layer, k and weighting, and for any weighting.

    On either side stands the setting with the least mean nats lost, so both are the best of several and equally lucky.
    Behind these come the means over k and over layers, seed by seed.

    Args: rows: as a study writes them. Only settings that code as many atoms as they learned with take part.
    Returns: layer, k, weighting and COLUMNS, for nats lost and FVU.
    """
    frame = pd.DataFrame(rows)
    frame = frame[frame["coding_k"] == frame["k"]]
    is_sae = frame["sae"].astype(bool)
    pairs: dict[str, list[_Pair]] = {score: [] for score in _STUDY_SCORES}
    for (layer, k), group in frame.groupby(["layer", "k"], sort=True):
        for weighting in [*dict.fromkeys(group["weighting"]), ANY]:
            of_it = group if weighting == ANY else group[group["weighting"] == weighting]
            saes, dictionaries = of_it[is_sae[of_it.index]], of_it[~is_sae[of_it.index]]
            if saes.empty or dictionaries.empty:
                continue
            place = {"layer": layer, "k": k, "weighting": weighting}
            own, theirs = _best(dictionaries), _best(saes)
            for score, column in _STUDY_SCORES.items():
                of, against = ((_name(setting), _seeded(setting, column)) for setting in (own, theirs))
                pairs[score].append(_Pair(place, of, against))
    for of_score in pairs.values():
        of_score += _over_places(of_score)
    of_scores = [_rows(score, "lower", MATTERS[score], pairs[score]) for score in _STUDY_SCORES]
    # Scores of a place side by side.
    lines = [row for rows in zip(*of_scores, strict=True) for row in rows]
    return pd.DataFrame(lines, columns=["layer", "k", "weighting", *COLUMNS])


def _over_places(pairs: Sequence[_Pair]) -> list[_Pair]:
    """For each weighting the mean over a layer's k, and over all layers and k, of the seeds that all have."""
    layers = list(dict.fromkeys(pair.place["layer"] for pair in pairs))
    wanted = [*layers, "all"] if len(layers) > 1 else layers
    means = []
    for layer, weighting in product(wanted, dict.fromkeys(pair.place["weighting"] for pair in pairs)):
        here = [p for p in pairs if p.place["weighting"] == weighting and layer in ("all", p.place["layer"])]
        if len(here) > 1:
            place = {"layer": layer, "k": f"mean of {len(here)}", "weighting": weighting}
            of, against = _mean_side([pair.of for pair in here]), _mean_side([pair.against for pair in here])
            if not of[1].empty and not against[1].empty:
                means.append(_Pair(place, of, against))
    return means


def _mean_side(sides: Sequence[tuple[str, pd.DataFrame]]) -> tuple[str, pd.DataFrame]:
    names = list(dict.fromkeys(name for name, _ in sides))
    by_seed = pd.concat([scores for _, scores in sides]).groupby("seed")["value"].agg(["mean", "size"]).reset_index()
    whole = by_seed[by_seed["size"] == len(sides)]
    return ", ".join(names), pd.DataFrame({"seed": whole["seed"], "eval_seed": float("nan"), "value": whole["mean"]})


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
    columns = ["dictionary", "view", "k", "score", "baseline", *COLUMNS[3:]]
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
    lead = (
        "Each dictionary minus the SAE that does best in the column among those of the same k, paired by seed and by "
        "item where both have the same. ±: half-width of the 95 % interval of this one difference. Better, worse: "
        "significant (5 %) among all verdicts of the column (Holm), and large enough for the test to see. Level: the "
        "interval lies within what matters. Cannot tell: none of these. A bare difference is of a single pair."
    )
    heads = ("dictionary", "view", "k", *(headline.heading for headline in scores))
    remarks = [_sight(differences[differences["score"] == headline.label], headline) for headline in scores]
    return Section("Against the best SAE", "verdicts", lead, heads, frozenset({"k"}), rows, remarks)


def _sight(rows: pd.DataFrame, headline: Column) -> str:
    """What a column's intervals are over, what it could see and what matters there."""
    over = " or ".join(_over_text(over, headline) for over in dict.fromkeys(rows["over"]) if over != "nothing")
    text = f"{headline.label}: {f'intervals over {over}' if over else 'no intervals'}"
    if rows["visible"].notna().any():
        text += f"; seen four times in five, corrected: {rows['visible'].median():.2g} (median)"
    return text + ("" if headline.matters is None else f"; what matters: {headline.matters:g}")


def _over_text(over: str, headline: Column) -> str:
    return over.replace("items", ITEMS_ARE[headline.eval])


def study_section(differences: pd.DataFrame) -> Section | None:
    """``of_study``'s rows: a row a layer, k and weighting; None if there are none."""
    if differences.empty:
        return None
    lead = (
        "The setting of least nats lost among the dictionaries minus that among the SAEs: mean over pairs of the same "
        "training seed ± half-width of the 95 % interval (Student's t), which is over seeds alone. Better, worse: "
        "significant among all of the column (Holm); level: within what matters; "
        "negative differences are in the dictionary's favour. Behind them, means over k and over layers, of each seed."
    )
    places = {"layer": "layer", "k": "k", "weighting": "weighting", "of": "dictionary", "against": "SAE", "n": "seeds"}
    rows = _pivot(differences, list(places), list(_STUDY_SCORES), {"nats lost": 3, "FVU": 4})
    heads = (*places.values(), *_STUDY_SCORES)
    return Section("Against the SAEs", "against", lead, heads, frozenset({"layer", "k", "seeds"}), rows)


def contrast_section(differences: pd.DataFrame) -> Section:
    """``between``'s rows: a row a score."""
    of, against = differences.iloc[0][["of", "against"]]
    of_label = {headline.label: headline for headline in HEADLINES}
    rows = [
        [
            row["score"],
            difference_text(row, 4),
            _over_text(row["over"], of_label[row["score"]]),
            *(f"{row[name]:.3g}" if pd.notna(row[name]) else "–" for name in ("visible", "matters")),
            str(row["n"]),
        ]
        for row in differences.to_dict("records")
    ]
    lead = (
        "Mean over pairs of seeds ± half-width of the 95 % interval. Better, worse: it leaves out 0, and the "
        "difference is large enough for the test to see (visible: found four times in five). Level: it is within what "
        "matters. "
        "One comparison a score, so not corrected for their number."
    )
    heads = ("score", "difference", "over", "visible", "matters", "pairs")
    numbers = frozenset({"pairs", "visible", "matters"})
    return Section(f"{of} minus {against}", "contrast", lead, heads, numbers, rows)


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
