"""Documents in, contexts of tokens out."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ksvd_sae.errors import HubError, TextError
from ksvd_sae.offline import bbc_news
from ksvd_sae.store import file_sha256
from ksvd_sae.strict import Strict

logger = logging.getLogger(__name__)
_TOKENISER_BATCH = 64


class TextConfig(Strict):
    """Where documents come from."""

    source: Literal["hub", "folder", "bbc-news"] = Field(
        "hub", description="hub: a data set on the Hub; folder: local files; bbc-news: 2,225 articles from a package"
    )
    dataset: str | None = Field(None, description="Hub name, or the folder's path")
    split: str = "train"
    column: str = "text"
    streaming: bool = True

    @model_validator(mode="after")
    def _named(self) -> "TextConfig":
        if self.source != "bbc-news" and not self.dataset:
            raise ValueError(f"text.source {self.source!r} needs text.dataset")
        return self

    @property
    def name(self) -> str:
        """The true name of the text."""
        return self.source if self.source == "bbc-news" else Path(str(self.dataset)).name

    def content_hash(self) -> str | None:
        """Of the documents, where they are known before they are read."""
        if self.source == "bbc-news":
            return bbc_news.corpus_hash()
        return text_folder_hash(Path(str(self.dataset)).expanduser()) if self.source == "folder" else None


def documents(config: TextConfig, seed: int) -> Iterator[str]:
    """The documents of a text source, in a fixed order.

    bbc-news: the half of the articles set aside for harvests, shuffled by ``seed``. folder: every
    .txt file, or the rows of .jsonl / .parquet files, in the order of their names. hub: the data set's
    own order.

    Raises: TextError (no such folder, no text in it), HubError (not reachable, no such data set or column).
    """
    if config.source == "bbc-news":
        return iter([article.text for article in bbc_news.harvest_articles(seed)])
    if config.source == "folder":
        return _read_files(_text_files(Path(str(config.dataset)).expanduser()), config.column)
    return _hub_documents(config)


def _text_files(folder: Path) -> list[Path]:
    files = [p for p in folder.rglob("*") if p.suffix in (".txt", ".jsonl", ".parquet")] if folder.is_dir() else []
    if not files:
        raise TextError(
            f"text folder {folder}: no .txt, .jsonl or .parquet file there",
            cause="a wrong path" if not folder.is_dir() else "an empty folder",
            cure="set text.dataset to a folder with text files",
        )
    return sorted(files)


def _read_files(files: list[Path], column: str) -> Iterator[str]:
    """Texts of the files in turn; rows whose text is null or missing are no documents."""
    for path in files:
        if path.suffix == ".txt":
            yield path.read_text(errors="replace")
            continue
        try:
            rows = _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
        except (ValueError, OSError) as error:
            raise TextError(f"text file {path}: {error}", cause="a truncated or misnamed file") from error
        if rows and not any(column in row for row in rows):
            raise TextError(f"text file {path}: no column {column!r}", got=", ".join(map(str, rows[0])))
        yield from (str(row[column]) for row in rows if row.get(column) is not None)


def _json_rows(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is not a JSON object")
    return rows


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


def text_folder_hash(folder: Path) -> str:
    """Hash of the names and contents of a folder's text files, for manifests."""
    digest = hashlib.sha256()
    for path in _text_files(folder):
        digest.update(f"{path.relative_to(folder)}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()[:12]


def _hub_documents(config: TextConfig) -> Iterator[str]:
    rows = load_hub_dataset(str(config.dataset), config.split, streaming=config.streaming)
    first = next(iter(rows), None)
    if first is None:
        raise TextError(f"data set {config.dataset!r}, split {config.split!r}: empty")
    if config.column not in first:
        raise TextError(
            f"data set {config.dataset!r}: no column {config.column!r}", got=", ".join(first), cure="set text.column"
        )
    return (str(row[config.column]) for row in rows if row.get(config.column) is not None)


def load_hub_dataset(name: str, split: str, *, streaming: bool) -> Iterable[dict[str, Any]]:
    """A data set by Hub name (or a local folder of that name), with errors that say what to do."""
    import datasets

    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(name, split=split, streaming=streaming)
        return rows
    # datasets raises many types for "no network" and "no such data set"; none carries the cure.
    except Exception as error:
        raise HubError(
            f"loading data set {name!r} (split {split!r}): {type(error).__name__}: {str(error).splitlines()[0][:300]}",
            cause="no network, HF_HUB_OFFLINE=1, a wrong name, or a data set that needs `hf auth login`",
            cure="check with `ksvd-sae doctor`; for local text use text.source: folder",
        ) from error


def contexts(texts: Iterator[str], tokenizer: Any, context_tokens: int) -> Iterator[Tensor]:
    """Pack documents into contexts of exactly ``context_tokens`` tokens.

    Each context starts with BOS; inside, documents follow each other with a BOS between them. The rest
    of the last document that does not fill a context is dropped.

    Raises: TextError if the tokenizer has no BOS token.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        raise TextError("packing text: the tokenizer has no BOS token", got=type(tokenizer).__name__)
    waiting: list[int] = []
    while batch := list(islice(texts, _TOKENISER_BATCH)):
        # verbose=False: a document longer than the model's context is cut here, so no warning.
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            if waiting:
                waiting.append(bos)
            waiting += ids
        step = context_tokens - 1
        n_full = len(waiting) // step
        for start in range(0, n_full * step, step):
            yield torch.tensor([bos, *waiting[start : start + step]])
        waiting = waiting[n_full * step :]
