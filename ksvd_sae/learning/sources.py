"""What training reads: tensors, activation shards, streams of batches; and how batches reach the device.

A source on another device than the training, on disk or behind a function is read by a thread of its own while the
batch before is learned. Samples that fit are moved to a GPU once (``kept_on_device``): there a pass takes less time
than to read the samples again.
"""

import mmap
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from functools import cached_property
from os import PathLike
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ksvd_sae.arguments import shown
from ksvd_sae.errors import ActivationError, InputTypeError, ShapeError
from ksvd_sae.learning.checks import check_samples

# Rows that are looked at, or moved to the device, at a time.
_CHUNK_ROWS = 65_536
_JOIN_S = 10
_WHERE = "DB-KSVD"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


@runtime_checkable
class DividedSource(SampleSource, Protocol):
    """One that also reads a part of each batch alone. ``part`` gives the rows that are wanted of so many."""

    def batches(
        self, batch_samples: int, *, seed: int | None = None, part: Callable[[int], slice] | None = None
    ) -> Iterator[Tensor]: ...

    def checked(self, part: Callable[[int], slice]) -> "DividedSource": ...


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
        samples_ND = dense_tensor(samples_ND, _WHERE)
        _check_samples_shape(tuple(samples_ND.shape), samples_ND.dtype, samples_ND.is_floating_point())
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
            self._centre_D = torch.as_tensor(sums_D, device=self.samples_ND.device) / max(1, self.n_samples)
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
        return _permutation(self.n_samples, seed)

    def batches(self, batch_samples: int, *, seed: int | None = None) -> Generator[Tensor, None, None]:
        order = None if seed is None else self.order(seed).to(self.samples_ND.device)
        for start in range(0, self.n_samples, batch_samples):
            stop = start + batch_samples
            yield self.samples_ND[start:stop] if order is None else self.samples_ND[order[start:stop]]


def _chunks(samples_ND: Tensor) -> Iterator[Tensor]:
    return (samples_ND[start : start + _CHUNK_ROWS] for start in range(0, len(samples_ND), _CHUNK_ROWS))


def _check_samples_shape(shape: tuple[int, ...], dtype: Any, is_floating: bool) -> None:
    if len(shape) != 2 or not is_floating:
        raise ShapeError(
            f"{_WHERE}: samples must be a floating-point (N, D) tensor", got=f"{dtype} {shape}", cure=reshaped(shape)
        )
    if shape[1] == 0:
        raise ShapeError(f"{_WHERE}: 0 feature(s) (shape={shape}) while a minimum of 1 is required.")


def reshaped(shape: tuple[int, ...]) -> str | None:
    """How to make rows of what has another number of dimensions: positions are flattened by the caller alone."""
    if len(shape) == 1:
        return "Reshape your data: x[None] is one sample of x's features"
    return f"x.reshape(-1, {shape[-1]}): every position a sample" if len(shape) > 2 else None


def _permutation(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed), device="cpu")


class MappedSource:
    """An array that lies in a file (numpy's memory maps) as a SampleSource: read as far as it is asked for.

    The batches are those of a TensorSource of the same numbers, bit for bit.
    """

    shuffled_here = True

    def __init__(self, samples_ND: "np.ndarray[Any, Any]"):
        self._array_ND = samples_ND
        kind = samples_ND.dtype.kind
        # Only to say what is wrong with the type of the numbers, as of other arrays.
        _from_array(samples_ND[:0])
        _check_samples_shape(samples_ND.shape, samples_ND.dtype, kind in "fiu")
        self.n_samples, self.d_in = samples_ND.shape
        for number, chunk_ND in enumerate(self.chunks()):
            check_samples(chunk_ND, _WHERE, first_row=number * _CHUNK_ROWS)

    @classmethod
    def of(cls, samples: Any) -> "MappedSource | None":
        """Of an array that lies in a file; None of anything else."""
        mapped = isinstance(samples, np.ndarray) and samples.dtype != object and _is_mapped(samples)
        return cls(samples) if mapped else None

    @cached_property
    def centre_D(self) -> Tensor:
        sums_D = sum(chunk_ND.double().sum(dim=0) for chunk_ND in self.chunks())
        return torch.as_tensor(sums_D, device="cpu") / max(1, self.n_samples)

    def chunks(self) -> Iterator[Tensor]:
        """All samples in their order, some at a time; of none at all an empty matrix."""
        return self.batches(_CHUNK_ROWS) if self.n_samples else iter([self.whole()])

    def whole(self) -> Tensor:
        """All samples, in memory."""
        return self._rows(slice(None))

    def order(self, seed: int) -> Tensor:
        """As ``TensorSource.order``."""
        return _permutation(self.n_samples, seed)

    def batches(self, batch_samples: int, *, seed: int | None = None) -> Generator[Tensor, None, None]:
        order = None if seed is None else self.order(seed).numpy()
        for start in range(0, self.n_samples, batch_samples):
            rows = slice(start, start + batch_samples)
            yield self._rows(rows if order is None else order[rows])

    def _rows(self, index: Any) -> Tensor:
        # A copy of these rows: a batch must not be read from the file twice, nor be one that may not be written to.
        return _from_array(np.array(self._array_ND[index], order="C", subok=False))


