"""Pursuits in plain torch: any device, float32 or float64, a chunk of samples step by step.

Arguments and results as in pursuit_numba.py: products of a chunk in, values and support (zeroed) filled in place.
"""

import torch
from torch import Tensor

from ksvd_sae.learning.gram import Gram
from ksvd_sae.learning.kernels import limits
from ksvd_sae.learning.least_squares import settle, support_gram


def pursue(
    products_CM: Tensor,
    energy_C: Tensor,
    floor_C: Tensor,
    gram_MM: Gram,
    k: int,
    max_steps: int,
    rtol: float,
    nonnegative: bool,
    values_out_CK: Tensor,
    support_out_CK: Tensor,
    left_out_CK: Tensor,
) -> None:
    """Matching pursuit on one chunk, written into the last three arguments.

    Finished samples are taken out as soon as they are half of the chunk: the few that pick atoms again would otherwise
    cost as much as all.
    """
    left_C, enough_C = energy_C, energy_C * rtol**2
    values_CK, support_CK = torch.zeros_like(values_out_CK), torch.zeros_like(support_out_CK, dtype=torch.int64)
    count_C = torch.zeros_like(left_C, dtype=torch.int64)
    slots_K = torch.arange(k, device=products_CM.device)
    rows_C = torch.arange(len(products_CM), device=products_CM.device)
    active_C = left_C > 0

    def write() -> None:
        used_CK = slots_K < count_C[:, None]
        values_out_CK[rows_C], support_out_CK[rows_C] = values_CK, support_CK.int()
        left_out_CK[rows_C] = products_CM.gather(1, support_CK) * used_CK

    for _ in range(max_steps):
        atom_C = (products_CM if nonnegative else products_CM.abs()).argmax(dim=1)
        a_C = products_CM.gather(1, atom_C[:, None]).squeeze(1)
        here_CK = (support_CK == atom_C[:, None]) & (slots_K < count_C[:, None])
        seen_C = here_CK.any(dim=1)
        active_C = active_C & (a_C.abs() > floor_C) & (left_C > enough_C) & (left_C > 0) & (seen_C | (count_C < k))
        if nonnegative:
            active_C = active_C & (a_C > 0)
        n_active = int(active_C.sum())
        if n_active == 0:
            break
        # A finished sample takes coefficient 0, which leaves its products as they are.
        a_C = torch.where(active_C, a_C, 0)
        slot_C1 = torch.where(seen_C, here_CK.int().argmax(dim=1), count_C).clamp_(max=k - 1)[:, None]
        values_CK.scatter_add_(1, slot_C1, a_C[:, None])
        is_new_C = active_C & ~seen_C
        support_CK.scatter_(1, slot_C1, torch.where(is_new_C, atom_C, support_CK.gather(1, slot_C1)[:, 0])[:, None])
        count_C = count_C + is_new_C
        left_C = left_C - a_C * a_C
        products_CM.addcmul_(gram_MM[atom_C], a_C[:, None], value=-1)
        if 2 * n_active < len(rows_C):
            write()
            products_CM, left_C = products_CM[active_C], left_C[active_C]
            enough_C, floor_C = enough_C[active_C], floor_C[active_C]
            values_CK, support_CK, count_C = values_CK[active_C], support_CK[active_C], count_C[active_C]
            rows_C, active_C = rows_C[active_C], active_C[active_C]
    write()


def pursue_orthogonally(
    products_CM: Tensor,
    energy_C: Tensor,
    floor_C: Tensor,
    gram_MM: Gram,
    k: int,
    rtol: float,
    nonnegative: bool,
    by_error: bool,
    values_out_CK: Tensor,
    support_out_CK: Tensor,
) -> None:
    """Orthogonal matching pursuit on one chunk, written into the last two arguments.

    by_error: pick what lowers the error of the refitted code the most.
    """
    enough_C = energy_C * max(rtol**2, torch.finfo(energy_C.dtype).eps ** 2)
    if nonnegative:
        code = _pursue_nonnegative(products_CM, energy_C, enough_C, floor_C, gram_MM, k)
    else:
        code = _pursue_signed(products_CM, energy_C, enough_C, floor_C, gram_MM, k, by_error)
    values_out_CK[:], support_out_CK[:] = code


