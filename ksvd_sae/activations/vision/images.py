"""Where images come from: a folder, a data set that ``datasets`` reads, or packages; with their classes, if any."""

import hashlib
import io
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ksvd_sae.activations.text_datasets import FORMATS, HubDataset
from ksvd_sae.errors import ImageError
from ksvd_sae.offline.pictures import PICTURES
from ksvd_sae.strict import Strict

if TYPE_CHECKING:
    from PIL.Image import Image

# Of a file, for the hash of a folder.
_BEGINNING = 16_384
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
# Rows of a stream among which the next one is drawn.
_SHUFFLED_ROWS = 1_000
_OF_HUB = ("config", "revision", "data_files")


@dataclass(frozen=True)
class LabelledImage:
    """An image that has not been read yet. name: its file or row. label: its class; None: it has none. origin: what it
    was cut from; no two parts of a harvest have images of one."""

    name: str
    label: str | None
    content: "Path | bytes | Image"
    origin: str | None = None

    def opened(self) -> "Image":
        """In RGB. Raises: ImageError if it is missing or broken."""
        from PIL import Image

        try:
            if isinstance(self.content, Image.Image):
                return self.content.convert("RGB")
            with warnings.catch_warnings():
                # Of metadata that is damaged, and of palettes whose transparency goes.
                warnings.simplefilter("ignore", UserWarning)
                source = io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content
                with Image.open(source) as image:
                    return image.convert("RGB")
        # PIL raises SyntaxError, struct.error and others for what is broken.
        except Exception as error:
            raise ImageError(
                f"image {self.name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}",
                cause="a truncated or misnamed file, or a format that Pillow does not read",
                cure="mend it, or take it away",
            ) from error


class ImagesConfig(Strict):
    """Where images come from."""

    source: Literal["hub", "folder", "offline"] = Field(
        "hub",
        description="hub: a data set on the Hub, or local files by their format; folder: files in folders; offline: "
        "from Python packages",
    )
    dataset: str = Field(
        description="Hub name; or a format (parquet) with data_files; or the path of a folder, in which the folder "
        f"that an image lies in is its class; offline: {' or '.join(PICTURES)}"
    )
    split: str = "train"
    column: str = Field("image", description="holds the images")
    label_column: str | None = Field("label", description="holds their classes; null: there are none")
    streaming: bool = Field(True, description=f"false: shuffled as a whole, not among {_SHUFFLED_ROWS:,} at a time")
    config: str | None = Field(None, description="which one of a data set that has several")
    revision: str | None = Field(None, description="commit, branch or tag on the Hub; null: the newest")
    data_files: str | list[str] | None = Field(None, description="with dataset: parquet: local files or URLs")

    @model_validator(mode="after")
    def _checked(self) -> "ImagesConfig":
        given = [key for key in _OF_HUB if getattr(self, key) is not None]
        if given and self.source != "hub":
            raise ValueError(f"images.{given[0]} goes with images.source 'hub', not {self.source!r}")
        if self.source == "offline" and self.dataset not in PICTURES:
            raise ValueError(f"images.source offline has {' and '.join(PICTURES)}, not {self.dataset!r}")
        if self.source == "hub" and self.dataset in FORMATS and not self.data_files:
            raise ValueError(f"images.dataset {self.dataset!r} is a format of files and needs images.data_files")
        return self

    @property
    def name(self) -> str:
        """The true name of the images."""
        return Path(self.dataset).name + (f"-{self.config}" if self.config else "")

    @property
    def _folder(self) -> Path:
        return Path(self.dataset).expanduser()

    def content_hash(self) -> str | None:
        """Of names, sizes and beginnings of local files; None for what lies elsewhere.

        Uncompressed images are all of one size; and to read a million whole takes longer than a harvest of some.
        """
        if self.source == "hub":
            return self._on_hub.content_hash()
        if self.source == "offline":
            return PICTURES[self.dataset][0][:12]
        digest = hashlib.sha256()
        for path in _image_files(self._folder):
            digest.update(f"{path.relative_to(self._folder)}\0{path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(_BEGINNING))
        return digest.hexdigest()[:12]

    def images(self, seed: int) -> Iterator[LabelledImage]:
        """The images in an order that ``seed`` shuffles, the same at every call.

        Raises: ImageError (no such folder, no images in it, a column without images), HubError (see ``HubDataset``).
        """
        if self.source == "hub":
            return self._of_rows(seed)
        if self.source == "offline":
            _, pictures = PICTURES[self.dataset]
            return (LabelledImage(p.name, p.label, p.image, p.origin) for p in pictures(seed))
        return self._of_folder(seed)

    def _of_folder(self, seed: int) -> Iterator[LabelledImage]:
        files = _image_files(self._folder)
        random.Random(seed).shuffle(files)
        for path in files:
            label = None if path.parent == self._folder or self.label_column is None else path.parent.name
            yield LabelledImage(str(path), label, path)

    @property
    def _on_hub(self) -> HubDataset:
        named = {"name": self.config, "revision": self.revision, "data_files": self.data_files}
        options = {key: value for key, value in named.items() if value is not None}
        return HubDataset(self.dataset, self.split, self.streaming, options, "images")

    def _of_rows(self, seed: int) -> Iterator[LabelledImage]:
        import datasets

        names: list[str] = []

        def prepared(rows: Any) -> Any:
            features = rows.features or {}
            if isinstance(features.get(self.column), datasets.Image):
                rows = rows.cast_column(self.column, datasets.Image(decode=False))
            names.extend(getattr(features.get(self.label_column), "names", ()))
            several = {"buffer_size": _SHUFFLED_ROWS} if isinstance(rows, datasets.IterableDataset) else {}
            return rows.shuffle(seed=seed, **several)

        for number, row in enumerate(self._on_hub.rows(self.column, prepared), start=1):
            where = f"{number} of {self.name} as shuffled"
            label = None if self.label_column is None else row.get(self.label_column)
            if isinstance(label, int) and label < len(names):
                label = names[label] if label >= 0 else None
            yield _from_row(row[self.column], None if label is None else str(label), where, self.column)


def _from_row(value: Any, label: str | None, where: str, column: str) -> LabelledImage:
    from PIL import Image

    path = None
    if isinstance(value, dict) and {"bytes", "path"} <= value.keys():
        path, value = value["path"], value["bytes"] or value["path"]
    name = where if path is None else f"{path} ({where})"
    if isinstance(value, (bytes, Image.Image)):
        return LabelledImage(name, label, value)
    if isinstance(value, str):
        return LabelledImage(name, label, Path(value))
    raise ImageError(
        f"image {name}: column {column!r} holds none",
        got=type(value).__name__,
        limit="an image, its file's bytes, or a path",
        cause="another column was meant",
        cure="set images.column to the column of the images",
    )


def _image_files(folder: Path) -> list[Path]:
    """In the order of their names; hidden ones are left out."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in _ENDINGS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise ImageError(
            f"image folder {folder}: no images there",
            limit=", ".join(_ENDINGS),
            cause="an empty folder, or images under other endings" if folder.is_dir() else "a wrong path",
            cure="set images.dataset to a folder with images; for a parquet file set images.source: hub, "
            "images.dataset: parquet and images.data_files",
        )
    return files
