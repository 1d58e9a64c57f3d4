"""The harvest: the same bits however often it was stopped, shuffled, apart from the held-out part, and whole.

Most tests read with a stand-in for the model whose activations say which document, word, position and context they
are of; the last one reads with a real model.
"""

import json
import random
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from ksvd_sae.activations import shards as shard_files
from ksvd_sae.activations.collecting import Collection, SoFar, reading_order
from ksvd_sae.activations.harvest import HELDOUT_DOCUMENTS, HarvestConfig, run_harvest
from ksvd_sae.activations.language import ActivationReader, ModelConfig
from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.activations.text import TextConfig, contexts
from ksvd_sae.errors import ActivationError, DiskSpaceError, ManifestError, TextError
from ksvd_sae.store import MANIFEST, content_hash, sole_writer
from tests import tiny_models, tolerances
from tests.activations.conftest import GivenTexts

BOS = 0
WORDS = 1000  # a token is document · WORDS + word, words from 1
# Columns of the stand-in's activations; the first is large and the same everywhere, so that no norm stands out.
DOCUMENT, WORD, POSITION, CONTEXT = 1, 2, 3, 4
D_IN = 5
CONTEXT_TOKENS, BATCH_CONTEXTS, SHARD_TOKENS, HELDOUT_TOKENS, TRAIN_TOKENS = 9, 4, 64, 100, 600
LOUD = 999  # the word of outliers


class StoppedError(Exception):
    """Raised in the middle of a harvest, as a power cut would."""


@dataclass
class Reader:
    """Stands in for ActivationReader: activations are a fixed function of the context; counts its calls."""

    stop_at: int | None = None
    calls: int = 0
    model: Any = field(
        default_factory=lambda: SimpleNamespace(
            tokenizer=NumberTokenizer(), cfg=SimpleNamespace(d_vocab=10**6, device="cpu", default_prepend_bos=True)
        )
    )

    def __call__(self) -> ActivationReader:
        return cast(ActivationReader, self)

    def read(self, tokens_BL: Tensor) -> Tensor:
        if self.calls == self.stop_at:
            raise StoppedError
        self.calls += 1
        x_BLD = torch.empty(*tokens_BL.shape, D_IN)
        x_BLD[..., 0] = 10_000
        x_BLD[..., DOCUMENT] = tokens_BL // WORDS
        x_BLD[..., WORD] = tokens_BL % WORDS
        x_BLD[..., POSITION] = torch.arange(tokens_BL.shape[1])
        x_BLD[..., CONTEXT] = (tokens_BL * torch.arange(1, tokens_BL.shape[1] + 1)).sum(dim=1, keepdim=True) % 7919
        x_BLD[tokens_BL % WORDS == LOUD] *= 100
        return x_BLD[self.kept(tokens_BL)]

    def kept(self, tokens_BL: Tensor) -> Tensor:
        return tokens_BL != BOS


class NumberTokenizer:
    """Tokens are numbers written out."""

    # One token for both, as GPT-NeoX's has it.
    bos_token_id, bos_token, eos_token_id = BOS, str(BOS), BOS

    def __call__(self, batch: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(word) for word in text.split()] for text in batch]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))

    def convert_ids_to_tokens(self, token: int) -> str:
        return str(token)


def numbered_texts(n: int, seed: int = 0) -> list[str]:
    """Documents of 5 to 15 words that know where they are from."""
    draw = random.Random(seed)
    return [" ".join(str(d * WORDS + w) for w in range(1, draw.randint(6, 16))) for d in range(1, n + 1)]


TEXTS = numbered_texts(200)


def harvest_of(
    texts: list[str] | None, *, model: dict[str, Any] | None = None, seed: int = 0, **settings: Any
) -> GivenTexts:
    sizes = {
        "train_tokens": TRAIN_TOKENS,
        "heldout_tokens": HELDOUT_TOKENS,
        "context_tokens": CONTEXT_TOKENS,
        "batch_contexts": BATCH_CONTEXTS,
        "shard_tokens": SHARD_TOKENS,
    }
    return GivenTexts(
        ModelConfig(**(model or {"name": "stand-in", "hook": "blocks.0.hook_resid_post"})),
        TextConfig(source="hub", dataset="none"),
        HarvestConfig(**{**sizes, **settings}),
        seed,
        None if texts is None else tuple(texts),
    )


