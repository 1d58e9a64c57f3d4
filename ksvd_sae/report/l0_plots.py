"""Scores against L0: what each method gives for the number of atoms it uses a token.

Drawn only where L0 spans a range: dictionaries of one k stand above each other and say nothing here.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ksvd_sae.errors import EvaluationError
from ksvd_sae.report import style
from ksvd_sae.report.plots import Colours
from ksvd_sae.report.tables import entry_labels, intervals, shown_headlines, summary

BEHAVIOUR = "loss recovered"
# The largest L0 over the smallest, of the real methods, from where on the plots are drawn.
RANGE = 1.25
# A control that uses so many times as many latents as any real method is not drawn.
_FURTHEST = 3.0


def spans_a_range(frame: pd.DataFrame, controls: frozenset[str] = frozenset()) -> bool:
    """Whether the real methods differ in L0 by enough to draw anything against it."""
    table = summary(frame)
    l0 = table.loc[~table["dictionary"].isin(controls), "L0"].dropna()
    return len(l0) > 1 and bool(l0.max() >= RANGE * l0.min() > 0)


def has_behaviour(frame: pd.DataFrame, controls: frozenset[str] = frozenset()) -> bool:
    """Whether a real method has a loss recovered to draw against its L0."""
    table = summary(frame)
    real = ~table["dictionary"].isin(controls)
    return bool((real & table["L0"].notna() & table[BEHAVIOUR].notna()).any())


def family(label: str, k: float) -> str:
    """The method that a dictionary is of: its label without its k, where that stands at a word's end."""
    if not math.isfinite(k):
        return label
    shorter = re.sub(rf"[-_.]?k?[-_.]?{int(k)}(?=$|[ (])", "", label, count=1).strip()
    return shorter or label


def _families(table: pd.DataFrame, controls: frozenset[str], colours: Colours) -> pd.DataFrame:
    """The table with the family of each row and its look: a colour and a marker a family."""
    table = table.assign(
        control=[name in controls for name in table["dictionary"]],
        family=[family(label, k) for label, k in zip(entry_labels(table), table["k"], strict=True)],
    )
    first = table.drop_duplicates("family").reset_index(drop=True)
    several = len(first) < len(table)
    # Families get colours of their own; where each is one dictionary, it keeps the colour of the other figures.
    own = frozenset(first.loc[first["control"], "family"])
    chosen = (
        style.palette(first["family"], own) if several else style.colours_of(table["dictionary"], colours, controls)
    )
    looks = {
        row["family"]: (chosen[row["family"] if several else row["dictionary"]], style.MARKERS[i % len(style.MARKERS)])
        for i, row in enumerate(first.to_dict("records"))
    }
    return table.assign(
        colour=[looks[name][0] for name in table["family"]], marker=[looks[name][1] for name in table["family"]]
    )


def metrics_against_l0(
    frame: pd.DataFrame,
    path: Path,
    controls: frozenset[str] = frozenset(),
    *,
    colours: Colours = None,
) -> Path:
    """Small multiples: a panel for each headline metric, dictionaries that differ only in k joined by a line.

    Bars are the scores' 95 % intervals where they have one. Controls far outside of what the real methods span are left
    out of a panel, and the panel says so.

    Raises: EvaluationError: no headline metric has a score.
    """
    table, widths = _families(summary(frame), controls, colours), intervals(frame)
    scored = [headline for headline in shown_headlines(frame) if table[headline.label].notna().any()]
    panels = [headline for headline in scored if headline.better]
    if not panels:
        raise EvaluationError("plotting the headline metrics against L0: none has a score", cure="turn on an eval")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with style.figure(path, 0.6 + 3.3 * columns, 0.75 + 2.6 * rows) as drawn:
        grid = drawn.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, headline in zip(grid.flat, panels, strict=False):
            _panel(axes, table, headline.label, widths[headline.label])
            axes.set_title(headline.heading)
            axes.set_xlabel("L0")
            if headline.style == "percent":
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
        handles = _handles(table)
        drawn.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 2 * columns))
    return Path(path)


def _handles(table: pd.DataFrame) -> list[Line2D]:
    """An entry of the legend for each family."""
    rows = table.drop_duplicates("family").to_dict("records")
    return [Line2D([], [], label=row["family"], **_look(row)) for row in rows]


def _look(row: Any) -> dict[str, Any]:
    face = "white" if row["control"] else row["colour"]
    return {"color": row["colour"], "marker": row["marker"], "mfc": face, "ms": 6, "mew": 1.4, "lw": 1.4}


