"""The folder of a comparison: all of it from one manifest, and nothing of an earlier one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from ksvd_sae.errors import EvaluationError
from ksvd_sae.report import budget, compare
from ksvd_sae.report.compare import comparison_notes, write_comparison
from ksvd_sae.report.items import FILE as ITEMS
from ksvd_sae.report.raw import RAW, RawResults, result_name, unpack
from ksvd_sae.report.scores import COLUMNS, read_csv
from ksvd_sae.report.style import palette
from ksvd_sae.run.config import RunConfig, parse_config

EVALS = ("heldout", "core", "sparse_probing")


def run_config(names: list[str], **evaluation: Any) -> RunConfig:
    kinds: dict[str, dict[str, Any]] = {
        "topk-sae": {"kind": "topk_sae", "n_atoms": 4096, "k": 20},
        "pca": {"kind": "pca", "k": 20},
        "random": {"kind": "random", "n_atoms": 4096, "k": 20},
    }
    ours = {"kind": "db_ksvd", "n_atoms": 4096, "k": 20}
    return parse_config(
        {
            "name": "made-up",
            "model": {"name": "some/model", "hook": "blocks.3.hook_resid_post"},
            "text": {"source": "bbc-news"},
            "harvest": {"train_tokens": 262_144, "heldout_tokens": 65_536},
            "dictionaries": {name: kinds.get(name, ours) for name in names},
            "evaluation": evaluation,
        }
    )


class Comparison:
    """A finished evaluation as on disk: its manifest, its result files, the training logs."""

    def __init__(
        self,
        place: Path,
        frame: pd.DataFrame,
        logs: dict[str, list[dict[str, Any]]],
        examples: Callable[..., dict[str, Any]],
    ):
        self.place, self.frame, self.folder = place, frame, place / "results" / "made-up"
        self.names = list(dict.fromkeys(frame["dictionary"]))
        self.logs: dict[str, Path] = {}
        for name, lines in logs.items():
            self.logs[name] = place / "cache" / name / "train_log.jsonl"
            self.logs[name].parent.mkdir(parents=True)
            self.logs[name].write_text("".join(json.dumps(line) + "\n" for line in lines))
        for eval_name in EVALS:
            (place / "evaluations" / eval_name).mkdir(parents=True)
            for name in self.names:
                result = {"eval": eval_name, "density": [0.001, 0.01, 0.2, 0.0]}
                (place / "evaluations" / eval_name / self.file(name)).write_text(json.dumps(result))
        (place / "evaluations" / "examples").mkdir()
        for name in self.names:
            found = json.dumps(examples(signed=name != "topk-sae", n_atoms=4))
            (place / "evaluations" / "examples" / self.file(name)).write_text(found)

    def file(self, name: str) -> str:
        return f"{name}-0123456789ab.json"

    def manifest(self, names: list[str], evals: tuple[str, ...] = EVALS) -> dict[str, Any]:
        chosen = self.frame["dictionary"].isin(names) & self.frame["eval"].isin([*evals, "training"])
        rows = json.loads(self.frame[chosen].to_json(orient="records"))
        return {
            "stage": "evaluate",
            "hash": "abcdef012345",
            "key": {"harvest": "0"},
            "versions": {"torch": "2"},
            "commit": "unknown",
            "written": "2030-01-01T00:00:00+00:00",
            "device": "cpu",
            "seconds": 1.5,
            "rows": rows,
            "files": {eval_name: {name: self.file(name) for name in names} for eval_name in evals},
            "examples": {name: self.file(name) for name in names},
        }

    def write(self, names: list[str] | None = None, evals: tuple[str, ...] = EVALS) -> Path:
        names = self.names if names is None else names
        config = run_config(names, **{name: None for name in EVALS if name not in evals})
        logs = {name: path for name, path in self.logs.items() if name in names}
        return write_comparison(self.folder, config, self.manifest(names, evals), self.place / "evaluations", logs)

    def written(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}

    def raw(self) -> dict[str, bytes]:
        with RawResults(self.folder) as raw:
            return dict(raw)

    def raw_expected(self, names: list[str], evals: tuple[str, ...] = EVALS) -> dict[str, bytes]:
        """What the archive must hold, byte for byte."""
        cached = self.place / "evaluations"
        return {
            **{result_name(e, self.file(n)): (cached / e / self.file(n)).read_bytes() for e in evals for n in names},
            **{f"atoms/{self.file(n)}": (cached / "examples" / self.file(n)).read_bytes() for n in names},
            **{f"training/{n}.jsonl": path.read_bytes() for n, path in self.logs.items() if n in names},
        }


@pytest.fixture
def comparison(
    tmp_path: Path,
    frame: pd.DataFrame,
    logs: dict[str, list[dict[str, Any]]],
    examples_of: Callable[..., dict[str, Any]],
) -> Comparison:
    known = {name: lines for name, lines in logs.items() if name in set(frame["dictionary"])}
    return Comparison(tmp_path, frame, known, examples_of)


def expected(comparison: Comparison, names: list[str], evals: tuple[str, ...] = EVALS) -> set[str]:
    files = {
        "comparison.csv",
        "verdicts.csv",
        "comparison.md",
        "comparison.tex",
        ITEMS,
        "config.yaml",
        "manifest.json",
        "report.html",
        RAW,
    }
    files.add("plots/metrics.png")
    if "heldout" in evals:
        files.add("plots/density.png")
    if {"heldout", "core"} <= set(evals):
        files.add("plots/error_against_behaviour.png")
    if len(set(names) - {"pca", "random"}) > 1:
        files.add("plots/ranks.png")
    if any(name in comparison.logs for name in names):
        files.add("plots/training.png")
    return files


def test_all_files_are_there_and_name_no_place_of_this_machine(comparison: Comparison) -> None:
    report = comparison.write()
    assert report == comparison.folder / "report.html"
    assert comparison.written() == expected(comparison, comparison.names)
    assert comparison.logs, "a log was there to keep"
    for path in report.parent.rglob("*"):
        if path.is_file() and path.suffix not in (".png", ".zip", ".gz"):
            assert str(comparison.place) not in path.read_text(encoding="utf-8"), path.name


def test_without_held_out_scores(comparison: Comparison) -> None:
    evals = ("core", "sparse_probing")
    comparison.write(evals=evals)
    assert comparison.written() == expected(comparison, comparison.names, evals)
    assert "Not run, as the config says: heldout." in (comparison.folder / "comparison.md").read_text()


def test_raw_results_are_in_one_file(comparison: Comparison) -> None:
    comparison.write()
    assert comparison.raw() == comparison.raw_expected(comparison.names)


def test_logs_of_saes_are_kept_and_not_drawn(comparison: Comparison) -> None:
    """They have no error after the step."""
    for path in comparison.logs.values():
        path.write_text('{"samples_seen": 1024, "fvu": 0.5, "l0": 20.0, "dead": 3}\n')
    comparison.write()
    assert comparison.written() == expected(comparison, comparison.names) - {"plots/training.png"}
    assert comparison.raw() == comparison.raw_expected(comparison.names)


def test_atoms_in_context(comparison: Comparison) -> None:
    page = comparison.write().read_text(encoding="utf-8")
    for name in comparison.names:
        assert f"<summary>{name} " in page
    assert "dictionaries of other budgets" not in page


def test_atoms_of_many_dictionaries_are_those_of_one_budget(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "READABLE", 1)
    comparison.frame.loc[comparison.frame["dictionary"] == "topk-sae", "k"] = 40
    page = comparison.write().read_text(encoding="utf-8")
    assert "<summary>topk-sae " not in page
    assert "<summary>db-ksvd " in page
    assert "Atoms of the 1 dictionaries of other budgets" in " ".join(page.split())
    assert comparison.raw() == comparison.raw_expected(comparison.names), "all of them are kept"


def test_evaluations_from_before_there_were_atoms(comparison: Comparison) -> None:
    manifest = comparison.manifest(comparison.names)
    del manifest["examples"]
    config = run_config(comparison.names)
    page = write_comparison(comparison.folder, config, manifest, comparison.place / "evaluations", {})
    assert 'id="atoms"' not in page.read_text(encoding="utf-8")
    assert not any(name.startswith("atoms/") for name in comparison.raw())


def test_plots_against_l0_where_it_spans_a_range(comparison: Comparison) -> None:
    l0_plots = {"plots/metrics_against_l0.png", "plots/pareto.png"}
    comparison.write()
    assert not l0_plots & comparison.written()
    comparison.frame.loc[comparison.frame["dictionary"] == "topk-sae", "l0"] = 35.0
    comparison.write()
    assert l0_plots <= comparison.written()
    comparison.write(evals=("heldout", "sparse_probing"))
    assert l0_plots & comparison.written() == {"plots/metrics_against_l0.png"}


def test_content(comparison: Comparison) -> None:
    comparison.write()
    folder = comparison.folder
    scores = read_csv(folder / "comparison.csv")
    assert len(scores) == len(comparison.frame)
    key = ["dictionary", "eval", "metric"]
    stored = scores.set_index(key)["value"].sort_index()
    given = comparison.frame.set_index(key)["value"].astype(float).sort_index()
    pd.testing.assert_series_equal(stored, given, check_exact=False, rtol=1e-8)
    assert parse_config(yaml.safe_load((folder / "config.yaml").read_text())) == run_config(comparison.names)
    facts = json.loads((folder / "manifest.json").read_text())
    assert facts == {key: value for key, value in comparison.manifest(comparison.names).items() if key != "rows"}
    markdown = (folder / "comparison.md").read_text()
    assert markdown.startswith("# Comparison: made-up\n")
    assert all(note.split(";")[0].split("<")[0] in markdown for note in comparison_notes(run_config(comparison.names)))
    for name in comparison.names:
        assert f"| {name} " in markdown
        assert json.loads(comparison.raw()[result_name("core", comparison.file(name))])["eval"] == "core"
    for path in folder.rglob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_written_again_without_leftovers(comparison: Comparison) -> None:
    """Fewer dictionaries and fewer evals than before; what was unpacked goes, a file of the user's own stays."""
    comparison.write()
    (comparison.folder / "my notes.txt").write_text("mine")
    unpack(comparison.folder, comparison.folder)
    assert (comparison.folder / "saebench" / "core" / comparison.file("pca")).exists()
    names, evals = ["topk-sae", "pca"], ("heldout",)
    comparison.write(names, evals)
    assert comparison.written() == expected(comparison, names, evals) | {"my notes.txt"}
    assert comparison.raw() == comparison.raw_expected(names, evals)
    assert set(read_csv(comparison.folder / "comparison.csv")["dictionary"]) == set(names)
    page = (comparison.folder / "report.html").read_text(encoding="utf-8")
    assert "db-ksvd-refit" not in page
    assert "topk-sae" in page


