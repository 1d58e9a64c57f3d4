"""Products of rows with rows, in the precision that is asked for.

============  =============================  =========================================================
precision     on the CPU                     on CUDA
============  =============================  =========================================================
``float32``   float32                        three bfloat16 products that make up for each other's rounding
``bfloat16``  factors and result rounded     one bfloat16 product, summed in float32
============  =============================  =========================================================

On CUDA a float32 product without tensor cores takes five times as long as three bfloat16 ones. With x = x₁ + x₂ of 8
bits each (and the rest, 2⁻¹⁸ of x), x·a ≈ x₁·a₁ + x₂·a₁ + x₁·a₂: as one product of three times the inner size. It errs
by 2⁻¹⁷ of ‖x‖‖a‖ at most, where TF32 errs by 2⁻¹¹ (tests/learning/test_products.py).

Nothing here depends on, or changes, torch's global precision of float32 products, which users set (a float32 product on
CUDA is silently TF32 at 'high'): a bfloat16 product summed in float32 has no such switch.
"""

from typing import Literal

import torch
from torch import Tensor

from ksvd_sae.errors import ShapeError

Precision = Literal["float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
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


def products(rows_ND: Tensor, others_MD: Tensor, precision: Precision = "float32") -> Tensor:
    """rows·othersᵀ, (N, M), in the rows' dtype."""
    if precision == "bfloat16":
        low_ND, low_MD = rows_ND.bfloat16(), others_MD.bfloat16()
        return multiplied(low_ND, low_MD) if rows_ND.device.type == "cuda" else (low_ND @ low_MD.T).float()
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
