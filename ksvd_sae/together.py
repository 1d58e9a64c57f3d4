"""The processes of one run, as torchrun starts them: what they tell each other, and what becomes of all if one ends.

Stages meet at files, in a folder that all of them see, so there is little to tell: that all are there (``wait``), what
rank 0 found (``first``), who does what (``share``). That goes through the store by which torchrun's processes find each
other, where one that is busy for hours keeps nobody's connection waiting; only the sums of learning are
torch.distributed's (ranks.py).

Beside each process runs a small one, forked before there is much to fork, which no kernel that holds Python's lock can
stop. It says every second that it is there, and ends its process if another one failed, was killed, or has not been
heard of for ``_SILENT_S``.
"""

import json
import logging
import os
import platform
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from ksvd_sae.device import resolve_device
from ksvd_sae.errors import ConfigError, KsvdSaeError, ProcessError
from ksvd_sae.ranks import Ranks
from ksvd_sae.store import sole_writer

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

logger = logging.getLogger(__name__)
T = TypeVar("T")
# How long processes wait for the others to start, and how long one may be in a sum before the others.
_START, _IN_A_SUM = timedelta(minutes=10), timedelta(minutes=30)
_BEAT_S, _SILENT_S = 1.0, 45.0
# Rank 0 may hold the store: the others are to hear from it what failed before it ends.
_HEARD_S = 3.0
# A process that is told to end may save its training first.
_GRACE_S = 10.0
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FAILED = "failed"
_STORE = "the store of all processes, which torchrun or rank 0 holds,"


@dataclass(frozen=True)
class Task:
    """What one process is to do. after: the task, by its number, that must be done before; None: none."""

    do: Callable[[], None]
    after: int | None = None


