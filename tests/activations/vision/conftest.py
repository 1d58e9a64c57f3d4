"""A tiny DINOv2 in a folder: nothing is looked up by name, so no Hub cache is read."""

from pathlib import Path

import pytest
import torch

from ksvd_sae.activations.vision.model import ImageReader, VisionModelConfig
from tests import tiny_vision


@pytest.fixture(scope="session")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vision.save_dinov2(tmp_path_factory.mktemp("models") / "tiny-dinov2", tiny_vision.dinov2())


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images of each class."""
    return tiny_vision.write_images(tmp_path_factory.mktemp("images"), 8)


@pytest.fixture(scope="session")
def reader(dinov2_folder: Path) -> ImageReader:
    """Of the second block, which is soon reached."""
    return ImageReader(VisionModelConfig(name=str(dinov2_folder), layer=1), torch.device("cpu"))