def _panel(axes: Axes, table: pd.DataFrame, name: str, widths: "pd.Series[float]") -> None:
    inside = _in_reach(table, name)
    for _, rows in table[inside].groupby("family", sort=False):
        rows = rows.sort_values("L0", kind="stable")
        bars = widths.reindex(rows.index).to_numpy()
        look = _look(rows.iloc[0])
        axes.errorbar(
            rows["L0"].to_numpy(), rows[name].to_numpy(), yerr=bars, elinewidth=1, capsize=2.5, zorder=3, **look
        )
    outside = table[~inside & table["L0"].notna() & table[name].notna()]
    if len(outside):
        axes.annotate(
            f"far off: {', '.join(dict.fromkeys(outside['family']))}",
            (1, 1),
            (-2, -2),
            "axes fraction",
            "offset points",
            ha="right",
            va="top",
            fontsize=8,
            color=style.FAINT,
        )
    axes.margins(0.08, 0.16)
    l0_axis(axes, table.loc[inside, "L0"])


def _in_reach(table: pd.DataFrame, name: str) -> "pd.Series[bool]":
    """The rows to draw: those with both scores, less controls that would press the real methods onto a line."""
    scored = table["L0"].notna() & table[name].notna()
    real = table.loc[scored & ~table["control"], name]
    if real.empty:
        return scored
    spread = max(float(real.max() - real.min()), 0.02 * float(real.abs().max()))
    near = table[name].between(real.min() - spread, real.max() + spread)
    # The identity uses as many latents as there are dimensions.
    near &= table["L0"] <= _FURTHEST * table.loc[real.index, "L0"].max()
    return scored & (near | ~table["control"])


def l0_axis(axes: Axes, values: "pd.Series[float]") -> None:
    """A logarithmic axis with a tick at each L0 that occurs, as far as there is room."""
    axes.set_xscale("log")
    ticks: list[float] = []
    for value in np.unique(values.dropna().round(1)):
        if not ticks or value >= 1.18 * ticks[-1]:
            ticks.append(float(value))
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def pareto_front(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats: none has at most as large a first and a larger second coordinate,
    or a smaller first and at least as large a second; by the first coordinate."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    front: list[int] = []
    for i in order:
        best = points[front[-1]] if front else (-math.inf, -math.inf)
        # A point equal to one of the front is beaten by none.
        if points[i][1] > best[1] or points[i] == best:
            front.append(i)
    return front


def pareto_against_l0(
    frame: pd.DataFrame,
    path: Path,
    controls: frozenset[str] = frozenset(),
    *,
    colours: Colours = None,
) -> Path:
    """Loss recovered against L0, with the front of the real methods: more of the loss takes more atoms.

    Raises: EvaluationError: no real method has both.
    """
    table = _families(summary(frame), controls, colours)
    real = table[table["L0"].notna() & table[BEHAVIOUR].notna() & ~table["control"]]
    if real.empty:
        raise EvaluationError(f"plotting {BEHAVIOUR} against L0: no method has both", cure="turn on the core eval")
    points = [(float(x), float(y)) for x, y in zip(real["L0"], real[BEHAVIOUR], strict=True)]
    front = [points[i] for i in pareto_front(points)]
    with style.figure(path, 9.6, 5.2) as drawn:
        axes = drawn.add_subplot()
        _panel(axes, table, BEHAVIOUR, intervals(frame)[BEHAVIOUR])
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        # It goes on to the right of its last point: atoms that may be used need not be.
        steps = [(front[0][0], low), *front, (right, front[-1][1])]
        axes.plot(*zip(*steps, strict=True), drawstyle="steps-post", color=style.INK, lw=1.1, ls=(0, (4, 3)), zorder=2)
        axes.plot(*zip(*front, strict=True), "o", ms=13, mfc="none", mec=style.INK, mew=1.1, ls="none", zorder=4)
        axes.set_xlim(left, right)
        axes.set_ylim(low, high)
        axes.set_title("Loss recovered against L0; ringed and dashed: the Pareto front")
        axes.set_xlabel("L0: atoms a token, log scale   (← fewer)")
        axes.set_ylabel(f"{BEHAVIOUR}   (higher is better →)")
        # Beside the lines, which leave no corner free.
        handles = _handles(table[_in_reach(table, BEHAVIOUR)])
        axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return Path(path)
