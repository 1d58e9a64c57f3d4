"""The metric 'whiten' in a config and in a run: of what samples it is, and what is learned in it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ksvd_sae.learning.weighting import Weighting
from ksvd_sae.methods.base import WeightingConfig
from ksvd_sae.run.pipeline import Run
from tests.methods.test_recoding import KSVD, TOPK, _one_thread, place, train, trainings
from tests.tolerances import MAP_AND_BACK

__all__ = ["_one_thread", "place", "trainings"]
WHITEN = WeightingConfig(kind="whiten")


def test_whitens_wholly_unless_told_otherwise() -> None:
    given: dict[str, Any] = {"kind": "whiten", "power": 0.5}
    assert WeightingConfig.model_validate("whiten").power == WHITEN.power == 1
    assert WeightingConfig.model_validate(given).power == 0.5
    assert WeightingConfig.model_validate("std").power == WeightingConfig().power == 0.5
    assert WeightingConfig.model_validate(WHITEN.model_dump()) == WHITEN
    assert not WHITEN.needs_gradients


def metric(run: Run, wanted: WeightingConfig = WHITEN) -> Weighting:
    weighting = run.setting(run.config.dictionaries["ksvd"]).weighting(wanted)
    assert weighting is not None
    return weighting


def whitened(x_BD: Tensor, run: Run) -> Tensor:
    return metric(run).apply(x_BD - run.shards().centre_D.float()).double()


def test_dictionaries_and_saes_are_learned_in_it(place: Path) -> None:
    """Of the training samples, by NumPy in float64; each has less error there than what is learned without it."""
    kinds = {"ksvd": KSVD, "topk": TOPK, "batchtopk": {**TOPK, "kind": "batchtopk_sae"}}
    white = {f"{name}-white": {**kind, "weighting": "whiten"} for name, kind in kinds.items()}
    run, trained = train(place, **kinds, **white, recoded={"kind": "recoded", "of": "topk-white", "coder": "omp"})
    covariance_DD = np.cov(run.shards().tensor().double().numpy().T, bias=True)
    ridged_DD = covariance_DD + 1e-4 * covariance_DD.trace() / len(covariance_DD) * np.eye(len(covariance_DD))
    left_DD, values_D, _ = np.linalg.svd(ridged_DD)
    wanted_DD = left_DD @ np.diag(values_D**-0.5) @ left_DD.T
    wanted_DD *= (len(wanted_DD) / (wanted_DD**2).sum()) ** 0.5
    assert np.abs(metric(run).matrix.numpy() - wanted_DD).max() <= MAP_AND_BACK * np.abs(wanted_DD).max()

    x_BD = run.shards("heldout").tensor()
    errors = {
        name: float((whitened(run.load_sae(one)(x_BD).detach(), run) - whitened(x_BD, run)).square().sum())
        for name, one in trained.items()
    }
    for name in kinds:
        assert errors[f"{name}-white"] < 0.9 * errors[name], name
    assert errors["recoded"] < errors["topk-white"]
    recoded = run.setting(run.config.dictionaries["recoded"]).weighting(WHITEN)
    assert recoded is not None
    assert torch.equal(recoded.matrix, metric(run).matrix)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_the_power_counts(place: Path, power: float) -> None:
    run, _ = train(place, ksvd=KSVD)
    x_BD = run.shards().tensor()
    mapped_BD = metric(run, WeightingConfig(kind="whiten", power=power)).apply(x_BD - run.shards().centre_D.float())
    before_D, after_D = (torch.linalg.eigvalsh(torch.cov(rows.double().T)) for rows in (x_BD, mapped_BD))
    # The ridge tells where the least variance is of its size; the largest ones it leaves.
    ratio = float((after_D[-1] / after_D[-4]) / (before_D[-1] / before_D[-4]) ** (1 - power))
    assert ratio == pytest.approx(1, rel=0.01)
