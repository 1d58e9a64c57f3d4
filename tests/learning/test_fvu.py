"""The FVU against its definition in float64, however the samples come."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ksvd_sae.errors import ActivationError, ShapeError
from ksvd_sae.learning import fvu as module
from ksvd_sae.learning.fvu import FVU, Variance, fvu, variance
from tests import tolerances
from tests.strategies import generator


def pair(n: int = 500, d: int = 12, offset: float = 5.0) -> tuple[Tensor, Tensor]:
    """Samples whose mean is far from 0, and something like them."""
    x_ND = torch.randn(n, d, generator=generator(0)) + offset * torch.linspace(-1, 1, d)
    return x_ND, x_ND + 0.3 * torch.randn(n, d, generator=generator(1))


def defined(x_ND: Tensor, rebuilt_ND: Tensor) -> tuple[float, float]:
    """The FVU and Σ‖x − x̄‖², from numpy."""
    x, rebuilt = x_ND.double().numpy(), rebuilt_ND.double().numpy()
    total = float(((x - x.mean(axis=0)) ** 2).sum())
    return float(((x - rebuilt) ** 2).sum()) / total, total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 499, 500, 4096])
def test_of_samples_that_are_all_there(monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(module, "_ROWS", {"cpu": rows})
    x_ND, rebuilt_ND = (each.to(dtype) for each in pair())
    wanted, total = defined(x_ND, rebuilt_ND)
    assert fvu(x_ND, rebuilt_ND, "test") == pytest.approx(wanted, rel=tolerances.SUMMED_IN_FLOAT64)
    assert variance(x_ND, "test") == pytest.approx(total, rel=tolerances.SUMMED_IN_FLOAT64)


@pytest.mark.parametrize("cut", [(500,), (*(1,) * 30, 470), (7, 1, 199, 0, 293), (250, 250)], ids=str)
def test_of_a_stream_does_not_depend_on_its_batches(cut: tuple[int, ...]) -> None:
    """Batches that differ in their means: about each batch's own mean the variance would be far smaller."""
    x_ND, rebuilt_ND = pair()
    x_ND, rebuilt_ND = (each + torch.linspace(-50, 50, 500)[:, None] for each in (x_ND, rebuilt_ND))
    stream = FVU()
    for x_BD, rebuilt_BD in zip(x_ND.split(list(cut)), rebuilt_ND.split(list(cut)), strict=True):
        stream.add(x_BD, rebuilt_BD)
    assert stream.n_samples == 500
    assert stream.value("test") == pytest.approx(defined(x_ND, rebuilt_ND)[0], rel=tolerances.SUMMED_IN_FLOAT64)


def test_a_mean_ten_thousand_times_the_spread() -> None:
    x_ND, rebuilt_ND = (each.double() for each in pair(offset=1e4))
    wanted = defined(x_ND, rebuilt_ND)[0]
    assert fvu(x_ND, rebuilt_ND, "test") == pytest.approx(wanted, rel=tolerances.FAR_FROM_THE_MEAN)


def test_the_mean_explains_nothing_and_the_samples_everything() -> None:
    x_ND, _ = pair()
    mean_ND = x_ND.double().mean(dim=0).expand(500, -1)
    assert fvu(x_ND.double(), mean_ND, "test") == pytest.approx(1, rel=tolerances.SUMMED_IN_FLOAT64)
    assert fvu(x_ND, x_ND.clone(), "test") == 0


@pytest.mark.parametrize("shape", [(1000, 2), (1, 2), (2,), (3000, 1)], ids=str)
def test_reconstructions_of_another_shape(shape: tuple[int, ...]) -> None:
    """Some of them would be broadcast, and give a number."""
    with pytest.raises(ShapeError, match=r"(?s)differ in shape.*got: "):
        fvu(torch.rand(3000, 2, generator=generator(0)), torch.ones(shape), "test")


def of_a_stream(x_ND: Tensor) -> float:
    stream = FVU()
    for x_BD in x_ND.split(3):
        stream.add(x_BD, torch.zeros_like(x_BD))
    return stream.value("test")


def of_its_variance(x_ND: Tensor) -> float:
    stream = Variance()
    for x_BD in x_ND.split(3):
        stream.add(x_BD)
    return stream.total("test")


@pytest.mark.parametrize(
    "ask",
    [lambda x: fvu(x, torch.zeros_like(x), "test"), lambda x: variance(x, "test"), of_a_stream, of_its_variance],
    ids=["fvu", "variance", "FVU", "Variance"],
)
@pytest.mark.parametrize("n", [0, 1, 10])
def test_samples_without_variance(ask: Callable[[Tensor], float], n: int) -> None:
    """An error, not a division by zero; and no number made of rounding: 0.1 is no binary fraction."""
    x_ND = torch.full((n, 5), 0.1)
    with pytest.raises(ActivationError, match=rf"(?s)test: all samples .* are the same.*got: {n} samples.*cure"):
        ask(x_ND)


def test_not_a_number_is_no_variance() -> None:
    x_ND = torch.tensor([[1.0, np.nan], [2.0, 3.0]])
    with pytest.raises(ActivationError):
        variance(x_ND, "test")
