"""The maps that a dictionary is learned in: what they are, that they invert, and what they refuse."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ksvd_sae.errors import ShapeError, WeightingError
from ksvd_sae.learning.weighting import (
    Weighting,
    weighting_by_fisher,
    weighting_by_fisher_diagonal,
    weighting_by_std,
    weighting_by_whitening,
)
from tests import tolerances
from tests.strategies import generator

D = 12


def gradients(n: int = 4000) -> Tensor:
    mix_DD = torch.randn(D, D, generator=generator(3), dtype=torch.float64)
    return torch.randn(n, D, generator=generator(4), dtype=torch.float64) @ mix_DD


def outer(g_ND: Tensor) -> Tensor:
    return g_ND.T @ g_ND / len(g_ND)


MAPS = {
    "std": weighting_by_std(torch.rand(D, generator=generator(1)) + 0.1, 0.5),
    "fisher_diag": weighting_by_fisher_diagonal(outer(gradients()).diagonal()),
    "fisher": weighting_by_fisher(outer(gradients())),
    "whiten": weighting_by_whitening(outer(gradients())),
}


@pytest.mark.parametrize("kind", MAPS)
def test_undo_undoes_apply(kind: str) -> None:
    x_BD = torch.randn(50, D, generator=generator(2))
    back_BD = MAPS[kind].undo(MAPS[kind].apply(x_BD))
    assert float((back_BD - x_BD).norm(dim=1).max()) <= tolerances.MAP_AND_BACK * float(x_BD.norm(dim=1).max())


@pytest.mark.parametrize("kind", MAPS)
def test_scaled_to_mean_square_one(kind: str) -> None:
    matrix = MAPS[kind].matrix.double()
    assert float(matrix.square().sum()) / D == pytest.approx(1, rel=tolerances.MAP_AND_BACK)


def test_std_makes_dimensions_equally_loud() -> None:
    x_ND = torch.randn(5000, D, generator=generator(5)) * torch.arange(1, D + 1)
    y_ND = weighting_by_std(x_ND.var(dim=0), 1.0, ridge=0.0).apply(x_ND)
    assert float((y_ND.std(dim=0) / y_ND.std(dim=0).mean() - 1).abs().max()) <= tolerances.MAP_AND_BACK


def test_half_power_lies_between() -> None:
    variance_D = torch.tensor([1.0, 16.0])
    weights = weighting_by_std(variance_D, 0.5, ridge=0.0).matrix
    assert float(weights[0] / weights[1]) == pytest.approx(2.0, rel=1e-6)


def test_whitened_samples_are_uncorrelated_and_equally_loud() -> None:
    """Against NumPy's covariance, in float64, of samples far from 0."""
    x_ND = gradients() + 300
    whitened_ND = weighting_by_whitening(torch.from_numpy(np.cov(x_ND.numpy().T)), ridge=0.0).apply(x_ND)
    covariance_DD = np.cov(whitened_ND.numpy().T)
    assert np.abs(covariance_DD / covariance_DD.trace() * D - np.eye(D)).max() <= tolerances.MAP_AND_BACK


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_whitening_is_a_power_of_the_covariance(power: float) -> None:
    """(C + ridge·mean·1)^(−power/2) by NumPy's SVD in float64, but for one scale."""
    covariance_DD, ridge = outer(gradients()).numpy(), 0.01
    ridged_DD = covariance_DD + ridge * covariance_DD.trace() / D * np.eye(D)
    left_DD, values_D, _ = np.linalg.svd(ridged_DD)
    wanted_DD = left_DD @ np.diag(values_D ** (-power / 2)) @ left_DD.T
    found = weighting_by_whitening(torch.from_numpy(covariance_DD), power, ridge)
    scaled_DD = wanted_DD * (D / (wanted_DD**2).sum()) ** 0.5
    assert np.abs(found.matrix.numpy() - scaled_DD).max() <= tolerances.MAP_AND_BACK * np.abs(scaled_DD).max()


