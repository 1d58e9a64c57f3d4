"""Products of rows with rows, in the precision that is asked for.

============  ====================================  =========================================================
precision     on the CPU                            on CUDA
============  ====================================  =========================================================
``float32``   float32                               three bfloat16 products that make up for each other's rounding
``bfloat16``  factors and result rounded, but for   one bfloat16 product, summed in float32
              what all others share
============  ====================================  =========================================================

On CUDA a float32 product without tensor cores takes five times as long as three bfloat16 ones. With x = x₁ + x₂ of 8
bits each (and the rest, 2⁻¹⁸ of x), x·a ≈ x₁·a₁ + x₂·a₁ + x₁·a₂: as one product of three times the inner size. It errs
by 2⁻¹⁷ of ‖x‖‖a‖ at most, where TF32 errs by 2⁻¹¹ (tests/learning/test_products.py).

A CPU rounds the result to bfloat16 as well: by 2⁻⁹ of each product, however small what is picked last. Activations and
atoms share one direction (half of the samples' energy at layer 9 of Gemma-3-270M), which makes most products large; so
with u that of the atoms, x·a = (x − (x·u)u)·a + (x·u)(u·a), of which only the first is rounded. That takes ORMP's error
from 2 % above that of float32 products to 0.02 % (`ksvd-sae bench coding` has both precisions).

Nothing here depends on, or changes, torch's global precision of float32 products, which users set (a float32 product on
CUDA is silently TF32 at 'high'): a bfloat16 product summed in float32 has no such switch.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ksvd_sae.errors import ShapeError

Precision = Literal["float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
# Of the power iteration: any direction is right, and the leading one the best.
_ITERATIONS = 4
# GPUs before Ampere multiply bfloat16 without tensor cores, and have no TF32 that float32 could turn into.
_BFLOAT16_CAPABILITY = (8, 0)


def check_precision(precision: Precision, x_BD: Tensor) -> None:
    """Raise ShapeError for a precision that does not exist there."""
    reason = None
    if precision not in PRECISIONS:
        reason = f"there is no precision {precision!r}"
    elif precision != "float32" and x_BD.dtype == torch.float64:
        reason = "float64 samples ask for float64 products"
    if reason:
        raise ShapeError(f"coding: {reason}", limit=", ".join(PRECISIONS), cure="use precision 'float32'")


def times(others_MD: Tensor, precision: Precision = "float32") -> Callable[[Tensor], Tensor]:
    """rows (N, D) -> rows·othersᵀ, (N, M), in the rows' dtype; what is to be done to the others is done once."""
    if precision == "float32":
        return lambda rows_ND: products(rows_ND, others_MD)
    low_MD = others_MD.bfloat16()
    if others_MD.device.type == "cuda":
        return lambda rows_ND: multiplied(rows_ND.bfloat16(), low_MD)
    shared_D = _shared_direction(others_MD)
    shared_M = others_MD @ shared_D

    def rounded(rows_ND: Tensor) -> Tensor:
        shared_N = rows_ND @ shared_D
        low_ND = torch.addr(rows_ND, shared_N, shared_D, alpha=-1).bfloat16()
        return (low_ND @ low_MD.T).float().addr_(shared_N, shared_M)

    return rounded


def _shared_direction(rows_ND: Tensor) -> Tensor:
    """About the leading right singular vector, (D,)."""
    shared_D = rows_ND.new_zeros(rows_ND.shape[1])
    shared_D.index_fill_(0, rows_ND.square().sum(dim=0).argmax().reshape(1), 1)
    for _ in range(_ITERATIONS):
        turned_D = (rows_ND @ shared_D) @ rows_ND
        norm = torch.linalg.vector_norm(turned_D)
        shared_D = torch.where(norm > 0, turned_D / norm, shared_D)
    return shared_D


def products(rows_ND: Tensor, others_MD: Tensor) -> Tensor:
    """rows·othersᵀ, (N, M), in the rows' dtype and in float32's precision at least."""
    if rows_ND.dtype == torch.float32 and has_bfloat16(rows_ND.device):
        return split_products(rows_ND, others_MD)
    return rows_ND @ others_MD.T


def split_products(rows_ND: Tensor, others_MD: Tensor) -> Tensor:
    """float32 products by bfloat16 ones; see the module's docstring. Cost: 3·N·M·D multiply-adds."""
    high_ND, high_MD = rows_ND.bfloat16(), others_MD.bfloat16()
    low_ND, low_MD = (rows_ND - high_ND).bfloat16(), (others_MD - high_MD).bfloat16()
    return multiplied(torch.cat([high_ND, low_ND, high_ND], dim=1), torch.cat([high_MD, high_MD, low_MD], dim=1))


def multiplied(rows_ND: Tensor, others_MD: Tensor) -> Tensor:
    """rows·othersᵀ; of bfloat16 factors summed and given in float32."""
    if rows_ND.dtype != torch.bfloat16:
        return rows_ND @ others_MD.T
    if rows_ND.device.type == "cuda":
        return torch.mm(rows_ND, others_MD.T, out_dtype=torch.float32)
    return rows_ND.float() @ others_MD.float().T


def has_bfloat16(device: torch.device) -> bool:
    """Whether it multiplies bfloat16 fast."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _BFLOAT16_CAPABILITY
