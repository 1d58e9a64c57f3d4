"""The harvest of images: the same bits however often it was stopped, apart by image, each patch with its place."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ksvd_sae.activations.collecting import SoFar
from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.activations.vision import elsewhere
from ksvd_sae.activations.vision.elsewhere import images_elsewhere
from ksvd_sae.activations.vision.harvest import ImageHarvest, ImageHarvestConfig, run_image_harvest
from ksvd_sae.activations.vision.heldout import PLACES_FILE, HeldoutImages
from ksvd_sae.activations.vision.images import ImagesConfig
from ksvd_sae.activations.vision.model import ImageReader, VisionModelConfig
from ksvd_sae.errors import ImageError, ManifestError, ShardError
from ksvd_sae.store import MANIFEST
from ksvd_sae.together import Together
from tests.threads import in_ranks
from tests.tiny_vision import D_MODEL, PATCH, PIXELS

SIDE = PIXELS // PATCH
PATCHES = SIDE * SIDE


class StoppedError(Exception):
    """Raised in the middle of a harvest, as a power cut would."""


def harvest_of(images: Path, model: Path, *, also: list[str] | None = None, **settings: Any) -> ImageHarvest:
    """Of 24 images four are held out and eight learned from, in parts of at least three."""
    sizes = {"train_tokens": 7 * PATCHES + 1, "heldout_tokens": 4 * PATCHES, "batch_images": 2}
    return ImageHarvest(
        VisionModelConfig(name=str(model), layer=1, also=also or []),
        ImagesConfig(source="folder", dataset=str(images)),
        ImageHarvestConfig(**{**sizes, "shard_tokens": 2 * PATCHES + 1, **settings}),
        seed=0,
    )


def content(folder: Path) -> dict[str, Any]:
    """All files; of the manifest what does not depend on the clock."""
    found: dict[str, Any] = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    manifest = json.loads(found[MANIFEST])
    found[MANIFEST] = {
        name: value for name, value in manifest.items() if name not in ("written", "seconds", "checksum")
    }
    return found


def no_reader(*_: Any) -> ImageReader:
    raise AssertionError("the model was loaded")


@pytest.fixture(scope="module")
def finished(
    image_folder: Path, dinov2_folder: Path, reader: ImageReader, tmp_path_factory: pytest.TempPathFactory
) -> ActivationShards:
    harvest = harvest_of(image_folder, dinov2_folder)
    return run_image_harvest(harvest, tmp_path_factory.mktemp("cache") / "h" / "whole", lambda: reader)


def test_sizes_and_manifest(finished: ActivationShards) -> None:
    manifest = finished.manifest
    assert (finished.d_in, finished.n_samples) == (D_MODEL, 8 * PATCHES), "whole batches of images"
    assert manifest["grid"] == {"rows": SIDE, "columns": SIDE, "others": 0}
    assert manifest["preprocessing"]["crop_size"] == {"height": PIXELS, "width": PIXELS}
    assert manifest["parts"]["heldout"]["n_images"] == 4
    assert manifest["prepend_bos"] is False
    assert not (finished.folder / "raw").exists()


def test_every_held_out_sample_has_its_place(
    finished: ActivationShards, image_folder: Path, dinov2_folder: Path, reader: ImageReader
) -> None:
    """Image, row and column: there the model gives that activation."""
    images = list(harvest_of(image_folder, dinov2_folder).images.images(seed=0))
    x_ITD = reader.read(reader.pixels(images[:4]))
    shards = ActivationShards.open(finished.folder, "heldout")
    image_N, row_N, column_N = HeldoutImages(shards).patches()
    true_ND = x_ITD.view(4, SIDE, SIDE, D_MODEL)[image_N, row_N, column_N]
    assert not torch.equal(image_N, image_N.sort().values), "shuffled"
    assert torch.equal(shards.tensor(), true_ND)
    # Every place once.
    assert len({*zip(image_N.tolist(), row_N.tolist(), column_N.tolist(), strict=True)}) == 4 * PATCHES


def test_training_has_other_images(
    finished: ActivationShards, image_folder: Path, dinov2_folder: Path, reader: ImageReader
) -> None:
    images = list(harvest_of(image_folder, dinov2_folder).images.images(seed=0))
    x_ND = reader.read(reader.pixels(images[4:12])).flatten(0, 1)
    found_ND = finished.tensor()
    assert torch.equal(found_ND[found_ND[:, 0].argsort()], x_ND[x_ND[:, 0].argsort()])


def test_training_has_nothing_that_was_cut_from_held_out_photographs(
    image_folder: Path, dinov2_folder: Path, reader: ImageReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three crops of each: the four that are held out are of two, and the other two crops of these go unused."""
    crops = [
        replace(image, origin=f"photo {i // 3}")
        for i, image in enumerate(harvest_of(image_folder, dinov2_folder).images.images(seed=0))
    ]
    monkeypatch.setattr(ImagesConfig, "images", lambda *_: iter(crops))
    shards = run_image_harvest(harvest_of(image_folder, dinov2_folder), tmp_path / "h", lambda: reader)
    x_ND = reader.read(reader.pixels(crops[6:14])).flatten(0, 1)
    found_ND = shards.tensor()
    assert torch.equal(found_ND[found_ND[:, 0].argsort()], x_ND[x_ND[:, 0].argsort()])