class Together:
    """This process' place among those of its run. Each calls the same methods in the same order, but in a Task.

    rank: from 0. size: how many there are; with one, nothing is sent. local_rank: of those on this machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0):
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._store: Store | None = None
        self._calls = 0

    @classmethod
    def of_torchrun(cls) -> "Together":
        """By the environment that torchrun gives each process; alone where there is none."""
        given = os.environ.get("WORLD_SIZE", "1")
        if given == "1":
            return cls()
        cure = "start them by torchrun; or unset WORLD_SIZE"
        if missing := [name for name in _ENVIRONMENT if not os.environ.get(name)]:
            raise ConfigError(
                f"several processes: WORLD_SIZE is {given!r}, but there is no {', '.join(missing)}", cure=cure
            )
        numbers = {
            name: os.environ.get(name, os.environ["RANK"])
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        }
        odd = [f"{name} is {value!r}" for name, value in numbers.items() if not value.isascii() or not value.isdigit()]
        if odd or not int(numbers["RANK"]) < int(given):
            raise ConfigError(
                f"several processes: {', '.join(odd) or 'RANK is not below WORLD_SIZE'}",
                got=", ".join(f"{name}={value}" for name, value in numbers.items()),
                limit="whole numbers, RANK from 0 to WORLD_SIZE - 1",
                cure=cure,
            )
        return cls(*(int(numbers[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which says what happens and writes what is one for all."""
        return self.rank == 0

    def device(self, wanted: str) -> torch.device:
        """A GPU of its own for each process of a machine; else as ``resolve_device``."""
        device = resolve_device(wanted)
        if self.size == 1 or device.type != "cuda":
            return device
        if device.index is not None:
            raise ConfigError(
                f"device: {wanted!r} is one GPU, for {self.size} processes",
                cure="device: auto or cuda, which is the GPU of each process' LOCAL_RANK",
            )
        return resolve_device(f"cuda:{self.local_rank}")

    # ------------------------------------------------------------ beginning and end

    @contextmanager
    def joined(self) -> Iterator[None]:
        """All processes are there; whoever ends in an error ends the others.

        Raises: ProcessError if they do not find each other.
        """
        if self.size == 1:
            yield
            return
        watcher = _fork_watcher(self.rank, self.size)
        try:
            self._store = _connected(may_hold=self.is_first)
            self._store.compare_set(_FAILED, "", "")
            # The watcher's first, or it may die before anybody has heard of it.
            self._store.add(_beat(self.rank), 1)
            # Its own second: a watcher that has no connection yet does not hear of the store's end.
            self._until(lambda store: store.add(_beat(self.rank), 0) > 1)
            self.wait()
            yield
            self._leave(watcher)
        except BaseException as error:
            _end(watcher)
            if self._store is not None:
                # In a thread: a store that is gone without a word keeps it for long.
                saying = Thread(target=self._say_who_failed, args=(self._store, error), daemon=True)
                saying.start()
                saying.join(_GRACE_S)
            raise
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    def _leave(self, watcher: int) -> None:
        """Rank 0, which may hold the store, last."""
        self.wait()
        _end(watcher)
        assert self._store is not None
        if not self.is_first:
            self._store.add("left", 1)
        else:
            self._until(lambda store: store.add("left", 0) == self.size - 1, _GRACE_S)

    def _say_who_failed(self, store: "Store", error: BaseException) -> None:
        """To the others that it is this process; or here which one, if sums failed because it is gone."""
        if not isinstance(error, ProcessError):
            _say_failed(store, _here(self.rank), _in_a_line(error))
        with suppress(RuntimeError):
            self._until(lambda store: bool(store.get(_FAILED)), 3 * _BEAT_S)
            if isinstance(error, ProcessError):
                logger.error("what failed is %s", store.get(_FAILED).decode() or "not known")
        time.sleep(_HEARD_S)

    def ranks(self, device: torch.device) -> Ranks:
        """These processes as they learn together, by sums on the device."""
        if self._store is None:
            return Ranks()
        if not dist.is_initialized():
            self._begin_sums(self._store, device)
        return Ranks.of_process_group()

    def _begin_sums(self, store: "Store", device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("sums", store),  # type: ignore[attr-defined]
            rank=self.rank,
            world_size=self.size,
            timeout=_IN_A_SUM,
        )

    # ------------------------------------------------------------ in step

    def wait(self) -> None:
        """Until all processes are here."""
        if self._store is None:
            return
        key = self._key("wait")
        self._store.add(key, 1)
        self._until(lambda store: store.add(key, 0) == self.size)

    def first(self, do: Callable[[], T]) -> T:
        """What ``do`` gives rank 0, in all processes; through JSON."""
        if self._store is None:
            return do()
        key = self._key("first")
        if self.is_first:
            self._store.set(key, json.dumps(do()))
        self._until(lambda store: store.check([key]))
        found: T = json.loads(self._store.get(key))
        return found

    def all(self, own: bool) -> bool:
        """Whether it is so in every process."""
        if self._store is None:
            return own
        key = self._key("all")
        self._store.add(key, int(own))
        self.wait()
        return self._store.add(key, 0) == self.size

    @contextmanager
    def writing(self, folder: Path, what: str) -> Iterator[None]:
        """These processes write the folder together, and no others: see ``sole_writer``, which rank 0 is for all.

        All are done with it when the block ends.
        """
        with sole_writer(folder, what) if self.is_first else nullcontext():
            self.wait()
            yield
            self.wait()

    def share(self, tasks: Sequence[Task]) -> None:
        """Do each task once, in one of the processes: whoever is free takes the next that can be begun.

        Returns when this process finds none to take; others may still be at theirs.
        """
        if self._store is None:
            for task in tasks:
                task.do()
            return
        key, left = self._key("share"), list(range(len(tasks)))
        while left:
            ready = (i for i in left if (j := tasks[i].after) is None or self._store.add(f"{key}/done/{j}", 0))
            if (number := next(ready, None)) is None:
                time.sleep(0.2)
                continue
            left.remove(number)
            if self._store.add(f"{key}/taken/{number}", 1) == 1:
                tasks[number].do()
                self._store.add(f"{key}/done/{number}", 1)

    def _key(self, what: str) -> str:
        self._calls += 1
        return f"{what}/{self._calls}"

    def _until(self, done: Callable[["Store"], bool], at_most_s: float = float("inf")) -> None:
        assert self._store is not None
        pause_s, end = 0.002, time.monotonic() + at_most_s
        while not done(self._store) and time.monotonic() < end:
            time.sleep(pause_s)
            pause_s = min(0.2, 1.5 * pause_s)


ALONE = Together()


# ---------------------------------------------------------------- the store


