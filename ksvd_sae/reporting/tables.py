"""The tidy table of scores: checks, CSV, the headline table, and Markdown.

A dictionary's row in the headline table is a (dictionary, view) pair. Every number in it passes
through ``_over_seeds``, which today takes one seed's score and refuses several: the mean over
seeds and its interval belong there, and everything downstream reads from ``summary``.
"""

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ksvd_sae.errors import EvaluationError
from ksvd_sae.provenance import atomic_path
from ksvd_sae.reporting.headline import DESCRIPTIONS, EVALS, HEADLINES, Headline, column_texts, score_texts

logger = logging.getLogger(__name__)

COLUMNS = ["dictionary", "view", "d_sae", "k", "l0", "eval", "data", "metric", "value", "seed", "n", "source"]
TEXT_COLUMNS = ["dictionary", "view", "eval", "data", "metric", "source"]
WHOLE_COLUMNS = ["d_sae", "k", "seed", "n"]
REAL_COLUMNS = ["l0", "value"]
# One score has one row.
KEY = ["dictionary", "view", "eval", "data", "metric", "seed"]
SUMMARY_COLUMNS = [*DESCRIPTIONS, *(headline.label for headline in HEADLINES)]
FIRST_VIEWS = ("signed", "split")
TITLE = "Comparison of dictionaries"

Pair = tuple[str, str]


@dataclass(frozen=True)
class Cell:
    """One cell of the headline table as shown."""

    text: str
    value: float | str
    best: bool = False


def check_table(frame: pd.DataFrame) -> None:
    """Refuse a frame that is no table of scores.

    Raises:
        EvaluationError: no rows; columns missing or unknown; unnamed, non-numeric or repeated scores.
    """
    missing = [name for name in COLUMNS if name not in frame.columns]
    unknown = [str(name) for name in frame.columns if name not in COLUMNS]
    if missing or unknown:
        raise EvaluationError(
            "reading a table of scores: its columns are not those of one"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; unknown: {', '.join(unknown)}" if unknown else ""),
            got=list(frame.columns),
            limit=COLUMNS,
        )
    if frame.empty:
        raise EvaluationError(
            "reading a table of scores: it has no rows",
            cause="no eval ran, or none gave a score",
            cure="turn on an eval in the config's `evaluation`",
        )
    typed = typed_frame(frame)
    for name in ("dictionary", "eval", "metric"):
        if (typed[name] == "").any():
            raise EvaluationError(f"reading a table of scores: rows without a {name}", got=_rows(typed[name] == ""))
    repeated = typed.duplicated(KEY, keep=False)
    if repeated.any():
        first = typed.loc[repeated, KEY].iloc[0].to_dict()
        raise EvaluationError(
            f"reading a table of scores: {int(repeated.sum())} rows score what another row scores",
            got=", ".join(f"{name}={value}" for name, value in first.items()),
            limit=f"one row for each ({', '.join(KEY)})",
            cause="results of two runs were put into one table",
            cure="keep one of them, or give each its own seed or data name",
        )


def _rows(mask: "pd.Series[bool]") -> str:
    return f"row {', '.join(str(index) for index in np.flatnonzero(mask.to_numpy())[:5])}"


def typed_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns in their order and types: text without gaps, whole numbers and reals with them."""
    typed = pd.DataFrame(index=frame.index)
    for name in COLUMNS:
        column = frame[name]
        try:
            if name in TEXT_COLUMNS:
                typed[name] = column.astype(object).where(column.notna(), "").astype(str).astype(object)
            elif name in WHOLE_COLUMNS:
                typed[name] = pd.to_numeric(column).astype("Int64")
            else:
                reals = pd.to_numeric(column).astype("float64")
                typed[name] = reals.where(np.isfinite(reals))
        except (TypeError, ValueError) as error:
            kind = "whole number" if name in WHOLE_COLUMNS else "number"
            raise EvaluationError(
                f"reading a table of scores: column {name!r} holds what is no {kind} ({error})",
                got=str(column.dtype),
                limit=f"{kind}s, or nothing where there is none",
            ) from error
    return typed


def _ranks(column: "pd.Series[str]", first: tuple[str, ...] = ()) -> dict[str, int]:
    """Position of each name: those of ``first``, then the others as they first appear."""
    return {name: rank for rank, name in enumerate(dict.fromkeys([*first, *column]))}


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write the scores, whole or not at all, in an order that does not depend on how they were gathered.

    Dictionaries keep the order of their first appearance; within one, rows go by view (signed first), seed,
    eval, data and metric. Values have nine significant digits.
    """
    check_table(frame)
    typed = typed_frame(frame)
    order = pd.DataFrame(
        {
            "dictionary": typed["dictionary"].map(_ranks(typed["dictionary"])),
            "view": typed["view"].map(_ranks(typed["view"], FIRST_VIEWS)),
            "seed": typed["seed"].fillna(-1).astype("int64"),
            "eval": typed["eval"].map(_ranks(typed["eval"], EVALS)),
            "data": typed["data"].map(_ranks(typed["data"])),
            "metric": typed["metric"],
        }
    )
    typed = typed.loc[order.sort_values(list(order.columns), kind="stable").index]
    with atomic_path(Path(path)) as temporary:
        typed.to_csv(temporary, index=False, float_format="%.9g", lineterminator="\n", encoding="utf-8")
    logger.info("wrote %d scores to %s", len(typed), path)


