"""Matching pursuit for the CPU: one thread a sample, its row of products in cache for all its steps.

The torch version reads and writes chunk × M products several times a step and spends most of its time in
argmax. Here a step is one pass over the sample's M products that subtracts the Gram row and finds the
next maximum together, in blocks so that both vectorise.
"""

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

_BLOCK = 128


# reassoc, no NaNs or infinities: lets the maximum vectorise. Callers have checked that the input is finite.
@njit(fastmath={"reassoc", "nnan", "ninf", "nsz", "contract"}, inline="always")
def _step(products_M, gram_row_M, a):  # type: ignore[no-untyped-def]
    """products −= a·gram_row; returns the lowest index of the largest |product|."""
    n = products_M.shape[0]
    best, best_block = np.float32(-1.0), 0
    for start in range(0, n, _BLOCK):
        largest = np.float32(0.0)
        for i in range(start, min(start + _BLOCK, n)):
            value = products_M[i] - a * gram_row_M[i]
            products_M[i] = value
            largest = max(largest, abs(value))
        if largest > best:
            best, best_block = largest, start
    for i in range(best_block, min(best_block + _BLOCK, n)):
        if abs(products_M[i]) == best:
            return i
    return best_block


@njit(parallel=True, cache=True, boundscheck=False, error_model="numpy")
def _pursue(products_CM, energy_C, gram_MM, k, max_steps, rtol_squared, values_CK, support_CK):  # type: ignore[no-untyped-def]
    zero = np.float32(0.0)
    for row in prange(products_CM.shape[0]):
        products_M, values_K, support_K = products_CM[row], values_CK[row], support_CK[row]
        left = energy_C[row]
        enough = rtol_squared * left
        count = 0
        atom = _step(products_M, gram_MM[0], zero)
        for _ in range(max_steps):
            a = products_M[atom]
            if a == zero or left <= enough or left <= zero:
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
            atom = _step(products_M, gram_MM[atom], a)


def pursue(
    products_CM: Tensor,
    energy_C: Tensor,
    gram_MM: Tensor,
    k: int,
    max_steps: int,
    rtol: float,
    values_CK: Tensor,
    support_CK: Tensor,
) -> None:
    """Matching pursuit from the products of a chunk, which it overwrites, into the last two arguments (zeroed).

    All float32 (support int32), contiguous, on the CPU. Same picks as the torch version up to ties of
    rounding; stops like it.
    """
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    _pursue(
        products_CM.numpy(),
        energy_C.numpy(),
        gram_MM.numpy(),
        k,
        max_steps,
        np.float32(rtol**2),
        values_CK.numpy(),
        support_CK.numpy(),
    )
