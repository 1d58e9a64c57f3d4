"""The choice of ``sparse_choice_numba`` from products in bfloat16, exact: every latent that could be chosen by its
float32 rank gets that rank.

A processor with matrix tiles (AMX) multiplies bfloat16 ten times as fast as float32. Rounding two factors to 8 bits
moves a product by at most 2⁻⁸ of its size, a sum of products by no more than 2⁻⁸·‖x‖·‖w‖ (Cauchy and Schwarz). So
each rank lies between a lower and an upper bound. The k-th largest lower bound is no larger than the k-th largest
rank: a latent whose upper bound is below it is not chosen. The others, about 2·k of a sample, are computed in float32.

Notation: as in ``sparse_choice_numba``; D dimensions. ``x16_BM``: the products' bits.
"""

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from ksvd_sae.learning.kernels.compiled import compiled
from ksvd_sae.learning.kernels.least_squares_numba import use_torch_threads
from ksvd_sae.methods.sae.sparse_choice_numba import (
    BLOCK,
    LEAST,
    ROWS,
    SAMPLE_MARGIN,
    SAMPLE_STRIDE,
    Chosen,
    close_gaps,
    keep,
    maximum,
    nth_largest,
    starts,
)
from ksvd_sae.methods.sae.sparse_steps_numba import dot, products

_FAST = {"reassoc", "nsz", "contract"}
_Array = np.ndarray[Any, Any]
# Rounding of the product itself to bfloat16 (2⁻⁹), of the sums of bounds, and of what is at most 2⁻⁸ smaller.
_OUTPUT = np.float32(1.02 * 2.0**-9)


def bfloat16_pays(device: torch.device) -> bool:
    """Whether products in bfloat16 are much faster than in float32: a CPU with tiles."""
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())


@compiled(fastmath=_FAST)
def _bounds(bits16_M, offset_M, error_M, size, bits_M, floats_M, lower_M, upper_M):  # type: ignore[no-untyped-def]
    """Between which each rank lies, none below 0; floats_M is a view of bits_M."""
    zero = np.float32(0.0)
    for m in range(bits_M.shape[0]):
        bits_M[m] = np.int32(bits16_M[m]) << np.int32(16)
    for m in range(bits_M.shape[0]):
        product = floats_M[m]
        # A thousandth of the offset: float32 rounding of the sum, with room.
        off = size * error_M[m] + _OUTPUT * (abs(product) + np.float32(1e-3) * abs(offset_M[m]))
        rank = product + offset_M[m]
        low, high = rank - off, rank + off
        lower_M[m] = low if low > zero else zero
        upper_M[m] = high if high > zero else zero


@njit(inline="always")
def _collect_upper(upper_M, lower_M, bound, columns, uppers, lowers):  # type: ignore[no-untyped-def]
    """As ``sparse_choice_numba`` collects, by upper bounds, with the lower ones."""
    n, whole = 0, upper_M.shape[0] // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        block = upper_M[start : start + BLOCK]
        if maximum(block) >= bound:
            for i in range(BLOCK):
                columns[n], uppers[n], lowers[n] = start + i, block[i], lower_M[start + i]
                n += block[i] >= bound
    for m in range(whole, upper_M.shape[0]):
        columns[n], uppers[n], lowers[n] = m, upper_M[m], lower_M[m]
        n += upper_M[m] >= bound
    return n


