"""What is read of a vision model, against transformers' own forward pass; and which models are refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ksvd_sae.activations.vision.images import ImagesConfig, LabelledImage
from ksvd_sae.activations.vision.model import Grid, ImageReader, VisionModelConfig
from ksvd_sae.errors import ActivationError, ConfigError, HookError, HubError, ImageError
from tests import tiny_vision, tolerances
from tests.tiny_vision import D_MODEL, N_LAYERS, PATCH, PIXELS

CPU = torch.device("cpu")
SIDE = PIXELS // PATCH


@pytest.fixture(scope="module")
def images(image_folder: Path) -> list[LabelledImage]:
    return list(ImagesConfig(source="folder", dataset=str(image_folder)).images(seed=0))[:3]


def read_with(folder: Path, images: list[LabelledImage], **options: Any) -> tuple[Tensor, ImageReader]:
    reader = ImageReader(VisionModelConfig(name=str(folder), **options), CPU)
    return reader.read(reader.pixels(images)), reader


@torch.no_grad()
def of_transformers(folder: Path, images: list[LabelledImage]) -> Any:
    """All of it: the whole model's output, as its own preprocessing and classes give it."""
    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    inputs = processor([image.opened() for image in images], return_tensors="pt")
    return model(**inputs, output_hidden_states=True), model


@pytest.mark.parametrize("layer", [0, 5, N_LAYERS - 1])
def test_before_the_final_norm_it_is_hidden_states(
    dinov2_folder: Path, images: list[LabelledImage], layer: int
) -> None:
    output, _ = of_transformers(dinov2_folder, images)
    x_BTD, reader = read_with(dinov2_folder, images, layer=layer)
    assert x_BTD.shape == (3, SIDE * SIDE, D_MODEL)
    assert reader.grid == Grid(SIDE, SIDE, 0)
    torch.testing.assert_close(x_BTD, output.hidden_states[layer + 1][:, 1:], **tolerances.SAME_FORWARD_PASS)


@pytest.mark.parametrize("layer", [5, N_LAYERS - 1])
def test_after_the_final_norm_it_is_what_torch_hub_gives(
    dinov2_folder: Path, images: list[LabelledImage], layer: int
) -> None:
    """get_intermediate_layers: the model's norm of any block's output."""
    output, model = of_transformers(dinov2_folder, images)
    with torch.no_grad():
        true_BTD = model.layernorm(output.hidden_states[layer + 1])
    x_BTD, _ = read_with(dinov2_folder, images, layer=layer, final_norm=True)
    torch.testing.assert_close(x_BTD, true_BTD[:, 1:], **tolerances.SAME_FORWARD_PASS)
    if layer == N_LAYERS - 1:
        torch.testing.assert_close(x_BTD, output.last_hidden_state[:, 1:], **tolerances.SAME_FORWARD_PASS)


def test_registers_and_cls(tmp_path: Path, images: list[LabelledImage]) -> None:
    """Left out, or before the patches, CLS first."""
    folder = tiny_vision.save_dinov2(tmp_path / "registers", tiny_vision.dinov2(registers=4))
    output, _ = of_transformers(folder, images)
    all_BTD = output.hidden_states[2]
    assert all_BTD.shape[1] == 1 + 4 + SIDE * SIDE
    for also, wanted in (([], []), (["cls"], [0]), (["registers"], [1, 2, 3, 4]), (["registers", "cls"], range(5))):
        x_BTD, reader = read_with(folder, images, layer=1, also=also)
        true_BTD = torch.cat([all_BTD[:, list(wanted)], all_BTD[:, 5:]], dim=1)
        torch.testing.assert_close(x_BTD, true_BTD, **tolerances.SAME_FORWARD_PASS)
        assert reader.grid == Grid(SIDE, SIDE, len(wanted))


def test_other_vision_transformers(tmp_path: Path, images: list[LabelledImage]) -> None:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    config = ViTConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    ViTImageProcessor().save_pretrained(tmp_path)
    x_BTD, reader = read_with(tmp_path, images, layer=1)
    assert reader.grid == Grid(14, 14, 0)
    from transformers import AutoImageProcessor

    model = ViTModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    with torch.no_grad():
        pixels = processor([image.opened() for image in images], return_tensors="pt")
        true = model(**pixels, output_hidden_states=True).hidden_states[2][:, 1:]
    torch.testing.assert_close(x_BTD, true, **tolerances.SAME_FORWARD_PASS)


