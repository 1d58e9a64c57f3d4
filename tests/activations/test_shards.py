"""Shards on disk: bit for bit there and back, whole or refused, never mended by deleting."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ksvd_sae.activations.shards import ACTIVATIONS_KEY, STATISTICS_FILE, ActivationShards, write_shard
from ksvd_sae.errors import KsvdSaeError, ManifestError, ShapeError, ShardError
from ksvd_sae.ranks import Ranks
from ksvd_sae.store import MANIFEST
from tests.activations.conftest import KEY, StoreHarvest
from tests.learners import learner
from tests.strategies import generator


def numbered(*sizes: int, d_in: int = 3) -> list[Tensor]:
    """Tensors whose rows are all different: row i of all holds i."""
    total = torch.arange(sum(sizes)).float()[:, None].expand(-1, d_in)
    return list(total.split(sizes))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(folder: Path, error: type[KsvdSaeError], *words: str, key: dict[str, object] | None = None) -> None:
    """Reading everything raises ``error`` with all ``words``, and leaves every file as it was."""
    before = files(folder)
    with pytest.raises(error) as caught:
        for _ in ActivationShards.open(folder, key=key).batches(4):
            pass
    assert all(word in str(caught.value) for word in (*words, str(folder))), str(caught.value)
    assert files(folder) == before


# ---------------------------------------------------------------- round trip


@given(
    n=st.integers(1, 20),
    d_in=st.sampled_from((1, 3, 7)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    seed=st.integers(0, 99),
)
def test_round_trip_is_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, n: int, d_in: int, dtype: torch.dtype, seed: int
) -> None:
    """Any bits: subnormal numbers, infinities and NaN among them."""
    bits = torch.randint(-(2**15), 2**15, (n, d_in * (2 if dtype == torch.float32 else 1)), generator=generator(seed))
    x_ND = bits.to(torch.int16).view(dtype)
    folder = tmp_path_factory.mktemp("shards")
    entry = write_shard(folder / "train" / "x.safetensors", x_ND)
    manifest = {"d_in": d_in, "parts": {"train": {"shards": [entry]}}}
    stored_ND = ActivationShards(folder, "train", manifest).read_shard(0)
    assert stored_ND.dtype == dtype
    assert torch.equal(stored_ND.view(torch.int16), x_ND.view(torch.int16))


def test_a_view_is_stored_as_its_own_rows(tmp_path: Path) -> None:
    x_ND = torch.arange(24.0).reshape(4, 6)[::2, ::3]
    entry = write_shard(tmp_path / "train" / "x.safetensors", x_ND)
    manifest = {"d_in": 2, "parts": {"train": {"shards": [entry]}}}
    assert torch.equal(ActivationShards(tmp_path, "train", manifest).read_shard(0), x_ND)


def test_what_a_harvest_says_of_itself(store_harvest: StoreHarvest) -> None:
    shards = store_harvest(*numbered(5, 2, 4))
    assert (shards.n_samples, shards.d_in) == (11, 3)
    assert torch.equal(shards.tensor(), torch.cat(numbered(5, 2, 4)))
    assert shards.statistics.n_samples == 11
    assert shards.centre_D.tolist() == [5, 5, 5]
    assert shards.centre_D.dtype == torch.float64


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("batch_samples", [1, 2, 3, 4, 5, 10, 11, 12, 1000])
def test_batches_cover_everything_once(store_harvest: StoreHarvest, batch_samples: int, seed: int | None) -> None:
    batches = list(store_harvest(*numbered(5, 1, 4, 1)).batches(batch_samples, seed=seed))
    assert all(len(batch) == batch_samples for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_samples
    rows = torch.cat(batches)[:, 0].tolist()
    assert sorted(rows) == list(range(11))
    if seed is None:
        assert rows == list(range(11))


def test_batches_of_bfloat16_are_float32(store_harvest: StoreHarvest) -> None:
    (batch,) = store_harvest(numbered(4)[0].bfloat16()).batches(4)
    assert batch.dtype == torch.float32


def test_seeds_give_orders(store_harvest: StoreHarvest) -> None:
    shards = store_harvest(*numbered(16, 16, 16))
    orders = [torch.cat(list(shards.batches(7, seed=seed)))[:, 0].tolist() for seed in (0, 1, 2, 0)]
    assert orders[0] == orders[3]
    assert len({tuple(order) for order in orders}) == 3
    # Both the shards and the samples in them change places.
    assert any(order[0] >= 16 for order in orders)
    assert all(order[:16] != sorted(order[:16]) for order in orders)


@pytest.mark.parametrize("seed", [0, 7])
def test_order_is_that_of_the_batches(store_harvest: StoreHarvest, seed: int) -> None:
    """Training that keeps the samples on its device goes through them by it."""
    shards = store_harvest(*numbered(5, 9, 2))
    given = torch.cat(list(shards.batches(4, seed=seed)))
    assert torch.equal(shards.tensor()[shards.order(seed)], given)
    assert not torch.equal(shards.tensor(), given)


def test_kept_on_the_device_changes_no_bit(store_harvest: StoreHarvest) -> None:
    x_ND = torch.randn(90, 6, generator=generator(1))
    shards = store_harvest(*x_ND.split([30, 50, 10]))
    fitted = [learner(12, 2, passes=3, batch_samples=32, keep_on_device=keep).fit(shards) for keep in (False, True)]
    assert torch.equal(fitted[0].atoms_MD, fitted[1].atoms_MD)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("batch_samples", [1, 4, 7, 1000])
def test_each_process_reads_its_part_of_each_batch(
    store_harvest: StoreHarvest, batch_samples: int, seed: int | None
) -> None:
    """Of batches of fewer samples than processes some get none."""
    shards = store_harvest(*numbered(5, 1, 4, 1))
    parts = [shards.batches(batch_samples, seed=seed, part=Ranks(rank, 3).part) for rank in range(3)]
    joined = [torch.cat(of_ranks) for of_ranks in zip(*parts, strict=True)]
    whole = list(shards.batches(batch_samples, seed=seed))
    assert len(joined) == len(whole)
    assert all(map(torch.equal, joined, whole))


def test_checksums_are_shared_out(store_harvest: StoreHarvest) -> None:
    folder = store_harvest(*numbered(5, 5, 5)).folder
    (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-1] + b"?")
    shards = ActivationShards.open(folder)
    for rank in (0, 2):
        assert len(list(shards.checked(Ranks(rank, 3).part).batches(15))) == 1
    with pytest.raises(ShardError, match="its checksum is not the manifest's"):
        shards.checked(Ranks(1, 3).part)


@pytest.mark.parametrize("batch_samples", [0, -1])
def test_batches_of_nothing(store_harvest: StoreHarvest, batch_samples: int) -> None:
    with pytest.raises(ShapeError, match="at least 1"):
        next(store_harvest(*numbered(4)).batches(batch_samples))


# ---------------------------------------------------------------- damage


SECOND = "train/shard-00001.safetensors"


@pytest.mark.parametrize("kept_bytes", [0, 4, 40, -1])
def test_truncated_shard(store_harvest: StoreHarvest, kept_bytes: int) -> None:
    folder = store_harvest(*numbered(5, 5)).folder
    (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:kept_bytes])
    refused(folder, ShardError, SECOND, "truncated")


@pytest.mark.parametrize("position", [0, 20, -1])
def test_altered_byte(store_harvest: StoreHarvest, position: int) -> None:
    folder = store_harvest(*numbered(5, 5)).folder
    content = bytearray((folder / SECOND).read_bytes())
    content[position] ^= 1
    (folder / SECOND).write_bytes(content)
    refused(folder, ShardError, SECOND, "checksum", "altered")


def test_missing_shard(store_harvest: StoreHarvest) -> None:
    folder = store_harvest(*numbered(5, 5)).folder
    (folder / SECOND).unlink()
    refused(folder, ShardError, SECOND, "missing")
    # Before anything is read.
    with pytest.raises(ShardError, match=SECOND):
        ActivationShards.open(folder)


def test_shard_that_goes_missing_after_opening(store_harvest: StoreHarvest) -> None:
    shards = store_harvest(*numbered(5, 5))
    (shards.folder / SECOND).unlink()
    with pytest.raises(ShardError, match=SECOND):
        shards.tensor()


def test_shard_of_another_shape_than_the_manifest_says(store_harvest: StoreHarvest) -> None:
    shards = store_harvest(*numbered(5, 5))
    shards.manifest["d_in"] = 4
    with pytest.raises(ShardError, match=r"(?s)shape.*\(5, 3\).*\(5, 4\)"):
        shards.tensor()


def test_shard_that_holds_something_else(store_harvest: StoreHarvest) -> None:
    from safetensors.torch import save_file

    from ksvd_sae.store import file_sha256

    shards = store_harvest(*numbered(5, 5))
    save_file({f"not {ACTIVATIONS_KEY}": torch.zeros(5, 3)}, shards.folder / SECOND)
    shards.manifest["parts"]["train"]["shards"][1]["sha256"] = file_sha256(shards.folder / SECOND)
    with pytest.raises(ShardError, match=SECOND):
        shards.tensor()


def test_missing_and_truncated_statistics(store_harvest: StoreHarvest) -> None:
    shards = store_harvest(*numbered(5))
    path = shards.folder / STATISTICS_FILE
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(ShardError, match=STATISTICS_FILE):
        _ = shards.statistics
    path.unlink()
    with pytest.raises(ShardError, match=STATISTICS_FILE):
        _ = shards.centre_D


def test_harvest_of_another_config(store_harvest: StoreHarvest) -> None:
    folder = store_harvest(*numbered(5)).folder
    refused(folder, ManifestError, "seed: found 0, wanted 1", "another config", key={**KEY, "seed": 1})


def test_folder_without_manifest(store_harvest: StoreHarvest) -> None:
    folder = store_harvest(*numbered(5)).folder
    (folder / MANIFEST).unlink()
    refused(folder, ManifestError, "ksvd-sae harvest")


def test_manifest_that_is_no_json(store_harvest: StoreHarvest) -> None:
    folder = store_harvest(*numbered(5)).folder
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:30])
    refused(folder, ManifestError, MANIFEST, "not JSON")
