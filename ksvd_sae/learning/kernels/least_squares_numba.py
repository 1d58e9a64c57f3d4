"""Least squares on the few atoms of a code, for the CPU, one thread a sample; signed or non-negative.

Works on k × k Gram matrices in float64: K = k slots of a sample, ``target`` the sample's products with their atoms.
"""

import numba
import numpy as np
import torch
from numba import prange
from torch import Tensor

from ksvd_sae.learning.kernels.compiled import compiled, forked

# Rows that share one set of work arrays.
ROWS = 16


def use_torch_threads() -> None:
    """numba's threads as torch's, and torch's as they were."""
    if forked():
        return
    n_threads = torch.get_num_threads()
    numba.set_num_threads(min(n_threads, numba.config.NUMBA_NUM_THREADS))
    # Both use OpenMP, and the first call makes numba start it with all cores, for torch too.
    if torch.get_num_threads() != n_threads:
        torch.set_num_threads(n_threads)


@compiled()
def _cholesky(gram_KK, factor_KK, chosen_K, n):  # type: ignore[no-untyped-def]
    """Lower factor of the Gram matrix of the first n chosen slots; returns the smallest squared pivot."""
    smallest = 1.0
    for i in range(n):
        for j in range(i + 1):
            total = gram_KK[chosen_K[i], chosen_K[j]]
            for left in range(j):
                total -= factor_KK[i, left] * factor_KK[j, left]
            if i == j:
                smallest = min(smallest, total)
                factor_KK[i, i] = np.sqrt(max(total, 1e-30))
            else:
                factor_KK[i, j] = total / factor_KK[j, j]
    return smallest


@compiled()
def _solve(factor_KK, target_K, chosen_K, n, out_K):  # type: ignore[no-untyped-def]
    for i in range(n):
        total = target_K[chosen_K[i]]
        for j in range(i):
            total -= factor_KK[i, j] * out_K[j]
        out_K[i] = total / factor_KK[i, i]
    for i in range(n - 1, -1, -1):
        total = out_K[i]
        for j in range(i + 1, n):
            total -= factor_KK[j, i] * out_K[j]
        out_K[i] = total / factor_KK[i, i]


@compiled()
def settle(gram_KK, target_K, z_K, chosen_K, n, factor_KK, solved_K):  # type: ignore[no-untyped-def]
    """Inner loop of Lawson & Hanson: least squares on the chosen slots, those that turn negative leave one by one.

    z_K holds nonnegative coefficients by slot; returns how many slots stay (first in chosen_K) and the smallest pivot.
    """
    while True:
        smallest = _cholesky(gram_KK, factor_KK, chosen_K, n)
        _solve(factor_KK, target_K, chosen_K, n, solved_K)
        step = 1.0
        for i in range(n):
            if solved_K[i] <= 0.0:
                old = z_K[chosen_K[i]]
                step = min(step, old / (old - solved_K[i]) if old > solved_K[i] else 0.0)
        if step >= 1.0:
            for i in range(n):
                z_K[chosen_K[i]] = solved_K[i]
            return n, smallest
        kept = 0
        for i in range(n):
            slot = chosen_K[i]
            z_K[slot] += step * (solved_K[i] - z_K[slot])
            if solved_K[i] <= 0.0 and z_K[slot] <= 1e-12:
                z_K[slot] = 0.0
            else:
                chosen_K[kept] = slot
                kept += 1
        if kept == n:  # rounding kept the one that should leave
            worst = 0
            for i in range(1, n):
                if solved_K[i] < solved_K[worst]:
                    worst = i
            z_K[chosen_K[worst]] = 0.0
            for i in range(worst, n - 1):
                chosen_K[i] = chosen_K[i + 1]
            kept = n - 1
        n = kept
        if n == 0:
            return 0, smallest


@compiled(parallel=True)
def _refit(gram_MM, nonnegative, values_CK, support_CK, left_CK, pivots_C):  # type: ignore[no-untyped-def]
    k = values_CK.shape[1]
    for group in prange((values_CK.shape[0] + ROWS - 1) // ROWS):
        gram_KK, factor_KK = np.empty((k, k), np.float64), np.empty((k, k), np.float64)
        target_K, z_K, solved_K = np.empty(k, np.float64), np.empty(k, np.float64), np.empty(k, np.float64)
        used_K, chosen_K = np.empty(k, np.int64), np.empty(k, np.int64)
        for row in range(group * ROWS, min((group + 1) * ROWS, values_CK.shape[0])):
            n = 0
            for slot in range(k):
                if values_CK[row, slot] != 0:
                    used_K[n] = slot
                    n += 1
            for i in range(n):
                gram_row_M = gram_MM[support_CK[row, used_K[i]]]
                target_K[i] = left_CK[row, used_K[i]]
                for j in range(n):
                    gram_KK[i, j] = gram_row_M[support_CK[row, used_K[j]]]
                    target_K[i] += gram_KK[i, j] * values_CK[row, used_K[j]]
                chosen_K[i] = i
            if nonnegative:
                pivots_C[row] = _least_squares_nonnegative(gram_KK, target_K, z_K, chosen_K, n, factor_KK, solved_K)
            else:
                pivots_C[row] = _cholesky(gram_KK, factor_KK, chosen_K, n)
                _solve(factor_KK, target_K, chosen_K, n, z_K)
            for i in range(n):
                values_CK[row, used_K[i]] = np.float32(z_K[i])


@compiled()
def _least_squares_nonnegative(gram_KK, target_K, z_K, chosen_K, n, factor_KK, solved_K):  # type: ignore[no-untyped-def]
    """Lawson & Hanson 1974 on an n × n Gram matrix, into z_K; returns the smallest squared pivot met."""
    for i in range(n):
        z_K[i] = 0.0
    passive, smallest = 0, 1.0
    for _ in range(3 * n):
        best, entering = 1e-12 * np.abs(target_K[:n]).max(), -1
        for i in range(n):
            gradient = target_K[i]
            for j in range(n):
                gradient -= gram_KK[i, j] * z_K[j]
            if z_K[i] == 0.0 and gradient > best:
                best, entering = gradient, i
        if entering < 0:
            break
        chosen_K[passive] = entering
        passive, pivot = settle(gram_KK, target_K, z_K, chosen_K, passive + 1, factor_KK, solved_K)
        smallest = min(smallest, pivot)
    return smallest


def refit(gram_MM: Tensor, nonnegative: bool, values_CK: Tensor, support_CK: Tensor, left_CK: Tensor) -> Tensor:
    """Least squares on the support, in place in values_CK, from what ``pursue`` left.

    Returns: (C,) float64, smallest squared pivot of each support: where it is tiny, atoms depend on each other and the
        coefficients mean little.
    """
    use_torch_threads()
    pivots_C = torch.ones(len(values_CK), dtype=torch.float64, device="cpu")
    _refit(gram_MM.numpy(), nonnegative, values_CK.numpy(), support_CK.numpy(), left_CK.numpy(), pivots_C.numpy())
    return pivots_C
