"""SPAMS (Mairal et al.): OMP in C++ with OpenMP, and its online dictionary learning. GPL 3 or later.

Samples and atoms are columns of Fortran arrays there, so a row-major (n, d) array is taken as it lies. float32: 2.8
times as fast as float64 (1,024 samples, d = 640, m = 2,048, k = 20).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import spams
import torch
from torch import Tensor

from ksvd_sae.bench.peers import Coder, Trainer, numpy_atoms
from ksvd_sae.bench.problems import Problem
from ksvd_sae.bench.rows import Who

_PACKAGES = ("spams-bin",)
# Its mode 'at most lambda1 nonzeros a sample', solved by OMP, and its own default batch.
_SPARSITY, _BATCH, _PASSES = 3, 512, 3


def coders(problem: Problem, device: torch.device) -> list[Coder]:
    k = problem.shape.k

    def prepare(x_ND: Tensor, atoms_MD: Tensor) -> Callable[[], Any]:
        x_DN, atoms_DM, threads = x_ND.numpy().T, atoms_MD.numpy().T, torch.get_num_threads()
        # Left out, eps and lambda1 are whatever lies in memory in 2.6.14, and the code is now and then all zeros.
        return lambda: spams.omp(x_DN, atoms_DM, L=k, eps=0.0, lambda1=0.0, numThreads=threads)

    def rebuild(code_MN: Any, atoms_MD: Tensor) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(code_MN.T @ atoms_MD.numpy()))

    who = Who("spams", "omp", "C++", packages=_PACKAGES, note="its omp picks by error, as ormp does")
    return [Coder(who, prepare, rebuild)]


def trainers(problem: Problem, seed: int) -> list[Trainer]:
    k = problem.shape.k

    def prepare(x_ND: Tensor, atoms_MD: Tensor) -> Callable[[], Any]:
        x_DN, threads = np.asfortranarray(x_ND.numpy().T), torch.get_num_threads()
        batch = min(_BATCH, len(x_ND))
        start_DM = np.asfortranarray(atoms_MD.numpy().T)
        return lambda: spams.trainDL(
            x_DN,
            D=start_DM.copy(order="F"),
            K=len(atoms_MD),
            lambda1=k,
            mode=_SPARSITY,
            numThreads=threads,
            batchsize=batch,
            iter=_PASSES * len(x_ND) // batch,
            verbose=False,
        )

    who = Who("spams", "online", "C++", packages=_PACKAGES, note=f"trainDL, OMP codes, batches of {_BATCH}")
    return [Trainer(who, _PASSES, prepare, lambda atoms_DM: numpy_atoms(atoms_DM.T))]
