"""How atoms of a code go together, for the CPU: rows of XᵀX, a thread an atom."""

from numba import prange

from ksvd_sae.learning.kernels.compiled import compiled


@compiled(parallel=True)
def coupling(values_BK, support_BK, samples, values, starts_M, usage_M, first, out_NM):  # type: ignore[no-untyped-def]
    """Add the products of atoms first, first + 1, … with all atoms before the last of them, in order of samples.

    samples, values, starts_M, usage_M: the nonzeros sorted by atom. out_NM: (N, first + N), zeros; of the N atoms.
    """
    n, end = out_NM.shape
    for row in prange(n):
        start = starts_M[first + row]
        for position in range(start, start + usage_M[first + row]):
            sample, value = samples[position], values[position]
            for slot in range(values_BK.shape[1]):
                other = support_BK[sample, slot]
                if other < end:
                    out_NM[row, other] += value * values_BK[sample, slot]
