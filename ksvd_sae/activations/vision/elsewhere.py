"""Images of another source, read as a harvest read its own, on disk: a harvest that has a held-out part alone.

Model, preprocessing, tokens, dtype, the seed of the order and the norm above which a token is an outlier are those of
the harvest; so are the statistics, which its dictionaries know. In the order in which they were read, without pictures.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ksvd_sae.activations.collecting import collected
from ksvd_sae.activations.shards import ActivationShards, finish, shard_name, write_shard
from ksvd_sae.activations.statistics import row_norms
from ksvd_sae.activations.vision.harvest import ImageHarvestConfig
from ksvd_sae.activations.vision.heldout import IMAGES_FILE, PLACES, PLACES_FILE, HeldoutImages
from ksvd_sae.activations.vision.images import ImagesConfig, LabelledImage
from ksvd_sae.activations.vision.model import ImageReader, VisionModelConfig
from ksvd_sae.device import in_parts_that_fit
from ksvd_sae.errors import ImageError
from ksvd_sae.progress import progress
from ksvd_sae.store import atomic_path, content_hash, file_sha256, require_disk_space

_PART = "heldout"


def images_elsewhere(
    images: ImagesConfig, n_images: int, home: ActivationShards, root: Path, device: torch.device
) -> HeldoutImages:
    """Read the first ``n_images``, all where there are fewer, or reuse what was read.

    Args: home: the harvest. root: holds a folder for each source.
    Raises: ImageError (none, a broken one, one without a class unless ``label_column`` is null), HubError, TextError,
        ActivationError, DiskSpaceError.
    """
    key = {
        "images": images.model_dump(mode="json"),
        "content": images.content_hash(),
        "n_images": n_images,
        "harvest": home.manifest["hash"],
    }
    folder = root / f"elsewhere-{images.name}-{content_hash(key)}"
    shards = collected(folder, key, lambda: _make(images, n_images, home, folder, key, device), part=_PART)
    return HeldoutImages(shards)


def _make(
    images: ImagesConfig,
    n_images: int,
    home: ActivationShards,
    folder: Path,
    key: dict[str, Any],
    device: torch.device,
) -> None:
    started, own = time.perf_counter(), home.manifest["key"]
    config = ImageHarvestConfig.model_validate(own["harvest"])
    reader = ImageReader(VisionModelConfig.model_validate(own["model"]), device)
    limit, writer, drawn = home.manifest["statistics"]["outlier_limit"], _Writer(folder, config), list[LabelledImage]()
    stream = islice(images.images(own["seed"]), n_images)
    with progress("other images", n_images, "images") as advance:
        while some := list(islice(stream, config.batch_images)):
            _check_classes(images, some)
            x_ND = torch.cat(list(_read(reader, some, config))).flatten(0, 1)
            if not drawn:
                size = n_images * reader.grid.tokens * x_ND.shape[1] * x_ND.element_size()
                require_disk_space(folder, size, f"reading up to {n_images:,} images of {images.name}")
            writer.add(x_ND, float("inf") if limit is None else limit)
            # What was read of a stream need not stay in memory.
            drawn += [LabelledImage(image.name, image.label, b"") for image in some]
            advance(len(some))
    part = {**writer.finished(), "n_images": len(drawn)}
    _write_names(folder / IMAGES_FILE, drawn)
    facts = {"grid": asdict(reader.grid), "preprocessing": reader.preprocessing}
    seconds = time.perf_counter() - started
    finish(folder, key, {_PART: part}, home.statistics, limit, seconds, prepend_bos=False, **facts)


def _read(reader: ImageReader, images: list[LabelledImage], config: ImageHarvestConfig) -> Iterator[Tensor]:
    """(B, tokens, d_in) as the harvest stores them."""
    dtype = getattr(torch, config.dtype)

    def some(places: slice) -> Tensor:
        return reader.read(reader.pixels(images[places])).to(dtype).cpu()

    return in_parts_that_fit(len(images), len(images), some, "other images", "model.dtype=bfloat16, or another device")


class _Writer:
    """Shards of the tokens that are no outliers, in order, and the places of these."""

    def __init__(self, folder: Path, config: ImageHarvestConfig):
        self._folder, self._shard_tokens = folder, config.shard_tokens
        self._waiting, self._places, self._shards = list[Tensor](), list[Tensor](), list[dict[str, Any]]()
        self._n_seen = 0

    def add(self, x_ND: Tensor, limit: float) -> None:
        kept_n = (row_norms(x_ND) <= limit).nonzero().flatten()
        self._places.append(self._n_seen + kept_n)
        self._waiting.append(x_ND[kept_n])
        self._n_seen += len(x_ND)
        if sum(map(len, self._waiting)) >= self._shard_tokens:
            self._write()

    def _write(self) -> None:
        x_ND = torch.cat(self._waiting)
        self._waiting.clear()
        if len(x_ND):
            self._shards.append(write_shard(self._folder / _PART / shard_name(len(self._shards)), x_ND))

    def finished(self) -> dict[str, Any]:
        """What a manifest says of it."""
        if self._waiting:
            self._write()
        place_N = torch.cat(self._places)
        with atomic_path(self._folder / PLACES_FILE) as temporary:
            save_file({PLACES: place_N}, temporary)
        return {
            "n_samples": len(place_N),
            "shards": self._shards,
            "outliers": self._n_seen - len(place_N),
            "places_sha256": file_sha256(self._folder / PLACES_FILE),
        }


def _check_classes(images: ImagesConfig, some: list[LabelledImage]) -> None:
    if images.label_column is None:
        return
    for image in some:
        if image.label is None:
            raise ImageError(
                f"image {image.name} has no class",
                cause="images that lie in no folder of their class"
                if images.source == "folder"
                else f"no column {images.label_column!r}, or a row without one",
                cure="give each a class; or set images.label_column: null, and do without a probe of them",
            )


def _write_names(path: Path, images: list[LabelledImage]) -> None:
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("name", pyarrow.string()), ("label", pyarrow.string())])
    rows = {"name": [image.name for image in images], "label": [image.label for image in images]}
    with atomic_path(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.table(rows, schema=schema), temporary)
