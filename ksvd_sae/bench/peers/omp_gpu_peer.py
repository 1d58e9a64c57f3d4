"""orthogonal-matching-pursuit-gpu (Lubonja et al. 2024, once batched-omp): OMP with an inverse Cholesky factor.

Its algorithm 'v0' (torch) on CUDA; on the CPU 'v0_blas' (Cython), which takes float64 alone and was 10 times as fast
there (one-off). It keeps k·m numbers a sample, so it is given 1,024 samples at a time, the fastest size of those tried.
"""

from collections.abc import Callable
from typing import Any

import torch
from orthogonal_matching_pursuit_gpu import run_omp
from torch import Tensor

from ksvd_sae.bench.peers import Coder
from ksvd_sae.bench.problems import Problem
from ksvd_sae.bench.rows import Who

_PACKAGES = ("orthogonal-matching-pursuit-gpu",)
_CHUNK = 1024


def coders(problem: Problem, device: torch.device) -> list[Coder]:
    k, cuda = problem.shape.k, device.type == "cuda"
    algorithm, dtype = ("v0", torch.float32) if cuda else ("v0_blas", torch.float64)

    def prepare(x_ND: Tensor, atoms_MD: Tensor) -> Callable[[], Any]:
        x_ND, atoms_DM = x_ND.to(dtype), atoms_MD.to(dtype).T.contiguous()
        return lambda: [
            run_omp(atoms_DM, x_CD, k, precompute=cuda, normalize=False, fit_intercept=False, alg=algorithm)
            for x_CD in torch.split(x_ND, _CHUNK)
        ]

    def rebuild(codes_CM: list[Tensor], atoms_MD: Tensor) -> Tensor:
        return torch.cat([code_CM @ atoms_MD.to(dtype) for code_CM in codes_CM])

    name = str(dtype).removeprefix("torch.")
    backend = "torch" if cuda else "Cython BLAS"
    return [
        Coder(
            Who("omp-gpu", "omp", backend, name, device, _PACKAGES, f"{algorithm}, 1,024 samples at a time"),
            prepare,
            rebuild,
        )
    ]
