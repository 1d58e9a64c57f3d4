"""The dictionary half of K-SVD: new atoms from a coded batch.

Notation: x (B, D) samples, code (B, K) with coefficients X as a sparse (B, M) matrix, E = x − X·atoms
the residual, Ω_j the samples that use atom j, x_j their coefficients.

Three ways, all of which leave the error of the batch no higher than it was:

``exact`` (Aharon, Elad & Bruckstein 2006; batches of atoms as in DB-KSVD, arXiv 2505.18441)
    for each atom the rank-1 SVD of E_Ω + x_jᵀ d_j gives the new atom and its new coefficients. The
    atoms of one atom batch are updated in parallel from the same residual. Parallel updates of atoms
    that occur together can overshoot, by any amount; a batch of atoms that raised the error is taken
    back and done one atom at a time, which cannot.

``sweep`` (one atom after the other, coefficients kept)
    d_j ← d_j + Δ_j, where Δ_j is the least-squares step of atom j after those before it have moved: block coordinate
    descent, a block an atom. With G = XᵀE and A = XᵀX that is Δ_j = (G_j − Σ_{i<j} A_ji Δ_i) / H_j with H_j = A_jj: one
    triangular solve for all of them. G and A are sums over samples (``SweepSums``) and all that the sweep needs, so
    several processes can each sum over their part (ranks.py). An atom that few samples use fits their noise; so it
    counts as ``held`` samples as it was: H_j = A_jj (1 + held / |Ω_j|). The error falls by Σ_j (2H_j − A_jj) ‖Δ_j‖².

``two_sweeps``
    A sweep, the coefficients that then fit best on the same supports (``exact`` fits them atom by atom), and a sweep.
    From random atoms, in few large batches, that learns as much as ``exact``.

What is learned by sweeps errs as little as by ``exact`` or less ("What the options of DB-KSVD are worth" in the docs).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ksvd_sae.learning import backends
from ksvd_sae.learning.code import Code
from ksvd_sae.learning.kernels import batch_triton
from ksvd_sae.learning.least_squares import refit_code
from ksvd_sae.learning.products import has_bfloat16, multiplied, products
from ksvd_sae.ranks import ALONE, Ranks

# Nonzeros summed in one go: enough to keep the second stage small, few enough for all of a GPU to be busy.
_PIECE = 256
# Samples that an atom counts for as it was, in a sweep: of 0, 6, 15 and 40 the one with the lowest held-out error over
# codes with and without signs, of 6 and of 20 atoms ("What the options of DB-KSVD are worth" in the docs).
HELD = 6.0
# Of XᵀX at a time: 256 MB of float32.
_COUPLINGS = 1 << 26
# Rows of its triangle solved for at a time on CUDA: above the diagonal nothing is multiplied, and what is left of it is
# a matrix product, which is faster than solving.
_SOLVED_ROWS = {"cuda": 1024}
# On CUDA with more atoms than this for each dimension it is less work to take the moved atoms off the residual (a pass
# over it for each _SOLVED_ROWS atoms) than to multiply the codes with each other.
_MANY_ATOMS = 4
# Of the non-negative rank-1 update: each ends no worse than it began, and training goes on from there.
_ALTERNATIONS = 5


@dataclass(frozen=True)
class AtomUpdate:
    """What an update gave.

    Attributes:
        atoms_MD: the new atoms, unit rows; unused atoms are unchanged.
        code: the code that fits the new atoms (scaled or re-estimated coefficients, same support).
        usage_M: how many samples of the batch use each atom (int64).
        energy_M: Σ of each atom's squared coefficients in the code given.
        residual_BD: x − code·atoms as given, before the update.
        errors: Σ‖residual‖² with (old atoms, old code) and (new atoms, new code), float64, where the samples are.
        redone_batches: atom batches that had to be done one atom at a time ('exact' only).
    """

    atoms_MD: Tensor
    code: Code
    usage_M: Tensor
    energy_M: Tensor
    residual_BD: Tensor
    errors: Tensor
    redone_batches: int = 0

    @property
    def error_before(self) -> float:
        return float(self.errors[0])

    @property
    def error_after(self) -> float:
        return float(self.errors[1])


def residual_of(x_BD: Tensor, code: Code, atoms_MD: Tensor) -> Tensor:
    """x − code·atoms, (B, D), in the samples' dtype."""
    if not backends.on_gpu(x_BD.device) or batch_triton.why_not(x_BD.device, x_BD.dtype) is not None:
        return x_BD - code.reconstruct(atoms_MD).to(x_BD.dtype)
    residual_BD = torch.empty_like(x_BD)
    batch_triton.leave(x_BD, atoms_MD, code.values_BK, code.support_BK, residual_BD)
    return residual_BD


