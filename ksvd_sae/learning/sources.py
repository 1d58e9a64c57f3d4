"""What training reads: tensors, activation shards, streams of batches; and how batches reach the device.

A source on another device than the training, on disk or behind a function is read by a thread of its own while the
batch before is learned. Samples that fit are moved to a GPU once (``kept_on_device``): there a pass takes less time
than to read the samples again.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ksvd_sae.errors import ActivationError, ShapeError
from ksvd_sae.learning.checks import check_samples

# Rows that are looked at, or moved to the device, at a time.
_CHUNK_ROWS = 65_536
_JOIN_S = 10


@runtime_checkable
class SampleSource(Protocol):
    """Samples of known number and mean: activation shards, or anything of this shape.

    ``batches`` gives the samples once, in batches of ``batch_samples`` (the last may be smaller); None as the seed
    is the source's own order, every seed another, the same for the same seed.
    """

    @property
    def n_samples(self) -> int: ...

    @property
    def d_in(self) -> int: ...

    @property
    def centre_D(self) -> Tensor: ...

    def batches(self, batch_samples: int, *, seed: int | None = None) -> Iterator[Tensor]: ...


class TensorSource:
    """A tensor in memory as a SampleSource; passes with a seed are shuffled.

    Args:
        centre_D: the mean, where it is known already.
        order: the order of the samples under a seed, where another source's is to be kept.
    """

    def __init__(
        self,
        samples_ND: Tensor,
        centre_D: Tensor | None = None,
        order: Callable[[int], Tensor] | None = None,
    ):
        if samples_ND.ndim != 2 or not samples_ND.is_floating_point():
            raise ShapeError(
                "DB-KSVD: samples must be a floating-point (N, D) tensor",
                got=f"{samples_ND.dtype} {tuple(samples_ND.shape)}",
                cure="Reshape your data: x[None] is one sample of x's features" if samples_ND.ndim == 1 else None,
            )
        if samples_ND.shape[1] == 0:
            shape = tuple(samples_ND.shape)
            raise ShapeError(f"DB-KSVD: 0 feature(s) (shape={shape}) while a minimum of 1 is required.")
        samples_ND = samples_ND.detach()
        # In chunks: what is computed here is as large as its input.
        if not all(bool(torch.isfinite(chunk_ND).all()) for chunk_ND in _chunks(samples_ND)):
            check_samples(samples_ND, "DB-KSVD")
        self.samples_ND = samples_ND
        self.n_samples, self.d_in = samples_ND.shape
        self._centre_D, self._order = centre_D, order or self._permuted
        self.shuffled_here = order is None
        self._prepared: dict[int, Future[Tensor]] = {}

    @property
    def centre_D(self) -> Tensor:
        if self._centre_D is None:
            sums_D = sum(chunk_ND.double().sum(dim=0) for chunk_ND in _chunks(self.samples_ND))
            self._centre_D = torch.as_tensor(sums_D) / max(1, self.n_samples)
        return self._centre_D

    def order(self, seed: int) -> Tensor:
        """The samples' indices in the order in which ``batches`` gives them under this seed."""
        prepared = self._prepared.pop(seed, None)
        return self._order(seed) if prepared is None else prepared.result()

    def prepare(self, seed: int) -> None:
        """Begin to make that order: of millions of samples it takes as long as some batches on a GPU."""
        future = self._prepared[seed] = Future()

        def make() -> None:
            try:
                future.set_result(self._order(seed))
            except BaseException as error:  # whatever it is, it belongs to whoever asks for the order
                future.set_exception(error)

        threading.Thread(target=make, name="ksvd_sae-order", daemon=True).start()

    def _permuted(self, seed: int) -> Tensor:
        return torch.randperm(self.n_samples, generator=torch.Generator().manual_seed(seed))

    def batches(self, batch_samples: int, *, seed: int | None = None) -> Generator[Tensor, None, None]:
        order = None if seed is None else self.order(seed).to(self.samples_ND.device)
        for start in range(0, self.n_samples, batch_samples):
            stop = start + batch_samples
            yield self.samples_ND[start:stop] if order is None else self.samples_ND[order[start:stop]]


