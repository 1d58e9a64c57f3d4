"""The choice of latents on the CPU: each sample's k largest of a matrix of ranks, or the k·B largest of all.

Only ranks above 0 are ever chosen: ReLU makes the others 0 and stops their gradients. Positive floats order as the
integers of the same bits, so ranks are compared as int32, which the compiler vectorises (as it does no comparison of
floats). Most of the matrix is read once, in blocks, and passed over by their maxima.

Notation: B samples, M latents, Z = chosen (sample, latent) pairs, sample by sample, latents ascending. Sample b's pairs
are starts_B[b] to starts_B[b + 1]: ``starts_B`` has B + 1 entries.
"""

from typing import Any

import numpy as np
from numba import njit, prange
from torch import Tensor

from ksvd_sae.learning.kernels.compiled import compiled
from ksvd_sae.learning.kernels.least_squares_numba import use_torch_threads

BLOCK = 16
# Rows that share one set of work arrays.
ROWS = 32
# A prime: no latent is in the sample of ranks more often than others.
SAMPLE_STRIDE, SAMPLE_MARGIN = 127, 1.3
LEAST = np.int32(1)

# starts_B (int64), columns_Z (int32), ranks_Z (float32).
Chosen = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]


@njit(inline="always")
def maximum(block):  # type: ignore[no-untyped-def]
    largest = np.int32(-2147483648)
    for i in range(BLOCK):
        largest = max(largest, block[i])
    return largest


