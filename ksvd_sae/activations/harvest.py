"""The harvest stage: from documents to shuffled shards with statistics.

Two steps, both resumable. Collecting runs the model and writes the activations as they come into
``raw/`` parts, one part after another; a harvest that was stopped goes on at the next part. Finishing
drops outlier tokens, shuffles over the whole harvest and writes the shards that training reads; then
``raw/`` is deleted. The held-out part comes from other documents than the training part, as far as there are enough
(``splitting.py``). Gradient moments, if asked for, are collected from the training part's text once the shards are
there (``gradients.py``).
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from ksvd_sae.activations.documents import Document, Readable, TokenIds, readable, write_documents
from ksvd_sae.activations.gradients import GRADIENT_SETTINGS, GradientConfig, run_gradients
from ksvd_sae.activations.language import ActivationReader, ModelConfig
from ksvd_sae.activations.shards import (
    ACTIVATIONS_KEY,
    STAGE,
    ActivationShards,
    finish,
    shard_name,
    write_shard,
)
from ksvd_sae.activations.splitting import Split
from ksvd_sae.activations.statistics import RunningStatistics, outlier_limit
from ksvd_sae.activations.text import Packing, TextConfig, contexts, documents, prepends_bos
from ksvd_sae.activations.token_ids import check_tokenizer
from ksvd_sae.errors import ManifestError, ShardError, TextError
from ksvd_sae.progress import Advance, progress
from ksvd_sae.store import (
    content_hash,
    file_sha256,
    is_finished,
    require_disk_space,
    sole_writer,
    write_json,
)

logger = logging.getLogger(__name__)
PARTS = ("heldout", "train")
HELDOUT_DOCUMENTS = "heldout_documents.jsonl"
_KEY_FILE = "key.json"
# Whether contexts begin with a BOS, once that is settled: it holds however often the harvest is stopped.
_CONTEXTS_FILE = "contexts.json"
# Among the raw parts, where the split is inside documents: it holds however often the harvest is stopped.
_SPLIT_FILE = "split.json"
# Shards that are written and hashed at a time, beside the one that is gathered.
_WRITERS = 2


class HarvestConfig(GradientConfig):
    """How activations are collected."""

    train_tokens: int = Field(gt=0)
    heldout_tokens: int = Field(gt=0)
    batch_contexts: int = Field(16, ge=1)
    shard_tokens: int = Field(65_536, ge=1)
    prepend_bos: Literal["auto", True, False] = Field(
        "auto",
        description="whether contexts begin with a BOS; auto: as TransformerLens says the model was trained",
    )
    keep_special_tokens: bool = Field(
        False, description="keep BOS and other special tokens among the samples, as the paper's script does"
    )
    outlier_factor: float | None = Field(
        4.0, gt=1.0, description="leave out tokens with a norm above this multiple of the median; null keeps all"
    )
    dtype: Literal["float32", "bfloat16"] = "float32"


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


def run_harvest(harvest: Harvest, folder: Path, reader: Callable[[], ActivationReader]) -> ActivationShards:
    """Collect and finish a harvest in ``folder``, or reuse the finished one there.

    Args:
        folder: one that another key made is refused.
        reader: called once, and only if there is something left to collect.
    Raises: TextError (the text ends too early), ActivationError, HookError, DiskSpaceError, ManifestError.
    """
    if not harvest.config.gradient_tokens:
        return _run_activations(harvest, folder, reader)
    # Only here does the model stay in memory while the shards are written: it is needed again after that.
    reader = cache(reader)
    shards = _run_activations(harvest, folder, reader)
    run_gradients(harvest.config, shards, reader, lambda: _training_texts(shards, harvest.texts(), reader))
    return shards


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


def _run_activations(harvest: Harvest, folder: Path, reader: Callable[[], ActivationReader]) -> ActivationShards:
    if is_finished(folder, STAGE, harvest.key):
        logger.info("harvest: reusing %s", folder)
        return ActivationShards.open(folder, key=harvest.key)
    with sole_writer(folder, "harvest"):
        # Another process may have finished it meanwhile.
        if not is_finished(folder, STAGE, harvest.key):
            _make(harvest, folder, reader)
    return ActivationShards.open(folder, key=harvest.key)


def _make(harvest: Harvest, folder: Path, reader: Callable[[], ActivationReader]) -> None:
    _claim(folder, harvest.key)
    started = time.perf_counter()
    collected = {part: _read_parts(folder, part) for part in PARTS}
    wanted = {"heldout": harvest.config.heldout_tokens, "train": harvest.config.train_tokens}
    if any(_n_tokens(collected[part]) < wanted[part] for part in PARTS):
        loaded = reader()
        if not any(collected.values()):
            begin = {"prepend_bos": prepends_bos(harvest.config.prepend_bos, loaded.model)}
            write_json(folder / _CONTEXTS_FILE, begin)
        _collect(harvest, folder, loaded, collected, wanted)
    _finish(harvest, folder, collected, started)


def _claim(folder: Path, key: dict[str, Any]) -> None:
    """Mark an unfinished folder as this key's, or refuse it if it is another's."""
    path = folder / _KEY_FILE
    if path.exists() and content_hash(json.loads(path.read_text())) != content_hash(key):
        raise ManifestError(
            f"harvest: {folder} holds an unfinished harvest of another config",
            cause="the folder was moved or edited",
            cure="move it away and run again",
        )
    write_json(path, key)


# ---------------------------------------------------------------- collecting


def _begin_with_bos(folder: Path) -> bool:
    """Whether contexts begin with a BOS; those of harvests that do not say so do."""
    path = folder / _CONTEXTS_FILE
    return not path.exists() or bool(json.loads(path.read_text())["prepend_bos"])


def _read_parts(folder: Path, part: str) -> list[dict[str, Any]]:
    """Entries of the raw parts that are whole, in order; what follows a broken one is collected again."""
    entries: list[dict[str, Any]] = []
    for index in count():
        path = folder / "raw" / f"{part}-{index:05d}.json"
        if not path.exists():
            return entries
        entry = json.loads(path.read_text())
        shard = path.with_name(entry["file"])
        if not shard.exists() or file_sha256(shard) != entry["sha256"]:
            logger.warning("harvest: raw part %s is missing or altered; collecting it again", shard)
            return entries
        entries.append(entry)
    return entries


def collected_tokens(folder: Path) -> dict[str, int]:
    """Tokens of each part that an unfinished harvest has collected."""
    found = {part: sorted((folder / "raw").glob(f"{part}-*.json")) for part in PARTS}
    return {part: sum(json.loads(path.read_text())["n_samples"] for path in paths) for part, paths in found.items()}


def _n_tokens(entries: list[dict[str, Any]]) -> int:
    return sum(entry["n_samples"] for entry in entries)


def _collect(
    harvest: Harvest,
    folder: Path,
    reader: ActivationReader,
    collected: dict[str, list[dict[str, Any]]],
    wanted: dict[str, int],
) -> None:
    tokenizer, length, bos = reader.model.tokenizer, harvest.config.context_tokens, _begin_with_bos(folder)
    texts, drawn = _readable_texts(harvest, reader), list[Readable]()
    first = next(texts, None)
    if isinstance(first, TokenIds):
        check_tokenizer(harvest.text, first, tokenizer)
    texts = texts if first is None else chain([first], texts)
    with progress("harvest", sum(wanted.values()), "tokens") as advance:
        advance(sum(map(_n_tokens, collected.values())))

        def fill(part: str, stream: Iterator[Tensor]) -> bool:
            return _fill_part(harvest.config, folder, reader, part, stream, collected, wanted, advance)

        # Each part has documents of its own: the text goes on after those that the part before it drew.
        if not fill("heldout", contexts(_remember(texts, drawn), tokenizer, length, prepend_bos=bos)):
            found = f"{_n_tokens(collected['heldout']):,} tokens from {len(drawn)} documents"
            raise _too_short(harvest.config, "heldout", found)
        split_file = folder / "raw" / _SPLIT_FILE
        if not split_file.exists():
            write_documents(folder / HELDOUT_DOCUMENTS, drawn, tokenizer)
            if fill("train", contexts(texts, tokenizer, length, prepend_bos=bos)):
                return
            _split_inside(harvest, folder, reader, drawn, collected["heldout"])
        split = Split(**json.loads(split_file.read_text()))
        write_documents(folder / HELDOUT_DOCUMENTS, split.heldout(drawn, tokenizer), tokenizer)
        if not fill("train", _training_contexts(harvest, reader, split, drawn, bos)):
            found = f"{_n_tokens(collected['train']):,} tokens"
            raise _too_short(harvest.config, "train", found, "a text that changed since the harvest began")


def _readable_texts(harvest: Harvest, reader: ActivationReader) -> Iterator[Readable]:
    """The documents as the model's tokenizer takes them."""
    tokenizer, n_vocabulary = reader.model.tokenizer, reader.model.cfg.d_vocab
    return (readable(text, tokenizer, n_vocabulary) for text in harvest.texts())


