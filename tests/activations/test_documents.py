"""Columns that hold text, token ids or chats are read as such; whatever else one holds is refused, never its repr."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch

from ksvd_sae.activations.documents import Chat, Document, TokenIds, document, read_documents, write_documents
from ksvd_sae.activations.harvest import HELDOUT_DOCUMENTS, Harvest, HarvestConfig, run_harvest
from ksvd_sae.activations.language import ActivationReader, ModelConfig
from ksvd_sae.activations.text import TextConfig, contexts, documents
from ksvd_sae.activations.token_ids import check_tokenizer
from ksvd_sae.errors import TextError
from tests import tiny_models
from tests.activations.test_harvest import heldout_shards

HOOK = "blocks.0.hook_resid_post"
CHAT = [{"role": "user", "content": "Ba co di?"}, {"role": "assistant", "content": "Fu ga."}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
    "{{ raise_exception('only user and assistant') }}{% endif %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
)


def write_rows(path: Path, rows: list[Any], column: str = "text") -> TextConfig:
    """A data set of one column."""
    if path.suffix == ".parquet":
        pandas.DataFrame({column: rows}).to_parquet(path)
    else:
        path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    return TextConfig(source="folder", dataset=str(path), column=column)


def pack(texts: list[Document], tokenizer: Any, context_tokens: int = 8, **options: Any) -> list[list[int]]:
    return [c.tolist() for c in contexts(iter(texts), tokenizer, context_tokens, **options)]


@pytest.fixture
def chatting(neox_folder: Path) -> Any:
    """The tokenizer of a model that was tuned on chats."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(neox_folder)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


# ---------------------------------------------------------------- token ids


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_token_ids_are_used_as_they_are(tmp_path: Path, tokenizer: Any, suffix: str) -> None:
    rows = [tokenizer(text)["input_ids"] for text in tiny_models.documents(4)]
    read = list(documents(write_rows(tmp_path / f"a.{suffix}", rows, "input_ids"), 0))
    assert [d.ids for d in read if isinstance(d, TokenIds)] == rows
    bos = tokenizer.bos_token_id
    stream = [*rows[0], bos, *rows[1], bos, *rows[2], bos, *rows[3]]
    assert pack(read, tokenizer) == [[bos, *stream[i : i + 7]] for i in range(0, len(stream) - 6, 7)]


def test_contexts_that_were_packed_before_stay_as_they_are(tokenizer: Any) -> None:
    """Rows that begin with a BOS and fill a context, as SAELens writes them."""
    packed = pack([*tiny_models.documents(6)], tokenizer)
    assert len(packed) > 64
    assert pack([TokenIds(row) for row in packed], tokenizer) == packed


