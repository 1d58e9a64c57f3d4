"""What every coder checks of its input before it works on it."""

from typing import Any

import torch
from torch import Tensor

from ksvd_sae.arguments import shown
from ksvd_sae.errors import ActivationError, DictionaryError, InputTypeError, ShapeError
from ksvd_sae.learning.code import Code
from ksvd_sae.learning.gram import Gram, gram_of

UNIT_NORM_TOLERANCE = 1e-4


def check_atoms(atoms_MD: Tensor, where: str) -> None:
    """Raise DictionaryError unless every row is finite and of unit norm (to 1e-4)."""
    norms_M = torch.linalg.vector_norm(atoms_MD.float(), dim=1)
    # Not (… ≤ tolerance) rather than (… > tolerance): NaN must fail too.
    bad_M = ~((norms_M - 1).abs() <= UNIT_NORM_TOLERANCE)
    if bool(bad_M.any()):
        first = int(bad_M.int().argmax())
        raise DictionaryError(
            f"{where}: {int(bad_M.sum())} of {len(atoms_MD)} atoms are not of unit norm",
            got=f"atom {first} has norm {float(norms_M[first]):.6g}",
            limit=f"1 ± {UNIT_NORM_TOLERANCE}",
            cure="atoms / atoms.norm(dim=1, keepdim=True); drop zero and non-finite atoms",
        )


def check_samples(x_BD: Tensor, where: str, *, first_row: int = 0) -> None:
    """Raise ActivationError if a sample holds NaN or infinity."""
    # One NaN or infinity spoils the sum, which is a tenth of the work; so may finite numbers by overflow.
    if x_BD.numel() and not bool(torch.isfinite(x_BD.sum())) and not bool(torch.isfinite(x_BD).all()):
        bad_B = ~torch.isfinite(x_BD).all(dim=1)
        raise ActivationError(
            f"{where}: {int(bad_B.sum())} of {len(x_BD)} samples hold NaN or infinity",
            got=f"first at row {first_row + int(bad_B.int().argmax())}",
            cause="float16 overflow in the model, missing numbers in a table, or a corrupt file",
            cure="harvest in bfloat16 or float32, or drop these rows",
        )


def checked_pair(x_BD: Tensor, atoms_MD: Tensor, k: int, where: str) -> tuple[Tensor, Tensor]:
    for name, rows in (("samples", x_BD), ("atoms", atoms_MD)):
        if not isinstance(rows, Tensor):
            raise InputTypeError(f"{where}: {name} must be a tensor", got=shown(rows), cure="torch.as_tensor(...)")
    if x_BD.ndim != 2 or atoms_MD.ndim != 2 or x_BD.shape[1] != atoms_MD.shape[1]:
        raise ShapeError(
            f"{where}: samples and atoms do not fit",
            got=f"samples {tuple(x_BD.shape)}, atoms {tuple(atoms_MD.shape)}",
            limit="(B, D) and (M, D) with the same D",
            cause="a dictionary of another model or hook",
        )
    if not 1 <= k <= min(atoms_MD.shape):
        raise ShapeError(
            f"{where}: k must be between 1 and the smaller of d_in and the number of atoms",
            got=f"k = {k}",
            limit=f"1 to {min(atoms_MD.shape)} for atoms {tuple(atoms_MD.shape)}",
        )
    for name, rows in (("samples", x_BD), ("atoms", atoms_MD)):
        if not rows.is_floating_point():
            raise ShapeError(f"{where}: {name} are not floating point", got=str(rows.dtype), cure=f"{name}.float()")
    check_samples(x_BD, where)
    check_atoms(atoms_MD, where)
    dtype = torch.float64 if x_BD.dtype == torch.float64 else torch.float32
    return x_BD.to(dtype), atoms_MD.to(x_BD.device, dtype)


def checked_gram(atoms_MD: Tensor, gram_MM: Gram | None, where: str) -> Gram:
    """The Gram matrix given, checked for its shape, or a fresh one."""
    if gram_MM is None:
        return gram_of(atoms_MD)
    if tuple(gram_MM.shape) != (len(atoms_MD), len(atoms_MD)):
        raise ShapeError(
            f"{where}: gram_MM does not fit the atoms",
            got=str(tuple(gram_MM.shape)),
            limit=f"({len(atoms_MD)}, {len(atoms_MD)})",
            cure="pass atoms @ atoms.T, or leave it out",
        )
    return gram_MM.to(atoms_MD.device, atoms_MD.dtype).contiguous() if isinstance(gram_MM, Tensor) else gram_MM


def check_code(code: Any, n_atoms: int, where: str) -> None:
    """Raise ShapeError unless this is a Code of so many atoms."""
    if not isinstance(code, Code):
        raise InputTypeError(
            f"{where}: not a Code, as encode gives it",
            got=shown(code),
            cause="dense codes" if getattr(code, "ndim", 0) == 2 else None,
            cure="of dense codes: codes @ raw atoms + centre; DoubleBatchKSVD has inverse_transform",
        )
    shapes = tuple(code.values_BK.shape), tuple(code.support_BK.shape)
    if len(shapes[0]) != 2 or shapes[0] != shapes[1]:
        raise ShapeError(
            f"{where}: values and support do not fit", got=f"{shapes[0]}, {shapes[1]}", limit="(B, K) both"
        )
    if code.support_BK.numel() and not 0 <= int(code.support_BK.min()) <= int(code.support_BK.max()) < n_atoms:
        got = f"atoms {int(code.support_BK.min())} to {int(code.support_BK.max())}"
        limit, cause = f"0 to {n_atoms - 1}", "a code of another dictionary"
        raise ShapeError(f"{where}: the code names atoms that are not there", got=got, limit=limit, cause=cause)
