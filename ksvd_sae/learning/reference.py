"""Slow float64 K-SVD straight from the definitions: the yardstick of the tests.

Works on numpy arrays, one sample or one atom at a time, from residuals instead of Gram matrices,
and shares no code with what it judges. Not for use on real data.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def matching_pursuit(sample: Array, atoms: Array, k: int, max_steps: int | None = None, rtol: float = 0.0) -> Array:
    """One sample's code, dense (M,): largest product first, stop before a (k+1)-th distinct atom.

    Mallat & Zhang 1993. ``sample`` (D,), ``atoms`` (M, D) unit rows.
    """
    code = np.zeros(len(atoms))
    residual = sample.astype(np.float64).copy()
    picked: set[int] = set()
    for _ in range(4 * k if max_steps is None else max_steps):
        if np.linalg.norm(residual) <= rtol * np.linalg.norm(sample):
            break
        products = np.array([residual @ atom for atom in atoms])
        best = int(np.argmax(np.abs(products)))
        if products[best] == 0 or (best not in picked and len(picked) == k):
            break
        picked.add(best)
        code[best] += products[best]
        residual = residual - products[best] * atoms[best]
    return code


def orthogonal_matching_pursuit(sample: Array, atoms: Array, k: int, rtol: float = 0.0) -> Array:
    """One sample's code, dense (M,): after every pick, least squares on all picks (Pati et al. 1993)."""
    code = np.zeros(len(atoms))
    residual = sample.astype(np.float64).copy()
    picked: list[int] = []
    for _ in range(k):
        if np.linalg.norm(residual) <= rtol * np.linalg.norm(sample):
            break
        sizes = np.array([0.0 if j in picked else abs(residual @ atom) for j, atom in enumerate(atoms)])
        best = int(np.argmax(sizes))
        if sizes[best] <= 1e-12 * np.linalg.norm(sample):
            break
        picked.append(best)
        coefficients = np.linalg.lstsq(atoms[picked].T, sample, rcond=None)[0]
        residual = sample - coefficients @ atoms[picked]
    if picked:
        code[picked] = coefficients
    return code


def update_atoms(samples: Array, codes: Array, atoms: Array, order: list[int] | None = None) -> tuple[Array, Array]:
    """One sweep of K-SVD's update, one atom after the other (Aharon, Elad & Bruckstein 2006).

    Args: samples (B, D), codes (B, M) dense, atoms (M, D).
    Returns: new atoms and new codes. Unused atoms stay. Signs keep ⟨new atom, old atom⟩ ≥ 0.
    """
    atoms, codes = atoms.astype(np.float64).copy(), codes.astype(np.float64).copy()
    for j in range(len(atoms)) if order is None else order:
        users = np.flatnonzero(codes[:, j])
        if len(users) == 0:
            continue
        error = samples[users] - codes[users] @ atoms + np.outer(codes[users, j], atoms[j])
        left, sizes, right = np.linalg.svd(error, full_matrices=False)
        sign = 1.0 if right[0] @ atoms[j] >= 0 else -1.0
        atoms[j] = sign * right[0]
        codes[users, j] = sign * sizes[0] * left[:, 0]
    return atoms, codes


def ksvd(samples: Array, atoms: Array, k: int, sweeps: int) -> tuple[Array, list[float]]:
    """K-SVD from given atoms: code all samples by MP, update, repeat.

    Returns: the atoms and the relative error ‖Y − X·D‖_F / ‖Y‖_F after the coding of each sweep and at the end.
    """
    errors = []
    for _ in range(sweeps):
        codes = np.stack([matching_pursuit(sample, atoms, k) for sample in samples])
        errors.append(float(np.linalg.norm(samples - codes @ atoms) / np.linalg.norm(samples)))
        atoms, _ = update_atoms(samples, codes, atoms)
    codes = np.stack([matching_pursuit(sample, atoms, k) for sample in samples])
    errors.append(float(np.linalg.norm(samples - codes @ atoms) / np.linalg.norm(samples)))
    return atoms, errors