def test_images_come_back_one_by_one(
    finished: ActivationShards, image_folder: Path, dinov2_folder: Path, reader: ImageReader
) -> None:
    images = list(harvest_of(image_folder, dinov2_folder).images.images(seed=0))[:4]
    held = HeldoutImages(ActivationShards.open(finished.folder, "heldout"))
    assert held.labels == [image.label for image in images]
    assert held.names == [image.name for image in images]
    x_IPD, present_IP = (torch.cat(parts) for parts in zip(*held.batches(3), strict=True))
    assert torch.equal(x_IPD, reader.read(reader.pixels(images)))
    assert present_IP.all()
    shown = reader.pictures(reader.pixels(images))
    for picture, true_HWC in zip(held.pictures([0, 1, 2, 3]), shown, strict=True):
        import numpy as np

        assert np.array_equal(np.asarray(picture.opened()), true_HWC.numpy())


@pytest.mark.parametrize("calls", range(6))
def test_stopped_and_gone_on_it_is_the_same(
    finished: ActivationShards,
    image_folder: Path,
    dinov2_folder: Path,
    reader: ImageReader,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls: int,
) -> None:
    """Stopped at each of the six batches; what is whole is not read again."""
    harvest, folder = harvest_of(image_folder, dinov2_folder), tmp_path / "h" / "stopped"
    read: list[int] = []
    original = reader.read

    def counted(pixels: Tensor) -> Tensor:
        if len(read) == calls:
            raise StoppedError
        read.append(len(pixels))
        return original(pixels)

    with monkeypatch.context() as patch:
        patch.setattr(reader, "read", counted)
        with pytest.raises(StoppedError):
            run_image_harvest(harvest, folder, lambda: reader)
    n_whole = sum(json.loads(path.read_text())["n_images"] for path in (folder / "raw").glob("*-0*.json"))
    again: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(reader, "read", lambda pixels: again.append(len(pixels)) or original(pixels))
        run_image_harvest(harvest, folder, lambda: reader)
    assert sum(again) == 12 - n_whole
    assert content(folder) == content(finished.folder)


