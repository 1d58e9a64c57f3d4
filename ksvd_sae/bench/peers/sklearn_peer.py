"""scikit-learn: OMP on the Gram matrix, and mini-batch dictionary learning (which codes by the lasso).

Both loop over samples in one process; threads only help inside BLAS. OMP is faster there in float32.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from sklearn.decomposition import MiniBatchDictionaryLearning, sparse_encode
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import orthogonal_mp_gram
from torch import Tensor

from ksvd_sae.bench.peers import Coder, Trainer, numpy_atoms
from ksvd_sae.bench.problems import Problem
from ksvd_sae.bench.rows import Who

_PACKAGES = ("scikit-learn",)
_PASSES, _BATCH = 1, 256
_ALPHA_SAMPLES, _ALPHA_STEPS = 64, 12


def coders(problem: Problem, device: torch.device) -> list[Coder]:
    k = problem.shape.k

    def prepare(x_ND: Tensor, atoms_MD: Tensor) -> Callable[[], Any]:
        x, atoms = x_ND.numpy(), atoms_MD.numpy()
        return lambda: orthogonal_mp_gram(atoms @ atoms.T, atoms @ x.T, n_nonzero_coefs=k)

    def rebuild(code_MN: Any, atoms_MD: Tensor) -> Tensor:
        return torch.from_numpy(code_MN.T @ atoms_MD.numpy())

    who = Who("scikit-learn", "omp", "numpy", packages=_PACKAGES, note="one process, sample after sample")
    return [Coder(who, prepare, rebuild)]


def trainers(problem: Problem, seed: int) -> list[Trainer]:
    def prepare(x_ND: Tensor, atoms_MD: Tensor) -> Callable[[], Any]:
        x = (x_ND / x_ND.norm(dim=1).mean()).numpy()
        learner = MiniBatchDictionaryLearning(
            len(atoms_MD),
            alpha=_alpha(x, atoms_MD.numpy(), problem.shape.k),
            max_iter=_PASSES,
            batch_size=min(_BATCH, len(x)),
            fit_algorithm="cd",
            dict_init=atoms_MD.numpy().copy(),
            tol=0.0,
            max_no_improvement=None,
            random_state=seed,
        )
        return lambda: _quietly(lambda: learner.fit(x))

    note = "lasso codes; alpha set, untimed, to k nonzeros a sample under the initial atoms"
    who = Who("scikit-learn", "mini-batch", "numpy", packages=_PACKAGES, note=note)
    return [Trainer(who, _PASSES, prepare, lambda learner: numpy_atoms(learner.components_))]


def _alpha(x: Any, atoms: Any, k: int) -> float:
    """The lasso's weight at which a sample has k nonzeros on average, by bisection on 64 samples."""
    low, high = 1e-4, 1.0
    for _ in range(_ALPHA_STEPS):
        alpha = (low * high) ** 0.5
        code = _quietly(lambda a=alpha: sparse_encode(x[:_ALPHA_SAMPLES], atoms, algorithm="lasso_cd", alpha=a))  # type: ignore[misc]
        low, high = (alpha, high) if (code != 0).sum(axis=1).mean() > k else (low, alpha)
    return alpha


def _quietly(call: Callable[[], Any]) -> Any:
    """Without the lasso's thousands of reports that it stopped at its default number of steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return call()
