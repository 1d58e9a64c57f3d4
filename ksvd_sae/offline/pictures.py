"""Photographs and digits that come with Python packages.

Photographs: 16 of them, from scikit-image's wheel, scikit-learn and matplotlib. CC0 or public domain: astronaut, brick,
camera, chelsea, clock_motion, coffee, grass, gravel, hubble_deep_field, retina, rocket, grace_hopper (US Navy). Without
known copyright restrictions: coins, ihc. CC BY 2.0: china by danielbuechele, flower by vultilion. Each is cut into 14
overlapping squares of three sizes. Crops of one photograph have its name as their origin.

Digits: 1,797 of ten classes, 8 x 8 pixels, by hand (Alpaydin and Kaynak, UCI repository, CC BY 4.0), in scikit-learn.
"""

import hashlib
import io
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ksvd_sae.errors import ImageError
from ksvd_sae.offline.wheels import Wheel

if TYPE_CHECKING:
    from PIL.Image import Image

SKIMAGE = Wheel(
    "scikit-image==0.26.0",
    "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
)
_OF_SKIMAGE = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png", "coins.png"),
    *("grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "retina.jpg", "rocket.jpg"),
)
_INSTALLED = {
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
}
PHOTOS_SHA256 = "98052ca5b4672470076d30da91120a027f5fd6dfc9221a65b6f8b903989b7632"
DIGITS_SHA256 = "c522b914135f440538a7cda9e25efdcc6702c387017afeaf4c3c25162511355a"
# Squares with this part of a photograph's shorter side, at so many places across and down.
_CROPS = ((1.0, 1), (0.6, 2), (0.36, 3))
CROPS_OF_A_PHOTO = sum(n * n for _, n in _CROPS)


@dataclass(frozen=True)
class Picture:
    """origin: what it was cut from, where there are others of the same."""

    name: str
    label: str | None
    origin: str | None
    image: "Image"


@lru_cache(maxsize=1)
def _photos() -> dict[str, bytes]:
    """By name. Raises: as ``Wheel.read``, ImageError (others than those that are known)."""
    photos = {Path(name).stem: SKIMAGE.read(f"skimage/data/{name}") for name in _OF_SKIMAGE}
    for package, names in _INSTALLED.items():
        spec = find_spec(package)
        assert spec, "this package needs both"
        assert spec.origin, "both are files"
        photos |= {Path(name).stem: (Path(spec.origin).parent / name).read_bytes() for name in names}
    _check("photos", b"".join(photos[name] for name in sorted(photos)), PHOTOS_SHA256)
    return photos


def _check(what: str, content: bytes, known: str) -> None:
    if (found := hashlib.sha256(content).hexdigest()) != known:
        raise ImageError(
            f"offline images: {what} are not those that are known",
            got=found,
            limit=known,
            cause="versions of scikit-learn or matplotlib with other files",
            cure="install with -c constraints.txt",
        )


def _photo_crops(seed: int) -> Iterator[Picture]:
    """Photograph after photograph, in an order that ``seed`` shuffles."""
    from PIL import Image

    photos = _photos()
    for photo in random.Random(seed).sample(sorted(photos), len(photos)):
        with Image.open(io.BytesIO(photos[photo])) as opened:
            image = opened.convert("RGB")
        for part, n in _CROPS:
            side = round(part * min(image.size))
            for row in range(n):
                for column in range(n):
                    x, y = (_place(size - side, i, n) for size, i in zip(image.size, (column, row), strict=True))
                    crop = image.crop((x, y, x + side, y + side))
                    yield Picture(f"{photo} {side}px at {x},{y}", None, photo, crop)


def _place(room: int, i: int, n: int) -> int:
    """The i-th of n places, evenly spread; one alone is in the middle."""
    return round(room * (i / (n - 1) if n > 1 else 0.5))


def _digits(seed: int) -> Iterator[Picture]:
    from PIL import Image
    from sklearn.datasets import load_digits

    loaded = load_digits()
    pixels = (loaded.images * 255 / 16).astype("uint8")
    _check("digits", pixels.tobytes() + loaded.target.astype("uint8").tobytes(), DIGITS_SHA256)
    for i in random.Random(seed).sample(range(len(pixels)), len(pixels)):
        yield Picture(f"digit {i}", str(loaded.target[i]), None, Image.fromarray(pixels[i]))


# By name: their hash, and the pictures in an order that a seed shuffles.
PICTURES: dict[str, tuple[str, Callable[[int], Iterator[Picture]]]] = {
    "photos": (PHOTOS_SHA256, _photo_crops),
    "digits": (DIGITS_SHA256, _digits),
}