def _chunks(samples_ND: Tensor) -> Iterator[Tensor]:
    return (samples_ND[start : start + _CHUNK_ROWS] for start in range(0, len(samples_ND), _CHUNK_ROWS))


class StreamSource:
    """Batches as they come, of unknown number: an iterable, or a function that gives an iterator for each pass.

    Batches may differ in size; empty ones are left out. An iterator that is spent after one pass is an error on the
    second.
    """

    def __init__(self, batches: "Iterable[Any] | Callable[[], Iterable[Any]]"):
        self._batches = batches

    @property
    def one_pass_only(self) -> bool:
        return not callable(self._batches) and isinstance(self._batches, Iterator)

    def batches(self) -> Generator[Tensor, None, None]:
        n_batches = 0
        for batch in self._batches() if callable(self._batches) else self._batches:
            tensor = batch if isinstance(batch, Tensor) else _from_array(batch)
            if len(tensor):
                n_batches += 1
                yield tensor
        if n_batches == 0:
            raise ActivationError(
                "DB-KSVD: the stream gave no samples",
                cause="an iterator that was used before, or a filter that lets nothing through",
                cure="pass a function that makes a fresh iterator",
            )


Samples = Tensor | SampleSource | Iterable[Any] | Callable[[], Iterable[Any]]


def as_source(samples: Any) -> SampleSource | StreamSource:
    """What ``fit`` was given, as a source.

    A tensor, numpy array, data frame or list of rows is the samples; an object with ``batches`` is a source; a
    function, an iterator, or a collection of 2-D batches is a stream.
    """
    if isinstance(samples, Tensor):
        return TensorSource(samples)
    if isinstance(samples, SampleSource):
        return samples
    if hasattr(samples, "toarray"):
        raise ShapeError(
            "DB-KSVD: sparse samples are not supported", got=type(samples).__name__, cure="samples.toarray()"
        )
    if isinstance(samples, np.ndarray) or hasattr(samples, "__array__"):
        return TensorSource(_from_array(samples))
    if isinstance(samples, list | tuple) and not (len(samples) and getattr(samples[0], "ndim", 0) == 2):
        return TensorSource(_from_array(samples))
    if callable(samples) or isinstance(samples, Iterable):
        return StreamSource(samples)
    raise ShapeError(
        "DB-KSVD: not samples",
        got=type(samples).__name__,
        limit="a (N, D) tensor or array, a SampleSource, an iterable of (B, D) batches or a function that gives one",
    )


def as_tensor(samples: Any) -> Tensor:
    """Samples that are all there, as ``fit`` would see them.

    Raises: ShapeError if they are a source or a stream, and as ``as_source``.
    """
    source = as_source(samples)
    if not isinstance(source, TensorSource):
        raise ShapeError("DB-KSVD: not an array of samples", got=type(samples).__name__)
    return source.samples_ND


