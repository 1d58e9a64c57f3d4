"""Photographs cut into squares; digits. The photographs of scikit-image's wheel are fetched by nobody here."""

import io
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ksvd_sae.activations.vision.images import ImagesConfig
from ksvd_sae.errors import ImageError
from ksvd_sae.offline import pictures

SIZES = {"wide": (60, 40), "tall": (40, 90), "square": (50, 50)}


@pytest.fixture
def photos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three whose pixels say where they are: red is the column, green the row."""
    found = {}
    for name, (width, height) in SIZES.items():
        rows, columns = np.mgrid[:height, :width]
        content = io.BytesIO()
        Image.fromarray(np.stack([columns, rows, 0 * rows], axis=2).astype(np.uint8)).save(content, "PNG")
        found[name] = content.getvalue()
    monkeypatch.setattr(pictures, "_photos", lambda: found)


def of(dataset: str, **options: Any) -> ImagesConfig:
    return ImagesConfig(source="offline", dataset=dataset, **options)


@pytest.mark.usefixtures("photos")
def test_crops_are_where_they_say_and_reach_the_edges() -> None:
    crops = list(of("photos").images(seed=0))
    assert Counter(crop.origin for crop in crops) == dict.fromkeys(SIZES, pictures.CROPS_OF_A_PHOTO)
    assert len({crop.name for crop in crops}) == len(crops)
    edges = {name: [0, 0] for name in SIZES}
    for crop in crops:
        photo, side, _, place = crop.name.split()
        x, y = map(int, place.split(","))
        shown = np.asarray(crop.opened())
        assert shown.shape == (int(side.removesuffix("px")),) * 2 + (3,)
        assert tuple(shown[0, 0, :2]) == (x, y)
        assert crop.origin == photo
        edges[photo] = np.maximum(edges[photo], shown[-1, -1, :2] + 1).tolist()
    assert edges == {name: list(size) for name, size in SIZES.items()}


@pytest.mark.usefixtures("photos")
def test_the_seed_shuffles_photographs_as_a_whole() -> None:
    orders = {tuple(dict.fromkeys(crop.origin for crop in of("photos").images(seed))) for seed in range(8)}
    assert len(orders) > 1
    assert all(len(order) == len(SIZES) for order in orders)
    one, again = ([crop.name for crop in of("photos").images(seed=0)] for _ in range(2))
    assert one == again
    origins = [crop.origin for crop in of("photos").images(seed=0)]
    assert sum(one != other for one, other in pairwise(origins)) == len(SIZES) - 1


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    digits, loaded = list(of("digits").images(seed=0)), load_digits()
    assert len(digits) == 1797
    for digit in digits[:20]:
        i = int(digit.name.removeprefix("digit "))
        assert digit.label == str(loaded.target[i])
        assert np.array_equal(np.asarray(digit.opened())[..., 0], (loaded.images[i] * 255 / 16).astype(np.uint8))
    assert {digit.label for digit in digits[:200]} == set("0123456789")


def test_other_pictures_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "DIGITS_SHA256", "0" * 64)
    with pytest.raises(ImageError, match="not those that are known"):
        next(of("digits").images(seed=0))


def test_photographs_that_come_with_other_packages_are_there() -> None:
    """matplotlib and scikit-learn move their files: then the demo has to be told."""
    from importlib.util import find_spec
    from pathlib import Path

    for package, names in pictures._INSTALLED.items():
        for name in names:
            with Image.open(Path(str(find_spec(package).origin)).parent / name) as photo:  # type: ignore[union-attr]
                assert min(photo.size) > 400, name


def test_a_misspelt_one_is_refused() -> None:
    with pytest.raises(ValueError, match="photos and digits, not 'fotos'"):
        of("fotos")
    with pytest.raises(ValueError, match=r"goes with images\.source 'hub', not 'offline'"):
        of("photos", revision="main")
