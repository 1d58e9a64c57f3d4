"""Published scores in a comparison: a table of their own, marked where they do not compare, and never in our ranks."""

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ksvd_sae.report import tables
from ksvd_sae.report.compare import method_notes, write_comparison
from ksvd_sae.report.published.section import FAR, HEADS, TITLE, published_section
from ksvd_sae.report.sections import Section, section_markdown
from ksvd_sae.run.config import RunConfig, parse_config

CONTROLS = frozenset({"pca", "random"})
GEMMA = {"name": "google/gemma-2-2b", "hook": "blocks.12.hook_resid_post"}


def run_config(model: dict[str, str] | None = None, **changes: Any) -> RunConfig:
    raw = {
        "name": "made-up",
        "model": model or GEMMA,
        "text": {"dataset": "monology/pile-uncopyrighted"},
        "harvest": {"train_tokens": 262_144, "heldout_tokens": 65_536},
        "dictionaries": {
            "db-ksvd": {"kind": "db_ksvd", "n_atoms": 4096, "k": 20},
            "pca": {"kind": "pca", "k": 20},
            "random": {"kind": "random", "n_atoms": 4096, "k": 20},
        },
    }
    return parse_config({**raw, **changes})


def section_of(frame: pd.DataFrame, config: RunConfig | None = None, version: str | None = "0.6.0") -> Section:
    section = published_section(config or run_config(), frame, version, CONTROLS)
    assert isinstance(section, Section)
    return section


def rows_of(section: Section, score: str = "loss recovered") -> dict[str, dict[str, str]]:
    """By dictionary and view."""
    rows = [dict(zip(section.heads, row, strict=True)) for row in section.rows]
    return {row["ours"]: row for row in rows if row["score of"] == score}


def remark(section: Section, mark: str) -> str:
    (text,) = (remark for remark in section.remarks if remark.startswith(f"{mark} "))
    return text.removeprefix(f"{mark} ")


def test_published_saes_beside_ours(frame: pd.DataFrame) -> None:
    section = section_of(frame)
    assert section.heads == (
        *HEADS,
        "batchtopk",
        "gated",
        "jumprelu",
        "matryoshka_batchtopk",
        "panneal",
        "relu",
        "topk",
    )
    assert rows_of(section).keys() == {"db-ksvd (signed)", "db-ksvd-refit (signed)", "topk-sae (non-negative)"}
    row = rows_of(section)["db-ksvd (signed)"]
    assert {name: row[name] for name in (*HEADS, "topk", "relu")} == {
        "score of": "loss recovered",
        "d_sae": "4096",
        "ours": "db-ksvd (signed)",
        "samples seen": "1,048,576",
        "L0": "20.0",
        "score": "0.9300",
        "topk": "0.9431 at 20.0",
        "relu": f"0.9247 at 45.8 {FAR}",
    }
    assert remark(section, FAR).startswith("L0s further apart than a factor of 1.25")
    assert "500M tokens" in section.lead
    assert "Explained variance is left out" in section.lead


def test_every_width_has_its_own(frame: pd.DataFrame) -> None:
    wide = frame[frame["dictionary"] == "db-ksvd"].assign(dictionary="wide", d_sae=16384)
    rows = rows_of(section_of(pd.concat([frame, wide])))
    assert rows["db-ksvd (signed)"]["topk"] == "0.9431 at 20.0"
    assert (rows["wide (signed)"]["d_sae"], rows["wide (signed)"]["topk"]) == ("16384", "0.9663 at 20.0")


def test_seeds_are_averaged(frame: pd.DataFrame) -> None:
    again = frame.assign(seed=1)
    again.loc[again["metric"] == "ce_loss_score", "value"] += 0.02
    row = rows_of(section_of(pd.concat([frame, again])))["db-ksvd (signed)"]
    assert row["score"] == "0.9400"


def test_what_stands_in_the_way_is_said(frame: pd.DataFrame) -> None:
    config = run_config(evaluation={"core": {"dataset": "heldout", "context_tokens": 64}})
    section = section_of(frame, config)
    for row in rows_of(section).values():
        assert row["topk"] == "0.9431 at 20.0 ¹ ²"
    assert remark(section, "¹") == "dataset heldout, theirs Skylion007/openwebtext"
    assert remark(section, "²") == "context_tokens 64, theirs 128"
    other = section_of(frame, version="0.7.0")
    assert rows_of(other)["db-ksvd (signed)"]["topk"] == "0.9431 at 20.0 ¹"
    assert remark(other, "¹").startswith("SAEBench 0.7.0")
    assert re.search(r"Of \d+ values 0 have no mark", other.lead)


def test_the_lead_counts_what_has_no_mark(frame: pd.DataFrame) -> None:
    section = section_of(frame)
    values = [cell for row in section.rows for cell in row[len(HEADS) :] if cell != "–"]
    unmarked = sum(cell.count(" ") == 2 for cell in values)
    assert 0 < unmarked < len(values)
    assert f"Of {len(values)} values {unmarked} have no mark" in section.lead


def test_means_are_named_as_such(frame: pd.DataFrame) -> None:
    assert rows_of(section_of(frame), "probing top-1")["db-ksvd (signed)"]["topk"] == f"0.7505 at 40–200 {FAR}"
    assert any("plots" in source for source in section_of(frame).remarks)
    core_alone = frame[frame["eval"] != "sparse_probing"]
    assert not any("plots" in source for source in section_of(core_alone).remarks)


