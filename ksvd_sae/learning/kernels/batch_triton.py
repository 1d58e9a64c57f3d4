"""What training needs of a batch beside its code, on CUDA: one pass over its rows each.

``statistics`` reads the samples once (B·D·4 bytes) where torch's own reductions would pass over them eight times.
``leave`` reads a sample and the atoms of its code (B·K·D·4 bytes, which the L2 cache serves where the atoms fit into
it) and writes the residual, its energy and the code as a dense row: torch's ``embedding_bag`` reads atoms 4 bytes at a
time where this reads 16.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ksvd_sae.learning.kernels.pursuit_triton_jit import jit

try:
    import triton  # type: ignore[import-untyped]
    import triton.language as tl  # type: ignore[import-untyped]
except ImportError:  # some platforms have no wheel: why_not says so
    triton = None

# A tile of samples: 16 rows of 128 columns are 16 entries a thread of 4 warps, three sums of them 48 registers.
_ROWS = 16
LAUNCH_STATISTICS = {"ROWS": _ROWS, "COLUMNS": 128, "num_warps": 4, "enable_fp_fusion": True}
# An atom's piece: 4 entries a thread, one wide load.
_PIECE, _PIECE_WARPS = 256, 2
# Zeros written at a time into a row of the dense code.
_ZEROS = 512


@jit()
def sum_rows(  # type: ignore[no-untyped-def]
    x_ptr,
    origin_ptr,
    energy_ptr,
    largest_ptr,
    spread_ptr,
    columns_ptr,
    n,
    d,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of each row its energy, its largest |entry| and its squared distance from the origin; of the program's rows the
    sum of what they are from the origin, by column."""
    program = tl.program_id(0)
    rows_R = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    energy_RC = tl.zeros([ROWS, COLUMNS], tl.float32)
    spread_RC = tl.zeros([ROWS, COLUMNS], tl.float32)
    largest_RC = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, d, COLUMNS):
        columns_C = start + tl.arange(0, COLUMNS)
        inside_RC = (rows_R < n)[:, None] & (columns_C < d)[None, :]
        x_RC = tl.load(x_ptr + rows_R[:, None] * d + columns_C[None, :], mask=inside_RC, other=0.0)
        origin_C = tl.load(origin_ptr + columns_C, mask=columns_C < d, other=0.0)
        off_RC = tl.where(inside_RC, x_RC - origin_C[None, :], 0.0)
        energy_RC += x_RC * x_RC
        spread_RC += off_RC * off_RC
        largest_RC = tl.maximum(largest_RC, tl.abs(x_RC))
        tl.store(columns_ptr + program.to(tl.int64) * d + columns_C, tl.sum(off_RC, axis=0), mask=columns_C < d)
    tl.store(energy_ptr + rows_R, tl.sum(energy_RC, axis=1), mask=rows_R < n)
    tl.store(spread_ptr + rows_R, tl.sum(spread_RC, axis=1), mask=rows_R < n)
    tl.store(largest_ptr + rows_R, tl.max(largest_RC, axis=1), mask=rows_R < n)


