"""Images as they lie on disk: their order, their classes, and what is said of broken ones."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from ksvd_sae.activations.vision.images import ImagesConfig, LabelledImage
from ksvd_sae.errors import HubError, ImageError
from tests.tiny_vision import CLASSES


def png(colour: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten images with classes, as ``datasets`` writes them."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [{"bytes": png(i), "path": f"{i}.png"} for i in range(10)], "label": [i % 2 for i in range(10)]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "images.parquet")
    return tmp_path / "images.parquet"


def of_parquet(path: Path, **options: Any) -> ImagesConfig:
    return ImagesConfig(source="hub", dataset="parquet", data_files=str(path), **options)


def colours(images: Iterator[LabelledImage]) -> list[int]:
    return [int(np.asarray(image.opened())[0, 0, 0]) for image in images]


def test_folders_are_classes(image_folder: Path) -> None:
    images = list(ImagesConfig(source="folder", dataset=str(image_folder)).images(seed=0))
    assert len(images) == 24
    assert all(Path(image.name).parent.name == image.label for image in images)
    assert {image.label for image in images} == set(CLASSES)
    assert {image.opened().mode for image in images} == {"RGB"}


def test_the_seed_shuffles(image_folder: Path) -> None:
    config = ImagesConfig(source="folder", dataset=str(image_folder))
    one, again, other = ([image.name for image in config.images(seed)] for seed in (0, 0, 1))
    assert one == again
    assert one != other
    assert sorted(one) == sorted(other) == sorted(map(str, image_folder.rglob("*.jpg")))
    # Held-out images come first: those of all classes.
    assert len({Path(name).parent.name for name in one[:6]}) > 1


def test_images_outside_of_folders_have_no_class(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "b.png").write_bytes(png(2))
    (tmp_path / "notes.txt").write_text("no image")
    (image,) = ImagesConfig(source="folder", dataset=str(tmp_path)).images(seed=0)
    assert (image.label, Path(image.name).name) == (None, "a.png")


@pytest.mark.parametrize("streaming", [True, False])
def test_parquet(parquet: Path, streaming: bool) -> None:
    config = of_parquet(parquet, streaming=streaming)
    images = list(config.images(seed=0))
    assert sorted(colours(iter(images))) == list(range(10))
    assert colours(iter(images)) != list(range(10))
    assert colours(config.images(seed=0)) == colours(iter(images))
    assert [image.label for image in images] == [["cat", "dog"][colour % 2] for colour in colours(iter(images))]
    assert images[0].name.startswith(f"{colours(iter(images))[0]}.png")


def test_parquet_with_bare_bytes(tmp_path: Path, parquet: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"picture": [png(1), png(2)]})
    pyarrow.parquet.write_table(table, tmp_path / "bytes.parquet")
    config = of_parquet(tmp_path / "bytes.parquet", column="picture", label_column=None)
    assert sorted(colours(config.images(seed=0))) == [1, 2]
    assert {image.label for image in config.images(seed=0)} == {None}


def test_content_hash_follows_the_files(image_folder: Path, parquet: Path, tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "a.png").write_bytes(png(1))
    few = ImagesConfig(source="folder", dataset=str(tmp_path / "few"))
    before = few.content_hash()
    assert before == few.content_hash()
    (tmp_path / "few" / "b.png").write_bytes(png(1))
    both = few.content_hash()
    assert both != before
    content = bytearray((tmp_path / "few" / "b.png").read_bytes())
    content[-1] ^= 1
    (tmp_path / "few" / "b.png").write_bytes(content)
    assert few.content_hash() != both, "another image of the same size"
    assert of_parquet(parquet).content_hash() is not None


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize("content", [b"", b"no image", png(3)[:45]], ids=["empty", "text", "truncated"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.png").write_bytes(content)
    (image,) = ImagesConfig(source="folder", dataset=str(tmp_path)).images(seed=0)
    with pytest.raises(ImageError, match=r"broken\.png") as caught:
        image.opened()
    assert caught.value.cure


def test_a_broken_row_is_named(parquet: Path) -> None:
    import datasets

    rows = {"image": [{"bytes": b"no image", "path": "holiday.png"}], "label": [0]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features).to_parquet(parquet)
    (image,) = of_parquet(parquet).images(seed=0)
    assert image.label == "0"
    with pytest.raises(ImageError, match=r"holiday\.png"):
        image.opened()


def test_no_images(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ImageError, match="no images there"):
            next(ImagesConfig(source="folder", dataset=str(folder)).images(seed=0))


def test_another_column(parquet: Path) -> None:
    with pytest.raises(ImageError, match="no column 'picture'") as caught:
        next(of_parquet(parquet, column="picture").images(seed=0))
    assert "images.column" in str(caught.value)
    with pytest.raises(ImageError, match="column 'label' holds none"):
        next(of_parquet(parquet, column="label").images(seed=0))


def test_no_such_file(tmp_path: Path, parquet: Path) -> None:
    with pytest.raises(HubError, match=r"images\.data_files"):
        next(of_parquet(tmp_path / "other.parquet").images(seed=0))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"source": "folder", "dataset": "x", "revision": "main"}, "goes with images.source 'hub'"),
        ({"source": "hub", "dataset": "parquet"}, "needs images.data_files"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ImagesConfig(**options)