def run(
    folder: Path, reader: Callable[[], ActivationReader], texts: list[str] | None = None, **settings: Any
) -> ActivationShards:
    return run_harvest(harvest_of(TEXTS if texts is None else texts, **settings), folder, reader)


def no_reader() -> ActivationReader:
    raise AssertionError("the model was loaded")


def content(folder: Path) -> dict[str, Any]:
    """All files; of the manifest what does not depend on the clock."""
    found: dict[str, Any] = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    manifest = json.loads(found[MANIFEST])
    found[MANIFEST] = {
        name: value for name, value in manifest.items() if name not in ("written", "seconds", "checksum")
    }
    return found


def raw_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """The parts that were finished before a stop."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / "raw").glob("*.json"))}


def finished_batches(folder: Path) -> int:
    return sum(entry["n_contexts"] for entry in raw_entries(folder).values()) // BATCH_CONTEXTS


def heldout_shards(shards: ActivationShards) -> ActivationShards:
    return ActivationShards.open(shards.folder, "heldout")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[ActivationShards, int]:
    """A harvest in one go, and how many batches it took."""
    reader = Reader()
    return run(tmp_path_factory.mktemp("uninterrupted"), reader), reader.calls


# ---------------------------------------------------------------- content


def test_counts(uninterrupted: tuple[ActivationShards, int]) -> None:
    shards, calls = uninterrupted
    # Whole batches, so at most one batch more than was asked for in each part of a shard's size.
    n_parts = -(-TRAIN_TOKENS // SHARD_TOKENS)
    assert TRAIN_TOKENS <= shards.n_samples < TRAIN_TOKENS + n_parts * BATCH_CONTEXTS * (CONTEXT_TOKENS - 1)
    assert heldout_shards(shards).n_samples >= HELDOUT_TOKENS
    n_read = shards.n_samples + heldout_shards(shards).n_samples
    assert n_read <= calls * BATCH_CONTEXTS * (CONTEXT_TOKENS - 1)
    assert shards.d_in == D_IN
    sizes = [entry["n_samples"] for entry in shards.manifest["parts"]["train"]["shards"]]
    assert sizes[:-1] == [SHARD_TOKENS] * (len(sizes) - 1)
    assert not (shards.folder / "raw").exists()


def test_every_token_of_the_contexts_is_there_once(uninterrupted: tuple[ActivationShards, int]) -> None:
    """The documents after the held-out ones, packed again: the same tokens, none lost, none twice."""
    shards, _ = uninterrupted
    n_heldout = len((shards.folder / HELDOUT_DOCUMENTS).read_text().splitlines())
    packed = contexts(iter(TEXTS[n_heldout:]), NumberTokenizer(), CONTEXT_TOKENS)
    tokens = [token for context in packed for token in context.tolist() if token != BOS]
    x_ND = shards.tensor()
    found = sorted((x_ND[:, DOCUMENT] * WORDS + x_ND[:, WORD]).int().tolist())
    assert found == tokens[: len(found)]


def test_heldout_documents_are_not_trained_on(uninterrupted: tuple[ActivationShards, int]) -> None:
    shards, _ = uninterrupted
    listed = [json.loads(line)["text"] for line in (shards.folder / HELDOUT_DOCUMENTS).read_text().splitlines()]
    assert listed == TEXTS[: len(listed)]
    trained = set(shards.tensor()[:, DOCUMENT].int().tolist())
    heldout = set(heldout_shards(shards).tensor()[:, DOCUMENT].int().tolist())
    assert heldout
    assert heldout <= set(range(1, len(listed) + 1))
    assert trained
    assert min(trained) > len(listed)


def test_shuffling_is_over_the_whole_harvest(uninterrupted: tuple[ActivationShards, int]) -> None:
    shards, _ = uninterrupted
    shard_of_context: dict[int, set[int]] = {}
    for index in range(len(shards.manifest["parts"]["train"]["shards"])):
        for context in shards.read_shard(index)[:, CONTEXT].int().tolist():
            shard_of_context.setdefault(context, set()).add(index)
    assert len(shard_of_context) > 50
    assert all(len(found) > 1 for found in shard_of_context.values())
    first_documents = shards.read_shard(0)[:, DOCUMENT]
    assert float(first_documents.max() - first_documents.min()) > 40


def test_seeds_shuffle_differently(tmp_path: Path, uninterrupted: tuple[ActivationShards, int]) -> None:
    first, second = uninterrupted[0].tensor(), run(tmp_path, Reader(), seed=1).tensor()
    assert not torch.equal(first, second)
    assert sorted(first.tolist()) == sorted(second.tolist())


@pytest.mark.parametrize("part", ["heldout", "train"])
def test_reading_order_is_known(uninterrupted: tuple[ActivationShards, int], part: str) -> None:
    shards = ActivationShards.open(uninterrupted[0].folder, part)
    place_N = reading_order(shards)
    assert place_N is not None
    x_ND = shards.tensor()[place_N.argsort()]
    # Documents in a row, contexts whole, positions in a context rising.
    assert bool((x_ND[:, DOCUMENT].diff() >= 0).all())
    same_context = x_ND[:, CONTEXT].diff() == 0
    assert int((~same_context).sum()) + 1 == len(x_ND[:, CONTEXT].unique())
    assert bool((x_ND[:, POSITION].diff()[same_context] > 0).all())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_statistics_are_of_what_is_stored(tmp_path: Path, dtype: str) -> None:
    shards = run(tmp_path, Reader(), dtype=dtype)
    assert str(shards.read_shard(0).dtype) == f"torch.{dtype}"
    x, found = shards.tensor().double().numpy(), shards.statistics
    close = {"rtol": tolerances.STREAMED_STATISTICS, "atol": tolerances.STREAMED_STATISTICS}
    np.testing.assert_allclose(found.centre_D, x.mean(axis=0), **close)
    np.testing.assert_allclose(found.variance_D, x.var(axis=0), **close)
    np.testing.assert_allclose(found.mean_norm, np.linalg.norm(x, axis=1).mean(), **close)
    assert found.n_samples == len(x) == shards.n_samples


# ---------------------------------------------------------------- outliers


def loud_texts() -> list[str]:
    """Every tenth document ends in an outlier."""
    return [f"{t} {(d + 1) * WORDS + LOUD}" if d % 10 == 3 else t for d, t in enumerate(TEXTS)]


def test_outliers_are_counted_and_left_out(tmp_path: Path) -> None:
    kept = run(tmp_path / "4", Reader(), loud_texts(), outlier_factor=4.0)
    everything = run(tmp_path / "null", Reader(), loud_texts(), outlier_factor=None)
    for part in ("train", "heldout"):
        all_ND, kept_ND = (ActivationShards.open(s.folder, part).tensor() for s in (everything, kept))
        is_loud_N = all_ND.norm(dim=1) > 100_000
        assert int(is_loud_N.sum()) > 0
        assert kept.manifest["parts"][part]["outliers"] == int(is_loud_N.sum())
        assert everything.manifest["parts"][part]["outliers"] == 0
        assert sorted(kept_ND.tolist()) == sorted(all_ND[~is_loud_N].tolist())
    assert kept.manifest["statistics"]["outlier_limit"] == 4 * kept.statistics.median_norm
    assert everything.manifest["statistics"]["outlier_limit"] is None
    assert kept.statistics.mean_norm < 12_000 < everything.statistics.mean_norm


# ---------------------------------------------------------------- stops


# 0: before the first batch; 3: in the held-out part; 5 to 8: at its end and the training part's start.
@pytest.mark.parametrize("stop_at", [0, 1, 3, 4, 5, 6, 8, 13, 20])
def test_a_stopped_harvest_goes_on_to_the_same_bits(
    tmp_path: Path, uninterrupted: tuple[ActivationShards, int], stop_at: int
) -> None:
    whole, calls = uninterrupted
    assert stop_at < calls
    with pytest.raises(StoppedError):
        run(tmp_path, Reader(stop_at))
    done = finished_batches(tmp_path)
    # What is lost is less than a part: here at most two batches.
    assert stop_at - 2 <= done <= stop_at
    resumed = Reader()
    run(tmp_path, resumed)
    assert resumed.calls == calls - done
    assert content(tmp_path) == content(whole.folder)


def test_a_harvest_stopped_again_and_again(tmp_path: Path, uninterrupted: tuple[ActivationShards, int]) -> None:
    whole, calls = uninterrupted
    total = 0
    for _ in range(calls):
        reader = Reader(stop_at=3)
        try:
            run(tmp_path, reader)
        except StoppedError:
            total += reader.calls
            continue
        break
    total += reader.calls
    assert calls < total < 2 * calls
    assert content(tmp_path) == content(whole.folder)


@pytest.mark.parametrize("where", ["write_statistics", "write_manifest", "_write_shuffled"])
def test_stopped_while_finishing_the_model_is_not_loaded_again(
    tmp_path: Path, uninterrupted: tuple[ActivationShards, int], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(Collection if where == "_write_shuffled" else shard_files, where, stop)
        with pytest.raises(StoppedError):
            run(tmp_path, Reader())
    run(tmp_path, no_reader)
    assert content(tmp_path) == content(uninterrupted[0].folder)


def test_a_damaged_raw_part_alone_is_collected_again(
    tmp_path: Path, uninterrupted: tuple[ActivationShards, int], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(StoppedError):
        run(tmp_path, Reader(stop_at=18))
    damaged = tmp_path / "raw" / "train-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    good = [e for name, e in raw_entries(tmp_path).items() if name != "train-00001"]
    resumed = Reader()
    run(tmp_path, resumed)
    assert "train-00001" in caplog.text
    assert resumed.calls == uninterrupted[1] - sum(e["n_contexts"] for e in good) // BATCH_CONTEXTS
    assert content(tmp_path) == content(uninterrupted[0].folder)


def test_a_finished_harvest_is_reused(tmp_path: Path) -> None:
    run(tmp_path, Reader())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    run_harvest(harvest_of(None), tmp_path, no_reader)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_raw_parts_that_a_stopped_harvest_left_go(tmp_path: Path) -> None:
    run(tmp_path, Reader())
    left = tmp_path / "raw" / "train-00003.safetensors"
    left.parent.mkdir()
    left.write_bytes(b"stopped between the manifest and the end")
    run_harvest(harvest_of(None), tmp_path, no_reader)
    assert not left.parent.exists()


# ---------------------------------------------------------------- so far


def share(folder: Path, into: Path, texts: list[str] | None = None) -> int:
    """Give what an unfinished harvest has to one of fewer tokens; how many these are."""
    harvest = harvest_of(TEXTS if texts is None else texts)
    there = SoFar.of(folder, harvest.key)
    there.check(harvest.config)
    there.share(into, harvest.config)
    return there.n_tokens("train")


# With one part of training, with some, and with all but the last; 17: the text is at its end, and is split.
@pytest.mark.parametrize(("stop_at", "n_texts"), [(8, 200), (13, 200), (20, 200), (17, 90)])
def test_what_is_collected_is_a_harvest_of_fewer_tokens(
    tmp_path: Path, uninterrupted: tuple[ActivationShards, int], stop_at: int, n_texts: int
) -> None:
    texts, names = TEXTS[:n_texts], ("stopped", "few", "fresh", "whole")
    stopped, few, fresh, whole = (tmp_path / "h" / name for name in names)
    with pytest.raises(StoppedError):
        run(stopped, Reader(stop_at), texts)
    n_tokens = share(stopped, few, texts)
    assert SHARD_TOKENS <= n_tokens < TRAIN_TOKENS
    run(stopped, Reader(), texts)
    run(whole, Reader(), texts)
    assert content(stopped) == content(whole), "the harvest goes on as if nobody had shared it"
    run(few, no_reader, texts, train_tokens=n_tokens)
    shards = run(fresh, Reader(), texts, train_tokens=n_tokens)
    assert ("split" in shards.manifest["parts"]["heldout"]) == (n_texts == 90)
    assert content(few) == content(fresh), "nothing of the one is the other's"


def test_a_damaged_part_that_is_shared_is_read_again(
    tmp_path: Path, uninterrupted: tuple[ActivationShards, int]
) -> None:
    """By each for itself."""
    stopped, few, fresh = (tmp_path / "h" / name for name in ("stopped", "few", "fresh"))
    with pytest.raises(StoppedError):
        run(stopped, Reader(stop_at=18))
    damaged = stopped / "raw" / "train-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    n_tokens = share(stopped, few)
    again = Reader()
    run(few, again, train_tokens=n_tokens)
    run(fresh, Reader(), train_tokens=n_tokens)
    assert 0 < again.calls < 4
    assert content(few) == content(fresh)
    run(stopped, Reader())
    assert content(stopped) == content(uninterrupted[0].folder)


# In the held-out part, and where it is whole but no part of training is.
@pytest.mark.parametrize("stop_at", [0, 3, 6])
def test_nothing_to_share_yet(tmp_path: Path, stop_at: int) -> None:
    stopped, few = tmp_path / "h" / "stopped", tmp_path / "h" / "few"
    with pytest.raises(StoppedError):
        run(stopped, Reader(stop_at))
    with pytest.raises(ManifestError, match=r"(?s)so far: no training tokens.*got: .* 0 of training.*cure: run again"):
        share(stopped, few)
    assert not few.exists()
    with pytest.raises(ManifestError, match="another config"):
        SoFar.of(stopped, harvest_of(TEXTS, seed=1).key)


def test_sharing_leaves_the_harvest_its_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it goes on meanwhile; a copy of what is there is needed anyway."""
    stopped, few = tmp_path / "h" / "stopped", tmp_path / "h" / "few"
    with pytest.raises(StoppedError):
        run(stopped, Reader(stop_at=13))
    n_tokens = sum(SoFar.of(stopped, harvest_of(TEXTS).key).n_tokens(part) for part in ("heldout", "train"))
    # Beside the rows, a header each.
    copy = int(1.5 * n_tokens * D_IN * 4)
    monkeypatch.setattr("ksvd_sae.store.shutil.disk_usage", lambda _: Usage(10**6, 0, copy))
    with sole_writer(stopped, "harvest"), pytest.raises(DiskSpaceError, match="all that the harvest is to write"):
        share(stopped, few)
    assert not few.exists()
    share(stopped, few)
    monkeypatch.setattr("ksvd_sae.store.shutil.disk_usage", lambda _: Usage(10**6, 0, n_tokens * D_IN * 4))
    with pytest.raises(DiskSpaceError, match="shuffled shards"):
        share(stopped, few)


