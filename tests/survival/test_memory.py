"""A device that runs out of memory: smaller parts with the same results, then our own error. Training keeps within its
memory, whatever the size of the data."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ksvd_sae.activations.shards import write_harvest
from ksvd_sae.errors import MemorySpaceError
from ksvd_sae.learning import sparse_coding
from ksvd_sae.learning.sparse_coding import matching_pursuit, orthogonal_matching_pursuit
from tests.activations.test_harvest import Reader, content
from tests.activations.test_harvest import run as run_harvest
from tests.command_line import REPOSITORY
from tests.strategies import generator, generic
from tests.survival.conftest import Tally
from tests.tolerances import CHUNKING


def only_for(n_rows: int, work: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``work`` on a device with memory for so many rows at a time."""

    def limited(rows: Tensor) -> Tensor:
        if len(rows) > n_rows:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {len(rows)} rows.")
        return work(rows)

    return limited


@pytest.fixture
def memory_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes coding's products of more rows fail."""
    times = sparse_coding.times

    def limit(n_rows: int) -> None:
        monkeypatch.setattr(sparse_coding, "times", lambda *args: only_for(n_rows, times(*args)))

    return limit


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("coder", [matching_pursuit, orthogonal_matching_pursuit])
@pytest.mark.parametrize("n_rows", [1, 7, 64])
def test_coding(
    coder: Any,
    backend: str,
    n_rows: int,
    memory_for: Callable[[int], None],
    tally: Tally,
    caplog: pytest.LogCaptureFixture,
) -> None:
    problem = generic(100, 16, 24, 3, seed=0).to(torch.float32)
    whole = coder(problem.x_BD, problem.atoms_MD, 3, backend=backend)
    memory_for(n_rows)
    parts = coder(problem.x_BD, problem.atoms_MD, 3, backend=backend)
    gap_B = (parts.to_dense(24) - whole.to_dense(24)).abs().amax(dim=1)
    same = bool((gap_B <= CHUNKING[torch.float32] * problem.x_BD.norm(dim=1)).all())
    tally.count("too little device memory", survived=same)
    assert same


def test_no_memory_for_one_sample(memory_for: Callable[[int], None]) -> None:
    problem = generic(10, 16, 24, 3, seed=0)
    memory_for(0)
    with pytest.raises(MemorySpaceError, match=r"(?s)sparse coding: too little memory.*Tried to allocate 1 rows"):
        orthogonal_matching_pursuit(problem.x_BD, problem.atoms_MD, 3)


class SmallReader(Reader):
    """Of a model that takes a few contexts at a time."""

    n_contexts = 3

    def read(self, tokens_BL: Tensor) -> Tensor:
        return only_for(self.n_contexts, super().read)(tokens_BL)


def test_harvest(tmp_path: Path, tally: Tally, caplog: pytest.LogCaptureFixture) -> None:
    run_harvest(tmp_path / "a" / "whole", Reader())
    run_harvest(tmp_path / "a" / "parts", SmallReader())
    same = content(tmp_path / "a" / "whole") == content(tmp_path / "a" / "parts")
    tally.count("too little device memory", survived=same)
    assert same
    assert "harvest: the device has too little memory; going on with" in caplog.text


def test_no_memory_for_one_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SmallReader, "n_contexts", 0)
    with pytest.raises(MemorySpaceError, match=r"(?s)harvest: too little memory.*bfloat16"):
        run_harvest(tmp_path / "a" / "b", SmallReader())


@pytest.fixture(scope="module")
def large_harvest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 MiB in shards of 4 MiB."""
    folder, shard_ND = tmp_path_factory.mktemp("large") / "harvest", torch.randn(4096, 256, generator=generator(0))
    write_harvest(folder, {"made": "by hand"}, [shard_ND] * 100, [shard_ND[:10]])
    return folder


@pytest.mark.parametrize(
    ("update", "groups"),
    [
        pytest.param(update, groups, marks=() if (update, groups) == ("sweep", "plain") else pytest.mark.slow)
        for update in ("sweep", "two_sweeps", "exact")
        for groups in ("plain", "groups")
    ],
)
def test_training_within_its_memory(update: str, groups: str, large_harvest: Path, tally: Tally) -> None:
    """A tenth of what the data takes; a batch is half a MiB."""
    command = [sys.executable, "-m", "tests.survival.within_memory", str(large_harvest), "40", update, groups]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout) if done.returncode == 0 else {}
    within = bool(found) and found["batches"] == 1600 and 0 < found["grown"] < 40
    tally.count("training within its memory", survived=within)
    assert within, f"{found} {done.stderr[-4000:]}"
