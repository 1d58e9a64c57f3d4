"""What a coder makes of a dictionary: error, behaviour and meaning of every dictionary under each coder."""

import math
from pathlib import Path

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes

from ksvd_sae.evals.base import Column
from ksvd_sae.report import style
from ksvd_sae.report.headline import HEADLINES
from ksvd_sae.report.pivot import coder_cells, coders
from ksvd_sae.report.statistics import Estimate
from ksvd_sae.run.config import RunConfig

# Error, behaviour, meaning; of each the first score that dictionaries have under several coders.
_SHOWN = (("FVU",), ("nats lost, spliced", "nats lost"), ("autointerp",))
Cells = dict[tuple[str, str], Estimate]


def coders_compared(
    frame: pd.DataFrame, config: RunConfig, path: Path, controls: frozenset[str], colours: dict[str, str]
) -> Path | None:
    """Error, behaviour and meaning, a panel each: dictionaries as lines from coder to coder, with 95 % intervals.

    Dictionaries that are learned in a weighted metric have full markers and lines, the others open and dashed ones.
    Controls are left out: they would flatten all others.
    Returns: None if no dictionary is coded in two ways.
    """
    columns = coders(config)
    panels = shown_scores(frame, config, controls)
    if not panels:
        return None
    with style.figure(path, 2.0 + 3.8 * len(panels), 4.6) as drawn:
        grid = drawn.subplots(1, len(panels), squeeze=False)
        present = {of for cells in panels.values() for of, _ in cells}
        names = [name for name in config.dictionaries if name in present]
        handles: dict[str, Artist] = {}
        for axes, (headline, cells) in zip(grid.flat, panels.items(), strict=True):
            _panel(axes, headline, cells, columns, names, config, colours)
            found, labels = axes.get_legend_handles_labels()
            handles.update(zip(labels, found, strict=True))
        drawn.legend([handles[name] for name in names], names, loc="outside right center", title="dictionary")
    return Path(path)


def shown_scores(frame: pd.DataFrame, config: RunConfig, controls: frozenset[str]) -> dict[Column, Cells]:
    """What the panels show, in their order: scores of which dictionaries have several by coder."""
    by_label = {headline.label: headline for headline in HEADLINES}
    panels: dict[Column, Cells] = {}
    for labels in _SHOWN:
        for headline in (by_label[label] for label in labels):
            cells = _of_methods(coder_cells(frame, config, headline), controls)
            if len({column for _, column in cells}) > 1:
                panels[headline] = cells
                break
    return panels


def _of_methods(cells: Cells, controls: frozenset[str]) -> Cells:
    return {place: e for place, e in cells.items() if place[0] not in controls and math.isfinite(e.mean)}


def _panel(
    axes: Axes,
    headline: Column,
    cells: Cells,
    columns: list[str],
    names: list[str],
    config: RunConfig,
    colours: dict[str, str],
) -> None:
    for i, name in enumerate(names):
        here = [column for column in columns if (name, column) in cells]
        # One that another panel has keeps its marker and its place.
        if not here:
            continue
        # Side by side, so that no interval hides another.
        places = [columns.index(column) + 0.05 * (i - (len(names) - 1) / 2) for column in here]
        means = [cells[name, column].mean for column in here]
        widths = [w if math.isfinite(w := cells[name, column].half_width) else 0.0 for column in here]
        weighted = config.dictionaries[name].metric.kind != "none"
        axes.errorbar(
            places,
            means,
            widths,
            color=colours[name],
            marker=style.MARKERS[i % len(style.MARKERS)],
            mfc=colours[name] if weighted else "white",
            ls="-" if weighted else "--",
            lw=1.4,
            ms=6,
            elinewidth=1,
            label=name,
        )
    axes.set_xticks(range(len(columns)), [column.replace(" ", "\n", 1) for column in columns])
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_title(headline.heading)
    axes.set_xlabel("coder")
    axes.grid(visible=False, axis="x")
