"""Atoms on images: for a sample of each dictionary's atoms, the held-out images that they code most strongly.

Every dictionary codes the same held-out patches. The result is one JSON file, named by the hash of all that it follows
from, with the images of each atom and sign, grey and dark where it does not fire.
"""

import base64
import io
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ksvd_sae.activations.vision.heldout import HeldoutImages
from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.atoms import ImageAtomsConfig
from ksvd_sae.evals.atoms.examples import STRATA, code_text, nearest_atoms, rounded, sample_atoms
from ksvd_sae.evals.base import Heldout, Panelist
from ksvd_sae.store import content_hash, copy_of_other_name, write_json

logger = logging.getLogger(__name__)
# Raised when the same inputs come to give another file.
FORMAT = 2
# Of JPEG: two fifths of the size of a PNG of 128 colours.
_QUALITY = 80
ORANGE, BLUE = (230, 97, 1), (38, 110, 200)
Picture = NDArray[np.uint8]


def run_image_examples(
    panel: list[Panelist], config: ImageAtomsConfig, seed: int, heldout: Heldout, output: Path
) -> dict[str, Path]:
    """Atoms on images of each panelist, computed once; empty if the report shows no atoms.

    Returns: panelist -> JSON file.
    """
    if not config.atoms:
        return {}
    key = {
        "eval": "images",
        "format": FORMAT,
        "harvest": heldout.harvest_hash,
        "setting": config.model_dump(),
        "seed": seed,
    }
    files = {p.name: output / f"{p.name}-{content_hash({**key, 'dictionary': p.content})}.json" for p in panel}
    for panelist in panel:
        if not files[panelist.name].exists() and not copy_of_other_name(files[panelist.name]):
            started = time.perf_counter()
            write_json(files[panelist.name], atoms_on_images(panelist.load(), heldout.images, config, seed))
            logger.info("images of %s: %.1f s", panelist.name, time.perf_counter() - started)
    return files


@torch.no_grad()
def atoms_on_images(sae: Any, images: HeldoutImages, config: ImageAtomsConfig, seed: int) -> dict[str, Any]:
    """One dictionary's sample as JSON values.

    n_tokens, n_images, n_atoms, n_dead (on these images), signed, and atoms. An atom: its index, stratum, density (of
    patches), strongest |code|, nearest, and, for the positive and (where codes have signs) the negative sign: values,
    names and pictures (JPEG) of its images, the strongest first.
    """
    n_images = min(images.n_images, config.images)
    x_IPD, present_IP = next(images.batches(n_images))
    if not bool(present_IP.any()):
        raise EvaluationError("atoms on images: every patch of the held-out images is an outlier")
    codes = code_text(sae, x_IPD[present_IP])
    place_N = present_IP.flatten().nonzero().flatten()
    sample = sample_atoms(codes.density_F, codes.energy_F, config.atoms, seed)
    chosen = [(stratum, atom) for stratum in STRATA for atom in sample[stratum]]
    nearest = nearest_atoms(sae.W_dec.detach(), [atom for _, atom in chosen])
    signed, atoms = bool((codes.value_n < 0).any()), []
    for i, (stratum, atom) in enumerate(chosen):
        token_n, value_n = codes.of(atom)
        code_IP = torch.zeros(present_IP.numel())
        code_IP[place_N[token_n]] = value_n
        code_IP = code_IP.view_as(present_IP)
        sides = {"positive": 1, "negative": -1} if signed else {"positive": 1}
        atoms.append(
            {
                "atom": atom,
                "stratum": stratum,
                "density": rounded(float(codes.density_F[atom])),
                "strongest": rounded(float(value_n.abs().max())),
                "nearest": nearest[i],
                **{name: _side(sign * code_IP, sign, images, config) for name, sign in sides.items()},
            }
        )
    return {
        "format": FORMAT,
        "n_tokens": codes.n_tokens,
        "n_images": n_images,
        "n_atoms": len(codes.density_F),
        "n_dead": int((codes.density_F == 0).sum()),
        "signed": signed,
        "atoms": atoms,
    }


def _side(code_IP: Tensor, sign: int, images: HeldoutImages, config: ImageAtomsConfig) -> dict[str, Any] | None:
    """The images with the largest codes of one sign; None if there are none. Args: code_IP: those are positive."""
    largest_I = code_IP.amax(dim=1)
    top = torch.argsort(largest_I, descending=True, stable=True)[: config.examples]
    top = top[largest_I[top] > 0]
    if not len(top):
        return None
    strength_IP = (code_IP[top].clamp(min=0) / largest_I[top[0]]).view(-1, images.grid.rows, images.grid.columns)
    shown = images.pictures(top.tolist())
    colour = ORANGE if sign > 0 else BLUE
    pictures = [
        jpeg(marked(np.asarray(image.opened()), strength_RC.numpy(), colour, config.pixels))
        for image, strength_RC in zip(shown, strength_IP, strict=True)
    ]
    return {
        "values": [rounded(sign * float(value)) for value in largest_I[top]],
        "images": [_caption(image.label, image.name) for image in shown],
        "pictures": [base64.b64encode(picture).decode("ascii") for picture in pictures],
    }


def _caption(label: str | None, name: str) -> str:
    """An image's class and its own name, without the way to it."""
    return f"{label}/{Path(name).name}" if label is not None else Path(name).name


def marked(image: Picture, strength_RC: NDArray[Any], colour: tuple[int, int, int], pixels: int) -> Picture:
    """An image at so many pixels of height, grey and dark but for the patches of some strength, which have a border.

    Args: strength_RC: of each patch, from 0 (does not fire) to 1.
    """
    from PIL import Image

    rows, columns = strength_RC.shape
    # Whole pixels a patch, so that borders lie on patches.
    each = max(1, round(pixels / rows))
    size = (columns * each, rows * each)
    colours = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)).astype(np.float32)
    grey = colours.mean(axis=2, keepdims=True) * 0.45
    strength = np.kron(strength_RC, np.ones((each, each)))[..., None]
    # Weak patches are seen, too.
    share = np.where(strength > 0, 0.3 + 0.7 * strength, 0)
    shown = grey + share * (colours - grey)
    fires = np.pad(strength[..., 0] > 0, 1)
    inside = fires[:-2, 1:-1] & fires[2:, 1:-1] & fires[1:-1, :-2] & fires[1:-1, 2:]
    border = (fires[1:-1, 1:-1] & ~inside)[..., None]
    shown = np.where(border, shown + share * (np.array(colour) - shown), shown)
    return shown.round().astype(np.uint8)


def jpeg(picture: Picture) -> bytes:
    """A picture as a small file."""
    from PIL import Image

    content = io.BytesIO()
    # Colours at full resolution: borders have one pixel.
    Image.fromarray(picture).save(content, "JPEG", quality=_QUALITY, subsampling=0, optimize=True)
    return content.getvalue()
