"""Pursuits for the CPU: one thread a sample, its row of products in cache for all its steps.

The torch version reads and writes chunk × M products several times a step and spends most of its time in argmax. Here
a step of matching pursuit is two passes over the sample's M products, which lie in the first cache level: subtract a
multiple of a Gram row (the only thing read from afar: 4·M bytes a step), find the largest.

Notation: C samples of a chunk, M atoms, K = k; ``p`` a row of products of the residual with all atoms, ``G`` the Gram
matrix. Small systems (k × k) are solved in float64.

The compiler turns a maximum over floats into a scalar loop and one over integers into vector instructions (2.1 and
0.4 µs for 2,048 products). Finite floats without their sign bit order as the integers of the same bits, so the search
for the largest reads the products as int32.
"""

import numpy as np
from numba import njit, prange
from torch import Tensor

from ksvd_sae.learning.kernels import limits
from ksvd_sae.learning.kernels.compiled import compiled
from ksvd_sae.learning.kernels.least_squares_numba import ROWS, settle, use_torch_threads

_BLOCK = 128
_MAGNITUDE = np.int32(0x7FFFFFFF)
_ALL_BITS = np.int32(-1)
# Columns of the orthonormal picks that are built at a time: they stay in the first cache level.
_COLUMNS = 512
_FAST = {"reassoc", "nnan", "ninf", "nsz", "contract"}


@njit(fastmath=_FAST, inline="always")
def _subtract(p, a, row):  # type: ignore[no-untyped-def]
    for i in range(p.shape[0]):
        p[i] -= a * row[i]


@njit(inline="always")
def _largest(bits, mask):  # type: ignore[no-untyped-def]
    """Lowest index of the largest |p| (mask = magnitude) or of the largest p (mask = all bits), from p's bits."""
    best, best_start = np.int32(-2147483648), 0
    for start in range(0, bits.shape[0], _BLOCK):
        block = bits[start : start + _BLOCK]
        largest = np.int32(-2147483648)
        for i in range(block.shape[0]):
            largest = max(largest, np.int32(block[i] & mask))
        if largest > best:
            best, best_start = largest, start
    block = bits[best_start : best_start + _BLOCK]
    for i in range(block.shape[0]):
        if np.int32(block[i] & mask) == best:
            return best_start + i
    return best_start


@compiled(parallel=True)
def _pursue(products_CM, bits_CM, energy_C, floor_C, gram_MM, k, steps, rtol2, mask, values_CK, support_CK, left_CK):  # type: ignore[no-untyped-def]
    zero = np.float32(0.0)
    for row in prange(products_CM.shape[0]):
        p, bits, values_K, support_K = products_CM[row], bits_CM[row], values_CK[row], support_CK[row]
        left = energy_C[row]
        enough, floor = rtol2 * left, floor_C[row]
        count = 0
        for _ in range(steps):
            atom = _largest(bits, mask)
            a = p[atom]
            if np.abs(a) <= floor or left <= enough or left <= zero or (mask == _ALL_BITS and a < zero):
                break
            slot = 0
            while slot < count and support_K[slot] != atom:
                slot += 1
            if slot == count:
                if count == k:
                    break
                support_K[slot] = atom
                count += 1
            values_K[slot] += a
            left -= a * a
            _subtract(p, a, gram_MM[atom])
        for slot in range(count):
            left_CK[row, slot] = p[support_K[slot]]


