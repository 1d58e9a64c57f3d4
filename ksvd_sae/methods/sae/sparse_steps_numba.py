"""All of a sparse training step on the CPU but the choice of latents: losses and gradients of the chosen ones.

Nothing is added to by two threads: the gradients of weights are sums, latent by latent, over pairs sorted by latent.
Results do not depend on the number of threads.

Notation: B samples, M latents, D dimensions, G groups of latents (ends_G: where they end), Z = chosen (sample, latent)
pairs as ``sparse_choice_numba`` gives them. Weights of the encoder have latents as rows here, like the decoder's.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
from numba import prange

from ksvd_sae.learning.kernels.compiled import compiled
from ksvd_sae.learning.kernels.least_squares_numba import use_torch_threads

# A function's own: inlined by numba (not by LLVM) its sums would follow the caller's rules, one number at a time.
_FAST = {"reassoc", "nnan", "ninf", "nsz", "contract"}
_Array = np.ndarray[Any, Any]


@compiled(fastmath=_FAST)
def dot(a, b):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@compiled(fastmath=_FAST)
def _add(out, a, row):  # type: ignore[no-untyped-def]
    for i in range(out.shape[0]):
        out[i] += a * row[i]


@compiled(fastmath=_FAST)
def _add_rows(out, values_Z, rows_Z, first, end, matrix):  # type: ignore[no-untyped-def]
    """out += Σ_z values_z·matrix[rows_z]; four at a time: fewer passes over ``out``."""
    z = first
    while z + 4 <= end:
        r0, r1, r2, r3 = matrix[rows_Z[z]], matrix[rows_Z[z + 1]], matrix[rows_Z[z + 2]], matrix[rows_Z[z + 3]]
        a0, a1, a2, a3 = values_Z[z], values_Z[z + 1], values_Z[z + 2], values_Z[z + 3]
        for i in range(out.shape[0]):
            out[i] += a0 * r0[i] + a1 * r1[i] + a2 * r2[i] + a3 * r3[i]
        z += 4
    while z < end:
        _add(out, values_Z[z], matrix[rows_Z[z]])
        z += 1


@compiled(fastmath=_FAST)
def products(row, rows_Z, first, end, matrix, out_Z):  # type: ignore[no-untyped-def]
    """out_z = row·matrix[rows_z]; four at a time: fewer passes over ``row``, and no sum waits for another."""
    z = first
    while z + 4 <= end:
        r0, r1, r2, r3 = matrix[rows_Z[z]], matrix[rows_Z[z + 1]], matrix[rows_Z[z + 2]], matrix[rows_Z[z + 3]]
        t0 = t1 = t2 = t3 = np.float32(0.0)
        for i in range(row.shape[0]):
            t0 += row[i] * r0[i]
            t1 += row[i] * r1[i]
            t2 += row[i] * r2[i]
            t3 += row[i] * r3[i]
        out_Z[z], out_Z[z + 1], out_Z[z + 2], out_Z[z + 3] = t0, t1, t2, t3
        z += 4
    while z < end:
        out_Z[z] = dot(row, matrix[rows_Z[z]])
        z += 1


@compiled(parallel=True)
def _fold_norms(w_enc_MD, b_enc_M, w_dec_MD, b_dec_D, folded_MD, offset_M, norms_M):  # type: ignore[no-untyped-def]
    for m in prange(len(norms_M)):
        norm = np.sqrt(dot(w_dec_MD[m], w_dec_MD[m]))
        norms_M[m] = norm
        offset_M[m] = norm * (b_enc_M[m] - dot(w_enc_MD[m], b_dec_D))
        row, out = w_enc_MD[m], folded_MD[m]
        for i in range(row.shape[0]):
            out[i] = norm * row[i]


@compiled(parallel=True)
def _decode(  # type: ignore[no-untyped-def]
    x_BD, starts_B, columns_Z, values_Z, w_dec_MD, b_dec_D, ends_G, out_BD, gradients_GBD, by_value_Z, errors_GB
):
    n_rows, n_groups = len(x_BD), len(ends_G)
    scale = np.float32(2.0 / n_rows)
    for row in prange(n_rows):
        out, x, z, end = out_BD[row], x_BD[row], starts_B[row], starts_B[row + 1]
        out[:] = b_dec_D
        for g in range(n_groups):
            first = z
            while z < end and columns_Z[z] < ends_G[g]:
                z += 1
            _add_rows(out, values_Z, columns_Z, first, z, w_dec_MD)
            gradient = gradients_GBD[g, row]
            for i in range(out.shape[0]):
                gradient[i] = out[i] - x[i]
            errors_GB[g, row] = dot(gradient, gradient)
            for i in range(out.shape[0]):
                gradient[i] *= scale
        for g in range(n_groups - 1, -1, -1):
            gradient = gradients_GBD[g, row]
            # What a group adds is in all later prefixes too.
            if g + 1 < n_groups:
                _add(gradient, np.float32(1.0), gradients_GBD[g + 1, row])
            first, last = z, z
            while first > starts_B[row] and (g == 0 or columns_Z[first - 1] >= ends_G[g - 1]):
                first -= 1
            products(gradient, columns_Z, first, last, w_dec_MD, by_value_Z)
            z = first


@compiled()
def _sort_by_latent(starts_B, columns_Z, values_Z, by_value_Z, starts_M, rows_S, values_S, by_value_S):  # type: ignore[no-untyped-def]
    for z in range(len(columns_Z)):
        starts_M[columns_Z[z] + 1] += 1
    for m in range(1, len(starts_M)):
        starts_M[m] += starts_M[m - 1]
    next_M = starts_M[:-1].copy()
    for row in range(len(starts_B) - 1):
        for z in range(starts_B[row], starts_B[row + 1]):
            place = next_M[columns_Z[z]]
            next_M[columns_Z[z]] = place + 1
            rows_S[place], values_S[place], by_value_S[place] = row, values_Z[z], by_value_Z[z]


@compiled(parallel=True)
def _accumulate(  # type: ignore[no-untyped-def]
    x_BD, gradients_GBD, ends_G, b_dec_D, starts_M, rows_S, values_S, by_value_S, bounds_P, w_dec_MD, w_enc_MD, b_enc_M
):
    for part in prange(len(bounds_P) - 1):
        low, high, g = bounds_P[part], bounds_P[part + 1], 0
        # One gradient after the other: half as much to keep in cache.
        for m in range(low, high):
            while m >= ends_G[g]:
                g += 1
            w_dec_MD[m] = np.float32(0.0)
            _add_rows(w_dec_MD[m], values_S, rows_S, starts_M[m], starts_M[m + 1], gradients_GBD[g])
        for m in range(low, high):
            encoder, total = w_enc_MD[m], np.float32(0.0)
            for z in range(starts_M[m], starts_M[m + 1]):
                total += by_value_S[z]
            b_enc_M[m] = total
            # The encoder sees x − b_dec.
            for i in range(encoder.shape[0]):
                encoder[i] = -total * b_dec_D[i]
            _add_rows(encoder, by_value_S, rows_S, starts_M[m], starts_M[m + 1], x_BD)


class Gradients(NamedTuple):
    """Of Σ_g (mean squared error of prefix g), by parameter; w_enc_MD with latents as rows."""

    w_enc_MD: _Array
    b_enc_M: _Array
    w_dec_MD: _Array
    b_dec_D: _Array


def fold_norms(
    w_enc_MD: _Array, b_enc_M: _Array, w_dec_MD: _Array, b_dec_D: _Array, folded_MD: _Array
) -> tuple[_Array, _Array]:
    """What gives the ranks norm·((x − b_dec)·w_enc + b_enc) by one product: norm·w_enc, into folded, and an offset.

    Returns: offset_M; norms_M of the rows of w_dec.
    """
    use_torch_threads()
    offset_M, norms_M = np.empty_like(b_enc_M), np.empty_like(b_enc_M)
    _fold_norms(w_enc_MD, b_enc_M, w_dec_MD, b_dec_D, folded_MD, offset_M, norms_M)
    return offset_M, norms_M


def reconstruct(
    x_BD: _Array,
    starts_B: _Array,
    columns_Z: _Array,
    values_Z: _Array,
    w_enc_MD: _Array,
    w_dec_MD: _Array,
    b_dec_D: _Array,
    ends_G: _Array,
    gradients_GBD: _Array,
) -> tuple[_Array, _Array, Gradients]:
    """b_dec + values·w_dec by prefixes of the groups, their losses, and all gradients of the sum of these losses.

    All float32 and contiguous; values_Z above 0. gradients_GBD is room for what is between.

    Returns: out_BD, of all groups; losses_G: mean over samples of the squared error of each prefix; gradients.
    """
    use_torch_threads()
    (n_latents, _), n_pairs = w_dec_MD.shape, len(columns_Z)
    out_BD, by_value_Z = np.empty_like(x_BD), np.empty_like(values_Z)
    errors_GB = np.empty((len(ends_G), len(x_BD)), np.float32)
    _decode(
        x_BD, starts_B, columns_Z, values_Z, w_dec_MD, b_dec_D, ends_G, out_BD, gradients_GBD, by_value_Z, errors_GB
    )
    starts_M, rows_S = np.zeros(n_latents + 1, np.int64), np.empty(n_pairs, np.int32)
    values_S, by_value_S = np.empty_like(values_Z), np.empty_like(values_Z)
    _sort_by_latent(starts_B, columns_Z, values_Z, by_value_Z, starts_M, rows_S, values_S, by_value_S)
    # Latents are used unequally: every thread gets as many pairs, and rows to fill, as any other.
    work_M, n_parts = starts_M + np.arange(n_latents + 1), numba.get_num_threads()
    bounds_P = np.searchsorted(work_M, np.arange(n_parts + 1) * work_M[-1] // n_parts)
    w_dec, w_enc, b_enc = np.empty_like(w_dec_MD), np.empty_like(w_enc_MD), np.empty(n_latents, np.float32)
    _accumulate(
        x_BD, gradients_GBD, ends_G, b_dec_D, starts_M, rows_S, values_S, by_value_S, bounds_P, w_dec, w_enc, b_enc
    )
    # In every prefix; and taken from what the encoder sees.
    b_dec = gradients_GBD[0].sum(axis=0) - b_enc @ w_enc_MD
    return out_BD, errors_GB.mean(axis=1, dtype=np.float64), Gradients(w_enc, b_enc, w_dec, b_dec)
