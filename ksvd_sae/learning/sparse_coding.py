"""Sparse coders: samples and unit atoms in, at most k (value, atom) pairs a sample out.

Notation: B samples, D = d_in, M atoms, K = k. ``x`` is the centred sample, ``z`` its code,
``r = x − z·atoms`` the residual, ``p = r·atomsᵀ`` the products that the greedy choice looks at.
With the Gram matrix ``G = atoms·atomsᵀ`` the products follow a step without the residual:
``p ← p − a·G_j`` after atom j took coefficient a.

Samples are coded in chunks so that the products, the one array of size chunk × M, stay within
``memory_bytes`` whatever the number of samples.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ksvd_sae.errors import DictionaryError, ShapeError
from ksvd_sae.learning.checks import checked_gram, checked_pair

Coder = Literal["mp", "mp_refit", "omp", "projection"]
CODERS: tuple[Coder, ...] = ("mp", "mp_refit", "omp", "projection")
Backend = Literal["auto", "torch", "numba"]
# The products of a chunk are read and written once a step: they should stay in the CPU's cache.
_CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 1 << 30}
# The refit gathers rows × k atoms: few rows keep them in cache.
_REFIT_ROWS = 512
# 1 − cos² of an atom with the span of the others, below which a Gram matrix in float32 says too little.
_DEPENDENT = 1e-3


@dataclass(frozen=True)
class Code:
    """A sparse code: row i is Σ_s values[i, s]·atoms[support[i, s]].

    Attributes:
        values_BK: signed coefficients (float); unused slots hold exactly 0.
        support_BK: atom indices (int32), distinct among the used slots of a row; unused slots hold 0.
    """

    values_BK: Tensor
    support_BK: Tensor

    def __len__(self) -> int:
        return len(self.values_BK)

    def l0(self) -> Tensor:
        """Nonzero coefficients a sample, (B,)."""
        return (self.values_BK != 0).sum(dim=1)

    def reconstruct(self, atoms_MD: Tensor) -> Tensor:
        """Σ values·atoms, (B, D), in the atoms' dtype."""
        return F.embedding_bag(
            self.support_BK, atoms_MD, per_sample_weights=self.values_BK.to(atoms_MD.dtype), mode="sum"
        )

    def to_dense(self, n_atoms: int) -> Tensor:
        """The code as (B, M): B·M floats, for small B only."""
        dense_BM = self.values_BK.new_zeros(len(self), n_atoms)
        return dense_BM.scatter_add_(1, self.support_BK.long(), self.values_BK)

    def usage(self, n_atoms: int) -> Tensor:
        """How many samples use each atom, either sign, (M,) int64."""
        used = self.support_BK[self.values_BK != 0].long()
        return torch.bincount(used, minlength=n_atoms)


def mp_backend(device: torch.device, backend: Backend = "auto", dtype: torch.dtype = torch.float32) -> str:
    """The backend that matching pursuit runs on there: 'numba' on a CPU that has it (in float32), else 'torch'.

    Raises: ShapeError for a backend that is forced where it cannot run, with the reason.
    """
    reasons = [
        "numba is not installed" if find_spec("numba") is None else None,
        f"it runs on the CPU, not on {device.type}" if device.type != "cpu" else None,
        f"it computes in float32, not {dtype}" if dtype != torch.float32 else None,
    ]
    reason = next((r for r in reasons if r), None)
    if backend == "numba" and reason:
        raise ShapeError(f"matching_pursuit: backend 'numba' cannot run: {reason}", cure="use backend 'auto'")
    if backend not in ("auto", "torch", "numba"):
        raise ShapeError(f"matching_pursuit: no backend of the name {backend!r}", limit="auto, torch, numba")
    return "torch" if backend == "torch" or reason else "numba"