@compiled(parallel=True)
def _pursue_orthogonally(  # type: ignore[no-untyped-def]
    products_CM,
    bits_CM,
    energy_C,
    floor_C,
    gram_MM,
    diagonal_M,
    k,
    rtol2,
    dependent,
    by_error,
    least,
    values_CK,
    support_CK,
):
    zero = np.float32(0.0)
    n_rows, n_atoms = products_CM.shape
    for group in prange((n_rows + ROWS - 1) // ROWS):
        # Products of the orthonormalised picks with all atoms; their triangular factor; the sample along them.
        along_KM = np.empty((k, n_atoms), np.float32)
        factor_KK = np.empty((k, k), np.float64)
        sizes_K = np.empty(k, np.float64)
        w_K = np.empty(k, np.float32)
        # By error: what of each atom's square the picks leave, and what it would take off the error.
        new_M, gain_M = np.empty(n_atoms, np.float32), np.empty(n_atoms, np.float32)
        gain_bits = gain_M.view(np.int32)
        for row in range(group * ROWS, min((group + 1) * ROWS, n_rows)):
            p, bits, values_K, support_K = products_CM[row], bits_CM[row], values_CK[row], support_CK[row]
            left = energy_C[row]
            enough, floor = rtol2 * left, float(floor_C[row])
            count = 0
            if by_error:
                new_M[:] = diagonal_M
            while count < k and left > enough and left > zero:
                if by_error and count:
                    _gains(p, new_M, least, gain_M)
                    atom = _largest(gain_bits, _ALL_BITS)
                else:
                    atom = _largest(bits, _MAGNITUDE)
                square = float(gram_MM[atom, atom])
                for s in range(count):
                    w_K[s] = along_KM[s, atom]
                    factor_KK[count, s] = w_K[s]
                    square -= float(w_K[s]) * float(w_K[s])
                pivot = np.sqrt(max(square, 0.0))
                if np.abs(p[atom]) <= (floor * pivot if by_error else floor) or pivot <= dependent:
                    break
                factor_KK[count, count] = pivot
                a = np.float32(p[atom] / pivot)
                sizes_K[count] = a
                support_K[count] = atom
                left -= a * a
                count += 1
                if count < k:
                    _orthonormalise(along_KM, count - 1, w_K, gram_MM[atom], np.float32(1.0 / pivot), p, a)
                    if by_error:
                        _subtract_squares(new_M, along_KM[count - 1])
                    # Exactly orthogonal to what is picked: never picked again.
                    for s in range(count):
                        p[support_K[s]] = zero
            for s in range(count - 1, -1, -1):
                total = sizes_K[s]
                for other in range(s + 1, count):
                    total -= factor_KK[other, s] * sizes_K[other]
                sizes_K[s] = total / factor_KK[s, s]
                values_K[s] = np.float32(sizes_K[s])


@njit(fastmath=_FAST, inline="always")
def _gains(p, new_M, least, gain_M):  # type: ignore[no-untyped-def]
    """gain = p² / new: what the error falls by if the atom joins the picks."""
    for i in range(p.shape[0]):
        gain_M[i] = p[i] * p[i] / max(new_M[i], least)


@njit(fastmath=_FAST, inline="always")
def _subtract_squares(new_M, along_M):  # type: ignore[no-untyped-def]
    for i in range(new_M.shape[0]):
        new_M[i] -= along_M[i] * along_M[i]


@njit(fastmath=_FAST, inline="always")
def _orthonormalise(along_KM, count, w_K, gram_row_M, scale, p, a):  # type: ignore[no-untyped-def]
    """along[count] = (gram_row − Σ_s w_s·along[s])·scale and p −= a·along[count], in column blocks."""
    for start in range(0, p.shape[0], _COLUMNS):
        mine, source = along_KM[count, start : start + _COLUMNS], gram_row_M[start : start + _COLUMNS]
        for i in range(mine.shape[0]):
            mine[i] = source[i]
        s = 0
        # Four at a time: fewer passes over ``mine``.
        while s + 4 <= count:
            first, second = along_KM[s, start : start + _COLUMNS], along_KM[s + 1, start : start + _COLUMNS]
            third, fourth = along_KM[s + 2, start : start + _COLUMNS], along_KM[s + 3, start : start + _COLUMNS]
            w0, w1, w2, w3 = w_K[s], w_K[s + 1], w_K[s + 2], w_K[s + 3]
            for i in range(mine.shape[0]):
                mine[i] -= w0 * first[i] + w1 * second[i] + w2 * third[i] + w3 * fourth[i]
            s += 4
        while s < count:
            _subtract(mine, w_K[s], along_KM[s, start : start + _COLUMNS])
            s += 1
        mine_p = p[start : start + _COLUMNS]
        for i in range(mine.shape[0]):
            mine[i] *= scale
            mine_p[i] -= a * mine[i]


@compiled(parallel=True)
def _pursue_orthogonally_nonnegative(  # type: ignore[no-untyped-def]
    products_CM, energy_C, floor_C, gram_MM, k, rtol2, dependent, values_CK, support_CK
):
    n_rows, n_atoms = products_CM.shape
    for group in prange((n_rows + ROWS - 1) // ROWS):
        gram_KK, factor_KK = np.empty((k, k), np.float64), np.empty((k, k), np.float64)
        target_K, z_K, solved_K = np.empty(k, np.float64), np.empty(k, np.float64), np.empty(k, np.float64)
        chosen_K, atoms_K = np.empty(k, np.int64), np.empty(k, np.int64)
        p = np.empty(n_atoms, np.float32)
        bits = p.view(np.int32)
        for row in range(group * ROWS, min((group + 1) * ROWS, n_rows)):
            p0 = products_CM[row]
            p[:] = p0
            n, energy = 0, float(energy_C[row])
            left = energy
            # An atom that leaves makes room again: bounded, since the error falls with every pick.
            for _ in range(3 * k):
                if n == k or left <= rtol2 * energy or left <= 0.0:
                    break
                atom = _largest(bits, _ALL_BITS)
                if p[atom] <= floor_C[row]:
                    break
                atoms_K[n], target_K[n], z_K[n], chosen_K[n] = atom, p0[atom], 0.0, n
                for i in range(n + 1):
                    gram_KK[n, i] = gram_KK[i, n] = gram_MM[atom, atoms_K[i]]
                _, pivot = settle(gram_KK, target_K, z_K, chosen_K, n + 1, factor_KK, solved_K)
                if pivot <= dependent * dependent:
                    z_K[n] = 0.0
                    if n:
                        for i in range(n):
                            chosen_K[i] = i
                        settle(gram_KK, target_K, z_K, chosen_K, n, factor_KK, solved_K)
                    break
                # Close the gaps that atoms left behind.
                new = 0
                for i in range(n + 1):
                    if z_K[i] > 0.0:
                        atoms_K[new], target_K[new], z_K[new] = atoms_K[i], target_K[i], z_K[i]
                        new += 1
                n = new
                left = energy
                for i in range(n):
                    for j in range(n):
                        gram_KK[i, j] = gram_MM[atoms_K[i], atoms_K[j]]
                    chosen_K[i] = i
                    left -= target_K[i] * z_K[i]
                p[:] = p0
                for i in range(n):
                    _subtract(p, np.float32(z_K[i]), gram_MM[atoms_K[i]])
                for i in range(n):
                    p[atoms_K[i]] = np.float32(0.0)
            for i in range(n):
                support_CK[row, i], values_CK[row, i] = atoms_K[i], np.float32(z_K[i])


def pursue(
    products_CM: Tensor,
    energy_C: Tensor,
    floor_C: Tensor,
    gram_MM: Tensor,
    k: int,
    max_steps: int,
    rtol: float,
    nonnegative: bool,
    values_CK: Tensor,
    support_CK: Tensor,
    left_CK: Tensor,
) -> None:
    """Matching pursuit from the products of a chunk, which it overwrites, into the last three arguments (zeroed).

    All float32 (support int32), contiguous, on the CPU. Same picks as the torch version up to ties of rounding; stops
    like it, once none above floor_C is left. left_CK: products of the final residual with the atoms of the support.
    """
    use_torch_threads()
    mask = _ALL_BITS if nonnegative else _MAGNITUDE
    products, values, support, left = products_CM.numpy(), values_CK.numpy(), support_CK.numpy(), left_CK.numpy()
    bits, gram, energy, floor = products.view(np.int32), gram_MM.numpy(), energy_C.numpy(), floor_C.numpy()
    _pursue(products, bits, energy, floor, gram, k, max_steps, np.float32(rtol**2), mask, values, support, left)


def pursue_orthogonally(
    products_CM: Tensor,
    energy_C: Tensor,
    floor_C: Tensor,
    gram_MM: Tensor,
    k: int,
    rtol: float,
    nonnegative: bool,
    by_error: bool,
    values_CK: Tensor,
    support_CK: Tensor,
) -> None:
    """Orthogonal matching pursuit from the products of a chunk, which it may overwrite; arguments as ``pursue``.

    by_error: pick what lowers the error of the refitted code the most (order-recursive matching pursuit).
    """
    use_torch_threads()
    eps = float(np.finfo(np.float32).eps)
    products, energy, floor, gram = products_CM.numpy(), energy_C.numpy(), floor_C.numpy(), gram_MM.numpy()
    values, support, dependent = values_CK.numpy(), support_CK.numpy(), limits.dependent(eps)
    rtol2 = np.float32(max(rtol**2, eps**2))
    if nonnegative:
        _pursue_orthogonally_nonnegative(products, energy, floor, gram, k, rtol2, dependent, values, support)
    else:
        diagonal, bits, least = np.diagonal(gram).copy(), products.view(np.int32), np.float32(limits.least_new(eps))
        _pursue_orthogonally(
            products, bits, energy, floor, gram, diagonal, k, rtol2, dependent, by_error, least, values, support
        )
