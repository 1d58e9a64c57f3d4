"""What the processes of a run tell each other, and how they share work out."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from ksvd_sae.errors import ConfigError
from ksvd_sae.ranks import Ranks
from ksvd_sae.together import ALONE, Task, Together
from tests.command_line import REPOSITORY, free_port
from tests.threads import in_ranks

SIZES = pytest.mark.parametrize("size", [1, 2, 3])


def test_alone() -> None:
    done: list[int] = []
    with ALONE.joined():
        ALONE.wait()
        assert ALONE.first(lambda: 5) == 5
        ALONE.share([Task(lambda: done.append(0)), Task(lambda: done.append(1), after=0)])
    assert done == [0, 1]
    assert ALONE.ranks(torch.device("cpu")) == Ranks()


@SIZES
def test_all_know_what_rank_0_found(size: int) -> None:
    def say(together: Together) -> list[object]:
        rank = together.rank
        return [together.first(lambda: [rank, "x"]), together.all(rank < 2), together.first(lambda: None)]

    assert in_ranks(size, say) == [[[0, "x"], size < 3, None]] * size


@SIZES
def test_nobody_goes_on_before_all_are_there(size: int) -> None:
    here: list[int] = []

    def arrive(together: Together) -> int:
        time.sleep(0.05 * together.rank)
        here.append(together.rank)
        together.wait()
        return len(here)

    assert in_ranks(size, arrive) == [size] * size


@SIZES
def test_each_task_is_done_once_and_none_before_what_it_follows(size: int) -> None:
    done: list[tuple[int, int]] = []

    def work(together: Together) -> None:
        def task(number: int, after: int | None = None) -> Task:
            def do() -> None:
                assert after is None or after in [one for one, _ in done]
                time.sleep(0.01)
                done.append((number, together.rank))

            return Task(do, after)

        together.share([task(0), task(1), task(2, 0), task(3, 1), task(4, 0), task(5)])
        together.share([])

    in_ranks(size, work)
    assert sorted(number for number, _ in done) == list(range(6))


def test_a_slow_task_holds_nobody_up() -> None:
    """One rank is at it until the other has done all that does not follow from it."""
    others_done, done = threading.Event(), list[int]()

    def work(together: Together) -> None:
        def quick(number: int) -> None:
            done.append(number)
            if len(done) == 5:
                others_done.set()

        slow = Task(lambda: done.append(0) if others_done.wait(60) else pytest.fail("held up"))
        quicks = [Task(lambda number=number: quick(number)) for number in range(1, 6)]  # type: ignore[misc]
        together.share([slow, Task(lambda: quick(6), after=0), *quicks])

    in_ranks(2, work)
    assert done[:5] == [1, 2, 3, 4, 5]
    assert done[5:] == [0, 6]


def test_only_rank_0_holds_the_lock(tmp_path: Path) -> None:
    folder = tmp_path / "kind" / "folder"

    def write(together: Together) -> bool:
        with together.writing(folder, "write"):
            (folder.parent / str(together.rank)).parent.mkdir(exist_ok=True)
            (folder.parent / str(together.rank)).touch()
            there = (tmp_path / "locks" / "kind-folder.owner").exists()
        return there and len(list(folder.parent.iterdir())) == 3

    assert in_ranks(3, write) == [True] * 3


@pytest.mark.parametrize("missing", ["RANK", "MASTER_PORT"])
def test_half_an_environment(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert Together.of_torchrun().rank == 1
    monkeypatch.delenv(missing)
    with pytest.raises(ConfigError, match=f"there is no {missing}"):
        Together.of_torchrun()


def test_one_gpu_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Together(5, 8, local_rank=1).device("auto") == torch.device("cuda:1")
    assert Together(5, 8, local_rank=1).device("cpu") == torch.device("cpu")
    assert Together().device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ConfigError, match=r"(?s)'cuda:0' is one GPU, for 8 processes.*LOCAL_RANK"):
        Together(5, 8, local_rank=1).device("cuda:0")
    with pytest.raises(ConfigError, match="torch sees 2 GPUs"):
        Together(5, 8, local_rank=5).device("cuda")


# ---------------------------------------------------------------- real processes

PROGRAM = """
import os, sys, time
from pathlib import Path
from ksvd_sae import together as module
from ksvd_sae.errors import TextError
from ksvd_sae.together import Together

