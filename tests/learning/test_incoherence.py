"""Atoms are pushed apart as far as the bound asks, and no further."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ksvd_sae.errors import ShapeError
from ksvd_sae.learning.coding import Coding
from ksvd_sae.learning.dbksvd import DictionaryLearner
from ksvd_sae.learning.incoherence import pushed_apart
from ksvd_sae.learning.training import LearnerOptions
from tests.strategies import planted


def atoms(n: int, d_in: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed)), dim=1)


def cosines(atoms_MD: Tensor) -> Tensor:
    return (atoms_MD.double() @ atoms_MD.double().T).fill_diagonal_(0)


def excess(atoms_MD: Tensor, bound: float) -> float:
    """Σ of what |cos| is above the bound by, squared."""
    return float((cosines(atoms_MD).abs() - bound).clamp(min=0).square().sum())


def test_atoms_within_the_bound_stay_as_they_are() -> None:
    far_MD = torch.eye(6)[:4]
    assert torch.equal(pushed_apart(far_MD, 0.1), far_MD)
    some_MD = atoms(40, 16)
    assert torch.equal(pushed_apart(some_MD, float(cosines(some_MD).abs().max()) + 1e-3), some_MD)


@pytest.mark.parametrize("bound", [0.2, 0.4])
def test_excess_falls_and_atoms_stay_unit(bound: float) -> None:
    before_MD = atoms(60, 20)
    after_MD = pushed_apart(before_MD, bound)
    assert excess(after_MD, bound) < 0.5 * excess(before_MD, bound)
    assert torch.allclose(torch.linalg.vector_norm(after_MD, dim=1), torch.ones(60), atol=1e-6)
    for _ in range(40):
        after_MD = pushed_apart(after_MD, bound)
    # 60 vectors in 20 dimensions have a mean squared cosine of at least (60 − 20) / (20 · 59): 0.18 is the least.
    assert float(cosines(after_MD).abs().max()) < bound + 0.08


def test_a_pair_goes_to_the_bound_in_its_own_plane() -> None:
    pair_MD = normalize(torch.tensor([[1.0, 0.2, 0.0], [1.0, -0.2, 0.0]]), dim=1)
    for _ in range(20):
        pair_MD = pushed_apart(pair_MD, 0.5)
    assert float(pair_MD[0] @ pair_MD[1]) == pytest.approx(0.5, abs=1e-3)
    assert pair_MD[:, 2].tolist() == [0, 0]
    assert pair_MD[0, 1] == -pair_MD[1, 1]


def test_opposite_atoms_are_close_only_where_codes_have_signs() -> None:
    opposite_MD = normalize(torch.tensor([[1.0, 0.2], [-1.0, 0.2]]), dim=1)
    assert torch.equal(pushed_apart(opposite_MD, 0.5, signed=False), opposite_MD)
    assert cosines(pushed_apart(opposite_MD, 0.5, signed=True)).abs().max() < cosines(opposite_MD).abs().max()


def test_a_crowd_in_a_few_directions_is_not_thrown_about() -> None:
    """Where each is pushed by all others, a whole step would take atoms past each other."""
    crowd_MD = normalize(atoms(300, 24) * torch.tensor([8.0, 4.0, *[0.3] * 22]), dim=1)
    pushed_MD = crowd_MD
    for _ in range(30):
        last = excess(pushed_MD, 0.4)
        pushed_MD = pushed_apart(pushed_MD, 0.4)
        assert excess(pushed_MD, 0.4) < max(last, 1e-9)
    assert excess(pushed_MD, 0.4) < 0.2 * excess(crowd_MD, 0.4)


def test_training_keeps_atoms_apart() -> None:
    x_ND = planted(2000, 16, 24, 3, noise=0.1, seed=0).x_BD
    options = {"passes": 4, "batch_samples": 500, "init": "random", "seed": 0}
    plain, apart = (
        DictionaryLearner(LearnerOptions(48, Coding(3), coherence=bound, **options), device="cpu").fit(x_ND)  # type: ignore[arg-type]
        for bound in (None, 0.6)
    )
    assert cosines(plain.atoms_MD).abs().max() > 0.75
    assert cosines(apart.atoms_MD).abs().max() < 0.65


@pytest.mark.parametrize("bound", [0.0, 1.0, -0.5, float("nan")])
def test_bounds_that_are_none(bound: float) -> None:
    with pytest.raises(ShapeError, match="coherence must be between 0 and 1"):
        LearnerOptions(24, Coding(3), coherence=bound).check()
