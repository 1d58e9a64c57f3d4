"""Evals side by side: what comes back from their processes, and what becomes of those."""

import logging
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numba
import pytest
import torch

from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.processes import side_by_side


def _waits_for(name: str, before: Path, then: Path) -> tuple[str, int, int, int]:
    """Ends when another has begun."""
    then.touch()
    until = time.monotonic() + 120
    while not before.exists():
        assert time.monotonic() < until, "not side by side"
        time.sleep(0.01)
    logging.getLogger("ksvd_sae.evals").info("%s is done", name)
    logging.getLogger("ksvd_sae.evals").debug("%s has details", name)
    return name, os.getpid(), torch.get_num_threads(), numba.get_num_threads()


def _fails() -> None:
    raise EvaluationError("scoring: nothing there", got=[1, 2], cure="put something there")


def _dies() -> None:
    os._exit(3)


def _dies_as_it_logs() -> None:
    """What a writer holds of the queue that all of them log to, nobody gives back."""
    (handler,) = logging.getLogger().handlers
    handler.queue._wlock.acquire()  # type: ignore[attr-defined]
    os._exit(3)


def _sleeps(pid_file: Path, seconds: float) -> None:
    pid_file.write_text(str(os.getpid()))
    time.sleep(seconds)


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("four_threads")
def test_tasks_run_beside_each_other_and_share_threads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ksvd_sae")
    environment = dict(os.environ)
    a, b = tmp_path / "a", tmp_path / "b"
    results = list(side_by_side([partial(_waits_for, "one", a, b), partial(_waits_for, "two", b, a)], 2))
    assert sorted(name for name, *_ in results) == ["one", "two"]
    assert len({os.getpid(), *(pid for _, pid, *_ in results)}) == 3
    assert {threads for _, _, *threads_of_both in results for threads in threads_of_both} == {2}
    assert dict(os.environ) == environment
    assert sorted(record.getMessage() for record in caplog.records) == ["one is done", "two is done"]


def test_an_error_arrives_whole() -> None:
    with pytest.raises(EvaluationError) as caught:
        list(side_by_side([_fails], 1))
    assert caught.value.what == "scoring: nothing there"
    assert caught.value.got == [1, 2]
    assert str(caught.value) == "scoring: nothing there\n  got: [1, 2]\n  cure: put something there"


def test_a_process_that_dies_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(EvaluationError, match=r"(?s)ended without a word.*memory.*processes: 1"):
        list(side_by_side([_dies, partial(time.sleep, 0.01)], 2))


@pytest.mark.timeout(120)
def test_a_process_that_dies_as_it_logs_keeps_nobody_waiting() -> None:
    with pytest.raises(EvaluationError, match="ended without a word"):
        list(side_by_side([_dies_as_it_logs], 1))


def test_who_stops_listening_takes_the_processes_along(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    results = side_by_side([partial(_sleeps, pid_file, 600), partial(_waits_for, "one", pid_file, tmp_path / "x")], 2)
    assert next(results)[0] == "one"  # type: ignore[index]
    results.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
