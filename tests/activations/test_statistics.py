"""Streaming statistics against numpy in float64, and the outlier limit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ksvd_sae.activations.statistics import RunningStatistics, outlier_limit
from ksvd_sae.errors import ActivationError
from tests import tolerances
from tests.strategies import generator


def activations(n: int, d_in: int, offset: float, seed: int = 0) -> Tensor:
    """Around a mean that is large beside the spread, as in a residual stream."""
    draw = generator(seed)
    centre_D = offset * torch.randn(d_in, generator=draw)
    return centre_D + torch.randn(n, d_in, generator=draw)


@given(
    n=st.integers(1, 60),
    d_in=st.sampled_from((1, 3, 7)),
    cuts=st.lists(st.integers(0, 60), max_size=8),
    offset=st.sampled_from((0.0, 1.0, 1e3)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_any_cut_of_the_stream_gives_numpys_numbers(
    n: int, d_in: int, cuts: list[int], offset: float, dtype: torch.dtype
) -> None:
    x_ND = activations(n, d_in, offset).to(dtype)
    running = RunningStatistics(d_in)
    # Empty batches are among the cuts.
    for part in x_ND.tensor_split(sorted(cuts)):
        running.add(part)
    found, x = running.result(5.0), x_ND.double().numpy()
    close = {"rtol": tolerances.STREAMED_STATISTICS, "atol": tolerances.STREAMED_STATISTICS}
    assert found.n_samples == n
    np.testing.assert_allclose(found.centre_D.numpy(), x.mean(axis=0), **close)
    np.testing.assert_allclose(found.variance_D.numpy(), x.var(axis=0), **close)
    np.testing.assert_allclose(found.mean_norm, np.linalg.norm(x, axis=1).mean(), **close)
    np.testing.assert_allclose(found.scale, np.sqrt(x.var(axis=0).mean()), **close)
    assert found.median_norm == 5.0


def test_float64_where_float32_would_lose_the_variance() -> None:
    x_ND = activations(4096, 2, 1e4)
    running = RunningStatistics(2)
    for batch in x_ND.split(100):
        running.add(batch)
    np.testing.assert_allclose(
        running.result(0.0).variance_D, x_ND.double().numpy().var(axis=0), tolerances.STREAMED_STATISTICS
    )


def test_a_result_does_not_change_when_more_is_added() -> None:
    running = RunningStatistics(3)
    running.add(torch.ones(2, 3))
    early = running.result(1.0)
    running.add(torch.full((2, 3), 5.0))
    assert early.centre_D.tolist() == [1, 1, 1]
    assert running.result(1.0).centre_D.tolist() == [3, 3, 3]


def test_no_tokens() -> None:
    running = RunningStatistics(3)
    running.add(torch.zeros(0, 3))
    with pytest.raises(ActivationError, match="no tokens left"):
        running.result(1.0)


@pytest.mark.parametrize(
    ("norms", "factor", "median", "limit"),
    [
        pytest.param([1.0, 2.0, 300.0], 4.0, 2.0, 8.0, id="a multiple of the median"),
        pytest.param([1.0, 2.0, 300.0], None, 2.0, float("inf"), id="no limit"),
        pytest.param([7.0], 1.5, 7.0, 10.5, id="one token"),
    ],
)
def test_outlier_limit(norms: list[float], factor: float | None, median: float, limit: float) -> None:
    assert outlier_limit(torch.tensor(norms), factor) == (median, limit)


def test_outlier_limit_of_nothing() -> None:
    with pytest.raises(ActivationError, match="no tokens"):
        outlier_limit(torch.zeros(0), 4.0)
