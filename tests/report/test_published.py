"""Published scores in a comparison: a table of their own, marked where they do not compare, and never in our ranks."""

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ksvd_sae.report import tables
from ksvd_sae.report.compare import method_notes, write_comparison
from ksvd_sae.report.published.scores import COMPARABLE
from ksvd_sae.report.published.section import HEADS, TITLE, published_section
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


def by_kind(section: Section, score: str = "loss recovered") -> dict[str, dict[str, str]]:
    rows = [dict(zip(HEADS, row, strict=True)) for row in section.rows]
    return {row["published SAE"]: row for row in rows if row["score of"] == score}


def test_published_saes_beside_ours(frame: pd.DataFrame) -> None:
    row = by_kind(section_of(frame))["topk, trainer 0"]
    assert row == {
        "published SAE": "topk, trainer 0",
        "d_sae": "4096",
        "L0": "20.0",
        "score of": "loss recovered",
        "published": "0.9431",
        "nearest of ours": "db-ksvd (signed, L0 20.0)",
        "ours": "0.9300",
        "comparable?": COMPARABLE,
    }


def test_what_stands_in_the_way_is_said(frame: pd.DataFrame) -> None:
    config = run_config(evaluation={"core": {"dataset": "heldout", "context_tokens": 64}})
    for row in by_kind(section_of(frame, config)).values():
        assert row["comparable?"].startswith("dataset heldout, theirs Skylion007/openwebtext; context_tokens 64")
    lead = section_of(frame, config).lead
    assert re.search(r"Of \d+ scores 0 were measured as ours were", lead)
    version = by_kind(section_of(frame, version="0.7.0"))["topk, trainer 0"]["comparable?"]
    assert version.startswith("SAEBench 0.7.0")


def test_the_lead_counts_what_compares(frame: pd.DataFrame) -> None:
    section = section_of(frame)
    comparable = sum(row[-1] == COMPARABLE for row in section.rows)
    assert 0 < comparable < len(section.rows)
    assert f"Of {len(section.rows)} scores {comparable} were measured as ours were" in section.lead


def test_means_are_named_as_such(frame: pd.DataFrame) -> None:
    row = by_kind(section_of(frame), "probing top-1")["topk"]
    assert (row["L0"], row["published"]) == ("mean over 40–200", "0.7505")
    assert row["comparable?"] == "L0 20.0, theirs 40 to 200"
    assert any("plots" in source for source in section_of(frame).remarks)
    core_alone = frame[frame["eval"] != "sparse_probing"]
    assert not any("plots" in source for source in section_of(core_alone).remarks)


def test_controls_are_not_held_against_anything(frame: pd.DataFrame) -> None:
    assert not any("random" in row[HEADS.index("nearest of ours")] for row in section_of(frame).rows)
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
    assert all("contexts without a BOS, theirs with one" in row[-1] for row in section.rows)


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
    manifest["files"] = {"heldout": {"db-ksvd": "a.json"}}
    return write_comparison(place / "results", config, manifest, place / "evaluations", {})


def test_they_are_in_both_reports_and_in_no_rank(tmp_path: Path, frame: pd.DataFrame) -> None:
    page = write(tmp_path, frame, run_config()).read_text(encoding="utf-8")
    markdown = (tmp_path / "results" / "comparison.md").read_text(encoding="utf-8")
    headline, _, rest = markdown.partition(f"## {TITLE}")
    assert "| topk, trainer 0 " in rest
    assert "trainer" not in headline
    assert tables.to_markdown(tables.summary(frame), CONTROLS) in headline
    assert rest.index("| topk, trainer 0 ") < rest.index("## Notes")
    assert "meowmaryexe/SAEBench-Reliability" in rest
    body = page[page.index("<body>") :]
    section = body[body.index('id="published"') : body.index('id="notes"')]
    assert "topk, trainer 0" in section
    assert COMPARABLE in section
    assert "topk, trainer 0" not in body.replace(section, "")
    assert "trainer" not in (tmp_path / "results" / "comparison.csv").read_text()


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