def _connected(may_hold: bool) -> "Store":
    """The store of this run's processes: torchrun's, or rank 0's own."""
    held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address, port, is_master=may_hold and not held, timeout=_START, wait_for_workers=False
        )
    except RuntimeError as error:
        raise ProcessError(
            f"several processes: no store at {address}:{port}",
            got=str(error).splitlines()[0][:200],
            cause="rank 0 is not there, or another program has the port",
            cure="start all processes at once, by torchrun",
        ) from error
    # torchrun may start them again, with the same store.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"ksvd_sae/{start}", store)  # type: ignore[attr-defined]


def _say_failed(store: "Store", who: str, what: str) -> None:
    """Whoever is first is what failed; the others follow from it."""
    with suppress(RuntimeError):
        store.compare_set(_FAILED, "", f"{who}: {what}")


def _beat(rank: int) -> str:
    return f"beat/{rank}"


def _here(rank: int) -> str:
    return f"rank {rank} on {platform.node()}"


def _in_a_line(error: BaseException) -> str:
    if isinstance(error, KsvdSaeError):
        return f"{type(error).__name__}: {error.what}"
    return "stopped" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"


# ---------------------------------------------------------------- the watcher


def _fork_watcher(rank: int, size: int) -> int:
    """The process that looks whether all are there, beside this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    with warnings.catch_warnings():
        # That threads do not survive it: the new process has no use for them.
        warnings.simplefilter("ignore", DeprecationWarning)
        watcher = os.fork()
    if watcher:
        return watcher
    try:
        # Ctrl-C is for the process that it watches.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _watch(parent, rank, size)
    finally:
        os._exit(0)


def _end(watcher: int) -> None:
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(watcher, signal.SIGKILL)
        os.waitpid(watcher, 0)


def _watch(parent: int, rank: int, size: int) -> None:
    """Ends the parent if all is not well.

    Whoever asks a store that is gone without a word waits for long: a thread asks, and this one sees to it that it is
    answered. Both count what they wait themselves, as all processes may be stopped for a while and go on.
    """
    asking = _Asking(parent, rank, size)
    thread = Thread(target=asking.run, daemon=True)
    thread.start()
    answers, silent_s = 0, 0.0
    while not (failed := asking.failed) and os.getppid() == parent:
        time.sleep(_BEAT_S / 4)
        silent_s = silent_s + _BEAT_S / 4 if asking.answers == answers else 0.0
        answers = asking.answers
        # The first answer may be as long in coming as the store is, which has its own end.
        if answers and silent_s > _SILENT_S:
            failed = f"{_STORE} does not answer for {_SILENT_S:.0f} s; its machine may be gone"
            break
    if os.getppid() != parent:
        # The thread says so to the others.
        thread.join(_GRACE_S)
        return
    print(f"rank {rank}: stopping, as another process failed: {failed}", file=sys.stderr, flush=True)
    if rank == 0:
        time.sleep(_HEARD_S)
    os.kill(parent, signal.SIGTERM)
    time.sleep(_GRACE_S)
    if os.getppid() == parent:
        os.kill(parent, signal.SIGKILL)


class _Asking:
    """The watcher's thread. answers: how many it had. failed: what did; "" while all is well."""

    def __init__(self, parent: int, rank: int, size: int):
        self._parent, self._rank, self._size = parent, rank, size
        self.answers, self.failed = 0, ""

    def run(self) -> None:
        try:
            self._ask()
        except (RuntimeError, ProcessError) as error:
            self.failed = f"{_STORE} is gone ({(str(error).splitlines() or [''])[0][:100]})"
        except BaseException as error:
            self.failed = f"its watcher ended by {type(error).__name__}: {error}"
            raise

    def _ask(self) -> None:
        store = _connected(may_hold=False)
        beats = [_beat(other) for other in range(self._size)]
        heard, silent_s = [b""] * self._size, [0.0] * self._size
        while not self.failed:
            if os.getppid() != self._parent:
                _say_failed(store, _here(self._rank), "it was killed, or ended without a word")
                return
            store.add(beats[self._rank], 1)
            self.answers += 1
            for other, beat in enumerate(beats):
                count = store.get(beat) if store.check([beat]) else b""
                silent_s[other] = silent_s[other] + _BEAT_S if count == heard[other] and count else 0.0
                heard[other] = count
                if silent_s[other] > _SILENT_S:
                    _say_failed(store, f"rank {other}", f"not heard of for {_SILENT_S:.0f} s; its machine may be gone")
            self.failed = store.get(_FAILED).decode() if store.check([_FAILED]) else ""
            time.sleep(_BEAT_S)
