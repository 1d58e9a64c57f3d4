"""The harvest stage on text: from documents to shuffled shards with statistics.

The model runs over contexts of tokens; ``collecting.py`` makes shards of what it gives. The held-out part comes from
other documents than the training part, as far as there are enough (``splitting.py``). Gradient moments, if asked for,
are collected from the training part's text once the shards are there (``gradients.py``).
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ksvd_sae.activations.collecting import PARTS, CollectingConfig, Collection, collected
from ksvd_sae.activations.documents import Document, Readable, TokenIds, readable, write_documents
from ksvd_sae.activations.gradients import GRADIENT_SETTINGS, GradientConfig, run_gradients
from ksvd_sae.activations.language import ActivationReader, ModelConfig
from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.activations.splitting import Split
from ksvd_sae.activations.text import Packing, TextConfig, contexts, documents, prepends_bos
from ksvd_sae.activations.token_ids import check_tokenizer
from ksvd_sae.errors import ManifestError, TextError
from ksvd_sae.progress import progress
from ksvd_sae.store import content_hash, write_json
from ksvd_sae.together import ALONE, Together

logger = logging.getLogger(__name__)
HELDOUT_DOCUMENTS = "heldout_documents.jsonl"
# Whether contexts begin with a BOS, once that is settled: it holds however often the harvest is stopped.
_CONTEXTS_FILE = "contexts.json"
# Among the raw parts, where the split is inside documents: it holds however often the harvest is stopped.
_SPLIT_FILE = "split.json"


class HarvestConfig(CollectingConfig, GradientConfig):
    """How a language model's activations are collected."""

    batch_contexts: int = Field(16, ge=1)
    prepend_bos: Literal["auto", True, False] = Field(
        "auto",
        description="whether contexts begin with a BOS; auto: as TransformerLens says the model was trained",
    )
    keep_special_tokens: bool = Field(
        False, description="keep BOS and other special tokens among the samples, as the paper's script does"
    )

    @property
    def has_gradients(self) -> bool:
        return self.gradient_tokens > 0


@dataclass(frozen=True)
class Harvest:
    """What is harvested: a model's activations at a hook, on a text.

    seed: of the text's order, where it has none of its own, and of the shuffle.
    """

    model: ModelConfig
    text: TextConfig
    config: HarvestConfig
    seed: int

    @cached_property
    def key(self) -> dict[str, Any]:
        """Everything that the activations follow from."""
        hashes = {"model": self.model.content_hash(), "text": self.text.content_hash()}
        # Gradients have a key of their own: asking for more must not collect the activations again. And what came later
        # changes no key where it is not given.
        without = GRADIENT_SETTINGS | ({"prepend_bos"} if self.config.prepend_bos == "auto" else set())
        without |= set() if self.config.keep_special_tokens else {"keep_special_tokens"}
        return {
            # Weights by their content, wherever they lie.
            "model": self.model.model_dump(mode="json", exclude={"weights", "revision"}),
            "text": self.text.model_dump(mode="json"),
            "harvest": self.config.model_dump(mode="json", exclude=without),
            "seed": self.seed,
            "sources": {name: known for name, known in hashes.items() if known is not None},
        }

    def folder(self, root: Path) -> Path:
        """Its place in a cache."""
        name = f"{self.model.name.split('/')[-1]}-{self.model.hook}-{content_hash(self.key)}"
        return root / "activations" / name

    def texts(self) -> Iterator[Document]:
        """The documents, in the same order at every call."""
        return documents(self.text, self.seed)


def run_harvest(
    harvest: Harvest, folder: Path, reader: Callable[[], ActivationReader], together: Together = ALONE
) -> ActivationShards:
    """Collect and finish a harvest in ``folder``, or reuse the finished one there.

    Args:
        folder: one that another key made is refused.
        reader: called once, and only if there is something left to collect.
        together: the processes that collect it: the same bits as by one. Gradients are rank 0's.
    Raises: TextError (the text ends too early), ActivationError, HookError, DiskSpaceError, ManifestError.
    """
    if not harvest.config.gradient_tokens:
        return _run_activations(harvest, folder, reader, together)
    # Only here does the model stay in memory while the shards are written: it is needed again after that.
    reader = cache(reader)
    shards = _run_activations(harvest, folder, reader, together)
    if together.is_first:
        run_gradients(harvest.config, shards, reader, lambda: _training_texts(shards, harvest.texts(), reader))
    together.wait()
    return shards


