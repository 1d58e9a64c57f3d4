"""Random vision models in a local Hub cache, under the names of real ones; and images of a few classes in folders."""

import random
from pathlib import Path
from typing import Any

import torch

from tests.tiny_models import snapshot_of

SMALL, BASE, JUDGE = "facebook/dinov2-small", "facebook/dinov2-base", "google/vit-base-patch16-224-in21k"
N_LAYERS, D_MODEL, PATCH, PIXELS = 12, 32, 14, 224
CLASSES = {"disc": (220, 60, 40), "square": (40, 160, 70), "stripes": (60, 80, 210)}
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def dinov2(*, registers: int = 0, d_model: int = D_MODEL, seed: int = 0) -> Any:
    """A DINOv2 of 12 blocks of random weights, which reads positions of a larger image than it is given, as the real
    one does."""
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(seed)
    sizes = {
        "hidden_size": d_model,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "mlp_ratio": 2,
        "image_size": 2 * PIXELS,
        "patch_size": PATCH,
        # Large enough for the blocks to change what they add to.
        "initializer_range": 0.3,
    }
    if registers:
        config = Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)
        return Dinov2WithRegistersModel(config).eval()
    return Dinov2Model(Dinov2Config(**sizes)).eval()


def save_dinov2(folder: Path, model: Any) -> Path:
    """The model with the real one's preprocessing."""
    from transformers import BitImageProcessor

    model.save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 256}, crop_size={"height": PIXELS, "width": PIXELS}, image_mean=_MEAN, image_std=_STD
    ).save_pretrained(folder)
    return folder


def vision_models(home: Path) -> None:
    """DINOv2-S, DINOv2-B and a ViT in the HF_HOME ``home``, tiny."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    save_dinov2(snapshot_of(home, SMALL), dinov2())
    save_dinov2(snapshot_of(home, BASE), dinov2(d_model=48, seed=1))
    torch.manual_seed(2)
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=N_LAYERS, num_attention_heads=4, intermediate_size=48, initializer_range=0.3
    )
    snapshot = snapshot_of(home, JUDGE)
    ViTModel(config, add_pooling_layer=False).save_pretrained(snapshot)
    ViTImageProcessor().save_pretrained(snapshot)


def write_images(folder: Path, n: int, seed: int = 0) -> Path:
    """``n`` images of each class, a folder for each: a figure of its colour somewhere on noise, in several sizes."""
    from PIL import Image, ImageDraw

    draw = random.Random(seed)
    for label, colour in CLASSES.items():
        (folder / label).mkdir(parents=True)
        for i in range(n):
            width, height = draw.choice([(256, 256), (300, 240), (240, 320)])
            image = Image.effect_noise((width, height), 60).convert("RGB")
            pen, x, y = ImageDraw.Draw(image), draw.randint(40, 120), draw.randint(40, 120)
            if label == "disc":
                pen.ellipse((x, y, x + 90, y + 90), fill=colour)
            elif label == "square":
                pen.rectangle((x, y, x + 90, y + 90), fill=colour)
            else:
                for line in range(0, 90, 18):
                    pen.rectangle((x, y + line, x + 90, y + line + 8), fill=colour)
            image.save(folder / label / f"{i:03d}.jpg", quality=90)
    return folder
