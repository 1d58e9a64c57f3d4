"""A results folder by what it keeps: scores from the evals' own files in raw.zip, tables from the scores."""

import csv
import gzip
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ksvd_sae.report.differences import against_best, write_verdicts
from ksvd_sae.report.headline import HEADLINES
from ksvd_sae.report.items import FILE as ITEMS
from ksvd_sae.report.items import items_of, read_items, write_items
from ksvd_sae.report.raw import OWN_EVALS, RawResults, result_name
from ksvd_sae.report.scores import read_csv
from ksvd_sae.report.tables import intervals, summary, to_markdown
from ksvd_sae.run.config import load_config

# Evals that have always said what their scores are means of.
_WITH_ITEMS = {"loss", "sparse_probing", "sparse_probing_sae_probes", "absorption", "autointerp", "ravel", "scr"}


def check_recomputable(folder: Path, scratch: Path, not_kept: frozenset[str] = frozenset()) -> None:
    """Rows of comparison.csv from the files that they name, to the last digit; comparison.md and verdicts.csv from it.

    Args: scratch: an empty folder.  not_kept: evals whose files are not in the archive; that all others are is checked.
    """
    # Of runs whose dictionaries were learned by an update that is gone; which one it was changes no table.
    text = (folder / "config.yaml").read_text().replace("update: sums", "update: sweep")
    (scratch / "config.yaml").write_text(text)
    frame, config = read_csv(folder / "comparison.csv"), load_config(scratch / "config.yaml")
    with RawResults(folder) as raw:
        _check_items(folder, frame, raw, not_kept, scratch)
        asked = {section.name for section in config.evaluation.evals()}
        wanted = {head.eval for head in HEADLINES if not head.optional} & asked
        assert wanted <= {*frame["eval"], *not_kept}, "an eval that the config asks for has no score"
        _check_scores(frame.to_dict("records"), raw, not_kept)
        learned = {name for name, method in config.dictionaries.items() if method.source is None}
        n_logs = _check_training(frame[frame["dictionary"].isin(learned)].to_dict("records"), raw)
    assert n_logs, "no dictionary has a training log"
    table = to_markdown(summary(frame), config.controls, intervals(frame))
    assert f"\n\n{table}" in (folder / "comparison.md").read_text(), "the table is not that of the scores"
    write_verdicts(against_best(frame, config.saes, read_items(folder)), scratch / "verdicts.csv")
    assert (folder / "verdicts.csv").read_bytes() == (scratch / "verdicts.csv").read_bytes()


def _check_items(folder: Path, frame: pd.DataFrame, raw: RawResults, not_kept: frozenset[str], scratch: Path) -> None:
    """The items are those of the evals' own files."""

    def read(eval_name: str, source: str) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(raw[result_name(eval_name, source)])
        return result

    write_items(items_of(frame[~frame["eval"].isin(not_kept)], read), scratch / ITEMS)
    pd.testing.assert_frame_equal(read_items(folder), read_items(scratch), check_exact=True)
    assert check_items(folder) or not frame["eval"].isin(_WITH_ITEMS - not_kept).any()


def check_items(folder: Path) -> int:
    """Items that are kept give the scores that they are of, added up by hand; how many scores were checked.

    Contexts of runs from before their predictions were counted are taken to have equally many.
    """
    upper: dict[tuple[str, ...], float] = defaultdict(float)
    lower: dict[tuple[str, ...], float] = defaultdict(float)
    key = ("eval", "metric", "dictionary", "view", "seed", "eval_seed")
    with gzip.open(folder / "items.csv.gz", "rt", newline="") as file:
        for row in csv.DictReader(file):
            upper[tuple(row[name] for name in key)] += float(row["weight"]) * float(row["value"])
            lower[tuple(row[name] for name in key)] += float(row["weight"])
    with (folder / "comparison.csv").open(newline="") as file:
        scores = {tuple(row[name] for name in key): row["value"] for row in csv.DictReader(file)}
    for of, total in upper.items():
        # What is not finite is no score: contexts whose own is finite remain.
        if scores[of] == "":
            continue
        near = {"abs": 3e-4} if of[:2] == ("loss", "nats_lost") else {"abs": 1e-6, "rel": 1e-6}
        assert total / lower[of] == pytest.approx(float(scores[of]), **near), of
    return len(upper)


def _check_scores(rows: list[dict[Any, Any]], raw: RawResults, not_kept: frozenset[str]) -> None:
    sources = {(row["eval"], row["source"]) for row in rows if row["eval"] not in ("training", *not_kept)}
    members = {result_name(eval_name, source): eval_name for eval_name, source in sources}
    assert set(members) == {name for name in raw if name.split("/")[0] in ("saebench", *OWN_EVALS)}
    metrics = {member: _metrics(json.loads(raw[member])) for member in members}
    for row in rows:
        if row["eval"] in ("training", *not_kept):
            continue
        value = metrics[result_name(row["eval"], row["source"])][row["metric"]]
        # The table has nine digits, and nothing for what is not finite.
        kept = math.nan if value is None else float(f"{value:.9g}")
        assert row["value"] == kept or (math.isnan(row["value"]) and math.isnan(kept)), row


def _metrics(result: dict[str, Any]) -> dict[str, float | None]:
    """Metric -> value, of our held-out scores or of an eval in SAEBench's format."""
    if "scores" in result:
        return dict(result["scores"])
    groups = result["eval_result_metrics"].values()
    flat = [(metric, value) for group in groups for metric, value in group.items()]
    assert len(dict(flat)) == len(flat), "two groups have a metric of one name"
    return dict(flat)


def _check_training(rows: list[dict[Any, Any]], raw: RawResults) -> int:
    """Samples seen by the last line of each training's log; how many logs there are."""
    logs = set()
    for row in rows:
        names = (row["dictionary"], f"{row['dictionary']}.s{row['seed']}")
        for member in (f"training/{name}.jsonl" for name in names if f"training/{name}.jsonl" in raw):
            logs.add(member)
            if row["metric"] == "samples_seen":
                assert json.loads(raw[member].splitlines()[-1])["samples_seen"] == row["value"], member
    return len(logs)