@compiled()
def nth_largest(bits_N, n):  # type: ignore[no-untyped-def]
    """The n-th largest (from 1), by Hoare's selection with medians of three; reorders its argument."""
    low, high, wanted = 0, len(bits_N) - 1, n - 1
    while low < high:
        a, b, c = bits_N[low], bits_N[(low + high) // 2], bits_N[high]
        pivot = max(min(a, b), min(max(a, b), c))
        i, j = low, high
        while i <= j:
            while bits_N[i] > pivot:
                i += 1
            while bits_N[j] < pivot:
                j -= 1
            if i <= j:
                bits_N[i], bits_N[j] = bits_N[j], bits_N[i]
                i += 1
                j -= 1
        if wanted <= j:
            high = j
        elif wanted >= i:
            low = i
        else:
            break
    return bits_N[wanted]


@njit(inline="always")
def _collect(bits_M, bound, columns, candidates):  # type: ignore[no-untyped-def]
    """Columns and bits of the entries from bound on; returns how many. Both arrays have room for M + 1."""
    n, whole = 0, bits_M.shape[0] // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        block = bits_M[start : start + BLOCK]
        if maximum(block) >= bound:
            for i in range(BLOCK):
                columns[n], candidates[n] = start + i, block[i]
                n += block[i] >= bound
    for m in range(whole, bits_M.shape[0]):
        columns[n], candidates[n] = m, bits_M[m]
        n += bits_M[m] >= bound
    return n


@compiled(parallel=True)
def _choose_by_row(bits_BM, k, columns_BK, bits_BK, counts_B):  # type: ignore[no-untyped-def]
    n_rows, m = bits_BM.shape
    n_blocks = m // BLOCK
    for group in prange((n_rows + ROWS - 1) // ROWS):
        maxima, columns = np.empty(n_blocks, np.int32), np.empty(m + 1, np.int32)
        candidates, scratch = np.empty(m + 1, np.int32), np.empty(m + 1, np.int32)
        for row in range(group * ROWS, min((group + 1) * ROWS, n_rows)):
            bits_M, bound = bits_BM[row], LEAST
            # k blocks have a maximum that is no smaller than the k-th largest maximum.
            if n_blocks >= 2 * k:
                for block in range(n_blocks):
                    maxima[block] = maximum(bits_M[block * BLOCK : (block + 1) * BLOCK])
                bound = max(bound, nth_largest(maxima, k))
            n = _collect(bits_M, bound, columns, candidates)
            last, ties = bound, n
            if n > k:
                scratch[:n] = candidates[:n]
                last, ties = nth_largest(scratch[:n], k), k
                for i in range(n):
                    ties -= candidates[i] > last
            kept = 0
            for i in range(n):
                if candidates[i] > last or (candidates[i] == last and ties > 0):
                    ties -= candidates[i] == last
                    columns_BK[row, kept], bits_BK[row, kept] = columns[i], candidates[i]
                    kept += 1
            counts_B[row] = kept


@compiled()
def close_gaps(counts_B, columns_BK, bits_BK, columns_Z, bits_Z):  # type: ignore[no-untyped-def]
    z = 0
    for row in range(len(counts_B)):
        for i in range(counts_B[row]):
            columns_Z[z], bits_Z[z] = columns_BK[row, i], bits_BK[row, i]
            z += 1


@compiled(parallel=True)
def _count(bits_BM, bound, counts_B):  # type: ignore[no-untyped-def]
    for row in prange(bits_BM.shape[0]):
        n, bits_M = np.int32(0), bits_BM[row]
        for m in range(bits_M.shape[0]):
            n += np.int32(bits_M[m] >= bound)
        counts_B[row] = n


@compiled(parallel=True)
def _collect_all(bits_BM, bound, starts_B, columns_Z, bits_Z):  # type: ignore[no-untyped-def]
    n_rows, m = bits_BM.shape
    for group in prange((n_rows + ROWS - 1) // ROWS):
        columns, chosen = np.empty(m + 1, np.int32), np.empty(m + 1, np.int32)
        for row in range(group * ROWS, min((group + 1) * ROWS, n_rows)):
            n, start = _collect(bits_BM[row], bound, columns, chosen), starts_B[row]
            columns_Z[start : start + n], bits_Z[start : start + n] = columns[:n], chosen[:n]


@compiled()
def keep(starts_B, columns_Z, bits_Z, last, n):  # type: ignore[no-untyped-def]
    """Leave only n pairs, in place: those above last and the first of those that equal it."""
    ties, kept = n, 0
    for z in range(len(bits_Z)):
        ties -= bits_Z[z] > last
    for row in range(len(starts_B) - 1):
        start, end = starts_B[row], starts_B[row + 1]
        starts_B[row] = kept
        for z in range(start, end):
            if bits_Z[z] > last or (bits_Z[z] == last and ties > 0):
                ties -= bits_Z[z] == last
                columns_Z[kept], bits_Z[kept] = columns_Z[z], bits_Z[z]
                kept += 1
    starts_B[len(starts_B) - 1] = kept


def starts(counts_B: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    starts_B = np.zeros(len(counts_B) + 1, np.int64)
    np.cumsum(counts_B, out=starts_B[1:])
    return starts_B


def largest_by_row(ranks_BM: Tensor, k: int) -> Chosen:
    """Each row's k largest that are above 0; of ties, those of the lowest columns.

    Args: ranks_BM: float32, contiguous, on the CPU.  Cost: O(B·M) time.
    """
    use_torch_threads()
    n_rows, bits_BM = len(ranks_BM), ranks_BM.numpy().view(np.int32)
    columns_BK, bits_BK = np.empty((n_rows, k), np.int32), np.empty((n_rows, k), np.int32)
    counts_B = np.empty(n_rows, np.int32)
    _choose_by_row(bits_BM, k, columns_BK, bits_BK, counts_B)
    starts_B = starts(counts_B)
    columns_Z, bits_Z = np.empty(starts_B[-1], np.int32), np.empty(starts_B[-1], np.int32)
    close_gaps(counts_B, columns_BK, bits_BK, columns_Z, bits_Z)
    return starts_B, columns_Z, bits_Z.view(np.float32)


def largest_of_all(ranks_BM: Tensor, n: int) -> Chosen:
    """The n largest of the matrix that are above 0; of ties, those that come first.

    A sample of the ranks gives a bound by which nearly all are passed over; where it lets too few through, all count.

    Args: ranks_BM: float32, contiguous, on the CPU.  Cost: O(B·M) time.
    """
    use_torch_threads()
    bits_BM = ranks_BM.numpy().view(np.int32)
    sample_S = bits_BM.reshape(-1)[::SAMPLE_STRIDE].copy()
    nth = min(len(sample_S), 1 + int(SAMPLE_MARGIN * n / SAMPLE_STRIDE))
    bound = max(LEAST, np.int32(nth_largest(sample_S, nth)))
    counts_B = np.empty(len(ranks_BM), np.int32)
    _count(bits_BM, bound, counts_B)
    if counts_B.sum() < n and bound > LEAST:
        bound = LEAST
        _count(bits_BM, bound, counts_B)
    starts_B = starts(counts_B)
    columns_Z, bits_Z = np.empty(starts_B[-1], np.int32), np.empty(starts_B[-1], np.int32)
    _collect_all(bits_BM, bound, starts_B, columns_Z, bits_Z)
    if len(bits_Z) > n:
        keep(starts_B, columns_Z, bits_Z, nth_largest(bits_Z.copy(), n), n)
    return starts_B, columns_Z[:n], bits_Z[:n].view(np.float32)