def _remember(texts: Iterator[Readable], drawn: list[Readable]) -> Iterator[Readable]:
    for text in texts:
        drawn.append(text)
        yield text


def _split_inside(
    harvest: Harvest, folder: Path, reader: ActivationReader, drawn: list[Readable], heldout: list[dict[str, Any]]
) -> None:
    """Give training what the held-out part drew and did not need, if that is enough.

    Nothing is read by the model to know it, and nothing is written if it is not: once there is more text, the harvest
    goes on as if it had been there from the beginning.
    Raises: TextError if it is not enough.
    """
    config, tokenizer, bos = harvest.config, reader.model.tokenizer, _begin_with_bos(folder)
    packing = Packing.of(tokenizer, config.context_tokens, bos)
    split = Split.after(_n_contexts(heldout), drawn, tokenizer, packing)
    n_tokens = 0
    for tokens_L in _training_contexts(harvest, reader, split, drawn, bos):
        n_tokens += int(reader.kept(tokens_L[None].to(reader.model.cfg.device)).sum())
        if n_tokens >= config.train_tokens:
            break
    where = f"the held-out part keeps {_n_tokens(heldout):,} tokens: {split}; training has all that follows"
    if split.cut_tokens:
        where += f", in the one that is cut after a gap of {split.gap_tokens} tokens"
    if n_tokens < config.train_tokens:
        raise _too_short(config, "train", f"{n_tokens:,} tokens; {where}")
    logger.warning("harvest: too few documents follow those that the held-out part drew, so %s", where)
    write_json(folder / "raw" / _SPLIT_FILE, asdict(split))


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


