"""One figure to sum up by: each method's rank in every headline metric, and the mean of its ranks."""

import textwrap
from pathlib import Path

import pandas as pd

from ksvd_sae.errors import EvaluationError
from ksvd_sae.report import style
from ksvd_sae.report.plots import Colours
from ksvd_sae.report.tables import entry_labels, shown_headlines, summary


def ranks(frame: pd.DataFrame, controls: frozenset[str] = frozenset()) -> pd.DataFrame:
    """Rank of each real method (row, by its label) in each headline metric (column); 1 is the best, ties share a mean.

    Only metrics that every real method has a score in, and in which they differ: the means are then over the same
    things. Empty where fewer than two methods or no metric are left.
    """
    table = summary(frame)
    table["label"] = entry_labels(table)
    real = table[~table["dictionary"].isin(controls)].set_index("label")
    columns = {
        headline.heading: real[headline.label].rank(ascending=headline.better == "lower", method="average")
        for headline in shown_headlines(frame)
        if headline.better and real[headline.label].notna().all() and real[headline.label].nunique() > 1
    }
    return pd.DataFrame(columns, index=real.index) if len(real) > 1 else pd.DataFrame()


def mean_ranks(
    frame: pd.DataFrame, path: Path, controls: frozenset[str] = frozenset(), *, colours: Colours = None
) -> Path:
    """A line for each method, the best on top: a dot for each metric's rank, a bar at their mean.

    Raises: EvaluationError: nothing to rank.
    """
    table = ranks(frame, controls)
    if table.empty:
        raise EvaluationError("plotting ranks: nothing to rank", limit="two methods with scores in the same metric")
    whole = summary(frame)
    chosen = style.colours_of(whole["dictionary"], colours, controls)
    colour = dict(zip(entry_labels(whole), (chosen[name] for name in whole["dictionary"]), strict=True))
    means = table.mean(axis=1).sort_values(kind="stable")
    n = len(table)
    with style.figure(path, 8.4, 1.9 + 0.5 * n) as drawn:
        axes = drawn.add_subplot()
        for place, label in enumerate(means.index):
            row = table.loc[label]
            axes.plot([row.min(), row.max()], [place, place], color=colour[label], lw=1.2, alpha=0.45, zorder=1)
            # Metrics in which a method has the same rank stand beside each other.
            for rank, metrics in row.groupby(row):
                for i, _ in enumerate(metrics):
                    shift = (i - (len(metrics) - 1) / 2) * min(0.075, 0.012 * n)
                    axes.plot(rank + shift, place, "o", ms=5.5, mfc=colour[label], mec="white", mew=0.6, zorder=3)
            axes.plot(means[label], place, "|", ms=19, mew=2.6, color=style.INK, zorder=4)
            axes.annotate(
                f"{means[label]:.2f}", (1, place), (8, 0), ("axes fraction", "data"), "offset points", va="center"
            )
        axes.set_yticks(range(n), list(means.index))
        axes.set_ylim(n - 0.45, -0.55)
        axes.set_xlim(0.7, n + 0.3)
        axes.set_xticks(range(1, n + 1))
        axes.grid(visible=False, axis="y")
        axes.tick_params(left=False)
        axes.spines[["left"]].set_visible(False)
        axes.set_title("Mean rank: a bar; dots: its rank in each metric")
        columns = textwrap.fill(", ".join(table.columns), 90)
        axes.set_xlabel(f"rank among {n} methods (1 is the best) in\n{columns}")
        axes.annotate("mean", (1, 1), (8, 6), "axes fraction", "offset points", va="bottom", color=style.FAINT, size=9)
    return Path(path)