module._SILENT_S = 10.0
watch = module._watch
# A watcher that is slow to begin, on a busy machine.
module._watch = lambda *of: (time.sleep(2), watch(*of))
together, (place, what) = Together.of_torchrun(), sys.argv[1:]
try:
    with together.joined():
        print(together.first(lambda: "from rank 0"), flush=True)
        (Path(place) / str(together.rank)).write_text(str(os.getpid()))
        if what == "error" and together.rank == 1:
            while not (Path(place) / "now").exists():
                time.sleep(0.01)
            raise TextError("harvest: no text")
        if what != "nothing":
            # As a kernel does that keeps Python's lock.
            sum(range(10**11))
except KeyboardInterrupt:
    sys.exit("stopped")
"""


def begun(place: Path, what: str, size: int = 3) -> list["subprocess.Popen[str]"]:
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PROGRAM, str(place), what],
            cwd=REPOSITORY,
            env={**os.environ, **common, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(size)
    ]


def test_all_end_well(tmp_path: Path) -> None:
    ranks = begun(tmp_path, "nothing")
    assert [(*rank.communicate(timeout=120), rank.returncode) for rank in ranks] == [("from rank 0\n", "", 0)] * 3


def stopped(group: int, _: int) -> None:
    """As a machine that is gone without a word: no connection is closed."""
    os.killpg(group, signal.SIGSTOP)


@pytest.mark.parametrize(
    ("victim", "end", "why"),
    [
        (0, os.kill, "the store of all processes, which torchrun or rank 0 holds, is gone ("),
        (0, stopped, "the store of all processes, which torchrun or rank 0 holds, does not answer for 10 s"),
        (2, os.kill, "rank 2 on "),
        (2, os.killpg, "rank 2: not heard of for 10 s"),
    ],
    ids=["which holds the store", "the store's machine", "another", "another's machine"],
)
def test_one_is_killed(victim: int, end: Callable[[int, int], None], why: str, tmp_path: Path) -> None:
    ranks = begun(tmp_path, "work")
    while len(list(tmp_path.iterdir())) < 3:
        assert ranks[victim].poll() is None
        time.sleep(0.1)
    end(ranks[victim].pid, signal.SIGKILL)
    killed = time.monotonic()
    for number, rank in enumerate(ranks):
        if number != victim:
            _, said = rank.communicate(timeout=60)
            assert rank.returncode != 0
            assert f"rank {number}: stopping, as another process failed: {why}" in said
    assert time.monotonic() - killed < 60
    with suppress(ProcessLookupError):
        os.killpg(ranks[victim].pid, signal.SIGKILL)
    ranks[victim].communicate(timeout=60)


def test_one_fails(tmp_path: Path) -> None:
    (tmp_path / "now").touch()
    ranks = begun(tmp_path, "error")
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode != 0 for rank in ranks] == [True] * 3
    assert "TextError: harvest: no text" in said[1]
    for number in (0, 2):
        assert "stopping, as another process failed: rank 1 on " in said[number]
        assert "TextError: harvest: no text" in said[number]


def test_one_fails_and_cannot_say_so(tmp_path: Path) -> None:
    ranks = begun(tmp_path, "error")
    while len(list(tmp_path.iterdir())) < 3:
        time.sleep(0.1)
    stopped(ranks[0].pid, 0)
    (tmp_path / "now").touch()
    said = [rank.communicate(timeout=60)[1] for rank in ranks[1:]]
    assert "TextError: harvest: no text" in said[0]
    assert "does not answer" in said[1]
    os.killpg(ranks[0].pid, signal.SIGKILL)
    ranks[0].communicate(timeout=60)


def test_all_are_stopped_for_a_while(tmp_path: Path) -> None:
    """As a shell's Ctrl-Z does, and a scheduler that lets others have the machine."""
    ranks = begun(tmp_path, "work")
    while len(list(tmp_path.iterdir())) < 3:
        time.sleep(0.1)
    for rank in ranks:
        os.killpg(rank.pid, signal.SIGSTOP)
    time.sleep(12)
    for rank in ranks:
        os.killpg(rank.pid, signal.SIGCONT)
    time.sleep(5)
    assert [rank.poll() for rank in ranks] == [None] * 3
    for rank in ranks:
        os.killpg(rank.pid, signal.SIGKILL)
    assert [rank.communicate(timeout=60)[1] for rank in ranks] == [""] * 3
