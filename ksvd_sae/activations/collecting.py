"""Activations of a model as they come, collected into shuffled shards; whatever the model reads.

Two steps, both resumable. Collecting writes the activations as they come into ``raw/`` parts, one part after another; a
harvest that was stopped goes on at the next part. Finishing drops outlier tokens, shuffles over the whole harvest and
writes the shards that training reads; then ``raw/`` is deleted.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from ksvd_sae.activations.shards import ACTIVATIONS_KEY, STAGE, ActivationShards, finish, shard_name, write_shard
from ksvd_sae.activations.statistics import RunningStatistics, outlier_limit
from ksvd_sae.device import in_parts_that_fit
from ksvd_sae.errors import ManifestError, ShardError
from ksvd_sae.progress import Advance
from ksvd_sae.store import content_hash, file_sha256, is_finished, require_disk_space, sole_writer, write_json
from ksvd_sae.strict import Strict

logger = logging.getLogger(__name__)
PARTS = ("heldout", "train")
_KEY_FILE = "key.json"
_RAW = "raw"
# Shards that are written and hashed at a time, beside the one that is gathered.
_WRITERS = 2
T = TypeVar("T")


class CollectingConfig(Strict):
    """How activations are collected, whatever the model reads."""

    train_tokens: int = Field(gt=0)
    heldout_tokens: int = Field(gt=0)
    shard_tokens: int = Field(65_536, ge=1)
    outlier_factor: float | None = Field(
        4.0, gt=1.0, description="leave out tokens with a norm above this multiple of the median; null keeps all"
    )
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def has_gradients(self) -> bool:
        """Whether moments of the loss's gradient are collected beside them."""
        return False


def collected(folder: Path, key: dict[str, Any], make: Callable[[], None]) -> ActivationShards:
    """The finished harvest of this key in ``folder``, made by ``make`` if it is not there.

    Raises: ManifestError for a folder that another key made.
    """
    raw = folder / _RAW
    # A harvest that was stopped at its very end has not removed them.
    if is_finished(folder, STAGE, key) and not raw.exists():
        logger.info("harvest: reusing %s", folder)
        return ActivationShards.open(folder, key=key)
    with sole_writer(folder, "harvest"):
        # Another process may have finished it meanwhile.
        if not is_finished(folder, STAGE, key):
            _claim(folder, key)
            make()
        shutil.rmtree(raw, ignore_errors=True)
    return ActivationShards.open(folder, key=key)


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


