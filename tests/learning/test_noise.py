"""Where noise ends: two humps have a gap between them, one has none."""

import pytest
import torch
from torch import Tensor

from ksvd_sae.learning.noise import SizeHistogram
from tests.strategies import generator


def hump(centre: float, width: float, n: int, seed: int) -> Tensor:
    return (centre + width * torch.randn(n, generator=generator(seed))).abs()


def gap(*sizes: Tensor) -> float | None:
    histogram = SizeHistogram()
    for part in sizes:
        histogram.add(part)
    return histogram.gap()


NOISE, FEATURES = hump(0.06, 0.03, 60_000, 0), hump(0.3, 0.07, 30_000, 1)


def test_between_noise_and_features() -> None:
    found = gap(torch.cat([NOISE, FEATURES]))
    assert found is not None
    assert 0.12 <= found <= 0.19
    assert gap(NOISE, FEATURES) == found, "in batches"
    dense = torch.cat([NOISE, FEATURES, torch.zeros(500_000), torch.full((90_000,), 0.9)])
    assert gap(dense.reshape(1000, -1)) == found, "what was not picked, and large ones, say nothing"


@pytest.mark.parametrize("seed", range(5))
def test_one_hump_has_none(seed: int) -> None:
    tail = torch.distributions.Exponential(12.0)
    torch.manual_seed(seed)
    assert gap(hump(0.06, 0.03, 60_000, seed)) is None
    assert gap(tail.sample((60_000,))) is None, "sizes that fall off as on a language model"
    assert gap(torch.cat([NOISE, tail.sample((60_000,))])) is None
    assert gap(hump(0.3, 0.1, 60_000, seed)) is None


def test_few_are_no_hump() -> None:
    """A handful of large ones is within what counts scatter by."""
    assert gap(torch.cat([NOISE, torch.full((12,), 0.4)])) is None
    assert gap(torch.zeros(5)) is None


def test_an_eighth_of_features_suffices() -> None:
    found = gap(torch.cat([NOISE, FEATURES[:8000]]))
    assert found is not None
    assert 0.12 <= found <= 0.22
