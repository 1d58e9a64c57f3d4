"""A study goes on where it stopped: what has a row is not measured again, what changed is."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from ksvd_sae.errors import EvaluationError, ManifestError, ShapeError
from ksvd_sae.run import study as module
from ksvd_sae.run.grid import load_study
from ksvd_sae.run.study import ROWS, Study
from tests.run.test_grid import write

MEASURED = {"fvu": 0.1, "nats_lost": 0.5, "kl": float("nan")}


class Bench:
    """Stands in for model and activations; counts trainings, and fails when told to."""

    trained: ClassVar[list[str]] = []
    fail_at: int | None = None

    def __init__(self, *_: Any) -> None:
        self.train = None
        self.run = SimpleNamespace(train_one=self.train_one)

    def train_one(self, name: str, config: Any, shards: Any, of: Any) -> SimpleNamespace:
        if Bench.fail_at == len(Bench.trained):
            raise RuntimeError("the power went")
        Bench.trained.append(name)
        return SimpleNamespace(name=name, manifest={"samples_seen": 10, "seconds": 1.0})

    def measure(self, trained: Any, variant: Any) -> dict[str, float]:
        return dict(MEASURED)


@pytest.fixture(autouse=True)
def _bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_Bench", Bench)
    monkeypatch.setattr(Bench, "trained", [])
    monkeypatch.setattr(Bench, "fail_at", None)


def study(folder: Path, **changes: Any) -> Study:
    return Study(*load_study(write(folder, **changes)), results=folder / "results")


def test_every_cell_once(tmp_path: Path) -> None:
    assert study(tmp_path).run() == 13
    assert study(tmp_path).run() == 0
    assert len(Bench.trained) == 13
    rows = study(tmp_path).rows()
    assert len(rows) == 13
    assert all(row["kl"] is None for row in rows), "NaN is no JSON"
    assert {row["coding"] for row in rows if row["kind"] == "topk_sae"} == {"own"}


def test_one_that_fails_takes_no_other_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train_one(self: Bench, name: str, config: Any, shards: Any, of: Any) -> SimpleNamespace:
        if len(Bench.trained) == 2 and name not in Bench.trained:
            Bench.trained.append(name)
            raise ShapeError("too few samples", got=3)
        return train(self, name, config, shards, of)

    train = Bench.train_one
    monkeypatch.setattr(Bench, "train_one", train_one)
    with pytest.raises(EvaluationError, match="1 dictionaries have no rows") as caught:
        study(tmp_path).run()
    failed = Bench.trained[2]
    assert f"{failed}: too few samples" in str(caught.value)
    assert len(study(tmp_path).rows()) == 12
    assert study(tmp_path).run() == 1


def test_processes_share_a_study_by_layer(tmp_path: Path) -> None:
    n_first = study(tmp_path, layers=[1, 2]).run(layer=1)
    assert {row["layer"] for row in study(tmp_path, layers=[1, 2]).rows()} == {1}
    n_second = study(tmp_path, layers=[1, 2]).run(layer=2)
    assert n_first > 0
    assert n_second > 0
    assert study(tmp_path, layers=[1, 2]).run() == 0


def test_goes_on_after_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "fail_at", 4)
    with pytest.raises(RuntimeError):
        study(tmp_path).run()
    assert len(study(tmp_path).rows()) == 4
    monkeypatch.setattr(Bench, "fail_at", None)
    assert study(tmp_path).run() == 9
    assert len(set(Bench.trained)) == 13


def test_stops_in_time(tmp_path: Path) -> None:
    assert study(tmp_path).run(minutes=0) == 0


def test_a_change_is_measured_again(tmp_path: Path) -> None:
    study(tmp_path).run()
    assert len(list(study(tmp_path, contexts=4).missing())) == 13
    assert len(list(study(tmp_path, overrides=["harvest.train_tokens=70000"]).missing())) == 13
    assert len(list(study(tmp_path, seeds=[0, 7, 9]).missing())) == 4


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
    with (first.folder / ROWS).open("a") as file:
        file.write(json.dumps({"key": "x"})[:5])
    with pytest.raises(ManifestError, match=r"(?s)line 14 is no row.*delete that line"):
        first.rows()
