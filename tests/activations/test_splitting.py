"""Texts of few long documents: held-out and training part share documents, never tokens, and the rest is as it was."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ksvd_sae.activations.documents import Document, Readable, TokenIds, read_documents
from ksvd_sae.activations.gradients import collect_gradient_moments, gradients_key, open_gradients
from ksvd_sae.activations.harvest import HELDOUT_DOCUMENTS, run_harvest
from ksvd_sae.activations.language import ActivationReader
from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.activations.splitting import Split
from ksvd_sae.activations.text import Packing, TextConfig, contexts
from ksvd_sae.errors import TextError
from ksvd_sae.store import MANIFEST, content_hash
from tests import tiny_models
from tests.activations.test_harvest import (
    BATCH_CONTEXTS,
    BOS,
    CONTEXT_TOKENS,
    DOCUMENT,
    HELDOUT_TOKENS,
    TRAIN_TOKENS,
    WORD,
    WORDS,
    NumberTokenizer,
    Reader,
    StoppedError,
    content,
    harvest_of,
    heldout_shards,
    no_reader,
    run,
)

HOOK = "blocks.8.hook_resid_post"
# What the held-out part reads: whole batches of contexts.
BATCH_TOKENS = BATCH_CONTEXTS * (CONTEXT_TOKENS - 1)
READ_TOKENS = -(-HELDOUT_TOKENS // BATCH_TOKENS) * BATCH_TOKENS


def long_texts(n: int, words: int) -> list[str]:
    """Documents of so many words each that know where they are from."""
    return [" ".join(str(d * WORDS + w) for w in range(1, words + 1)) for d in range(1, n + 1)]


def tokens_of(shards: ActivationShards) -> list[tuple[int, int]]:
    """(document, word) of every activation."""
    return sorted(map(tuple, shards.tensor()[:, [DOCUMENT, WORD]].int().tolist()))


# ---------------------------------------------------------------- harvests


def test_one_book(tmp_path: Path) -> None:
    """One document: the held-out part has its beginning, training what comes a context after that."""
    shards = run(tmp_path, Reader(), long_texts(1, 900))
    heldout, trained = tokens_of(heldout_shards(shards)), tokens_of(shards)
    assert heldout == [(1, word) for word in range(1, READ_TOKENS + 1)]
    first = READ_TOKENS + CONTEXT_TOKENS + 1
    assert trained == [(1, word) for word in range(first, first + len(trained))]
    assert len(trained) >= TRAIN_TOKENS
    # What evals read of it is what no dictionary has seen.
    (listed,) = read_documents(tmp_path / HELDOUT_DOCUMENTS)
    assert isinstance(listed, str)
    assert listed.split() == long_texts(1, READ_TOKENS)[0].split()


def test_forty_long_documents(tmp_path: Path) -> None:
    """Documents beyond the one that the held-out part needs are whole, and training's."""
    texts = long_texts(40, 300)
    shards = run(tmp_path, Reader(), texts)
    assert {document for document, _ in tokens_of(heldout_shards(shards))} == {1}
    assert {document for document, _ in tokens_of(shards)} == {2, 3, 4}
    assert [len(str(t).split()) for t in read_documents(tmp_path / HELDOUT_DOCUMENTS)] == [READ_TOKENS]
    assert shards.manifest["parts"]["heldout"]["split"] == {
        "drawn": 40,
        "whole": 0,
        "cut_tokens": READ_TOKENS,
        "gap_tokens": CONTEXT_TOKENS,
    }


def test_documents_after_the_drawn_ones_come_first(tmp_path: Path) -> None:
    """64 short documents that the held-out part draws, and long ones after them that do not suffice."""
    texts = [*long_texts(64, 10), " ".join(str(100 * WORDS + w) for w in range(1, 401))]
    shards = run(tmp_path, Reader(), texts)
    trained = tokens_of(shards)
    assert {(100, word) for word in range(1, 401)} <= set(trained)
    heldout = {document for document, _ in tokens_of(heldout_shards(shards))}
    assert heldout.isdisjoint(document for document, _ in trained if document not in (max(heldout), 100))
    assert min(document for document, _ in trained) > max(heldout)


