"""Matching pursuit and orthogonal matching pursuit for CUDA: one Triton program a sample, all its steps in it.

Notation: C samples (a chunk), M atoms, K = k; ``p`` a sample's row of products with its residual, ``G`` the
Gram matrix. The torch version passes over chunk × M products several times a step, with a launch and a wait
each. Here a step reads Gram rows, subtracts them from products that stay where they are, and finds the next
largest; a sample that is done frees its place at once.

Bytes a sample; they bound the time, for there are about ten instructions to a Gram entry (b = 4 bytes in
float32, 2 in bfloat16):

- Matching pursuit reads M·4 of products once and M·b of Gram a step, and writes K·12. The products are held in
  registers for up to ``REGISTERS_M`` atoms; above that they stay in memory, which adds M·8 a step.
- Orthogonal matching pursuit reads s·M·b of Gram and moves M·8 of products at step s < k: M·(b·k²/2 + 8·k)
  in all. Keeping the orthonormalised picks' products with all atoms instead would read as much and need k·M
  floats of memory a sample.

Gram rows come from the L2 cache where M²·b fits into it (4,096 atoms: 64 MiB in float32, 32 MiB in bfloat16,
against 50 MiB on an H100), else from memory. In bfloat16 a product is off by up to 2⁻⁹ of the coefficients
subtracted from it: enough to choose atoms by, but coefficients then want a refit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ksvd_sae.errors import ShapeError

try:
    import triton  # type: ignore[import-untyped]
    import triton.language as tl  # type: ignore[import-untyped]
except ImportError:  # some platforms have no wheel: why_not says so
    triton = None

# Products in registers: 16 a thread leave none to spill, and a program has at most 32 warps.
_HELD_PER_WARP = 512
REGISTERS_M = 32 * _HELD_PER_WARP
# Products in memory: 4 a thread are one wide load, of a float32 row or of a bfloat16 one.
_STREAMED_PER_WARP = 128
_STREAMED_WARPS = 8
# OMP's inverse Cholesky factor: 128² floats are 32 for each thread of 16 warps.
_FACTOR_PER_WARP = 1024
ORTHOGONAL_K = 128
# Twice an atom's index, with a sign in the lowest bit, is an int32.
_MOST_ATOMS = 2**30


def _jit(**options: Any) -> Callable[[Any], Any]:
    """triton.jit; without Triton the function as it is, which nothing then calls."""
    return triton.jit(**options) if triton is not None else lambda kernel: kernel


@_jit()
def _largest(products_M, atoms_M, NONNEGATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(product, atom) of the largest |product| (NONNEGATIVE: product), lowest atom first; product 0 if none is left.

    The maximum, then the smallest key among those that reach it: fewer instructions an entry than one reduction
    of (product, atom) pairs. The sign rides along in the key, so that no third reduction looks the product up.
    """
    size_M = products_M if NONNEGATIVE else tl.abs(products_M)
    size = tl.max(size_M, axis=0)
    negative_M = (products_M.to(tl.uint32, bitcast=True) >> 31).to(tl.int32)
    key = tl.min(tl.where(size_M == size, atoms_M * 2 + negative_M, 2147483647), axis=0)
    if NONNEGATIVE:
        product = tl.maximum(size, 0.0)
    else:
        product = tl.where(key % 2 == 1, -size, size)
    return product, key // 2


@_jit()
def _subtract_and_find(  # type: ignore[no-untyped-def]
    products_ptr,
    gram_ptr,
    coefficients_ptr,
    picks_ptr,
    n_picks,
    n_atoms,
    NONNEGATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """products −= Σ coefficient·(Gram row of the pick), in place in memory; then ``_largest`` of them.

    A product of infinity marks an atom that must not be picked.
    """
    best_M = tl.zeros([BLOCK_M], tl.float32)
    best_atom_M = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, n_atoms, BLOCK_M):
        atoms_M = start + tl.arange(0, BLOCK_M)
        inside_M = atoms_M < n_atoms
        products_M = tl.load(products_ptr + atoms_M, mask=inside_M, other=0.0)
        for pick in tl.range(0, n_picks, loop_unroll_factor=4):
            atom = tl.load(picks_ptr + pick).to(tl.int64)
            coefficient = tl.load(coefficients_ptr + pick)
            gram_M = tl.load(gram_ptr + atom * n_atoms + atoms_M, mask=inside_M, other=0.0).to(tl.float32)
            products_M = tl.fma(gram_M, -coefficient, products_M)
        tl.store(products_ptr + atoms_M, products_M, mask=inside_M)
        free_M = tl.where(products_M < float("inf"), products_M, 0.0)
        better_M = free_M > best_M if NONNEGATIVE else tl.abs(free_M) > tl.abs(best_M)
        best_M = tl.where(better_M, free_M, best_M)
        best_atom_M = tl.where(better_M, atoms_M, best_atom_M)
    # Other threads may read or mark what this one has written.
    tl.debug_barrier()
    return _largest(best_M, best_atom_M, NONNEGATIVE)


