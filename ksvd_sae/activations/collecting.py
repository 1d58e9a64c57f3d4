"""Activations of a model as they come, collected into shuffled shards; whatever the model reads.

Two steps, both resumable. Collecting writes the activations as they come into ``raw/`` parts, one part after another; a
harvest that was stopped goes on at the next part. Finishing drops outlier tokens, shuffles over the whole harvest and
writes the shards that training reads; then ``raw/`` is deleted.

Of several processes each collects every so manyth part: how many units a part takes is known without the model, so the
parts are those of one process. And each writes every so manyth shard.

The first raw parts are those of a harvest of as many training tokens as they hold, which can take them while this one
goes on (``SoFar``).
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count, islice, takewhile
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from ksvd_sae.activations.shards import ACTIVATIONS_KEY, STAGE, ActivationShards, finish, shard_name, write_shard
from ksvd_sae.activations.statistics import Moments, RunningStatistics, outlier_limit, row_norms
from ksvd_sae.device import in_parts_that_fit
from ksvd_sae.errors import ManifestError, ShardError
from ksvd_sae.progress import Advance
from ksvd_sae.store import (
    MANIFEST,
    atomic_path,
    content_hash,
    file_sha256,
    is_being_written,
    is_finished,
    require_disk_space,
    write_json,
)
from ksvd_sae.strict import Strict
from ksvd_sae.together import ALONE, Together

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


def collected(
    folder: Path, key: dict[str, Any], make: Callable[[], None], together: Together = ALONE, part: str = "train"
) -> ActivationShards:
    """A part of the finished harvest of this key in ``folder``, which ``make`` makes if it is not there.

    Raises: ManifestError for a folder that another key made.
    """
    raw = folder / _RAW
    # A harvest that was stopped at its very end has not removed them.
    if together.first(lambda: is_finished(folder, STAGE, key) and not raw.exists()):
        logger.info("harvest: reusing %s", folder)
        return ActivationShards.open(folder, part, key)
    with together.writing(folder, "harvest"):
        # Another process may have finished it meanwhile.
        if not together.first(lambda: is_finished(folder, STAGE, key)):
            together.first(lambda: _claim(folder, key))
            make()
        if together.is_first:
            shutil.rmtree(raw, ignore_errors=True)
    return ActivationShards.open(folder, part, key)


def _claim(folder: Path, key: dict[str, Any]) -> None:
    """Mark an unfinished folder as this key's, or refuse it if it is another's."""
    _check_claim(folder, key)
    write_json(folder / _KEY_FILE, key)


def _check_claim(folder: Path, key: dict[str, Any]) -> None:
    path = folder / _KEY_FILE
    if path.exists() and content_hash(json.loads(path.read_text())) != content_hash(key):
        raise ManifestError(
            f"harvest: {folder} holds an unfinished harvest of another config",
            cause="the folder was moved or edited",
            cure="move it away and run again",
        )


def _without_gaps(entries: dict[int, T]) -> list[T]:
    return [entries[number] for number in takewhile(entries.__contains__, count())]


def _entry_path(raw: Path, part: str, number: int) -> Path:
    return raw / f"{part}-{number:05d}.json"


def _number(entry: Path) -> int:
    return int(entry.stem.rpartition("-")[2])


@dataclass(frozen=True)
class SoFar:
    """What an unfinished harvest has collected of each part up to now, as far as no raw part is missing in between.

    Nothing is locked: the harvest may go on meanwhile, and even end, which removes the raw parts (FileNotFoundError).
    parts: their entries.
    """

    folder: Path
    parts: dict[str, list[dict[str, Any]]]

    @classmethod
    def of(cls, folder: Path, key: dict[str, Any]) -> "SoFar":
        """Raises: ManifestError for a folder that another key made."""
        _check_claim(folder, key)
        found: dict[str, dict[int, dict[str, Any]]] = {part: {} for part in PARTS}
        for part in PARTS:
            for path in (folder / _RAW).glob(f"{part}-*.json"):
                entry = json.loads(path.read_text())
                if path.with_name(entry["file"]).exists():
                    found[part][_number(path)] = entry
        return cls(folder, {part: _without_gaps(entries) for part, entries in found.items()})

    def n_tokens(self, part: str) -> int:
        return sum(entry["n_samples"] for entry in self.parts[part])

    def check(self, wanted: CollectingConfig) -> None:
        """Raise ManifestError unless there is something to train on."""
        if self.n_tokens("train") and self.n_tokens("heldout") >= wanted.heldout_tokens:
            return
        raise ManifestError(
            f"so far: no training tokens are collected in {self.folder}",
            got=f"in whole raw parts {self.n_tokens('heldout'):,} held-out tokens, which come first, and "
            f"{self.n_tokens('train'):,} of training",
            limit=f"{wanted.heldout_tokens:,} held-out tokens, and a part of {wanted.shard_tokens:,} "
            "(harvest.shard_tokens) of training",
            cause="the harvest has only begun, or with another config",
            cure="run again once there is more; `ksvd-sae harvest CONFIG` collects it",
        )

    def share(self, into: Path, wanted: CollectingConfig) -> None:
        """Give another harvest's folder the raw parts and what is known beside them, as hard links.

        A link takes no room and outlives what it is of; no file of a harvest changes once it has its name. Whoever goes
        on there verifies the parts.
        Args: wanted: of the harvest that they are from.
        Raises: DiskSpaceError (too little room to shuffle them, where the harvest goes on beside it), ManifestError
            (no links can be made there).
        """
        raw = self.folder / _RAW
        # Held-out documents before what raw/ says of them: a harvest that cuts them now writes these after that. And a
        # part's entry after the part, of which it says that it is there.
        files = [path for path in self.folder.glob("[!.]*") if path.is_file()]
        files = [path for path in files if path.name not in (_KEY_FILE, MANIFEST)]
        files += [path for path in raw.glob("[!.]*.json") if "-" not in path.name]
        for part, entries in self.parts.items():
            for number, entry in enumerate(entries):
                files += [raw / entry["file"], _entry_path(raw, part, number)]
        self._require_disk_space(wanted)
        (into / _RAW).mkdir(parents=True, exist_ok=True)
        try:
            for file in files:
                with suppress(FileExistsError):
                    os.link(file, into / file.relative_to(self.folder))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ManifestError(
                f"so far: raw parts cannot be linked into {into}: {error}",
                cause="a file system without hard links, or a cache whose folders lie on several",
                cure="wait for the harvest's end; or begin it with KSVD_SAE_CACHE on a file system that has them",
            ) from error

    def _require_disk_space(self, wanted: CollectingConfig) -> None:
        n_tokens = sum(map(self.n_tokens, PARTS))
        entries = [entry for part in PARTS for entry in self.parts[part]]
        n_bytes = sum((self.folder / _RAW / entry["file"]).stat().st_size for entry in entries)
        what = f"so far: writing shuffled shards of {n_tokens:,} tokens"
        if is_being_written(self.folder):
            # What is to come raw, then all of it shuffled.
            to_write = 2 * (wanted.train_tokens + wanted.heldout_tokens) - n_tokens
            n_bytes, what = n_bytes + n_bytes * to_write // n_tokens, f"{what}, beside all that the harvest is to write"
        require_disk_space(self.folder, n_bytes, what)


def reading_order(shards: ActivationShards) -> Tensor | None:
    """Of each sample of a part, how many of the part were read before it; None for activations from elsewhere.

    A harvest keeps no such places: they are drawn again as they were when it was shuffled.
    """
    seed = shards.manifest["key"].get("seed")
    return None if seed is None else _shuffle(shards.n_samples, shards.part, seed)


def _shuffle(n_samples: int, part: str, seed: int) -> Tensor:
    return torch.randperm(n_samples, generator=torch.Generator().manual_seed(seed + PARTS.index(part)))


class Collection:
    """The raw parts of a harvest that are there, and those to come.

    Args: unit: what the model reads a number of at a time, in the plural: contexts, images.
    """

    def __init__(self, folder: Path, config: CollectingConfig, unit: str, together: Together = ALONE):
        self.folder, self.config, self._unit, self._together = folder, config, f"n_{unit}", together
        self._wanted = {"heldout": config.heldout_tokens, "train": config.train_tokens}
        # What is on disk, of parts that other processes collect as far as it is known here; and the parts so far.
        self._there = {part: self._read_parts(part) for part in PARTS}
        self._parts = {part: _without_gaps(there) for part, there in self._there.items()}

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

    def _read_parts(self, part: str) -> dict[int, dict[str, Any]]:
        """Entries of the raw parts that are whole, by their numbers; a broken one is collected again."""
        entries: dict[int, dict[str, Any]] = {}
        for path in sorted(self.raw.glob(f"{part}-*.json")):
            number, entry = _number(path), json.loads(path.read_text())
            shard = path.with_name(entry["file"])
            # Of several processes, each looks at those that it would collect.
            if self._is_own(number) and (not shard.exists() or file_sha256(shard) != entry["sha256"]):
                logger.warning("harvest: raw part %s is missing or altered; collecting it again", shard)
            else:
                entries[number] = entry
        return entries

    def _is_own(self, number: int) -> bool:
        return number % self._together.size == self._together.rank

    # ------------------------------------------------------------ collecting

    def fill(
        self,
        part: str,
        stream: Iterator[T],
        batch: int,
        read: Callable[[list[T]], Tensor],
        count: Callable[[list[T]], int],
        advance: Advance,
    ) -> bool:
        """Go on until a part has what is wanted; False if the stream is over before.

        Args: stream: of units, from its beginning. batch: units at a time. read: their activations. count: how many
            these are, for units that another process reads.
        """
        done, there = self._parts[part], self._there[part]
        for _ in islice(stream, self.n_units(part)):
            pass
        # Writing and hashing take as long as a GPU's reading: each part is written while the next is read.
        with ThreadPoolExecutor(1) as writer:
            writing: tuple[int, Future[dict[str, Any]]] | None = None
            while self.n_tokens(part) < self._wanted[part]:
                number, limit = len(done), min(self.config.shard_tokens, self._wanted[part] - self.n_tokens(part))
                if (entry := there.get(number)) is not None:
                    done.append(entry)
                    for _ in islice(stream, entry[self._unit]):
                        pass
                    advance(entry["n_samples"])
                    continue
                if not self._is_own(number):
                    if (counted := self._pass_over(limit, stream, batch, count, advance)) is None:
                        return False
                    done.append(counted)
                    continue
                rows = self._collect_part(limit, stream, batch, read, advance)
                if writing is not None:
                    done[writing[0]] = writing[1].result()
                if rows is None:
                    return False
                x_ND, n_units = rows
                writing = number, writer.submit(self._write_part, part, number, x_ND, n_units)
                done.append({"n_samples": len(x_ND), self._unit: n_units})
            if writing is not None:
                done[writing[0]] = writing[1].result()
        return True

    def _pass_over(
        self, wanted_tokens: int, stream: Iterator[T], batch: int, count: Callable[[list[T]], int], advance: Advance
    ) -> dict[str, Any] | None:
        """The numbers of a raw part that another process collects; None if the stream is over."""
        n_tokens = n_units = 0
        while n_tokens < wanted_tokens:
            units = list(islice(stream, batch))
            if not units:
                return None
            n_new = count(units)
            n_tokens, n_units = n_tokens + n_new, n_units + len(units)
            advance(n_new)
        return {"n_samples": n_tokens, self._unit: n_units}

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
        path = _entry_path(self.raw, part, index)
        entry = {**write_shard(path.with_suffix(".safetensors"), x_ND), self._unit: n_units}
        write_json(path, entry)
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
        """Outliers out, shuffle, shards; then statistics and manifest by rank 0.

        Args: of_part: what the manifest says of a part beside its shards, from the places in reading order of the
            samples of its shards. facts: what it says of the harvest.
        """
        self._together.wait()
        raw = {part: [self._open_raw(part, number) for number in range(len(self._parts[part]))] for part in PARTS}
        d_in, norms = raw["train"][0].shape[1], self._norms(raw)
        median_norm, limit = outlier_limit(torch.cat(norms["train"]), self.config.outlier_factor)
        n_total = sum(len(n) for n in chain(*norms.values()))
        size = n_total * d_in * raw["train"][0].element_size()
        require_disk_space(self.folder, size, "harvest: writing shuffled shards")
        where = {}
        for part in PARTS:
            kept = [(norms_N <= limit).nonzero().flatten() for norms_N in norms[part]]
            of = torch.cat([torch.stack([torch.full_like(rows, i), rows], dim=1) for i, rows in enumerate(kept)])
            where[part] = of[_shuffle(len(of), part, seed)]
            self._write_shuffled(part, raw[part], where[part])
        raw.clear()
        self._together.wait()
        if not self._together.is_first:
            return
        running, parts = RunningStatistics(d_in), {}
        for part in PARTS:
            written = [self._written(part, index) for index in range(self._n_shards(where[part]))]
            parts[part] = {"n_samples": len(where[part]), "shards": [one["shard"] for one in written]}
            parts[part]["outliers"] = sum(len(n) for n in norms[part]) - len(where[part])
            starts = torch.tensor([0, *(len(n) for n in norms[part])]).cumsum(0)
            parts[part] |= of_part(part, starts[where[part][:, 0]] + where[part][:, 1])
            for one in written if part == "train" else ():
                running.merge(Moments.from_json(one["moments"]))
        statistics = running.result(median_norm)
        limit_kept = limit if limit != float("inf") else None
        finish(self.folder, key, parts, statistics, limit_kept, seconds(), **facts)

    def _norms(self, raw: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        """Of every sample; each process takes those of its raw parts."""

        def path(part: str, number: int) -> Path:
            return self.raw / f"norms-{part}-{number:05d}.safetensors"

        for part, parts in raw.items():
            for number in filter(self._is_own, range(len(parts))):
                with atomic_path(path(part, number)) as temporary:
                    save_file({"norms": row_norms(parts[number])}, temporary)
        self._together.wait()
        return {part: [load_file(path(part, n))["norms"] for n in range(len(parts))] for part, parts in raw.items()}

    def _open_raw(self, part: str, number: int) -> Tensor:
        entry = json.loads(_entry_path(self.raw, part, number).read_text())
        # safetensors maps the file: rows are read from disk as they are gathered.
        x_ND: Tensor = load_file(self.raw / entry["file"])[ACTIVATIONS_KEY]
        if not len(x_ND) == entry["n_samples"] == self._parts[part][number]["n_samples"]:
            raise ShardError(
                f"harvest: raw part {entry['file']} does not hold what its entry says, or what it should",
                got=len(x_ND),
                limit=self._parts[part][number]["n_samples"],
                cause="an altered file; or processes with different texts or tokenizers",
                cure="run again",
            )
        return x_ND

    def _write_shuffled(self, part: str, raw: list[Tensor], where: Tensor) -> None:
        """This process' shards, in one random order over the whole part, gathered from the raw parts shard by shard.

        Args: where: raw part, and row in it, of each sample.
        """
        writing: list[Future[None]] = []
        with ThreadPoolExecutor(_WRITERS) as writers:
            for index in filter(self._is_own, range(self._n_shards(where))):
                wanted = where[index * self.config.shard_tokens : (index + 1) * self.config.shard_tokens]
                shard_ND = torch.empty(len(wanted), raw[0].shape[1], dtype=raw[0].dtype)
                for source in torch.unique(wanted[:, 0]).tolist():
                    slots = (wanted[:, 0] == source).nonzero().flatten()
                    shard_ND[slots] = raw[source][wanted[slots, 1]]
                if len(writing) >= _WRITERS:
                    writing[-_WRITERS].result()
                writing.append(writers.submit(self._write_one, part, index, shard_ND))
            for shard in writing:
                shard.result()

    def _n_shards(self, where: Tensor) -> int:
        return -(-len(where) // self.config.shard_tokens)

    def _write_one(self, part: str, index: int, shard_ND: Tensor) -> None:
        entry = write_shard(self.folder / part / shard_name(index), shard_ND)
        write_json(self._written_path(part, index), {"shard": entry, "moments": Moments.of(shard_ND).as_json()})

    def _written(self, part: str, index: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._written_path(part, index).read_text())
        return found

    def _written_path(self, part: str, index: int) -> Path:
        return self.raw / f"written-{part}-{index:05d}.json"
