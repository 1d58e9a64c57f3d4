"""dictlearn (Irofti & Dumitrescu): Batch-OMP compiled by numba, and the K-SVD family in numpy. float64 throughout.

One core codes, sample after sample; the updates use what threads BLAS has. Codes are dense (m, n) arrays.
"""

from collections.abc import Callable
from typing import Any

import dictlearn
import numpy as np
import torch
from dictlearn._update import LinearOps, atom_sweep, get_update_method
from torch import Tensor

from ksvd_sae.bench.peers import Coder, Trainer, Updater, numpy_atoms
from ksvd_sae.bench.problems import Problem
from ksvd_sae.bench.rows import Who
from ksvd_sae.learning.sparse_coding import Code

_PACKAGES = ("dictlearn",)
# Method and whether all atoms are updated from one residual.
_SWEEPS = (("ksvd", False), ("aksvd", False), ("aksvd", True))
_ITERATIONS = 3


def coders(problem: Problem, device: torch.device) -> list[Coder]:
    k = problem.shape.k

    def prepare(x_ND: Tensor, atoms_MD: Tensor) -> Callable[[], Any]:
        x, atoms = x_ND.double().numpy(), atoms_MD.double().numpy()
        return lambda: dictlearn.sparse_encode(x, atoms, algorithm="omp", n_nonzero_coefs=k)

    def rebuild(code_NM: Any, atoms_MD: Tensor) -> Tensor:
        return torch.from_numpy(code_NM @ atoms_MD.double().numpy())

    who = Who("dictlearn", "omp", "numba", "float64", packages=_PACKAGES, note="codes on one core")
    return [Coder(who, prepare, rebuild)]


def updaters(problem: Problem, device: torch.device) -> list[Updater]:
    return [_updater(method, parallel) for method, parallel in _SWEEPS]


def _config(method: str, parallel: bool) -> str:
    return f"{method}, all atoms at once" if parallel else method


def _updater(method: str, parallel: bool) -> Updater:
    """One sweep over all atoms, as its DictionaryLearning.fit calls it between two codings."""
    update_atom = get_update_method(method).func

    def prepare(
        x_ND: Tensor, code: Code, atoms_MD: Tensor
    ) -> tuple[Callable[[], Any], Callable[[Any], tuple[Any, Any]]]:
        y_DN = np.ascontiguousarray(x_ND.double().numpy().T)
        code_MN = np.ascontiguousarray(code.to_dense(len(atoms_MD)).double().numpy().T)
        atoms_DM = np.ascontiguousarray(atoms_MD.double().numpy().T)

        def sweep(given: Any) -> tuple[Any, Any]:
            return atom_sweep(
                y_DN,
                *given,
                ops=LinearOps(),
                update_atom=update_atom,
                rng=np.random.default_rng(0),
                replace_unused="no",
                parallel=parallel,
            )

        return lambda: (atoms_DM.copy(), code_MN.copy()), sweep

    def rebuild(result: tuple[Any, Any]) -> Tensor:
        atoms_DM, code_MN = result
        return torch.from_numpy(np.ascontiguousarray((atoms_DM @ code_MN).T))

    who = Who("dictlearn", _config(method, parallel), "numpy", "float64", packages=_PACKAGES)
    return Updater(who, prepare, rebuild)


def trainers(problem: Problem, seed: int) -> list[Trainer]:
    return [_trainer(method, parallel, problem.shape.k, seed) for method, parallel in _SWEEPS]


def _trainer(method: str, parallel: bool, k: int, seed: int) -> Trainer:
    def prepare(x_ND: Tensor, atoms_MD: Tensor) -> Callable[[], Any]:
        x, start = x_ND.double().numpy(), atoms_MD.double().numpy()
        learner = dictlearn.DictionaryLearning(
            len(atoms_MD),
            fit_algorithm=method,
            atom_sweep="parallel" if parallel else "sequential",
            n_nonzero_coefs=k,
            max_iter=_ITERATIONS,
            dict_init=start,
            replace_unused_atoms="worst",
            random_state=seed,
        )
        return lambda: learner.fit(x)

    who = Who("dictlearn", _config(method, parallel), "numpy", "float64", packages=_PACKAGES, note="OMP codes")
    return Trainer(who, _ITERATIONS, prepare, lambda learner: numpy_atoms(learner.components_))
