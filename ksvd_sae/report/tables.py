"""The headline table from the tidy one, and Markdown.

A dictionary's row in the headline table is a (dictionary, view) pair. Its numbers are means over seeds
(``statistics.estimate``); everything downstream reads from ``summary`` and ``intervals``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.base import Column
from ksvd_sae.report.headline import (
    DESCRIPTIONS,
    HEADLINES,
    ON_IMAGES,
    ON_TEXT,
    column_texts,
    score_texts,
    with_intervals,
)
from ksvd_sae.report.markdown import markdown_table, markdown_text
from ksvd_sae.report.scores import (
    FIRST_VIEWS,
    check_table,
    ranks,
    typed_frame,
)
from ksvd_sae.report.statistics import SEEDS, estimate
from ksvd_sae.store import atomic_path

TITLE = "Comparison of dictionaries"

Pair = tuple[str, str]


@dataclass(frozen=True)
class Cell:
    """One cell of the headline table as shown."""

    text: str
    value: float | str
    best: bool = False


def headline_data(frame: pd.DataFrame, headline: Column) -> str | None:
    """The data set of a headline column: of those that score most dictionaries, the first in the frame."""
    rows = frame[(frame["eval"] == headline.eval) & (frame["metric"] == headline.metric)]
    if rows.empty:
        return None
    pairs = rows.groupby("data", sort=False)[["dictionary", "view"]].apply(lambda part: len(part.drop_duplicates()))
    return str(pairs.idxmax())


def shown_headlines(frame: pd.DataFrame) -> list[Column]:
    """The headline columns of a table: optional ones, and those of text in a run on images, only where scored."""
    on_images = not ON_IMAGES.isdisjoint(frame["eval"])
    return [
        headline
        for headline in HEADLINES
        if not (headline.optional or (on_images and headline.eval in ON_TEXT))
        or headline_data(frame, headline) is not None
    ]


def _pairs(typed: pd.DataFrame) -> list[Pair]:
    """(dictionary, view), a dictionary's views side by side; a training row alone makes no view beside scored ones."""
    scored = typed[typed["eval"] != "training"]
    known = set(scored["dictionary"])
    rows = typed[(typed["eval"] != "training") | ~typed["dictionary"].isin(known)]
    pairs = list(dict.fromkeys(zip(rows["dictionary"], rows["view"], strict=True)))
    order, view_order = ranks(typed["dictionary"]), ranks(typed["view"], FIRST_VIEWS)
    return sorted(pairs, key=lambda pair: (order[pair[0]], view_order[pair[1]]))


def headline_scores(typed: pd.DataFrame, headline: Column) -> pd.DataFrame:
    """Every score behind a headline column: dictionary, view, seed, eval_seed, value.

    A difference of two metrics is taken within seeds, before any mean. Training belongs to a dictionary whatever its
    view: there the view is empty.
    """
    keys = ["dictionary", "view", *SEEDS]
    rows = typed[(typed["eval"] == headline.eval) & (typed["data"] == headline_data(typed, headline))]
    if headline.eval == "training":
        rows = rows.assign(view="").drop_duplicates([*keys, "metric"])
    values = rows.loc[rows["metric"] == headline.metric, [*keys, "value"]]
    if headline.minus is None:
        return values.reset_index(drop=True)
    # Missing seeds do not merge: −1 stands for them.
    filled = {name: lambda part, n=name: part[n].fillna(-1) for name in SEEDS}
    minus = rows.loc[rows["metric"] == headline.minus, [*keys, "value"]]
    merged = pd.merge(values.assign(**filled), minus.assign(**filled), "left", keys, suffixes=("", "_minus"))
    return values.assign(value=(merged["value"] - merged["value_minus"]).to_numpy()).reset_index(drop=True)


def _constant(typed: pd.DataFrame, pair: Pair, name: str) -> float:
    """What a dictionary's rows agree on (its size, its budget)."""
    rows = typed[(typed["dictionary"] == pair[0]) & (typed["view"] == pair[1])]
    values = sorted({int(value) for value in rows[name].dropna()})
    if len(values) > 1:
        raise EvaluationError(
            f"summarising {pair[0]!r} ({pair[1]}): its rows give several {name}",
            got=values,
            cause="two dictionaries share a name",
            cure="give each its own name",
        )
    return values[0] if values else float("nan")


def _l0_scores(typed: pd.DataFrame, pair: Pair) -> pd.DataFrame:
    """Mean nonzeros a token, seed by seed: as measured with the held-out scores, else with the first that say."""
    rows = typed[(typed["dictionary"] == pair[0]) & (typed["view"] == pair[1]) & typed["l0"].notna()]
    heldout = rows[rows["eval"] == "heldout"]
    measured = heldout if len(heldout) else rows
    return measured.drop_duplicates(SEEDS)[[*SEEDS, "l0"]].rename(columns={"l0": "value"})


