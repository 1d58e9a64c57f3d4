"""What a study says: a table with error bars over seeds and figures of error against behaviour."""

from pathlib import Path
from typing import Any, Literal

import pandas as pd

from ksvd_sae.errors import EvaluationError
from ksvd_sae.report import style
from ksvd_sae.report.differences import of_study, study_section
from ksvd_sae.report.markdown import markdown_table
from ksvd_sae.report.sections import Section, section_markdown
from ksvd_sae.report.statistics import half_width
from ksvd_sae.run.study import Study
from ksvd_sae.store import atomic_path

TABLE, SUMMARY = "table.md", "summary.csv"
_GROUP = ["layer", "k", "entry", "weighting", "coding", "coding_k"]
# column: (heading, decimals, whether lower is better)
_METRICS: dict[str, tuple[str, int, bool]] = {
    "l0": ("L0", 1, True),
    "fvu": ("FVU ↓", 4, True),
    "nats_lost": ("nats lost ↓", 3, True),
    "loss_recovered": ("loss recovered ↑", 4, False),
    "kl": ("KL ↓", 3, True),
    "fisher_error": ("Fisher error ↓", 2, True),
    "dead_fraction": ("dead ↓", 3, True),
}
_ERRORS = {"fvu": "FVU (raw space)", "fisher_error": "Fisher error"}
# coding: (filling of its marker, its name)
_FILLS: dict[str, tuple[Literal["none", "left"], str]] = {
    "mp": ("none", "coded by MP"),
    "refit": ("left", "MP with refit"),
}
_FILLED: tuple[Literal["full"], str] = ("full", "OMP, or its own encoder")
_WEIGHTING_MARKERS = {"none": "o", "std": "^", "whiten": "v", "fisher_diag": "s", "fisher": "D"}


