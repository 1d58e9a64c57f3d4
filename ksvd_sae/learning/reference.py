"""Slow float64 K-SVD straight from the definitions: the yardstick of the tests.

Works on numpy arrays, one sample or one atom at a time, from residuals instead of Gram matrices,
and shares no code with what it judges. Not for use on real data.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def matching_pursuit(
    sample: Array,
    atoms: Array,
    k: int,
    max_steps: int | None = None,
    rtol: float = 0.0,
    nonnegative: bool = False,
    floor: float = 0.0,
) -> Array:
    """One sample's code, dense (M,): largest product first, stop before a (k+1)-th distinct atom.

    Mallat & Zhang 1993. ``sample`` (D,), ``atoms`` (M, D) unit rows. nonnegative: only positive products count.
    floor: the size of a product that is left.
    """
    code = np.zeros(len(atoms))
    residual = sample.astype(np.float64).copy()
    picked: set[int] = set()
    for _ in range(4 * k if max_steps is None else max_steps):
        if np.linalg.norm(residual) <= rtol * np.linalg.norm(sample):
            break
        products = np.array([residual @ atom for atom in atoms])
        best = int(np.argmax(products if nonnegative else np.abs(products)))
        if abs(products[best]) <= floor or (nonnegative and products[best] < 0):
            break
        if best not in picked and len(picked) == k:
            break
        picked.add(best)
        code[best] += products[best]
        residual = residual - products[best] * atoms[best]
    return code


def orthogonal_matching_pursuit(sample: Array, atoms: Array, k: int, rtol: float = 0.0, floor: float = 0.0) -> Array:
    """One sample's code, dense (M,): after every pick, least squares on all picks (Pati et al. 1993)."""
    code = np.zeros(len(atoms))
    residual = sample.astype(np.float64).copy()
    picked: list[int] = []
    for _ in range(k):
        if np.linalg.norm(residual) <= rtol * np.linalg.norm(sample):
            break
        sizes = np.array([0.0 if j in picked else abs(residual @ atom) for j, atom in enumerate(atoms)])
        best = int(np.argmax(sizes))
        if sizes[best] <= max(floor, 1e-12 * np.linalg.norm(sample)):
            break
        picked.append(best)
        coefficients = np.linalg.lstsq(atoms[picked].T, sample, rcond=None)[0]
        residual = sample - coefficients @ atoms[picked]
    if picked:
        code[picked] = coefficients
    return code


def order_recursive_matching_pursuit(
    sample: Array, atoms: Array, k: int, rtol: float = 0.0, floor: float = 0.0
) -> Array:
    """One sample's code, dense (M,): every pick is the atom whose least squares with the picks so far errs least.

    floor: what a pick must take off the error, as its square root.
    """
    code, coefficients = np.zeros(len(atoms)), np.zeros(0)
    picked: list[int] = []
    for _ in range(k):
        if np.linalg.norm(sample - coefficients @ atoms[picked]) <= rtol * np.linalg.norm(sample):
            break
        trials = [[*picked, j] for j in range(len(atoms)) if j not in picked]
        solved = [np.linalg.lstsq(atoms[trial].T, sample, rcond=None)[0] for trial in trials]
        errors = [float(np.linalg.norm(sample - c @ atoms[t])) for t, c in zip(trials, solved, strict=True)]
        best = int(np.argmin(errors))
        before = float(np.linalg.norm(sample - coefficients @ atoms[picked]))
        if before**2 - errors[best] ** 2 <= floor**2:
            break
        picked, coefficients = trials[best], solved[best]
    code[picked] = coefficients
    return code


def nonnegative_orthogonal_matching_pursuit(
    sample: Array, atoms: Array, k: int, rtol: float = 0.0, floor: float = 0.0
) -> Array:
    """One sample's code ≥ 0, dense (M,): Lawson & Hanson 1974 with at most k atoms (Nguyen et al. 2019).

    The largest positive product enters; least squares on all that are in; whoever would turn negative leaves, the first
    to reach zero first.
    """
    code = np.zeros(len(atoms))
    for _ in range(3 * k):
        residual = sample - code @ atoms
        inside = list(np.flatnonzero(code))
        if np.linalg.norm(residual) <= rtol * np.linalg.norm(sample) or len(inside) == k:
            break
        sizes = np.array([-np.inf if j in inside else residual @ atom for j, atom in enumerate(atoms)])
        best = int(np.argmax(sizes))
        if sizes[best] <= max(floor, 1e-12 * np.linalg.norm(sample)):
            break
        inside.append(best)
        while inside:
            solved = np.linalg.lstsq(atoms[inside].T, sample, rcond=None)[0]
            if (solved > 0).all():
                code[:] = 0
                code[inside] = solved
                break
            old = code[inside]
            steps = np.array([o / (o - s) if s <= 0 else np.inf for o, s in zip(old, solved, strict=True)])
            first = int(np.argmin(steps))
            code[inside] = old + steps[first] * (solved - old)
            code[inside[first]] = 0
            del inside[first]
    return code


def nonnegative_least_squares(sample: Array, atoms: Array) -> Array:
    """Coefficients ≥ 0 of all ``atoms`` by trying every subset: for a handful of atoms only."""
    best, best_error = np.zeros(len(atoms)), float(np.linalg.norm(sample))
    for bits in range(1, 2 ** len(atoms)):
        subset = [j for j in range(len(atoms)) if bits >> j & 1]
        solved = np.linalg.lstsq(atoms[subset].T, sample, rcond=None)[0]
        error = float(np.linalg.norm(sample - solved @ atoms[subset]))
        if (solved >= 0).all() and error < best_error:
            best, best_error = np.zeros(len(atoms)), error
            best[subset] = solved
    return best


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


def sweep_atoms(samples: Array, codes: Array, atoms: Array, held: float) -> tuple[Array, Array]:
    """Each atom in turn to where the error is least, coefficients kept; then unit atoms, their norms in the codes.

    Args: held: as many samples more pull each atom to where it was. Others, Returns: as ``update_atoms``; an atom that
        ends at zero keeps its direction and loses its coefficients.
    """
    moved = atoms.astype(np.float64).copy()
    for j in range(len(moved)):
        own = codes[:, j].astype(np.float64)
        if own.any():
            pull = held * (own @ own) / np.count_nonzero(own)
            moved[j] += own @ (samples - codes @ moved) / (own @ own + pull)
    norms = np.linalg.norm(moved, axis=1, keepdims=True)
    return np.where(norms > 1e-6, moved / np.maximum(norms, 1e-6), atoms), codes * np.where(norms > 1e-6, norms, 0).T


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
