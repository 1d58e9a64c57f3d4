"""Dictionaries by coders, score by score, for runs where dictionaries are coded in several ways.

Down a column the dictionary changes, along a row the coder: so one sees which of the two a score follows.
"""

import math

import pandas as pd

from ksvd_sae.evals.base import Column
from ksvd_sae.methods.base import CODER_LABELS, Method
from ksvd_sae.report.headline import HEADLINES, MISSING, column_texts, with_intervals
from ksvd_sae.report.sections import Section
from ksvd_sae.report.statistics import Estimate, estimate
from ksvd_sae.report.tables import headline_scores
from ksvd_sae.run.config import RunConfig

OWN, LINEAR = "own encoder", "linear TopK"
_ORDER = (OWN, LINEAR, *CODER_LABELS.values())


def coder_section(frame: pd.DataFrame, config: RunConfig) -> Section | None:
    """A row a score and dictionary, a column a coder; None if no dictionary of the run has its atoms from another.

    Args: frame: the scores, typed. Means over seeds with their 95 % intervals; of a dictionary with two views the first
        counts.
    """
    columns = coders(config)
    if not columns:
        return None
    table = []
    for headline in HEADLINES:
        cells = coder_cells(frame, config, headline)
        if not cells:
            continue
        means = column_texts(headline.label, [cell.mean for cell in cells.values()])
        shown = with_intervals(headline.label, means, [cell.half_width for cell in cells.values()])
        texts = {
            place: text if math.isfinite(cell.mean) else MISSING
            for (place, cell), text in zip(cells.items(), shown, strict=True)
        }
        for of in dict.fromkeys(of for of, _ in places(config).values()):
            table.append([headline.heading, of, *(texts.get((of, column), "–") for column in columns)])
    lead = (
        f"For each score, down a column the dictionary changes, along a row the coder; '{LINEAR}' is a linear encoder "
        "fitted to the dictionary as it is. ±: as in the table above. A dash: not in this run."
    )
    heads = ("score", "dictionary", *columns)
    return Section("Dictionaries by coders", "coders", lead, heads, frozenset(columns), table)


def coders(config: RunConfig) -> list[str]:
    """The coders that the run's dictionaries are crossed with; none if no dictionary has its atoms from another."""
    return sorted({column for _, column in places(config).values()}, key=_rank)


def coder_cells(frame: pd.DataFrame, config: RunConfig, headline: Column) -> dict[tuple[str, str], Estimate]:
    """(dictionary, coder) -> a score over seeds; only those that have it."""
    found_at = places(config)
    estimates = {} if headline.eval == "training" else _estimates(frame, headline)
    # Of two in one place, which differ in nothing that a score follows from, the first counts.
    return {found_at[name]: value for name, value in reversed(estimates.items()) if name in found_at}


def places(config: RunConfig) -> dict[str, tuple[str, str]]:
    """Row (whose atoms they are) and column (the coder) of each dictionary of those that are coded in several ways."""
    taken = {method.source for method in config.dictionaries.values()}
    return {
        name: (method.source or name, _coder(method, config.source_of(method)))
        for name, method in config.dictionaries.items()
        if method.source is not None or name in taken
    }


def _coder(method: Method, source: Method | None) -> str:
    """The coder's name, with whatever else differs from the dictionary that it codes with."""
    name = method.coder_label
    if source is None:
        return name
    if method.budget != source.budget:
        name += f", k = {method.budget}"
    if method.uses_both_signs != source.uses_both_signs:
        name += ", with signs" if method.uses_both_signs else ", without signs"
    if method.metric != source.metric:
        name += f", in the metric {method.metric.kind}"
    return name


def _rank(column: str) -> tuple[int, str]:
    known = [i for i, name in enumerate(_ORDER) if column == name or column.startswith(f"{name}, ")]
    # 'MP, refit' begins as 'MP' does: the longer name counts.
    return (max(known) if known else len(_ORDER), column)


def _estimates(frame: pd.DataFrame, headline: Column) -> dict[str, Estimate]:
    """A score by dictionary."""
    estimates = {}
    for name, scored in headline_scores(frame, headline).groupby("dictionary", sort=False):
        view = min(scored["view"].unique(), key=lambda view: str(view) == "split")
        estimates[str(name)] = estimate(scored[scored["view"] == view])
    return estimates