@jit(do_not_specialize=["k"])
def leave_row(  # type: ignore[no-untyped-def]
    x_ptr,
    atoms_ptr,
    values_ptr,
    support_ptr,
    residual_ptr,
    energy_ptr,
    dense_ptr,
    d,
    n_atoms,
    k,
    DENSE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The residual of one sample, its energy and (DENSE) its code as a row of n_atoms."""
    row = tl.program_id(0).to(tl.int64)
    values_ptr, support_ptr = values_ptr + row * k, support_ptr + row * k
    slots_K = tl.arange(0, BLOCK_K)
    values_K = tl.load(values_ptr + slots_K, mask=slots_K < k, other=0.0)
    n_used = tl.max(tl.where(values_K != 0, slots_K + 1, 0), axis=0)
    if DENSE:
        dense_ptr += row * n_atoms
        for start in range(0, n_atoms, BLOCK_M):
            atoms_M = start + tl.arange(0, BLOCK_M)
            zeros_M = tl.zeros([BLOCK_M], dense_ptr.dtype.element_ty)
            tl.store(dense_ptr + atoms_M, zeros_M, mask=atoms_M < n_atoms)
        # Other threads wrote the zeros that the values take the place of.
        tl.debug_barrier()
        support_K = tl.load(support_ptr + slots_K, mask=slots_K < k, other=0)
        tl.store(dense_ptr + support_K, values_K.to(dense_ptr.dtype.element_ty), mask=values_K != 0)
    energy_D = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, d, BLOCK_D):
        columns_D = start + tl.arange(0, BLOCK_D)
        inside_D = columns_D < d
        left_D = tl.load(x_ptr + row * d + columns_D, mask=inside_D, other=0.0)
        for slot in tl.range(0, n_used, loop_unroll_factor=4):
            value = tl.load(values_ptr + slot)
            atom = tl.load(support_ptr + slot).to(tl.int64)
            atom_D = tl.load(atoms_ptr + atom * d + columns_D, mask=inside_D, other=0.0)
            left_D = tl.fma(atom_D, -value, left_D)
        tl.store(residual_ptr + row * d + columns_D, left_D.to(residual_ptr.dtype.element_ty), mask=inside_D)
        energy_D += left_D * left_D
    tl.store(energy_ptr + row, tl.sum(energy_D, axis=0))


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot run there, or None if they can."""
    if triton is None:
        return "triton is not installed"
    if dtype != torch.float32:
        return f"they compute in float32, not {dtype}"
    if device.type != "cuda" and isinstance(sum_rows, triton.JITFunction):
        return f"they run on CUDA devices, not on {device.type}"
    return None


def statistics(x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Energy of each row, (B,), and (largest |entry|, Σ‖x − x̄‖², Σ‖x‖²) in float64 on the device.

    Not finite where an entry is not. Numerics: the first row is taken off before squares are summed, in float32; their
    sums over rows are in float64.
    """
    n, d = x_BD.shape
    x_BD = x_BD.contiguous()
    energy_B, largest_B, spread_B = (x_BD.new_empty(n) for _ in range(3))
    programs = -(-n // _ROWS)
    columns_PD = x_BD.new_empty(programs, d)
    with _on(x_BD.device):
        sum_rows[(programs,)](
            x_BD,
            x_BD[0].contiguous(),
            energy_B,
            largest_B,
            spread_B,
            columns_PD,
            n,
            d,
            **LAUNCH_STATISTICS,
        )
    off = columns_PD.sum(dim=0, dtype=torch.float64).square().sum() / n
    numbers = [largest_B.max().double(), spread_B.sum(dtype=torch.float64) - off, energy_B.sum(dtype=torch.float64)]
    return energy_B, torch.stack(numbers)


def leave(
    x_BD: Tensor,
    atoms_MD: Tensor,
    values_BK: Tensor,
    support_BK: Tensor,
    residual_BD: Tensor,
    dense_BM: Tensor | None = None,
) -> Tensor:
    """x − code·atoms into ``residual_BD``, the code into ``dense_BM``, float32 or bfloat16 both; ‖residual‖², (B,).

    Sums are in float32 and rounded once, at the end.
    """
    (n, d), k = x_BD.shape, values_BK.shape[1]
    energy_B = x_BD.new_empty(n)
    if n == 0:
        return energy_B
    with _on(x_BD.device):
        leave_row[(n,)](
            x_BD.contiguous(),
            atoms_MD.contiguous(),
            values_BK.contiguous(),
            support_BK.contiguous(),
            residual_BD,
            energy_B,
            residual_BD if dense_BM is None else dense_BM,
            d,
            len(atoms_MD),
            k,
            DENSE=dense_BM is not None,
            **launch_leave(k),
        )
    return energy_B


def launch_leave(k: int) -> dict[str, Any]:
    """Block sizes and compiler options of ``leave_row``."""
    blocks = {"BLOCK_D": _PIECE, "BLOCK_K": triton.next_power_of_2(k), "BLOCK_M": _ZEROS}
    return {**blocks, "num_warps": _PIECE_WARPS, "enable_fp_fusion": True}


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
