"""What a language model gave, kept on disk by content, so that each eval of each dictionary need not ask it again.

A file's name is the hash of all that its tensors follow from: the model's weights, tokens, hook, and what was asked.
"""

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ksvd_sae.errors import ConfigError, DiskSpaceError
from ksvd_sae.store import atomic_path, content_hash, versions

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    from ksvd_sae.activations.weights import OwnWeights

logger = logging.getLogger(__name__)
_SUFFIX = ".safetensors"
_FINGERPRINT_ENTRIES = 4096


class TensorCache:
    """Named tensors by key, in safetensors files, up to a number of bytes.

    When it is full, files that this process has not used make room, the longest unused first. If that is not enough,
    what is new is not kept: a pass over more data than fit then still finds the first of them the next time, where
    throwing out the oldest would leave it with nothing.

    Args: folder: made when something is kept.  limit_bytes: of all files; 0 keeps nothing.
    """

    def __init__(self, folder: Path, limit_bytes: int):
        if limit_bytes < 0:
            raise ConfigError("tensor cache: negative size", got=limit_bytes, limit="0 or more bytes")
        self.folder, self.limit_bytes = folder, limit_bytes
        self._used: set[str] = set()
        self._sizes: dict[str, int] | None = None

    def get(self, key: str, device: str | torch.device = "cpu") -> dict[str, Tensor] | None:
        """What was kept under the key; None if nothing was. A file that cannot be read is removed."""
        path = self._path(key)
        try:
            tensors = load_file(path, device=str(device))
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            logger.warning("%s cannot be read (%s): made again", path, error)
            path.unlink(missing_ok=True)
            self._known().pop(key, None)
            return None
        self._used.add(key)
        os.utime(path)
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> bool:
        """Keep tensors; whether there was room, and the disk took them."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        sizes = self._known()
        if not self._make_room(size - sizes.get(key, 0)):
            return False
        path = self._path(key)
        # safetensors refuses two names for one memory, such as an activation that is the last one too.
        dense = torch.contiguous_format
        own = {name: tensor.detach().cpu().clone(memory_format=dense) for name, tensor in tensors.items()}
        try:
            with atomic_path(path) as temporary:
                save_file(own, temporary)
        except (OSError, SafetensorError, DiskSpaceError) as error:
            # A full disk costs time and no score: what is not kept is computed again.
            logger.warning("%s could not be kept (%s): the model will be asked again", path, error)
            return False
        sizes[key] = path.stat().st_size
        self._used.add(key)
        return True

    def _path(self, key: str) -> Path:
        return self.folder / (key + _SUFFIX)

    def _known(self) -> dict[str, int]:
        """Size of every file. What other processes add is not seen until the next start."""
        if self._sizes is None:
            files = sorted(self.folder.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime)
            self._sizes = {path.name.removesuffix(_SUFFIX): path.stat().st_size for path in files}
        return self._sizes

    def _make_room(self, needed: int) -> bool:
        sizes = self._known()
        total = sum(sizes.values()) + needed
        unused = [key for key in sizes if key not in self._used]
        if total - sum(sizes[key] for key in unused) > self.limit_bytes:
            return False
        for key in unused:
            if total <= self.limit_bytes:
                break
            total -= sizes.pop(key)
            self._path(key).unlink(missing_ok=True)
        return True


def model_fingerprint(model: "HookedTransformer", weights: "OwnWeights | None" = None) -> str:
    """Hash of some entries of every weight, spread over all of it, and of the versions of what runs the model.

    A model's name alone does not tell its weights.

    Args: weights: its own, of which two may differ in entries that are not looked at.
    """
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        every = max(1, weight.numel() // _FINGERPRINT_ENTRIES)
        some = weight.detach().flatten()[::every].float().cpu().contiguous().numpy()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} ".encode() + some.tobytes())
    cfg = model.cfg
    run_by = {name: version for name, version in versions().items() if name in ("torch", "transformer-lens")}
    how = {"soft cap": cfg.output_logits_soft_cap, "dtype": str(cfg.dtype), "versions": run_by}
    own = {} if weights is None else {"own": weights.content}
    return content_hash({"weights": digest.hexdigest(), **how, **own})


def tokens_hash(tokens_BL: Tensor) -> str:
    """Hash of tokens and their arrangement in contexts."""
    tokens = tokens_BL.detach().cpu().to(torch.int64).contiguous()
    return hashlib.sha256(str(tuple(tokens.shape)).encode() + tokens.numpy().tobytes()).hexdigest()[:24]
