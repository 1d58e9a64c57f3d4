"""What fit reads from, and how batches reach it."""

import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix, dok_matrix
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ksvd_sae.errors import ActivationError, InputTypeError, ShapeError
from ksvd_sae.learning import sources
from ksvd_sae.learning.dbksvd import DictionaryLearner
from ksvd_sae.learning.sources import (
    MappedSource,
    SampleSource,
    StreamSource,
    TensorSource,
    as_source,
    kept_on_device,
    prefetched,
)
from tests.learners import learner
from tests.strategies import generator, planted, shown

CPU = torch.device("cpu")
X_ND = planted(600, 12, 20, 3, noise=0.1).x_BD + 0.5


def small(**options: Any) -> DictionaryLearner:
    return learner(20, 3, **{"batch_samples": 150, **options})


def readers() -> int:
    return sum(thread.name == "ksvd_sae-prefetch" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert readers() == 0


class Shards:
    """Samples in two parts that a seed shuffles one by one, as files are."""

    n_samples, d_in = X_ND.shape
    centre_D = X_ND.double().mean(dim=0)

    def batches(self, batch_samples: int, *, seed: int | None = None) -> Iterator[Tensor]:
        order = torch.arange(600) if seed is None else self.order(seed)
        for start in range(0, 600, batch_samples):
            yield X_ND[order[start : start + batch_samples]]

    def order(self, seed: int) -> Tensor:
        draw = generator(seed)
        return torch.cat([start + torch.randperm(300, generator=draw) for start in (300, 0)])


def nested_tensor() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them a prototype
        return torch.nested.nested_tensor([X_ND[:3], X_ND[3:]])


class TestKinds:
    @pytest.mark.parametrize(
        ("samples", "kind"),
        [
            (X_ND, TensorSource),
            (X_ND.numpy(), TensorSource),
            (X_ND.double().numpy().tolist(), TensorSource),
            ([[1, 2], [3, 4]], TensorSource),
            (Shards(), Shards),
            ([X_ND, X_ND], StreamSource),
            ((X_ND.numpy(),), StreamSource),
            (iter([X_ND]), StreamSource),
            (lambda: [X_ND], StreamSource),
        ],
        ids=["tensor", "array", "rows", "integers", "source", "batches", "arrays", "iterator", "function"],
    )
    def test_recognised(self, samples: Any, kind: type) -> None:
        source = as_source(samples)
        assert type(source) is kind
        assert isinstance(source, SampleSource) == (kind is not StreamSource)

    @pytest.mark.parametrize("samples", [None, 3.0, object()], ids=shown)
    def test_nothing_of_these(self, samples: Any) -> None:
        with pytest.raises(ShapeError, match=r"(?s)not samples.*limit: a \(N, D\) tensor"):
            as_source(samples)

    @pytest.mark.parametrize(
        ("samples", "words"),
        [
            ([["a", "b"]], "not numbers"),
            (np.array([[1j]]), "Complex data not supported"),
            ([[{}, 1.0]], "must be a string or a real number"),  # numpy's words
            ([[1.0, 2.0], [3.0]], r"(?s)not an array.*inhomogeneous"),
            (np.array([[True, False]]), "not numbers"),
            (np.array([["2020-01-01"]], dtype="datetime64[D]"), "not numbers"),
            (np.ma.masked_greater(np.ones((3, 2)), 0.5), r"(?s)with a mask.*6 masked.*cure"),
        ],
        ids=["text", "complex", "object", "ragged", "booleans", "dates", "masked"],
    )
    def test_not_numbers(self, samples: Any, words: str) -> None:
        with pytest.raises(InputTypeError, match=words):
            as_source(samples)

    @pytest.mark.parametrize(
        ("samples", "words"),
        [
            (X_ND.to_sparse(), r"(?s)sparse samples.*sparse_coo.*cure: samples\.to_dense"),
            (X_ND.to_sparse(1), r"(?s)sparse samples.*cure"),
            (nested_tensor(), r"(?s)nested samples.*cure: torch\.cat"),
            (X_ND.to("meta"), r"(?s)meta samples.*cure"),
            (X_ND.to(torch.complex64), r"(?s)complex samples.*cure"),
            (X_ND.to(torch.float8_e4m3fn), r"(?s)float8_e4m3fn samples.*cure: samples\.float"),
            (csr_matrix(X_ND.numpy()), r"(?s)sparse samples.*cure: samples\.toarray"),
            (dok_matrix(X_ND.numpy()), r"(?s)sparse samples.*cure: samples\.toarray"),
            ("shards", r"(?s)not samples.*'shards'.*a path.*cure: read it first"),
            (TensorDataset(X_ND), r"(?s)not samples.*TensorDataset.*cure: a DataLoader"),
        ],
        ids=["coo", "rows of coo", "nested", "meta", "complex", "float8", "scipy", "scipy's dict", "path", "data set"],
    )
    @pytest.mark.parametrize("way", ["fit", "partial_fit", "encode", "stream"])
    def test_of_other_kinds(self, samples: Any, words: str, way: str) -> None:
        if way == "stream" and not isinstance(samples, Tensor | csr_matrix | dok_matrix):
            return
        ksvd = small().fit(X_ND) if way == "encode" else small()
        with pytest.raises(InputTypeError, match=words):
            ksvd.fit([X_ND, samples]) if way == "stream" else getattr(ksvd, way)(samples)

    @pytest.mark.parametrize("way", ["fit", "partial_fit", "encode", "stream"])
    def test_positions_are_flattened_by_the_caller(self, way: str) -> None:
        ksvd, x_BLD = small().fit(X_ND), X_ND.reshape(6, 100, 12)
        with pytest.raises(ShapeError, match=r"(?s)\(6, 100, 12\).*cure: x\.reshape\(-1, 12\)"):
            small().fit(iter([x_BLD])) if way == "stream" else getattr(ksvd, way)(x_BLD)

    def test_a_missing_number_is_nan(self) -> None:
        with pytest.raises(ActivationError, match="hold NaN"):
            as_source([[None, 1.0]])

    def test_gradients_stay_out_of_it(self) -> None:
        x_ND = X_ND.clone().requires_grad_()
        assert not small().fit(x_ND).atoms_MD.requires_grad
        assert not small().partial_fit(x_ND).atoms_MD.requires_grad

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_other_precisions_are_learned_in_float32(self, dtype: torch.dtype) -> None:
        ksvd = small(passes=2).fit(X_ND.to(dtype))
        same = small(passes=2).fit(X_ND.to(dtype).float())
        assert ksvd.atoms_MD.dtype == ksvd.centre_D.dtype == torch.float32
        assert torch.equal(ksvd.atoms_MD, same.atoms_MD)

    def test_the_mean_of_many_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sources, "_CHUNK_ROWS", 7)
        assert torch.allclose(TensorSource(X_ND).centre_D, X_ND.double().mean(dim=0), rtol=1e-12, atol=0)
        spoilt_ND = X_ND.clone()
        spoilt_ND[400, 2] = float("nan")
        with pytest.raises(ActivationError, match=r"(?s)1 of 600 samples.*row 400"):
            TensorSource(spoilt_ND)

    def test_an_order_that_is_made_ahead_is_the_same(self) -> None:
        x_ND = torch.arange(50.0)[:, None].repeat(1, 3)
        plain, ahead = TensorSource(x_ND), TensorSource(x_ND)
        ahead.prepare(5)
        ahead.prepare(6)
        for seed in (5, 6, 6, 7):
            wanted, got = (torch.cat(list(source.batches(7, seed=seed))) for source in (plain, ahead))
            assert torch.equal(wanted, got)

    def test_an_order_that_fails_ahead_fails_where_it_is_asked_for(self) -> None:
        def fail(seed: int) -> Tensor:
            raise OSError(f"no order of seed {seed}")

        source = TensorSource(torch.zeros(5, 2), order=fail)
        source.prepare(3)
        with pytest.raises(OSError, match="no order of seed 3"):
            next(source.batches(2, seed=3))