@_jit(do_not_specialize=["k", "max_steps"])
def _pursue(  # type: ignore[no-untyped-def]
    products_ptr,
    energy_ptr,
    gram_ptr,
    values_ptr,
    support_ptr,
    left_ptr,
    n_atoms,
    k,
    max_steps,
    rtol_squared,
    NONNEGATIVE: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    products_ptr += row * n_atoms
    values_ptr, support_ptr, left_ptr = values_ptr + row * k, support_ptr + row * k, left_ptr + row * k
    slots_K = tl.arange(0, BLOCK_K)
    support_K = tl.full([BLOCK_K], -1, tl.int32)
    values_K = tl.zeros([BLOCK_K], tl.float32)
    left = tl.load(energy_ptr + row)
    enough = rtol_squared * left
    if IN_REGISTERS:
        atoms_M = tl.arange(0, BLOCK_M)
        inside_M = atoms_M < n_atoms
        products_M = tl.load(products_ptr + atoms_M, mask=inside_M, other=0.0, eviction_policy="evict_first")
        a, atom = _largest(products_M, atoms_M, NONNEGATIVE)
    else:
        a, atom = _subtract_and_find(products_ptr, gram_ptr, left_ptr, support_ptr, 0, n_atoms, NONNEGATIVE, BLOCK_M)
    count, slot, step = 0, 0, 0
    active = (a != 0) & (left > enough) & (left > 0)
    while active:
        values_K = tl.where(slots_K == slot, values_K + a, values_K)
        support_K = tl.where(slots_K == slot, atom, support_K)
        count = tl.maximum(count, slot + 1)
        left -= a * a
        step += 1
        if IN_REGISTERS:
            gram_M = tl.load(gram_ptr + atom.to(tl.int64) * n_atoms + atoms_M, mask=inside_M, other=0.0)
            products_M = tl.fma(gram_M.to(tl.float32), -a, products_M)
            a, atom = _largest(products_M, atoms_M, NONNEGATIVE)
        else:
            # The sample's first outputs carry the pick: they are written only at the end.
            tl.store(left_ptr, a)
            tl.store(support_ptr, atom)
            tl.debug_barrier()
            a, atom = _subtract_and_find(
                products_ptr, gram_ptr, left_ptr, support_ptr, 1, n_atoms, NONNEGATIVE, BLOCK_M
            )
        slot = tl.min(tl.where(support_K == atom, slots_K, count), axis=0)  # the atom's, else the first free
        active = (step < max_steps) & (a != 0) & (left > enough) & (left > 0) & (slot < k)
    used_K = slots_K < count
    at_K = tl.where(used_K, support_K, 0)
    left_K = tl.gather(products_M, at_K, axis=0) if IN_REGISTERS else tl.load(products_ptr + at_K, mask=used_K)
    tl.store(values_ptr + slots_K, values_K, mask=used_K)
    tl.store(support_ptr + slots_K, support_K, mask=used_K)
    tl.store(left_ptr + slots_K, left_K, mask=used_K)


@_jit(do_not_specialize=["k"])
def _pursue_orthogonally(  # type: ignore[no-untyped-def]
    products_ptr,
    energy_ptr,
    gram_ptr,
    values_ptr,
    support_ptr,
    n_atoms,
    k,
    enough_share,
    dependent,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """With L the Cholesky factor of the support's Gram matrix, row s of L⁻¹ holds the coefficients, over the
    picks so far, of u_s, the direction that pick s added. It follows from the rows above it without a solve:
    w = L⁻¹g for the new atom's products g with the support, then (−wᵀL⁻¹, 1) / √(1 − ‖w‖²).
    """
    row = tl.program_id(0).to(tl.int64)
    products_ptr += row * n_atoms
    values_ptr, support_ptr = values_ptr + row * k, support_ptr + row * k
    slots_K = tl.arange(0, BLOCK_K)
    support_K = tl.zeros([BLOCK_K], tl.int32)
    values_K = tl.zeros([BLOCK_K], tl.float32)
    inverse_KK = tl.zeros([BLOCK_K, BLOCK_K], tl.float32)
    left = tl.load(energy_ptr + row)
    enough = enough_share * left
    count = 0
    product, atom = _subtract_and_find(products_ptr, gram_ptr, values_ptr, support_ptr, 0, n_atoms, False, BLOCK_M)
    active = (product != 0) & (left > 0)
    while active:
        gram_row_ptr = gram_ptr + atom.to(tl.int64) * n_atoms
        gram_K = tl.load(gram_row_ptr + support_K, mask=slots_K < count, other=0.0).to(tl.float32)
        w_K = tl.sum(inverse_KK * gram_K[None, :], axis=1)
        pivot = tl.load(gram_row_ptr + atom).to(tl.float32) - tl.sum(w_K * w_K, axis=0)
        pivot = tl.sqrt(tl.maximum(pivot, 0.0))
        active = (left > enough) & (pivot > dependent)
        if active:
            is_new_K = slots_K == count
            direction_K = (is_new_K.to(tl.float32) - tl.sum(w_K[:, None] * inverse_KK, axis=0)) / pivot
            along = product / pivot
            step_K = along * direction_K
            inverse_KK = tl.where(is_new_K[:, None], direction_K[None, :], inverse_KK)
            values_K += step_K
            support_K = tl.where(is_new_K, atom, support_K)
            left -= along * along
            count += 1
            active = count < k
            if active:
                # The outputs carry the picks and what to subtract of each until they are written for good.
                tl.store(values_ptr + slots_K, step_K, mask=slots_K < count)
                tl.store(support_ptr + slots_K, support_K, mask=slots_K < count)
                tl.store(products_ptr + atom, float("inf"))
                tl.debug_barrier()
                product, atom = _subtract_and_find(
                    products_ptr, gram_ptr, values_ptr, support_ptr, count, n_atoms, False, BLOCK_M
                )
                active = product != 0
    tl.store(values_ptr + slots_K, values_K, mask=slots_K < count)
    tl.store(support_ptr + slots_K, support_K, mask=slots_K < count)


def why_not(device: torch.device, n_atoms: int, k: int, orthogonal: bool = False) -> str | None:
    """Why these kernels cannot run there, or None if they can. ``orthogonal``: asked for pursue_orthogonally."""
    if triton is None:
        return "triton is not installed"
    interpreted = not isinstance(_pursue, triton.JITFunction)
    if device.type != "cuda" and not interpreted:
        return f"it runs on CUDA devices, not on {device.type} (unless TRITON_INTERPRET=1 is set before the import)"
    if n_atoms > _MOST_ATOMS:
        return f"it numbers atoms up to {_MOST_ATOMS}, and there are {n_atoms}"
    if orthogonal and k > ORTHOGONAL_K:
        return f"it holds a k × k factor in registers, for k up to {ORTHOGONAL_K}, not {k}"
    return None


def pursue(
    products_CM: Tensor,
    energy_C: Tensor,
    gram_MM: Tensor,
    k: int,
    max_steps: int,
    rtol: float,
    nonnegative: bool,
    values_CK: Tensor,
    support_CK: Tensor,
    left_CK: Tensor,
    registers_m: int = REGISTERS_M,
) -> None:
    """Matching pursuit from the products of a chunk with all atoms, into the last three tensors (zeroed).

    Args:
        products_CM: x·atomsᵀ; overwritten if M is above ``registers_m``.
        energy_C: ‖x‖².
        gram_MM: atoms·atomsᵀ, float32 or bfloat16; the rest is float32.
        k, max_steps, rtol: as in ``sparse_coding.matching_pursuit``.
        nonnegative: pick the largest product rather than the largest |product|, and stop where none is above 0.
        values_CK, support_CK (int32): the code; unused slots are left as they are.
        left_CK: products of the final residual with the atoms of the support.
        registers_m: most atoms whose products are held in registers.
    Raises: ShapeError where the kernel cannot run, or for a tensor of another shape, type or layout.
    Numerics: picks as in the torch version up to ties of rounding; equal products go to the lowest index.
    """
    outputs = {"values_CK": values_CK, "support_CK": support_CK, "left_CK": left_CK}
    _check("pursue", products_CM, energy_C, gram_MM, k, outputs)
    n, n_atoms = products_CM.shape
    if n == 0 or max_steps < 1:
        return
    with _on(products_CM.device):
        _pursue[(n,)](
            products_CM,
            energy_C,
            gram_MM,
            values_CK,
            support_CK,
            left_CK,
            n_atoms,
            k,
            max_steps,
            float(rtol**2),
            NONNEGATIVE=nonnegative,
            **launch(n_atoms, k, registers_m),
        )


def pursue_orthogonally(
    products_CM: Tensor,
    energy_C: Tensor,
    gram_MM: Tensor,
    k: int,
    rtol: float,
    nonnegative: bool,
    values_CK: Tensor,
    support_CK: Tensor,
    most_m: int = REGISTERS_M,
) -> None:
    """Orthogonal matching pursuit from the products of a chunk, which it overwrites, into the last two tensors.

    Args, Raises: as ``pursue``; ``most_m`` bounds how many products are handled at a time.
    Numerics: the coefficients fit the residual that the picks were made from, whatever the rounding of the
    factor; with a bfloat16 Gram matrix both are off by its rounding.
    """
    if nonnegative:
        raise ShapeError(
            "pursue_orthogonally: non-negative coefficients are not in this kernel",
            cause="their least squares may take an atom out again, and its factor only grows",
            cure="use backend 'torch' or 'numba'",
        )
    _check("pursue_orthogonally", products_CM, energy_C, gram_MM, k, {"values_CK": values_CK, "support_CK": support_CK})
    n, n_atoms = products_CM.shape
    if n == 0:
        return
    eps = torch.finfo(torch.float32).eps
    with _on(products_CM.device):
        _pursue_orthogonally[(n,)](
            products_CM,
            energy_C,
            gram_MM,
            values_CK,
            support_CK,
            n_atoms,
            k,
            max(rtol, eps) ** 2,
            4 * eps**0.5,
            **launch_orthogonal(n_atoms, k, most_m),
        )


def launch(n_atoms: int, k: int, registers_m: int = REGISTERS_M) -> dict[str, Any]:
    """Block sizes and compiler options of ``pursue``."""
    held = n_atoms <= registers_m
    block_m = n_atoms if held else min(registers_m, _STREAMED_PER_WARP * _STREAMED_WARPS)
    block_m = triton.next_power_of_2(block_m)
    warps = max(1, block_m // (_HELD_PER_WARP if held else _STREAMED_PER_WARP))
    blocks = {"BLOCK_M": block_m, "BLOCK_K": triton.next_power_of_2(k)}
    return {"IN_REGISTERS": held, **blocks, "num_warps": warps, "enable_fp_fusion": True}


def launch_orthogonal(n_atoms: int, k: int, most_m: int = REGISTERS_M) -> dict[str, Any]:
    """Block sizes and compiler options of ``pursue_orthogonally``."""
    block_k = triton.next_power_of_2(k)
    warps = max(_STREAMED_WARPS, block_k**2 // _FACTOR_PER_WARP)
    block_m = triton.next_power_of_2(min(n_atoms, most_m, warps * _STREAMED_PER_WARP))
    warps = max(1, block_m // _STREAMED_PER_WARP, block_k**2 // _FACTOR_PER_WARP)
    return {"BLOCK_M": block_m, "BLOCK_K": block_k, "num_warps": warps, "enable_fp_fusion": True}


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever device the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _check(
    operation: str, products_CM: Tensor, energy_C: Tensor, gram_MM: Tensor, k: int, outputs: dict[str, Tensor]
) -> None:
    """Kernels take bare pointers: a tensor of another shape or layout would be read past its end."""
    n, n_atoms = products_CM.shape
    reason = why_not(products_CM.device, n_atoms, k, orthogonal=operation == "pursue_orthogonally")
    if reason:
        raise ShapeError(f"{operation}: the Triton kernel cannot run: {reason}", cure="use backend 'auto'")
    floats, grams = (torch.float32,), (torch.float32, torch.bfloat16)
    expected: dict[str, tuple[Tensor, tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "products_CM": (products_CM, (n, n_atoms), floats),
        "energy_C": (energy_C, (n,), floats),
        "gram_MM": (gram_MM, (n_atoms, n_atoms), grams),
    }
    for name, tensor in outputs.items():
        expected[name] = (tensor, (n, k), (torch.int32,) if name == "support_CK" else floats)
    for name, (tensor, shape, dtypes) in expected.items():
        fits = tensor.shape == shape and tensor.dtype in dtypes and tensor.is_contiguous()
        if not fits or tensor.device != products_CM.device:
            raise ShapeError(
                f"{operation}: {name} does not fit the kernel",
                got=f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, strides {tensor.stride()}",
                limit=f"{shape}, contiguous, {' or '.join(map(str, dtypes))} on {products_CM.device}",
            )
