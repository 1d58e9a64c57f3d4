"""Progress bars: rich on a terminal, a log line now and then elsewhere; and where others' bars and prints go."""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, Literal, Protocol, TextIO

logger = logging.getLogger(__name__)
_LOG_EVERY_S = 30.0


class Advance(Protocol):
    """Called with how much was done since the last call, and a note to show beside the bar."""

    def __call__(self, amount: float, note: str = "") -> None: ...


@contextmanager
def progress(description: str, total: float, unit: str) -> Iterator[Advance]:
    """A bar with rate and time left on stderr.

    Args: total: in ``unit``s; unit: e.g. 'tokens', shown with the rate.
    """
    # Of several processes, only rank 0 logs.
    if sys.stderr.isatty() and logger.isEnabledFor(logging.INFO):
        yield from _bar(description, total, unit)
    else:
        yield from _lines(description, total, unit)


def _bar(description: str, total: float, unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    started, done = time.perf_counter(), 0.0
    with Progress(*columns, console=Console(stderr=True), transient=False) as bar:
        task = bar.add_task(description, total=total, rate="", note="")

        def advance(amount: float, note: str = "") -> None:
            nonlocal done
            done += amount
            rate = done / max(time.perf_counter() - started, 1e-9)
            bar.update(task, advance=amount, rate=f"{rate:,.0f} {unit}/s", note=note)

        yield advance


def _lines(description: str, total: float, unit: str) -> Iterator[Advance]:
    started = last = time.perf_counter()
    done = 0.0

    def advance(amount: float, note: str = "") -> None:
        nonlocal done, last
        done += amount
        now = time.perf_counter()
        if now - last >= _LOG_EVERY_S:
            last = now
            rate = done / (now - started)
            left_s = max(total - done, 0) / rate if rate else float("inf")
            logger.info("%s: %.0f/%.0f %s, %.0f/s, %.0f s left %s", description, done, total, unit, rate, left_s, note)

    yield advance
    logger.info("%s: %.0f %s in %.1f s", description, done, unit, time.perf_counter() - started)


@contextmanager
def printed_to(target: TextIO, *names: Literal["stdout", "stderr"]) -> Iterator[None]:
    """What is printed to these streams of ``sys`` inside goes to ``target``; other threads print to where they did.

    Other threads: those that run already, but for daemons, such as the one that draws tqdm's bars.
    """
    redirect: dict[str, Any] = {"stdout": redirect_stdout, "stderr": redirect_stderr}
    streams = {name: _Stream(getattr(sys, name), target) for name in names}
    try:
        with ExitStack() as stack:
            for name, stream in streams.items():
                stack.enter_context(redirect[name](stream))
            yield
    finally:
        # Another thread, which did the same in between, may put it back.
        for stream in streams.values():
            stream.target = stream.before


class _Stream:
    def __init__(self, before: TextIO, target: TextIO):
        self.before, self.target = before, target
        others = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
        self._others = {thread.ident for thread in others if not thread.daemon}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.before if threading.get_ident() in self._others else self.target, name)
