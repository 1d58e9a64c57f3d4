"""Atoms on images: the images with the largest codes, and the patches that fire in their pictures."""

import base64
import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ksvd_sae.activations.vision.heldout import HeldoutImages
from ksvd_sae.evals.atoms import ImageAtomsConfig
from ksvd_sae.evals.atoms.on_images import BLUE, ORANGE, atoms_on_images, jpeg, marked
from ksvd_sae.report.atoms import dictionary_atoms
from tests.evals.vision.conftest import COLUMNS, N_IMAGES, ROWS, planted

CONFIG = ImageAtomsConfig(atoms=6, examples=4, pixels=40)


def opened(picture: str) -> np.ndarray:  # type: ignore[type-arg]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))


def test_the_images_with_the_largest_codes_are_shown(sae: Any, images: HeldoutImages) -> None:
    code_IPF = sae.encode(planted()[0].flatten(0, 1)).detach().view(N_IMAGES, ROWS * COLUMNS, -1)
    result = atoms_on_images(sae, images, CONFIG, seed=0)
    assert (result["n_images"], result["n_tokens"]) == (N_IMAGES, N_IMAGES * ROWS * COLUMNS)
    assert result["signed"] == bool((code_IPF < 0).any())
    assert len(result["atoms"]) == 6
    for atom in result["atoms"]:
        code_IP = code_IPF[:, :, atom["atom"]]
        assert atom["density"] == pytest.approx(float((code_IP != 0).double().mean()), rel=1e-3)
        assert ("negative" in atom) == result["signed"]
        for name, sign in (("positive", 1), ("negative", -1)):
            largest_I = (sign * code_IP).amax(dim=1)
            n = min(4, int((largest_I > 0).sum()))
            side = atom.get(name)
            if n == 0:
                assert side is None
                continue
            top = largest_I.topk(n)
            assert side["values"] == pytest.approx((sign * top.values).tolist(), rel=1e-3)
            assert side["images"] == [f"class {i % 3}/{i}.png" for i in top.indices.tolist()]
            assert [opened(picture).shape for picture in side["pictures"]] == n * [(40, 48, 3)]


def test_an_image_alone_is_looked_at(sae: Any, images: HeldoutImages) -> None:
    result = atoms_on_images(sae, images, CONFIG.model_copy(update={"images": 1}), seed=0)
    assert result["n_tokens"] == ROWS * COLUMNS
    assert {name for atom in result["atoms"] for name in (atom["positive"] or {"images": []})["images"]} <= {
        "class 0/0.png"
    }


@pytest.mark.parametrize("colour", [ORANGE, BLUE])
def test_patches_that_fire_keep_their_colours_in_a_border(colour: tuple[int, int, int]) -> None:
    image = np.zeros((60, 72, 3), dtype=np.uint8)
    image[..., 0] = 200
    strength_RC = np.zeros((5, 6))
    strength_RC[1:3, 2:4] = 1
    shown = marked(image, strength_RC, colour, 60)
    assert shown.shape == (60, 72, 3)
    inside = shown[13:35, 25:47]
    assert (inside == [200, 0, 0]).all()
    for edge in (shown[12, 24:48], shown[35, 24:48], shown[12:36, 24], shown[12:36, 47]):
        assert (edge == colour).all()
    shown[12:36, 24:48] = shown[0, 0]
    assert (shown == shown[0, 0]).all()
    assert len(set(shown[0, 0].tolist())) == 1, "the rest is grey"
    weak = marked(image, strength_RC / 10, colour, 60)
    assert 100 > weak[20, 30, 0] > shown[0, 0, 0], "a weak patch is less bright"


def test_pictures_are_small_and_borders_stay() -> None:
    photograph = np.asarray(Image.effect_mandelbrot((96, 80), (-2, -1, 1, 1), 50).convert("RGB"))
    strength_RC = np.zeros((5, 6))
    strength_RC[2, 3] = 1
    shown = marked(photograph, strength_RC, BLUE, 80)
    picture = jpeg(shown)
    assert len(picture) < shown.size / 4
    found = opened(base64.b64encode(picture).decode()).astype(int)
    assert abs(found - shown).mean() < 5
    blueness_HW = found[..., 2] - found[..., 0]
    assert blueness_HW[32:48, 48].mean() > 100
    assert abs(blueness_HW[32:48, 44]).mean() < 20


def test_the_page_has_a_picture_an_image(sae: Any, images: HeldoutImages) -> None:
    result = atoms_on_images(sae, images, CONFIG, seed=0)
    shown = dictionary_atoms("ours", result)
    assert shown.on_images
    n_tokens = N_IMAGES * ROWS * COLUMNS
    assert f"unused on {n_tokens:,} patches of {N_IMAGES} images" in shown.summary
    atoms = [atom for _, _, stratum in shown.strata for atom in stratum]
    assert len(atoms) == 6
    for atom in atoms:
        assert atom.facts[0][1].endswith("of patches")
        for side in atom.sides:
            assert 1 <= len(side.pictures) <= 4
            assert all(data_uri.startswith("data:image/jpeg;base64,") for data_uri, _, _ in side.pictures)


def test_outliers_are_not_coded(sae: Any, images: HeldoutImages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches that the harvest left out fire in no picture, whatever the atoms would make of them."""
    x_IPD, present_IP = next(images.batches(N_IMAGES))
    present_IP = present_IP.clone()
    present_IP[:, : ROWS * COLUMNS // 2] = False
    monkeypatch.setattr(HeldoutImages, "batches", lambda *_: iter([(x_IPD, present_IP)]))
    result = atoms_on_images(sae, images, CONFIG, seed=0)
    assert result["n_tokens"] == int(present_IP.sum())
    code_IPF = sae.encode(x_IPD.flatten(0, 1)).detach().view(N_IMAGES, ROWS * COLUMNS, -1)
    left_IPF = torch.where(present_IP[..., None], code_IPF, 0)
    for atom in result["atoms"]:
        assert atom["strongest"] == pytest.approx(float(left_IPF[..., atom["atom"]].abs().max()), rel=1e-3)
