"""A harvest by several processes is that of one, bit for bit, whatever part of the text each has."""

from pathlib import Path

import pytest

from ksvd_sae.activations.collecting import SoFar
from ksvd_sae.activations.harvest import run_harvest
from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.errors import TextError
from ksvd_sae.together import Together
from tests.activations import test_harvest as by_one
from tests.activations.test_harvest import Reader, StoppedError, harvest_of, no_reader
from tests.threads import in_ranks

# Parts of the held-out text and of training's: uneven; one for each rank and none for the last; all for one.
PARTS = {64: (2, 10), 400: (1, 2), 10_000: (1, 1)}


def run(folder: Path, size: int, *readers: Reader, **settings: int) -> ActivationShards:
    return in_ranks(size, lambda together: _run(folder, together, readers, settings))[-1]


def _run(folder: Path, together: Together, readers: tuple[Reader, ...], settings: dict[str, int]) -> ActivationShards:
    return run_harvest(harvest_of(by_one.TEXTS, **settings), folder, readers[together.rank], together)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("shard_tokens", PARTS)
def test_as_one_process(shard_tokens: int, size: int, tmp_path: Path) -> None:
    alone = Reader()
    whole = by_one.run(tmp_path / "h" / "one", alone, shard_tokens=shard_tokens)
    readers = [Reader() for _ in range(size)]
    shards = run(tmp_path / "h" / "many", size, *readers, shard_tokens=shard_tokens)
    assert by_one.content(shards.folder) == by_one.content(whole.folder)
    assert sum(reader.calls for reader in readers) == alone.calls
    busy = min(size, max(PARTS[shard_tokens]))
    assert [reader.calls > 0 for reader in readers] == [True] * busy + [False] * (size - busy)


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3), (3, 1), (1, 3)])
def test_stopped_and_resumed_by_another_number(before: int, after: int, tmp_path: Path) -> None:
    alone = Reader()
    whole = by_one.run(tmp_path / "h" / "one", alone)
    folder, stopped = tmp_path / "h" / "many", [Reader(), Reader(stop_at=5), Reader()][: max(2, before)][-before:]
    with pytest.raises(StoppedError):
        run(folder, before, *stopped)
    readers = [Reader() for _ in range(after)]
    run(folder, after, *readers)
    assert by_one.content(folder) == by_one.content(whole.folder)
    assert sum(reader.calls for reader in readers) < alone.calls
    in_ranks(after, lambda together: run_harvest(harvest_of(None), folder, no_reader, together))


def test_altered_before_it_is_resumed(tmp_path: Path) -> None:
    """Whoever would have collected a part looks at it."""
    whole = by_one.run(tmp_path / "h" / "one", Reader())
    folder = tmp_path / "h" / "many"
    with pytest.raises(StoppedError):
        run(folder, 2, Reader(), Reader(stop_at=8))
    altered = folder / "raw" / "train-00001.safetensors"
    altered.write_bytes(altered.read_bytes()[:-1])
    run(folder, 2, Reader(), Reader())
    assert by_one.content(folder) == by_one.content(whole.folder)


def test_what_is_shared_of_it_has_no_gap(tmp_path: Path) -> None:
    """Where one process is behind, what others have after its next part is left out."""
    folder, few = tmp_path / "h" / "many", tmp_path / "h" / "few"
    with pytest.raises(StoppedError):
        run(folder, 2, Reader(), Reader(stop_at=6))
    harvest = harvest_of(by_one.TEXTS)
    there = SoFar.of(folder, harvest.key)
    assert len(there.parts["train"]) < len(list((folder / "raw").glob("train-*.json")))
    there.check(harvest.config)
    there.share(few, harvest.config)
    n_tokens = there.n_tokens("train")
    many = in_ranks(3, lambda t: run_harvest(harvest_of(by_one.TEXTS, train_tokens=n_tokens), few, no_reader, t))[0]
    fresh = by_one.run(tmp_path / "h" / "fresh", Reader(), train_tokens=n_tokens)
    assert by_one.content(many.folder) == by_one.content(fresh.folder)


def test_a_text_that_is_split_inside(tmp_path: Path) -> None:
    """Too few documents follow the held-out ones: all find the same place to cut."""
    few = by_one.TEXTS[:90]
    whole = run_harvest(harvest_of(few), tmp_path / "h" / "one", Reader())
    assert "split" in whole.manifest["parts"]["heldout"]
    folder = tmp_path / "h" / "many"
    in_ranks(3, lambda together: run_harvest(harvest_of(few), folder, Reader(), together))
    assert by_one.content(folder) == by_one.content(whole.folder)


def test_too_little_text(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="the text ended before"):
        in_ranks(
            3, lambda together: run_harvest(harvest_of(by_one.TEXTS[:40]), tmp_path / "h" / "x", Reader(), together)
        )