def test_pictures_are_what_the_model_sees(reader: ImageReader, images: list[LabelledImage]) -> None:
    """Preprocessing without its normalisation: bytes that Pillow's resizing and the crop give."""
    import numpy as np
    from PIL import Image

    shown = reader.pictures(reader.pixels(images))
    for image, shown_HWC in zip(images, shown, strict=True):
        whole = image.opened()
        scale = 256 / min(whole.size)
        resized = whole.resize((round(whole.width * scale), round(whole.height * scale)), Image.Resampling.BICUBIC)
        left, top = (resized.width - PIXELS) // 2, (resized.height - PIXELS) // 2
        true = np.asarray(resized.crop((left, top, left + PIXELS, top + PIXELS))).astype(int)
        # Widths that are no whole pixels are rounded in another way.
        assert np.abs(true - shown_HWC.numpy().astype(int)).mean() < 3


# ---------------------------------------------------------------- what is refused


def test_no_such_layer(dinov2_folder: Path) -> None:
    with pytest.raises(HookError, match="no layer 12") as caught:
        ImageReader(VisionModelConfig(name=str(dinov2_folder), layer=N_LAYERS), CPU)
    assert caught.value.limit == f"0 to {N_LAYERS - 1}"


def test_registers_of_a_model_without(dinov2_folder: Path) -> None:
    with pytest.raises(ConfigError, match="has no registers"):
        ImageReader(VisionModelConfig(name=str(dinov2_folder), layer=1, also=["registers"]), CPU)


def test_another_kind_of_model(tmp_path: Path) -> None:
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="a kind that is not read") as caught:
        ImageReader(VisionModelConfig(name=str(tmp_path), layer=1), CPU)
    assert caught.value.got == "bert"


def test_pickled_weights_are_never_read(dinov2_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = tmp_path / "pickled"
    shutil.copytree(dinov2_folder, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(HubError, match="loading model") as caught:
        ImageReader(VisionModelConfig(name=str(folder), layer=1), CPU)
    assert "pickled" in str(caught.value.cause)


def test_missing_tensors(dinov2_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "part"
    shutil.copytree(dinov2_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="1 of its tensors are missing") as caught:
        ImageReader(VisionModelConfig(name=str(folder), layer=1), CPU)
    assert "layernorm.weight" in str(caught.value.got)


def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.tiny_hub import offline_hub

    offline_hub(tmp_path, monkeypatch)
    with pytest.raises(HubError, match="loading model 'facebook/dinov2-tiny'") as caught:
        ImageReader(VisionModelConfig(name="facebook/dinov2-tiny", layer=1), CPU)
    assert caught.value.cure


def test_images_of_several_sizes(dinov2_folder: Path, tmp_path: Path, images: list[LabelledImage]) -> None:
    import json

    folder = tmp_path / "uncropped"
    shutil.copytree(dinov2_folder, folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_center_crop": False}))
    reader = ImageReader(VisionModelConfig(name=str(folder), layer=1), CPU)
    sizes = {image.opened().size for image in images}
    assert len(sizes) > 1
    with pytest.raises(ImageError, match="several sizes"):
        reader.pixels(images)
    one_by_one = ImageReader(VisionModelConfig(name=str(folder), layer=1), CPU)
    with pytest.raises(ImageError, match="several sizes"):
        list(map(one_by_one.pixels, [[image] for image in images]))


def test_broken_activations(dinov2_folder: Path, images: list[LabelledImage]) -> None:
    reader = ImageReader(VisionModelConfig(name=str(dinov2_folder), layer=1), CPU)
    with torch.no_grad():
        reader.model.encoder.layer[1].mlp.fc2.bias.fill_(float("nan"))
    with pytest.raises(ActivationError, match=r"encoder\.layer\.1"):
        reader.read(reader.pixels(images))


def test_the_hook_says_whether_the_norm_is_in_it() -> None:
    assert VisionModelConfig(name="x", layer=11).hook == "encoder.layer.11"
    assert VisionModelConfig(name="x", layer=11, final_norm=True).hook == "encoder.layer.11-layernorm"
    with pytest.raises(ValueError, match="twice"):
        VisionModelConfig(name="x", layer=1, also=["cls", "cls"])