class TestStreams:
    def test_batches_are_taken_as_they_come(self) -> None:
        sizes = [200, 30, 0, 370]
        ksvd = small(passes=2).fit(lambda: iter(X_ND.split(sizes)))
        assert [line.samples_seen for line in ksvd.log] == [200, 230, 600, 800, 830, 1200]
        by_hand = small()
        for batch_BD in X_ND.split(sizes) * 2:
            if len(batch_BD):
                by_hand.partial_fit(batch_BD)
        assert torch.equal(ksvd.atoms_MD, by_hand.atoms_MD)
        assert torch.equal(ksvd.centre_D, X_ND[:200].double().mean(dim=0).float())

    def test_a_list_of_batches_serves_every_pass(self) -> None:
        batches = list(X_ND.split(200))
        listed, called = small(passes=2).fit(batches), small(passes=2).fit(lambda: iter(batches))
        assert torch.equal(listed.atoms_MD, called.atoms_MD)

    def test_an_iterator_serves_one_pass(self) -> None:
        with pytest.raises(ShapeError, match=r"(?s)only once.*passes = 2.*cure: pass a function"):
            small(passes=2).fit(iter(X_ND.split(200)))
        one = small().fit(iter(X_ND.split(200)))
        assert torch.equal(one.atoms_MD, small().fit(list(X_ND.split(200))).atoms_MD)

    @pytest.mark.parametrize("batches", [[], [X_ND[:0]]], ids=["no batches", "empty batches"])
    def test_nothing_in_it(self, batches: list[Tensor]) -> None:
        with pytest.raises(ActivationError, match=r"(?s)gave no samples.*cause.*cure"):
            small().fit(lambda: iter(batches))

    def test_widths_that_differ(self) -> None:
        with pytest.raises(ShapeError, match=r"(?s)do not fit.*got: \(100, 11\).*limit: \(B, 12\)"):
            small().fit(iter([X_ND[:100], X_ND[:100, :11]]))

    def test_first_batch_smaller_than_the_dictionary(self) -> None:
        with pytest.raises(ShapeError, match=r"(?s)first batch.*19 samples, n_atoms = 20"):
            small().fit(iter([X_ND[:19], X_ND]))