def read_csv(path: Path) -> pd.DataFrame:
    """Read what ``write_csv`` wrote.

    Raises:
        EvaluationError: no such file, not a CSV, or not a table of scores.
    """
    try:
        # Only an empty cell is a gap: a dictionary may be called "NA" or "None".
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise EvaluationError(f"reading scores from {path}: {error}", cure="run the evaluation stage") from error
    frame = frame.apply(lambda column: column if column.name in TEXT_COLUMNS else column.replace({"": None}))
    check_table(frame)
    return typed_frame(frame)


def headline_data(frame: pd.DataFrame, headline: Headline) -> str | None:
    """The data set of a headline column: of those that score most dictionaries, the first in the frame."""
    rows = frame[(frame["eval"] == headline.eval) & (frame["metric"] == headline.metric)]
    if rows.empty:
        return None
    pairs = rows.groupby("data", sort=False)[["dictionary", "view"]].apply(lambda part: len(part.drop_duplicates()))
    return str(pairs.idxmax())


def _pairs(typed: pd.DataFrame) -> list[Pair]:
    """(dictionary, view), a dictionary's views side by side; a training row alone makes no view beside scored ones."""
    scored = typed[typed["eval"] != "training"]
    known = set(scored["dictionary"])
    rows = typed[(typed["eval"] != "training") | ~typed["dictionary"].isin(known)]
    pairs = list(dict.fromkeys(zip(rows["dictionary"], rows["view"], strict=True)))
    ranks, view_ranks = _ranks(typed["dictionary"]), _ranks(typed["view"], FIRST_VIEWS)
    return sorted(pairs, key=lambda pair: (ranks[pair[0]], view_ranks[pair[1]]))


def _metric(typed: pd.DataFrame, eval_name: str, metric: str, data: str | None) -> "pd.Series[float]":
    """A metric's values by (dictionary, view, seed); training belongs to a dictionary whatever its view."""
    rows = typed[(typed["eval"] == eval_name) & (typed["metric"] == metric) & (typed["data"] == data)]
    index = ["dictionary", "seed"] if eval_name == "training" else ["dictionary", "view", "seed"]
    return rows.drop_duplicates(index).set_index(index)["value"]


def _over_seeds(values: "pd.Series[float]", name: Hashable) -> "pd.Series[float]":
    """One number for each dictionary: today the score of its only seed.

    Raises:
        EvaluationError: several seeds.
    """
    reduced = values.droplevel("seed")
    if reduced.index.has_duplicates:
        raise EvaluationError(
            f"summarising {name!r}: a dictionary has scores of several seeds",
            got=sorted({int(seed) for seed in values.index.get_level_values("seed").dropna()}),
            limit="one seed a dictionary",
            cure="select one: frame[frame.seed == 0]",
        )
    return reduced


def _constant(typed: pd.DataFrame, pair: Pair, name: str) -> float:
    """What a dictionary's rows agree on (its size, its budget)."""
    rows = typed[(typed["dictionary"] == pair[0]) & (typed["view"] == pair[1])]
    found = sorted({int(value) for value in rows[name].dropna()})
    if len(found) > 1:
        raise EvaluationError(
            f"summarising {pair[0]!r} ({pair[1]}): its rows give several {name}",
            got=found,
            cause="two dictionaries share a name",
            cure="give each its own name",
        )
    return found[0] if found else float("nan")


