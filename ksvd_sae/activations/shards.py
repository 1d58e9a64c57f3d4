"""Activations on disk: safetensors shards with a manifest, read back in batches of any size."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ksvd_sae.activations.statistics import RunningStatistics, Statistics, row_norms
from ksvd_sae.errors import ManifestError, ShapeError, ShardError
from ksvd_sae.store import atomic_path, file_sha256, read_manifest, write_manifest

STAGE = "harvest"
ACTIVATIONS_KEY = "activations"
STATISTICS_FILE = "statistics.safetensors"


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


def write_shard(path: Path, x_ND: Tensor) -> dict[str, Any]:
    """Write one shard whole; returns its entry for the manifest."""
    with atomic_path(path) as temporary:
        save_file({ACTIVATIONS_KEY: x_ND.contiguous()}, temporary)
    return {"file": path.name, "n_samples": len(x_ND), "sha256": file_sha256(path)}


def write_statistics(path: Path, statistics: Statistics) -> None:
    with atomic_path(path) as temporary:
        save_file({"centre": statistics.centre_D, "variance": statistics.variance_D}, temporary)


def finish(
    folder: Path,
    key: dict[str, Any],
    parts: dict[str, dict[str, Any]],
    statistics: Statistics,
    outlier_limit: float | None,
    seconds: float,
    prepend_bos: bool = True,
    **facts: Any,
) -> None:
    """Write what makes parts of shards a harvest: statistics of the training part, and the manifest.

    Args:
        parts: 'train' and 'heldout', each with n_samples, outliers and the shards' entries.
        outlier_limit: norm above which samples were left out; None: none were.
        prepend_bos: whether contexts began with a BOS.
        facts: what else the manifest says.
    """
    write_statistics(folder / STATISTICS_FILE, statistics)
    write_manifest(
        folder,
        STAGE,
        key,
        d_in=len(statistics.centre_D),
        parts=parts,
        statistics={
            "n_samples": statistics.n_samples,
            "mean_norm": statistics.mean_norm,
            "median_norm": statistics.median_norm,
            "scale": statistics.scale,
            "outlier_limit": outlier_limit,
        },
        prepend_bos=prepend_bos,
        seconds=round(seconds, 1),
        **facts,
    )


def write_harvest(
    folder: Path, key: dict[str, Any], train: Iterable[Tensor], heldout: Iterable[Tensor]
) -> "ActivationShards":
    """Write activations from elsewhere as a harvest, a shard for each (B, d_in) batch; gives the training part.

    Samples stay in the order that they come in. Raises: ActivationError if there are none to learn from.
    """
    started, running, norms = time.perf_counter(), None, list[Tensor]()
    parts: dict[str, dict[str, Any]] = {}
    for part, batches in (("train", train), ("heldout", heldout)):
        shards = []
        for index, x_ND in enumerate(batches):
            if part == "train":
                running = running or RunningStatistics(x_ND.shape[1])
                running.add(x_ND)
                norms.append(row_norms(x_ND))
            shards.append(write_shard(folder / part / shard_name(index), x_ND))
        parts[part] = {"n_samples": sum(shard["n_samples"] for shard in shards), "shards": shards, "outliers": 0}
    statistics = (running or RunningStatistics(0)).result(float(torch.cat(norms).median()) if norms else 0.0)
    finish(folder, key, parts, statistics, None, time.perf_counter() - started)
    return ActivationShards.open(folder, key=key)


class _Shard(BaseModel, strict=True):
    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    n_samples: int = Field(ge=1)
    sha256: str


class _Part(BaseModel, strict=True):
    shards: list[_Shard]


class _Statistics(BaseModel, strict=True):
    n_samples: int
    mean_norm: float
    median_norm: float


class _Harvest(BaseModel, strict=True):
    """What is read of a harvest's manifest, whatever else it says."""

    d_in: int = Field(ge=1)
    parts: dict[str, _Part]
    statistics: _Statistics