def _is_mapped(array: Any) -> bool:
    """Whether an array's memory is a file's."""
    while array is not None and not isinstance(array, np.memmap | mmap.mmap):
        array = getattr(array, "base", None)
    return array is not None


class StreamSource:
    """Batches as they come, of unknown number: an iterable, or a function that gives an iterator for each pass.

    A batch is a tensor, an array, a frame or a list of rows, or a list or dict that holds one of them and nothing else.
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
        batches = self._batches() if callable(self._batches) else self._batches
        if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
            raise InputTypeError(
                f"{_WHERE}: the function gave no batches", got=shown(batches), limit="an iterable of (B, D) batches"
            )
        for number, batch in enumerate(batches):
            where = f"{_WHERE}, batch {number} of the stream"
            tensor = batch if isinstance(batch, Tensor) else _from_array(unpacked(batch, where), where)
            tensor = dense_tensor(tensor, where)
            if tensor.ndim != 2:
                raise ShapeError(
                    f"{where}: it is no matrix of samples",
                    got=f"{tensor.dtype} {tuple(tensor.shape)}",
                    limit="(B, D)",
                    cause="a stream of single samples" if tensor.ndim < 2 else "activations by context and position",
                    cure=reshaped(tuple(tensor.shape)) if tensor.ndim > 2 else "batches of several samples",
                )
            if len(tensor):
                n_batches += 1
                yield tensor
        if n_batches == 0:
            raise ActivationError(
                "DB-KSVD: the stream gave no samples",
                cause="an iterator that was used before, or a filter that lets nothing through",
                cure="pass a function that makes a fresh iterator",
            )


def unpacked(batch: Any, where: str) -> Any:
    """The samples of a batch as loaders give it: of (x,), [x] and {"name": x}; what else it is comes back as it is.

    Raises: InputTypeError where there is more than the samples in it, or a row of a data set.
    """
    _refuse_sparse(batch, where)
    if isinstance(batch, Mapping):
        named = {str(name): value for name, value in batch.items()}
        if len(named) == 1 and _ndim(value := next(iter(named.values()))) >= 2:
            return value
        one_row = all(_ndim(value) < 2 for value in named.values())
        raise InputTypeError(
            f"{where}: a dict that is not one matrix of samples",
            got=", ".join(f"{name!r}: {_outline(value)}" for name, value in list(named.items())[:6]) or "no keys",
            limit="one key, its value (B, D)",
            cause="a single row of a data set" if one_row else "a loader that gives more than the samples",
            cure='batches of the column alone: lambda: (batch["x"] for batch in loader)',
        )
    if isinstance(batch, list | tuple) and any(getattr(part, "ndim", 0) >= 2 for part in batch):
        if len(batch) == 1:
            return batch[0]
        raise InputTypeError(
            f"{where}: a {type(batch).__name__} of {len(batch)} parts",
            got=", ".join(map(_outline, batch[:6])),
            limit="one matrix of samples, (B, D)",
            cause="a loader that gives samples with their labels",
            cure="batches of the samples alone: lambda: (x for x, _ in loader)",
        )
    return batch


def _refuse_sparse(samples: Any, where: str) -> None:
    """SciPy's, of which some are dicts, too."""
    if hasattr(type(samples), "toarray"):
        raise InputTypeError(
            f"{where}: sparse samples are not supported", got=type(samples).__name__, cure="samples.toarray()"
        )


def _ndim(value: Any) -> int:
    """Dimensions of an array, or of lists in lists."""
    if isinstance(value, list | tuple):
        return 1 + (_ndim(value[0]) if value else 0)
    return int(getattr(value, "ndim", 0))


def _outline(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__} {tuple(shape)}" if shape is not None else shown(value)


def dense_tensor(samples: Tensor, where: str) -> Tensor:
    """The tensor, without its gradient.

    Raises: InputTypeError unless it is dense, in memory and of real numbers that torch can compute with.
    """
    what = cure = None
    if samples.is_nested:
        what, cure = "nested", "torch.cat(list(samples.unbind())): the rows of all parts below each other"
    elif samples.layout != torch.strided:
        what, cure = "sparse", "samples.to_dense()"
    elif samples.is_quantized:
        what, cure = "quantized", "samples.dequantize()"
    elif samples.device.type == "meta":
        what, cure = "meta", "samples that are loaded: a meta tensor has a shape and no numbers"
    elif samples.is_complex():
        what, cure = "complex", "torch.view_as_real(samples).flatten(1), or samples.abs()"
    elif samples.is_floating_point() and samples.dtype not in _FLOATS:
        what, cure = str(samples.dtype).removeprefix("torch."), "samples.float()"
    if what is None:
        return samples.detach()
    got = f"{samples.dtype}, {samples.layout}" + ("" if samples.is_nested else f", {tuple(samples.shape)}")
    raise InputTypeError(f"{where}: {what} samples are not supported", got=got, cure=cure)