def _column_scores(typed: pd.DataFrame, pairs: Sequence[Pair]) -> dict[str, list[pd.DataFrame]]:
    """Column -> the scores behind it of each pair: seed, eval_seed, value."""
    columns = {"L0": [_l0_scores(typed, pair) for pair in pairs]}
    none = pd.DataFrame({name: pd.Series(dtype="float64") for name in (*SEEDS, "value")})
    for headline in shown_headlines(typed):
        scores = dict(list(headline_scores(typed, headline).groupby(["dictionary", "view"], sort=False)))
        keys = [(name, "") if headline.eval == "training" else (name, view) for name, view in pairs]
        columns[headline.label] = [scores.get(key, none) for key in keys]
    return columns


def by_seed(frame: pd.DataFrame) -> pd.DataFrame:
    """The headline scores training by training: one row a dictionary, view and training seed, in ``summary``'s order.

    Returns: dictionary, view, seed (missing where a dictionary is learned without one), L0 and ``shown_headlines``,
        means over evaluation seeds; NaN where there is no finite score.
    """
    check_table(frame)
    typed = typed_frame(frame)
    pairs = _pairs(typed)
    columns = _column_scores(typed, pairs)
    rows = []
    for i, (name, view) in enumerate(pairs):
        scored = typed[(typed["dictionary"] == name) & (typed["view"] == view)]
        for seed in sorted(scored["seed"].fillna(-1).unique()):
            row: dict[str, Any] = {"dictionary": name, "view": view, "seed": None if seed < 0 else int(seed)}
            for label, scores in columns.items():
                values = scores[i].loc[scores[i]["seed"].fillna(-1) == seed, "value"]
                row[label] = values[np.isfinite(values)].mean()
            rows.append(row)
    return pd.DataFrame(rows).astype({"seed": "Int64"})


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """The headline table: one row a dictionary and view, dictionaries in order of first appearance.

    Args:
        frame: the scores. Where an eval has several data sets, the headline takes the one that
            scores most dictionaries (of equals, the first); ``legend`` names it.
    Returns:
        the descriptions and ``shown_headlines``, means over seeds; NaN where there is no finite score.
    Raises:
        EvaluationError: see ``check_table``; rows of one dictionary that disagree on its size.
    """
    return _summarised(frame)[0]


def intervals(frame: pd.DataFrame) -> pd.DataFrame:
    """Half-widths of the 95 % intervals of ``summary``'s numbers, in its shape; NaN where one score or none."""
    return _summarised(frame)[1]