@compiled(parallel=True)
def _choose_by_row(bits16_BM, x_BD, folded_MD, offset_M, error_M, k, columns_BK, bits_BK, counts_B):  # type: ignore[no-untyped-def]
    n_rows, m = bits16_BM.shape
    n_blocks = m // BLOCK
    for group in prange((n_rows + ROWS - 1) // ROWS):
        bits_M, lower_M, upper_M = np.empty(m, np.int32), np.empty(m, np.float32), np.empty(m, np.float32)
        floats_M, lower_bits, upper_bits = bits_M.view(np.float32), lower_M.view(np.int32), upper_M.view(np.int32)
        maxima, columns = np.empty(n_blocks, np.int32), np.empty(m + 1, np.int32)
        uppers, lowers, ranks = np.empty(m + 1, np.int32), np.empty(m + 1, np.int32), np.empty(m + 1, np.float32)
        candidates, scratch = ranks.view(np.int32), np.empty(m + 1, np.int32)
        for row in range(group * ROWS, min((group + 1) * ROWS, n_rows)):
            x_D, bound = x_BD[row], LEAST
            _bounds(bits16_BM[row], offset_M, error_M, np.sqrt(dot(x_D, x_D)), bits_M, floats_M, lower_M, upper_M)
            if n_blocks >= 2 * k:
                for block in range(n_blocks):
                    maxima[block] = maximum(lower_bits[block * BLOCK : (block + 1) * BLOCK])
                bound = max(bound, nth_largest(maxima, k))
            n = _collect_upper(upper_bits, lower_bits, bound, columns, uppers, lowers)
            if n > k:
                bound = max(bound, nth_largest(lowers[:n], k))
                left = 0
                for i in range(n):
                    columns[left] = columns[i]
                    left += uppers[i] >= bound
                n = left
            products(x_D, columns, 0, n, folded_MD, ranks)
            for i in range(n):
                ranks[i] += offset_M[columns[i]]
            last, ties = LEAST, n
            if n > k:
                scratch[:n] = candidates[:n]
                last, ties = max(LEAST, nth_largest(scratch[:n], k)), k
                for i in range(n):
                    ties -= candidates[i] > last
            kept = 0
            for i in range(n):
                if candidates[i] > last or (candidates[i] == last and ties > 0):
                    ties -= candidates[i] == last
                    columns_BK[row, kept], bits_BK[row, kept] = columns[i], candidates[i]
                    kept += 1
            counts_B[row] = kept


@compiled(parallel=True)
def _count(bits16_BM, x_BD, offset_M, error_M, bound, certain_B, possible_B):  # type: ignore[no-untyped-def]
    """How many of each row's ranks are certainly at least bound; how many possibly."""
    n_rows, m = bits16_BM.shape
    for group in prange((n_rows + ROWS - 1) // ROWS):
        bits_M, lower_M, upper_M = np.empty(m, np.int32), np.empty(m, np.float32), np.empty(m, np.float32)
        floats_M, lower_bits, upper_bits = bits_M.view(np.float32), lower_M.view(np.int32), upper_M.view(np.int32)
        for row in range(group * ROWS, min((group + 1) * ROWS, n_rows)):
            size = np.sqrt(dot(x_BD[row], x_BD[row]))
            _bounds(bits16_BM[row], offset_M, error_M, size, bits_M, floats_M, lower_M, upper_M)
            certain, possible = np.int32(0), np.int32(0)
            for i in range(m):
                certain += np.int32(lower_bits[i] >= bound)
                possible += np.int32(upper_bits[i] >= bound)
            certain_B[row], possible_B[row] = certain, possible


@compiled(parallel=True)
def _collect_all(bits16_BM, x_BD, offset_M, error_M, bound, starts_B, columns_Z, uppers_Z, lowers_Z):  # type: ignore[no-untyped-def]
    n_rows, m = bits16_BM.shape
    for group in prange((n_rows + ROWS - 1) // ROWS):
        bits_M, lower_M, upper_M = np.empty(m, np.int32), np.empty(m, np.float32), np.empty(m, np.float32)
        floats_M, lower_bits, upper_bits = bits_M.view(np.float32), lower_M.view(np.int32), upper_M.view(np.int32)
        columns, uppers, lowers = np.empty(m + 1, np.int32), np.empty(m + 1, np.int32), np.empty(m + 1, np.int32)
        for row in range(group * ROWS, min((group + 1) * ROWS, n_rows)):
            size = np.sqrt(dot(x_BD[row], x_BD[row]))
            _bounds(bits16_BM[row], offset_M, error_M, size, bits_M, floats_M, lower_M, upper_M)
            n, start = _collect_upper(upper_bits, lower_bits, bound, columns, uppers, lowers), starts_B[row]
            columns_Z[start : start + n], uppers_Z[start : start + n] = columns[:n], uppers[:n]
            lowers_Z[start : start + n] = lowers[:n]


@compiled(parallel=True)
def _rank(x_BD, folded_MD, offset_M, starts_B, columns_Z, ranks_Z):  # type: ignore[no-untyped-def]
    zero = np.float32(0.0)
    for row in prange(len(x_BD)):
        products(x_BD[row], columns_Z, starts_B[row], starts_B[row + 1], folded_MD, ranks_Z)
        for z in range(starts_B[row], starts_B[row + 1]):
            ranks_Z[z] = max(zero, ranks_Z[z] + offset_M[columns_Z[z]])


class Products:
    """The products of a batch with the folded encoder in bfloat16, and what bounds their error."""

    def __init__(self, x_BD: Tensor, folded_MD: Tensor, offset_M: _Array, bits16_BM: Tensor):
        """bits16_BM: bfloat16, room for the products."""
        torch.mm(x_BD.bfloat16(), folded_MD.bfloat16().T, out=bits16_BM)
        self._bits16_BM = bits16_BM.view(torch.int16).numpy()
        self._x_BD, self._folded_MD, self._offset_M = x_BD.numpy(), folded_MD.numpy(), offset_M
        # Both factors' rounding, 2·2⁻⁹; sums of D products in float32, in any order, rounded or cut off, D·2⁻²³ twice.
        error = 1.01 * 2.0**-8 + 2 * x_BD.shape[1] * 2.0**-23
        self._error_M = (folded_MD.norm(dim=1) * error).numpy()

    def largest_by_row(self, k: int) -> Chosen:
        """Each row's k largest ranks that are above 0."""
        use_torch_threads()
        n_rows = len(self._x_BD)
        columns_BK, bits_BK = np.empty((n_rows, k), np.int32), np.empty((n_rows, k), np.int32)
        counts_B = np.empty(n_rows, np.int32)
        _choose_by_row(
            self._bits16_BM,
            self._x_BD,
            self._folded_MD,
            self._offset_M,
            self._error_M,
            k,
            columns_BK,
            bits_BK,
            counts_B,
        )
        starts_B = starts(counts_B)
        columns_Z, bits_Z = np.empty(starts_B[-1], np.int32), np.empty(starts_B[-1], np.int32)
        close_gaps(counts_B, columns_BK, bits_BK, columns_Z, bits_Z)
        return starts_B, columns_Z, bits_Z.view(np.float32)

    def largest_of_all(self, n: int) -> Chosen:
        """The n largest ranks that are above 0."""
        use_torch_threads()
        bounds = (self._bits16_BM, self._x_BD, self._offset_M, self._error_M)
        bound, possible_B = self._sampled(n), np.empty(len(self._x_BD), np.int32)
        certain_B = np.empty_like(possible_B)
        _count(*bounds, bound, certain_B, possible_B)
        if certain_B.sum() < n and bound > LEAST:
            bound = LEAST
            _count(*bounds, bound, certain_B, possible_B)
        starts_B = starts(possible_B)
        columns_Z, uppers_Z, lowers_Z = (np.empty(starts_B[-1], np.int32) for _ in range(3))
        _collect_all(*bounds, bound, starts_B, columns_Z, uppers_Z, lowers_Z)
        if len(lowers_Z) > n:
            bound = max(bound, np.int32(nth_largest(lowers_Z, n)))
            left = int((uppers_Z >= bound).sum())
            keep(starts_B, columns_Z, uppers_Z, bound, left)
            columns_Z = columns_Z[:left]
        ranks_Z = np.empty(len(columns_Z), np.float32)
        _rank(self._x_BD, self._folded_MD, self._offset_M, starts_B, columns_Z, ranks_Z)
        bits_Z = ranks_Z.view(np.int32)
        n = min(n, int((bits_Z >= LEAST).sum()))
        if 0 < n < len(bits_Z):
            keep(starts_B, columns_Z, bits_Z, nth_largest(bits_Z.copy(), n), n)
        elif n == 0:
            starts_B[:] = 0
        return starts_B, columns_Z[:n], ranks_Z[:n]

    def _sampled(self, n: int) -> Any:
        """What more than n ranks are above, going by a sample of them."""
        index_S = np.arange(0, self._bits16_BM.size, SAMPLE_STRIDE)
        bits_S = self._bits16_BM.reshape(-1)[index_S].astype(np.int32) << 16
        ranks_S = bits_S.view(np.float32) + self._offset_M[index_S % len(self._offset_M)]
        nth = min(len(ranks_S), 1 + int(SAMPLE_MARGIN * n / SAMPLE_STRIDE))
        return max(LEAST, np.int32(nth_largest(ranks_S.view(np.int32), nth)))
