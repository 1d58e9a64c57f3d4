"""What becomes of a dictionary on images of another source, as ViSAEBench 0.1's CrossDomainGeneralization has it.

``composite`` is the mean of ``reconstruction``, ``coverage``, ``jaccard`` and ``probe_accuracy``. As there, the first
is 1 − Var r / Var x, no less than 0, of activations x about the run's centre and what is left of them r, with
Var x = mean ‖x‖² − (mean Σ_d x_d)²: one number is taken off, not the mean of each dimension. ``fvu`` and ``home_fvu``
are what FVU is everywhere else here (learning/fvu.py). A latent is active if a code of it is above 0. Differs: one
source, not the mean over several; nothing is taken for a score where there is none.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from ksvd_sae.activations.vision.elsewhere import images_elsewhere
from ksvd_sae.activations.vision.heldout import HeldoutImages
from ksvd_sae.evals.base import EvalSetting, Heldout, Measured
from ksvd_sae.evals.vision.codes import coded_images
from ksvd_sae.evals.vision.probes import Array, best_latents, fitted_probe, split
from ksvd_sae.learning.fvu import FVU

if TYPE_CHECKING:
    from ksvd_sae.evals.vision import TransferEval

_NOTHING = float("nan")


def transfer(config: "TransferEval", sae: Any, setting: EvalSetting, heldout: Heldout) -> Measured:
    """See ``TransferEval``."""
    images = _elsewhere(config, setting, heldout)
    # Before anything is coded: it says whether there are classes.
    classes = None if config.images.label_column is None else _classes(config, images)
    home, there = _coded(sae, heldout.images), _coded(sae, images)
    both = int((home.active_F & there.active_F).sum())
    n_home, n_there = int(home.active_F.sum()), int(there.active_F.sum())
    parts = {
        "reconstruction": there.reconstruction,
        "coverage": both / n_home if n_home else _NOTHING,
        "jaccard": both / (n_home + n_there - both) if n_home + n_there else _NOTHING,
        "probe_accuracy": _NOTHING if classes is None else _accuracy(config, there.code_IF.numpy(), *classes),
    }
    scores = {"composite": float(np.mean([*parts.values()])), **parts, "fvu": there.fvu, "home_fvu": home.fvu}
    return Measured(scores, images.n_images, {"active_latents": n_there, "active_latents_at_home": n_home})


@dataclass(frozen=True)
class _Coded:
    """code_IF: the largest of each latent over an image's patches, in units of ``scale``. fvu: ours. reconstruction: as
    ViSAEBench has it."""

    code_IF: Tensor
    fvu: float
    reconstruction: float

    @property
    def active_F(self) -> Tensor:
        return self.code_IF.amax(dim=0) > 0


class _OneNumber:
    """ViSAEBench's variance of rows: about the mean of their sums."""

    def __init__(self) -> None:
        self._n, self._sum, self._squares = 0, 0.0, 0.0

    def add(self, x_ND: Tensor) -> None:
        x_ND = x_ND.double()
        self._n += len(x_ND)
        self._sum += float(x_ND.sum())
        self._squares += float(x_ND.square().sum())

    @property
    def value(self) -> float:
        return self._squares / self._n - (self._sum / self._n) ** 2


@torch.no_grad()
def _coded(sae: Any, images: HeldoutImages) -> _Coded:
    statistics, largest = images.shards.statistics, list[Tensor]()
    fvu, whole, left = FVU(), _OneNumber(), _OneNumber()
    for coded in coded_images(sae, images):
        largest.append(coded.code_IPF.amax(dim=1).float().cpu() / statistics.scale)
        x_ND = coded.x_IPD[coded.present_IP]
        rebuilt_ND = sae.decode(coded.code_IPF[coded.present_IP]).detach()
        fvu.add(x_ND, rebuilt_ND)
        whole.add(x_ND - statistics.centre_D.to(x_ND))
        left.add(x_ND - rebuilt_ND)
    ours = fvu.value("transfer")
    theirs = max(0.0, left.value) / whole.value if whole.value > 0 else 1.0
    return _Coded(torch.cat(largest), ours, max(0.0, 1 - theirs))


def _classes(config: "TransferEval", images: HeldoutImages) -> tuple[Array, Array, Array]:
    return split(config, images.labels, "other", f"raise evaluation.{config.name}.n_images")


def _accuracy(config: "TransferEval", code_IF: Array, label_I: Array, train: Array, test: Array) -> float:
    """Of a probe on the latents that tell classes best among the images that it is fitted on."""
    few = best_latents(code_IF[train], label_I[train])[: config.k]
    probe = fitted_probe(code_IF[train][:, few], label_I[train], config.seed, 500)
    return float(probe.score(code_IF[test][:, few], label_I[test]))


def _elsewhere(config: "TransferEval", setting: EvalSetting, heldout: Heldout) -> HeldoutImages:
    """Read once, and looked up once for a panel."""
    kept, key = setting.between_calls, f"{config.name} {config.images} {config.n_images} {heldout.harvest_hash}"
    if key not in kept:
        device = torch.device(setting.device)
        kept[key] = images_elsewhere(config.images, config.n_images, heldout.shards, setting.artifacts, device)
    return cast(HeldoutImages, kept[key])
