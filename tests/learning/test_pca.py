"""Covariances against NumPy, principal components against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from ksvd_sae.errors import ActivationError, ShapeError
from ksvd_sae.learning.pca import covariance, principal_components
from ksvd_sae.learning.sparse_coding import project
from tests import tolerances
from tests.strategies import generator


def samples(n_samples: int, d_in: int, offset: float = 0.0) -> Tensor:
    """Gaussian with clearly separated variances along rotated axes."""
    draw = generator(0)
    axes_DD = torch.linalg.qr(torch.randn(d_in, d_in, generator=draw, dtype=torch.float64)).Q
    spread_D = 1.4 ** -torch.arange(d_in, dtype=torch.float64)
    x_ND = torch.randn(n_samples, d_in, generator=draw, dtype=torch.float64)
    rotated_ND: Tensor = (x_ND * spread_D) @ axes_DD
    return rotated_ND + offset


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("batch", [1, 100, 501])
def test_covariance_against_numpy(batch: int, offset: float) -> None:
    x_ND = samples(501, 11, offset).float()
    got_DD = covariance(torch.split(x_ND, batch), x_ND.double().mean(dim=0))
    wanted_DD = np.cov(x_ND.double().numpy().T, bias=True)
    assert got_DD.dtype == torch.float64
    assert np.abs(got_DD.numpy() - wanted_DD).max() <= tolerances.SUMMED_IN_FLOAT64 * wanted_DD.max()


@pytest.mark.parametrize("offset", [0.0, 5.0])
@pytest.mark.parametrize("k", [1, 4, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_against_scikit_learn(dtype: torch.dtype, k: int, offset: float) -> None:
    x_ND = samples(501, 11, offset).to(dtype)
    got_KD = principal_components(torch.split(x_ND, 100), k, x_ND.double().mean(dim=0))
    peer = PCA(n_components=k, svd_solver="full").fit(x_ND.double().numpy())
    assert got_KD.shape == (k, 11)
    assert got_KD.dtype == torch.float32
    cosines = np.abs((got_KD.double().numpy() * peer.components_).sum(axis=1))
    assert (1 - cosines <= tolerances.PCA_COSINE).all()
    gap_KK = got_KD.double() @ got_KD.double().T - torch.eye(k, dtype=torch.float64)
    assert gap_KK.abs().max() <= tolerances.PCA_ORTHONORMAL


def test_projection_keeps_the_variance_that_scikit_learn_says() -> None:
    x_ND = samples(501, 11, 5.0)
    centre_D = x_ND.mean(dim=0)
    atoms_KD = principal_components([x_ND], 4, centre_D).double()
    centred_ND = x_ND - centre_D
    rest_ND = centred_ND - project(centred_ND, atoms_KD).reconstruct(atoms_KD)
    kept = 1 - float(rest_ND.pow(2).sum() / centred_ND.pow(2).sum())
    wanted = PCA(n_components=4, svd_solver="full").fit(x_ND.numpy()).explained_variance_ratio_.sum()
    assert kept == pytest.approx(float(wanted), abs=tolerances.PCA_VARIANCE)


def test_batches_do_not_matter() -> None:
    x_ND = samples(301, 7)
    centre_D = x_ND.mean(dim=0)
    whole_KD = principal_components([x_ND], 3, centre_D)
    parts_KD = principal_components(iter(torch.split(x_ND, 1)), 3, centre_D)
    cosines_K = (whole_KD.double() * parts_KD.double()).sum(dim=1).abs()
    assert (1 - cosines_K).max() <= tolerances.PCA_COSINE


@pytest.mark.parametrize("k", [0, 8])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ShapeError, match=rf"(?s)k = {k}.*1 to 7"):
        principal_components([samples(10, 7)], k, torch.zeros(7))


def test_no_samples() -> None:
    with pytest.raises(ShapeError, match="principal_components: no samples"):
        principal_components([], 3, torch.zeros(7))
    with pytest.raises(ShapeError, match="covariance: no samples"):
        covariance([], torch.zeros(7))


def test_not_finite() -> None:
    x_ND = samples(10, 7)
    x_ND[4, 2] = float("nan")
    with pytest.raises(ActivationError, match=r"(?s)1 of 10 samples.*row 4.*cure"):
        principal_components([x_ND], 3, torch.zeros(7))


@pytest.mark.parametrize("width", [1, 6])
def test_batches_of_another_width(width: int) -> None:
    """A batch of width 1 broadcasts against the centre: without a check it gives components and no error."""
    with pytest.raises(ShapeError, match="principal_components"):
        principal_components([samples(10, width)], 3, torch.zeros(7))
