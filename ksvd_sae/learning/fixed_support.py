"""Gradients of a code: its support is held fixed, its coefficients are differentiated.

Which atoms a pursuit picks, and when it stops, jumps from one to another as the sample moves and is constant in
between: it has no derivative. What coefficients the picked atoms get has one. With x a sample, A the atoms of its
support (rows) and z its coefficients:

===============================  ================================================================================
coder                            z as a function of x and A
===============================  ================================================================================
``omp``, ``ormp``, ``mp_refit``  least squares, (A·Aᵀ)⁻¹·A·x; with z ≥ 0, on the atoms that did not end at 0
``mp``, ``matryoshka``           the steps that were made, in their order: a = ⟨r, atom⟩, r ← r − a·atom; z sums the a
===============================  ================================================================================

Either way the gradients follow from a vector w and a matrix Q of each sample, which the incoming gradient v gives:
x gets w·A, and A gets w·xᵀ − Q·A (the samples' D-vectors stay outside of what is done step by step).

Coders do not keep their steps. Made again among the atoms of the support alone they are the same ones, as no other atom
was ever picked; where they stopped shows in z. Where two atoms of a support tie to rounding, the steps may come out in
the other order of the two.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ksvd_sae.learning.code import Code

# Atoms of supports gathered at a time, in float64.
_GATHERED_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
# Squared pivot of a support's Gram matrix in float64 below which its atoms are taken for dependent.
_DEPENDENT = 1e-12
# Steps made again have come to the coefficients once they are this near: eps of their type, of the largest.
_NEAR = 64
# Columns of a code, and the most steps that were made on them.
Steps = tuple[tuple[slice, int], ...]


def with_gradient(
    code: Code, x_BD: Tensor, atoms_MD: Tensor, *, steps: Steps | None = None, nonnegative: bool = False
) -> Code:
    """The same code, bit for bit, whose coefficients pass gradients to samples and atoms.

    What atoms get holds along the unit sphere, on which coders ask them to be.

    Args:
        code: what a coder gave for these samples and atoms.
        steps: the columns that a matching pursuit filled, group after group, each with the most steps it could make;
            None for coefficients by least squares.
        nonnegative: whether the steps were to positive products alone.
    Raises: RuntimeError by torch if it is differentiated twice.
    Cost: nothing before the backward pass; there O(B·K·(D + K·D)), and with steps O(B·K) for each.
    """
    values_BK = _Coefficients.apply(code.values_BK, code.support_BK, x_BD, atoms_MD, steps, nonnegative)  # type: ignore[no-untyped-call]
    return Code(values_BK, code.support_BK)


class _Coefficients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values_BK: Tensor,
        support_BK: Tensor,
        x_BD: Tensor,
        atoms_MD: Tensor,
        steps: Steps | None,
        nonnegative: bool,
    ) -> Tensor:
        ctx.save_for_backward(values_BK, support_BK, x_BD, atoms_MD)
        ctx.steps, ctx.nonnegative = steps, nonnegative
        return values_BK.clone()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_BK: Tensor) -> tuple[Tensor | None, ...]:
        values_BK, support_BK, x_BD, atoms_MD = ctx.saved_tensors
        to_x_BD = torch.zeros_like(x_BD) if ctx.needs_input_grad[2] else None
        to_atoms_MD = torch.zeros_like(atoms_MD) if ctx.needs_input_grad[3] else None
        gathered = 8 * values_BK.shape[1] * x_BD.shape[1]
        n_rows = max(1, _GATHERED_BYTES.get(x_BD.device.type, 64 << 20) // gathered)
        for start in range(0, len(values_BK), n_rows):
            rows = slice(start, start + n_rows)
            x_CD, z_CK, v_CK = x_BD[rows].double(), values_BK[rows].double(), grad_BK[rows].double()
            support_CK, used_CK = support_BK[rows].long(), z_CK != 0
            own_CKD = atoms_MD[support_CK].double()
            if ctx.steps is None:
                w_CK, q_CKK = _of_least_squares(own_CKD, z_CK, v_CK, used_CK)
            else:
                eps = torch.finfo(values_BK.dtype).eps
                w_CK, q_CKK = _of_steps(own_CKD, x_CD, z_CK, v_CK, ctx.steps, ctx.nonnegative, eps)
            if to_x_BD is not None:
                to_x_BD[rows] = (w_CK[:, None] @ own_CKD).squeeze(1).to(x_BD.dtype)
            if to_atoms_MD is not None:
                to_own_CKD = w_CK[..., None] * x_CD[:, None] - q_CKK @ own_CKD
                to_atoms_MD.index_add_(0, support_CK.flatten(), to_own_CKD.flatten(0, 1).to(atoms_MD.dtype))
        return None, None, to_x_BD, to_atoms_MD, None, None


def _of_least_squares(own_CKD: Tensor, z_CK: Tensor, v_CK: Tensor, used_CK: Tensor) -> tuple[Tensor, Tensor]:
    """w = G⁻¹·v and Q = w·zᵀ + z·wᵀ, G = A·Aᵀ.

    Where the atoms depend on each other, z has the least norm and w = G⁺·v.
    """
    v_CK, both_CKK = v_CK * used_CK, used_CK[:, :, None] & used_CK[:, None, :]
    identity_KK = torch.eye(z_CK.shape[1], dtype=z_CK.dtype, device=z_CK.device)
    factor_CKK, failed_C = torch.linalg.cholesky_ex(torch.where(both_CKK, own_CKD @ own_CKD.mT, identity_KK))
    w_CK = torch.cholesky_solve(v_CK[..., None], factor_CKK).squeeze(-1)
    pivots_C = factor_CKK.diagonal(dim1=1, dim2=2).amin(dim=1).square()
    bad_C = (failed_C != 0) | ~(pivots_C > _DEPENDENT)
    if bool(bad_C.any()):
        atoms_SDK = (own_CKD[bad_C] * used_CK[bad_C][..., None]).mT
        inverse_SKD = torch.linalg.pinv(atoms_SDK, rtol=_DEPENDENT**0.5)
        w_CK[bad_C] = (inverse_SKD @ (inverse_SKD.mT @ v_CK[bad_C][..., None])).squeeze(-1)
    outer_CKK = w_CK[:, :, None] * z_CK[:, None, :]
    return w_CK, outer_CKK + outer_CKK.mT


def _of_steps(
    own_CKD: Tensor, x_CD: Tensor, z_CK: Tensor, v_CK: Tensor, steps: Steps, nonnegative: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Backwards through the steps: what a step leaves has gradient c·A, c = 0 after the last and w before the first.

    A step of size a to the atom of slot s, made at coefficients z, has gradient b = v_s − (G·c)_s; it adds b·z + a·c to
    Q_s, and b to c_s.
    """
    gram_CKK = own_CKD @ own_CKD.mT
    products_CK = (own_CKD @ x_CD[..., None]).squeeze(-1)
    slot_TC, size_TC = _made_again(gram_CKK, products_CK, z_CK, steps, nonnegative, eps)
    rows_C = torch.arange(len(z_CK), device=z_CK.device)
    z_CK = torch.zeros_like(z_CK).scatter_add_(1, slot_TC.T, size_TC.T)
    c_CK, q_CKK = torch.zeros_like(z_CK), torch.zeros_like(gram_CKK)
    for slot_C, size_C in zip(slot_TC.flip(0), size_TC.flip(0), strict=True):
        z_CK[rows_C, slot_C] -= size_C
        b_C = (v_CK[rows_C, slot_C] - (gram_CKK[rows_C, slot_C] * c_CK).sum(dim=1)) * (size_C != 0)
        q_CKK[rows_C, slot_C] += b_C[:, None] * z_CK + size_C[:, None] * c_CK
        c_CK[rows_C, slot_C] += b_C
    return c_CK, q_CKK