@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_no_token_is_in_both_parts(tmp_path: Path, n: int) -> None:
    shards = run(tmp_path, Reader(), long_texts(n, 900 // n + 10))
    heldout, trained = tokens_of(heldout_shards(shards)), tokens_of(shards)
    assert set(heldout).isdisjoint(trained)
    assert len(set(trained)) == len(trained) >= TRAIN_TOKENS
    listed = [int(word) for text in read_documents(tmp_path / HELDOUT_DOCUMENTS) for word in str(text).split()]
    assert set(heldout) <= {divmod(token, WORDS) for token in listed}
    assert {divmod(token, WORDS) for token in listed}.isdisjoint(trained)


def test_it_says_where_the_text_went(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path / "enough", Reader(), long_texts(1, 900))
    assert f"keeps {READ_TOKENS} tokens: the first {READ_TOKENS} tokens of one" in caplog.text
    assert f"a gap of {CONTEXT_TOKENS} tokens" in caplog.text
    reader = Reader()
    with pytest.raises(TextError) as caught:
        run(tmp_path / "short", reader, long_texts(1, 400))
    left = (400 - READ_TOKENS - CONTEXT_TOKENS) // (CONTEXT_TOKENS - 1) * (CONTEXT_TOKENS - 1)
    assert caught.value.got == (
        f"{left} tokens; the held-out part keeps {READ_TOKENS} tokens: the first {READ_TOKENS} tokens of one; "
        f"training has all that follows, in the one that is cut after a gap of {CONTEXT_TOKENS} tokens"
    )
    # Nothing of what would not be enough is read.
    assert reader.calls == READ_TOKENS // BATCH_TOKENS


def test_a_text_that_suffices_is_not_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = run(tmp_path, Reader(), long_texts(120, 12))
    assert "split" not in shards.manifest["parts"]["heldout"]
    assert len(list(read_documents(tmp_path / HELDOUT_DOCUMENTS))) == 64
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("stop_at", [0, 2, 4, 5, 6, 9, 15])
@pytest.mark.parametrize("texts", [long_texts(1, 900), long_texts(90, 10)], ids=["one book", "ninety"])
def test_a_stopped_harvest_goes_on_to_the_same_bits(tmp_path: Path, stop_at: int, texts: list[str]) -> None:
    whole = run(tmp_path / "whole", Reader(), texts)
    with pytest.raises(StoppedError):
        run(tmp_path / "stopped", Reader(stop_at), texts)
    run(tmp_path / "stopped", Reader(), texts)
    assert content(tmp_path / "stopped") == content(whole.folder)
    run_harvest(harvest_of(None), tmp_path / "stopped", no_reader)


def test_token_ids_are_split_as_text_is(tmp_path: Path) -> None:
    (book,) = long_texts(1, 900)
    ids = TokenIds([int(word) for word in book.split()], "row 1")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": ids.ids}) + "\n")
    text = TextConfig(source="folder", dataset=str(tmp_path / "a.jsonl"))
    given = replace(harvest_of(None), text=text, documents=tuple(text.documents(0)))
    shards = run_harvest(given, tmp_path / "ids", Reader())
    as_text = run(tmp_path / "text", Reader(), [book])
    assert torch.equal(shards.tensor(), as_text.tensor())
    (listed,) = read_documents(tmp_path / "ids" / HELDOUT_DOCUMENTS)
    assert listed == TokenIds(ids.ids[:READ_TOKENS])


def test_gradients_are_of_the_training_text(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    book = " ".join(tiny_models.documents(40))
    given = harvest_of(
        [book],
        model={"name": "tiny", "hook": HOOK},
        context_tokens=16,
        outlier_factor=None,
        gradient_tokens=200,
        prepend_bos=True,
    )
    reader = ActivationReader(model, HOOK)
    shards = run_harvest(given, tmp_path, lambda: reader)
    split = shards.manifest["parts"]["heldout"]["split"]
    ids = tokenizer(book)["input_ids"][split["cut_tokens"] + split["gap_tokens"] :]
    true = collect_gradient_moments(reader, contexts(iter([TokenIds(ids)]), tokenizer, 16), 200, 4)
    found = open_gradients(tmp_path, gradients_key(content_hash(given.key), given.config))
    assert torch.equal(found.outer_DD, true.outer_DD)


def test_heldout_text_of_a_real_tokenizer(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    """The listed text is the book's beginning, letter by letter; only where it ends may a word be other tokens."""
    book = " ".join(tiny_models.documents(40))
    reader = ActivationReader(model, HOOK)
    shards = run(tmp_path, lambda: reader, [book], model={"name": "tiny", "hook": HOOK}, context_tokens=16)
    (listed,) = read_documents(tmp_path / HELDOUT_DOCUMENTS)
    assert isinstance(listed, str)
    assert book.startswith(listed)
    kept = shards.manifest["parts"]["heldout"]["split"]["cut_tokens"]
    assert tokenizer(listed)["input_ids"][: kept - 4] == tokenizer(book)["input_ids"][: kept - 4]


def test_the_manifest_says_so(tmp_path: Path) -> None:
    run(tmp_path, Reader(), long_texts(1, 900))
    assert json.loads((tmp_path / MANIFEST).read_text())["parts"]["heldout"]["split"]["whole"] == 0


# ---------------------------------------------------------------- the split itself


@given(st.lists(st.integers(0, 30), min_size=1, max_size=70), st.integers(0, 40), st.integers(2, 12), st.booleans())
def test_every_token_is_kept_left_out_in_the_gap_or_given_to_training(
    sizes: list[int], n_contexts: int, context_tokens: int, bos: bool
) -> None:
    numbers = iter(range(1, sum(sizes) + 1))
    drawn: list[Readable] = [" ".join(str(next(numbers)) for _ in range(size)) for size in sizes]
    tokenizer = NumberTokenizer()
    packed = list(contexts(iter(drawn), tokenizer, context_tokens, prepend_bos=bos))
    n_contexts = min(n_contexts, len(packed))
    used = [token for context in packed[:n_contexts] for token in context.tolist() if token != BOS]
    split = Split.after(n_contexts, drawn, tokenizer, Packing.of(tokenizer, context_tokens, bos))
    kept = [number for text in split.heldout(drawn, tokenizer) for number in numbers_of(text)]
    assert kept == used == list(range(1, len(used) + 1))
    after: Iterator[Document] = iter(["1000000"])
    trained = [number for text in split.training([*drawn], after, tokenizer) for number in numbers_of(text)]
    assert trained[0] == 1000000
    # The rest of the cut document comes last.
    assert len(trained) == len(set(trained))
    missing = set(range(len(used) + 1, sum(sizes) + 1)) - set(trained)
    assert len(missing) <= (context_tokens if split.cut_tokens else 0)
    assert sorted(missing) == list(range(len(used) + 1, len(used) + 1 + len(missing)))


def numbers_of(document: Any) -> list[int]:
    return document.ids if isinstance(document, TokenIds) else [int(word) for word in document.split()]


def test_packing_does_not_depend_on_how_much_is_tokenised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*long_texts(5, 40), "", *long_texts(70, 3)]
    whole = [c.tolist() for c in contexts(iter(texts), NumberTokenizer(), 7)]
    for size in (1, 50, 10**4):
        monkeypatch.setattr("ksvd_sae.activations.text._TOKENISER_CHARACTERS", size)
        assert [c.tolist() for c in contexts(iter(texts), NumberTokenizer(), 7)] == whole
    assert len(list(chain(*whole))) > 0
