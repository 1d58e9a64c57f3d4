"""Published scores beside a run's own: a table by itself, so nothing measured elsewhere takes part in its ranks."""

import pandas as pd

from ksvd_sae.report import scores, tables
from ksvd_sae.report.headline import HEADLINES
from ksvd_sae.report.published.scores import (
    COMPARABLE,
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
HEADS = ("published SAE", "d_sae", "L0", "score of", "published", "nearest of ours", "ours", "comparable?")
# Columns of numbers.
NUMBERS = frozenset({"d_sae", "published", "ours"})


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
    lead = (
        "SAEs that SAEBench published (trained on 500M tokens), of as many latents as ours and the nearest L0, beside "
        "the nearest of ours. They were not measured here and take part in no ranking above. "
        f"Of {len(comparisons)} scores {sum(m.verdict == COMPARABLE for m in comparisons)} were measured as ours were; "
        "the last column says what stands in the way of the others."
    )
    names = [f"{SOURCES[name]}; SAEBench {_versions(comparisons, name)}" for name in _files(comparisons)]
    return Section(TITLE, "published", lead, HEADS, NUMBERS, [_row(match) for match in comparisons], names)


def _files(comparisons: list[Match]) -> list[str]:
    return [name for name in SOURCES if any(m.published.file == name for m in comparisons)]


def _versions(comparisons: list[Match], name: str) -> str:
    return " and ".join(sorted({m.published.version for m in comparisons if m.published.file == name}))


def _own_scores(frame: pd.DataFrame, controls: frozenset[str]) -> list[OwnScore]:
    typed = scores.typed_frame(frame)
    table = tables.summary(frame)
    l0 = {(row["dictionary"], row["view"]): float(row["L0"]) for row in table.to_dict("records")}
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
        for row in typed[typed["value"].notna() & typed["d_sae"].notna()].to_dict("records")
        if row["dictionary"] not in controls and (row["dictionary"], row["view"]) in l0
    ]


def _row(match: Match) -> list[str]:
    theirs, ours = match.published, match.own
    l0 = f"{theirs.l0:.1f}" if theirs.l0 is not None else "mean over 40–200"
    labels = {(h.eval, h.metric): h.label for h in HEADLINES if h.minus is None}
    score = labels.get((theirs.eval, theirs.metric), f"{theirs.eval}: {theirs.metric}")
    return [
        theirs.architecture if theirs.trainer is None else f"{theirs.architecture}, trainer {theirs.trainer}",
        f"{theirs.d_sae}",
        l0,
        score,
        f"{theirs.value:.4f}",
        f"{ours.dictionary} ({ours.view}, L0 {ours.l0:.1f})",
        f"{ours.value:.4f}",
        match.verdict,
    ]