LOADED: dict[str, Any] = {
    "a loader of tensors": DataLoader(TensorDataset(X_ND), 200),
    "its batches in a list": list(DataLoader(TensorDataset(X_ND), 200)),
    "tuples of one": [(x_BD,) for x_BD in X_ND.split(200)],
    "dicts of one": [{"x": x_BD} for x_BD in X_ND.split(200)],
    "dicts of rows, as data sets give them": [{"x": x_BD.tolist()} for x_BD in X_ND.double().split(200)],
    "arrays in dicts": lambda: ({"activations": x_BD.numpy()} for x_BD in X_ND.split(200)),
    "lists of rows": lambda: (x_BD.tolist() for x_BD in X_ND.double().split(200)),
}


class TestContainers:
    @pytest.mark.parametrize("kind", LOADED)
    def test_hold_the_samples_and_nothing_else(self, kind: str) -> None:
        wanted = small(passes=2).fit(list(X_ND.split(200)))
        assert torch.equal(small(passes=2).fit(LOADED[kind]).atoms_MD, wanted.atoms_MD)

    @pytest.mark.parametrize("kind", LOADED)
    def test_batch_by_batch(self, kind: str) -> None:
        ksvd, batches = small(), LOADED[kind]
        for batch in batches() if callable(batches) else batches:
            ksvd.partial_fit(batch)
        assert torch.equal(ksvd.atoms_MD, small().fit(list(X_ND.split(200))).atoms_MD)

    def test_a_dict_of_all_samples(self) -> None:
        assert torch.equal(small().fit({"x": X_ND}).atoms_MD, small().fit(X_ND).atoms_MD)

    @pytest.mark.parametrize(
        ("batch", "words"),
        [
            ((X_ND, torch.arange(600)), r"(?s)a tuple of 2 parts.*Tensor \(600, 12\), Tensor \(600,\).*labels.*cure"),
            ([torch.arange(600), X_ND], r"(?s)a list of 2 parts.*cure"),
            ({"x": X_ND, "y": torch.arange(600)}, r"(?s)dict.*'x': Tensor \(600, 12\), 'y'.*more than.*cure"),
            ({"x": X_ND[0].tolist()}, r"(?s)dict.*a single row.*cure"),
            ({"text": "words", "label": 3}, r"(?s)dict.*'text': 'words'.*a single row.*cure"),
            ({}, r"(?s)dict.*no keys"),
        ],
        ids=["labels", "labels first", "dict with labels", "row", "row of text", "empty"],
    )
    @pytest.mark.parametrize("way", ["stream", "partial_fit"])
    def test_that_hold_more_are_refused_by_name(self, batch: Any, words: str, way: str) -> None:
        where = "batch 1 of the stream" if way == "stream" else "partial_fit"
        with pytest.raises(InputTypeError, match=words) as caught:
            small().fit([X_ND, batch]) if way == "stream" else small().partial_fit(batch)
        assert where in str(caught.value)

    def test_single_samples(self) -> None:
        with pytest.raises(ShapeError, match=r"(?s)batch 0 of the stream.*got: torch.float32 \(12,\).*single samples"):
            small().fit(iter(X_ND))

    def test_a_function_without_batches(self) -> None:
        with pytest.raises(InputTypeError, match=r"(?s)the function gave no batches.*got: None"):
            small().fit(lambda: None)  # type: ignore[arg-type, return-value]