def _summarised(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    check_table(frame)
    typed = typed_frame(frame)
    pairs = _pairs(typed)
    named = {"dictionary": [name for name, _ in pairs], "view": [view for _, view in pairs]}
    nothing = [float("nan")] * len(pairs)
    means: dict[str, list[Any]] = {
        **named,
        **{n: [_constant(typed, pair, n) for pair in pairs] for n in ("d_sae", "k")},
    }
    widths: dict[str, list[Any]] = {**named, "d_sae": nothing, "k": nothing}
    for name, scores in _column_scores(typed, pairs).items():
        estimates = [estimate(each) for each in scores]
        means[name], widths[name] = [e.mean for e in estimates], [e.half_width for e in estimates]
    return pd.DataFrame(means), pd.DataFrame(widths)


def entry_labels(table: pd.DataFrame) -> list[str]:
    """A label for each row of a summary: the dictionary, with its view only where it has several."""
    several = table["dictionary"].duplicated(keep=False)
    rows = zip(table["dictionary"], table["view"], several, strict=True)
    return [f"{name} ({view})" if twice else str(name) for name, view, twice in rows]


def cells(
    table: pd.DataFrame, controls: frozenset[str] = frozenset(), widths: pd.DataFrame | None = None
) -> list[list[Cell]]:
    """The summary's rows as shown, with the best real method of each column marked.

    Nothing is marked where fewer than two real methods have a score or all read the same: there is
    no contest to win. Methods that read the same as the best are marked with it.

    Args: widths: ``intervals`` of the same frame, shown behind ±.
    """
    real = [name not in controls for name in table["dictionary"]]
    better = {headline.label: headline.better for headline in HEADLINES}
    columns: list[list[Cell]] = []
    for name in table.columns:
        if name in ("dictionary", "view"):
            columns.append([Cell(str(value), str(value)) for value in table[name]])
            continue
        values = [float(value) for value in table[name]]
        texts = column_texts(name, values)
        contest = {i: value for i, value in enumerate(values) if real[i] and np.isfinite(value)}
        best: str | None = None
        if better.get(name) and len({texts[i] for i in contest}) > 1:
            pick = min if better[name] == "lower" else max
            best = texts[pick(contest, key=lambda i: contest[i])]
        spreads = texts if widths is None else with_intervals(name, texts, [float(w) for w in widths[name]])
        shown = zip(values, texts, spreads, strict=True)
        columns.append(
            [Cell(spread, value, i in contest and text == best) for i, (value, text, spread) in enumerate(shown)]
        )
    return [list(row) for row in zip(*columns, strict=True)]


def headings(table: pd.DataFrame) -> list[str]:
    """Column names with an arrow towards the better end."""
    named = {headline.label: headline.heading for headline in HEADLINES}
    return [named.get(str(name), str(name)) for name in table.columns]


def to_markdown(table: pd.DataFrame, controls: frozenset[str] = frozenset(), widths: pd.DataFrame | None = None) -> str:
    """A summary as an aligned Markdown table, the best real method of each column in bold; arguments as ``cells``."""
    rows = [
        [f"**{cell.text}**" if cell.best else markdown_text(cell.text) for cell in row]
        for row in cells(table, controls, widths)
    ]
    heads = headings(table)
    return markdown_table(heads, rows, set(heads) - {"dictionary", "view"}) + "\n"


def legend(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """(heading, meaning) of every headline column: its unit, its data set by its true name, and n."""
    typed = typed_frame(frame)
    entries = list(DESCRIPTIONS.items())
    for headline in shown_headlines(typed):
        data = headline_data(typed, headline)
        text = headline.meaning
        if data is None:
            text += "; not scored here"
        elif headline.eval != "training":
            rows = typed[
                (typed["eval"] == headline.eval) & (typed["metric"] == headline.metric) & (typed["data"] == data)
            ]
            sizes = sorted({int(value) for value in rows["n"].dropna()})
            count = f", n = {sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "") if sizes else ""
            text += f"; on {data or 'unnamed data'}{count}"
            reference = reference_value(typed, headline)
            if reference is not None:
                text += f"; {headline.reference_is} gives {score_texts([reference])[0]}"
        entries.append((headline.heading, text))
    return entries


def reference_value(frame: pd.DataFrame, headline: Column) -> float | None:
    """What the raw activations reach on a headline's metric; None if unknown or not one number."""
    if headline.reference is None:
        return None
    data = headline_data(frame, headline)
    rows = frame[(frame["eval"] == headline.eval) & (frame["metric"] == headline.reference) & (frame["data"] == data)]
    values = rows["value"].dropna().astype(float)
    # Probes are trained afresh for each dictionary: equal up to that noise.
    return float(values.median()) if len(values) and values.max() - values.min() < 0.01 else None


def seeds_text(frame: pd.DataFrame) -> str:
    """Which seeds the scores are of, and what ± stands for."""
    typed = typed_frame(frame)
    seeds, eval_seeds = (sorted({int(seed) for seed in typed[name].dropna()}) for name in SEEDS)
    if not seeds:
        return "The training seed is not recorded."
    listed = f"{', '.join(map(str, seeds))}"
    if len(seeds) > 1:
        text = f"Training seeds: {listed}. ±: half-width of the 95 % interval of the mean over them (Student's t)"
        return text + "; of one training, over evaluation seeds." if len(eval_seeds) > 1 else text + "."
    text = f"One training seed ({listed}): the spread between trainings is not known."
    if len(eval_seeds) > 1:
        text += " ±: half-width of the 95 % interval of the mean over evaluation seeds (Student's t)."
    return text


def write_markdown(
    frame: pd.DataFrame,
    path: Path,
    notes: list[str],
    controls: frozenset[str] = frozenset(),
    *,
    title: str = TITLE,
    sections: Sequence[str] = (),
) -> None:
    """Write the headline table with a legend that defines every column, further lines, and notes as bullets."""
    table = summary(frame)
    shown = to_markdown(table, controls, intervals(frame))
    lines = [f"# {markdown_text(title)}", "", shown, legend_intro(table, controls), ""]
    lines += [f"- **{markdown_text(head)}**: {markdown_text(text)}" for head, text in legend(frame)]
    lines += ["", seeds_text(frame), "", *sections]
    if notes:
        lines += ["## Notes", "", *(f"- {markdown_text(note)}" for note in notes), ""]
    with atomic_path(Path(path)) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


def legend_intro(table: pd.DataFrame, controls: frozenset[str]) -> str:
    """How to read the marks of the table."""
    present = [name for name in dict.fromkeys(table["dictionary"]) if name in controls]
    text = "↓ lower is better, ↑ higher is better; bold: the best"
    if present:
        names = " and ".join([", ".join(present[:-1]), present[-1]] if len(present) > 1 else present)
        text += f", leaving out the control{'s' if len(present) > 1 else ''} {markdown_text(names)}"
    return text + "; n/a: not scored, or not finite."
