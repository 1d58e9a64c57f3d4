"""Timing of several implementations side by side.

Warm-ups first; then every implementation once a round, so that what else the machine does hits all of them alike.
"""

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ksvd_sae.bench.rows import OURS, Who
from ksvd_sae.memory import peak_growth

logger = logging.getLogger(__name__)
# Two on few samples (what is compiled and loaded on first use; a guess of the speed), one under the memory meter.
WARMUPS = 3
# Threads of an OpenMP runtime keep their core busy for some milliseconds after their work, and every library brings a
# runtime of its own: the next implementation must not pay for the last one's.
_SETTLE_S = 0.03


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Job:
    """What is timed: ``call(setup())``, of which only ``call`` is on the clock.

    Attributes:
        who: whose code.
        n: samples of one call.
        call: the work; takes what ``setup`` gave.
        score: fields of the row from the result of a call, such as 'fvu'.
        setup: fresh input for a call that overwrites it.
    """

    who: Who
    n: int
    call: Callable[[Any], Any]
    score: Callable[[Any], dict[str, Any]]
    setup: Callable[[], Any] = _nothing


@dataclass(frozen=True)
class Measured:
    """A job with the seconds of its calls, the MiB that one needed, and what ``score`` said of the result."""

    job: Job
    seconds: list[float]
    peak_mib: float | None
    scores: dict[str, Any]


def measure(jobs: Sequence[Job], repeats: int, failures: list[str], *, time_first: bool = False) -> list[Measured]:
    """Measure every job: one call for memory and score (also a warm-up), then ``repeats`` rounds of one call each.

    A peer that fails is left out, logged and named in ``failures``; our own failures are raised.

    Args:
        time_first: for jobs of minutes: the first call is timed too and counts as one of the repeats.
    """
    gc.collect()
    scored: dict[int, tuple[float | None, dict[str, Any]]] = {}
    seconds: dict[int, list[float]] = {}
    for index, job in enumerate(jobs):
        with tolerant(job.who, failures):
            (result, first_s), peak_mib = peak_growth(
                partial(_clocked, job.call, job.setup(), job.who.device), job.who.device
            )
            scored[index], seconds[index] = (peak_mib, job.score(result)), [first_s] * time_first
            del result
    for _ in range(repeats - time_first):
        for index, job in enumerate(jobs):
            if index in scored:
                seconds[index].append(_clocked(job.call, job.setup(), job.who.device)[1])
    for index in scored:
        logger.info("%s: %.3g s on %d samples", jobs[index].who, min(seconds[index]), jobs[index].n)
    return [Measured(jobs[i], seconds[i], *scored[i]) for i in scored]


def _clocked(call: Callable[[Any], Any], given: Any, device: torch.device) -> tuple[Any, float]:
    """The result of ``call(given)`` and its seconds, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    time.sleep(_SETTLE_S)
    started = time.perf_counter()
    result = call(given)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - started


@contextmanager
def tolerant(who: Who, failures: list[str]) -> Iterator[None]:
    """Note that a peer failed and go on without it: a fault of theirs must not cost the others' rows."""
    try:
        yield
    except Exception as error:
        if who.impl == OURS:
            raise
        logger.exception("%s failed", who)
        failures.append(f"{who}: {type(error).__name__}: {error}")


@contextmanager
def limited_threads(threads: int) -> Iterator[None]:
    """At most ``threads`` threads in torch and in every BLAS and OpenMP library that is loaded."""
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            yield
    finally:
        torch.set_num_threads(before)