@dataclass
class ActivationShards:
    """One part ('train' or 'heldout') of a harvest, in the shuffled order of its shards.

    Every shard's checksum is verified the first time it is read.
    """

    folder: Path
    part: str
    manifest: dict[str, Any] = field(repr=False)
    _verified: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def open(cls, folder: Path, part: str = "train", key: dict[str, Any] | None = None) -> "ActivationShards":
        """Open a finished harvest.

        Args:
            key: what the harvest should have been made from; see ``read_manifest``.
        Raises: ManifestError (unfinished, or another config), ShardError (a shard is missing).
        """
        manifest = read_manifest(folder, STAGE, key)
        try:
            read = _Harvest.model_validate(manifest)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            raise ManifestError(
                f"opening harvest {folder}: {'.'.join(map(str, problem['loc']))} of its manifest: {problem['msg']}",
                cause="a manifest that was written or altered by hand, or another version's",
                cure=f"delete {folder} and run `ksvd-sae harvest` again",
            ) from error
        if part not in read.parts:
            raise ManifestError(f"opening harvest {folder}: it has no part {part!r}", limit=", ".join(read.parts))
        shards = cls(folder, part, manifest)
        for entry in shards._entries:
            if not (folder / part / entry["file"]).exists():
                raise ShardError(
                    f"opening harvest {folder}: {part}/{entry['file']} is missing",
                    cause="the file was deleted or moved",
                    cure=f"delete {folder} and run `ksvd-sae harvest` again",
                )
        return shards

    @property
    def _entries(self) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self.manifest["parts"][self.part]["shards"]
        return entries

    @property
    def n_samples(self) -> int:
        return sum(entry["n_samples"] for entry in self._entries)

    @property
    def d_in(self) -> int:
        return int(self.manifest["d_in"])

    @property
    def prepend_bos(self) -> bool:
        """Whether contexts began with a BOS; they all did before manifests said so."""
        return bool(self.manifest.get("prepend_bos", True))

    @property
    def statistics(self) -> Statistics:
        """Of the training part, whichever part this is."""
        path = self.folder / STATISTICS_FILE
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ShardError(
                f"reading {path}: {error}", cause="missing or truncated", cure=f"delete {self.folder} and harvest again"
            ) from error
        numbers = self.manifest["statistics"]
        return Statistics(
            numbers["n_samples"], tensors["centre"], tensors["variance"], numbers["mean_norm"], numbers["median_norm"]
        )

    @property
    def centre_D(self) -> Tensor:
        return self.statistics.centre_D

    def batches(
        self, batch_samples: int, *, seed: int | None = None, part: Callable[[int], slice] | None = None
    ) -> Iterator[Tensor]:
        """(B, d_in) float32 tensors that cover the part once; the last may be shorter.

        Args:
            seed: None keeps the order on disk (which the harvest shuffled); a seed shuffles the shards,
                and the samples inside each.
            part: which rows of a batch of so many samples are wanted; no others are read. None: all.
        """
        if batch_samples < 1:
            raise ShapeError("batches: batch_samples must be at least 1", got=batch_samples)
        left, waiting, n_waiting = self.n_samples, list[Tensor](), 0
        for index, rows_N in self._shuffled(seed):
            shard_ND, start = self.read_shard(index), 0
            while start < len(shard_ND):
                size = min(batch_samples, left)
                taken = min(len(shard_ND) - start, size - n_waiting)
                own = slice(0, size) if part is None else part(size)
                first, last = max(own.start, n_waiting), min(own.stop, n_waiting + taken)
                rows = slice(start + first - n_waiting, start + max(first, last) - n_waiting)
                waiting.append(shard_ND[rows if rows_N is None else rows_N[rows]])
                start, n_waiting = start + taken, n_waiting + taken
                if n_waiting == size:
                    yield torch.cat(waiting).float()
                    left, waiting, n_waiting = left - size, [], 0

    def checked(self, part: Callable[[int], slice]) -> "ActivationShards":
        """The same, with the checksums of some shards verified now, and those of the others left to other processes.

        Args: part: which of so many shards are verified here.
        """
        own = ActivationShards(self.folder, self.part, self.manifest)
        for index in range(len(self._entries))[part(len(self._entries))]:
            own.read_shard(index)
        own._verified.update(entry["file"] for entry in self._entries)
        return own

    def _shuffled(self, seed: int | None) -> Iterator[tuple[int, Tensor | None]]:
        """Shards, and the order of the samples in each (None: as stored)."""
        if seed is None:
            yield from ((index, None) for index in range(len(self._entries)))
            return
        generator = torch.Generator().manual_seed(seed)
        for index in torch.randperm(len(self._entries), generator=generator).tolist():
            yield index, torch.randperm(self._entries[index]["n_samples"], generator=generator)

    def order(self, seed: int) -> Tensor:
        """Positions on disk of the samples in the order in which ``batches`` gives them under this seed."""
        starts = [0, *accumulate(entry["n_samples"] for entry in self._entries)]
        parts = [starts[index] + rows_N for index, rows_N in self._shuffled(seed) if rows_N is not None]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def tensor(self) -> Tensor:
        """The whole part as one (N, d_in) float32 tensor."""
        return next(self.batches(self.n_samples))

    def read_shards(self) -> list[Tensor]:
        """Every shard, mapped: rows are read from disk as they are gathered."""
        return [self.read_shard(index) for index in range(len(self._entries))]

    def read_shard(self, index: int) -> Tensor:
        """One shard as stored.

        Raises: ShardError if the file is truncated, altered or not what the manifest says.
        """
        entry = self._entries[index]
        path = self.folder / self.part / entry["file"]
        where = f"reading shard {self.part}/{entry['file']} of {self.folder}"
        cure = f"delete {self.folder} and run `ksvd-sae harvest` again"
        try:
            if path.name not in self._verified:
                if file_sha256(path) != entry["sha256"]:
                    raise ShardError(
                        f"{where}: its checksum is not the manifest's",
                        cause="the file was truncated or altered after the harvest",
                        cure=cure,
                    )
                self._verified.add(path.name)
            shard_ND: Tensor = load_file(path)[ACTIVATIONS_KEY]
        except (OSError, SafetensorError, KeyError) as error:
            raise ShardError(f"{where}: {error!r}", cause="missing or truncated", cure=cure) from error
        if tuple(shard_ND.shape) != (entry["n_samples"], self.d_in):
            raise ShardError(
                f"{where}: its shape is not the manifest's",
                got=str(tuple(shard_ND.shape)),
                limit=f"({entry['n_samples']}, {self.d_in})",
                cure=cure,
            )
        return shard_ND