def summarise(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Mean and half-width of the 95 % interval (Student's t over seeds) of each metric; one line a setting.

    Columns: those of the setting, ``seeds``, and for each metric its mean and ``<metric>_ci`` (NaN for one seed).
    """
    if not rows:
        raise EvaluationError("study: no rows yet", cure="run the study first")
    frame = pd.DataFrame(rows)
    lines = []
    for setting, group in frame.groupby(_GROUP, sort=False):
        line = dict(zip(_GROUP, setting, strict=True)) | {"seeds": group["seed"].nunique()}
        line |= {"samples_seen": group["samples_seen"].mean(), "train_seconds": group["train_seconds"].median()}
        for metric in _METRICS:
            values = (
                pd.to_numeric(group[metric], errors="coerce").dropna() if metric in group else pd.Series(dtype=float)
            )
            line[metric] = float(values.mean()) if len(values) else float("nan")
            line[f"{metric}_ci"] = half_width(values.tolist())
        lines.append(line)
    return pd.DataFrame(lines).sort_values(["layer", "k", "nats_lost"]).reset_index(drop=True)


def markdown(table: pd.DataFrame, study_name: str, against: Section | None = None) -> str:
    """One table a layer and k, best behaviour first.

    Args: against: the dictionaries against the SAEs, see ``differences.study_section``.
    """
    parts = [
        f"# {study_name}",
        "Mean ± half-width of the 95 % interval over training seeds (Student's t; none for one seed). Sorted by nats "
        "lost, the rise of the next-token loss when the reconstruction is spliced in. Fisher error: mean eᵀFe of the "
        "error e, the rise of the loss to second order if F = mean ggᵀ were its Hessian, times two. "
        f"Made by `ksvd-sae study {study_name}` from `rows.jsonl`.",
    ]
    for (layer, k), group in table.groupby(["layer", "k"], sort=True):
        heads = ["dictionary", "coded by", "samples seen", "seeds", *(name for name, _, _ in _METRICS.values())]
        lines = []
        for row in group.to_dict("records"):
            coded = row["coding"] + ("" if row["coding_k"] == k else f", k = {row['coding_k']}")
            cells = [_text(row[m], row[f"{m}_ci"], digits) for m, (_, digits, _) in _METRICS.items()]
            lines.append([row["entry"], coded, f"{row['samples_seen']:,.0f}", str(row["seeds"]), *cells])
        parts.append(f"## Layer {layer}, k = {k}\n\n{markdown_table(heads, lines, heads[2:])}")
    parts += ["\n".join(section_markdown(against)).strip()] if against else []
    parts.append(_explained(table))
    return "\n\n".join(parts) + "\n"


def correlations(table: pd.DataFrame) -> pd.DataFrame:
    """Pearson correlation of nats lost with FVU and with the Fisher error over the settings of each layer and k.

    Columns: layer, k, settings, and one for each error (NaN for fewer than three settings).
    """
    lines = []
    for (layer, k), group in table.groupby(["layer", "k"], sort=True):
        line = {"layer": layer, "k": k, "settings": len(group)}
        for error in _ERRORS:
            known = group[[error, "nats_lost"]].dropna()
            line[error] = float(known[error].corr(known["nats_lost"])) if len(known) > 2 else float("nan")
        lines.append(line)
    return pd.DataFrame(lines)


def _explained(table: pd.DataFrame) -> str:
    heads = ["layer", "k", "settings", "FVU", "Fisher error"]
    lines = [
        [*(str(row[name]) for name in heads[:3]), *(_text(row[error], float("nan"), 3) for error in _ERRORS)]
        for row in correlations(table).to_dict("records")
    ]
    lead = "## What goes with nats lost\n\nPearson correlation over the settings of a layer and k."
    return f"{lead}\n\n{markdown_table(heads, lines, heads)}"


def _text(mean: float, ci: float, digits: int) -> str:
    if mean != mean:
        return "n/a"
    return f"{mean:.{digits}f}" if ci != ci else f"{mean:.{digits}f} ± {ci:.{digits}f}"


def frontier_plot(table: pd.DataFrame, path: Path, error: Literal["fvu", "fisher_error"] = "fvu") -> Path:
    """Error against nats lost, a panel a layer and k; colour: method, marker: weighting, filling: coder."""
    panels = list(table.groupby(["layer", "k"], sort=True))
    families = list(dict.fromkeys(family(name) for name in sorted(table["entry"])))
    colours = style.palette(families)
    n_columns = min(3, len(panels))
    n_lines = -(-len(panels) // n_columns)
    with style.figure(path, 4.6 * n_columns, 3.9 * n_lines + 0.6) as drawn:
        grid = drawn.subplots(n_lines, n_columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, ((layer, k), group) in zip(grid.flat, panels, strict=False):
            for row in group.to_dict("records"):
                axes.errorbar(
                    row[error],
                    row["nats_lost"],
                    xerr=None if row[f"{error}_ci"] != row[f"{error}_ci"] else row[f"{error}_ci"],
                    yerr=None if row["nats_lost_ci"] != row["nats_lost_ci"] else row["nats_lost_ci"],
                    color=colours[family(row["entry"])],
                    marker=_WEIGHTING_MARKERS[row["weighting"]],
                    markersize=6,
                    elinewidth=1,
                    linestyle="none",
                    fillstyle=_FILLS.get(row["coding"], _FILLED)[0],
                )
            axes.set_title(f"layer {layer}, k = {k}")
            axes.set_xlabel(_ERRORS[error])
            axes.locator_params(axis="x", nbins=6)
            axes.set_ylabel("nats lost")
        _legend(drawn, colours, sorted(set(table["weighting"])), set(table["coding"]))
    return path


def family(entry: str) -> str:
    """The method of an entry: its name without the weighting that it ends in."""
    for suffix in ("-std", "-fisher", "-fisher-full"):
        entry = entry.removesuffix(suffix)
    return entry


def _legend(drawn: Any, colours: dict[str, str], weightings: list[str], codings: set[str]) -> None:
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], color=colours[name], marker="o", linestyle="none", label=name) for name in colours]
    marks += [
        Line2D([], [], color=style.INK, marker=_WEIGHTING_MARKERS[name], linestyle="none", label=f"weighting: {name}")
        for name in weightings
    ]
    if codings & _FILLS.keys():
        marks += [
            Line2D([], [], color=style.INK, marker="o", linestyle="none", fillstyle=fill, label=label)
            for fill, label in (*(_FILLS[name] for name in _FILLS if name in codings), _FILLED)
        ]
    # Four names side by side are wider than a single panel.
    drawn.legend(handles=marks, loc="outside lower center", ncols=4 if len(drawn.axes) > 1 else 2, frameon=False)


def write_report(study: Study) -> Path:
    """summary.csv, table.md, frontier.png and, with gradients, fisher.png in the study's folder; the table's path."""
    rows = study.rows()
    table = summarise(rows)
    study.folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(study.folder / SUMMARY) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")
    with atomic_path(study.folder / TABLE) as temporary:
        temporary.write_text(markdown(table, study.config.name, study_section(of_study(rows))))
    frontier_plot(table, study.folder / "frontier.png")
    if table["fisher_error"].notna().any():
        frontier_plot(table, study.folder / "fisher.png", "fisher_error")
    return study.folder / TABLE