def test_sharing_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    with pytest.raises(StoppedError):
        run(tmp_path / "h" / "stopped", Reader(stop_at=13))
    monkeypatch.setattr("os.link", refuse)
    with pytest.raises(ManifestError, match=r"(?s)cannot be linked.*not permitted.*without hard links"):
        share(tmp_path / "h" / "stopped", tmp_path / "h" / "few")


# ---------------------------------------------------------------- refusals


# More than these documents have, and less than all of TEXTS have after the first 64.
MANY_TOKENS, FEW_TEXTS = 1200, TEXTS[:120]


def test_text_too_short_goes_on_once_there_is_more(tmp_path: Path) -> None:
    at_once, folder = Reader(), tmp_path / "stopped"
    whole = run(tmp_path / "whole", at_once, train_tokens=MANY_TOKENS)
    first = Reader()
    with pytest.raises(TextError) as caught:
        run(folder, first, FEW_TEXTS, train_tokens=MANY_TOKENS)
    assert "ended before 1,200 train tokens" in str(caught.value)
    done = finished_batches(folder)
    assert any(name.startswith("train") for name in raw_entries(folder))
    assert 0 < done <= first.calls
    # Asked again, nothing that is there is read again.
    second = Reader()
    with pytest.raises(TextError):
        run(folder, second, FEW_TEXTS, train_tokens=MANY_TOKENS)
    assert second.calls == first.calls - done
    last = Reader()
    run(folder, last, train_tokens=MANY_TOKENS)
    assert last.calls == at_once.calls - done
    assert content(folder) == content(whole.folder)