def training_contexts(harvest: Harvest, shards: ActivationShards, reader: ActivationReader) -> Iterator[Tensor]:
    """The contexts that a finished harvest's training part comes from, from its beginning."""
    texts = _training_texts(shards, harvest.texts(), lambda: reader)
    model, length = reader.model, harvest.config.context_tokens
    return contexts(texts, model.tokenizer, length, model.cfg.d_vocab, prepend_bos=shards.prepend_bos)


def _training_texts(
    shards: ActivationShards, texts: Iterator[Document], reader: Callable[[], ActivationReader]
) -> Iterator[Document]:
    """The training text of a finished harvest."""
    folder, split = shards.folder, shards.manifest["parts"]["heldout"].get("split")
    path = folder / HELDOUT_DOCUMENTS
    if not path.exists():
        raise ManifestError(
            f"harvest: {path} is missing, so the training text's start is not known",
            cure=f"delete {folder} and run `ksvd-sae harvest` again",
        )
    if split is not None:
        return Split(**split).training(list(islice(texts, split["drawn"])), texts, reader().model.tokenizer)
    with path.open() as lines:
        return islice(texts, sum(1 for _ in lines), None)


def _run_activations(
    harvest: Harvest, folder: Path, reader: Callable[[], ActivationReader], together: Together
) -> ActivationShards:
    return collected(folder, harvest.key, lambda: _make(harvest, folder, reader, together), together)


def _make(harvest: Harvest, folder: Path, reader: Callable[[], ActivationReader], together: Together) -> None:
    started = time.perf_counter()
    collection = Collection(folder, harvest.config, "contexts", together)
    if not together.all(collection.is_whole):
        loaded = reader()

        def begin() -> None:
            if not collection.is_begun:
                begins = {"prepend_bos": prepends_bos(harvest.config.prepend_bos, loaded.model)}
                write_json(folder / _CONTEXTS_FILE, begins)

        together.first(begin)
        _collect(harvest, loaded, collection, together)
    split_file = collection.raw / _SPLIT_FILE
    split = {"split": json.loads(split_file.read_text())} if split_file.exists() else {}
    collection.finish(
        harvest.key,
        harvest.seed,
        lambda: time.perf_counter() - started,
        lambda part, _: split if part == "heldout" else {},
        prepend_bos=_begin_with_bos(folder),
    )


# ---------------------------------------------------------------- collecting


def _begin_with_bos(folder: Path) -> bool:
    """Whether contexts begin with a BOS; those of harvests that do not say so do."""
    path = folder / _CONTEXTS_FILE
    return not path.exists() or bool(json.loads(path.read_text())["prepend_bos"])


def collected_tokens(folder: Path) -> dict[str, int]:
    """Tokens of each part that an unfinished harvest has collected."""
    found = {part: sorted((folder / "raw").glob(f"{part}-*.json")) for part in PARTS}
    return {part: sum(json.loads(path.read_text())["n_samples"] for path in paths) for part, paths in found.items()}