Samples = Tensor | SampleSource | Iterable[Any] | Callable[[], Iterable[Any]]


def as_source(samples: Any) -> SampleSource | StreamSource:
    """What ``fit`` was given, as a source.

    A tensor, numpy array, data frame or list of rows is the samples, and so is what a dict of one of them holds; an
    object with ``batches`` is a source; a function, an iterator, or a collection of 2-D batches is a stream.

    Raises: InputTypeError, ShapeError, ActivationError.
    """
    if isinstance(samples, Tensor):
        return TensorSource(samples)
    if isinstance(samples, SampleSource):
        return samples
    _refuse_sparse(samples, _WHERE)
    if isinstance(samples, Mapping):
        return as_source(unpacked(samples, _WHERE))
    if (mapped := MappedSource.of(samples)) is not None:
        return mapped
    if isinstance(samples, np.ndarray) or hasattr(samples, "__array__"):
        return TensorSource(_from_array(samples))
    if isinstance(samples, list | tuple) and not (len(samples) and _holds_batches(samples)):
        return TensorSource(_from_array(samples))
    if not isinstance(samples, str | bytes | PathLike) and (callable(samples) or isinstance(samples, Iterable)):
        return StreamSource(samples)
    is_path = isinstance(samples, str | PathLike)
    raise InputTypeError(
        f"{_WHERE}: not samples",
        got=shown(samples),
        limit="a (N, D) tensor or array, a SampleSource, an iterable of (B, D) batches or a function that gives one",
        cause="a path" if is_path else None,
        cure="read it first: ActivationShards(path), or np.load(path, mmap_mode='r')"
        if is_path
        else _in_batches(samples),
    )


def _holds_batches(samples: "list[Any] | tuple[Any, ...]") -> bool:
    first = samples[0]
    in_parts = isinstance(first, list | tuple) and any(getattr(part, "ndim", 0) == 2 for part in first)
    return in_parts or getattr(first, "ndim", 0) == 2 or isinstance(first, Mapping)


def _in_batches(samples: Any) -> str | None:
    data_set = hasattr(samples, "__getitem__") and hasattr(samples, "__len__")
    return "a DataLoader of it, or all its samples as one tensor" if data_set else None


def as_tensor(samples: Any) -> Tensor:
    """Samples that are all there, as ``fit`` would see them.

    Raises: ShapeError if they are a source or a stream, and as ``as_source``.
    """
    source = as_source(samples)
    if isinstance(source, MappedSource):
        return source.whole()
    if not isinstance(source, TensorSource):
        raise ShapeError(f"{_WHERE}: not an array of samples", got=type(samples).__name__)
    return source.samples_ND


def as_batch(samples: Any, where: str = "DB-KSVD") -> Tensor:
    """One batch, as loaders give it and ``encode`` takes it; its width and numbers are the caller's to look at.

    Raises: as ``as_tensor``.
    """
    samples = unpacked(samples, where)
    return dense_tensor(samples, where) if isinstance(samples, Tensor) else as_tensor(samples)


def _from_array(samples: Any, where: str = "DB-KSVD") -> Tensor:
    """A tensor of an array of numbers; integers become float32, as lists of rows often are integers."""
    if isinstance(samples, np.ma.MaskedArray) and bool(np.any(samples.mask)):
        raise InputTypeError(
            f"{where}: samples with a mask", got=f"{int(samples.mask.sum())} masked numbers", cure="samples.filled(0)"
        )
    try:
        array = np.asarray(samples)
    except (TypeError, ValueError) as error:
        raise InputTypeError(f"{where}: samples are not an array", got=shown(samples), cause=str(error)) from error
    if array.dtype.kind == "O":
        array = _of_objects(array, getattr(samples, "columns", None), where)
    if array.dtype.kind not in "fiu":
        what = "Complex data not supported" if array.dtype.kind == "c" else "samples are not numbers"
        raise InputTypeError(f"{where}: {what}", got=f"dtype {array.dtype}")
    if array.dtype not in (np.float16, np.float32, np.float64):
        array = array.astype(np.float32)
    # torch wants memory in order that it may write to, although nothing here writes.
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _of_objects(array: "np.ndarray[Any, Any]", columns: Any, where: str) -> "np.ndarray[Any, Any]":
    """Numbers of an array of objects; None, and what pandas has for a missing number, become NaN."""
    with suppress(TypeError, ValueError):
        return array.astype(np.float64)
    if array.ndim == 0:
        raise InputTypeError(f"{where}: samples are not numbers", got=shown(array.item()))
    numbers = np.empty(array.shape)
    for index, value in np.ndenumerate(array):
        try:
            # By name: pandas need not be there.
            numbers[index] = np.nan if type(value).__name__ in ("NAType", "NaTType") else float(value)
        except (TypeError, ValueError) as error:
            column = f", column {list(columns)[index[-1]]!r}" if columns is not None else ""
            raise InputTypeError(
                f"{where}: samples are not numbers",
                got=f"{shown(value)} in row {index[0]}{column}",
                cause=str(error),
                cure="leave out columns of text, or make numbers of them",
            ) from error
    return numbers


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