def encode(
    x_BD: Tensor,
    atoms_MD: Tensor,
    k: int,
    *,
    coder: Coder = "mp",
    gram_MM: Tensor | None = None,
    max_steps: int | None = None,
    rtol: float = 0.0,
) -> Code:
    """Code with the coder of that name: 'mp', 'mp_refit', 'omp', or 'projection' (orthonormal atoms)."""
    if coder == "omp":
        return orthogonal_matching_pursuit(x_BD, atoms_MD, k, gram_MM=gram_MM, rtol=rtol)
    if coder == "projection":
        return project(x_BD, atoms_MD)
    if coder not in CODERS:
        raise ShapeError(f"encode: no coder of the name {coder!r}", limit=", ".join(CODERS))
    return matching_pursuit(
        x_BD, atoms_MD, k, gram_MM=gram_MM, max_steps=max_steps, rtol=rtol, refit=coder == "mp_refit"
    )


def _at_any_scale(coder: Callable[..., Code]) -> Callable[..., Code]:
    """Code tiny or huge samples at a scale where their squares neither vanish nor overflow.

    Multiplying by a power of two is exact, so it changes no bit of the code but its exponent.
    """

    @wraps(coder)
    def wrapper(x_BD: Tensor, *args: Any, **kwargs: Any) -> Code:
        largest = float(x_BD.abs().max()) if x_BD.numel() and x_BD.is_floating_point() else 1.0
        if not (0 < largest < 1e-12 or 1e12 < largest < float("inf")):
            return coder(x_BD, *args, **kwargs)
        # In two steps: the factor itself may lie outside float32.
        exponent = math.frexp(largest)[1]
        halves = (exponent // 2, exponent - exponent // 2)
        code = coder(x_BD * 2.0 ** -halves[0] * 2.0 ** -halves[1], *args, **kwargs)
        return Code(code.values_BK * 2.0 ** halves[0] * 2.0 ** halves[1], code.support_BK)

    return wrapper


@_at_any_scale
@torch.no_grad()
def matching_pursuit(
    x_BD: Tensor,
    atoms_MD: Tensor,
    k: int,
    *,
    gram_MM: Tensor | None = None,
    max_steps: int | None = None,
    rtol: float = 0.0,
    refit: bool = False,
    memory_bytes: int | None = None,
    backend: Backend = "auto",
) -> Code:
    """Code each row greedily with at most k atoms.

    min ‖x − z·atoms‖²  s.t.  ‖z‖₀ ≤ k.  Source: Mallat & Zhang 1993; Gram form as in KSVD.jl. An
    atom may be picked again: its coefficients add up.
    Differs from KSVD.jl: stops when a (k+1)-th atom would be picked, rather than adding it and then
    dropping the smallest.

    Args:
        x_BD: centred activations (any scale: the code of c·x is c times the code of x).
        atoms_MD: unit rows (checked to 1e-4).
        k: most distinct atoms a sample.
        gram_MM: atoms·atomsᵀ if at hand.
        max_steps: most steps a sample; default 4k as in KSVD.jl.
        rtol: stop a sample once ‖r‖ ≤ rtol·‖x‖.
        refit: replace the coefficients by least squares on the support found.
        memory_bytes: bound on the products of one chunk.
        backend: see ``mp_backend``.
    Returns: Code with signed values in float32 (float64 for float64 input).
    Raises: ShapeError, DictionaryError, ActivationError (NaN or infinity in x).
    Numerics: float32 accumulation; ties go to the lowest index. Cost: O(B·M·(D + steps)) time.
    """
    x_BD, atoms_MD = checked_pair(x_BD, atoms_MD, k, "matching_pursuit")
    gram_MM = checked_gram(atoms_MD, gram_MM, "matching_pursuit")
    steps = 4 * k if max_steps is None else max_steps
    if steps < 1:
        raise ShapeError("matching_pursuit: max_steps must be at least 1", got=steps)
    code = _empty_code(x_BD, k)
    if mp_backend(x_BD.device, backend, x_BD.dtype) == "numba":
        from ksvd_sae.learning.kernels import mp_numba

        gram_MM = gram_MM.contiguous()
        for rows in _chunks(x_BD, atoms_MD, memory_bytes, arrays=1):
            x_CD, values_CK, support_CK = x_BD[rows], code.values_BK[rows], code.support_BK[rows]
            energy_C = (x_CD * x_CD).sum(dim=1)
            mp_numba.pursue(x_CD @ atoms_MD.T, energy_C, gram_MM, k, steps, rtol, values_CK, support_CK)
    else:
        for rows in _chunks(x_BD, atoms_MD, memory_bytes, arrays=3):
            _pursue_chunk(x_BD[rows], atoms_MD, gram_MM, k, steps, rtol, code.values_BK[rows], code.support_BK[rows])
    return refit_code(x_BD, code, atoms_MD, gram_MM) if refit else code


def _pursue_chunk(
    x_CD: Tensor,
    atoms_MD: Tensor,
    gram_MM: Tensor,
    k: int,
    max_steps: int,
    rtol: float,
    values_out_CK: Tensor,
    support_out_CK: Tensor,
) -> None:
    """Matching pursuit on one chunk, written into the last two arguments.

    Finished samples are taken out as soon as they are half of the chunk: the few that pick atoms
    again would otherwise cost as much as all.
    """
    products_CM = x_CD @ atoms_MD.T
    left_C = (x_CD * x_CD).sum(dim=1)
    enough_C = left_C * rtol**2
    values_CK = torch.zeros_like(values_out_CK)
    support_CK = torch.zeros_like(support_out_CK, dtype=torch.int64)
    count_C = torch.zeros_like(left_C, dtype=torch.int64)
    slots_K = torch.arange(k, device=x_CD.device)
    rows_C = torch.arange(len(x_CD), device=x_CD.device)
    active_C = left_C > 0
    for _ in range(max_steps):
        atom_C = products_CM.abs().argmax(dim=1)
        a_C = products_CM.gather(1, atom_C[:, None]).squeeze(1)
        here_CK = (support_CK == atom_C[:, None]) & (slots_K < count_C[:, None])
        seen_C = here_CK.any(dim=1)
        active_C = active_C & (a_C != 0) & (left_C > enough_C) & (seen_C | (count_C < k))
        n_active = int(active_C.sum())
        if n_active == 0:
            break
        # A finished sample takes coefficient 0, which leaves its products as they are.
        a_C = torch.where(active_C, a_C, 0)
        slot_C1 = torch.where(seen_C, here_CK.int().argmax(dim=1), count_C).clamp_(max=k - 1)[:, None]
        values_CK.scatter_add_(1, slot_C1, a_C[:, None])
        is_new_C = active_C & ~seen_C
        support_CK.scatter_(1, slot_C1, torch.where(is_new_C, atom_C, support_CK.gather(1, slot_C1)[:, 0])[:, None])
        count_C += is_new_C
        left_C = left_C - a_C * a_C
        products_CM.addcmul_(gram_MM[atom_C], a_C[:, None], value=-1)
        if 2 * n_active < len(rows_C):
            values_out_CK[rows_C], support_out_CK[rows_C] = values_CK, support_CK.int()
            products_CM, left_C, enough_C = products_CM[active_C], left_C[active_C], enough_C[active_C]
            values_CK, support_CK, count_C = values_CK[active_C], support_CK[active_C], count_C[active_C]
            rows_C, active_C = rows_C[active_C], active_C[active_C]
    values_out_CK[rows_C], support_out_CK[rows_C] = values_CK, support_CK.int()


@_at_any_scale
@torch.no_grad()
def orthogonal_matching_pursuit(
    x_BD: Tensor,
    atoms_MD: Tensor,
    k: int,
    *,
    gram_MM: Tensor | None = None,
    rtol: float = 0.0,
    memory_bytes: int | None = None,
) -> Code:
    """Code each row greedily with at most k atoms, coefficients by least squares after every pick.

    Source: Pati et al. 1993; the orthonormalised picks u_s = (atom_j − Σ_l w_l u_l)/L_ss and their
    products with all atoms are kept, so a step costs one pass over s·M products (v2 in Zhu et al.
    2020) and the triangular L of the progressive Cholesky factorisation gives the coefficients.

    Args, Returns, Raises: as ``matching_pursuit``. A sample stops early when its residual is
        orthogonal to all atoms, or when the best atom depends on those it already has.
    Cost: O(B·M·(D + k²)) time, chunk·M·(k + 2) floats.
    """
    x_BD, atoms_MD = checked_pair(x_BD, atoms_MD, k, "orthogonal_matching_pursuit")
    gram_MM = checked_gram(atoms_MD, gram_MM, "orthogonal_matching_pursuit")
    code = _empty_code(x_BD, k)
    for rows in _chunks(x_BD, atoms_MD, memory_bytes, arrays=k + 3):
        code.values_BK[rows], code.support_BK[rows] = _omp_chunk(x_BD[rows], atoms_MD, gram_MM, k, rtol)
    return code


def _omp_chunk(x_CD: Tensor, atoms_MD: Tensor, gram_MM: Tensor, k: int, rtol: float) -> tuple[Tensor, Tensor]:
    n, n_atoms = len(x_CD), len(atoms_MD)
    products_CM = x_CD @ atoms_MD.T
    left_C = (x_CD * x_CD).sum(dim=1)
    enough_C = left_C * max(rtol**2, torch.finfo(x_CD.dtype).eps ** 2)
    active_C = left_C > 0
    # Along the orthonormal picks: products with all atoms, coordinates of x, and L with atoms = L·u.
    orthonormal_CKM = x_CD.new_empty(n, k, n_atoms)
    along_CK = x_CD.new_zeros(n, k)
    cholesky_CKK = torch.eye(k, dtype=x_CD.dtype, device=x_CD.device).repeat(n, 1, 1)
    support_CK = torch.zeros(n, k, dtype=torch.int64, device=x_CD.device)
    used_CK = torch.zeros(n, k, dtype=torch.bool, device=x_CD.device)
    picked_CM = torch.zeros(n, n_atoms, dtype=torch.bool, device=x_CD.device)
    dependent = 4 * torch.finfo(x_CD.dtype).eps ** 0.5
    for step in range(k):
        atom_C = products_CM.abs().masked_fill_(picked_CM, -1).argmax(dim=1)
        product_C = products_CM.gather(1, atom_C[:, None]).squeeze(1)
        w_Cs = orthonormal_CKM[:, :step].gather(2, atom_C[:, None, None].expand(-1, step, 1)).squeeze(2)
        w_Cs = w_Cs * used_CK[:, :step]
        pivot_C = (gram_MM[atom_C, atom_C] - (w_Cs * w_Cs).sum(dim=1)).clamp_(min=0).sqrt_()
        active_C = active_C & (left_C > enough_C) & (product_C != 0) & (pivot_C > dependent)
        if not bool(active_C.any()):
            break
        pivot_C = torch.where(active_C, pivot_C, 1)
        mine_CM = gram_MM[atom_C]
        if step:
            mine_CM = torch.baddbmm(mine_CM[:, None], w_Cs[:, None], orthonormal_CKM[:, :step], alpha=-1).squeeze(1)
        mine_CM = mine_CM / pivot_C[:, None]
        # A stopped sample's row is junk from here on: used_CK masks it wherever it is read.
        orthonormal_CKM[:, step] = torch.where(active_C[:, None], mine_CM, 0)
        z_C = torch.where(active_C, product_C / pivot_C, 0)
        products_CM = torch.addcmul(products_CM, orthonormal_CKM[:, step], z_C[:, None], value=-1)
        along_CK[:, step], left_C = z_C, left_C - z_C * z_C
        cholesky_CKK[:, step, :step] = torch.where(active_C[:, None], w_Cs, 0)
        cholesky_CKK[:, step, step] = pivot_C
        support_CK[:, step], used_CK[:, step] = torch.where(active_C, atom_C, 0), active_C
        picked_CM.scatter_(1, atom_C[:, None], True)
    values_CK = torch.linalg.solve_triangular(cholesky_CKK.mT, along_CK[..., None], upper=True).squeeze(-1)
    return values_CK * used_CK, support_CK.int()


@torch.no_grad()
def refit_code(x_BD: Tensor, code: Code, atoms_MD: Tensor, gram_MM: Tensor | None = None) -> Code:
    """Least-squares coefficients on the support of ``code``; the error can only fall.

    Solved by Cholesky in float64 from the entries of the Gram matrix. Where the atoms of a support nearly depend on
    each other, float32 entries are not enough: there the atoms themselves are solved for, by least norm.

    Raises: ShapeError if the code is not of these samples; else as ``matching_pursuit``.
    """
    x_BD, atoms_MD = checked_pair(x_BD, atoms_MD, code.values_BK.shape[1], "refit_code")
    if len(code) != len(x_BD):
        raise ShapeError("refit_code: the code is of other samples", got=f"{len(code)} rows", limit=f"{len(x_BD)}")
    gram_MM = checked_gram(atoms_MD, gram_MM, "refit_code")
    k = code.values_BK.shape[1]
    values_BK = torch.zeros_like(code.values_BK)
    identity_KK = torch.eye(k, dtype=torch.float64, device=x_BD.device)
    for start in range(0, len(code), _REFIT_ROWS):
        rows = slice(start, start + _REFIT_ROWS)
        support_CK, used_CK = code.support_BK[rows].long(), code.values_BK[rows] != 0
        both_CKK = used_CK[:, :, None] & used_CK[:, None, :]
        gram_CKK = torch.where(both_CKK, gram_MM[support_CK[:, :, None], support_CK[:, None, :]].double(), identity_KK)
        # x·atomᵀ for the support only: C·K·D products, gathered in float32.
        target_CK = torch.einsum("cd,ckd->ck", x_BD[rows], atoms_MD[support_CK]).double() * used_CK
        factor_CKK, failed_C = torch.linalg.cholesky_ex(gram_CKK)
        solved_CK = torch.cholesky_solve(target_CK[..., None], factor_CKK).squeeze(-1)
        pivots_C = factor_CKK.diagonal(dim1=1, dim2=2).amin(dim=1).square()
        dependent_C = (failed_C != 0) | ~(pivots_C > _DEPENDENT)
        if bool(dependent_C.any()):
            own_SKD = atoms_MD[support_CK[dependent_C]].double() * used_CK[dependent_C][..., None]
            solved_CK[dependent_C] = (
                torch.linalg.pinv(own_SKD.mT, rtol=1e-7) @ x_BD[rows][dependent_C].double()[..., None]
            ).squeeze(-1)
        values_BK[rows] = (solved_CK * used_CK).to(values_BK.dtype)
    return Code(values_BK, code.support_BK)


@torch.no_grad()
def project(x_BD: Tensor, atoms_MD: Tensor) -> Code:
    """Least squares on orthonormal atoms: all M coefficients are the products (PCA's code).

    Raises: DictionaryError if the atoms are not orthonormal to 1e-2 (what bfloat16 leaves of them).
    """
    x_BD, atoms_MD = checked_pair(x_BD, atoms_MD, 1, "project")
    gap = (atoms_MD @ atoms_MD.T - torch.eye(len(atoms_MD), dtype=x_BD.dtype, device=x_BD.device)).abs().max()
    if not float(gap) <= 1e-2:
        raise DictionaryError("project: atoms are not orthonormal", got=f"largest product off by {float(gap):.2g}")
    support_BK = torch.arange(len(atoms_MD), dtype=torch.int32, device=x_BD.device).repeat(len(x_BD), 1)
    return Code(x_BD @ atoms_MD.T, support_BK)


def _empty_code(x_BD: Tensor, k: int) -> Code:
    return Code(x_BD.new_zeros(len(x_BD), k), torch.zeros(len(x_BD), k, dtype=torch.int32, device=x_BD.device))


def _chunks(x_BD: Tensor, atoms_MD: Tensor, memory_bytes: int | None, arrays: int) -> list[slice]:
    """Row ranges such that ``arrays`` arrays of chunk × M fit into ``memory_bytes``."""
    budget = memory_bytes or _CHUNK_BYTES.get(x_BD.device.type, 64 << 20)
    size = max(1, budget // (arrays * len(atoms_MD) * x_BD.element_size()))
    return [slice(start, start + size) for start in range(0, len(x_BD), size)]