def test_token_ids_and_text_give_the_same_activations(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    texts = tiny_models.documents(8)
    sizes = HarvestConfig(train_tokens=300, heldout_tokens=60, context_tokens=16, batch_contexts=2)

    def harvested(rows: list[Any], name: str) -> Any:
        config = write_rows(tmp_path / f"{name}.jsonl", rows)
        harvest = Harvest(ModelConfig(name="tiny", hook=HOOK), config, sizes, 0)
        return run_harvest(harvest, tmp_path / name, lambda: ActivationReader(model, HOOK))

    # One document each: ids are packed by the row, texts 64 at a time.
    by_text = harvested([" ".join(texts)], "texts")
    by_ids = harvested([tokenizer(" ".join(texts))["input_ids"]], "ids")
    assert torch.equal(by_text.tensor(), by_ids.tensor())
    assert torch.equal(heldout_shards(by_text).tensor(), heldout_shards(by_ids).tensor())
    (held,) = read_documents(tmp_path / "ids" / HELDOUT_DOCUMENTS)
    assert isinstance(held, TokenIds)
    line = json.loads((tmp_path / "ids" / HELDOUT_DOCUMENTS).read_text())
    assert " ".join(texts).startswith(line["text"].rstrip("\ufffd"))


@pytest.mark.parametrize(
    ("ids", "got", "limit"),
    [
        ([1, 2, tiny_models.VOCABULARY_SIZE], "512, the 3. of 3 ids", "0 to 511"),
        ([1, -100, 2], "-100, the 2. of 3 ids", "0 to 511"),
        ([50256], "50256, the 1. of 1 ids", "0 to 511"),
    ],
)
def test_ids_that_the_model_lacks(tokenizer: Any, ids: list[int], got: str, limit: str) -> None:
    with pytest.raises(TextError, match=r"row 7: token id -?\d+ is none of the model's") as caught:
        pack([TokenIds(ids, "row 7")], tokenizer, n_vocabulary=tiny_models.VOCABULARY_SIZE)
    assert (caught.value.got, caught.value.limit) == (got, limit)


def test_ids_that_the_model_lacks_stop_a_harvest_before_it_reads(tmp_path: Path, model: Any) -> None:
    config = write_rows(tmp_path / "a.jsonl", [[1, 2, 3, 600] * 100])
    sizes = HarvestConfig(train_tokens=300, heldout_tokens=60, context_tokens=16, batch_contexts=2)
    harvest = Harvest(ModelConfig(name="tiny", hook=HOOK), config, sizes, 0)
    with pytest.raises(TextError, match=r"a\.jsonl, line 1: token id 600"):
        run_harvest(harvest, tmp_path / "harvest", lambda: ActivationReader(model, HOOK))


def tokenised_by(folder: Path, name: str) -> TextConfig:
    """A data set that SAELens tokenised, and its note by which tokenizer."""
    config = write_rows(folder / "a.jsonl", [[1, 2, 3]])
    (folder / "sae_lens.json").write_text(json.dumps({"tokenizer_name": name, "context_size": 8}))
    return config.model_copy(update={"dataset": str(folder)})


def test_ids_of_the_models_own_tokenizer(
    tmp_path: Path, tokenizer: Any, neox_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_tokenizer(tokenised_by(tmp_path, str(neox_folder)), TokenIds([1]), tokenizer)
    # The same vocabulary under another name.
    (tmp_path / "copy").mkdir()
    tokenizer.save_pretrained(tmp_path / "copy")
    check_tokenizer(tokenised_by(tmp_path, str(tmp_path / "copy")), TokenIds([1]), tokenizer)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_ids_of_another_tokenizer(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "other").mkdir()
    tiny_models.byte_pair_tokenizer(300).save_pretrained(tmp_path / "other")
    with pytest.raises(TextError, match="of another tokenizer") as caught:
        check_tokenizer(tokenised_by(tmp_path, str(tmp_path / "other")), TokenIds([1]), tokenizer)
    assert "300 tokens" in str(caught.value.got)
    assert "512 tokens" in str(caught.value.limit)


@pytest.mark.parametrize("named", [None, "nowhere"])
def test_ids_of_a_tokenizer_that_is_not_known(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture, named: str | None
) -> None:
    """What they say to the model is shown."""
    config = tokenised_by(tmp_path, str(tmp_path / "nowhere"))
    if named is None:
        (tmp_path / "sae_lens.json").unlink()
    text = "Ba co di"
    check_tokenizer(config, TokenIds(tokenizer(text)["input_ids"]), tokenizer)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert repr(text) in warning
    assert ("nowhere" in warning) == (named is not None)


# ---------------------------------------------------------------- chats


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_chats_go_through_the_models_template(tmp_path: Path, chatting: Any, suffix: str) -> None:
    read = list(documents(write_rows(tmp_path / f"a.{suffix}", [CHAT], "messages"), 0))
    text = "<user>Ba co di?\n<assistant>Fu ga.\n"
    assert pack(read, chatting, 4) == pack([text], chatting, 4)


def test_a_chat_with_keys_that_arrow_adds(chatting: Any) -> None:
    """In a table, every message has the keys of all; those that it lacks are None."""
    given = document([{"role": "user", "content": "Ba", "name": None}, CHAT[1]], "messages", "row 1")
    assert given == Chat([{"role": "user", "content": "Ba"}, CHAT[1]], "row 1")
    assert pack([given], chatting, 4) == pack(["<user>Ba\n<assistant>Fu ga.\n"], chatting, 4)


def test_held_out_chats_are_listed_as_the_model_reads_them(tmp_path: Path, model: Any, chatting: Any) -> None:
    rows = [[{"role": "user", "content": text}, CHAT[1]] for text in tiny_models.documents(70)]
    model.tokenizer = chatting
    harvest = Harvest(
        ModelConfig(name="tiny", hook=HOOK),
        write_rows(tmp_path / "a.jsonl", rows),
        HarvestConfig(train_tokens=300, heldout_tokens=60, context_tokens=16, batch_contexts=2, gradient_tokens=50),
        0,
    )
    run_harvest(harvest, tmp_path / "harvest", lambda: ActivationReader(model, HOOK))
    held = list(read_documents(tmp_path / "harvest" / HELDOUT_DOCUMENTS))
    assert held == [f"<user>{row[0]['content']}\n<assistant>Fu ga.\n" for row in rows[: len(held)]]


def test_a_chat_and_a_model_without_template(tokenizer: Any) -> None:
    with pytest.raises(TextError, match=r"(?s)row 3: a chat.*no chat template.*2 messages.*tuned on chats"):
        pack([document(CHAT, "messages", "row 3")], tokenizer)


def test_a_chat_that_the_template_refuses(chatting: Any) -> None:
    chat = [{"role": "system", "content": "Be."}, *CHAT]
    with pytest.raises(TextError, match=r"(?s)row 3: .*refuses the chat: only user and assistant.*system, user"):
        pack([document(chat, "messages", "row 3")], chatting)


@pytest.mark.parametrize(
    "chat",
    [
        pytest.param([{"from": "human", "value": "Ba?"}], id="ShareGPT"),
        pytest.param([{"role": "user", "content": [{"type": "image"}]}], id="parts"),
        pytest.param([{"role": "assistant", "content": None, "tool_calls": []}], id="calls of tools"),
        pytest.param([{"question": "Ba?", "answer": "Co."}], id="no chat"),
    ],
)
def test_messages_of_another_kind(chat: list[Any]) -> None:
    with pytest.raises(TextError, match=r"(?s)row 2: column 'messages'.*'role'.*'content'.*rename"):
        document(chat, "messages", "row 2")


# ---------------------------------------------------------------- anything else


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (7, "int: 7"),
        (0.5, "float: 0.5"),
        (True, "bool: True"),
        (b"bytes", "bytes: b'bytes'"),
        ({"en": "yes", "de": "ja"}, "dict: {'en': 'yes', 'de': 'ja'}"),
        (["two", "words"], "list of str: ['two', 'words']"),
        ([0.1, 0.2], "list of float: [0.1, 0.2]"),
        ([True, False], "list of bool: [True, False]"),
        ([[1, 2], [3]], "list of list: [[1, 2], [3]]"),
        ([1, "2"], "list of int and str: [1, '2']"),
        ([{"role": "user", "content": "a"}, 3], "list of dict and int: [{'role': 'user', 'content': 'a'}, 3]"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, value: Any, got: str) -> None:
    with pytest.raises(
        TextError, match=r"(?s)row 5: column 'x' holds no text.*limit: .*cure: set text\.column"
    ) as caught:
        document(value, "x", "row 5")
    assert caught.value.got == got


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_column_of_numbers_is_refused_with_its_row(tmp_path: Path, suffix: str) -> None:
    config = write_rows(tmp_path / f"a.{suffix}", [3, 4], "label")
    with pytest.raises(TextError, match=rf"a\.{suffix}, (line|row) 1: column 'label' holds no text\n  got: int: 3"):
        list(documents(config, 0))


def test_one_bad_row_among_good_ones(tmp_path: Path) -> None:
    read = documents(write_rows(tmp_path / "a.jsonl", ["yes", {"no": 1}]), 0)
    assert next(read) == "yes"
    with pytest.raises(TextError, match=r"a\.jsonl, line 2: "):
        next(read)


def test_numpys_whole_numbers_are_token_ids() -> None:
    assert document([np.int64(3), np.int32(4)], "ids", "row 1") == TokenIds([3, 4], "row 1")
    assert document((), "ids", "row 1") == TokenIds([], "row 1")


def test_listed_documents_are_read_back(tmp_path: Path, tokenizer: Any) -> None:
    bos = tokenizer.bos_token_id
    given = ["one\u2028line", "", TokenIds([bos, *tokenizer("Ba co")["input_ids"]])]
    write_documents(tmp_path / "a.jsonl", given, tokenizer)
    assert [d.ids if isinstance(d, TokenIds) else d for d in read_documents(tmp_path / "a.jsonl")] == [
        *given[:2],
        given[2].ids,  # type: ignore[union-attr]
    ]
    # Whoever reads texts finds one in every line.
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().split("\n")[:-1]]
    assert [line["text"] for line in lines] == ["one\u2028line", "", "Ba co"]


def test_documents_are_written_whole_or_not_at_all(tmp_path: Path, tokenizer: Any) -> None:
    """Stopped in between, those of before are there."""

    def stopped() -> Iterator[str]:
        yield "two"
        raise KeyboardInterrupt

    write_documents(tmp_path / "a.jsonl", ["one"], tokenizer)
    with pytest.raises(KeyboardInterrupt):
        write_documents(tmp_path / "a.jsonl", stopped(), tokenizer)
    assert list(read_documents(tmp_path / "a.jsonl")) == ["one"]