def _made_again(
    gram_CKK: Tensor, products_CK: Tensor, z_CK: Tensor, steps: Steps, nonnegative: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """The steps of a matching pursuit that ended at z, (T, C): their slots and their sizes, 0 where there was none."""
    rows_C, near_C = torch.arange(len(z_CK), device=z_CK.device), _NEAR * eps * z_CK.abs().amax(dim=1)
    n_steps = sum(most for _, most in steps)
    slot_TC, size_TC = rows_C.new_zeros(n_steps, len(z_CK)), z_CK.new_zeros(n_steps, len(z_CK))
    start = 0
    for columns, most in steps:
        mine_CK = torch.zeros_like(z_CK, dtype=torch.bool)
        mine_CK[:, columns] = z_CK[:, columns] != 0
        now_CK = torch.zeros_like(z_CK).scatter_add_(1, slot_TC.T, size_TC.T)
        left_CK = products_CK - (gram_CKK @ now_CK[..., None]).squeeze(-1)
        # Every step takes some of the error off, so that z is come by once: how near, and after how many steps.
        gap_C, made_C = ((z_CK - now_CK) * mine_CK).abs().amax(dim=1), rows_C.new_zeros(len(z_CK))
        for step in range(most):
            slot_C = (left_CK if nonnegative else left_CK.abs()).masked_fill(~mine_CK, -torch.inf).argmax(dim=1)
            size_C = left_CK[rows_C, slot_C]
            now_CK[rows_C, slot_C] += size_C
            left_CK = left_CK - size_C[:, None] * gram_CKK[rows_C, slot_C]
            slot_TC[start + step], size_TC[start + step] = slot_C, size_C
            now_gap_C = ((z_CK - now_CK) * mine_CK).abs().amax(dim=1)
            nearer_C = (now_gap_C < gap_C) & (gap_C > near_C)
            made_C, gap_C = torch.where(nearer_C, step + 1, made_C), torch.where(nearer_C, now_gap_C, gap_C)
            if bool((gap_C <= near_C).all()):
                break
        size_TC[start : start + most] *= torch.arange(most, device=z_CK.device)[:, None] < made_C
        start += most
    some_T = (size_TC != 0).any(dim=1)
    return slot_TC[some_T], size_TC[some_T]