def test_whitening_independent_dimensions_is_std() -> None:
    variance_D = torch.rand(D, generator=generator(7), dtype=torch.float64) + 0.1
    full, diagonal = weighting_by_whitening(torch.diag(variance_D), 0.5, 0.1), weighting_by_std(variance_D, 0.5, 0.1)
    assert float((full.matrix - torch.diag(diagonal.matrix)).abs().max()) <= tolerances.MAP_AND_BACK


def test_fisher_norm_is_the_mean_squared_effect_on_the_loss() -> None:
    """‖e·W‖² is proportional to mean (g·e)²: the second-order change of the loss by an error e."""
    g_ND, e_BD = gradients(), torch.randn(20, D, generator=generator(6), dtype=torch.float64)
    weighting = weighting_by_fisher(outer(g_ND), ridge=0.0)
    weighted_B = weighting.apply(e_BD.float()).double().square().sum(dim=1)
    effect_B = (g_ND @ e_BD.T).square().mean(dim=0)
    ratio_B = (weighted_B / effect_B).numpy()
    assert np.ptp(ratio_B) <= tolerances.MAP_AND_BACK * ratio_B.mean()


def test_diagonal_fisher_of_independent_dimensions_is_the_full_one() -> None:
    square_D = torch.rand(D, generator=generator(7), dtype=torch.float64) + 0.1
    full, diagonal = weighting_by_fisher(torch.diag(square_D), 0.1), weighting_by_fisher_diagonal(square_D, 0.1)
    assert float((full.matrix - torch.diag(diagonal.matrix)).abs().max()) <= tolerances.MAP_AND_BACK


def test_ridge_bounds_the_unseen_directions() -> None:
    """Moments of rank one: with the ridge the unseen directions keep a weight, without it there is no inverse."""
    g_1D = torch.ones(1, D, dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(weighting_by_fisher(outer(g_1D), ridge=0.1).matrix.double())
    assert float(eigenvalues[-1] / eigenvalues[0]) == pytest.approx(((D + 0.1) / 0.1) ** 0.5, rel=1e-3)
    for make, more in ((weighting_by_fisher, "gradient_tokens"), (weighting_by_whitening, "more samples")):
        with pytest.raises(WeightingError, match=rf"(?s)do not span.*ridge.*{more}"):
            make(outer(g_1D), ridge=0.0)


class TestRefused:
    @pytest.mark.parametrize(
        "variance_D",
        [torch.zeros(4), torch.tensor([1.0, float("nan")]), torch.tensor([1.0, -1.0])],
        ids=["no variance", "NaN", "negative"],
    )
    def test_moments(self, variance_D: Tensor) -> None:
        for make in (weighting_by_std, weighting_by_fisher_diagonal):
            with pytest.raises(WeightingError, match="must be finite, not negative"):
                make(variance_D)

    def test_silent_dimension_without_ridge(self) -> None:
        with pytest.raises(WeightingError, match=r"(?s)1 of 3 dimensions.*ridge above 0"):
            weighting_by_std(torch.tensor([1.0, 0.0, 2.0]), ridge=0.0)

    def test_power(self) -> None:
        for make, moments in ((weighting_by_std, torch.ones(3)), (weighting_by_whitening, torch.eye(3))):
            with pytest.raises(WeightingError, match=r"(?s)out of range.*power=-1"):
                make(moments, power=-1)

    def test_shapes(self) -> None:
        for make in (weighting_by_fisher, weighting_by_whitening):
            with pytest.raises(ShapeError, match="must be square"):
                make(torch.ones(3, 4))
        with pytest.raises(ShapeError, match="do not fit"):
            Weighting(torch.ones(3), torch.ones(4))
        with pytest.raises(WeightingError, match="not finite"):
            Weighting(torch.ones(2), torch.tensor([1.0, float("inf")]))
