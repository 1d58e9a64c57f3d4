"""One self-contained HTML page: the headline table, the figures, atoms, scores by seed, and where it all came from.

The page loads nothing: style, script and images are inside it, and its content policy forbids the rest.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from ksvd_sae.errors import ConfigError, EvaluationError
from ksvd_sae.report import scores, tables
from ksvd_sae.report.atoms import LEVELS, STRATA, DictionaryAtoms
from ksvd_sae.report.headline import DESCRIPTIONS, HEADLINES, MISSING
from ksvd_sae.report.sections import Section, section_context
from ksvd_sae.report.style import DPI
from ksvd_sae.run.config import dump_config, parse_config
from ksvd_sae.store import atomic_path

TEMPLATE = "report.html.j2"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# The config has a place of its own; file names by the hundred are in manifest.json.
_NOT_IN_MANIFEST = ("config", "files", "examples")
_CONTROLS = " Controls (grey) show what a method must beat; they do not compete for the bold."
_BETTER = {"lower": "↓ lower is better", "higher": "↑ higher is better"}


@dataclass(frozen=True)
class Plot:
    """A figure as it goes into the page."""

    caption: str
    data_uri: str
    width: int
    height: int


def write_report(
    path: Path,
    title: str,
    frame: pd.DataFrame,
    plots: Mapping[str, Path],
    notes: Sequence[str],
    manifest: Mapping[str, Any],
    controls: frozenset[str] = frozenset(),
    sections: Sequence[Section] = (),
    atoms: Sequence[DictionaryAtoms] = (),
    n_atoms_elsewhere: int = 0,
) -> Path:
    """Write the report.

    Args:
        path: the HTML file to write.
        title: the page's title.
        frame: the scores, see ``scores.COLUMNS``.
        plots: caption -> PNG, in order.
        notes: what a reader must know, a paragraph each.
        manifest: the run's manifest; its config (at ``config`` or ``key.config``) is shown as YAML, its lists of result
            files are not.
        controls: dictionaries that are no contestants.
        sections: further tables, below the headline table.
        atoms: samples of the dictionaries' atoms, in order.
        n_atoms_elsewhere: how many dictionaries' samples are in the raw results only.
    Raises:
        EvaluationError: the frame is no table of scores, or a plot is no PNG.
    """
    table, widths = tables.summary(frame), tables.intervals(frame)
    typed, by_seed = scores.typed_frame(frame), tables.by_seed(frame)
    page = _environment().get_template(TEMPLATE)
    html = page.render(
        title=title,
        lead=reading_guide(table, controls),
        heads=_heads(table),
        rows=[
            {"control": name in controls, "cells": row}
            for name, row in zip(table["dictionary"], tables.cells(table, controls, widths), strict=True)
        ],
        marks=tables.legend_intro(table, controls),
        legend=tables.legend(frame),
        seeds=tables.seeds_text(frame),
        plots=[_plot(caption, Path(png)) for caption, png in plots.items()],
        sections=[section_context(section) for section in sections],
        notes=list(notes),
        atoms=list(atoms),
        strata=STRATA,
        levels=LEVELS,
        n_atoms_elsewhere=n_atoms_elsewhere,
        seed_heads=[{"name": head, "number": head not in ("dictionary", "view")} for head in tables.headings(by_seed)],
        seed_rows=_seed_rows(by_seed),
        n_scores=f"{len(typed):,}",
        facts=_facts(typed, manifest),
        versions=_versions(manifest),
        config=_config_text(manifest),
        manifest=_json({key: value for key, value in manifest.items() if key not in _NOT_IN_MANIFEST}),
    )
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return Path(path)


def _environment() -> jinja2.Environment:
    def source(name: str) -> str:
        return files(__package__).joinpath(name).read_text(encoding="utf-8")

    return jinja2.Environment(
        loader=jinja2.FunctionLoader(source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


# What columns of a run on images say.
_ON_IMAGES = {
    "probe kept": "what they keep of an image's class",
    "image probing": "what few latents say of it",
    "spatial": "whether a latent's patches lie together",
}


def reading_guide(table: pd.DataFrame, controls: frozenset[str]) -> str:
    """How to read the page, and who leads in error and in behaviour."""
    if "loss recovered" not in table:
        said = ["FVU says how far the rebuilt activations are from the real ones"]
        said += [f"{column} {what}" for column, what in _ON_IMAGES.items() if column in table]
        text = (
            "Each row is a dictionary that rebuilds a vision model's activations from a few atoms a patch. "
            f"{', '.join(said[:-1])}{' and ' if len(said) > 1 else ''}{said[-1]}."
        )
        return text + (_CONTROLS if controls & set(table["dictionary"]) else "")
    text = (
        "Each row is a dictionary that rebuilds the model's activations from a few atoms a token. "
        "FVU says how far the rebuilt activations are from the real ones; loss recovered, KL and nats lost say what "
        "the language model still does with them, and probing says what single latents tell about a text. "
        "These need not agree: a low error is not yet a working model."
    )
    real = table[[name not in controls for name in table["dictionary"]]].reset_index(drop=True)
    scored = real[real["FVU"].notna() & real["loss recovered"].notna()].reset_index(drop=True)
    # Two views of the same codes rebuild the same: which of them is ahead is rounding.
    signed = set(scored.loc[scored["view"] == "signed", "dictionary"])
    scored = scored[~((scored["view"] == "split") & scored["dictionary"].isin(signed))].reset_index(drop=True)
    if len(scored) > 1:
        labels = tables.entry_labels(scored)
        nearest = labels[int(scored["FVU"].to_numpy().argmin())]
        keeps = labels[int(scored["loss recovered"].to_numpy().argmax())]
        if nearest == keeps:
            text += f" Here {nearest} has both the lowest error and the most loss recovered."
        else:
            text += f" Here {nearest} has the lowest error, and {keeps} recovers the most loss."
    if len(real) < len(table):
        text += _CONTROLS
    return text


def _heads(table: pd.DataFrame) -> list[dict[str, Any]]:
    better = {headline.label: headline for headline in HEADLINES}
    heads = []
    for name in table.columns:
        headline = better.get(name)
        heads.append(
            {
                "name": name,
                "number": name not in ("dictionary", "view"),
                "better": _BETTER.get(headline.better or "", "") if headline else "",
                "arrow": headline.arrow if headline else "",
                "title": headline.meaning if headline else DESCRIPTIONS[name],
            }
        )
    return heads


def _plot(caption: str, png: Path) -> Plot:
    try:
        content = png.read_bytes()
    except OSError as error:
        raise EvaluationError(f"putting plot {caption!r} into the report: {error}") from error
    if not content.startswith(PNG_SIGNATURE) or len(content) < 24:
        raise EvaluationError(
            f"putting plot {caption!r} into the report: {png} is no PNG", got=content[:8], cure="draw the plot again"
        )
    # Width and height stand first in the header, so the page keeps its shape while it loads.
    # A CSS inch is 96 pixels: all figures at their own size have letters of one size.
    width, height = (round(int.from_bytes(content[at : at + 4], "big") * 96 / DPI) for at in (16, 20))
    return Plot(caption, "data:image/png;base64," + base64.b64encode(content).decode("ascii"), width, height)


def _seed_rows(by_seed: pd.DataFrame) -> list[list[tuple[str, Any]]]:
    """(text, sort key) of every cell of the table of trainings."""
    styles = {headline.label: headline.style for headline in HEADLINES}
    rows = []
    for record in by_seed.to_dict("records"):
        row: list[tuple[str, Any]] = []
        for name, value in record.items():
            if name in ("dictionary", "view"):
                row.append((value, value))
            elif pd.isna(value):
                row.append(("none" if name == "seed" else MISSING, ""))
            elif name == "seed":
                row.append((str(value), value))
            elif styles.get(str(name)) == "count":
                row.append((f"{value:,.0f}", f"{value:.9g}"))
            else:
                row.append((f"{value:.6g}", f"{value:.6g}"))
        rows.append(row)
    return rows


def _facts(typed: pd.DataFrame, manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    seeds = ", ".join(str(seed) for seed in sorted({int(value) for value in typed["seed"].dropna()}))
    known = [(name, manifest.get(name)) for name in ("commit", "written", "stage", "hash", "device")]
    facts = [(name, str(value)) for name, value in known if value is not None]
    return [*facts, ("training seeds", seeds or "not recorded"), ("scores", f"{len(typed):,}")]


def _versions(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions = manifest.get("versions")
    return [(str(name), str(value)) for name, value in versions.items()] if isinstance(versions, Mapping) else []


def _config_text(manifest: Mapping[str, Any]) -> str:
    """The run's config as YAML; as JSON if it is none that today's config accepts; empty if there is none."""
    key = manifest.get("key")
    config = manifest.get("config") or (key.get("config") if isinstance(key, Mapping) else None)
    if config is None or isinstance(config, str):
        return config or ""
    if not isinstance(config, Mapping):
        return _json(config)
    try:
        return dump_config(parse_config(dict(config)))
    except ConfigError:
        return _json(config)


def _json(value: Any) -> str:
    plain = dict(value) if isinstance(value, Mapping) else value
    return json.dumps(plain, indent=2, sort_keys=True, default=str, ensure_ascii=False)
