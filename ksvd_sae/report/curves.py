"""Curves of the eval ``truth``: rows, a table and a figure."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.ticker import NullFormatter

from ksvd_sae.report import style
from ksvd_sae.report.markdown import markdown_table
from ksvd_sae.report.statistics import half_width
from ksvd_sae.run.curves import CurvesConfig, Runs, measure_curves
from ksvd_sae.run.rows import Rows
from ksvd_sae.store import atomic_path

# metric: what it is called
_SCORES = {
    "f1_thresholded": "true F1",
    "f1_gap": "true F1 at the gap",
    "f1": "true F1 as coded",
    "mcc": "MCC",
    "r2": "R²",
    "stable_fraction": "stable",
}


def write_curves(config: CurvesConfig, runs: Runs, results: Path) -> tuple[Path, int]:
    """Measure, then rows.jsonl, table.md and curves.png in ``results/<name>``; the plot's path, and points in it."""
    folder = results / config.name
    frame = pd.DataFrame(measure_curves(config, runs, Rows(folder / "rows.jsonl")))
    frame["value"] = frame["value"].map(_shown)
    with atomic_path(folder / "table.md") as temporary:
        temporary.write_text(_tables(config, frame))
    return curves_plot(config, frame, folder / "curves.png"), len(frame)


def _tables(config: CurvesConfig, frame: pd.DataFrame) -> str:
    parts = [
        f"# {config.name}",
        f"Made by `ksvd-sae curves {config.name}` from `rows.jsonl`. Mean ± half-width of the 95 % interval over "
        "worlds (Student's t; none for one). True F1: latents below the best threshold dropped, which other samples "
        "chose; at the gap: those below the gap in sizes, if there is one; as coded: none dropped. Stable: as of the "
        "eval stability, from a second training in the world. L0, dead and R² are of codes as they come.",
    ]
    for title, curve in config.curves.items():
        own = frame[frame["curve"] == title]
        metrics = [metric for metric in _SCORES if metric in own and own[metric].notna().any()]
        heads = [title, "dictionary", "worlds", "L0", *(_SCORES[metric] for metric in metrics), "dead"]
        lines = []
        for (value, name), group in own.groupby(["value", "dictionary"], sort=False):
            scores = [_cell(group[metric], 3) for metric in metrics]
            shown = value if isinstance(value, str) else f"{value:,.10g}"
            lines.append(
                [shown, str(name), str(len(group)), _cell(group["l0"], 1), *scores, _cell(group["dead_fraction"], 3)]
            )
        keys = ", ".join(f"`{key}`" for key in (*curve.set, *curve.overrides))
        parts.append(f"## {title}\n\n{keys}\n\n{markdown_table(heads, lines, heads[2:])}")
    return "\n\n".join(parts) + "\n"


def _shown(value: Any) -> Any:
    """A number, or else a name for a value such as a list of groups or null, which a column of numbers has as NaN."""
    if value is None or value != value:
        return "none"
    return value if isinstance(value, (int, float)) else str(value)


def _cell(values: pd.Series, digits: int) -> str:
    width = half_width(values.tolist())
    return f"{values.mean():.{digits}f}" + ("" if width != width else f" ± {width:.{digits}f}")


def curves_plot(config: CurvesConfig, frame: pd.DataFrame, path: Path) -> Path:
    """A row of panels for each score, a column for each curve; bars are 95 % intervals over worlds."""
    names = list(dict.fromkeys(name for curve in config.curves.values() for name in curve.dictionaries))
    colours, shown = style.palette(names), ("f1_thresholded", "f1", "mcc")
    with style.figure(path, 3.1 * len(config.curves) + 0.6, 2.5 * len(shown) + 0.8) as drawn:
        grid = drawn.subplots(len(shown), len(config.curves), sharey="row", sharex="col", squeeze=False)
        for column, (title, curve) in enumerate(config.curves.items()):
            own = frame[frame["curve"] == title]
            values = [_shown(value) for value in curve.values]
            named = not all(isinstance(value, (int, float)) for value in values)
            places = {value: place for place, value in enumerate(values)} if named else {}
            for row, metric in enumerate(shown):
                axes = grid[row, column]
                for name in curve.dictionaries:
                    points = own[own["dictionary"] == name].groupby("value", sort=False)
                    across = points["l0"].mean() if curve.against == "l0" else points["value"].first()
                    if places:
                        across = across.map(places)
                    widths = points[metric].agg(lambda scores: half_width(scores.tolist())).fillna(0)
                    order = across.sort_values().index
                    axes.errorbar(
                        across[order],
                        points[metric].mean()[order],
                        yerr=widths[order],
                        marker=style.MARKERS[names.index(name) % len(style.MARKERS)],
                        markersize=4,
                        color=colours[name],
                        label=name,
                    )
                if places:
                    axes.set_xticks(list(places.values()), [str(value) for value in places])
                elif curve.logarithmic:
                    axes.set_xscale("log")
                    style.count_axis(axes, "x")
                    axes.xaxis.set_minor_formatter(NullFormatter())
            grid[-1, column].set_xlabel("L0" if curve.against == "l0" else title)
            grid[0, column].set_title(title)
        for row, metric in enumerate(shown):
            grid[row, 0].set_ylabel(_SCORES[metric])
        found = {
            label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        drawn.legend(
            found.values(), found, loc="outside lower center", ncols=min(4, len(found)), frameon=False, fontsize=8
        )
    return path