def _collect(harvest: Harvest, reader: ActivationReader, collection: Collection, together: Together) -> None:
    """What all processes find alike, rank 0 writes."""
    folder = collection.folder
    tokenizer, length, bos = reader.model.tokenizer, harvest.config.context_tokens, _begin_with_bos(folder)
    texts, drawn = _readable_texts(harvest, reader), list[Readable]()
    first = next(texts, None)
    if isinstance(first, TokenIds):
        check_tokenizer(harvest.text, first, tokenizer)
    texts = texts if first is None else chain([first], texts)
    with progress("harvest", collection.wanted_tokens, "tokens") as advance:
        advance(collection.n_tokens())

        def fill(part: str, stream: Iterator[Tensor]) -> bool:
            batch = harvest.config.batch_contexts
            return collection.fill(part, stream, batch, lambda some: reader.read(torch.stack(some)), count, advance)

        def count(some: list[Tensor]) -> int:
            return int(reader.kept(torch.stack(some).to(reader.model.cfg.device)).sum())

        # Each part has documents of its own: the text goes on after those that the part before it drew.
        if not fill("heldout", contexts(_remember(texts, drawn), tokenizer, length, prepend_bos=bos)):
            found = f"{collection.n_tokens('heldout'):,} tokens from {len(drawn)} documents"
            raise _too_short(harvest.config, "heldout", found)
        split_file = collection.raw / _SPLIT_FILE
        split = Split(**json.loads(split_file.read_text())) if split_file.exists() else None
        if split is None:
            if together.is_first:
                write_documents(folder / HELDOUT_DOCUMENTS, drawn, tokenizer)
            if fill("train", contexts(texts, tokenizer, length, prepend_bos=bos)):
                return
            split = _split_inside(harvest, collection, reader, drawn)
            if together.is_first:
                write_json(split_file, asdict(split))
        if together.is_first:
            write_documents(folder / HELDOUT_DOCUMENTS, split.heldout(drawn, tokenizer), tokenizer)
        if not fill("train", _training_contexts(harvest, reader, split, drawn, bos)):
            found = f"{collection.n_tokens('train'):,} tokens"
            raise _too_short(harvest.config, "train", found, "a text that changed since the harvest began")


def _readable_texts(harvest: Harvest, reader: ActivationReader) -> Iterator[Readable]:
    """The documents as the model's tokenizer takes them."""
    tokenizer, n_vocabulary = reader.model.tokenizer, reader.model.cfg.d_vocab
    return (readable(text, tokenizer, n_vocabulary) for text in harvest.texts())


def _remember(texts: Iterator[Readable], drawn: list[Readable]) -> Iterator[Readable]:
    for text in texts:
        drawn.append(text)
        yield text


def _split_inside(harvest: Harvest, collection: Collection, reader: ActivationReader, drawn: list[Readable]) -> Split:
    """Give training what the held-out part drew and did not need, if that is enough.

    Nothing is read by the model to know it, and nothing is written if it is not: once there is more text, the harvest
    goes on as if it had been there from the beginning.
    Raises: TextError if it is not enough.
    """
    config, tokenizer, bos = harvest.config, reader.model.tokenizer, _begin_with_bos(collection.folder)
    packing = Packing.of(tokenizer, config.context_tokens, bos)
    split = Split.after(collection.n_units("heldout"), drawn, tokenizer, packing)
    n_tokens = 0
    for tokens_L in _training_contexts(harvest, reader, split, drawn, bos):
        n_tokens += int(reader.kept(tokens_L[None].to(reader.model.cfg.device)).sum())
        if n_tokens >= config.train_tokens:
            break
    where = f"the held-out part keeps {collection.n_tokens('heldout'):,} tokens: {split}; training has all that follows"
    if split.cut_tokens:
        where += f", in the one that is cut after a gap of {split.gap_tokens} tokens"
    if n_tokens < config.train_tokens:
        raise _too_short(config, "train", f"{n_tokens:,} tokens; {where}")
    logger.warning("harvest: too few documents follow those that the held-out part drew, so %s", where)
    return split


def _training_contexts(
    harvest: Harvest, reader: ActivationReader, split: Split, drawn: list[Readable], prepend_bos: bool
) -> Iterator[Tensor]:
    tokenizer, length = reader.model.tokenizer, harvest.config.context_tokens
    after = islice(_readable_texts(harvest, reader), len(drawn), None)
    return contexts(split.training([*drawn], after, tokenizer), tokenizer, length, prepend_bos=prepend_bos)


def _too_short(
    config: HarvestConfig, part: str, got: str, cause: str = "too short a text, or a filter that leaves nothing"
) -> TextError:
    wanted = config.heldout_tokens if part == "heldout" else config.train_tokens
    return TextError(
        f"harvest: the text ended before {wanted:,} {part} tokens",
        got=got,
        cause=cause,
        cure=f"ask for fewer tokens (harvest.{part}_tokens) or give more text; "
        f"a batch is up to {config.batch_contexts * config.context_tokens:,} tokens",
    )
