"""Figures: error against behaviour, the headline metrics as bars, training, and firing density.

Each function draws one PNG and returns its path. Colours follow the dictionary's name; see
``style.palette`` to fix them for a run.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import ConnectionPatch, Rectangle

from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.base import Column
from ksvd_sae.report import style
from ksvd_sae.report.headline import column_texts
from ksvd_sae.report.tables import entry_labels, reference_value, shown_headlines, summary

Colours = Mapping[str, str] | None

ERROR, BEHAVIOUR = "FVU", "loss recovered"
# The real methods get a panel of their own if they fill less than this share of the whole picture.
ZOOM_BELOW = 0.5


def error_against_behaviour(
    frame: pd.DataFrame, path: Path, controls: frozenset[str] = frozenset(), *, colours: Colours = None
) -> Path:
    """Scatter of reconstruction error against what the language model keeps.

    Controls may lie so far off that the real methods fall on one spot: then a small panel shows
    everything and a large one the real methods.

    Raises:
        EvaluationError: no dictionary has both scores.
    """
    table = summary(frame)
    # Looks are given before rows are left out, so that they do not depend on who has a score.
    chosen = style.colours_of(table["dictionary"], colours, controls)
    table["label"] = entry_labels(table)
    table["marker"] = [style.MARKERS[i % len(style.MARKERS)] for i in range(len(table))]
    table["colour"] = [chosen[name] for name in table["dictionary"]]
    table["control"] = [name in controls for name in table["dictionary"]]
    scored = table[ERROR].notna() & table[BEHAVIOUR].notna()
    absent = list(table.loc[~scored, "label"])
    table = table[scored].reset_index(drop=True)
    if table.empty:
        raise EvaluationError(
            f"plotting {ERROR} against {BEHAVIOUR}: no dictionary has both scores", cure="turn on the core eval"
        )
    real = table[~table["control"]]
    if real.empty or real.equals(table) or not _is_crowded(table, real):
        with style.figure(path, 7.2, 5.0) as drawn:
            axes = drawn.add_subplot()
            _scatter(axes, table, f"{BEHAVIOUR.capitalize()} against error")
            _name_absent(axes, absent)
            _label(axes, table)
        return Path(path)
    _enlarged(path, table, absent)
    return Path(path)


def _enlarged(path: Path, table: pd.DataFrame, absent: list[str]) -> None:
    """The real methods large, and beside them everything, with a box where the large panel lies."""
    real = table[~table["control"]]
    with style.figure(path, 10.0, 5.0) as drawn:
        # Controls lie to the right and below, and the axis goes with them: so the guides cross nothing.
        close, everything = drawn.subplots(1, 2, width_ratios=[1.9, 1])
        close.spines[["top", "right"]].set_visible(True)
        everything.spines.left.set_visible(False)
        everything.spines.right.set_visible(True)
        everything.yaxis.tick_right()
        everything.yaxis.set_label_position("right")
        _scatter(close, real, "The methods, enlarged")
        _scatter(everything, table, "With controls", size=6)
        # No error is negative, whatever room the margins want.
        everything.set_xlim(left=max(everything.get_xlim()[0], -0.06 * everything.get_xlim()[1]))
        (x0, x1), (y0, y1) = close.get_xlim(), close.get_ylim()
        box = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=style.FAINT, linewidth=0.9)
        everything.add_patch(box)
        look: dict[str, Any] = {"color": style.FAINT, "lw": 0.6, "ls": ":"}
        for inner, outer in (((x0, y1), (1, 1)), ((x0, y0), (1, 0))):
            drawn.add_artist(ConnectionPatch(inner, outer, everything.transData, close.transAxes, **look))
        _name_absent(close, absent)
        _label(close, real)
        _label(everything, table[table["control"]])


def _is_crowded(table: pd.DataFrame, real: pd.DataFrame) -> bool:
    """Whether the real methods take a small part of the picture in either direction."""
    shares = [_spread(real[name]) / (_spread(table[name]) or 1.0) for name in (ERROR, BEHAVIOUR)]
    return min(shares) < ZOOM_BELOW


def _name_absent(axes: Axes, labels: list[str]) -> None:
    """Say below the plot which dictionaries are not in it."""
    if labels:
        axes.set_xlabel(f"{axes.get_xlabel()}\nnot shown, for want of a score: {', '.join(labels)}")


def _spread(values: "pd.Series[float]") -> float:
    return float(values.max() - values.min())


def _scatter(axes: Axes, table: pd.DataFrame, title: str, *, size: float = 9) -> None:
    for row in table.to_dict("records"):
        face = "white" if row["control"] else row["colour"]
        axes.plot(
            row[ERROR],
            row[BEHAVIOUR],
            row["marker"],
            ms=size,
            mfc=face,
            mec=row["colour"],
            mew=1.6,
            zorder=3,
            ls="none",
        )
    for name, limits, share in ((ERROR, axes.set_xlim, 0.3), (BEHAVIOUR, axes.set_ylim, 0.22)):
        # Room for labels; a single point, or equal scores, still gets an axis of some width.
        margin = max(share * _spread(table[name]), 0.02 * float(table[name].abs().max()), 1e-3)
        limits(float(table[name].min()) - margin, float(table[name].max()) + margin)
    axes.set_title(title)
    axes.set_xlabel(f"{ERROR}   (← lower is better)")
    axes.set_ylabel(f"{BEHAVIOUR}   (higher is better →)")
    axes.locator_params(nbins=6)


def _label(axes: Axes, table: pd.DataFrame) -> None:
    points = [(float(x), float(y)) for x, y in zip(table[ERROR], table[BEHAVIOUR], strict=True)]
    style.label_points(axes, points, list(table["label"]), [style.INK] * len(points))


def metric_bars(
    frame: pd.DataFrame, path: Path, *, controls: frozenset[str] = style.CONTROLS, colours: Colours = None
) -> Path:
    """Small multiples: a panel for each headline metric that was scored, a bar for each dictionary.

    Raises:
        EvaluationError: no headline metric has a score.
    """
    table = summary(frame)
    scored = [headline for headline in shown_headlines(frame) if table[headline.label].notna().any()]
    panels = [headline for headline in scored if headline.better]
    if not panels:
        raise EvaluationError("plotting the headline metrics: none has a score", cure="turn on an eval")
    chosen = style.colours_of(table["dictionary"], colours, controls)
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    with style.figure(path, 1.5 + 2.5 * columns, rows * (1.0 + 0.36 * len(table))) as drawn:
        grid = drawn.subplots(rows, columns, squeeze=False, sharey=True)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, headline in zip(grid.flat, panels, strict=False):
            _bars(axes, table, headline, [chosen[name] for name in table["dictionary"]])
            reference = reference_value(frame, headline)
            if reference is not None:
                axes.axvline(reference, color=style.INK, lw=1, ls=(0, (4, 3)), zorder=3)
                axes.set_xlabel("dashed: raw activations", fontsize=8.5, color=style.FAINT)
    return Path(path)


def _bars(axes: Axes, table: pd.DataFrame, headline: Column, colours: list[str]) -> None:
    values = [float(value) for value in table[headline.label]]
    places = list(range(len(values)))
    lengths = [0.0 if math.isnan(value) else value for value in values]
    axes.barh(places, lengths, color=colours, height=0.66)
    low, high = min(0.0, *lengths), max(0.0, *lengths)
    span = (high - low) or 1.0
    backing = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # keeps the reference line off the number
    for place, length, text in zip(places, lengths, column_texts(headline.label, values), strict=True):
        # A little further out than the longest bar, so no number crosses its panel's edge.
        axes.text(
            max(length, 0.0) + 0.03 * span, place, text, va="center", ha="left", fontsize=9, zorder=4, bbox=backing
        )
    axes.set_xlim(low, high + 0.42 * span)
    axes.set_yticks(places, entry_labels(table))
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_title(headline.heading)
    axes.set_xticks([])
    axes.grid(False)
    axes.axvline(0, color="#9a9a9a", lw=0.8)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(left=False)


def training_curves(logs: Mapping[str, list[dict[str, Any]]], path: Path, *, colours: Colours = None) -> Path:
    """DB-KSVD's error on each batch before and after its update, and atoms that no sample used.

    Args:
        logs: by dictionary, an entry a batch: samples_seen, fvu, fvu_after_update, dead.
    Raises:
        EvaluationError: no entries.
    """
    logs = {name: entries for name, entries in logs.items() if entries}
    if not logs:
        raise EvaluationError("plotting training: the logs are empty", cause="no dictionary was trained with a log")
    chosen = style.colours_of(logs, colours)
    with style.figure(path, 8.0, 5.6) as drawn:
        error, dead = drawn.subplots(2, 1, sharex=True, height_ratios=[2, 1])
        for name, entries in logs.items():
            log = pd.DataFrame(entries).sort_values("samples_seen", kind="stable")
            seen = log["samples_seen"]
            few = {"marker": "o", "ms": 4} if len(log) <= 40 else {}
            error.plot(seen, log["fvu"], color=chosen[name], lw=1.2, ls=(0, (3, 2)), alpha=0.75, **few, mfc="white")
            error.plot(seen, log["fvu_after_update"], color=chosen[name], lw=1.8, **few)
            dead.plot(seen, log["dead"], color=chosen[name], lw=1.6, drawstyle="steps-post", clip_on=False, **few)
        error.set_title("Error on each batch")
        error.set_ylabel("FVU of the batch")
        dead.set_title("Atoms that no sample of the batch used")
        dead.set_ylabel("atoms")
        dead.set_xlabel("samples seen")
        dead.set_ylim(bottom=0)
        style.count_axis(dead, "x")
        style.count_axis(dead, "y")
        names = [Line2D([], [], color=chosen[name], lw=2.5, label=name) for name in logs]
        kinds = [
            Line2D([], [], color=style.INK, lw=1.2, ls=(0, (3, 2)), label="before the update"),
            Line2D([], [], color=style.INK, lw=1.8, label="after the update"),
        ]
        error.legend(handles=[*names, *kinds], loc="upper right", ncols=1 if len(names) < 3 else 2)
    return Path(path)


def density_histogram(densities: Mapping[str, np.ndarray[Any, Any]], path: Path, *, colours: Colours = None) -> Path:
    """How often latents fire: a histogram of log10 of the share of tokens, either sign, for each dictionary.

    Args:
        densities: by dictionary, for each latent the share of tokens whose code for it is not zero.
    Raises:
        EvaluationError: nothing to draw, or values outside [0, 1].
    """
    arrays = {name: np.asarray(values, dtype=float).ravel() for name, values in densities.items() if np.size(values)}
    if not arrays:
        raise EvaluationError("plotting firing densities: there are none")
    for name, values in arrays.items():
        if not ((values >= 0) & (values <= 1)).all():
            raise EvaluationError(
                f"plotting firing densities of {name!r}: not shares of tokens",
                got=f"values from {values.min():.4g} to {values.max():.4g}",
                limit="0 to 1",
                cause="counts were given",
                cure="divide by the number of tokens",
            )
    live = {name: values[values > 0] for name, values in arrays.items()}
    lowest = min((float(values.min()) for values in live.values() if len(values)), default=1e-6)
    # Tenths of a decade up to 0, where a latent fires on every token.
    bins = np.arange(math.floor(10 * math.log10(lowest)) - 1, 1) / 10
    chosen = style.colours_of(arrays, colours)
    with style.figure(path, 8.0, 0.9 + 1.25 * len(arrays)) as drawn:
        grid = drawn.subplots(len(arrays), 1, squeeze=False, sharex=True)[:, 0]
        for axes, (name, values) in zip(grid, arrays.items(), strict=True):
            # Shares of all latents, dead ones too: what is missing from the bars is dead.
            weights = np.full(len(live[name]), 100 / len(values))
            axes.hist(np.log10(live[name]), bins=bins, weights=weights, color=chosen[name])
            _describe_densities(axes, name, len(values), len(values) - len(live[name]))
        grid[0].text(-2, 1.02, "1%", transform=grid[0].get_xaxis_transform(), ha="center", fontsize=8.5)
        grid[0].text(-1, 1.02, "10%", transform=grid[0].get_xaxis_transform(), ha="center", fontsize=8.5)
        grid[-1].set_xlabel("log₁₀ of the share of tokens on which a latent fires, with either sign")
        drawn.supylabel("% of latents", fontsize=10)
    return Path(path)


def _describe_densities(axes: Axes, name: str, latents: int, dead: int) -> None:
    text = f"{latents:,} latents, {f'{dead:,} dead' if dead else 'none dead'}"
    for line, below, look in ((name, 4, {"weight": "bold"}), (text, 19, {"size": 9, "color": style.FAINT})):
        axes.annotate(line, (0, 1), (6, -below), "axes fraction", "offset points", va="top").set(**look)
    for share in (-2, -1):
        axes.axvline(share, color=style.FAINT, lw=0.8, ls=(0, (2, 3)), zorder=0)
    axes.grid(visible=False)
    axes.locator_params(axis="y", nbins=4)