def _measured_l0(typed: pd.DataFrame, pair: Pair) -> float:
    """Mean nonzeros a token: as measured with the held-out scores, else with the first scores that say."""
    rows = typed[(typed["dictionary"] == pair[0]) & (typed["view"] == pair[1]) & typed["l0"].notna()]
    heldout = rows[rows["eval"] == "heldout"]
    found = heldout if len(heldout) else rows
    return float(found["l0"].iloc[0]) if len(found) else float("nan")


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """The headline table: one row a dictionary and view, dictionaries in order of first appearance.

    Args:
        frame: the scores. Where an eval has several data sets, the headline takes the one that
            scores most dictionaries (of equals, the first); ``legend`` names it.
    Returns:
        SUMMARY_COLUMNS; NaN where there is no finite score.
    Raises:
        EvaluationError: see ``check_table``; several seeds; rows of one dictionary that disagree on its size.
    """
    check_table(frame)
    typed = typed_frame(frame)
    pairs = _pairs(typed)
    columns: dict[str, list[Any]] = {
        "dictionary": [name for name, _ in pairs],
        "view": [view for _, view in pairs],
        "d_sae": [_constant(typed, pair, "d_sae") for pair in pairs],
        "k": [_constant(typed, pair, "k") for pair in pairs],
        "L0": [_measured_l0(typed, pair) for pair in pairs],
    }
    for headline in HEADLINES:
        data = headline_data(typed, headline)
        values = _metric(typed, headline.eval, headline.metric, data)
        if headline.minus is not None:
            # A difference is taken within a seed, before any average over seeds.
            values = values - _metric(typed, headline.eval, headline.minus, data).reindex(values.index)
        found = _over_seeds(values, headline.label).to_dict()
        keys: list[Any] = [name for name, _ in pairs] if headline.eval == "training" else list(pairs)
        columns[headline.label] = [float(found.get(key, float("nan"))) for key in keys]
    return pd.DataFrame(columns, columns=SUMMARY_COLUMNS)


def entry_labels(table: pd.DataFrame) -> list[str]:
    """A label for each row of a summary: the dictionary, with its view only where it has several."""
    several = table["dictionary"].duplicated(keep=False)
    rows = zip(table["dictionary"], table["view"], several, strict=True)
    return [f"{name} ({view})" if twice else str(name) for name, view, twice in rows]


def cells(table: pd.DataFrame, controls: frozenset[str] = frozenset()) -> list[list[Cell]]:
    """The summary's rows as shown, with the best real method of each column marked.

    Nothing is marked where fewer than two real methods have a score or all read the same: there is
    no contest to win. Methods that read the same as the best are marked with it.
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
        shown = zip(values, texts, strict=True)
        columns.append([Cell(text, value, i in contest and text == best) for i, (value, text) in enumerate(shown)])
    return [list(row) for row in zip(*columns, strict=True)]


def headings(table: pd.DataFrame) -> list[str]:
    """Column names with an arrow towards the better end."""
    named = {headline.label: headline.heading for headline in HEADLINES}
    return [named.get(str(name), str(name)) for name in table.columns]


def markdown_text(text: str) -> str:
    """Text that cannot end a cell, a line, or become a tag."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def to_markdown(table: pd.DataFrame, controls: frozenset[str] = frozenset()) -> str:
    """A summary as an aligned Markdown table, the best real method of each column in bold."""
    heads = headings(table)
    shown = [
        [f"**{cell.text}**" if cell.best else markdown_text(cell.text) for cell in row]
        for row in cells(table, controls)
    ]
    widths = [max(3, len(head), *(len(row[i]) for row in shown)) for i, head in enumerate(heads)]
    left = [name in ("dictionary", "view") for name in table.columns]

    def line(row: list[str]) -> str:
        parts = zip(row, widths, left, strict=True)
        return "| " + " | ".join(text.ljust(wide) if flush else text.rjust(wide) for text, wide, flush in parts) + " |"

    rule = ["-" * wide if flush else "-" * (wide - 1) + ":" for wide, flush in zip(widths, left, strict=True)]
    return "\n".join([line(heads), line(rule), *(line(row) for row in shown)]) + "\n"


def legend(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """(heading, meaning) of every headline column: its unit, its data set by its true name, and n."""
    typed = typed_frame(frame)
    entries = list(DESCRIPTIONS.items())
    for headline in HEADLINES:
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
                text += f"; the same probe on the raw activations gives {score_texts([reference])[0]}"
        entries.append((headline.heading, text))
    return entries


def reference_value(frame: pd.DataFrame, headline: Headline) -> float | None:
    """What the raw activations reach on a headline's metric; None if unknown or not one number."""
    if headline.reference is None:
        return None
    data = headline_data(frame, headline)
    rows = frame[(frame["eval"] == headline.eval) & (frame["metric"] == headline.reference) & (frame["data"] == data)]
    values = rows["value"].dropna().astype(float)
    # Probes are trained afresh for each dictionary: equal up to that noise.
    return float(values.median()) if len(values) and values.max() - values.min() < 0.01 else None


def seeds_text(frame: pd.DataFrame) -> str:
    """Which training seeds the scores are of."""
    seeds = sorted({int(seed) for seed in typed_frame(frame)["seed"].dropna()})
    if not seeds:
        return "The training seed is not recorded."
    if len(seeds) == 1:
        return f"One training seed ({seeds[0]}): the spread between seeds is not known."
    return f"Training seeds: {', '.join(map(str, seeds))}."


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
    lines = [f"# {markdown_text(title)}", "", to_markdown(table, controls), legend_intro(table, controls), ""]
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
