"""Several processes learn what one does: the same dictionary but for rounding, whatever part of the data each has."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ksvd_sae.dictionary import Dictionary
from ksvd_sae.errors import ShapeError
from ksvd_sae.learning.coding import Coding
from ksvd_sae.learning.dbksvd import DictionaryLearner, LearnerOptions
from ksvd_sae.ranks import ALONE, Ranks
from tests import tolerances
from tests.learning import ranks_worker
from tests.tiny_saes import one_thread

ROOT = Path(__file__).resolve().parents[2]


def started(size: int, folder: Path, stop_after: int = -1) -> list["subprocess.Popen[str]"]:
    (folder / "meeting").unlink(missing_ok=True)
    command = [sys.executable, "-W", "error", "-m", "tests.learning.ranks_worker"]
    return [
        subprocess.Popen(
            [*command, str(rank), str(size), str(folder), str(stop_after)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def run(size: int, folder: Path, stop_after: int = -1) -> None:
    processes = started(size, folder, stop_after)
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * size, "\n".join(said)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What 2 and 3 processes have learned of all cases. Read only."""
    folder = tmp_path_factory.mktemp("ranks")
    for size in (2, 3):
        run(size, folder)
    return folder


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ranks_worker.CASES)
def test_as_one_process(name: str, size: int, learned: Path) -> None:
    x_ND, options = ranks_worker.CASES[name]()
    with one_thread():
        alone = DictionaryLearner(options, device="cpu").fit(x_ND)
    first, last = (load_file(learned / f"{name}.{size}.{rank}") for rank in (0, size - 1))
    assert all(torch.equal(first[key], last[key]) for key in first)
    assert alone.state is not None
    assert torch.equal(first["generator"], alone.state.generator.get_state())
    assert torch.equal(first["centre"], alone.centre_D)
    cosine_M = (first["atoms"] * alone.atoms_MD).sum(dim=1)
    assert float(1 - cosine_M.min()) < tolerances.RANKS_COSINE
    lines = [json.loads(line) for line in (learned / f"{name}.{size}.jsonl").read_text().splitlines()]
    assert len(lines) == len(alone.log)
    for line, wanted in zip(lines, alone.log, strict=True):
        assert line["fvu"] == pytest.approx(wanted.fvu, rel=tolerances.RANKS_FVU)
        assert line["fvu_after_update"] == pytest.approx(wanted.fvu_after_update, rel=tolerances.RANKS_FVU)
        for count in ("samples_seen", "dead", "duplicates", "redrawn"):
            assert line[count] == getattr(wanted, count)
        assert line["l0"] == pytest.approx(wanted.l0)
        assert line["prefix_fvu"] == pytest.approx(wanted.prefix_fvu, rel=tolerances.RANKS_FVU)


def test_the_cases_are_what_they_say() -> None:
    """Some atoms are redrawn where they are said to be, and a process has no rows where it is said to have none."""
    for name in ("redrawn", "redrawn from residuals"):
        x_ND, options = ranks_worker.CASES[name]()
        assert sum(line.redrawn for line in DictionaryLearner(options, device="cpu").fit(x_ND).log) >= 8
    assert [Ranks(rank, 3).part(2) for rank in range(3)] == [slice(0, 0), slice(0, 1), slice(1, 2)]


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("n", [0, 1, 5, 1201])
def test_parts(n: int, size: int) -> None:
    rows = list(range(n))
    parts = [rows[Ranks(rank, size).part(n)] for rank in range(size)]
    assert [row for part in parts for row in part] == rows
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3)])
def test_resumed_by_another_number_of_processes(before: int, after: int, tmp_path: Path) -> None:
    run(before, tmp_path, stop_after=5)
    assert (tmp_path / "checkpoint").exists()
    run(after, tmp_path, stop_after=0)
    assert not (tmp_path / "checkpoint").exists()
    x_ND, options = ranks_worker.CASES["plain"]()
    with one_thread():
        alone = DictionaryLearner(options, device="cpu").fit(x_ND)
    assert json.loads((tmp_path / "done").read_text()) == alone.samples_seen
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == len(alone.log)
    cosine_M = (load_file(tmp_path / "atoms")["atoms"] * alone.atoms_MD).sum(dim=1)
    assert float(1 - cosine_M.min()) < tolerances.RANKS_COSINE


def test_the_others_stop_when_one_is_gone(tmp_path: Path) -> None:
    first, second = started(2, tmp_path, stop_after=10_000)
    while not (tmp_path / "checkpoint").exists():
        assert first.poll() is None, first.communicate()[1]
    second.kill()
    _, said = first.communicate(timeout=60)
    second.communicate()
    assert first.returncode != 0
    assert "DB-KSVD in 2 processes, rank 0: another process is gone" in said
    assert "start all of them again" in said


@pytest.mark.parametrize("what", [ranks_worker.OWN_SAMPLES, ranks_worker.OWN_MEAN])
def test_samples_of_ones_own(what: int, tmp_path: Path) -> None:
    """As data-parallel training of other things has them: an error in every process, and nobody waits."""
    for process in started(3, tmp_path, what):
        _, said = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "DB-KSVD in 3 processes: not all were given the same" in said
        assert "cure: give all samples to every process" in said


class TestRefused:
    X: Tensor = ranks_worker.samples(100)

    def learner(self, **options: str) -> DictionaryLearner:
        return DictionaryLearner(LearnerOptions(8, Coding(2), **options), device="cpu", ranks=Ranks(0, 2))  # type: ignore[arg-type]

    def test_exact(self) -> None:
        with pytest.raises(ShapeError, match=r"(?s)update='exact' is for one process.*2 processes.*two_sweeps"):
            self.learner(update="exact").fit(self.X)

    def test_ranks_that_are_none(self) -> None:
        with pytest.raises(ShapeError, match=r"(?s)ranks must be Ranks.*Ranks\.of_process_group"):
            DictionaryLearner(LearnerOptions(8, Coding(2)), ranks=2)  # type: ignore[arg-type]

    def test_streams(self) -> None:
        with pytest.raises(ShapeError, match="a stream is for one process"):
            self.learner().fit([self.X, self.X])
        with pytest.raises(ShapeError, match="partial_fit is for one process"):
            self.learner().partial_fit(self.X)


def test_without_a_group_a_process_is_alone() -> None:
    assert Ranks.of_process_group() == ALONE


def test_the_page(tmp_path: Path) -> None:
    """docs/processes.md under torchrun."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "processes.md").read_text(), re.DOTALL)
    (tmp_path / "learn.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "learn.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert Dictionary.load(tmp_path / "dictionary").atoms_MD.shape == (64, 32)
    lines = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert lines[-1]["samples_seen"] == 40_000
    assert lines[-1]["fvu"] < lines[0]["fvu"]