def test_text_too_short_says_the_same_when_asked_again(tmp_path: Path) -> None:
    messages = []
    for _ in range(2):
        with pytest.raises(TextError) as caught:
            run(tmp_path, Reader(), FEW_TEXTS, train_tokens=MANY_TOKENS)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_fewer_tokens_are_another_harvest(tmp_path: Path) -> None:
    """They are another content, so another folder, and what was collected before stays where it is."""
    folders = [harvest_of(None, train_tokens=n).folder(tmp_path) for n in (MANY_TOKENS, 300)]
    assert folders[0] != folders[1]
    with pytest.raises(TextError):
        run(folders[0], Reader(), TEXTS[:110], train_tokens=MANY_TOKENS)
    collected = raw_entries(folders[0])
    run(folders[1], Reader(), TEXTS[:110], train_tokens=300)
    assert raw_entries(folders[0]) == collected != {}


@pytest.mark.parametrize("texts", [[], ["", " "], ["1001 1002"]], ids=["none", "empty", "less than one context"])
def test_no_text(tmp_path: Path, texts: list[str]) -> None:
    reader = Reader()
    with pytest.raises(TextError, match="heldout"):
        run(tmp_path, reader, texts)
    assert reader.calls == 0


def test_text_that_is_all_used_up_by_the_heldout_part(tmp_path: Path) -> None:
    """The tokenizer takes 64 documents at once; what the held-out part leaves of 60 is not enough."""
    with pytest.raises(
        TextError, match=r"train tokens\n  got: \d+ tokens; .* keeps 117 tokens: 11 whole documents; training"
    ):
        run(tmp_path, Reader(), TEXTS[:60])


