"""Documents in, contexts of tokens out."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor

from ksvd_sae.activations.documents import Document, TokenIds, readable, without_bos
from ksvd_sae.activations.text_datasets import FORMATS, HubDataset, SavedDataset, is_saved
from ksvd_sae.activations.text_files import TextFiles, text_files
from ksvd_sae.errors import TextError
from ksvd_sae.offline import bbc_news
from ksvd_sae.strict import Strict

if TYPE_CHECKING:
    from ksvd_sae.activations.language import AnyModel

_TOKENISER_BATCH = 64
# Of such a batch at once: documents can be books.
_TOKENISER_CHARACTERS = 1 << 20
_OF_HUB, _OF_FOLDERS = ("config", "revision", "data_files"), ("endings",)


class TextConfig(Strict):
    """Where documents come from."""

    source: Literal["hub", "folder", "bbc-news"] = Field(
        "hub", description="hub: a data set on the Hub; folder: local files; bbc-news: 2,225 articles from a package"
    )
    dataset: str | None = Field(
        None, description="Hub name, or the path of a folder, of one file, or of what a data set's save_to_disk wrote"
    )
    split: str = "train"
    column: str = Field("text", description="holds texts, token ids of the model's tokenizer, or chats")
    streaming: bool = True
    config: str | None = Field(None, description="which one of a data set that has several, e.g. wikitext-103-raw-v1")
    revision: str | None = Field(None, description="commit, branch or tag on the Hub; null: the newest")
    data_files: str | list[str] | None = Field(
        None,
        description="which files of the data set; with dataset: csv, json, parquet, text, ...: local files or URLs",
    )
    endings: list[str] | None = Field(None, description="of files in a folder that are text, beside .txt, e.g. [.md]")
    skip_documents: int | None = Field(
        None, ge=1, description="leave out so many at the beginning: what another config holds out comes first"
    )

    @model_validator(mode="after")
    def _named(self) -> "TextConfig":
        if self.source != "bbc-news" and not self.dataset:
            raise ValueError(f"text.source {self.source!r} needs text.dataset")
        for key in (*_OF_HUB, *_OF_FOLDERS):
            source = "hub" if key in _OF_HUB else "folder"
            if getattr(self, key) is not None and self.source != source:
                raise ValueError(f"text.{key} goes with text.source {source!r}, not {self.source!r}")
        if self.source == "hub" and self.dataset in FORMATS and not self.data_files:
            raise ValueError(f"text.dataset {self.dataset!r} is a format of files and needs text.data_files")
        for ending in self.endings or ():
            if not ending.startswith(".") or ending in (".", ".gz", ".zst"):
                raise ValueError(f"text.endings: {ending!r} is no ending of a name such as '.md'")
        return self

    @model_serializer(mode="wrap")
    def _without_absent(self, serialised: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keys that came later are there only where they are given: what was made without them is found again."""
        later = (*_OF_HUB, *_OF_FOLDERS, "skip_documents")
        return {key: value for key, value in serialised(self).items() if value is not None or key not in later}

    @property
    def name(self) -> str:
        """The true name of the text."""
        if self.source == "bbc-news":
            return self.source
        return Path(str(self.dataset)).name + (f"-{self.config}" if self.config else "")

    def content_hash(self) -> str | None:
        """Of the documents, where they are known before they are read."""
        if self.source == "bbc-news":
            return bbc_news.corpus_hash()
        return (self._saved or (self._files if self.source == "folder" else self._on_hub)).content_hash()

    @property
    def _place(self) -> Path:
        return Path(str(self.dataset)).expanduser()

    @property
    def _saved(self) -> SavedDataset | None:
        """What ``save_to_disk`` wrote, if that is what the path leads to."""
        if self.source == "bbc-news" or not is_saved(self._place):
            return None
        if given := [key for key in _OF_HUB if getattr(self, key) is not None]:
            raise TextError(
                f"data set {self._place}: save_to_disk wrote it, so it has no {' or '.join(given)}",
                cure=f"leave {' and '.join(f'text.{key}' for key in given)} out",
            )
        return SavedDataset(self._place, self.split if "split" in self.model_fields_set else None)

    @property
    def _files(self) -> TextFiles:
        return text_files(self._place, tuple(self.endings or ()))

    @property
    def _on_hub(self) -> HubDataset:
        named = {"name": self.config, "revision": self.revision, "data_files": self.data_files}
        options = {key: value for key, value in named.items() if value is not None}
        name = str(self._place) if str(self.dataset).startswith("~") else str(self.dataset)
        return HubDataset(name, self.split, self.streaming, options)

    def documents(self, seed: int) -> Iterator[Document]:
        """See ``documents``."""
        if self.source == "bbc-news":
            return iter([article.text for article in bbc_news.harvest_articles(seed)])
        return (self._saved or (self._files if self.source == "folder" else self._on_hub)).documents(self.column)


