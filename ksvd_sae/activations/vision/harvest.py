"""The harvest stage on images: from images to shuffled shards of their patches, with statistics.

``collecting.py`` makes shards of what the model gives. Held-out images come first in the shuffled order of all, and
training has those after them, without what was cut from the same photographs. Beside the held-out shards lie the places
of their samples, and the images themselves.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from ksvd_sae.activations.collecting import CollectingConfig, Collection, collected
from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.activations.vision.heldout import IMAGES_FILE, PLACES, PLACES_FILE, write_images
from ksvd_sae.activations.vision.images import ImagesConfig, LabelledImage
from ksvd_sae.activations.vision.model import ImageReader, VisionModelConfig
from ksvd_sae.errors import ImageError
from ksvd_sae.progress import progress
from ksvd_sae.store import atomic_path, content_hash, file_sha256, write_json
from ksvd_sae.together import ALONE, Together

_GRID_FILE, _PREPROCESSING_FILE = "grid.json", "preprocessing.json"


class ImageHarvestConfig(CollectingConfig):
    """How a vision model's activations are collected. Tokens are patches, 256 of an image at 224 pixels."""

    outlier_factor: float | None = Field(
        None,
        gt=1.0,
        description="leave out tokens with a norm above this multiple of the median, as large models have without "
        "registers; null keeps all",
    )
    batch_images: int = Field(16, ge=1)


@dataclass(frozen=True)
class ImageHarvest:
    """What is harvested: a vision model's activations on images. seed: of their order, and of the shuffle."""

    model: VisionModelConfig
    images: ImagesConfig
    config: ImageHarvestConfig
    seed: int

    @cached_property
    def key(self) -> dict[str, Any]:
        """Everything that the activations follow from."""
        hashes = {"model": self.model.content_hash(), "images": self.images.content_hash()}
        return {
            "model": self.model.model_dump(mode="json"),
            "images": self.images.model_dump(mode="json"),
            "harvest": self.config.model_dump(mode="json"),
            "seed": self.seed,
            "sources": {name: known for name, known in hashes.items() if known is not None},
        }

    def folder(self, root: Path) -> Path:
        """Its place in a cache."""
        name = f"{Path(self.model.name).name}-{self.model.hook}-{content_hash(self.key)}"
        return root / "activations" / name


def run_image_harvest(
    harvest: ImageHarvest,
    folder: Path,
    reader: Callable[[], ImageReader],
    *,
    needs_labels: bool = False,
    together: Together = ALONE,
) -> ActivationShards:
    """Collect and finish a harvest in ``folder``, or reuse the finished one there.

    Args:
        folder: one that another key made is refused.
        reader: called once, and only if there is something left to collect.
        needs_labels: refuse images without classes before anything is collected.
        together: the processes that collect it: the same bits as by one.
    Raises: ImageError (too few images, a broken one, none with a class), HubError, ActivationError, DiskSpaceError,
        ManifestError.
    """
    return collected(folder, harvest.key, lambda: _make(harvest, folder, reader, needs_labels, together), together)


def _make(
    harvest: ImageHarvest, folder: Path, reader: Callable[[], ImageReader], needs_labels: bool, together: Together
) -> None:
    started = time.perf_counter()
    collection = Collection(folder, harvest.config, "images", together)
    prepared = collection.raw / _PREPROCESSING_FILE
    if not together.all(collection.is_whole and (folder / IMAGES_FILE).exists() and prepared.exists()):
        loaded = reader()
        if together.is_first:
            write_json(prepared, loaded.preprocessing)
        _collect(harvest, loaded, collection, needs_labels, together)
    together.wait()
    facts = {
        "grid": json.loads((collection.raw / _GRID_FILE).read_text()),
        "preprocessing": json.loads(prepared.read_text()),
    }

    def of_part(part: str, place_N: Tensor) -> dict[str, Any]:
        known: dict[str, Any] = {"n_images": collection.n_units(part)}
        if part == "heldout":
            with atomic_path(folder / PLACES_FILE) as temporary:
                save_file({PLACES: place_N.contiguous()}, temporary)
            known["places_sha256"] = file_sha256(folder / PLACES_FILE)
        return known

    def seconds() -> float:
        return time.perf_counter() - started

    collection.finish(harvest.key, harvest.seed, seconds, of_part, prepend_bos=False, **facts)


def _collect(
    harvest: ImageHarvest, reader: ImageReader, collection: Collection, needs_labels: bool, together: Together
) -> None:
    """What all processes find alike, rank 0 writes."""
    config, stream, drawn = harvest.config, harvest.images.images(harvest.seed), list[LabelledImage]()

    def read(images: list[LabelledImage]) -> Tensor:
        if needs_labels and (without := [image for image in images if image.label is None]):
            raise _no_label(harvest.images, without[0])
        x_BTD = reader.read(reader.pixels(images))
        # Before the part that it is of, so that a harvest that was stopped knows it.
        if together.is_first and not collection.is_begun:
            write_json(collection.raw / _GRID_FILE, asdict(reader.grid))
        return x_BTD.flatten(0, 1)

    def count(images: list[LabelledImage]) -> int:
        if reader.is_new:
            reader.read(reader.pixels(images[:1]))
        return len(images) * reader.grid.tokens

    def remembered() -> Iterator[LabelledImage]:
        for image in stream:
            drawn.append(image)
            yield image

    with progress("harvest", collection.wanted_tokens, "tokens") as advance:
        advance(collection.n_tokens())
        whole = collection.fill("heldout", remembered(), config.batch_images, read, count, advance)
        if not whole:
            raise _too_few(harvest, "heldout", collection)
        if together.is_first and not (collection.folder / IMAGES_FILE).exists():
            write_images(collection.folder / IMAGES_FILE, drawn, reader, config.batch_images)
        heldout = {image.origin for image in drawn if image.origin is not None}
        others = (image for image in stream if image.origin not in heldout)
        if not collection.fill("train", others, config.batch_images, read, count, advance):
            raise _too_few(harvest, "train", collection)


def _too_few(harvest: ImageHarvest, part: str, collection: Collection) -> ImageError:
    wanted = getattr(harvest.config, f"{part}_tokens")
    return ImageError(
        f"harvest: there are too few images for {wanted:,} {part} tokens",
        got=f"{collection.n_tokens(part):,} tokens of {collection.n_units(part):,} {part} images in whole parts",
        cause="a small folder or data set, or a split that holds few of its images",
        cure=f"ask for fewer tokens (harvest.{part}_tokens) or give more images",
    )


def _no_label(images: ImagesConfig, without: LabelledImage) -> ImageError:
    of_folder = images.source == "folder"
    return ImageError(
        f"harvest: image {without.name} has no class, and evals of this run need one",
        cause="images that lie in no folder of their class" if of_folder else f"no column {images.label_column!r}",
        cure=("put images into a folder a class" if of_folder else "set images.label_column to the column of classes")
        + "; or set evaluation.probe_preservation: null and evaluation.image_probing: null",
    )
