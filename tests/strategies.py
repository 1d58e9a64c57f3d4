"""Dictionaries, samples and planted problems for all tests: builders, and hypothesis strategies over them.

Arrays come from a seeded generator rather than from hypothesis element by element: what matters here are
sizes, dtypes and kinds of dictionaries, and hypothesis shrinks those.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from ksvd_sae.learning.sparse_coding import Code

# Powers of two hide off-by-one mistakes in blocked code.
ODD_SIZES = (1, 2, 3, 5, 7, 11, 13, 17)
DTYPES = (torch.float32, torch.float64)


def shown(value: object) -> str:
    """A case's name: its repr without addresses, so that all processes of a test run have the same."""
    return re.sub(r" at 0x\w+", "", repr(value))


@dataclass(frozen=True)
class Problem:
    """Samples to code with at most k of the atoms."""

    x_BD: Tensor
    atoms_MD: Tensor
    k: int

    def to(self, dtype: torch.dtype) -> "Problem":
        return Problem(self.x_BD.to(dtype), normalize(self.atoms_MD.to(dtype), dim=1), self.k)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit_atoms(n_atoms: int, d_in: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random unit rows."""
    return normalize(torch.randn(n_atoms, d_in, generator=generator(seed), dtype=torch.float64), dim=1).to(dtype)


def generic(n_samples: int, d_in: int, n_atoms: int, k: int, seed: int = 0) -> Problem:
    """Gaussian samples, random atoms: no ties, no structure. float64."""
    x_BD = torch.randn(n_samples, d_in, generator=generator(seed + 1), dtype=torch.float64)
    return Problem(x_BD, unit_atoms(n_atoms, d_in, seed), k)


def with_zero_rows(problem: Problem) -> Problem:
    x_BD = problem.x_BD.clone()
    x_BD[::2] = 0
    return Problem(x_BD, problem.atoms_MD, problem.k)


def with_duplicates(problem: Problem) -> Problem:
    """The second half of the atoms repeats the first, every other one with its sign flipped."""
    atoms_MD = problem.atoms_MD.clone()
    half = len(atoms_MD) // 2
    atoms_MD[half : 2 * half] = atoms_MD[:half]
    atoms_MD[half : 2 * half : 2] *= -1
    return Problem(problem.x_BD, atoms_MD, problem.k)


def with_near_duplicates(problem: Problem, distance: float) -> Problem:
    """The second half of the atoms lies at ``distance`` from the first, and so do the samples' planes.

    Half of the samples are combinations of one such pair, so that a greedy coder takes both.
    """
    atoms_MD, x_BD = problem.atoms_MD.clone(), problem.x_BD.clone()
    half = len(atoms_MD) // 2
    if half == 0:
        return problem
    away_HD = normalize(atoms_MD[half : 2 * half] - 0.5 * atoms_MD[:half], dim=1)
    atoms_MD[half : 2 * half] = normalize(atoms_MD[:half] + distance * away_HD, dim=1)
    for row in range(0, len(x_BD), 2):
        pair = row % half
        x_BD[row] = x_BD[row, 0] * atoms_MD[pair] + x_BD[row, -1] * away_HD[pair]
    return Problem(x_BD, atoms_MD, problem.k)


def coherent(problem: Problem) -> Problem:
    """All atoms and samples share a strong common direction."""
    shared_D = unit_atoms(1, problem.x_BD.shape[1], seed=99)[0]
    return Problem(problem.x_BD + 3 * shared_D, normalize(problem.atoms_MD + 2 * shared_D, dim=1), problem.k)


KINDS: dict[str, Callable[[Problem], Problem]] = {
    "generic": lambda problem: problem,
    "zero rows": with_zero_rows,
    "duplicates": with_duplicates,
    "near duplicates": lambda problem: with_near_duplicates(problem, 1e-2),
    "coherent": coherent,
}

# The table that every coder runs through.
EDGE_CASES: dict[str, Problem] = {
    "k = 1": generic(9, 6, 10, 1),
    "k = d": generic(9, 5, 12, 5),
    "k = d = M": generic(9, 5, 5, 5),
    "one dimension": generic(5, 1, 3, 1),
    "one atom": generic(5, 4, 1, 1),
    "zero rows": with_zero_rows(generic(9, 6, 10, 3)),
    "all zero": Problem(torch.zeros(4, 6, dtype=torch.float64), unit_atoms(10, 6), 3),
    "duplicate atoms": with_duplicates(generic(9, 6, 10, 3)),
    "no power of two": generic(37, 23, 61, 7),
    "one sample": generic(1, 6, 10, 3),
    "no samples": generic(0, 6, 10, 3),
    "fewer atoms than dimensions": generic(9, 17, 5, 3),
    "coherent": coherent(generic(9, 7, 13, 4)),
}


@st.composite
def problems(draw: st.DrawFn, *kinds: str, max_samples: int = 13, max_atoms: int = 17) -> Problem:
    """Small float64 problems of odd sizes, of the kinds asked for (all kinds if none is named)."""
    d_in = draw(st.sampled_from(ODD_SIZES[:6]))
    n_atoms = draw(st.sampled_from([size for size in ODD_SIZES if size <= max_atoms]))
    k = draw(st.integers(1, min(d_in, n_atoms)))
    n_samples = draw(st.integers(1, max_samples))
    seed = draw(st.integers(0, 2**31))
    return KINDS[draw(st.sampled_from(kinds or tuple(KINDS)))](generic(n_samples, d_in, n_atoms, k, seed))


dtypes = st.sampled_from(DTYPES)


@dataclass(frozen=True)
class Planted:
    """Samples that are k-sparse in known atoms, up to noise."""

    x_BD: Tensor
    atoms_MD: Tensor
    code: Code


def planted(
    n_samples: int,
    d_in: int,
    n_atoms: int,
    k: int,
    *,
    noise: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Planted:
    """k random atoms a sample, coefficients ±(1 + U(0, 1)), Gaussian noise of that size a component."""
    draw = np.random.default_rng(seed)
    atoms = draw.standard_normal((n_atoms, d_in))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    support = np.argsort(draw.random((n_samples, n_atoms)), axis=1)[:, :k]
    values = (1 + draw.random((n_samples, k))) * draw.choice([-1, 1], (n_samples, k))
    x = np.einsum("bk,bkd->bd", values, atoms[support]) + noise * draw.standard_normal((n_samples, d_in))
    code = Code(torch.tensor(values, dtype=dtype), torch.tensor(support, dtype=torch.int32))
    return Planted(torch.tensor(x, dtype=dtype), torch.tensor(atoms, dtype=dtype), code)


# Where updating all atoms of a batch from one residual overshoots: k / M large, random initial atoms, and
# samples whose variance falls off over the dimensions. (d_in = n_atoms, k, atoms in parallel, seed)
OVERSHOOTING = ((32, 24, 8, 0), (32, 24, 8, 1), (32, 32, 8, 0), (64, 48, 16, 0))


def overshooting(d_in: int, k: int, seed: int) -> Problem:
    draw = generator(seed)
    atoms_MD = normalize(torch.rand(d_in, d_in, generator=draw, dtype=torch.float64) - 0.5, dim=1)
    spread_D = torch.linspace(2, 0.05, d_in, dtype=torch.float64)
    return Problem(torch.randn(256, d_in, generator=draw, dtype=torch.float64) * spread_D, atoms_MD, k)
