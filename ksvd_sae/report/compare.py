"""The compare stage: one folder with the table, the plots, the report, and the evals' own result files."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ksvd_sae.evals.config import AutoInterpConfig
from ksvd_sae.methods.derived_config import DerivedConfig
from ksvd_sae.methods.published.config import PublishedSAEConfig
from ksvd_sae.report import coder_plot, l0_plots, latex, pivot, plots, rank_plot, report, scores, style, tables
from ksvd_sae.report.atoms import take_examples
from ksvd_sae.report.budget import of_one_budget
from ksvd_sae.report.published.section import published_note, published_section
from ksvd_sae.report.sections import Section, section_markdown
from ksvd_sae.report.verdicts import verdict_section, verdicts
from ksvd_sae.run.config import (
    DictionaryConfig,
    IdentityConfig,
    PCAConfig,
    RandomConfig,
    RunConfig,
    SAEConfig,
    dump_config,
    view_name,
    views,
)
from ksvd_sae.run.replicas import replicas
from ksvd_sae.store import atomic_path, write_json

logger = logging.getLogger(__name__)
_OUTPUTS = ("saebench", "heldout", "training", "plots", "atoms")


def write_comparison(
    folder: Path, config: RunConfig, manifest: dict[str, Any], evaluations: Path, logs: dict[str, Path]
) -> Path:
    """Write results/<name>/ anew from a finished evaluation.

    Args:
        folder: results/<name>; what an earlier comparison left there is replaced (the cache keeps every result).
        manifest: of the evaluate stage, with its rows and files.
        evaluations: folder of the result files.
        logs: training (``Replica.label``) -> JSONL training log.
    Returns: path of report.html.
    """
    frame = scores.typed_frame(pd.DataFrame(manifest["rows"], columns=list(scores.COLUMNS)))
    scores.check_table(frame)
    for name in _OUTPUTS:
        shutil.rmtree(folder / name, ignore_errors=True)
    controls = frozenset(n for n, c in config.dictionaries.items() if _is_control(c, config))
    notes = comparison_notes(config)
    published = published_section(config, frame, manifest.get("versions", {}).get("sae-bench"), controls)
    line = "" if isinstance(published, Section) else published
    notes += [note for note in (published_note(config), line) if note]
    compared = verdicts(frame, _baselines(config))
    found = [pivot.coder_section(frame, config), verdict_section(compared), published]
    sections = [section for section in found if isinstance(section, Section)]
    _copy_results(folder, manifest, evaluations)
    for name, path in logs.items():
        (folder / "training").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / "training" / f"{name}.jsonl")
    scores.write_csv(frame, folder / "comparison.csv")
    with atomic_path(folder / "verdicts.csv") as temporary:
        compared.to_csv(temporary, index=False, float_format="%.6g")
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
    pictures = _draw(folder, config, frame, manifest, evaluations, logs, controls)
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
        # Evaluations from before there were atoms in context have none.
        take_examples(manifest.get("examples", {}), evaluations / "examples", folder / "atoms"),
    )
    return written


def _baselines(config: RunConfig) -> frozenset[str]:
    """The SAEs: what DB-KSVD is compared with."""
    return frozenset(n for n, c in config.dictionaries.items() if isinstance(c, SAEConfig | PublishedSAEConfig))


def _is_control(dictionary: DictionaryConfig, config: RunConfig) -> bool:
    """Whether its atoms are a control's, however they are coded."""
    learned = config.dictionaries[dictionary.of] if isinstance(dictionary, DerivedConfig) else dictionary
    return isinstance(learned, PCAConfig | IdentityConfig | RandomConfig)


