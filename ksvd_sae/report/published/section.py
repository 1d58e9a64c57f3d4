"""Published scores beside a run's own: a table by itself, so nothing measured elsewhere takes part in its ranks."""

import math
from collections.abc import Iterable, Mapping
from itertools import groupby

import pandas as pd

from ksvd_sae.report import scores, tables
from ksvd_sae.report.headline import HEADLINES, TRAINING, UNKNOWN, count_text
from ksvd_sae.report.published.scores import (
    COMPARABLE,
    L0_FACTOR,
    SOURCES,
    Match,
    OwnScore,
    RunProtocol,
    matches,
    of_place,
    published_scores,
)
from ksvd_sae.report.sections import Section
from ksvd_sae.run.config import RunConfig, TextRunConfig

TITLE = "Published scores"
# Before a column for each architecture.
HEADS = ("score of", "d_sae", "ours", "samples seen", "L0", "score")
NUMBERS = frozenset({"d_sae", "samples seen", "L0", "score"})
FAR = "†"
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def published_section(
    config: RunConfig,
    frame: pd.DataFrame,
    version: str | None,
    controls: frozenset[str] = frozenset(),
    prepend_bos: bool = True,
) -> Section | str:
    """The table of published scores, or one line on why there is none; '' where none is to be expected.

    Args:
        frame: the run's scores, see ``tables.COLUMNS``.
        version: of SAEBench that the run used.
        controls: dictionaries that are no contestants: nothing published is held against them.
        prepend_bos: whether the run's contexts begin with a BOS.
    """
    if not isinstance(config, TextRunConfig):
        return ""
    protocol = RunProtocol(
        config.model.name,
        config.model.hook,
        {section.name: section for section in config.evaluation.evals()},
        version,
        prepend_bos,
    )
    scored = {(s.eval, s.metric) for s in published_scores()}
    own = [score for score in _own_scores(frame, controls) if (score.eval, score.metric) in scored]
    if not own:
        return ""
    here = of_place(protocol)
    if here and config.model.weights is not None:
        return f"No published scores to compare with: they are of {protocol.model} with its own weights."
    if not here:
        places = dict.fromkeys(f"{s.model} ({s.hook})" for s in published_scores())
        return (
            f"No published scores to compare with: SAEBench published {' and '.join(places)}, not {protocol.model} "
            f"({protocol.hook})."
        )
    comparisons = matches(own, protocol)
    if not comparisons:
        widths = ", ".join(f"{width:,}" for width in sorted({s.d_sae for s in here if s.l0 or s.l0_range}))
        return f"No published scores to compare with: published SAEs of this model and hook have {widths} latents."
    architectures = sorted({match.published.architecture for match in comparisons})
    marks = _marks(comparisons)
    lead = (
        "Each score of ours beside those of the SAEs that SAEBench published, of as many latents: of each architecture "
        "the one of the nearest L0, and its L0. They were not measured here and take part in no ranking above. "
        f"Of {len(comparisons)} values {sum(m.verdict == COMPARABLE for m in comparisons)} have no mark: they were "
        "measured as ours were. Theirs saw 500M tokens in training, ours what the table says. Explained variance is "
        "left out: published values are by an older formula (SAEBench issue 76)."
    )
    far = [f"{FAR} L0s further apart than a factor of {L0_FACTOR}, or outside of what a mean is over"]
    notes = far if not all(match.has_same_l0 for match in comparisons) else []
    notes += [f"{mark} {reason}" for reason, mark in marks.items()]
    notes += [f"{SOURCES[name]}; SAEBench {_versions(comparisons, name)}" for name in _files(comparisons)]
    seen = _samples_seen(frame)
    rows = [
        _row(score, seen, {match.published.architecture: match for match in of_score}, architectures, marks)
        for score, of_score in groupby(comparisons, key=lambda match: match.own)
    ]
    return Section(TITLE, "published", lead, (*HEADS, *architectures), NUMBERS, rows, notes)


def _marks(comparisons: Iterable[Match]) -> dict[str, str]:
    """What stands in the way, beside L0s: reason -> its mark."""
    reasons = dict.fromkeys(reason for match in comparisons for reason in match.reasons)
    return {reason: str(number).translate(_SUPERSCRIPTS) for number, reason in enumerate(reasons, 1)}


def _files(comparisons: list[Match]) -> list[str]:
    return [name for name in SOURCES if any(m.published.file == name for m in comparisons)]


def _versions(comparisons: list[Match], name: str) -> str:
    return " and ".join(sorted({m.published.version for m in comparisons if m.published.file == name}))


def _own_scores(frame: pd.DataFrame, controls: frozenset[str]) -> list[OwnScore]:
    """Means over seeds."""
    typed = scores.typed_frame(frame)
    table = tables.summary(frame)
    l0 = {(row["dictionary"], row["view"]): float(row["L0"]) for row in table.to_dict("records")}
    scored = typed[typed["value"].notna() & typed["d_sae"].notna() & ~typed["dictionary"].isin(controls)]
    means = scored.groupby(["dictionary", "view", "d_sae", "eval", "metric"], sort=False)["value"].mean().reset_index()
    return [
        OwnScore(
            row["dictionary"],
            row["view"],
            int(row["d_sae"]),
            l0[row["dictionary"], row["view"]],
            row["eval"],
            row["metric"],
            float(row["value"]),
        )
        for row in means.to_dict("records")
        if (row["dictionary"], row["view"]) in l0
    ]


def _samples_seen(frame: pd.DataFrame) -> dict[str, float]:
    typed = scores.typed_frame(frame)
    rows = typed[(typed["eval"] == TRAINING.eval) & (typed["metric"] == TRAINING.metric)]
    return {str(name): float(seen) for name, seen in rows.groupby("dictionary")["value"].mean().items()}


def _row(
    own: OwnScore,
    seen: Mapping[str, float],
    matches: Mapping[str, Match],
    architectures: list[str],
    marks: Mapping[str, str],
) -> list[str]:
    labels = {(h.eval, h.metric): h.label for h in HEADLINES if h.minus is None}
    samples = seen.get(own.dictionary, math.nan)
    return [
        labels.get((own.eval, own.metric), f"{own.eval}: {own.metric}"),
        f"{own.d_sae}",
        f"{own.dictionary} ({own.view})",
        count_text(samples) if math.isfinite(samples) else UNKNOWN,
        f"{own.l0:.1f}",
        f"{own.value:.4f}",
        *(_cell(matches[name], marks) if name in matches else "–" for name in architectures),
    ]


def _cell(match: Match, marks: Mapping[str, str]) -> str:
    theirs = match.published
    l0 = "40–200" if theirs.l0 is None else f"{theirs.l0:.1f}"
    stand = ([] if match.has_same_l0 else [FAR]) + [marks[reason] for reason in match.reasons]
    return " ".join([f"{theirs.value:.4f} at {l0}", *stand])