@dataclass(frozen=True)
class MovedAtoms:
    """atoms_MD: after the sweep, unit rows.  scale_M: what their coefficients are multiplied by.
    error: Σ‖residual‖² then, float64."""

    atoms_MD: Tensor
    scale_M: Tensor
    error: Tensor

    def agreed(self, ranks: Ranks) -> "MovedAtoms":
        """As rank 0 has them."""
        return MovedAtoms(ranks.agreed(self.atoms_MD), ranks.agreed(self.scale_M), ranks.agreed(self.error))


@dataclass(frozen=True)
class SweepSums:
    """All that the sweep needs to know of the samples, each a sum over them: those of two parts of a batch add up.

    Attributes:
        energy_M, usage_M: as in AtomUpdate.
        error: Σ‖E‖² (float64).
        block: from (first, last, Δ) the gradient of the atoms from the first to before the last, after those before
            them have moved by their rows of Δ, and their own block of XᵀX: (last − first, D) and (last − first, last −
            first). To be asked for in the order of the atoms.
    """

    energy_M: Tensor
    usage_M: Tensor
    error: Tensor
    block: Callable[[int, int, Tensor], tuple[Tensor, Tensor]]

    def __add__(self, other: "SweepSums") -> "SweepSums":
        def block(first: int, last: int, step_MD: Tensor) -> tuple[Tensor, Tensor]:
            (one_ND, one_NN), (two_ND, two_NN) = (part.block(first, last, step_MD) for part in (self, other))
            return one_ND + two_ND, one_NN + two_NN

        return SweepSums(self.energy_M + other.energy_M, self.usage_M + other.usage_M, self.error + other.error, block)

    def total(self, ranks: Ranks) -> "SweepSums":
        """Those of all processes, whose parts of the batch these are. Sent round: M·(D + rows) numbers, where rows are
        those of the triangle that are solved for at a time (all, if fewer than 2²⁶ / M)."""

        def block(first: int, last: int, step_MD: Tensor) -> tuple[Tensor, Tensor]:
            gradient_ND, own_NN = self.block(first, last, step_MD)
            return ranks.total(gradient_ND), ranks.total(own_NN)

        if ranks.size == 1:
            return self
        return SweepSums(ranks.total(self.energy_M), ranks.total(self.usage_M), ranks.total(self.error), block)


