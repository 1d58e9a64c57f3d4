"""Our evals on images against ViSAEBench's own code: the same scores of the same codes, digit for digit or nearly."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from visaebench.metrics import (
    CrossDomainGeneralization,
    DownstreamPreservation,
    FeatureLocalization,
    MonosemanticityScore,
    SparseProbing,
)

from ksvd_sae.evals.base import EvalSetting, Heldout, Panelist
from ksvd_sae.evals.vision import (
    ImageProbingEval,
    MonosemanticityEval,
    ProbePreservationEval,
    SpatialEval,
    TransferEval,
)
from tests import tolerances
from tests.evals.vision.conftest import COLUMNS, N_IMAGES, ROWS, elsewhere_of, heldout_of, planted, planted_elsewhere

# Its tests of features warn of those that are constant, as dead ones are.
pytestmark = pytest.mark.filterwarnings("ignore:Features:UserWarning", "ignore:invalid value:RuntimeWarning")


class InItsUnits:
    """Our SAE as ViSAEBench takes one: of activations that are centred and divided by their scale."""

    def __init__(self, sae: Any, centre_D: Tensor, scale: float):
        self._sae, self._centre_D, self._scale = sae, centre_D, scale

    @torch.no_grad()
    def encode(self, x_BD: Tensor) -> Tensor:
        return self._sae.encode(x_BD * self._scale + self._centre_D) / self._scale

    @torch.no_grad()
    def decode(self, z_BF: Tensor) -> Tensor:
        return (self._sae.decode(z_BF * self._scale) - self._centre_D) / self._scale


@pytest.fixture
def given(sae: Any, heldout: Heldout) -> dict[str, Any]:
    """What every metric of its is given."""
    x_IPD, _, labels = planted()
    statistics = heldout.shards.statistics
    centre_D, scale = statistics.centre_D.float(), statistics.scale
    return {
        "sae": InItsUnits(sae, centre_D, scale),
        "activations": x_IPD,
        "mean": centre_D,
        "std": scale,
        "labels": np.array([int(label.split()[1]) for label in labels]),
        "device": "cpu",
    }


@pytest.fixture
def panelist(sae: Any) -> Panelist:
    return Panelist("ours", "0123456789ab", lambda: sae)


def test_preservation(given: dict[str, Any], panelist: Panelist, setting: EvalSetting, heldout: Heldout) -> None:
    theirs = DownstreamPreservation().compute(**given, min_samples_per_class=1)
    ours = ProbePreservationEval().measure(panelist, setting, heldout).scores
    assert ours["preservation"] == theirs.value
    assert ours["accuracy_raw"] == theirs.metadata["accuracy_original"]
    assert ours["accuracy_rebuilt"] == theirs.metadata["accuracy_reconstructed"]


def test_sparse_probing(
    given: dict[str, Any],
    panelist: Panelist,
    setting: EvalSetting,
    heldout: Heldout,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # numpy 2's name, which ViSAEBench uses without saying that it needs numpy 2.
    monkeypatch.setattr(np, "trapezoid", getattr(np, "trapezoid", None) or np.trapz, raising=False)
    ks = [1, 5, 10, 20]
    theirs = SparseProbing(k_values=ks).compute(**given)
    ours = ImageProbingEval(k_values=ks).measure(panelist, setting, heldout).scores
    assert ours["auc"] == pytest.approx(theirs.value)
    assert [ours[f"top_{k}_accuracy"] for k in ks] == [theirs.metadata["k_accuracies"][k] for k in ks]


def test_localization(given: dict[str, Any], panelist: Panelist, setting: EvalSetting, heldout: Heldout) -> None:
    theirs = FeatureLocalization((ROWS, COLUMNS), min_active_patches=2, min_images_per_feature=3, max_features=10)
    found = theirs.compute(**given)
    measured = SpatialEval(min_active_patches=2, min_images=3, max_latents=10).measure(panelist, setting, heldout)
    assert measured.n == found.metadata["num_features_scored"] == 10
    assert [latent for latent, _ in measured.more["morans_i_of_latents"]] == found.metadata["scored_feature_indices"]
    assert measured.scores["morans_i"] == pytest.approx(found.value, **tolerances.FLOAT32_SCORE)
    assert measured.scores["scattered_fraction"] == found.metadata["frac_non_localized"]
    assert measured.scores["scored_fraction"] == pytest.approx(found.metadata["frac_evaluable"])


def test_monosemanticity(
    given: dict[str, Any],
    panelist: Panelist,
    setting: EvalSetting,
    heldout: Heldout,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ksvd_sae.evals.vision import monosemanticity as room

    patches_IPE = torch.randn(N_IMAGES, 7, 4, generator=torch.Generator().manual_seed(3))

    class Judge:
        def extract_activations(self, images: list[int], *, layer: int) -> Tensor:
            return patches_IPE[images]

    embedding_IE = torch.nn.functional.normalize(patches_IPE.mean(dim=1), dim=1)
    monkeypatch.setattr(room, "_embeddings", lambda *_: embedding_IE)
    theirs = MonosemanticityScore(top_k_images=6, max_features=15)
    found = theirs.compute(**given, images=list(range(N_IMAGES)), evaluator_backbone=Judge())
    config = MonosemanticityEval(backbone={"name": "other/model", "layer": 1}, top_images=6, max_latents=15)
    measured = config.measure(panelist, setting, heldout)
    assert measured.n == found.metadata["num_features_scored"]
    assert measured.scores["similarity"] == pytest.approx(found.value, **tolerances.FLOAT32_SCORE)


def test_cross_domain(
    sae: Any, panelist: Panelist, setting: EvalSetting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From images that few latents fire on to others of that kind."""
    from ksvd_sae.evals.vision import transfer as room

    (home_IPD, home_labels), (there_IPD, labels) = planted_elsewhere(seed=3), planted_elsewhere()
    home = heldout_of(tmp_path / "home", home_IPD, [*home_labels])
    elsewhere = elsewhere_of(tmp_path / "elsewhere", home)
    monkeypatch.setattr(room, "_elsewhere", lambda *_: elsewhere)
    centre_D, scale = home.shards.centre_D.float(), home.shards.statistics.scale
    there = {"activations": there_IPD, "labels": np.array([int(label.split()[1]) for label in labels])}
    given: dict[str, Any] = {"mean": centre_D, "std": scale, "device": "cpu", "ood_datasets": {"there": there}}
    found = CrossDomainGeneralization(k_probe=4).compute(InItsUnits(sae, centre_D, scale), home_IPD, **given)
    theirs = found.metadata["per_dataset"]["there"]
    measured = TransferEval(images={"source": "folder", "dataset": "there"}, k=4).measure(panelist, setting, home)
    ours = measured.scores
    assert measured.n == theirs["num_images"] == N_IMAGES // 2
    assert ours["reconstruction"] == pytest.approx(theirs["reconstruction_quality"], **tolerances.FLOAT32_SCORE)
    assert ours["coverage"] == pytest.approx(theirs["domain_coverage"])
    assert ours["jaccard"] == theirs["jaccard_overlap"]
    assert ours["probe_accuracy"] == theirs["probe_accuracy_k4"]
    assert ours["composite"] == pytest.approx(found.value, **tolerances.FLOAT32_SCORE)
    assert measured.more["active_latents"] == theirs["ood_active_features"]
    assert measured.more["active_latents_at_home"] == theirs["id_active_features"]
    # None is at an end of its range, and no two are one.
    parts = [ours[name] for name in ("reconstruction", "coverage", "jaccard", "probe_accuracy")]
    assert all(0 < part < 1 for part in parts)
    assert len(set(parts)) == 4