def test_written_again_the_same(comparison: Comparison) -> None:
    comparison.write()
    before = {path: (comparison.folder / path).read_bytes() for path in comparison.written()}
    comparison.write()
    assert {path: (comparison.folder / path).read_bytes() for path in comparison.written()} == before


def test_manifest_without_scores_leaves_the_earlier_comparison(comparison: Comparison) -> None:
    comparison.write()
    before = comparison.written()
    manifest = {**comparison.manifest(comparison.names), "rows": []}
    with pytest.raises(EvaluationError, match="no rows"):
        write_comparison(
            comparison.folder, run_config(comparison.names), manifest, comparison.place / "evaluations", {}
        )
    assert comparison.written() == before


def test_rows_of_another_form(comparison: Comparison) -> None:
    manifest = comparison.manifest(comparison.names)
    manifest["rows"] = [{**row, "value": "good"} for row in manifest["rows"]]
    assert set(manifest["rows"][0]) == set(COLUMNS)
    with pytest.raises(EvaluationError, match="'value' holds what is no number"):
        write_comparison(
            comparison.folder, run_config(comparison.names), manifest, comparison.place / "evaluations", {}
        )


@pytest.mark.parametrize(
    ("evaluation", "said", "unsaid"),
    [
        ({}, [], ["Not run"]),
        ({"core": None}, ["Not run, as the config says: core."], ["sparse_probing"]),
        ({"core": None, "sparse_probing": None}, ["Not run, as the config says: core, sparse_probing."], ["BBC"]),
        ({"sparse_probing": {"datasets": ["bbc-news"]}}, ["five classes of BBC news"], ["Not run"]),
        ({"sparse_probing": {"datasets": ["fancyzhx/ag_news"]}}, [], ["BBC", "Not run", "Autointerp"]),
        ({"autointerp": {}}, ["always says 'not active' scores 0.71", "lexical judge"], ["Scores of other judges"]),
        (
            {"autointerp": {"judge": "endpoint", "endpoint": {}, "n_random_ex_for_scoring": 4}},
            ["scores 0.50", "Scores of other judges"],
            ["lexical"],
        ),
    ],
    ids=["all", "no core", "neither", "bbc", "one of saebench's", "lexical judge", "endpoint"],
)
def test_notes_say_what_was_not_run(evaluation: dict[str, Any], said: list[str], unsaid: list[str]) -> None:
    notes = "\n".join(comparison_notes(run_config(["db-ksvd"], **evaluation)))
    assert "262,144 tokens" in notes
    assert all(text in notes for text in said)
    assert not any(text in notes for text in unsaid)