def comparison_notes(config: RunConfig) -> list[str]:
    """What a reader must know to read the numbers right."""
    notes = [
        f"Model {config.model.name}, hook {config.model.hook}; dictionaries learned on "
        f"{config.harvest.train_tokens:,} tokens before outliers went, scored on other documents.",
        "FVU is a reconstruction error, loss recovered is behaviour: the lower error is not always the better "
        "behaviour, so read both.",
        *([] if len(config.training_seeds) > 1 else ["One training seed: differences of a few thousandths are noise."]),
        "SAEBench counts density, alive latents and l1 of signed codes by their positive part only; L0, density and "
        "dead latents in eval 'heldout' count both signs. SAEBench 0.6's explained_variance is wrong (it subtracts the "
        "squared mean square); use fvu.",
    ]
    if any("split" in views(c) for c in config.dictionaries.values()):
        notes.append(
            "View 'split' cuts a signed code f into [max(f, 0), max(−f, 0)], over the atoms and their opposites: as "
            "many nonzero codes, the same reconstruction, twice the latents, none negative, so that SAEBench counts "
            "them all. Dead latents and densities are out of d_sae: do not compare them between the two views."
        )
    missing = [name for name in ("core", "sparse_probing") if getattr(config.evaluation, name) is None]
    if missing:
        notes.append(f"Not run, as the config says: {', '.join(missing)}.")
    if config.evaluation.sparse_probing is not None and config.evaluation.sparse_probing.datasets == ["bbc-news"]:
        notes.append(
            "Sparse probing ran SAEBench's code on the five classes of BBC news, not on SAEBench's own eight data "
            "sets: compare these accuracies with each other, not with published ones."
        )
    if config.evaluation.autointerp is not None:
        notes.append(_judge_note(config.evaluation.autointerp))
    return notes


def _judge_note(autointerp: AutoInterpConfig) -> str:
    n_active = autointerp.n_top_ex_for_scoring + autointerp.n_iw_sampled_ex_for_scoring
    never = autointerp.n_random_ex_for_scoring / (n_active + autointerp.n_random_ex_for_scoring)
    note = (
        f"Autointerp: a judge that always says 'not active' scores {never:.2f}. It looks at positive activations only: "
        "of signed codes, half is not judged, in their split view both halves. "
    )
    if autointerp.judge == "lexical":
        return note + (
            "The lexical judge explains a latent by its tokens and cannot see meaning: compare its scores with each "
            "other, not with those of a language model."
        )
    return note + "Scores of other judges are not comparable."


def _copy_results(folder: Path, manifest: dict[str, Any], evaluations: Path) -> None:
    for eval_name, files in manifest["files"].items():
        target = folder / ("heldout" if eval_name == "heldout" else f"saebench/{eval_name}")
        target.mkdir(parents=True, exist_ok=True)
        for file in files.values():
            shutil.copyfile(evaluations / eval_name / file, target / file)


def _labels(config: RunConfig) -> dict[str, tuple[str, str]]:
    """Panelist -> its label in figures, which names the view where a dictionary has several; and its dictionary.

    Of several trainings of a dictionary the first stands for all where a figure shows one.
    """
    first = {replica.name: replica for replica in reversed(list(replicas(config)))}
    return {
        view_name(first[name].label, view): (f"{name} ({view})" if len(views(c)) > 1 else name, name)
        for name, c in config.dictionaries.items()
        for view in views(c)
    }


def _draw(
    folder: Path,
    config: RunConfig,
    frame: pd.DataFrame,
    manifest: dict[str, Any],
    evaluations: Path,
    logs: dict[str, Path],
    controls: frozenset[str],
) -> dict[str, Path]:
    """The plots that the run has data for, caption -> PNG."""
    target = folder / "plots"
    target.mkdir(parents=True, exist_ok=True)
    few, which = of_one_budget(frame, controls)
    shown = list(dict.fromkeys(few["dictionary"]))
    # Those that others have their atoms from first: they share a figure, and colours come round again after ten.
    crossed = list(dict.fromkeys(of for of, _ in pivot.places(config).values()))
    colours = style.palette([*crossed, *shown, *dict.fromkeys(frame["dictionary"])], controls)
    pictures = {
        f"Headline metrics.{which}": plots.metric_bars(few, target / "metrics.png", controls=controls, colours=colours)
    }
    by_coder = coder_plot.coders_compared(frame, config, target / "coders.png", controls, colours)
    if by_coder:
        caption = "Dictionaries by coders: error, and what the model loses. Full: learned in a weighted metric."
        pictures[caption] = by_coder
    if "core" in manifest["files"]:
        caption = "Error against behaviour: FVU on held-out tokens, and the part of the model's loss that survives."
        pictures[caption + which] = plots.error_against_behaviour(
            few, target / "error_against_behaviour.png", controls, colours=colours
        )
    labels = _labels(config)
    densities = {
        labels[panelist][0]: np.asarray(json.loads((evaluations / "heldout" / file).read_text())["density"])
        for panelist, file in manifest["files"]["heldout"].items()
        if panelist in labels and labels[panelist][1] in shown
    }
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