def test_broken_activations_stop_the_harvest_and_keep_what_was_whole(tmp_path: Path) -> None:
    class Broken(Reader):
        def read(self, tokens_BL: Tensor) -> Tensor:
            if self.calls == 9:
                raise ActivationError("NaN")
            return super().read(tokens_BL)

    with pytest.raises(ActivationError):
        run(tmp_path, Broken())
    assert finished_batches(tmp_path) >= 7


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_disk_is_what_is_stored_and_a_hundredth_at_most(tmp_path: Path, dtype: str) -> None:
    wide = 512

    class Wide(Reader):
        def read(self, tokens_BL: Tensor) -> Tensor:
            return super().read(tokens_BL).repeat(1, -(-wide // D_IN))[:, :wide]

    texts = numbered_texts(1000)
    shards = run(tmp_path, Wide(), texts, dtype=dtype, train_tokens=6000, shard_tokens=2048)
    stored = sum(ActivationShards.open(tmp_path, part).n_samples for part in ("train", "heldout"))
    n_bytes = stored * wide * getattr(torch, dtype).itemsize
    taken = sum(path.stat().st_size for path in shards.folder.rglob("*") if path.is_file())
    assert n_bytes < taken < 1.01 * n_bytes


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a harvest will need must be free at its start: one batch is read, nothing is written."""
    reader = Reader()
    needed = TRAIN_TOKENS * D_IN * 4
    monkeypatch.setattr("ksvd_sae.store.shutil.disk_usage", lambda _: Usage(10**6, 0, needed))
    with pytest.raises(DiskSpaceError, match="harvest: collecting"):
        run(tmp_path, reader)
    assert reader.calls == 1
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_disk_that_is_full_when_finishing(
    tmp_path: Path, uninterrupted: tuple[ActivationShards, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something else has filled it meanwhile."""
    with monkeypatch.context() as patch:
        patch.setattr(
            "ksvd_sae.store.shutil.disk_usage",
            lambda folder: Usage(10**6, 0, 10**6 if folder.name == "raw" else 100),
        )
        with pytest.raises(DiskSpaceError, match="shuffled shards"):
            run(tmp_path, Reader())
    assert not (tmp_path / "train").exists()
    run(tmp_path, no_reader)
    assert content(tmp_path) == content(uninterrupted[0].folder)


def test_unfinished_folder_of_another_config(tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        run(tmp_path, Reader(stop_at=10))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ManifestError, match="another config"):
        run(tmp_path, no_reader, seed=1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_finished_folder_of_another_config(tmp_path: Path) -> None:
    run(tmp_path, Reader())
    with pytest.raises(ManifestError, match="train_tokens: found 600, wanted 601"):
        run(tmp_path, no_reader, train_tokens=601)


# ---------------------------------------------------------------- a real model


# ---------------------------------------------------------------- BOS


class NoBOS(NumberTokenizer):
    """No token is a BOS, and none stands between documents."""

    bos_token_id = bos_token = eos_token_id = None


def reader_of(tokenizer: Any, default: bool = True) -> Reader:
    reader = Reader()
    reader.model.tokenizer, reader.model.cfg.default_prepend_bos = tokenizer, default
    return reader


class NamedBOS(NumberTokenizer):
    """As TransformerLens leaves a tokenizer without any: a BOS by a name that no token has, so another's id."""

    bos_token = "<|endoftext|>"


@pytest.mark.parametrize(
    ("wanted", "tokenizer", "default", "bos"),
    [
        ("auto", NumberTokenizer(), True, True),
        ("auto", NumberTokenizer(), False, False),
        ("auto", NoBOS(), True, False),
        ("auto", NamedBOS(), True, False),
        (True, NumberTokenizer(), False, True),
        (False, NumberTokenizer(), True, False),
        (False, NoBOS(), True, False),
    ],
)
def test_contexts_begin_with_a_bos_or_not(
    wanted: bool | str, tokenizer: Any, default: bool, bos: bool, tmp_path: Path
) -> None:
    seen: list[Tensor] = []
    reader = reader_of(tokenizer, default)
    read = reader.read

    def reading(tokens_BL: Tensor) -> Tensor:
        seen.append(tokens_BL)
        return read(tokens_BL)

    reader.read = reading  # type: ignore[method-assign]
    shards = run(tmp_path, reader, prepend_bos=wanted)
    assert shards.prepend_bos is bos
    tokens_CL = torch.cat(seen)
    assert bool((tokens_CL[:, 0] == BOS).all()) is bos
    # Nothing is between documents that no token is for.
    assert bool((tokens_CL == BOS).any()) is not isinstance(tokenizer, NoBOS)


@pytest.mark.parametrize("tokenizer", [NoBOS(), NamedBOS()])
def test_a_bos_that_the_tokenizer_lacks(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(TextError, match="no BOS") as caught:
        run(tmp_path, reader_of(tokenizer), prepend_bos=True)
    assert "harvest.prepend_bos" in str(caught.value.cure)


@pytest.mark.parametrize("stop_at", [0, 2, 9])
def test_a_stopped_harvest_without_bos_goes_on(stop_at: int, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", reader_of(NumberTokenizer(), default=False))
    reader = reader_of(NumberTokenizer(), default=False)
    reader.stop_at = stop_at
    with pytest.raises(StoppedError):
        run(tmp_path / "stopped", reader)
    reader.stop_at = None
    again = run(tmp_path / "stopped", reader)
    assert content(again.folder) == content(whole.folder)
    assert not again.prepend_bos


def test_a_harvest_from_before_goes_on_as_it_began(tmp_path: Path) -> None:
    """Its manifests and raw parts do not speak of BOS: all contexts had one."""
    reader = reader_of(NumberTokenizer(), default=True)
    reader.stop_at = 9
    with pytest.raises(StoppedError):
        run(tmp_path, reader)
    (tmp_path / "contexts.json").unlink()
    shards = run(tmp_path, reader_of(NumberTokenizer(), default=False))
    assert shards.prepend_bos
    assert torch.equal(shards.tensor(), run(tmp_path / "whole", Reader()).tensor())
    del shards.manifest["prepend_bos"]
    assert shards.prepend_bos


def test_only_what_is_asked_for_is_in_the_key() -> None:
    """What was harvested before there was a choice is found again."""
    choices: tuple[dict[str, Any], ...] = (
        {},
        {"prepend_bos": True},
        {"prepend_bos": False},
        {"keep_special_tokens": True},
    )
    keys = [harvest_of(None, **choice).key for choice in choices]
    assert not {"prepend_bos", "keep_special_tokens"} & keys[0]["harvest"].keys()
    assert len(set(map(content_hash, keys))) == len(choices)
    assert harvest_of(None, keep_special_tokens=False).key == keys[0]


@pytest.mark.parametrize(("wanted", "bos"), [("auto", False), (False, False), (True, True)])
def test_with_a_real_model(wanted: bool | str, bos: bool, tmp_path: Path, model: Any, tokenizer: Any) -> None:
    """GPT-NeoX was trained without a BOS, and its tokenizer has one."""
    hook = "blocks.8.hook_resid_post"
    texts = tiny_models.documents(100)
    shards = run(
        tmp_path,
        lambda: ActivationReader(model, hook),
        texts,
        model={"name": "tiny", "hook": hook},
        context_tokens=32,
        outlier_factor=None,
        prepend_bos=wanted,
    )
    assert shards.prepend_bos == heldout_shards(shards).prepend_bos == bos
    heldout = (shards.folder / HELDOUT_DOCUMENTS).read_text().splitlines()
    tokens_BL = torch.stack(list(contexts(iter(texts[len(heldout) :]), tokenizer, 32, prepend_bos=bos)))
    cache = model.run_with_cache(tokens_BL, names_filter=hook)[1]
    true_ND = cache[hook][tokens_BL != BOS][: shards.n_samples].detach().double()
    found_ND = shards.tensor().double()
    assert found_ND.shape == true_ND.shape == (shards.n_samples, tiny_models.D_MODEL)
    bound = tolerances.HOOK_AGAINST_TRANSFORMERS * float(true_ND.abs().max())
    # Shuffled, so by the nearest row. Batches of another size add in another order.
    distances_NN = torch.cdist(found_ND, true_ND)
    assert float(distances_NN.amin(dim=0).max()) <= bound
    assert float(distances_NN.amin(dim=1).max()) <= bound
