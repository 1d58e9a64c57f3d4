"""Tensors come back as they went in, under their own key alone, and the folder keeps to its size."""

import os
from pathlib import Path

import pytest
import torch

from ksvd_sae.errors import ConfigError
from ksvd_sae.evals import llm_cache
from ksvd_sae.evals.llm_cache import TensorCache, model_fingerprint, tokens_hash
from tests.tiny_saes import tiny_model

ENTRY = {"x": torch.arange(250, dtype=torch.float32)}  # 1,000 bytes, and a header
ENTRY_BYTES = 1100


def test_round_trip(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, 10**6)
    given = {"a": torch.randn(3, 4).T, "b": torch.tensor([1, 2]), "c": torch.ones(2, dtype=torch.bfloat16)}
    assert cache.get("key") is None
    assert cache.put("key", given)
    found = TensorCache(tmp_path, 10**6).get("key")
    assert found is not None
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], given[name]) and found[name].dtype == given[name].dtype for name in given)
    assert cache.get("other") is None


def test_two_names_for_one_tensor(tmp_path: Path) -> None:
    x = torch.arange(6.0)
    cache = TensorCache(tmp_path, 10**6)
    assert cache.put("key", {"a": x, "b": x, "c": x[2:]})
    found = cache.get("key")
    assert found is not None
    assert found["c"].tolist() == [2.0, 3.0, 4.0, 5.0]


def test_full_of_what_this_process_uses(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, 2 * ENTRY_BYTES)
    assert [cache.put(str(i), ENTRY) for i in range(4)] == [True, True, False, False]
    assert [cache.get(str(i)) is not None for i in range(4)] == [True, True, False, False]


def test_what_an_earlier_process_left_makes_room_the_longest_unused_first(tmp_path: Path) -> None:
    earlier = TensorCache(tmp_path, 10**6)
    for age, key in ((30, "old"), (10, "new"), (20, "middle")):
        earlier.put(key, ENTRY)
        path = tmp_path / f"{key}.safetensors"
        os.utime(path, (path.stat().st_atime - age, path.stat().st_mtime - age))
    cache = TensorCache(tmp_path, 3 * ENTRY_BYTES)
    assert cache.get("old") is not None, "used again: it stays"
    assert cache.put("more", ENTRY)
    assert {path.stem for path in tmp_path.iterdir()} == {"old", "new", "more"}


@pytest.mark.parametrize("limit", [0, ENTRY_BYTES // 2])
def test_no_room_at_all(tmp_path: Path, limit: int) -> None:
    cache = TensorCache(tmp_path / "folder", limit)
    assert not cache.put("key", ENTRY)
    assert cache.get("key") is None


def test_same_key_again_takes_no_more_room(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, ENTRY_BYTES)
    assert cache.put("key", ENTRY)
    assert cache.put("key", {"x": ENTRY["x"] + 1})
    found = cache.get("key")
    assert found is not None
    assert torch.equal(found["x"], ENTRY["x"] + 1)


def test_cut_off_file_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = TensorCache(tmp_path, 10**6)
    cache.put("key", ENTRY)
    path = tmp_path / "key.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    assert cache.get("key") is None
    assert "cannot be read" in caplog.text
    assert not path.exists()
    assert cache.put("key", ENTRY)


def test_negative_size(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="negative size"):
        TensorCache(tmp_path, -1)


def test_fingerprint_tells_weights_apart() -> None:
    model, same = tiny_model(), tiny_model()
    assert model_fingerprint(model) == model_fingerprint(same)
    with torch.no_grad():
        same.blocks[1].mlp.W_in[0, 0] += 1e-3
    assert model_fingerprint(model) != model_fingerprint(same)
    assert model_fingerprint(model) != model_fingerprint(tiny_model().to(torch.bfloat16))


def test_tokens_hash_tells_contexts_apart() -> None:
    tokens_BL = torch.arange(12).reshape(3, 4)
    assert tokens_hash(tokens_BL) == tokens_hash(tokens_BL.to(torch.int32).T.contiguous().T)
    assert tokens_hash(tokens_BL) != tokens_hash(tokens_BL.reshape(4, 3))
    assert tokens_hash(tokens_BL) != tokens_hash(tokens_BL + 1)


def test_disk_that_takes_nothing_costs_no_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    cache = TensorCache(tmp_path, 10**6)
    monkeypatch.setattr(llm_cache, "save_file", full)
    assert not cache.put("key", ENTRY)
    assert "No space left" in caplog.text
    assert cache.get("key") is None
    assert not list(tmp_path.iterdir()), "nothing half written"
    monkeypatch.undo()
    assert cache.put("key", ENTRY)