def _n_contexts(entries: list[dict[str, Any]]) -> int:
    return sum(entry["n_contexts"] for entry in entries)


def _fill_part(
    config: HarvestConfig,
    folder: Path,
    reader: ActivationReader,
    part: str,
    stream: Iterator[Tensor],
    collected: dict[str, list[dict[str, Any]]],
    wanted: dict[str, int],
    advance: Advance,
) -> bool:
    """Go on until a part has what is wanted; False if the text is over before. Args: stream: from its beginning."""
    done = collected[part]
    for _ in islice(stream, _n_contexts(done)):
        pass
    # Writing and hashing take as long as a GPU's reading: each part is written while the next is read.
    with ThreadPoolExecutor(1) as writer:
        writing: Future[dict[str, Any]] | None = None
        while _n_tokens(done) < wanted[part]:
            limit = min(config.shard_tokens, wanted[part] - _n_tokens(done))
            left = sum(wanted.values()) - sum(map(_n_tokens, collected.values()))
            rows = _collect_part(config, folder, stream, reader, limit, left, advance)
            if writing is not None:
                done[-1] = writing.result()
            if rows is None:
                return False
            x_ND, n_contexts = rows
            writing = writer.submit(_write_part, folder, part, len(done), x_ND, n_contexts)
            done.append({"n_samples": len(x_ND), "n_contexts": n_contexts})
        if writing is not None:
            done[-1] = writing.result()
    return True


def _collect_part(
    config: HarvestConfig,
    folder: Path,
    stream: Iterator[Tensor],
    reader: ActivationReader,
    wanted_tokens: int,
    left_tokens: int,
    advance: Advance,
) -> tuple[Tensor, int] | None:
    """Activations of whole batches of contexts until ``wanted_tokens`` are there, and how many contexts; None if the
    text is over."""
    rows: list[Tensor] = []
    dtype = getattr(torch, config.dtype)
    n_tokens = n_contexts = 0
    while n_tokens < wanted_tokens:
        batch = list(islice(stream, config.batch_contexts))
        if not batch:
            return None
        # Half the bytes, where they are stored as bfloat16, before they leave the device.
        x_ND = reader.read(torch.stack(batch)).to(dtype).cpu()
        if not rows:
            # All that is still to come, raw and shuffled: better to stop now than after an hour.
            size = 2 * left_tokens * x_ND.shape[1] * x_ND.element_size()
            require_disk_space(folder / "raw", size, f"harvest: collecting {left_tokens:,} more tokens")
        rows.append(x_ND)
        n_tokens, n_contexts = n_tokens + len(x_ND), n_contexts + len(batch)
        advance(len(x_ND))
    return torch.cat(rows), n_contexts


