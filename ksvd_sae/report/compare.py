"""The compare stage: one folder with the table, the plots, the report, and the raw results in one file."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ksvd_sae.methods.base import TRAIN_LOG, Method
from ksvd_sae.report import coder_plot, l0_plots, latex, pivot, plots, rank_plot, report, style, tables
from ksvd_sae.report import scores as score_table
from ksvd_sae.report.atoms import read_examples
from ksvd_sae.report.budget import of_one_budget
from ksvd_sae.report.differences import against_best, verdict_section, write_verdicts
from ksvd_sae.report.items import FILE as ITEMS
from ksvd_sae.report.items import items_of, read_items, reads_from, write_items
from ksvd_sae.report.power import power_section
from ksvd_sae.report.published.section import published_section
from ksvd_sae.report.raw import OWN_EVALS, RAW, result_name, write_raw
from ksvd_sae.report.sections import Section, section_markdown
from ksvd_sae.run.config import RunConfig, TextRunConfig, dump_config, view_name
from ksvd_sae.run.pipeline import Run, Scores
from ksvd_sae.run.replicas import replicas
from ksvd_sae.store import write_json

logger = logging.getLogger(__name__)
_ONE_SEED = "One training seed: differences of a few thousandths are noise."
# Anew in each comparison: the figures, and what `ksvd-sae unpack` may have put beside the archive of an earlier one.
_FOLDERS = ("plots", "saebench", "training", "atoms", *OWN_EVALS)


def compare(run: Run) -> Path:
    """Write results/<name>/ from the run's finished evaluation; see ``write_comparison``.

    Raises: ManifestError: no finished evaluation.
    """
    manifest = run.evaluated()
    logs = {t.label: t.folder / TRAIN_LOG for t in run.trained() if (t.folder / TRAIN_LOG).exists()}
    return write_comparison(run.results, run.config, manifest, run.evaluations, logs)


def write_comparison(
    folder: Path, config: RunConfig, manifest: dict[str, Any], evaluations: Path, logs: dict[str, Path]
) -> Path:
    """Write the folder of a comparison anew; what an earlier one left there is replaced.

    Args:
        manifest: of the evaluation.
        evaluations: the folder of result files.
        logs: of trainings, by panelist.
    Returns: path of report.html.
    """
    frame = score_table.typed_frame(pd.DataFrame(manifest["rows"], columns=list(score_table.COLUMNS)))
    score_table.check_table(frame)
    controls = config.controls
    # Evaluations from before there were atoms in context have none.
    examples = {name: evaluations / "examples" / file for name, file in manifest.get("examples", {}).items()}
    atoms = read_examples(examples)
    for name in _FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    write_raw(folder / RAW, _raw_files(manifest, evaluations, list(examples.values()), logs))
    score_table.write_csv(frame, folder / "comparison.csv")
    write_items(items_of(frame, reads_from(evaluations)), folder / ITEMS)
    # All that is shown follows from what is kept, digit for digit.
    frame = score_table.read_csv(folder / "comparison.csv")
    few, which = of_one_budget(frame, controls)
    atoms_shown = [dictionary for dictionary in atoms if dictionary.name in set(few["dictionary"])]
    bos, version = manifest.get("prepend_bos", True), manifest.get("versions", {}).get("sae-bench")
    notes = comparison_notes(config, manifest.get("split"), bos)
    published = published_section(config, frame, version, controls, bos)
    line = "" if isinstance(published, Section) else published
    notes += [line] if line else []
    items = read_items(folder)
    compared = against_best(frame, config.saes, items)
    # Random atoms vary more than what is compared.
    methods = [scores[~scores["dictionary"].isin(controls)] for scores in (frame, items)]
    tables_below = [
        pivot.coder_section(frame, config),
        verdict_section(compared),
        power_section(*methods),
        published,
    ]
    sections = [section for section in tables_below if isinstance(section, Section)]
    write_verdicts(compared, folder / "verdicts.csv")
    tables.write_markdown(
        frame,
        folder / "comparison.md",
        notes,
        controls,
        title=f"Comparison: {config.name}",
        sections=[line for section in sections for line in section_markdown(section)],
    )
    title = f"Comparison of dictionaries: {config.name}"
    latex.write_latex(frame, folder / "comparison.tex", controls, title=title, label=config.name)
    (folder / "config.yaml").write_text(dump_config(config))
    pictures = _draw(folder, config, frame, (few, which), manifest, evaluations, logs)
    facts = {key: value for key, value in manifest.items() if key != "rows"}
    write_json(folder / "manifest.json", facts)
    written: Path = report.write_report(
        folder / "report.html",
        f"{config.name}: dictionaries compared",
        frame,
        pictures,
        notes,
        facts,
        controls,
        sections,
        atoms_shown,
        n_atoms_elsewhere=len(atoms) - len(atoms_shown),
    )
    return written


def table_so_far(config: RunConfig, scores: Scores) -> str:
    """The headline table of what there is, in Markdown."""
    frame = score_table.typed_frame(pd.DataFrame(scores.rows, columns=list(score_table.COLUMNS)))
    table = tables.summary(frame)
    return tables.to_markdown(table.dropna(axis="columns", how="all"), config.controls)


def comparison_notes(config: RunConfig, split: dict[str, int] | None = None, prepend_bos: bool = True) -> list[str]:
    """What a reader must know to read the numbers right.

    Args: split: of held-out and training text, see ``Split``. prepend_bos: whether contexts begin with a BOS.
    """
    other = "other documents"
    if split is not None and split["cut_tokens"]:
        other = f"other text; a document that is cut goes on, {split['gap_tokens']:,} tokens later, in what was learned"
    if not isinstance(config, TextRunConfig):
        return _image_notes(config)
    notes = [
        f"Model {config.model.title}, hook {config.model.hook}; dictionaries learned on "
        f"{config.harvest.train_tokens:,} tokens before outliers went, scored on {other}."
        f"{'' if prepend_bos else ' Contexts begin without a BOS.'}"
        f"{' BOS and other special tokens are among them.' if config.harvest.keep_special_tokens else ''}",
        "FVU is a reconstruction error, loss recovered is behaviour: the lower error is not always the better "
        "behaviour, so read both.",
        "SAEBench counts density, alive latents and l1 of signed codes by their positive part only; L0, density and "
        "dead latents in eval 'heldout' count both signs. SAEBench 0.6's explained_variance is wrong (it subtracts the "
        "squared mean square); use fvu.",
    ]
    return notes + _common_notes(config)


def _image_notes(config: RunConfig) -> list[str]:
    return [
        f"Model {config.model.title}, {config.model.hook}; dictionaries learned on "
        f"{config.harvest.train_tokens:,} tokens of images before outliers went, scored on other images.",
        "FVU is a reconstruction error; the accuracy of a probe says what a dictionary keeps of an image's class, and "
        "probes on few latents say whether single latents tell it: these need not agree, so read all.",
        "Scores are ViSAEBench's by their definitions, on these images: they are not to be set beside those that it "
        "publishes, which are of ImageNet's validation images.",
        *_common_notes(config),
    ]


def _common_notes(config: RunConfig) -> list[str]:
    notes = [] if len(config.training_seeds) > 1 else [_ONE_SEED]
    if any("split" in method.views for method in config.dictionaries.values()):
        notes.append(
            "View 'split' cuts a signed code f into [max(f, 0), max(−f, 0)], over the atoms and their opposites: as "
            "many nonzero codes, the same reconstruction, twice the latents, none negative, so that SAEBench counts "
            "them all. Dead latents and densities are out of d_sae: do not compare them between the two views."
        )
    notes += method_notes(config)
    if missing := config.evaluation.left_out():
        notes.append(f"Not run, as the config says: {', '.join(missing)}.")
    return notes + [note for section in config.evaluation.evals() for note in section.notes()]


def method_notes(config: RunConfig) -> list[str]:
    """What a reader must know of the kinds of dictionaries."""
    of_kind: dict[type[Method], list[str]] = {}
    for name, method in config.dictionaries.items():
        of_kind.setdefault(type(method), []).append(name)
    return [note for kind, names in of_kind.items() if (note := kind.note(names)) is not None]


def _raw_files(
    manifest: dict[str, Any], evaluations: Path, examples: list[Path], logs: dict[str, Path]
) -> dict[str, Path]:
    """What goes into the archive: name in it -> file."""
    results = {
        result_name(eval_name, file): evaluations / eval_name / file
        for eval_name, files in manifest["files"].items()
        for file in files.values()
    }
    training = {f"training/{name}.jsonl": path for name, path in logs.items()}
    return results | {f"atoms/{path.name}": path for path in examples} | training


def _labels(config: RunConfig) -> dict[str, tuple[str, str]]:
    """Panelist -> its label in figures, which names the view where a dictionary has several; and its dictionary.

    Of several trainings of a dictionary the first stands for all where a figure shows one.
    """
    first = {replica.name: replica for replica in reversed(list(replicas(config)))}
    return {
        view_name(first[name].label, view): (f"{name} ({view})" if len(method.views) > 1 else name, name)
        for name, method in config.dictionaries.items()
        for view in method.views
    }


def _draw(
    folder: Path,
    config: RunConfig,
    frame: pd.DataFrame,
    budget: tuple[pd.DataFrame, str],
    manifest: dict[str, Any],
    evaluations: Path,
    logs: dict[str, Path],
) -> dict[str, Path]:
    """The plots that the run has data for, caption -> PNG.

    Args: budget: what figures of many dictionaries show, see ``of_one_budget``.
    """
    target = folder / "plots"
    target.mkdir(parents=True, exist_ok=True)
    controls, (few, which) = config.controls, budget
    shown = list(dict.fromkeys(few["dictionary"]))
    # Those that others have their atoms from first: they share a figure, and colours come round again after ten.
    crossed = list(dict.fromkeys(of for of, _ in pivot.places(config).values()))
    colours = style.palette([*crossed, *shown, *dict.fromkeys(frame["dictionary"])], controls)
    pictures = {
        f"Headline metrics.{which}": plots.metric_bars(few, target / "metrics.png", controls=controls, colours=colours)
    }
    by_coder = coder_plot.coders_compared(frame, config, target / "coders.png", controls, colours)
    if by_coder:
        caption = (
            "Dictionaries by coders: error, what the model loses, what latents mean to the judge. "
            "Full: learned in a weighted metric."
        )
        pictures[caption] = by_coder
    if {"heldout", "core"} <= manifest["files"].keys():
        caption = "Error against behaviour: FVU on held-out tokens, and the part of the model's loss that survives."
        pictures[caption + which] = plots.error_against_behaviour(
            few, target / "error_against_behaviour.png", controls, colours=colours
        )
    labels = _labels(config)
    densities = {
        labels[panelist][0]: np.asarray(json.loads((evaluations / "heldout" / file).read_text())["density"])
        for panelist, file in manifest["files"].get("heldout", {}).items()
        if panelist in labels and labels[panelist][1] in shown
    }
    if densities:
        pictures[f"How often each latent is used, either sign, on held-out tokens.{which}"] = plots.density_histogram(
            densities, target / "density.png", colours={label: colours[name] for label, name in labels.values()}
        )
    pictures |= _draw_against_l0(target, frame, controls, colours)
    if not rank_plot.ranks(few, controls).empty:
        caption = (
            "Ranks, controls left out. Metrics overlap (KL, nats lost and loss recovered say nearly the same), and a "
            "rank does not say by how much: a summary, no verdict."
        )
        pictures[caption + which] = rank_plot.mean_ranks(few, target / "ranks.png", controls, colours=colours)
    curves = {
        name: [json.loads(line) for line in logs[panelist].read_text().splitlines()]
        for panelist, (_, name) in labels.items()
        if panelist in logs and name in shown
    }
    # SAEs have logs too, but no error after the step.
    curves = {name: lines for name, lines in curves.items() if lines and "fvu_after_update" in lines[0]}
    if curves:
        pictures[f"Training of DB-KSVD, batch by batch.{which}"] = plots.training_curves(
            curves, target / "training.png", colours=colours
        )
    return pictures


def _draw_against_l0(
    target: Path, frame: pd.DataFrame, controls: frozenset[str], colours: dict[str, str]
) -> dict[str, Path]:
    """Scores against L0 where dictionaries differ in it."""
    pictures = {}
    if l0_plots.spans_a_range(frame, controls):
        pictures["Every headline metric against L0, the atoms used a token."] = l0_plots.metrics_against_l0(
            frame, target / "metrics_against_l0.png", controls, colours=colours
        )
        if l0_plots.has_behaviour(frame, controls):
            pictures["Loss recovered against L0, with the dictionaries that no other beats in both."] = (
                l0_plots.pareto_against_l0(frame, target / "pareto.png", controls, colours=colours)
            )
    return pictures
