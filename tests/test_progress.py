"""What others print goes elsewhere, what other threads print does not."""

import io
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from ksvd_sae.progress import printed_to


def streams(monkeypatch: pytest.MonkeyPatch) -> dict[str, io.StringIO]:
    """Of sys, for the rest of the test; pytest puts its own there before it."""
    made = {"stdout": io.StringIO(), "stderr": io.StringIO()}
    for name, stream in made.items():
        monkeypatch.setattr(sys, name, stream)
    return made


@pytest.fixture
def other() -> Iterator["Other"]:
    made = Other()
    yield made
    made.asked.release()
    made.thread.join()


class Other:
    """A thread that runs already, and prints when it is asked to."""

    def __init__(self) -> None:
        self.text: str | None = None
        self.asked, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        while self.asked.acquire() and self.text is not None:
            print(self.text, file=sys.stderr)
            self.text = None
            self.done.release()

    def print(self, text: str) -> None:
        self.text = text
        self.asked.release()
        self.done.acquire()


def test_own_and_others(monkeypatch: pytest.MonkeyPatch, other: Other) -> None:
    target, before = io.StringIO(), streams(monkeypatch)
    with printed_to(target, "stderr"):
        print("own", file=sys.stderr)
        print("stdout stays")
        started = threading.Thread(target=lambda: print("started here", file=sys.stderr))
        started.start()
        started.join()
        other.print("other")
    print("afterwards", file=sys.stderr)
    assert target.getvalue() == "own\nstarted here\n"
    assert before["stderr"].getvalue() == "other\nafterwards\n"
    assert before["stdout"].getvalue() == "stdout stays\n"


def test_nothing_outlives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = streams(monkeypatch)
    with pytest.raises(ZeroDivisionError), printed_to(io.StringIO(), "stdout", "stderr"):
        print(1 / 0)
    assert sys.stdout is before["stdout"]
    assert sys.stderr is before["stderr"]


def test_two_that_end_in_the_order_they_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they may in two threads: what is put back last is what was over first."""
    targets, before = (io.StringIO(), io.StringIO()), streams(monkeypatch)
    first, second = ExitStack(), ExitStack()
    first.enter_context(printed_to(targets[0], "stderr"))
    second.enter_context(printed_to(targets[1], "stderr"))
    print("second", file=sys.stderr)
    first.close()
    second.close()
    print("none", file=sys.stderr)
    assert [target.getvalue() for target in targets] == ["", "second\n"]
    assert before["stderr"].getvalue() == "none\n"