class Collection:
    """The raw parts of a harvest that are there, and those to come.

    Args: unit: what the model reads a number of at a time, in the plural: contexts, images.
    """

    def __init__(self, folder: Path, config: CollectingConfig, unit: str):
        self.folder, self.config, self._unit = folder, config, f"n_{unit}"
        self._wanted = {"heldout": config.heldout_tokens, "train": config.train_tokens}
        self._parts = {part: self._read_parts(part) for part in PARTS}

    @property
    def raw(self) -> Path:
        return self.folder / _RAW

    @property
    def wanted_tokens(self) -> int:
        return sum(self._wanted.values())

    @property
    def is_begun(self) -> bool:
        return any(self._parts.values())

    @property
    def is_whole(self) -> bool:
        return all(self.n_tokens(part) >= self._wanted[part] for part in PARTS)

    def n_tokens(self, *parts: str) -> int:
        """Tokens of some parts, or of all."""
        return sum(entry["n_samples"] for part in parts or PARTS for entry in self._parts[part])

    def n_units(self, part: str) -> int:
        return sum(entry[self._unit] for entry in self._parts[part])

    def _read_parts(self, part: str) -> list[dict[str, Any]]:
        """Entries of the raw parts that are whole, in order; what follows a broken one is collected again."""
        entries: list[dict[str, Any]] = []
        for index in count():
            path = self.raw / f"{part}-{index:05d}.json"
            if not path.exists():
                return entries
            entry = json.loads(path.read_text())
            shard = path.with_name(entry["file"])
            if not shard.exists() or file_sha256(shard) != entry["sha256"]:
                logger.warning("harvest: raw part %s is missing or altered; collecting it again", shard)
                return entries
            entries.append(entry)
        return entries

    # ------------------------------------------------------------ collecting

    def fill(
        self, part: str, stream: Iterator[T], batch: int, read: Callable[[list[T]], Tensor], advance: Advance
    ) -> bool:
        """Go on until a part has what is wanted; False if the stream is over before.

        Args: stream: of units, from its beginning. batch: units at a time. read: their activations.
        """
        done = self._parts[part]
        for _ in islice(stream, self.n_units(part)):
            pass
        # Writing and hashing take as long as a GPU's reading: each part is written while the next is read.
        with ThreadPoolExecutor(1) as writer:
            writing: Future[dict[str, Any]] | None = None
            while self.n_tokens(part) < self._wanted[part]:
                limit = min(self.config.shard_tokens, self._wanted[part] - self.n_tokens(part))
                rows = self._collect_part(limit, stream, batch, read, advance)
                if writing is not None:
                    done[-1] = writing.result()
                if rows is None:
                    return False
                x_ND, n_units = rows
                writing = writer.submit(self._write_part, part, len(done), x_ND, n_units)
                done.append({"n_samples": len(x_ND), self._unit: n_units})
            if writing is not None:
                done[-1] = writing.result()
        return True

    def _collect_part(
        self,
        wanted_tokens: int,
        stream: Iterator[T],
        batch: int,
        read: Callable[[list[T]], Tensor],
        advance: Advance,
    ) -> tuple[Tensor, int] | None:
        """Activations of whole batches until ``wanted_tokens`` are there, and of how many units; None if the stream is
        over."""
        rows: list[Tensor] = []
        dtype, left_tokens = getattr(torch, self.config.dtype), self.wanted_tokens - self.n_tokens()
        n_tokens = n_units = 0
        while n_tokens < wanted_tokens:
            units = list(islice(stream, batch))
            if not units:
                return None

            def some(places: slice, units: list[T] = units) -> Tensor:
                # Half the bytes, where they are stored as bfloat16, before they leave the device.
                return read(units[places]).to(dtype).cpu()

            cure = "model.dtype=bfloat16, shorter contexts, or another device"
            found = list(in_parts_that_fit(len(units), batch, some, "harvest", cure))
            if not rows:
                x_ND = found[0]
                # All that is still to come, raw and shuffled: better to stop now than after an hour.
                size = 2 * left_tokens * x_ND.shape[1] * x_ND.element_size()
                require_disk_space(self.raw, size, f"harvest: collecting {left_tokens:,} more tokens")
            rows += found
            n_found = sum(map(len, found))
            n_tokens, n_units = n_tokens + n_found, n_units + len(units)
            advance(n_found)
        return torch.cat(rows), n_units

    def _write_part(self, part: str, index: int, x_ND: Tensor, n_units: int) -> dict[str, Any]:
        path = self.raw / f"{part}-{index:05d}.safetensors"
        entry = {**write_shard(path, x_ND), self._unit: n_units}
        write_json(path.with_suffix(".json"), entry)
        return entry

    # ------------------------------------------------------------ finishing

    def finish(
        self,
        key: dict[str, Any],
        seed: int,
        seconds: Callable[[], float],
        of_part: Callable[[str, Tensor], dict[str, Any]],
        **facts: Any,
    ) -> None:
        """Outliers out, shuffle, statistics, shards, manifest.

        Args: of_part: what the manifest says of a part beside its shards, from the places in reading order of the
            samples of its shards. facts: what it says of the harvest.
        """
        raw = {part: [self._open_raw(entry) for entry in self._parts[part]] for part in PARTS}
        d_in = raw["train"][0].shape[1]
        norms = {part: [torch.linalg.vector_norm(x_ND.float(), dim=1) for x_ND in raw[part]] for part in PARTS}
        median_norm, limit = outlier_limit(torch.cat(norms["train"]), self.config.outlier_factor)
        n_total = sum(len(n) for n in chain(*norms.values()))
        size = n_total * d_in * raw["train"][0].element_size()
        require_disk_space(self.folder, size, "harvest: writing shuffled shards")
        running, parts = RunningStatistics(d_in), {}
        for part in PARTS:
            kept = [(norms_N <= limit).nonzero().flatten() for norms_N in norms[part]]
            generator = torch.Generator().manual_seed(seed + PARTS.index(part))
            where = torch.cat([torch.stack([torch.full_like(rows, i), rows], dim=1) for i, rows in enumerate(kept)])
            where = where[torch.randperm(len(where), generator=generator)]
            parts[part] = self._write_shuffled(part, raw[part], where, running if part == "train" else None)
            parts[part]["outliers"] = sum(len(n) for n in norms[part]) - len(where)
            starts = torch.tensor([0, *(len(x_ND) for x_ND in raw[part])]).cumsum(0)
            parts[part] |= of_part(part, starts[where[:, 0]] + where[:, 1])
        statistics = running.result(median_norm)
        limit_kept = limit if limit != float("inf") else None
        finish(self.folder, key, parts, statistics, limit_kept, seconds(), **facts)

    def _open_raw(self, entry: dict[str, Any]) -> Tensor:
        # safetensors maps the file: rows are read from disk as they are gathered.
        x_ND: Tensor = load_file(self.raw / entry["file"])[ACTIVATIONS_KEY]
        if len(x_ND) != entry["n_samples"]:
            raise ShardError(f"harvest: raw part {entry['file']} does not hold what its entry says", cure="run again")
        return x_ND

    def _write_shuffled(
        self, part: str, raw: list[Tensor], where: Tensor, running: RunningStatistics | None
    ) -> dict[str, Any]:
        """Shards in one random order over the whole part, gathered from the raw parts shard by shard.

        Args: where: raw part, and row in it, of each sample.
        """
        writing: list[Future[dict[str, Any]]] = []
        with ThreadPoolExecutor(_WRITERS) as writers:
            for index, start in enumerate(range(0, len(where), self.config.shard_tokens)):
                wanted = where[start : start + self.config.shard_tokens]
                shard_ND = torch.empty(len(wanted), raw[0].shape[1], dtype=raw[0].dtype)
                for source in torch.unique(wanted[:, 0]).tolist():
                    slots = (wanted[:, 0] == source).nonzero().flatten()
                    shard_ND[slots] = raw[source][wanted[slots, 1]]
                # Sums depend on their order.
                if running is not None:
                    running.add(shard_ND)
                if index >= _WRITERS:
                    writing[index - _WRITERS].result()
                writing.append(writers.submit(write_shard, self.folder / part / shard_name(index), shard_ND))
            return {"n_samples": len(where), "shards": [shard.result() for shard in writing]}