@torch.no_grad()
def update_atoms_sweep(
    x_BD: Tensor, code: Code, atoms_MD: Tensor, *, held: float = HELD, ranks: Ranks = ALONE
) -> AtomUpdate:
    """Move the atoms one after the other, each to where the error is least; see the module's docstring.

    Args:
        x_BD: the batch, centred.
        code: its code under ``atoms_MD``.
        atoms_MD: unit rows.
        held: samples that an atom counts for as it was; 0 lets it follow the batch alone.
        ranks: of the processes whose parts of one batch these are.
    Returns: AtomUpdate; error_after ≤ error_before up to rounding. On CUDA the residual is given in bfloat16, and the
        errors but for its rounding.
    Cost: 2·B·K·D multiply-adds that gather rows of D floats, B·K² that gather single ones, and M²·D/2 of a triangular
        solve; B·D + M·D floats, and at most 2²⁶ of A at a time. On CUDA B·K·D that gather and B·M·(D + M/2), with
        M > 4·D B·M·2·D, of matrix products in bfloat16, for which the codes are written out: 2·B·M bytes.
    """
    residual_BD, sums = sweep_sums(x_BD, code, atoms_MD)
    sums = sums.total(ranks)
    moved = sweep(atoms_MD, sums, held).agreed(ranks)
    return AtomUpdate(
        atoms_MD=moved.atoms_MD,
        code=Code(code.values_BK * moved.scale_M[code.support_BK.long()], code.support_BK),
        usage_M=sums.usage_M,
        energy_M=sums.energy_M,
        residual_BD=residual_BD,
        errors=torch.stack([sums.error, moved.error]),
    )


@torch.no_grad()
def update_atoms_two_sweeps(
    x_BD: Tensor, code: Code, atoms_MD: Tensor, *, nonnegative: bool = False, ranks: Ranks = ALONE
) -> AtomUpdate:
    """Two sweeps, with a refit of the code between them; see the module's docstring.

    Args: nonnegative: keep the coefficients ≥ 0, as the code given has them. Others, Returns: as
        ``update_atoms_sweep``.
    Cost: twice that of ``update_atoms_sweep``, and that of ``refit_code``.
    """
    first = update_atoms_sweep(x_BD, code, atoms_MD, ranks=ranks)
    refitted = refit_code(x_BD, first.code, first.atoms_MD, nonnegative=nonnegative)
    second = update_atoms_sweep(x_BD, refitted, first.atoms_MD, ranks=ranks)
    errors = torch.stack([first.errors[0], second.errors[1]])
    return replace(second, residual_BD=first.residual_BD, errors=errors)


def sweep_sums(x_BD: Tensor, code: Code, atoms_MD: Tensor) -> tuple[Tensor, SweepSums]:
    """The residual under the atoms that coded a batch, or a part of one, and its sums."""
    if backends.on_gpu(x_BD.device):
        # bfloat16 is exact enough for sums over samples: what it rounds averages out.
        dtype = torch.bfloat16 if x_BD.dtype == torch.float32 and has_bfloat16(x_BD.device) else x_BD.dtype
        return _multiplied_sums(x_BD, code, atoms_MD, dtype)
    residual_BD = residual_of(x_BD, code, atoms_MD)
    by_atom = _group_by_atom(code, len(atoms_MD))

    gradient_MD = by_atom.weighted_sums(residual_BD)

    def coupling(first: int, last: int) -> Tensor:
        from ksvd_sae.learning.kernels import coupling_numba, least_squares_numba

        least_squares_numba.use_torch_threads()
        rows_NM = code.values_BK.new_zeros(last - first, last)
        nonzeros = (by_atom.samples, by_atom.values, by_atom.starts_M, by_atom.usage_M)
        arrays = (tensor.numpy() for tensor in (code.values_BK, code.support_BK, *nonzeros))
        coupling_numba.coupling(*arrays, first, rows_NM.numpy())
        return rows_NM

    block = _from_coupling(gradient_MD, coupling)
    return residual_BD, SweepSums(by_atom.energies(), by_atom.usage_M, _energy(residual_BD), block)


def _from_coupling(gradient_MD: Tensor, coupling: Callable[[int, int], Tensor]) -> Any:
    """``SweepSums.block`` from the gradient before anything has moved, and rows of XᵀX as far as the last of them."""

    def block(first: int, last: int, step_MD: Tensor) -> tuple[Tensor, Tensor]:
        rows_NM, gradient_ND = coupling(first, last), gradient_MD[first:last]
        if first:
            gradient_ND = gradient_ND - products(rows_NM[:, :first], step_MD[:first].T)
        return gradient_ND, rows_NM[:, first:]

    return block


