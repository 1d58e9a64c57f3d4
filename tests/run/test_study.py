"""A study goes on where it stopped: what has a row is not measured again, what changed is."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ksvd_sae.errors import EvaluationError, ManifestError, ShapeError
from ksvd_sae.evals.base import EvalResults
from ksvd_sae.run.grid import load_study
from ksvd_sae.run.pipeline import Run
from ksvd_sae.run.replicas import Replica
from ksvd_sae.run.study import Study
from tests.run.test_grid import write

MEASURED = {"fvu": 0.1, "nats_lost": 0.5, "kl": None}


class Stage:
    """Stands in for a run's harvest, trainings and evals; counts trainings, and fails when told to."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.fail_at: int | None = None
        self.refuse: str | None = None

    def train(self, run: Run, replica: Replica) -> SimpleNamespace:
        name = f"{run.config.model.hook} {replica.label}"
        if self.fail_at == len(self.trained):
            raise RuntimeError("the power went")
        self.trained.append(name)
        if replica.label == self.refuse:
            raise ShapeError("too few samples", got=3)
        manifest = {"samples_seen": 10, "seconds": 1.0, "k": replica.method.budget, "d_sae": 32}
        return SimpleNamespace(panelist=replica.label, manifest=manifest)

    def scores(self, run: Run, trained: SimpleNamespace) -> list[EvalResults]:
        return [EvalResults("loss", "text", 9, {}, {trained.panelist: dict(MEASURED)})]


@pytest.fixture(autouse=True)
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage()
    monkeypatch.setattr(Run, "prepare", lambda self: None)
    monkeypatch.setattr(Run, "harvest", lambda self: None)
    monkeypatch.setattr(Run, "train_replica", lambda self, replica: stage.train(self, replica))
    monkeypatch.setattr(Run, "at_once", lambda self, trained: stage.scores(self, trained))
    monkeypatch.setattr(Run, "trained_seconds", lambda self, replica: 1.0)
    return stage


def study(folder: Path, **changes: Any) -> Study:
    return Study(*load_study(write(folder, **changes)), results=folder / "results")


def n_missing(study: Study) -> int:
    return sum(len(study.missing(layer)) for layer in study.layers)


def test_every_cell_once(tmp_path: Path, stage: Stage) -> None:
    assert study(tmp_path).run() == 13
    assert study(tmp_path).run() == 0
    assert len(stage.trained) == len(set(stage.trained)) == 13
    rows = study(tmp_path).rows()
    assert len(rows) == 13
    assert all(row["kl"] is None for row in rows)
    assert {row["coding"] for row in rows if row["kind"] == "topk_sae"} == {"own"}
    assert {
        (row["entry"], row["coding"], row["coding_k"]) for row in rows if row["k"] == 4 and row["entry"] == "plain"
    } == {("plain", "mp", 4)}


def test_whole_seeds_come_first(tmp_path: Path) -> None:
    study(tmp_path, layers=[3]).run()
    seeds = [row["seed"] for row in study(tmp_path, layers=[3]).rows()]
    assert seeds == sorted(seeds)


def test_one_that_fails_takes_no_other_with_it(tmp_path: Path, stage: Stage) -> None:
    stage.refuse = "once-k4"
    with pytest.raises(EvaluationError, match="1 dictionaries have no rows") as caught:
        study(tmp_path).run()
    assert "layer 5, once-k4: too few samples" in str(caught.value)
    assert len(study(tmp_path).rows()) == 12
    stage.refuse = None
    assert study(tmp_path).run() == 1


def test_processes_share_a_study_by_layer(tmp_path: Path) -> None:
    n_first = study(tmp_path, layers=[1, 2]).run(layer=1)
    assert {row["layer"] for row in study(tmp_path, layers=[1, 2]).rows()} == {1}
    n_second = study(tmp_path, layers=[1, 2]).run(layer=2)
    assert n_first > 0
    assert n_second > 0
    assert study(tmp_path, layers=[1, 2]).run() == 0


def test_goes_on_after_a_crash(tmp_path: Path, stage: Stage) -> None:
    stage.fail_at = 4
    with pytest.raises(RuntimeError):
        study(tmp_path).run()
    assert len(study(tmp_path).rows()) == 4
    stage.fail_at = None
    assert study(tmp_path).run() == 9
    assert len(set(stage.trained)) == 13


def test_stops_in_time(tmp_path: Path) -> None:
    assert study(tmp_path).run(minutes=0) == 0


def test_a_change_is_measured_again(tmp_path: Path) -> None:
    study(tmp_path).run()
    assert n_missing(study(tmp_path, contexts=4)) == 13
    assert n_missing(study(tmp_path, overrides=["harvest.train_tokens=70000"])) == 13
    assert n_missing(study(tmp_path, seeds=[0, 7, 9])) == 4


def test_what_an_entry_is_of_is_in_its_key(tmp_path: Path) -> None:
    def entries(n_atoms: int) -> dict[str, Any]:
        of = {"dictionary": {"kind": "db_ksvd", "n_atoms": n_atoms}}
        return {"of": of, "x": {"dictionary": {"kind": "recoded", "of": "of", "coder": "omp"}}}

    assert study(tmp_path, entries=entries(32)).run() == 16
    assert study(tmp_path, entries=entries(32)).run() == 0
    assert study(tmp_path, entries=entries(33)).run() == 16


def test_a_line_that_was_cut_off(tmp_path: Path) -> None:
    first = study(tmp_path)
    first.run()
    with (first.folder / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"key": "x"})[:5])
    with pytest.raises(ManifestError, match=r"(?s)line 14 is no row.*delete that line"):
        first.rows()