def test_what_is_collected_is_a_harvest_of_fewer_tokens(
    image_folder: Path, dinov2_folder: Path, reader: ImageReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harvest, (stopped, few, fresh) = harvest_of(image_folder, dinov2_folder), (tmp_path / "h" / n for n in "abc")
    original, read = reader.read, list[int]()

    def counted(pixels: Tensor) -> Tensor:
        if len(read) == 5:
            raise StoppedError
        read.append(len(pixels))
        return original(pixels)

    with monkeypatch.context() as patch:
        patch.setattr(reader, "read", counted)
        with pytest.raises(StoppedError):
            run_image_harvest(harvest, stopped, lambda: reader)
    there = SoFar.of(stopped, harvest.key)
    there.check(harvest.config)
    there.share(few, harvest.config)
    fewer = harvest_of(image_folder, dinov2_folder, train_tokens=there.n_tokens("train"))
    run_image_harvest(fewer, few, no_reader)
    run_image_harvest(fewer, fresh, lambda: reader)
    assert content(few) == content(fresh)


@pytest.mark.parametrize("where", ["write_images", "_write_shuffled", "save_file"])
def test_stopped_while_finishing(
    finished: ActivationShards,
    image_folder: Path,
    dinov2_folder: Path,
    reader: ImageReader,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    from ksvd_sae.activations.collecting import Collection
    from ksvd_sae.activations.vision import harvest as harvesting

    def stop(*_: Any, **__: Any) -> None:
        raise StoppedError

    harvest, folder = harvest_of(image_folder, dinov2_folder), tmp_path / "h" / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(Collection if where == "_write_shuffled" else harvesting, where, stop)
        with pytest.raises(StoppedError):
            run_image_harvest(harvest, folder, lambda: reader)
    # What is whole needs no model; pictures of what the model sees do.
    load: Callable[[], ImageReader] = (lambda: reader) if where == "write_images" else no_reader
    run_image_harvest(harvest, folder, load)
    assert content(folder) == content(finished.folder)


def test_what_is_finished_is_reused(finished: ActivationShards, image_folder: Path, dinov2_folder: Path) -> None:
    harvest = harvest_of(image_folder, dinov2_folder)
    assert run_image_harvest(harvest, finished.folder, no_reader).n_samples == finished.n_samples
    with pytest.raises(ManifestError, match="another config"):
        run_image_harvest(harvest_of(image_folder, dinov2_folder, batch_images=3), finished.folder, no_reader)


def test_cls_beside_patches_and_outliers_left_out(image_folder: Path, dinov2_folder: Path, tmp_path: Path) -> None:
    """Places stay those of the patches; what is no patch is left out where images are coded."""
    harvest = harvest_of(image_folder, dinov2_folder, also=["cls"], outlier_factor=1.05)
    reader = ImageReader(harvest.model, torch.device("cpu"))
    shards = run_image_harvest(harvest, tmp_path / "h" / "cls", lambda: reader)
    heldout = ActivationShards.open(shards.folder, "heldout")
    n_outliers = heldout.manifest["parts"]["heldout"]["outliers"]
    assert 0 < n_outliers == 4 * (PATCHES + 1) - heldout.n_samples
    held = HeldoutImages(heldout)
    image_N, row_N, column_N = held.patches()
    true_ITD = reader.read(reader.pixels(list(harvest.images.images(0))[:4]))
    x_ND = heldout.tensor()
    patch_N = row_N >= 0
    assert torch.equal((row_N < 0), (column_N < 0))
    token_N = torch.where(patch_N, 1 + row_N * SIDE + column_N, 0)
    assert torch.equal(x_ND, true_ITD[image_N, token_N])
    ((x_IPD, present_IP),) = held.batches(4)
    limit = heldout.manifest["statistics"]["outlier_limit"]
    assert torch.equal(present_IP, true_ITD[:, 1:].norm(dim=2) <= limit)
    assert torch.equal(x_IPD, true_ITD[:, 1:] * present_IP[..., None])


# ---------------------------------------------------------------- other images


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_images_elsewhere_are_read_as_those_at_home(
    image_folder: Path, dinov2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Of the same source they are the same bit for bit, CLS and outliers too; and they are read once."""
    settings: dict[str, Any] = {"outlier_factor": 1.05, "dtype": dtype, "shard_tokens": PATCHES // 4}
    harvest = harvest_of(image_folder, dinov2_folder, also=["cls"], **settings)
    reader = ImageReader(harvest.model, torch.device("cpu"))
    home = run_image_harvest(harvest, tmp_path / "h" / "home", lambda: reader)
    held = HeldoutImages(ActivationShards.open(home.folder, "heldout"))
    there = images_elsewhere(harvest.images, 4, home, tmp_path / "others", reader.device)
    assert (there.n_images, there.grid, there.labels, there.names) == (4, held.grid, held.labels, held.names)
    assert len(there.shards.read_shards()) > 1
    assert there.shards.manifest["parts"]["heldout"]["outliers"] > 0
    for ours, true in zip(there.batches(3), held.batches(3), strict=True):
        assert torch.equal(ours[0], true[0])
        assert torch.equal(ours[1], true[1])
    assert there.shards.statistics.scale == home.statistics.scale
    monkeypatch.setattr(elsewhere, "ImageReader", no_reader)
    again = images_elsewhere(harvest.images, 4, home, tmp_path / "others", reader.device)
    assert again.shards.folder == there.shards.folder


def test_all_images_where_there_are_fewer(finished: ActivationShards, image_folder: Path, tmp_path: Path) -> None:
    images = ImagesConfig(source="folder", dataset=str(image_folder / "disc"), label_column=None)
    there = images_elsewhere(images, 1000, finished, tmp_path, torch.device("cpu"))
    assert (there.n_images, there.labels) == (8, [None] * 8)


def test_images_elsewhere_without_classes_or_broken(
    finished: ActivationShards, image_folder: Path, tmp_path: Path
) -> None:
    source, cpu = ImagesConfig(source="folder", dataset=str(image_folder / "disc")), torch.device("cpu")
    with pytest.raises(ImageError, match="has no class") as caught:
        images_elsewhere(source, 10, finished, tmp_path, cpu)
    assert "label_column: null" in str(caught.value.cure)
    folder = tmp_path / "broken" / "disc"
    folder.mkdir(parents=True)
    (folder / "5.jpg").write_bytes((image_folder / "disc" / "005.jpg").read_bytes()[:500])
    with pytest.raises(ImageError, match=r"disc/5\.jpg"):
        images_elsewhere(source.model_copy(update={"dataset": str(folder.parent)}), 10, finished, tmp_path, cpu)


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(("part", "images"), [("heldout", 30), ("train", 25)])
def test_too_few_images(
    image_folder: Path, dinov2_folder: Path, reader: ImageReader, tmp_path: Path, part: str, images: int
) -> None:
    harvest = harvest_of(image_folder, dinov2_folder, **{f"{part}_tokens": images * PATCHES})
    with pytest.raises(ImageError, match=f"too few images for {images * PATCHES:,} {part} tokens") as caught:
        run_image_harvest(harvest, tmp_path / "h" / "few", lambda: reader)
    assert f"harvest.{part}_tokens" in str(caught.value.cure)


def test_images_without_classes_where_evals_need_them(
    dinov2_folder: Path, reader: ImageReader, tmp_path: Path, image_folder: Path
) -> None:
    (tmp_path / "flat").mkdir()
    for i, path in enumerate(sorted(image_folder.rglob("*.jpg"))):
        (tmp_path / "flat" / f"{i}.jpg").write_bytes(path.read_bytes())
    harvest = harvest_of(tmp_path / "flat", dinov2_folder)
    with pytest.raises(ImageError, match="has no class") as caught:
        run_image_harvest(harvest, tmp_path / "h" / "flat", lambda: reader, needs_labels=True)
    assert "evaluation.probe_preservation: null" in str(caught.value.cure)
    shards = run_image_harvest(harvest, tmp_path / "h" / "flat", lambda: reader)
    assert HeldoutImages(ActivationShards.open(shards.folder, "heldout")).labels == [None] * 4


def test_a_broken_image_is_named(dinov2_folder: Path, reader: ImageReader, tmp_path: Path, image_folder: Path) -> None:
    (tmp_path / "images").mkdir()
    for i, path in enumerate(sorted(image_folder.rglob("*.jpg"))[:8]):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(path.read_bytes()[: 500 if i == 5 else None])
    with pytest.raises(ImageError, match=r"images/5\.jpg"):
        run_image_harvest(harvest_of(tmp_path / "images", dinov2_folder), tmp_path / "h" / "x", lambda: reader)


def test_altered_places_are_refused(finished: ActivationShards, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "altered"
    shutil.copytree(finished.folder, folder)
    path = folder / PLACES_FILE
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ShardError, match="checksum"):
        HeldoutImages(ActivationShards.open(folder, "heldout")).patches()


def test_by_three_processes(
    finished: ActivationShards, image_folder: Path, dinov2_folder: Path, reader: ImageReader, tmp_path: Path
) -> None:
    """The same bits."""
    harvest, folder = harvest_of(image_folder, dinov2_folder), tmp_path / "h" / "three"

    def own(together: Together) -> None:
        # A reader that has not read anything yet.
        fresh = ImageReader(harvest.model, reader.device)
        run_image_harvest(harvest, folder, lambda: fresh, together=together)

    in_ranks(3, own)
    assert content(folder) == content(finished.folder)