def _pursue_signed(
    products_CM: Tensor, left_C: Tensor, enough_C: Tensor, floor_C: Tensor, gram_MM: Gram, k: int, by_error: bool
) -> tuple[Tensor, Tensor]:
    n, n_atoms = products_CM.shape
    active_C = left_C > 0
    # Along the orthonormal picks: products with all atoms, coordinates of x, and L with atoms = L·u.
    orthonormal_CKM = products_CM.new_empty(n, k, n_atoms)
    along_CK = products_CM.new_zeros(n, k)
    cholesky_CKK = torch.eye(k, dtype=products_CM.dtype, device=products_CM.device).repeat(n, 1, 1)
    support_CK = torch.zeros(n, k, dtype=torch.int64, device=products_CM.device)
    used_CK = torch.zeros(n, k, dtype=torch.bool, device=products_CM.device)
    picked_CM = torch.zeros(n, n_atoms, dtype=torch.bool, device=products_CM.device)
    eps = torch.finfo(products_CM.dtype).eps
    dependent, least_new = limits.dependent(eps), limits.least_new(eps)
    # By error: what of each atom's square the picks leave.
    diagonal_M = gram_MM.diagonal()
    new_CM = diagonal_M.repeat(n, 1) if by_error else None
    for step in range(k):
        size_CM = products_CM.abs()
        if new_CM is not None and step:
            size_CM = size_CM.square() / new_CM.clamp(min=least_new)
        atom_C = size_CM.masked_fill_(picked_CM, -1).argmax(dim=1)
        product_C = products_CM.gather(1, atom_C[:, None]).squeeze(1)
        w_Cs = orthonormal_CKM[:, :step].gather(2, atom_C[:, None, None].expand(-1, step, 1)).squeeze(2)
        w_Cs = w_Cs * used_CK[:, :step]
        pivot_C = (diagonal_M[atom_C] - (w_Cs * w_Cs).sum(dim=1)).clamp_(min=0).sqrt_()
        least_C = floor_C * pivot_C if by_error else floor_C
        active_C = active_C & (left_C > enough_C) & (product_C.abs() > least_C) & (pivot_C > dependent)
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
        if new_CM is not None:
            new_CM -= orthonormal_CKM[:, step].square()
        along_CK[:, step], left_C = z_C, left_C - z_C * z_C
        cholesky_CKK[:, step, :step] = torch.where(active_C[:, None], w_Cs, 0)
        cholesky_CKK[:, step, step] = pivot_C
        support_CK[:, step], used_CK[:, step] = torch.where(active_C, atom_C, 0), active_C
        picked_CM.scatter_(1, atom_C[:, None], True)
    values_CK = torch.linalg.solve_triangular(cholesky_CKK.mT, along_CK[..., None], upper=True).squeeze(-1)
    return values_CK * used_CK, support_CK.int()


def _pursue_nonnegative(
    products_CM: Tensor, energy_C: Tensor, enough_C: Tensor, floor_C: Tensor, gram_MM: Gram, k: int
) -> tuple[Tensor, Tensor]:
    """Pick the largest positive product, then least squares under z ≥ 0, in which picked atoms may leave again.

    Lawson & Hanson's active set with at most k atoms (non-negative OMP of Nguyen, Soussen, Idier & Djermoune 2019).
    """
    n = len(products_CM)
    dependent = 16 * torch.finfo(products_CM.dtype).eps
    support_CK = torch.zeros(n, k, dtype=torch.int64, device=products_CM.device)
    passive_CK = torch.zeros(n, k, dtype=torch.bool, device=products_CM.device)
    z_CK = torch.zeros(n, k, dtype=torch.float64, device=products_CM.device)
    active_C, left_CM = energy_C > 0, products_CM
    for _ in range(3 * k):
        picked_CM = torch.zeros_like(products_CM, dtype=torch.bool)
        for slot in range(k):
            rows_S = passive_CK[:, slot].nonzero().flatten()
            picked_CM[rows_S, support_CK[rows_S, slot]] = True
        best_C, atom_C = left_CM.masked_fill(picked_CM, -torch.inf).max(dim=1)
        target_CK = products_CM.gather(1, support_CK).double() * passive_CK
        error_C = energy_C - (target_CK * z_CK).sum(dim=1)
        active_C = active_C & (best_C > floor_C) & (error_C > enough_C) & ~passive_CK.all(dim=1)
        if not bool(active_C.any()):
            break
        free_C = (~passive_CK).int().argmax(dim=1)
        trial_CK, trial_passive_CK = support_CK.clone(), passive_CK.clone()
        rows_S = active_C.nonzero().flatten()
        trial_CK[rows_S, free_C[rows_S]] = atom_C[rows_S]
        trial_passive_CK[rows_S, free_C[rows_S]] = True
        gram_CKK = support_gram(gram_MM, trial_CK, trial_passive_CK)
        factor_CKK, failed_C = torch.linalg.cholesky_ex(gram_CKK)
        pivots_C = factor_CKK.diagonal(dim1=1, dim2=2).amin(dim=1).square()
        # An atom that depends on those picked ends the sample's code.
        active_C = active_C & (failed_C == 0) & (pivots_C > dependent)
        support_CK = torch.where(active_C[:, None], trial_CK, support_CK)
        passive_CK = torch.where(active_C[:, None], trial_passive_CK, passive_CK)
        gram_CKK = support_gram(gram_MM, support_CK, passive_CK)
        target_CK = products_CM.gather(1, support_CK).double() * passive_CK
        z_CK, passive_CK = settle(gram_CKK, target_CK, z_CK, passive_CK)
        z_now_CK = z_CK.to(products_CM.dtype)
        if isinstance(gram_MM, Tensor):
            left_CM = products_CM - torch.einsum("ck,ckm->cm", z_now_CK, gram_MM[support_CK])
        else:
            left_CM = products_CM - gram_MM.combined(z_now_CK, support_CK)
    return (z_CK * passive_CK).to(products_CM.dtype), torch.where(passive_CK, support_CK, 0).int()