class TestMapped:
    @pytest.fixture
    def mapped(self, tmp_path: Path, request: pytest.FixtureRequest) -> Any:
        array = np.asarray(X_ND.numpy(), **getattr(request, "param", {}))
        np.save(tmp_path / "x.npy", array)
        return np.load(tmp_path / "x.npy", mmap_mode="r")

    @pytest.mark.parametrize(
        "mapped", [{}, {"order": "F"}, {"dtype": ">f4"}, {"dtype": "f8"}, {"dtype": "f2"}], ids=str, indirect=True
    )
    @pytest.mark.parametrize("keep", [None, True])
    def test_same_bits_as_in_memory(self, mapped: Any, keep: bool | None) -> None:
        in_memory = np.array(mapped)
        assert isinstance(as_source(mapped), MappedSource)
        one, other = (small(passes=3, keep_on_device=keep).fit(samples) for samples in (mapped, in_memory))
        assert torch.equal(one.atoms_MD, other.atoms_MD)
        assert torch.equal(one.centre_D, other.centre_D)
        assert torch.equal(one.encode(mapped).values_BK, other.encode(in_memory).values_BK)

    @pytest.mark.parametrize("mapped", [{"dtype": "i4"}], indirect=True)
    def test_whole_numbers(self, mapped: Any) -> None:
        assert torch.equal(
            small(init="random").fit(mapped).atoms_MD, small(init="random").fit(np.array(mapped)).atoms_MD
        )

    def test_is_never_in_memory_as_a_whole(self, mapped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        rows: list[int] = []
        from_array = sources._from_array

        def count(samples: Any, where: str = "") -> Tensor:
            rows.append(len(samples))
            return from_array(samples, where)

        monkeypatch.setattr(sources, "_from_array", count)
        monkeypatch.setattr(sources, "_CHUNK_ROWS", 100)
        small(passes=2).fit(mapped[::1])
        assert max(rows) == 150, "a batch"

    def test_parts_of_one(self, mapped: Any) -> None:
        assert torch.equal(small().fit(mapped[100:]).atoms_MD, small().fit(X_ND[100:]).atoms_MD)
        assert isinstance(as_source(mapped[::2, 1:]), MappedSource)
        assert isinstance(as_source(mapped + 1), TensorSource)

    def test_what_is_wrong_with_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sources, "_CHUNK_ROWS", 100)
        spoilt_ND = X_ND.clone()
        spoilt_ND[400, 2] = float("nan")
        for array, words in (
            (spoilt_ND.numpy(), r"(?s)NaN.*row 400"),
            (X_ND[0].numpy(), r"(?s)\(N, D\).*Reshape your data"),
            (X_ND.reshape(6, 100, 12).numpy(), r"(?s)\(6, 100, 12\).*cure"),
            (X_ND.to(torch.complex64).numpy(), "Complex data"),
        ):
            np.save(tmp_path / "x.npy", array)
            with pytest.raises((ActivationError, ShapeError), match=words):
                as_source(np.load(tmp_path / "x.npy", mmap_mode="r"))