def documents(config: TextConfig, seed: int) -> Iterator[Document]:
    """The documents of a text source, in a fixed order, from the first that is not to be skipped.

    bbc-news: the half of the articles set aside for harvests, shuffled by ``seed``. folder: every
    .txt file, or the rows of .jsonl / .parquet files, in the order of their names, also of .gz and .zst; hidden and
    binary files are left out. hub: the data set's own order. What ``save_to_disk`` wrote is read by either.

    Raises: TextError (no such folder, no text in it, a file or row that is none), HubError (not reachable; no such data
        set, configuration, split or file).
    """
    return islice(config.documents(seed), config.skip_documents, None)


@dataclass(frozen=True)
class Packing:
    """How documents become contexts.

    tokens: of a context. begin: what each of them begins with. between: what stands between documents. None: nothing.
    """

    tokens: int
    begin: int | None
    between: int | None

    @classmethod
    def of(cls, tokenizer: Any, context_tokens: int, prepend_bos: bool = True) -> "Packing":
        """A BOS at the beginning and between documents; or none at the beginning, and an EOS, if there is one, between.

        Raises: TextError if there is to be a BOS and the tokenizer has none.
        """
        if not prepend_bos:
            return cls(context_tokens, None, tokenizer.eos_token_id)
        if tokenizer.bos_token_id is None:
            raise _no_bos(tokenizer)
        return cls(context_tokens, tokenizer.bos_token_id, tokenizer.bos_token_id)

    @property
    def step(self) -> int:
        """Tokens of a context that are the text's."""
        return self.tokens - (self.begin is not None)


def has_bos(tokenizer: Any) -> bool:
    """Whether it has a token for BOS; TransformerLens names one for those that have none, which may be no token."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer.convert_ids_to_tokens(bos) == tokenizer.bos_token


def prepends_bos(wanted: bool | Literal["auto"], model: "AnyModel") -> bool:
    """Whether contexts of a model begin with a BOS: as wanted, or 'auto', as TransformerLens says it was trained.

    Raises: TextError if a BOS is wanted and the tokenizer has none.
    """
    if wanted == "auto":
        return bool(model.cfg.default_prepend_bos) and has_bos(model.tokenizer)
    if wanted and not has_bos(model.tokenizer):
        raise _no_bos(model.tokenizer)
    return wanted


def _no_bos(tokenizer: Any) -> TextError:
    return TextError(
        "packing text: the tokenizer has no BOS token",
        got=type(tokenizer).__name__,
        cause="a model that was trained without one",
        cure="set harvest.prepend_bos to auto or false",
    )


def contexts(
    texts: Iterator[Document],
    tokenizer: Any,
    context_tokens: int,
    n_vocabulary: int | None = None,
    *,
    prepend_bos: bool = True,
) -> Iterator[Tensor]:
    """Pack documents into contexts of exactly ``context_tokens`` tokens.

    Each context starts with BOS; inside, documents follow each other with a BOS between them. Without ``prepend_bos``
    contexts start as the text goes on, and EOS is between documents. The rest of the last document that does not fill a
    context is dropped. Token ids that fill a context, with their BOS where there is one, are that context.

    Args: n_vocabulary: of the model: token ids must be below it.
    Raises: TextError if there is to be a BOS and the tokenizer has none; else as ``readable``.
    """
    packing = Packing.of(tokenizer, context_tokens, prepend_bos)
    begin = [] if packing.begin is None else [packing.begin]
    waiting: list[int] = []
    step = packing.step
    for separated, ids in pieces(texts, tokenizer, packing, n_vocabulary):
        if separated and packing.between is not None:
            waiting.append(packing.between)
        waiting += ids
        n_full = len(waiting) // step
        for start in range(0, n_full * step, step):
            yield torch.tensor([*begin, *waiting[start : start + step]])
        if n_full:
            waiting = waiting[n_full * step :]


def pieces(
    texts: Iterator[Document], tokenizer: Any, packing: Packing, n_vocabulary: int | None = None
) -> Iterator[tuple[bool, list[int]]]:
    """The tokens of each document, and whether ``packing.between`` stands before them.

    Nothing stands there at the beginning of a context, if a batch of texts begins there, or a document of token ids.
    """
    texts, n_tokens = iter(texts), 0
    for first in texts:
        batch: list[Document] = [first]
        if not isinstance(first, TokenIds):
            batch += islice(texts, _TOKENISER_BATCH - 1)
        separated = packing.between is not None and n_tokens % packing.step > 0
        for ids in _tokenised(batch, tokenizer, n_vocabulary):
            yield separated, ids
            n_tokens += separated + len(ids)
            separated = packing.between is not None and (separated or len(ids) > 0)


def _tokenised(batch: list[Document], tokenizer: Any, n_vocabulary: int | None) -> Iterator[list[int]]:
    waiting: list[str] = []

    def taken() -> Iterator[list[int]]:
        if waiting:
            # verbose=False: a document longer than the model's context is cut here, so no warning.
            yield from tokenizer(waiting, add_special_tokens=False, verbose=False)["input_ids"]
            waiting.clear()

    for document in batch:
        text = readable(document, tokenizer, n_vocabulary)
        if isinstance(text, TokenIds):
            yield from taken()
            yield without_bos(text.ids, tokenizer)
            continue
        if sum(map(len, waiting)) + len(text) > _TOKENISER_CHARACTERS:
            yield from taken()
        waiting.append(text)
    yield from taken()
