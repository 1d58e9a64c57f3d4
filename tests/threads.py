"""Processes of a run as threads of this one, with a store in memory: none is started."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch.distributed as dist

from ksvd_sae.together import Together

T = TypeVar("T")


class OtherFailedError(Exception):
    """In place of the signal that a real process gets when another one failed."""


class _Threaded(Together):
    def __init__(self, rank: int, size: int, store: Any, failed: threading.Event):
        super().__init__(rank, size)
        self._store, self._failed = store, failed

    def _until(self, done: Callable[[Any], bool], at_most_s: float = float("inf")) -> None:
        def done_or_failed(store: Any) -> bool:
            if self._failed.is_set():
                raise OtherFailedError
            return done(store)

        super()._until(done_or_failed, at_most_s)


def in_ranks(size: int, do: Callable[[Together], T]) -> list[T]:
    """What each rank's ``do`` gives; raises what the first that fails raises."""
    store, failed = dist.HashStore(), threading.Event()  # type: ignore[attr-defined]

    def one(rank: int) -> T:
        try:
            return do(_Threaded(rank, size, store, failed))
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(size) as pool:
        ranks = [pool.submit(one, rank) for rank in range(size)]
        errors = [error for rank in ranks if (error := rank.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, OtherFailedError)):
        raise error
    return [rank.result() for rank in ranks]
