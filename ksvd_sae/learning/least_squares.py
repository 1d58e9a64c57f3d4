"""Least squares on the support of a code: coefficients that fit best once the atoms are chosen.

Notation as in sparse_coding.py; C rows of a batch, K = k slots. Everything k × k is solved in float64.
"""

import torch
from torch import Tensor

from ksvd_sae.device import own_modes
from ksvd_sae.errors import ShapeError
from ksvd_sae.learning.checks import checked_gram, checked_pair
from ksvd_sae.learning.code import Code
from ksvd_sae.learning.gram import Gram

# The refit gathers rows × k atoms: few rows keep them in a CPU's cache, many keep a GPU busy.
_GATHERED_BYTES = {"cpu": 0, "cuda": 1 << 30}
_FEWEST_ROWS = 512
# Gram matrices of supports held at a time, on CUDA.
_GRAM_BYTES = 1 << 30
# 1 − cos² of an atom with the span of the others, below which a Gram matrix in float32 says too little.
DEPENDENT = 1e-3


@own_modes()
@torch.no_grad()
def refit_code(
    x_BD: Tensor, code: Code, atoms_MD: Tensor, gram_MM: Gram | None = None, *, nonnegative: bool = False
) -> Code:
    """Least-squares coefficients on the support of ``code``; the error can only fall.

    Solved from the entries of the Gram matrix. Where the atoms of a support nearly depend on each other, float32
    entries are not enough: there the atoms themselves are solved for, by least norm.

    Args: nonnegative: least squares under z ≥ 0 (Lawson & Hanson 1974); the code's coefficients must be ≥ 0.
    Raises: ShapeError if the code is not of these samples; else as ``matching_pursuit``.
    """
    x_BD, atoms_MD = checked_pair(x_BD, atoms_MD, code.values_BK.shape[1], "refit_code")
    if len(code) != len(x_BD):
        raise ShapeError("refit_code: the code is of other samples", got=f"{len(code)} rows", limit=f"{len(x_BD)}")
    gram_MM = checked_gram(atoms_MD, gram_MM, "refit_code")
    values_BK = torch.zeros_like(code.values_BK)
    gathered = values_BK.shape[1] * x_BD.shape[1] * x_BD.element_size()
    n_rows = max(_FEWEST_ROWS, _GATHERED_BYTES.get(x_BD.device.type, 0) // gathered)
    for start in range(0, len(code), n_rows):
        rows = slice(start, start + n_rows)
        support_CK, used_CK = code.support_BK[rows].long(), code.values_BK[rows] != 0
        gram_CKK = support_gram(gram_MM, support_CK, used_CK)
        # x·atomᵀ for the support only: C·K·D products, gathered in float32.
        target_CK = torch.einsum("cd,ckd->ck", x_BD[rows], atoms_MD[support_CK]).double() * used_CK
        dependent_C = _dependent(gram_CKK)
        if bool(dependent_C.any()):
            own_SKD = atoms_MD[support_CK[dependent_C]].double() * used_CK[dependent_C][..., None]
            unused_SKK = torch.diag_embed((~used_CK[dependent_C]).double())
            gram_CKK[dependent_C] = own_SKD @ own_SKD.mT + unused_SKK
            target_CK[dependent_C] = (own_SKD @ x_BD[rows][dependent_C].double()[..., None]).squeeze(-1)
        if nonnegative:
            solved_CK = nonnegative_least_squares(gram_CKK, target_CK, used_CK)
        else:
            solved_CK = _solve(gram_CKK, target_CK)
            if bool(dependent_C.any()):
                solved_CK[dependent_C] = (
                    torch.linalg.pinv(own_SKD.mT, rtol=1e-7) @ x_BD[rows][dependent_C].double()[..., None]
                ).squeeze(-1)
        values_BK[rows] = (solved_CK * used_CK).to(values_BK.dtype)
    return Code(values_BK, code.support_BK)


def refit_from_left(gram_MM: Gram, code: Code, left_BK: Tensor, nonnegative: bool) -> Tensor:
    """Least-squares coefficients, into the code, from what the pursuit left along the atoms of each support.

    No sample and no atom is gathered: z + G⁻¹·left, as the products that z was to have are G·z + left.

    Args: left_BK: products of the residual with the atoms of the support.
    Returns: the least squared pivot of each support's Gram matrix, (B,): below ``DEPENDENT`` the coefficients are not
        to be trusted.
    """
    k = left_BK.shape[1]
    n_rows = max(1, _GRAM_BYTES // (8 * k * k))
    pivots_B = torch.empty(len(code), dtype=torch.float64, device=left_BK.device)
    for start in range(0, len(code), n_rows):
        rows = slice(start, start + n_rows)
        values_CK = code.values_BK[rows].double()
        used_CK = values_CK != 0
        gram_CKK = support_gram(gram_MM, code.support_BK[rows].long(), used_CK)
        factor_CKK, failed_C = torch.linalg.cholesky_ex(gram_CKK)
        pivots_C = factor_CKK.diagonal(dim1=1, dim2=2).amin(dim=1).square()
        pivots_B[rows] = torch.where(failed_C == 0, pivots_C, 0)
        if nonnegative:
            target_CK = left_BK[rows].double() * used_CK + (gram_CKK @ values_CK[..., None]).squeeze(-1)
            code.values_BK[rows] = nonnegative_least_squares(gram_CKK, target_CK, used_CK).to(left_BK.dtype)
        else:
            step_CK1 = torch.cholesky_solve((left_BK[rows].double() * used_CK)[..., None], factor_CKK)
            code.values_BK[rows] += (step_CK1.squeeze(-1) * used_CK).to(left_BK.dtype)
    return pivots_B


def support_gram(gram_MM: Gram, support_CK: Tensor, used_CK: Tensor) -> Tensor:
    """Gram matrices of the used atoms of each row, (C, K, K) float64; unused slots are rows of the identity."""
    both_CKK = used_CK[:, :, None] & used_CK[:, None, :]
    identity_KK = torch.eye(support_CK.shape[1], dtype=torch.float64, device=support_CK.device)
    if isinstance(gram_MM, Tensor):
        entries_CKK = gram_MM[support_CK[:, :, None], support_CK[:, None, :]].double()
    else:
        entries_CKK = gram_MM.among(support_CK)
    return torch.where(both_CKK, entries_CKK, identity_KK)


def _dependent(gram_CKK: Tensor) -> Tensor:
    factor_CKK, failed_C = torch.linalg.cholesky_ex(gram_CKK)
    pivots_C = factor_CKK.diagonal(dim1=1, dim2=2).amin(dim=1).square()
    return (failed_C != 0) | ~(pivots_C > DEPENDENT)


def _solve(gram_CKK: Tensor, target_CK: Tensor) -> Tensor:
    factor_CKK, _ = torch.linalg.cholesky_ex(gram_CKK)
    return torch.cholesky_solve(target_CK[..., None], factor_CKK).squeeze(-1)


def nonnegative_least_squares(gram_CKK: Tensor, target_CK: Tensor, used_CK: Tensor) -> Tensor:
    """min zᵀGz − 2 targetᵀz, z ≥ 0, row by row (Lawson & Hanson 1974), on the used slots; (C, K) float64."""
    z_CK, passive_CK = torch.zeros_like(target_CK), torch.zeros_like(used_CK)
    tiny_C = 1e-12 * target_CK.abs().amax(dim=1)
    for _ in range(3 * target_CK.shape[1]):
        gradient_CK = target_CK - (gram_CKK @ z_CK[..., None]).squeeze(-1)
        best_C, entering_C = gradient_CK.masked_fill(~used_CK | passive_CK, -torch.inf).max(dim=1)
        moving_C = best_C > tiny_C
        if not bool(moving_C.any()):
            break
        passive_CK[moving_C, entering_C[moving_C]] = True
        z_CK, passive_CK = settle(gram_CKK, target_CK, z_CK, passive_CK)
    return z_CK


def settle(gram_CKK: Tensor, target_CK: Tensor, z_CK: Tensor, passive_CK: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares on the passive slots, those that turn negative leave; the inner loop of Lawson & Hanson.

    Args: z_CK: nonnegative coefficients before the newest passive slots came.
    Returns: new z_CK (0 off the passive slots) and passive_CK.
    """
    identity_KK = torch.eye(z_CK.shape[1], dtype=gram_CKK.dtype, device=gram_CKK.device)
    for _ in range(z_CK.shape[1] + 1):
        both_CKK = passive_CK[:, :, None] & passive_CK[:, None, :]
        solved_CK = _solve(torch.where(both_CKK, gram_CKK, identity_KK), target_CK * passive_CK)
        bad_CK = passive_CK & ~(solved_CK > 0)
        bad_C = bad_CK.any(dim=1)
        if not bool(bad_C.any()):
            return solved_CK * passive_CK, passive_CK
        ratio_CK = torch.where(bad_CK, z_CK / (z_CK - solved_CK).clamp(min=1e-300), torch.inf)
        step_C, leaving_C = ratio_CK.clamp(min=0).min(dim=1)
        stepped_CK = z_CK + torch.where(bad_C, step_C, 1)[:, None] * (solved_CK - z_CK)
        passive_CK = passive_CK & ~(bad_CK & (stepped_CK <= 1e-12))
        # Whatever rounding says, the one that reached the boundary first leaves.
        passive_CK[bad_C, leaving_C[bad_C]] = False
        z_CK = stepped_CK.clamp(min=0) * passive_CK
    raise AssertionError("settle: a slot leaves at every round, so k + 1 rounds are enough")
