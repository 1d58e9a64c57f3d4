"""Held-out images of a planted dictionary: some atoms lie in patches of ground, some are of one class alone."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ksvd_sae.activations.shards import STATISTICS_FILE, ActivationShards, write_harvest
from ksvd_sae.activations.vision.heldout import IMAGES_FILE, PLACES, PLACES_FILE, HeldoutImages
from ksvd_sae.dictionary import Dictionary
from ksvd_sae.evals.base import EvalSetting, Heldout
from ksvd_sae.learning.coding import Coding
from ksvd_sae.sae import sae_from_dictionary
from ksvd_sae.store import MANIFEST, file_sha256, write_json
from tests.strategies import generator

N_IMAGES, ROWS, COLUMNS, D_IN, N_ATOMS, K = 60, 5, 6, 16, 24, 3
N_CLASSES = 3


def planted() -> tuple[Tensor, Tensor, list[str]]:
    """(x_IPD, atoms_MD, classes)."""
    draw = generator(0)
    atoms_MD = torch.nn.functional.normalize(torch.randn(N_ATOMS, D_IN, generator=draw), dim=1)
    code_IPM = torch.zeros(N_IMAGES, ROWS, COLUMNS, N_ATOMS)
    for i in range(N_IMAGES):
        # The first atoms in a block each, which of them says the class, now and then another's; the others anywhere.
        kind = i % N_CLASSES if torch.rand(1, generator=draw) < 0.9 else 0
        r, c = torch.randint(0, 3, (2,), generator=draw).tolist()
        code_IPM[i, r : r + 3, c : c + 3, kind] = 2 + torch.rand(3, 3, generator=draw)
        scattered = torch.rand(ROWS, COLUMNS, N_ATOMS, generator=draw) < 0.08
        code_IPM[i, ..., N_CLASSES:] += (scattered * torch.rand(ROWS, COLUMNS, N_ATOMS, generator=draw))[..., 3:]
    noise = 0.05 * torch.randn(N_IMAGES, ROWS, COLUMNS, D_IN, generator=draw)
    x_IPD = (code_IPM @ atoms_MD + noise + 0.5).flatten(1, 2)
    return x_IPD, atoms_MD, [f"class {i % N_CLASSES}" for i in range(N_IMAGES)]


def planted_elsewhere(seed: int = 2) -> tuple[Tensor, list[str]]:
    """(x_IPD, classes): of fewer images, each patch one of six directions from the mean of ``planted``, which few atoms
    code; two are of a class."""
    draw = generator(seed)
    centre_D = planted()[0].flatten(0, 1).mean(dim=0)
    direction_UD = torch.nn.functional.normalize(torch.randn(2 * N_CLASSES, D_IN, generator=draw), dim=1)
    kind_I = torch.arange(N_IMAGES // 2) % N_CLASSES
    of_class_IP = 2 * kind_I[:, None] + torch.randint(0, 2, (len(kind_I), ROWS * COLUMNS), generator=draw)
    other_IP = torch.randint(0, 2 * N_CLASSES, of_class_IP.shape, generator=draw)
    which_IP = torch.where(torch.rand(of_class_IP.shape, generator=draw) < 0.4, of_class_IP, other_IP)
    length_IP = 0.5 + torch.rand(which_IP.shape, generator=draw)
    return centre_D + length_IP[..., None] * direction_UD[which_IP], [f"class {kind}" for kind in kind_I.tolist()]


def heldout_of(
    folder: Path, x_IPD: Tensor, labels: list[str | None], key: dict[str, Any] | None = None, **facts: Any
) -> Heldout:
    """A finished harvest whose held-out samples are those of the images in a random order."""
    import pyarrow
    import pyarrow.parquet

    x_ND = x_IPD.flatten(0, 1)
    place_N = torch.randperm(len(x_ND), generator=generator(1))
    shuffled = x_ND[place_N]
    write_harvest(folder, key or {"made": "by hand"}, [x_ND], [shuffled[:500], shuffled[500:]])
    save_file({PLACES: place_N}, folder / PLACES_FILE)
    manifest = json.loads((folder / MANIFEST).read_text())
    # Of what it said before.
    del manifest["checksum"]
    manifest["grid"] = {"rows": ROWS, "columns": COLUMNS, "others": 0}
    manifest |= facts
    manifest["parts"]["train"]["n_images"] = len(x_IPD)
    manifest["parts"]["heldout"] |= {"n_images": len(x_IPD), "places_sha256": file_sha256(folder / PLACES_FILE)}
    write_json(folder / MANIFEST, manifest)
    png = io.BytesIO()
    Image.new("RGB", (4 * COLUMNS, 4 * ROWS), (90, 120, 60)).save(png, "PNG")
    rows: dict[str, Any] = {"name": [f"{i}.png" for i in range(len(x_IPD))], "label": labels}
    rows["png"] = [png.getvalue()] * len(x_IPD)
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / IMAGES_FILE)
    return Heldout("planted-heldout", ActivationShards.open(folder, "heldout"), None)


@pytest.fixture(scope="session")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Heldout:
    x_IPD, _, labels = planted()
    return heldout_of(tmp_path_factory.mktemp("planted"), x_IPD, [*labels])


@pytest.fixture(scope="session")
def images(heldout: Heldout) -> HeldoutImages:
    return heldout.images


@pytest.fixture(params=["signed", "split", "nonnegative"])
def sae(request: pytest.FixtureRequest) -> Any:
    """The planted atoms, which code with signs, with a latent for each sign, or without negative codes."""
    x_IPD, atoms_MD, _ = planted()
    coding = Coding(K, "mp", nonnegative=request.param == "nonnegative")
    dictionary = Dictionary(atoms_MD, x_IPD.flatten(0, 1).mean(dim=0), coding)
    view = "split" if request.param == "split" else "signed"
    return sae_from_dictionary(dictionary, model_name="some/model", hook_name="encoder.layer.1", view=view)


def elsewhere_of(folder: Path, home: Heldout) -> HeldoutImages:
    """Other images, with home's statistics."""
    x_IPD, labels = planted_elsewhere()
    other = heldout_of(folder, x_IPD, [*labels])
    shutil.copy(home.shards.folder / STATISTICS_FILE, other.shards.folder)
    return other.images


@pytest.fixture
def setting(heldout: Heldout, tmp_path: Path) -> EvalSetting:
    return EvalSetting("some/model", "float32", "cpu", tmp_path, "", tmp_path / "artifacts", heldout=heldout)
