"""Documents from every source, and how they are packed into contexts."""

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ksvd_sae.activations.documents import TokenIds
from ksvd_sae.activations.language import ModelConfig
from ksvd_sae.activations.text import TextConfig, contexts, documents
from ksvd_sae.errors import HubError, TextError
from tests import tiny_models

BOS, EOS = 0, 99
# Tokens of each document. The tokenizer gets 64 documents at once: packing must go on from one such batch to the next.
SIZES = st.sampled_from((0, 1, 2, 7, 64, 65, 150)).flatmap(
    lambda n: st.lists(st.integers(1, 9), min_size=n, max_size=n)
)


class NumberTokenizer:
    """Tokens are numbers written out: '5 7' is [5, 7]."""

    bos_token_id: int | None = BOS
    eos_token_id: int | None = EOS

    def __call__(self, batch: list[str], *, add_special_tokens: bool, verbose: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [[int(word) for word in text.split()] for text in batch]}


def pack(texts: list[Any], context_tokens: int, tokenizer: Any = None, **options: Any) -> list[list[int]]:
    return [c.tolist() for c in contexts(iter(texts), tokenizer or NumberTokenizer(), context_tokens, **options)]


def numbered(sizes: list[int]) -> list[str]:
    """Documents of the given sizes; no token occurs twice."""
    numbers = iter(range(1, sum(sizes) + 1))
    return [" ".join(str(next(numbers)) for _ in range(size)) for size in sizes]


# ---------------------------------------------------------------- packing


@pytest.mark.parametrize(
    ("texts", "context_tokens", "expected"),
    [
        pytest.param(["1 2 3"], 4, [[0, 1, 2, 3]], id="exactly one"),
        pytest.param(["1 2 3 4"], 4, [[0, 1, 2, 3]], id="tail dropped"),
        pytest.param(["1 2"], 4, [], id="too short"),
        pytest.param(["1 2", "3 4 5"], 4, [[0, 1, 2, 0], [0, 3, 4, 5]], id="BOS between documents"),
        pytest.param(["1 2 3 4 5 6 7"], 4, [[0, 1, 2, 3], [0, 4, 5, 6]], id="one document over two"),
        pytest.param(["1", "2", "3", "4"], 8, [[0, 1, 0, 2, 0, 3, 0, 4]], id="four documents in one"),
        pytest.param(["1", "2 3"], 2, [[0, 1], [0, 0], [0, 2], [0, 3]], id="one token a context"),
        pytest.param([], 4, [], id="no documents"),
        pytest.param(["", ""], 4, [], id="empty documents"),
    ],
)
def test_packing(texts: list[str], context_tokens: int, expected: list[list[int]]) -> None:
    assert pack(texts, context_tokens) == expected


@pytest.mark.parametrize(
    ("texts", "context_tokens", "expected"),
    [
        pytest.param(["1 2 3 4"], 4, [[1, 2, 3, 4]], id="exactly one"),
        pytest.param(["1 2 3"], 4, [], id="too short"),
        pytest.param(["1 2", "3 4 5 6 7"], 4, [[1, 2, EOS, 3], [4, 5, 6, 7]], id="EOS between documents"),
        pytest.param(["1 2 3", "4"], 2, [[1, 2], [3, EOS]], id="EOS at the end"),
        pytest.param(["1 2", "3 4"], 2, [[1, 2], [EOS, 3]], id="EOS at the beginning"),
        pytest.param(["", "1 2"], 2, [[1, 2]], id="an empty document"),
        pytest.param([TokenIds([1, 2]), TokenIds([3, 4])], 2, [[1, 2], [3, 4]], id="ids that fill a context"),
        pytest.param([TokenIds([BOS, 1, 2])], 2, [[1, 2]], id="ids with a BOS"),
    ],
)
def test_packing_without_bos(texts: list[Any], context_tokens: int, expected: list[list[int]]) -> None:
    assert pack(texts, context_tokens, prepend_bos=False) == expected


def test_packing_with_neither_bos_nor_eos() -> None:
    tokenizer = NumberTokenizer()
    tokenizer.bos_token_id = tokenizer.eos_token_id = None
    assert pack(["1 2 3", "", "4 5 6"], 2, tokenizer, prepend_bos=False) == [[1, 2], [3, 4], [5, 6]]


@given(SIZES, st.integers(2, 17))
def test_nothing_is_lost_but_the_tail(sizes: list[int], context_tokens: int) -> None:
    packed = pack(numbered(sizes), context_tokens)
    assert all(len(context) == context_tokens and context[0] == BOS for context in packed)
    ordinary = [token for context in packed for token in context if token != BOS]
    assert ordinary == list(range(1, len(ordinary) + 1))
    # One BOS between documents; where documents end with a context, the next context's own BOS may serve.
    n_stream, n_packed = sum(sizes) + max(len(sizes) - 1, 0), sum(len(context) - 1 for context in packed)
    assert n_stream - n_packed < context_tokens - 1 + len(sizes) // 64


@given(SIZES, st.integers(2, 17))
def test_bos_stands_between_documents_and_nowhere_else(sizes: list[int], context_tokens: int) -> None:
    document = [i for i, size in enumerate(sizes) for _ in range(size)]
    for context in pack(numbered(sizes), context_tokens):
        for left, right in pairwise(context[1:]):
            if BOS not in (left, right):
                assert document[left - 1] == document[right - 1]
        for left, middle, right in zip(context[1:], context[2:], context[3:], strict=False):
            if middle == BOS:
                assert document[left - 1] + 1 == document[right - 1]


