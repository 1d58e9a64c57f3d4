"""Held-out error against samples and seconds of training: a table and a figure of a run's efficiency."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from ksvd_sae.report import style
from ksvd_sae.report.markdown import markdown_table
from ksvd_sae.run.efficiency import measure_efficiency
from ksvd_sae.run.pipeline import Run
from ksvd_sae.run.rows import Rows
from ksvd_sae.store import atomic_path

_FVU_TICKS = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)


def efficiency_plot(rows: list[dict[str, Any]], path: Path) -> Path:
    """Held-out FVU against samples seen and against seconds of training, both on log axes."""
    frame = pd.DataFrame(rows).sort_values("samples_seen")
    colours = style.palette(dict.fromkeys(frame["dictionary"]))
    with style.figure(path, 10.0, 4.4) as drawn:
        panels: list[tuple[str, str]] = [("samples_seen", "samples seen"), ("seconds", "seconds of training")]
        for axes, (column, label) in zip(drawn.subplots(1, 2, sharey=True), panels, strict=True):
            for index, (name, group) in enumerate(frame.groupby("dictionary", sort=False)):
                marker = style.MARKERS[index % len(style.MARKERS)]
                axes.plot(
                    group[column], group["fvu"], marker=marker, markersize=4, color=colours[str(name)], label=str(name)
                )
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=_FVU_TICKS))
            axes.yaxis.set_minor_locator(NullLocator())
            # Matplotlib's own labels of log axes are formulas, which the style leaves as text.
            for which in ("x", "y"):
                style.count_axis(axes, which)
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel(label)
        drawn.axes[0].set_ylabel("held-out FVU")
        drawn.axes[0].set_title("Error against data")
        drawn.axes[1].set_title("Error against time")
        handles, labels = drawn.axes[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    return path


def write_efficiency(run: Run, passes: list[int]) -> tuple[Path, int]:
    """Measure, then rows.jsonl, table.md and efficiency.png in the run's results; the plot's path, and points in it."""
    folder = run.results
    rows = measure_efficiency(run, passes, Rows(folder / "rows.jsonl"))
    heads = ["dictionary", "samples seen", "seconds", "held-out FVU"]
    lines = [
        [row["dictionary"], f"{row['samples_seen']:,}", f"{row['seconds']:.1f}", f"{row['fvu']:.4f}"]
        for row in sorted(rows, key=lambda row: (row["dictionary"], row["samples_seen"]))
    ]
    with atomic_path(folder / "table.md") as temporary:
        temporary.write_text(markdown_table(heads, lines, heads[1:]) + "\n")
    return efficiency_plot(rows, folder / "efficiency.png"), len(rows)