class TestKeptOnDevice:
    @pytest.mark.parametrize("samples", [X_ND, Shards()], ids=["tensor", "source"])
    def test_changes_no_bit(self, samples: Any) -> None:
        kept, read = (small(passes=3, keep_on_device=keep).fit(samples) for keep in (True, False))
        assert torch.equal(kept.atoms_MD, read.atoms_MD)
        assert torch.equal(kept.centre_D, read.centre_D)

    def test_reads_the_source_once(self) -> None:
        class Counted(Shards):
            reads = 0

            def batches(self, batch_samples: int, *, seed: int | None = None) -> Iterator[Tensor]:
                Counted.reads += 1
                yield from super().batches(batch_samples, seed=seed)

        small(passes=3, keep_on_device=True).fit(Counted())
        assert Counted.reads == 1
        small(passes=3).fit(Counted())
        assert Counted.reads == 4, "on the CPU only if asked for"

    def test_a_source_that_miscounts(self) -> None:
        class More(Shards):
            n_samples = 700

        with pytest.raises(ShapeError, match=r"(?s)another number of samples.*got: 600.*limit: 700"):
            kept_on_device(More(), CPU, True)

    @pytest.mark.parametrize(("free", "kept"), [(2.0, True), (1.9, False)])
    def test_rule_on_a_gpu(self, monkeypatch: pytest.MonkeyPatch, free: float, kept: bool) -> None:
        """At most half of the free memory; the decision alone, without a GPU."""
        n_bytes = 600 * 12 * 4
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * n_bytes), 10 * n_bytes))
        moved: list[torch.device] = []

        def no_copy(batches: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
            moved.append(device)
            return batches

        monkeypatch.setattr(sources, "prefetched", no_copy)
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: empty(*size, dtype=dtype))
        source = Shards()
        got = kept_on_device(source, torch.device("cuda"), None)
        assert (got is not source) == bool(moved) == kept


class TestPrefetched:
    def test_order_and_values(self) -> None:
        batches = X_ND.split(7)
        assert all(torch.equal(a, b) for a, b in zip(prefetched(iter(batches), CPU), batches, strict=True))

    def test_reads_ahead_but_not_far(self) -> None:
        read: list[int] = []

        def source() -> Iterator[Tensor]:
            for number in range(20):
                read.append(number)
                yield X_ND[:1]

        batches = prefetched(source(), CPU, ahead=2)
        next(batches)
        deadline = time.monotonic() + 10
        while len(read) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(read) == 4, "one in use, two waiting, one being handed over"
        batches.close()

    def test_an_error_of_the_source_comes_up_with_its_traceback(self) -> None:
        def breaks_here() -> Iterator[Tensor]:
            yield X_ND[:200]
            raise OSError("the disk is gone")

        with pytest.raises(OSError, match="the disk is gone") as caught:
            small().fit(breaks_here)
        assert "breaks_here" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]

    def test_ends_when_the_caller_gives_up(self) -> None:
        closed = []

        def endless() -> Iterator[Tensor]:
            try:
                while True:
                    yield X_ND[:200]
            finally:
                closed.append(True)

        def fail(line: Any) -> None:
            raise KeyError("enough")

        with pytest.raises(KeyError, match="enough"):
            small(on_batch=fail).fit(endless)
        assert closed == [True]
        assert readers() == 0

    def test_works_in_a_thread_of_its_own(self) -> None:
        names = []

        def source() -> Iterator[Tensor]:
            names.append(threading.current_thread().name)
            yield X_ND

        small().fit(source)
        assert names == ["ksvd_sae-prefetch"]