def test_controls_are_not_held_against_anything(frame: pd.DataFrame) -> None:
    assert not any("random" in row[HEADS.index("ours")] for row in section_of(frame).rows)
    only_controls = frame[frame["dictionary"].isin(CONTROLS)]
    assert published_section(run_config(), only_controls, "0.6.0", CONTROLS) == ""


@pytest.mark.parametrize(
    "model",
    [
        {"name": "google/gemma-3-270m", "hook": "blocks.9.hook_resid_post"},
        {"name": "google/gemma-2-2b", "hook": "blocks.5.hook_resid_post"},
    ],
)
def test_a_model_without_published_scores(frame: pd.DataFrame, model: dict[str, str]) -> None:
    line = published_section(run_config(model), frame, "0.6.0", CONTROLS)
    assert isinstance(line, str)
    assert line.startswith("No published scores to compare with: SAEBench published gemma-2-2b")
    assert line.endswith(f"not {model['name']} ({model['hook']}).")
    assert "\n" not in line


def test_weights_of_ones_own_are_another_model(frame: pd.DataFrame) -> None:
    config = run_config({**GEMMA, "weights": "someone/tuned"})
    line = published_section(config, frame, "0.6.0", CONTROLS)
    assert line == "No published scores to compare with: they are of google/gemma-2-2b with its own weights."


def test_contexts_without_a_bos_stand_in_the_way(frame: pd.DataFrame) -> None:
    section = published_section(run_config(), frame, "0.6.0", CONTROLS, prepend_bos=False)
    assert isinstance(section, Section)
    assert remark(section, "¹") == "contexts without a BOS, theirs with one"
    assert all("¹" in cell for row in section.rows for cell in row[len(HEADS) :] if cell != "–")


def test_a_width_without_published_scores(frame: pd.DataFrame) -> None:
    other = frame.assign(d_sae=2048)
    line = published_section(run_config(), other, "0.6.0", CONTROLS)
    assert line == (
        "No published scores to compare with: published SAEs of this model and hook have 4,096, 16,384, 65,536 latents."
    )


def test_a_run_without_evals_is_told_nothing(frame: pd.DataFrame) -> None:
    rest = frame[frame["eval"].isin(["heldout", "training"])]
    assert published_section(run_config(), rest, "0.6.0", CONTROLS) == ""


def test_markdown(frame: pd.DataFrame) -> None:
    section = section_of(frame)
    lines = section_markdown(section)
    assert lines[0] == f"## {TITLE}"
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(section.rows)
    assert len({line.count("|") for line in table}) == 1
    assert len({len(line) for line in table}) == 1
    assert not any("**" in line for line in table)


def write(place: Path, frame: pd.DataFrame, config: RunConfig) -> Path:
    manifest = {
        "versions": {"sae-bench": "0.6.0"},
        "rows": frame.astype(object).where(frame.notna(), None).to_dict("records"),
        "files": {"heldout": {}},
    }
    density = place / "evaluations" / "heldout"
    density.mkdir(parents=True, exist_ok=True)
    (density / "a.json").write_text('{"density": [0.1, 0.2]}')
    for eval_name, source in frame[["eval", "source"]].drop_duplicates().itertuples(index=False):
        (place / "evaluations" / eval_name).mkdir(exist_ok=True)
        (place / "evaluations" / eval_name / source).write_text("{}")
    manifest["files"] = {"heldout": {"db-ksvd": "a.json"}}
    return write_comparison(place / "results", config, manifest, place / "evaluations", {})


def test_they_are_in_both_reports_and_in_no_rank(tmp_path: Path, frame: pd.DataFrame) -> None:
    page = write(tmp_path, frame, run_config()).read_text(encoding="utf-8")
    markdown = (tmp_path / "results" / "comparison.md").read_text(encoding="utf-8")
    headline, _, rest = markdown.partition(f"## {TITLE}")
    assert "0.9431 at 20.0" in rest
    assert "0.9431" not in headline
    assert tables.to_markdown(tables.summary(frame), CONTROLS) in headline
    assert rest.index("0.9431 at 20.0") < rest.index("## Notes")
    assert "meowmaryexe/SAEBench-Reliability" in rest
    body = page[page.index("<body>") :]
    section = body[body.index('id="published"') : body.index('id="notes"')]
    assert "0.9431 at 20.0" in section
    assert "0.9431" not in body.replace(section, "")
    assert "0.9431" not in (tmp_path / "results" / "comparison.csv").read_text()


def test_one_line_where_there_are_none(tmp_path: Path, frame: pd.DataFrame) -> None:
    config = run_config({"name": "google/gemma-3-270m", "hook": "blocks.9.hook_resid_post"})
    page = write(tmp_path, frame, config).read_text(encoding="utf-8")
    markdown = (tmp_path / "results" / "comparison.md").read_text(encoding="utf-8")
    assert f"## {TITLE}" not in markdown
    assert markdown.count("No published scores to compare with") == 1
    assert 'id="published"' not in page
    assert page.count("No published scores to compare with") == 1


def test_published_saes_that_the_run_scored_are_named() -> None:
    assert not any("Published SAEs" in note for note in method_notes(run_config()))
    saes = {"kind": "published_sae", "repo_id": "a/b", "path": "c", "format": "saelens"}
    (note,) = method_notes(run_config(dictionaries={"topk-500m": saes, "pca": {"kind": "pca", "k": 20}}))
    assert note.startswith("Published SAEs, scored here like every other: topk-500m.")
