"""The dictionary half of K-SVD: new atoms from a coded batch.

Notation: x (B, D) samples, code (B, K) with coefficients X as a sparse (B, M) matrix, E = x − X·atoms
the residual, Ω_j the samples that use atom j, x_j their coefficients, n_j = ‖x_j‖².

Two ways, both of which leave the error of the batch no higher than they found it:

``exact`` (Aharon, Elad & Bruckstein 2006; batches of atoms as in DB-KSVD, arXiv 2505.18441)
    for each atom the rank-1 SVD of E_Ω + x_jᵀ d_j gives the new atom and its new coefficients. The
    atoms of one atom batch are updated in parallel from the same residual. Parallel updates of atoms
    that occur together can overshoot, by any amount; a batch of atoms that raised the error is taken
    back and done one atom at a time, which cannot.

``sums`` (all atoms at once, coefficients kept)
    d_j ← normalise(d_j + t·Δ_j) with Δ_j = (Xᵀ E)_j / n_j, the least-squares step of each atom alone,
    and one exact line search t over all of them. With t = 1 this is one power step of each atom's SVD
    started at the atom. Two sparse products a batch, both sums over samples.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ksvd_sae.learning.sparse_coding import Code


@dataclass(frozen=True)
class AtomUpdate:
    """What an update gave.

    Attributes:
        atoms_MD: the new atoms, unit rows; unused atoms are unchanged.
        code: the code that fits the new atoms (scaled or re-estimated coefficients, same support).
        usage_M: how many samples of the batch use each atom (int64).
        error_before, error_after: Σ‖residual‖² with (old atoms, old code) and (new atoms, new code).
        redone_batches: atom batches that had to be done one atom at a time ('exact' only).
    """

    atoms_MD: Tensor
    code: Code
    usage_M: Tensor
    error_before: float
    error_after: float
    redone_batches: int = 0


@torch.no_grad()
def update_atoms_sums(x_BD: Tensor, code: Code, atoms_MD: Tensor) -> AtomUpdate:
    """Move all atoms at once along their least-squares steps; see the module's docstring.

    Args:
        x_BD: the batch, centred.
        code: its code under ``atoms_MD``.
        atoms_MD: unit rows.
    Returns: AtomUpdate; error_after ≤ error_before up to float32 rounding.
    Cost: 3·B·K·D multiply-adds, each gathering rows of D floats; B·D + M·D floats.
    """
    n_atoms = len(atoms_MD)
    by_atom = _group_by_atom(code, n_atoms)
    residual_BD = x_BD - code.reconstruct(atoms_MD)
    energy_M = _energy_per_atom(code, n_atoms)
    gradient_MD = by_atom.weighted_sums(residual_BD)
    used_M = energy_M > 0
    step_MD = torch.where(used_M[:, None], gradient_MD / energy_M.clamp(min=torch.finfo(x_BD.dtype).tiny)[:, None], 0)
    moved_BD = code.reconstruct(step_MD)
    error_before, curvature = _energy(residual_BD), _energy(moved_BD)
    # Exact line search: error(t) = error_before − 2t·⟨gradient, step⟩ + t²·curvature.
    slope = float((gradient_MD.double() * step_MD.double()).sum())
    t = slope / curvature if curvature > 0 else 0.0
    raw_MD = atoms_MD + t * step_MD
    norms_M = torch.linalg.vector_norm(raw_MD, dim=1)
    # An atom whose step leads to zero is best not used: it keeps its direction and loses its coefficients.
    moved_M = used_M & (norms_M > 1e-6)
    new_MD = torch.where(moved_M[:, None], raw_MD / norms_M.clamp(min=1e-6)[:, None], atoms_MD)
    scale_M = torch.where(moved_M, norms_M, (~used_M).to(norms_M.dtype))
    new_code = Code(code.values_BK * scale_M[code.support_BK.long()], code.support_BK)
    error_after = error_before - 2 * t * slope + t * t * curvature
    return AtomUpdate(new_MD, new_code, by_atom.usage_M, error_before, error_after)


@torch.no_grad()
def update_atoms_exact(
    x_BD: Tensor, code: Code, atoms_MD: Tensor, *, atom_batch: int = 1, generator: torch.Generator | None = None
) -> AtomUpdate:
    """Rank-1 SVD of every atom's own residual, ``atom_batch`` atoms in parallel, in random order.

    Args:
        x_BD: the batch, centred.
        code: its code under ``atoms_MD``.
        atom_batch: atoms updated from the same residual; 1 is K-SVD proper.
        generator: order of the atoms (CPU generator); None keeps the order of the rows.
    Returns: AtomUpdate; error_after ≤ error_before up to float32 rounding.
    Numerics: each SVD from the smaller Gram matrix in float64. The sign keeps ⟨new, old⟩ ≥ 0
        (KSVD.jl fixes u[0] ≥ 0: the same product).
    Cost: O(Σ_j |Ω_j|·D·min(|Ω_j|, D)) time: slow, the yardstick rather than the workhorse.
    """
    n_atoms = len(atoms_MD)
    atoms_MD = atoms_MD.clone()
    values_BK = code.values_BK.clone()
    by_atom = _group_by_atom(code, n_atoms)
    residual_BD = x_BD - code.reconstruct(atoms_MD)
    error_before = error = _energy(residual_BD)
    used = by_atom.usage_M.nonzero().flatten().tolist()
    if generator is not None:
        used = [used[i] for i in torch.randperm(len(used), generator=generator).tolist()]
    redone = 0
    for start in range(0, len(used), atom_batch):
        batch = used[start : start + atom_batch]
        kept = (atoms_MD.clone(), values_BK.clone(), residual_BD.clone()) if len(batch) > 1 else None
        _update_together(batch, by_atom, atoms_MD, values_BK, residual_BD)
        new_error = _energy(residual_BD)
        if kept is not None and new_error > error:
            atoms_MD, values_BK, residual_BD = kept
            redone += 1
            for atom in batch:
                _update_together([atom], by_atom, atoms_MD, values_BK, residual_BD)
            new_error = _energy(residual_BD)
        error = new_error
    return AtomUpdate(atoms_MD, Code(values_BK, code.support_BK), by_atom.usage_M, error_before, error, redone)


def _update_together(
    batch: list[int], by_atom: "_ByAtom", atoms_MD: Tensor, values_BK: Tensor, residual_BD: Tensor
) -> None:
    """New atoms and coefficients for ``batch`` from one residual, then the residual, all in place."""
    found = []
    for atom in batch:
        slots = by_atom.slots(atom)
        samples = slots // values_BK.shape[1]
        old_values = values_BK.view(-1)[slots]
        target = residual_BD[samples] + old_values[:, None] * atoms_MD[atom]
        direction = _leading_right_vector(target)
        direction = direction if float(direction @ atoms_MD[atom]) >= 0 else -direction
        found.append((atom, slots, samples, old_values, atoms_MD[atom].clone(), direction, target @ direction))
    for atom, slots, samples, old_values, old_atom, direction, new_values in found:
        change = old_values[:, None] * old_atom - new_values[:, None] * direction
        residual_BD.index_add_(0, samples, change)
        atoms_MD[atom] = direction
        values_BK.view(-1)[slots] = new_values


def _leading_right_vector(matrix_ND: Tensor) -> Tensor:
    """Unit v that maximises ‖matrix·v‖, from the smaller Gram matrix in float64."""
    a = matrix_ND.double()
    if len(a) >= a.shape[1]:
        vector = torch.linalg.eigh(a.T @ a).eigenvectors[:, -1]
    else:
        vector = torch.linalg.eigh(a @ a.T).eigenvectors[:, -1] @ a
    norm = torch.linalg.vector_norm(vector)
    if float(norm) == 0:  # the zero matrix: every direction is as good
        vector, norm = torch.eye(1, a.shape[1], dtype=a.dtype, device=a.device)[0], vector.new_ones(())
    return (vector / norm).to(matrix_ND.dtype)


@dataclass(frozen=True)
class _ByAtom:
    """The nonzeros of a code sorted by atom: the columns of X.

    order: flat (sample·K + slot) indices, sorted by atom, stable; starts_M, usage_M: each atom's range.
    """

    order: Tensor
    values: Tensor
    samples: Tensor
    starts_M: Tensor
    usage_M: Tensor

    def slots(self, atom: int) -> Tensor:
        start = int(self.starts_M[atom])
        return self.order[start : start + int(self.usage_M[atom])]

    def weighted_sums(self, rows_BD: Tensor) -> Tensor:
        """Xᵀ·rows, (M, D): each atom's samples summed with its coefficients as weights."""
        return F.embedding_bag(
            self.samples, rows_BD, self.starts_M, per_sample_weights=self.values.to(rows_BD.dtype), mode="sum"
        )


def _group_by_atom(code: Code, n_atoms: int) -> _ByAtom:
    k = code.values_BK.shape[1]
    nonzero = (code.values_BK.view(-1) != 0).nonzero().flatten()
    atoms = code.support_BK.view(-1)[nonzero].long()
    order = nonzero[torch.argsort(atoms, stable=True)]
    usage_M = torch.bincount(atoms, minlength=n_atoms)
    starts_M = torch.cumsum(usage_M, 0) - usage_M
    return _ByAtom(order, code.values_BK.view(-1)[order], order // k, starts_M, usage_M)


def _energy_per_atom(code: Code, n_atoms: int) -> Tensor:
    energy_M = torch.zeros(n_atoms, dtype=torch.float64, device=code.values_BK.device)
    energy_M.index_add_(0, code.support_BK.view(-1).long(), code.values_BK.view(-1).double() ** 2)
    return energy_M.to(code.values_BK.dtype)


def _energy(rows_BD: Tensor) -> float:
    """Σ rows², summed in float64 over row norms."""
    return float(torch.linalg.vector_norm(rows_BD, dim=1).double().pow(2).sum())