def test_packing_with_a_real_tokenizer(tokenizer: Any) -> None:
    texts = tiny_models.documents(20)
    bos = tokenizer.bos_token_id
    stream: list[int] = []
    for text in texts:
        stream += ([bos] if stream else []) + tokenizer(text)["input_ids"]
    expected = [[bos, *stream[i : i + 31]] for i in range(0, len(stream) - 30, 31)]
    assert pack(texts, 32, tokenizer) == expected


def test_documents_are_read_only_as_needed() -> None:
    drawn = 0

    def endless() -> Iterator[str]:
        nonlocal drawn
        while True:
            drawn += 1
            yield "1 2 3 4 5 6 7 8"

    next(contexts(endless(), NumberTokenizer(), 5))
    assert drawn <= 64


def test_tokenizer_without_bos() -> None:
    tokenizer = NumberTokenizer()
    tokenizer.bos_token_id = None
    with pytest.raises(TextError, match="BOS") as caught:
        pack(["1"], 4, tokenizer)
    assert "harvest.prepend_bos" in str(caught.value.cure)


# ---------------------------------------------------------------- folders


def read_folder(folder: Path, column: str = "text") -> list[str]:
    return list(documents(TextConfig(source="folder", dataset=str(folder), column=column), seed=0))


def test_folder_of_every_format(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("third\nwith two lines")
    rows = ["first", "se\u00e7ond \U0001f600"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row, "other": 1}) + "\n" for row in rows))
    (tmp_path / "b").mkdir()
    pandas.DataFrame({"text": ["in a subfolder"]}).to_parquet(tmp_path / "b" / "x.parquet")
    (tmp_path / "ignored.csv").write_text("text\nno\n")
    assert read_folder(tmp_path) == [*rows, "in a subfolder", "third\nwith two lines"]


def test_folder_with_another_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "yes", "text": "no"}\n')
    assert read_folder(tmp_path, "body") == ["yes"]


def test_folder_order_is_by_name(tmp_path: Path) -> None:
    for name in ("b", "c", "a"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert read_folder(tmp_path) == ["a", "b", "c"]


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"nowhere.*\n.*wrong path"):
        read_folder(tmp_path / "nowhere")


def test_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("text\nno\n")
    with pytest.raises(TextError, match=r"got: 1 with the ending \.csv\n.*under other endings\n.*text\.endings"):
        read_folder(tmp_path)
    (tmp_path / "data.csv").unlink()
    with pytest.raises(TextError, match="an empty folder"):
        read_folder(tmp_path)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_missing_column(tmp_path: Path, suffix: str) -> None:
    frame = pandas.DataFrame({"body": ["x"], "title": ["y"]})
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    with pytest.raises(TextError, match=rf"a\.{suffix}.*'text'\n.*body, title"):
        read_folder(tmp_path)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_truncated_file(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.{suffix}").write_text('{"text": "cut of')
    with pytest.raises(TextError, match=rf"a\.{suffix}"):
        read_folder(tmp_path)


def test_numbers_as_text_stay_as_written(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "007"}\n{"text": "1e3"}\n')
    assert read_folder(tmp_path) == ["007", "1e3"]


def test_rows_without_text_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "yes"}\n{"text": null}\n{"other": 1}\n')
    assert read_folder(tmp_path) == ["yes"]


# ---------------------------------------------------------------- other sources


HUB = TextConfig(source="hub", dataset="owner/name", column="body")


def hub_rows(monkeypatch: pytest.MonkeyPatch, *rows: dict[str, object]) -> None:
    """Lets the Hub's data set have these rows."""
    monkeypatch.setattr("datasets.load_dataset", lambda name, split, streaming: rows)


def test_hub_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_rows(monkeypatch, {"body": "one", "id": 1}, {"body": "two", "id": 2})
    assert list(documents(HUB, seed=0)) == ["one", "two"]


def test_hub_data_set_without_the_column(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_rows(monkeypatch, {"text": "one", "id": 1})
    with pytest.raises(TextError, match=r"(?s)owner/name.*'body'.*text, id.*text\.column"):
        documents(HUB, seed=0)


def test_hub_data_set_without_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_rows(monkeypatch)
    with pytest.raises(TextError, match="empty"):
        documents(HUB, seed=0)


def test_hub_data_set_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, **_: object) -> None:
        raise ConnectionError(f"no way to {name}\nand a second line")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(HubError, match=r"(?s)'owner/name'.*ConnectionError: no way.*source: folder") as caught:
        documents(HUB, seed=0)
    assert "second line" not in str(caught.value)


def test_bbc_news_documents_are_the_harvest_half() -> None:
    texts = list(documents(TextConfig(source="bbc-news"), seed=0))
    assert len(texts) == len(set(map(id, texts))) > 1000
    assert texts != list(documents(TextConfig(source="bbc-news"), seed=1))
    assert sorted(texts) == sorted(documents(TextConfig(source="bbc-news"), seed=1))
    assert list(documents(TextConfig(source="bbc-news", skip_documents=3), seed=0)) == texts[3:]
    assert not list(documents(TextConfig(source="bbc-news", skip_documents=10_000), seed=0))


def test_skipping_is_a_key_where_it_is_asked_for() -> None:
    assert "skip_documents" not in TextConfig(source="bbc-news").model_dump(mode="json")
    assert TextConfig(source="bbc-news", skip_documents=3).model_dump(mode="json")["skip_documents"] == 3


def test_examples_of_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "accepts.md").read_text()
    examples = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    sections = [yaml.safe_load(example) for example in examples]
    texts = [TextConfig.model_validate(section["text"]) for section in sections if "text" in section]
    models = [ModelConfig.model_validate(section["model"]) for section in sections if "model" in section]
    assert len(texts) >= 3
    assert [bool(model.weights) for model in models].count(True) == 2
    assert all("text" in section or "model" in section for section in sections)
