"""Held-out images of a harvest: their activations image by image, their classes, and what the model saw."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.activations.vision.images import LabelledImage
from ksvd_sae.activations.vision.model import Grid, ImageReader
from ksvd_sae.errors import ShardError
from ksvd_sae.store import atomic_path, file_sha256

PLACES_FILE, PLACES = "heldout_places.safetensors", "places"
IMAGES_FILE = "heldout_images.parquet"


def write_images(path: Path, images: Sequence[LabelledImage], reader: ImageReader, batch: int) -> None:
    """What the model sees of them, as PNG, with names and classes."""
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    schema = pyarrow.schema([("name", pyarrow.string()), ("label", pyarrow.string()), ("png", pyarrow.binary())])
    with atomic_path(path) as temporary, pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
        for start in range(0, len(images), batch):
            some = images[start : start + batch]
            pngs = []
            for shown_HWC in reader.pictures(reader.pixels(some)):
                png = io.BytesIO()
                Image.fromarray(shown_HWC.numpy()).save(png, "PNG")
                pngs.append(png.getvalue())
            rows = {"name": [i.name for i in some], "label": [i.label for i in some], "png": pngs}
            writer.write_table(pyarrow.table(rows, schema=schema))


@dataclass(frozen=True)
class HeldoutImages:
    """The held-out part of a harvest of images, in the order in which they were read.

    Notation: I images, T tokens of an image, P of them patches.
    """

    shards: ActivationShards

    @cached_property
    def grid(self) -> Grid:
        return Grid(**self.shards.manifest["grid"])

    @property
    def n_images(self) -> int:
        return int(self.shards.manifest["parts"]["heldout"]["n_images"])

    @cached_property
    def place_N(self) -> Tensor:
        """Of each sample of the held-out shards: image · tokens of an image + token.

        Raises: ShardError if they are missing or altered.
        """
        path = self.shards.folder / PLACES_FILE
        try:
            if file_sha256(path) != self.shards.manifest["parts"]["heldout"]["places_sha256"]:
                raise SafetensorError("its checksum is not the manifest's")
            return load_file(path)[PLACES]
        except (OSError, SafetensorError, KeyError) as error:
            raise ShardError(
                f"reading {path}: {error}",
                cause="missing, truncated or altered",
                cure=f"delete {self.shards.folder} and run `ksvd-sae harvest` again",
            ) from error

    def patches(self) -> tuple[Tensor, Tensor, Tensor]:
        """(image, row, column) of each sample of the held-out shards; row and column are −1 where it is no patch."""
        image_N, token_N = self.place_N // self.grid.tokens, self.place_N % self.grid.tokens - self.grid.others
        row_N, column_N = token_N // self.grid.columns, token_N % self.grid.columns
        is_patch_N = token_N >= 0
        return image_N, torch.where(is_patch_N, row_N, -1), torch.where(is_patch_N, column_N, -1)

    def batches(self, images: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Patches of so many images at a time: x_IPD, zeros where the harvest left one out, and which are there."""
        read = self.shards.read_shards()
        starts = torch.tensor([0, *(len(shard_ND) for shard_ND in read)]).cumsum(0)
        order_N = torch.argsort(self.place_N)
        sorted_N = self.place_N[order_N]
        for first in range(0, self.n_images, images):
            last = min(first + images, self.n_images)
            ends = torch.searchsorted(sorted_N, torch.tensor([first, last]) * self.grid.tokens)
            rows_n = order_N[ends[0] : ends[1]]
            x_nD = torch.empty(len(rows_n), self.shards.d_in)
            shard_n = torch.searchsorted(starts, rows_n, right=True) - 1
            for shard in torch.unique(shard_n).tolist():
                slots = (shard_n == shard).nonzero().flatten()
                x_nD[slots] = read[shard][rows_n[slots] - starts[shard]].float()
            at_n = self.place_N[rows_n] - first * self.grid.tokens
            x_ITD = torch.zeros((last - first) * self.grid.tokens, self.shards.d_in)
            present_IT = torch.zeros(len(x_ITD), dtype=torch.bool)
            x_ITD[at_n], present_IT[at_n] = x_nD, True
            shape = (last - first, self.grid.tokens)
            yield x_ITD.view(*shape, -1)[:, self.grid.others :], present_IT.view(shape)[:, self.grid.others :]

    # ------------------------------------------------------------ the images

    @cached_property
    def names(self) -> list[str]:
        return self._column("name")

    @cached_property
    def labels(self) -> list[str | None]:
        """Classes; None for images that have none."""
        return self._column("label")

    def pictures(self, images: Sequence[int]) -> list[LabelledImage]:
        """What the model saw of some of them."""
        pngs = self._column("png")
        return [LabelledImage(self.names[i], self.labels[i], pngs[i]) for i in images]

    def _column(self, name: str) -> list:  # type: ignore[type-arg]
        import pyarrow
        import pyarrow.parquet

        path = self.shards.folder / IMAGES_FILE
        try:
            return pyarrow.parquet.read_table(path, columns=[name]).column(name).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise ShardError(
                f"reading {path}: {error}",
                cause="missing, truncated or altered",
                cure=f"delete {self.shards.folder} and run `ksvd-sae harvest` again",
            ) from error
