"""What of this package is measured: its coders and atom updates, each on every backend that runs there."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ksvd_sae.bench.peers import Coder, Updater
from ksvd_sae.bench.problems import Problem, Shape
from ksvd_sae.bench.rows import OURS, Who
from ksvd_sae.learning.atom_update import (
    AtomUpdate,
    update_atoms_exact,
    update_atoms_sweep,
    update_atoms_two_sweeps,
)
from ksvd_sae.learning.backends import coder_backend
from ksvd_sae.learning.products import Precision
from ksvd_sae.learning.sparse_coding import Code, matching_pursuit, orthogonal_matching_pursuit

_CODERS: dict[str, Callable[..., Code]] = {
    "mp": matching_pursuit,
    "mp_refit": partial(matching_pursuit, refit=True),
    "omp": orthogonal_matching_pursuit,
    "ormp": partial(orthogonal_matching_pursuit, choice="error"),
}
_NONNEGATIVE: dict[str, Callable[..., Code]] = {
    f"{name}, non-negative": partial(_CODERS[name], nonnegative=True) for name in ("mp", "omp")
}
_EXACT_BATCHES = (1, 128)


def auto_backend(shape: Shape, device: torch.device) -> str:
    """The backend that 'auto' takes for these sizes."""
    return coder_backend(device, n_atoms=shape.m, k=shape.k)


def coder(config: str, k: int, backend: str, device: torch.device, precision: Precision = "float32") -> Coder:
    """One of 'mp', 'mp_refit', 'omp', 'ormp', 'mp, non-negative' and 'omp, non-negative' on one backend.

    Args: precision: of the products.
    """
    function = {**_CODERS, **_NONNEGATIVE}[config]

    def prepare(x_ND: Tensor, atoms_MD: Tensor) -> Callable[[], Code]:
        return lambda: function(x_ND, atoms_MD, k, backend=backend, precision=precision)

    who = Who(OURS, config, backend, precision, device)
    return Coder(who, prepare, lambda code, atoms_MD: code.reconstruct(atoms_MD))


def coders(problem: Problem, device: torch.device) -> list[Coder]:
    """Every coder on the backend that 'auto' takes, and, with signs, on torch; some also from rounded products."""
    auto, k = auto_backend(problem.shape, device), problem.shape.k
    exact = [coder(config, k, backend, device) for config in _CODERS for backend in dict.fromkeys((auto, "torch"))]
    exact += [coder(config, k, auto, device) for config in _NONNEGATIVE]
    return [*exact, *(coder(config, k, auto, device, "bfloat16") for config in ("mp", "omp", "ormp"))]


def updaters(problem: Problem, device: torch.device) -> list[Updater]:
    """One sweep, two, and the exact update with 1 and 128 atoms at a time."""
    updates: dict[str, Callable[..., AtomUpdate]] = {"sweep": update_atoms_sweep, "two sweeps": update_atoms_two_sweeps}
    updates |= {f"exact, {size} at a time": partial(update_atoms_exact, atom_batch=size) for size in _EXACT_BATCHES}
    return [_updater(config, update, device) for config, update in updates.items()]


def _updater(config: str, update: Callable[..., AtomUpdate], device: torch.device) -> Updater:
    def prepare(x_ND: Tensor, code: Code, atoms_MD: Tensor) -> tuple[Callable[[], Any], Callable[[Any], AtomUpdate]]:
        return lambda: None, lambda _: update(x_ND, code, atoms_MD)

    def rebuild(updated: AtomUpdate) -> Tensor:
        return updated.code.reconstruct(updated.atoms_MD)

    return Updater(Who(OURS, config, "torch", device=device), prepare, rebuild)
