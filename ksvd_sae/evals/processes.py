"""Evals side by side, each in a process of its own.

SAEBench's evals are loops in Python around small batches: they keep one core busy, and the others now and then. Two of
them at a time, each with half the threads, end earlier than one after the other. A process loads the language model
once and keeps it for its next eval.
"""

import logging
import logging.handlers
import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from typing import Any, TypeVar

import torch

from ksvd_sae.device import give_back_memory, keep_freed_memory
from ksvd_sae.errors import EvaluationError

logger = logging.getLogger(__name__)
T = TypeVar("T")
# Read by torch, BLAS, scikit-learn and numba when they are loaded.
_THREADS = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")
# How long the last log records may take.
_LOGS_S = 5.0


def side_by_side(tasks: Iterable[Callable[[], T]], processes: int) -> Iterator[T]:
    """What each task gives, as it comes.

    Each process gets its share of this one's threads. Whoever stops listening, or dies, takes the processes along. What
    they log goes to this process' loggers.

    Args: tasks: can be pickled, as can what they give; begun in this order.
    Raises: what a task raises; EvaluationError if a process died.
    """
    tasks = list(tasks)
    processes = min(processes, len(tasks))
    give_back_memory()
    # Not forked: threads of torch and numba do not survive that.
    context = multiprocessing.get_context("spawn")
    end_of_file, ours = context.Pipe(duplex=False)
    verbose = logging.getLogger("ksvd_sae").isEnabledFor(logging.DEBUG)
    with _relayed_logs(context) as logs, _threads(max(1, torch.get_num_threads() // processes)):
        pool = ProcessPoolExecutor(processes, context, _start, (end_of_file, logs, verbose))
        try:
            waiting: set[Future[T]] = {pool.submit(task) for task in tasks}
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
            pool.shutdown()
        except BrokenProcessPool as error:
            raise EvaluationError(
                "an eval's process ended without a word",
                cause=f"most often too little memory: each of {processes} processes holds a model",
                cure="evaluation.processes: 1; results that were finished are kept",
            ) from error
        finally:
            # Whatever still runs is not wanted any more.
            ours.close()
            pool.shutdown(cancel_futures=True)
            end_of_file.close()


def _start(end_of_file: Connection, logs: Any, verbose: bool) -> None:
    """In a new process, before its first task."""
    keep_freed_memory()
    threading.Thread(target=_end_with_parent, args=(end_of_file,), daemon=True).start()
    root = logging.getLogger()
    root.handlers[:] = [logging.handlers.QueueHandler(logs)]
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    if not verbose:
        warnings.filterwarnings("ignore")


def _end_with_parent(end_of_file: Connection) -> None:
    """The other end is closed when the parent has had enough, and when it dies."""
    try:
        end_of_file.recv()
    except (EOFError, OSError):
        os._exit(1)


@contextmanager
def _relayed_logs(context: SpawnContext) -> Iterator[Any]:
    """A queue of log records, each handed to the logger of its name here, whose level decides."""
    queue = context.Queue()

    def relay() -> None:
        while (record := queue.get()) is not None:
            own = logging.getLogger(record.name)
            if own.isEnabledFor(record.levelno):
                own.handle(record)

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        # A process that was ended while it wrote keeps the queue's lock for good: nobody waits for that.
        queue.cancel_join_thread()
        queue.put(None)
        thread.join(_LOGS_S)


@contextmanager
def _threads(n: int) -> Iterator[None]:
    """New processes begin with so many."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, str(n)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
