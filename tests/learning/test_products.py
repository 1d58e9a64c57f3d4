"""Products by bfloat16 ones: what float32 is on CUDA, computed on the CPU as there, and precision bfloat16."""

import pytest
import torch

from ksvd_sae.learning.products import multiplied, split_products, times
from tests.strategies import generator


def error(got_NM: torch.Tensor, wanted_NM: torch.Tensor, rows_ND: torch.Tensor, others_MD: torch.Tensor) -> float:
    """Largest, as a fraction of ‖row‖‖other‖."""
    return float(((got_NM.double() - wanted_NM) / (rows_ND.norm(dim=1)[:, None] * others_MD.norm(dim=1))).abs().max())


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_three_products_are_nearly_float32(scale: float) -> None:
    rows_ND = torch.randn(60, 300, generator=generator(0)) * scale
    others_MD = torch.randn(80, 300, generator=generator(1))
    wanted_NM = rows_ND.double() @ others_MD.double().T
    got = error(split_products(rows_ND, others_MD), wanted_NM, rows_ND.double(), others_MD.double())
    # The limit that TF32's 11 bits would miss by far, and what float32 itself gives.
    low_ND, low_MD = (torch.round(t.double() * 2**10 / 2.0 ** t.abs().log2().floor()) for t in (rows_ND, others_MD))
    low_ND, low_MD = (
        low * 2.0 ** t.abs().log2().floor() / 2**10 for low, t in ((low_ND, rows_ND), (low_MD, others_MD))
    )
    tf32 = error(low_ND @ low_MD.T, wanted_NM, rows_ND.double(), others_MD.double())
    assert got < 2**-17
    assert tf32 > 8 * got


def test_factors_of_16_bits_are_exact() -> None:
    rows_ND = torch.randn(7, 40, generator=generator(0)).bfloat16()
    others_MD = torch.randn(9, 40, generator=generator(1)).bfloat16()
    exact_NM = rows_ND.double() @ others_MD.double().T
    for got_NM in (multiplied(rows_ND, others_MD), split_products(rows_ND.float(), others_MD.float())):
        assert got_NM.dtype == torch.float32
        assert torch.allclose(got_NM.double(), exact_NM, rtol=0, atol=1e-5)


def test_what_all_share_is_not_rounded() -> None:
    """As in activations: most of each row lies along one direction, and what tells them apart is small."""
    shared_D = torch.nn.functional.normalize(torch.randn(64, generator=generator(0)), dim=0)
    rows_ND = 30 * torch.randn(50, 1, generator=generator(1)) * shared_D + torch.randn(50, 64, generator=generator(2))
    others_MD = 8 * shared_D + torch.randn(70, 64, generator=generator(3))
    wanted_NM = rows_ND.double() @ others_MD.double().T
    plain = (rows_ND.bfloat16() @ others_MD.bfloat16().T - wanted_NM).abs().max()
    assert (times(others_MD, "bfloat16")(rows_ND) - wanted_NM).abs().max() < plain / 5


@pytest.mark.parametrize(
    "others_MD", [torch.eye(6), -torch.eye(6)[:2], torch.zeros(3, 6), torch.cat([torch.eye(6), -torch.eye(6)])]
)
def test_others_that_share_no_direction(others_MD: torch.Tensor) -> None:
    rows_ND = torch.randn(5, 6, generator=generator(0))
    got_NM, wanted_NM = times(others_MD, "bfloat16")(rows_ND), rows_ND @ others_MD.T
    assert (got_NM - wanted_NM).abs().max() <= 2**-7 * wanted_NM.abs().max()


def test_no_global_setting_is_read_or_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading ``allow_tf32`` raises where a user has set ``fp32_precision``."""

    def refuse(*_: object) -> None:
        raise AssertionError("a global setting was looked at")

    monkeypatch.setattr(type(torch.backends.cuda.matmul), "__getattr__", refuse)
    monkeypatch.setattr(type(torch.backends.cuda.matmul), "__setattr__", refuse)
    rows_ND = torch.randn(5, 8)
    for precision in ("float32", "bfloat16"):
        assert times(rows_ND, precision)(rows_ND).shape == (5, 5)
    split_products(rows_ND, rows_ND)