def _from_residual(dense_BM: Tensor, residual_BD: Tensor) -> Any:
    """``SweepSums.block`` straight from the residual, which follows the atoms that have moved: no M × M."""
    left_BD, moved = residual_BD, 0

    def block(first: int, last: int, step_MD: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal left_BD, moved
        if first > moved:
            step_ND = step_MD[moved:first].to(left_BD.dtype)
            left_BD, moved = torch.addmm(left_BD, dense_BM[:, moved:first], step_ND, alpha=-1), first
        own_BN = dense_BM[:, first:last]
        return multiplied(own_BN.T, left_BD.T), multiplied(own_BN.T, own_BN.T)

    return block


def _multiplied_sums(x_BD: Tensor, code: Code, atoms_MD: Tensor, dtype: torch.dtype) -> tuple[Tensor, SweepSums]:
    """The same by products of codes that are written out: nothing is gathered, and nothing added in the order of
    atomics, which differs from run to run.

    Args: dtype: of the codes and the residual that are multiplied; their sums are in float32 at least.
    """
    n_atoms, d_in = atoms_MD.shape
    residual_BD, dense_BM = x_BD.new_empty(x_BD.shape, dtype=dtype), x_BD.new_empty(len(x_BD), n_atoms, dtype=dtype)
    if batch_triton.why_not(x_BD.device, x_BD.dtype) is None:
        energy_B = batch_triton.leave(x_BD, atoms_MD, code.values_BK, code.support_BK, residual_BD, dense_BM)
        error = energy_B.sum(dtype=torch.float64)
    else:
        residual_BD.copy_(x_BD - code.reconstruct(atoms_MD))
        dense_BM.copy_(code.to_dense(n_atoms))
        error = _energy(residual_BD)
    used_BK = torch.where(code.values_BK != 0, code.support_BK, n_atoms).long()
    usage_M = torch.zeros(n_atoms + 1, dtype=torch.int64, device=x_BD.device)
    usage_M.scatter_add_(0, used_BK.flatten(), torch.ones_like(used_BK).flatten())
    energy_M = torch.linalg.vector_norm(dense_BM, dim=0, dtype=x_BD.dtype).double().square()
    if n_atoms > _MANY_ATOMS * d_in:
        block = _from_residual(dense_BM, residual_BD)
    else:
        block = _from_coupling(
            multiplied(dense_BM.T, residual_BD.T),
            lambda first, last: multiplied(dense_BM[:, first:last].T, dense_BM[:, :last].T),
        )
    return residual_BD, SweepSums(energy_M, usage_M[:-1], error, block)


def sweep(atoms_MD: Tensor, sums: SweepSums, held: float = HELD) -> MovedAtoms:
    """New atoms from the sums alone: the same wherever the sums are the same."""
    energy_M = sums.energy_M
    stiffness_M = energy_M * (1 + held / sums.usage_M.clamp(min=1).float())
    step_MD = _solved(atoms_MD, sums, stiffness_M)
    raw_MD = atoms_MD + step_MD
    norms_M = torch.linalg.vector_norm(raw_MD, dim=1)
    # An atom whose step leads to zero is best not used: it keeps its direction and loses its coefficients.
    moved_M = (energy_M > 0) & (norms_M > 1e-6)
    fallen = ((2 * stiffness_M - energy_M) * torch.linalg.vector_norm(step_MD, dim=1).double() ** 2).sum()
    return MovedAtoms(
        atoms_MD=torch.where(moved_M[:, None], raw_MD / norms_M.clamp(min=1e-6)[:, None], atoms_MD),
        scale_M=torch.where(moved_M, norms_M, (energy_M <= 0).to(norms_M.dtype)),
        error=sums.error - fallen,
    )


def _solved(atoms_MD: Tensor, sums: SweepSums, stiffness_M: Tensor) -> Tensor:
    """Δ with L·Δ = gradient, L the lower triangle of XᵀX with H on its diagonal; some rows of it at a time.

    0 for unused atoms.
    """
    step_MD = torch.zeros_like(atoms_MD)
    n_atoms = len(step_MD)
    n_rows = max(1, min(_SOLVED_ROWS.get(step_MD.device.type, n_atoms), _COUPLINGS // n_atoms, n_atoms))
    diagonal_M = torch.where(stiffness_M > 0, stiffness_M, 1).to(step_MD.dtype)
    for first in range(0, n_atoms, n_rows):
        last = min(first + n_rows, n_atoms)
        gradient_ND, own_NN = sums.block(first, last, step_MD)
        own_NN.diagonal().copy_(diagonal_M[first:last])
        step_MD[first:last] = torch.linalg.solve_triangular(own_NN, gradient_ND, upper=False)
    return step_MD


@torch.no_grad()
def update_atoms_exact(
    x_BD: Tensor,
    code: Code,
    atoms_MD: Tensor,
    *,
    atom_batch: int = 1,
    generator: torch.Generator | None = None,
    nonnegative: bool = False,
) -> AtomUpdate:
    """Rank-1 SVD of every atom's own residual, ``atom_batch`` atoms in parallel, in random order.

    Args:
        x_BD: the batch, centred.
        code: its code under ``atoms_MD``.
        atom_batch: atoms updated from the same residual; 1 is K-SVD proper.
        generator: order of the atoms (CPU generator); None keeps the order of the rows.
        nonnegative: keep the coefficients ≥ 0, as the code given has them: alternating steps instead of the SVD.
    Returns: AtomUpdate; error_after ≤ error_before up to float32 rounding.
    Numerics: each SVD from the smaller Gram matrix in float64. The sign keeps ⟨new, old⟩ ≥ 0
        (KSVD.jl fixes u[0] ≥ 0: the same product).
    Cost: O(Σ_j |Ω_j|·D·min(|Ω_j|, D)) time: slow, the yardstick rather than the workhorse.
    """
    n_atoms = len(atoms_MD)
    atoms_MD = atoms_MD.clone()
    values_BK = code.values_BK.clone()
    by_atom = _group_by_atom(code, n_atoms)
    residual_BD = residual_of(x_BD, code, atoms_MD)
    first_BD = residual_BD.clone()
    error_before = error = float(_energy(residual_BD))
    used = by_atom.usage_M.nonzero().flatten().tolist()
    if generator is not None:
        used = [used[i] for i in torch.randperm(len(used), generator=generator, device="cpu").tolist()]
    redone = 0
    for start in range(0, len(used), atom_batch):
        batch = used[start : start + atom_batch]
        kept = (atoms_MD.clone(), values_BK.clone(), residual_BD.clone()) if len(batch) > 1 else None
        _update_together(batch, by_atom, atoms_MD, values_BK, residual_BD, nonnegative)
        new_error = float(_energy(residual_BD))
        if kept is not None and new_error > error:
            atoms_MD, values_BK, residual_BD = kept
            redone += 1
            for atom in batch:
                _update_together([atom], by_atom, atoms_MD, values_BK, residual_BD, nonnegative)
            new_error = float(_energy(residual_BD))
        error = new_error
    return AtomUpdate(
        atoms_MD=atoms_MD,
        code=Code(values_BK, code.support_BK),
        usage_M=by_atom.usage_M,
        energy_M=by_atom.energies(),
        residual_BD=first_BD,
        errors=torch.tensor([error_before, error], dtype=torch.float64, device=x_BD.device),
        redone_batches=redone,
    )


def _update_together(
    batch: list[int],
    by_atom: "_ByAtom",
    atoms_MD: Tensor,
    values_BK: Tensor,
    residual_BD: Tensor,
    nonnegative: bool,
) -> None:
    """New atoms and coefficients for ``batch`` from one residual, then the residual, all in place."""
    rank_1 = []
    for atom in batch:
        slots = by_atom.slots(atom)
        samples = slots // values_BK.shape[1]
        old_values = values_BK.view(-1)[slots]
        target = residual_BD[samples] + old_values[:, None] * atoms_MD[atom]
        if nonnegative:
            direction, new_values = _nonnegative_rank_1(target, old_values, atoms_MD[atom])
        else:
            direction = _leading_right_vector(target)
            direction = direction if float(direction @ atoms_MD[atom]) >= 0 else -direction
            new_values = target @ direction
        rank_1.append((atom, slots, samples, old_values, atoms_MD[atom].clone(), direction, new_values))
    for atom, slots, samples, old_values, old_atom, direction, new_values in rank_1:
        change = old_values[:, None] * old_atom - new_values[:, None] * direction
        residual_BD.index_add_(0, samples, change)
        atoms_MD[atom] = direction
        values_BK.view(-1)[slots] = new_values


def _nonnegative_rank_1(matrix_ND: Tensor, values_N: Tensor, atom_D: Tensor) -> tuple[Tensor, Tensor]:
    """(unit d, x ≥ 0) with ‖matrix − x·d‖ no larger than with the ones given.

    Each half of a step is the best answer to the other: d ∝ xᵀ·matrix, then x = max(0, matrix·d).
    """
    for _ in range(_ALTERNATIONS):
        direction_D = values_N @ matrix_ND
        norm = torch.linalg.vector_norm(direction_D)
        if float(norm) == 0:
            break
        atom_D = direction_D / norm
        values_N = (matrix_ND @ atom_D).clamp(min=0)
    return atom_D, values_N


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
        return self._summed(self.samples, self.values.to(rows_BD.dtype), rows_BD)

    def energies(self) -> Tensor:
        """Σ of each atom's squared coefficients, (M,) float64."""
        squares = self.values.double() ** 2
        return self._summed(torch.arange(len(squares), device=squares.device), None, squares[:, None])[:, 0]

    def _summed(self, rows: Tensor, weights: Tensor | None, table_ND: Tensor) -> Tensor:
        """Σ weights·table[rows] over each atom's nonzeros, in pieces of _PIECE, then over its pieces.

        One bag is one serial loop on CUDA: an atom that all samples use would keep the others waiting. Two stages in
        a fixed order give the same bits every time, which index_add_'s atomics do not.
        """
        pieces_M = (self.usage_M + _PIECE - 1) // _PIECE
        first_M = torch.cumsum(pieces_M, 0) - pieces_M
        atom_P = torch.repeat_interleave(pieces_M)
        within_P = torch.arange(len(atom_P), device=atom_P.device) - first_M[atom_P]
        starts_P = self.starts_M[atom_P] + _PIECE * within_P
        sums_PD = F.embedding_bag(rows, table_ND, starts_P, per_sample_weights=weights, mode="sum")
        return F.embedding_bag(torch.arange(len(atom_P), device=atom_P.device), sums_PD, first_M, mode="sum")


def _group_by_atom(code: Code, n_atoms: int) -> _ByAtom:
    k = code.values_BK.shape[1]
    values, atoms = code.values_BK.flatten(), code.support_BK.flatten()
    # Unused slots go last, as if of an atom after the last.
    atoms = torch.where(values != 0, atoms, n_atoms)
    # As int32, which torch sorts 40 times as fast on the CPU as int64 (one-off).
    atoms, order = torch.sort(atoms.int(), stable=True)
    ends_M = torch.searchsorted(atoms, torch.arange(n_atoms, dtype=torch.int32, device=atoms.device), right=True)
    order = order[: int(ends_M[-1])]
    usage_M = torch.diff(ends_M, prepend=ends_M.new_zeros(1))
    return _ByAtom(order, values[order], order // k, ends_M - usage_M, usage_M)


def _energy(rows_BD: Tensor) -> Tensor:
    """Σ rows², summed in float64 over row norms."""
    return torch.linalg.vector_norm(rows_BD, dim=1).double().pow(2).sum()