def _write_part(folder: Path, part: str, index: int, x_ND: Tensor, n_contexts: int) -> dict[str, Any]:
    path = folder / "raw" / f"{part}-{index:05d}.safetensors"
    entry = {**write_shard(path, x_ND), "n_contexts": n_contexts}
    write_json(path.with_suffix(".json"), entry)
    return entry


# ---------------------------------------------------------------- finishing


def _finish(harvest: Harvest, folder: Path, collected: dict[str, list[dict[str, Any]]], started: float) -> None:
    """Outliers out, shuffle, statistics, shards, manifest; then the raw parts go."""
    raw = {part: [_open_raw(folder, entry) for entry in collected[part]] for part in PARTS}
    d_in = raw["train"][0].shape[1]
    norms = {part: [torch.linalg.vector_norm(x_ND.float(), dim=1) for x_ND in raw[part]] for part in PARTS}
    median_norm, limit = outlier_limit(torch.cat(norms["train"]), harvest.config.outlier_factor)
    n_total = sum(len(n) for n in chain(*norms.values()))
    size = n_total * d_in * raw["train"][0].element_size()
    require_disk_space(folder, size, "harvest: writing shuffled shards")
    running, parts = RunningStatistics(d_in), {}
    for part in PARTS:
        kept = [(norms_N <= limit).nonzero().flatten() for norms_N in norms[part]]
        parts[part] = _write_shuffled(harvest, folder, part, raw[part], kept, running if part == "train" else None)
        parts[part]["outliers"] = sum(len(n) for n in norms[part]) - sum(len(k) for k in kept)
    split_file = folder / "raw" / _SPLIT_FILE
    if split_file.exists():
        parts["heldout"]["split"] = json.loads(split_file.read_text())
    statistics = running.result(median_norm)
    seconds = time.perf_counter() - started
    limit_kept = limit if limit != float("inf") else None
    finish(folder, harvest.key, parts, statistics, limit_kept, seconds, _begin_with_bos(folder))
    raw.clear()
    shutil.rmtree(folder / "raw")


def _open_raw(folder: Path, entry: dict[str, Any]) -> Tensor:
    # safetensors maps the file: rows are read from disk as they are gathered.
    x_ND: Tensor = load_file(folder / "raw" / entry["file"])[ACTIVATIONS_KEY]
    if len(x_ND) != entry["n_samples"]:
        raise ShardError(f"harvest: raw part {entry['file']} does not hold what its entry says", cure="run again")
    return x_ND


def _write_shuffled(
    harvest: Harvest,
    folder: Path,
    part: str,
    raw: list[Tensor],
    kept: list[Tensor],
    running: RunningStatistics | None,
) -> dict[str, Any]:
    """Shards in one random order over the whole part, gathered from the raw parts shard by shard."""
    where = torch.cat([torch.stack([torch.full_like(rows, i), rows], dim=1) for i, rows in enumerate(kept)])
    generator = torch.Generator().manual_seed(harvest.seed + PARTS.index(part))
    where = where[torch.randperm(len(where), generator=generator)]
    writing: list[Future[dict[str, Any]]] = []
    with ThreadPoolExecutor(_WRITERS) as writers:
        for index, start in enumerate(range(0, len(where), harvest.config.shard_tokens)):
            wanted = where[start : start + harvest.config.shard_tokens]
            shard_ND = torch.empty(len(wanted), raw[0].shape[1], dtype=raw[0].dtype)
            for source in torch.unique(wanted[:, 0]).tolist():
                slots = (wanted[:, 0] == source).nonzero().flatten()
                shard_ND[slots] = raw[source][wanted[slots, 1]]
            # Sums depend on their order.
            if running is not None:
                running.add(shard_ND)
            if index >= _WRITERS:
                writing[index - _WRITERS].result()
            writing.append(writers.submit(write_shard, folder / part / shard_name(index), shard_ND))
        return {"n_samples": len(where), "shards": [shard.result() for shard in writing]}