def _from_array(samples: Any) -> Tensor:
    """A tensor of an array of numbers; integers become float32, as lists of rows often are integers."""
    array = np.asarray(samples)
    if array.dtype.kind == "O":
        array = array.astype(np.float64)  # numpy says what is no number
    if array.dtype.kind not in "fiu":
        what = "Complex data not supported" if array.dtype.kind == "c" else "samples are not numbers"
        raise ShapeError(f"DB-KSVD: {what}", got=f"dtype {array.dtype}")
    if array.dtype not in (np.float16, np.float32, np.float64):
        array = array.astype(np.float32)
    # torch wants memory in order that it may write to, although nothing here writes.
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def kept_on_device(source: SampleSource, device: torch.device, keep: bool | None) -> SampleSource:
    """The source, or its samples as one tensor on the device.

    Args:
        keep: None keeps them on a CUDA device if they take at most half of its free memory (what a batch needs comes on
            top), and leaves them where they are on the CPU. True keeps them anywhere, False nowhere.

    Whether they are kept changes no batch if the source is a tensor or has ``order(seed)``, which tells its order of
    the samples under a seed; otherwise passes after the first are shuffled in another way.
    """
    if isinstance(source, TensorSource):
        if same_device(source.samples_ND.device, device):
            return source
        n_bytes = source.samples_ND.numel() * min(source.samples_ND.element_size(), 4)
    else:
        n_bytes = source.n_samples * source.d_in * 4
    if keep is None:
        keep = device.type == "cuda" and 2 * n_bytes <= torch.cuda.mem_get_info(device)[0]
    if not keep:
        return source
    kept_ND: Tensor | None = None
    start = 0
    for batch_BD in prefetched(source.batches(_CHUNK_ROWS), device):
        if kept_ND is None:
            kept_ND = torch.empty(source.n_samples, source.d_in, dtype=batch_BD.dtype, device=device)
        kept_ND[start : start + len(batch_BD)] = batch_BD
        start += len(batch_BD)
    if kept_ND is None or start != source.n_samples:
        raise ShapeError(
            "DB-KSVD: the source gave another number of samples than it says",
            got=start,
            limit=source.n_samples,
        )
    return TensorSource(kept_ND, source.centre_D, getattr(source, "order", None))


def same_device(one: torch.device, other: torch.device) -> bool:
    """Whether two names are of one device: 'cuda' is any GPU, as only one is used."""
    return one.type == other.type and (None in (one.index, other.index) or one.index == other.index)


def on_device(batch_BD: Tensor, device: torch.device) -> Tensor:
    """A batch where training happens, in float32; 16-bit ones stay so until they are centred.

    Anything that is no floating-point tensor is left alone: training says what is wrong with it.
    """
    batch_BD = batch_BD.detach()
    if batch_BD.dtype == torch.float64:
        batch_BD = batch_BD.float()
    if device.type == "cuda" and batch_BD.device.type == "cpu":
        return batch_BD.pin_memory().to(device, non_blocking=True)
    return batch_BD.to(device)


def prefetched(batches: Iterator[Tensor], device: torch.device, *, ahead: int = 2) -> Generator[Tensor, None, None]:
    """The batches, on the device, read by a thread while the caller works; in order.

    Args:
        ahead: batches that may wait (so ahead + 2 are in memory: one being read, one in use).

    What the source raises comes up in the caller with the source's traceback. The thread ends with the source, with an
    error, or when the caller stops asking.
    """
    waiting: queue.Queue[tuple[Tensor | None, BaseException | None]] = queue.Queue(maxsize=ahead)
    stopped = threading.Event()

    def put(item: tuple[Tensor | None, BaseException | None]) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                waiting.put(item, timeout=0.1)
                return

    def read() -> None:
        # Copies to a GPU on a stream of their own, so that they overlap with the work on the batch before.
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        try:
            for batch_BD in batches:
                if stream is not None:
                    # A source that makes its batches on the GPU makes them on this thread's stream.
                    stream.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(stream) if stream is not None else nullcontext():
                    moved_BD = on_device(batch_BD, device)
                if stream is not None:
                    stream.synchronize()
                put((moved_BD, None))
                if stopped.is_set():
                    break
            put((None, None))
        except BaseException as error:  # whatever it is, it belongs to the caller
            put((None, error))
        finally:
            if isinstance(batches, Generator):
                batches.close()

    reader = threading.Thread(target=read, name="ksvd_sae-prefetch", daemon=True)
    reader.start()
    try:
        while True:
            batch_BD, error = waiting.get()
            if error is not None:
                raise error
            if batch_BD is None:
                return
            if device.type == "cuda":
                # Made on the reader's stream: its memory must not be reused before this stream is done with it.
                batch_BD.record_stream(torch.cuda.current_stream(device))
            yield batch_BD
    finally:
        stopped.set()
        # A source that hangs keeps its thread until it comes back; the caller need not hang with it.
        reader.join(timeout=_JOIN_S)