def test_notes_say_that_a_document_is_in_both_parts() -> None:
    config, split = run_config(["db-ksvd"]), {"drawn": 1, "whole": 0, "cut_tokens": 120, "gap_tokens": 128}
    assert "scored on other documents." in comparison_notes(config)[0]
    assert "scored on other documents." in comparison_notes(config, {**split, "cut_tokens": 0})[0]
    assert comparison_notes(config, prepend_bos=False)[0].endswith("documents. Contexts begin without a BOS.")
    assert "scored on other text; a document that is cut goes on, 128 tokens" in comparison_notes(config, split)[0]


def test_both_views_are_named_in_figures_and_notes(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch, methods: dict[str, tuple[float, ...]]
) -> None:
    """The panelist of a view has a density of its own, in the colour of its dictionary."""
    mine = comparison.frame[comparison.frame["dictionary"] == "db-ksvd"]
    comparison.frame = pd.concat([comparison.frame, mine.assign(view="split", d_sae=8192)], ignore_index=True)
    config, manifest = run_config(comparison.names), comparison.manifest(comparison.names)
    for files in manifest["files"].values():
        files["db-ksvd.split"] = files["db-ksvd"]
    ours = config.dictionaries["db-ksvd"].model_copy(update={"view": "both"})
    config = config.model_copy(update={"dictionaries": {**config.dictionaries, "db-ksvd": ours}})
    drawn: dict[str, Any] = {}
    original = compare.plots.density_histogram

    def histogram(densities: dict[str, Any], path: Path, *, colours: dict[str, str]) -> Path:
        drawn.update(names=list(densities), colours=colours)
        return original(densities, path, colours=colours)

    monkeypatch.setattr(compare.plots, "density_histogram", histogram)
    report = write_comparison(comparison.folder, config, manifest, comparison.place / "evaluations", {})
    assert drawn["names"] == ["db-ksvd (signed)", *list(methods)[1:], "db-ksvd (split)"]
    assert drawn["colours"]["db-ksvd (split)"] == drawn["colours"]["db-ksvd (signed)"] == palette(methods)["db-ksvd"]
    for page in (comparison.folder / "comparison.md", report):
        text = page.read_text(encoding="utf-8")
        assert "cuts a signed code" in text
        assert "8,192" in text
    assert not any("cuts a signed code" in note for note in comparison_notes(run_config(comparison.names)))
    assert any("cuts a signed code" in note for note in comparison_notes(config))
