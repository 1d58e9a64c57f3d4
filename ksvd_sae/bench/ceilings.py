"""What the machine can do at these shapes, measured in the same run, and the least time that follows from it.

floor = products / (measured rate of the matrix product in that precision) + bytes / (measured rate of a copy), with

coding:  products = 2·n·m·d flops (samples times atoms); bytes = 4·n·k·m (a Gram row for each pick). What every greedy
         coder that works on the Gram matrix does at the least: OMP's orthogonalisation, and the repeated picks of
         plain matching pursuit, come on top.
update:  bytes = 3·4·n·k·d (an atom-sized row for each nonzero in residual, step and line search); no dense product.
train:   a coding and an update of every sample seen.

The copy is of an array as large as what is gathered from: the Gram matrix (coding) or the atoms (update). Where that
fits in the processor's cache, so does the rate. A copied byte counts twice, once read and once written.
"""

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from ksvd_sae.bench.problems import Shape
from ksvd_sae.learning.products import products

_FLOAT32_BYTES = 4
_REPEATS = 5
# A product of this many rows runs at the rate of more, and takes little memory.
_GEMM_ROWS = 4096
_SHORTEST_S = 0.01


def coding_floor_s(shape: Shape, device: torch.device, precision: str = "float32") -> float:
    """Seconds to code shape.n samples, see the module's docstring.

    Args: precision: 'bfloat16' is rated as such, all else as float32.
    """
    rate = gemm_flop_per_s(shape.n, shape.d, shape.m, device, precision)
    products = 2 * shape.n * shape.m * shape.d / rate
    gram_bytes = _FLOAT32_BYTES * shape.m**2
    return products + _FLOAT32_BYTES * shape.n * shape.k * shape.m / copy_bytes_per_s(gram_bytes, device)


def update_floor_s(shape: Shape, device: torch.device) -> float:
    """Seconds to update all atoms from shape.n coded samples, see the module's docstring."""
    gathered = 3 * _FLOAT32_BYTES * shape.n * shape.k * shape.d
    return gathered / copy_bytes_per_s(_FLOAT32_BYTES * shape.m * shape.d, device)


@lru_cache
def gemm_flop_per_s(n: int, d: int, m: int, device: torch.device, precision: str = "float32") -> float:
    """Rate of a product (n, d) × (d, m), on at most 4,096 rows: the best of five."""
    rows = min(n, _GEMM_ROWS)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = (torch.randn(n_rows, d, device=device, dtype=dtype) for n_rows in (rows, m))
    out = torch.empty(rows, m, device=device, dtype=dtype)
    # On CUDA float32 products are made of bfloat16 ones.
    split = device.type == "cuda" and dtype == torch.float32
    return 2 * rows * d * m / _best_s(lambda: products(a, b) if split else torch.mm(a, b.T, out=out), device)


@lru_cache
def copy_bytes_per_s(n_bytes: int, device: torch.device) -> float:
    """Rate of copying an array of that size, read and written bytes together: the best of five."""
    source = torch.ones(max(1, n_bytes // _FLOAT32_BYTES), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_s(lambda: target.copy_(source), device)


def _best_s(call: Callable[[], Any], device: torch.device) -> float:
    """Shortest seconds of one call; calls are repeated inside the clock until it can tell them apart."""

    def clocked(times: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(times):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    clocked(1)
    times = max(1, round(_SHORTEST_S / max(clocked(1), 1e-7)))
    return min(clocked(times) / times for _ in range(_REPEATS))
