"""numba's compiler as the kernels here use it: cached where there is a place for it, and safe in forked processes."""

import logging
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from numba import njit

logger = logging.getLogger(__name__)
_PLAIN: dict[str, Any] = {"boundscheck": False, "error_model": "numpy"}
# This process, and whether it has used numba's threads or is the child of one that has.
_threads_used = _forked = False


def compiled(**options: Any) -> Callable[[Any], Any]:
    """``numba.njit`` with the options of all kernels; the machine code is kept on disk.

    A package folder that cannot be written has none in a home folder that is not there either: then each process
    compiles anew. And GNU OpenMP, which numba's threads may be, ends a process that was forked from one that used them
    (workers of a DataLoader, multiprocessing on Linux): there a kernel runs on one thread, compiled again.
    """

    def decorate(function: Any) -> Any:
        try:
            kernel = njit(cache=True, **_PLAIN, **options)(function)
        except RuntimeError as error:  # "cannot cache function …: no locator available"
            _say_once(
                "kernels are compiled anew in every process, which takes about a minute: numba finds no place to keep "
                "them; set NUMBA_CACHE_DIR to a folder of your own"
            )
            logger.debug("%s", error)
            kernel = njit(**_PLAIN, **options)(function)
        return _ForkSafe(function, kernel, options) if options.get("parallel") else kernel

    return decorate


class _ForkSafe:
    """A kernel on numba's threads, and on none in a process that was forked after they were used."""

    def __init__(self, function: Any, kernel: Any, options: dict[str, Any]):
        self._function, self._kernel, self._options = function, kernel, options
        self._serial: Any = None

    def __call__(self, *arguments: Any) -> Any:
        global _threads_used
        if not _forked:
            _threads_used = True
            return self._kernel(*arguments)
        if self._serial is None:
            _say_once("a process forked after kernels ran on threads: here they are compiled again, for one thread")
            # Not cached: numba would take the threaded machine code of the same function for it.
            self._serial = njit(**_PLAIN, **{**self._options, "parallel": False})(self._function)
        return self._serial(*arguments)


@lru_cache
def _say_once(what: str) -> None:
    logger.warning("%s", what)


def forked() -> bool:
    """Whether this process was forked from one whose threads it lacks."""
    return _forked


def _after_fork() -> None:
    global _forked
    _forked = _threads_used


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
