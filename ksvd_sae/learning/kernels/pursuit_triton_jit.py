"""Matching pursuit and orthogonal matching pursuit for CUDA: one Triton program a sample, all its steps in it.

Notation: C samples (a chunk), M atoms, K = k; ``p`` a sample's row of products with its residual, ``G`` the
Gram matrix. The torch version passes over chunk × M products several times a step, with a launch and a wait
each. Here a step reads Gram rows, subtracts them from products that stay where they are, and finds the next
largest; a sample that is done frees its place at once.

Bytes a sample; they bound the time, for there are about ten instructions to a Gram entry (b = 4 bytes in
float32, 2 in float16):

- Matching pursuit reads M·4 of products once and M·b of Gram a step, and writes K·12. The products are held in
  registers for up to ``REGISTERS_M`` atoms; above that they stay in memory, which adds M·8 a step.
- Orthogonal matching pursuit reads s·M·b of Gram and moves M·8 of products at step s < k: M·(b·k²/2 + 8·k)
  in all. Keeping the orthonormalised picks' products with all atoms instead would read as much and need k·M
  floats of memory a sample.

Gram rows come from the L2 cache where M²·b fits into it (4,096 atoms: 64 MiB in float32, 32 MiB in float16,
against 50 MiB on an H100), else from memory. In float16 a product is off by up to 2⁻¹² of the coefficients
subtracted from it: picks are then float32's for 96 % of samples on real activations, for 72 % in bfloat16 (one-off).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton  # type: ignore[import-untyped]
    import triton.language as tl  # type: ignore[import-untyped]
except ImportError:  # some platforms have no wheel: pursuit_triton.why_not says so
    triton = None

__all__ = ["jit", "pursue_sample", "pursue_sample_orthogonally", "triton"]


def jit(**options: Any) -> Callable[[Any], Any]:
    """triton.jit; without Triton the function as it is, which nothing then calls."""
    return triton.jit(**options) if triton is not None else lambda kernel: kernel


@jit()
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


@jit()
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


@jit(do_not_specialize=["k", "max_steps"])
def pursue_sample(  # type: ignore[no-untyped-def]
    products_ptr,
    energy_ptr,
    floor_ptr,
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
    enough, floor = rtol_squared * left, tl.load(floor_ptr + row)
    if IN_REGISTERS:
        atoms_M = tl.arange(0, BLOCK_M)
        inside_M = atoms_M < n_atoms
        products_M = tl.load(products_ptr + atoms_M, mask=inside_M, other=0.0, eviction_policy="evict_first")
        a, atom = _largest(products_M, atoms_M, NONNEGATIVE)
    else:
        a, atom = _subtract_and_find(products_ptr, gram_ptr, left_ptr, support_ptr, 0, n_atoms, NONNEGATIVE, BLOCK_M)
    count, slot, step = 0, 0, 0
    active = (tl.abs(a) > floor) & (left > enough) & (left > 0)
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
        active = (step < max_steps) & (tl.abs(a) > floor) & (left > enough) & (left > 0) & (slot < k)
    used_K = slots_K < count
    at_K = tl.where(used_K, support_K, 0)
    left_K = tl.gather(products_M, at_K, axis=0) if IN_REGISTERS else tl.load(products_ptr + at_K, mask=used_K)
    tl.store(values_ptr + slots_K, values_K, mask=used_K)
    tl.store(support_ptr + slots_K, support_K, mask=used_K)
    tl.store(left_ptr + slots_K, left_K, mask=used_K)


@jit()
def _add_pick_and_find(  # type: ignore[no-untyped-def]
    products_ptr,
    new_ptr,
    gram_ptr,
    direction_ptr,
    picks_ptr,
    n_picks,
    along,
    least,
    n_atoms,
    BLOCK_M: tl.constexpr,
):
    """For v = Σ direction·(Gram row of the pick): products −= along·v and new −= v², in place in memory; then the
    (product, atom) with the largest product² / new.

    new: what of each atom's square the picks leave; counts as ``least`` at the least.
    """
    best_M = tl.zeros([BLOCK_M], tl.float32)
    best_atom_M = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, n_atoms, BLOCK_M):
        atoms_M = start + tl.arange(0, BLOCK_M)
        inside_M = atoms_M < n_atoms
        v_M = tl.zeros([BLOCK_M], tl.float32)
        for pick in tl.range(0, n_picks, loop_unroll_factor=4):
            atom = tl.load(picks_ptr + pick).to(tl.int64)
            weight = tl.load(direction_ptr + pick)
            gram_M = tl.load(gram_ptr + atom * n_atoms + atoms_M, mask=inside_M, other=0.0).to(tl.float32)
            v_M = tl.fma(gram_M, weight, v_M)
        products_M = tl.fma(v_M, -along, tl.load(products_ptr + atoms_M, mask=inside_M, other=0.0))
        new_M = tl.fma(v_M, -v_M, tl.load(new_ptr + atoms_M, mask=inside_M, other=0.0))
        tl.store(products_ptr + atoms_M, products_M, mask=inside_M)
        tl.store(new_ptr + atoms_M, new_M, mask=inside_M)
        # Signed, so that the search for the largest size can tell which product it found.
        gain_M = products_M / tl.sqrt(tl.maximum(new_M, least))
        free_M = tl.where(products_M < float("inf"), gain_M, 0.0)
        better_M = tl.abs(free_M) > tl.abs(best_M)
        best_M = tl.where(better_M, free_M, best_M)
        best_atom_M = tl.where(better_M, atoms_M, best_atom_M)
    tl.debug_barrier()
    gain, atom = _largest(best_M, best_atom_M, False)
    return tl.where(gain != 0, tl.load(products_ptr + atom), 0.0), atom


@jit(do_not_specialize=["k"])
def pursue_sample_orthogonally(  # type: ignore[no-untyped-def]
    products_ptr,
    new_ptr,
    energy_ptr,
    floor_ptr,
    gram_ptr,
    values_ptr,
    support_ptr,
    n_atoms,
    k,
    enough_share,
    dependent,
    least_new,
    BY_ERROR: tl.constexpr,
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
    if BY_ERROR:
        new_ptr += row * n_atoms
    slots_K = tl.arange(0, BLOCK_K)
    support_K = tl.zeros([BLOCK_K], tl.int32)
    values_K = tl.zeros([BLOCK_K], tl.float32)
    inverse_KK = tl.zeros([BLOCK_K, BLOCK_K], tl.float32)
    # Of the error, what is above that of a sample that is done: one register in place of two.
    left = tl.load(energy_ptr + row)
    left -= enough_share * left
    count = 0
    product, atom = _subtract_and_find(products_ptr, gram_ptr, values_ptr, support_ptr, 0, n_atoms, False, BLOCK_M)
    active = (product != 0) & (left > 0)
    while active:
        gram_row_ptr = gram_ptr + atom.to(tl.int64) * n_atoms
        gram_K = tl.load(gram_row_ptr + support_K, mask=slots_K < count, other=0.0).to(tl.float32)
        w_K = tl.sum(inverse_KK * gram_K[None, :], axis=1)
        pivot = tl.load(gram_row_ptr + atom).to(tl.float32) - tl.sum(w_K * w_K, axis=0)
        pivot = tl.sqrt(tl.maximum(pivot, 0.0))
        floor = tl.load(floor_ptr + tl.program_id(0))
        active = (left > 0) & (pivot > dependent) & (tl.abs(product) > (floor * pivot if BY_ERROR else floor))
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
                carried_K = direction_K if BY_ERROR else step_K
                tl.store(values_ptr + slots_K, carried_K, mask=slots_K < count)
                tl.store(support_ptr + slots_K, support_K, mask=slots_K < count)
                tl.store(products_ptr + atom, float("inf"))
                tl.debug_barrier()
                if BY_ERROR:
                    product, atom = _add_pick_and_find(
                        products_ptr,
                        new_ptr,
                        gram_ptr,
                        values_ptr,
                        support_ptr,
                        count,
                        along,
                        least_new,
                        n_atoms,
                        BLOCK_M,
                    )
                else:
                    product, atom = _subtract_and_find(
                        products_ptr, gram_ptr, values_ptr, support_ptr, count, n_atoms, False, BLOCK_M
                    )
                active = product != 0
    tl.store(values_ptr + slots_K, values_K, mask=slots_K < count)
    tl.store(support_ptr + slots_K, support_K, mask=slots_K < count)
