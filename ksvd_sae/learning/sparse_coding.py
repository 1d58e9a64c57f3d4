"""Sparse coders: samples and unit atoms in, at most k (value, atom) pairs a sample out.

Notation: B samples, D = d_in, M atoms, K = k. ``x`` is the centred sample, ``z`` its code,
``r = x − z·atoms`` the residual, ``p = r·atomsᵀ`` the products that the greedy choice looks at.
With the Gram matrix ``G = atoms·atomsᵀ`` the products follow a step without the residual:
``p ← p − a·G_j`` after atom j took coefficient a.

Samples are coded in chunks so that the products, the one array of size chunk × M, stay within
``memory_bytes`` whatever the number of samples. The steps themselves run in one of the kernels/ (see backends.py).
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ksvd_sae.arguments import number, whole
from ksvd_sae.device import in_parts_that_fit, own_modes
from ksvd_sae.errors import ActivationError, DictionaryError, ShapeError
from ksvd_sae.learning.backends import Backend, Method, chunk_rows, chunks, coder_backend, on_gpu
from ksvd_sae.learning.checks import checked_gram, checked_pair
from ksvd_sae.learning.code import Code
from ksvd_sae.learning.gram import Gram, gram_of
from ksvd_sae.learning.least_squares import DEPENDENT, refit_code, refit_from_left
from ksvd_sae.learning.products import Precision, check_precision, times
from ksvd_sae.ranks import ALONE, Ranks

Coder = Literal["mp", "mp_refit", "omp", "ormp", "projection"]
Choice = Literal["product", "error"]
# Of float64's, subnormal numbers included: 2^-1074 to 2^1024.
_HALF_EXPONENT = 540
CODERS: tuple[Coder, ...] = ("mp", "mp_refit", "omp", "ormp", "projection")
__all__ = [
    "CODERS",
    "Code",
    "Coder",
    "encode",
    "matching_pursuit",
    "orthogonal_matching_pursuit",
    "project",
    "refit_code",
]


def encode(
    x_BD: Tensor,
    atoms_MD: Tensor,
    k: int,
    *,
    coder: Coder = "mp",
    gram_MM: Gram | None = None,
    max_steps: int | None = None,
    rtol: float = 0.0,
    tau: float = 0.0,
    tau_absolute: float = 0.0,
    nonnegative: bool = False,
    backend: Backend = "auto",
    precision: Precision = "float32",
) -> Code:
    """Code with the coder of that name: 'mp', 'mp_refit', 'omp', 'ormp', or 'projection' (orthonormal atoms)."""
    if coder not in CODERS:
        raise ShapeError(f"encode: no coder of the name {coder!r}", limit=", ".join(CODERS))
    if coder == "projection":
        if nonnegative:
            raise ShapeError("encode: a projection has signs", cure="use coder 'omp' for non-negative codes")
        return project(x_BD, atoms_MD)
    options: dict[str, Any] = {
        "gram_MM": gram_MM,
        "rtol": rtol,
        "tau": tau,
        "tau_absolute": tau_absolute,
        "nonnegative": nonnegative,
        "backend": backend,
        "precision": precision,
    }
    if coder in ("omp", "ormp"):
        choice: Choice = "error" if coder == "ormp" else "product"
        return orthogonal_matching_pursuit(x_BD, atoms_MD, k, choice=choice, **options)
    return matching_pursuit(x_BD, atoms_MD, k, max_steps=max_steps, refit=coder == "mp_refit", **options)


def at_any_scale(coder: Callable[..., Code]) -> Callable[..., Code]:
    """Code each tiny or huge sample at a scale where its squares neither vanish nor overflow.

    Multiplying by a power of two is exact, so it changes no bit of the code but its exponent.
    Raises: ActivationError for codes that their type has no number for: a coefficient may be √D times as large as the
        largest number of its sample.
    """

    @wraps(coder)
    @own_modes()
    def wrapper(x_BD: Tensor, *args: Any, **kwargs: Any) -> Code:
        if not isinstance(x_BD, Tensor) or x_BD.ndim != 2 or not x_BD.numel() or not x_BD.is_floating_point():
            return coder(x_BD, *args, **kwargs)
        largest_B = x_BD.abs().amax(dim=1)
        odd_B = (largest_B > 0) & ((largest_B < 1e-12) | (largest_B > 1e12)) & torch.isfinite(largest_B)
        if not bool(odd_B.any()):
            return coder(x_BD, *args, **kwargs)
        dtype = torch.float64 if x_BD.dtype == torch.float64 else torch.float32
        exponent_B = torch.where(odd_B, torch.frexp(largest_B.to(dtype)).exponent, 0)
        # In two steps: the factor itself may lie outside the type.
        halves = exponent_B // 2, exponent_B - exponent_B // 2
        down, up = ([_power_of_two(sign * half_B, dtype)[:, None] for half_B in halves] for sign in (-1, 1))
        if "tau_absolute" in kwargs:
            kwargs["tau_absolute"] = kwargs["tau_absolute"] * down[0][:, 0] * down[1][:, 0]
        code = coder(x_BD.to(dtype) * down[0] * down[1], *args, **kwargs)
        values_BK = code.values_BK * up[0] * up[1]
        bad_B = ~torch.isfinite(values_BK).all(dim=1)
        if bool(bad_B.any()):
            raise ActivationError(
                f"{coder.__name__}: {int(bad_B.sum())} of {len(x_BD)} samples have coefficients that "
                f"{str(dtype).removeprefix('torch.')} does not hold",
                got=f"numbers up to {float(largest_B[bad_B].max()):.3g}, first at row {int(bad_B.int().argmax())}",
                limit=f"{torch.finfo(dtype).max:.3g} for each coefficient",
                cause="overflow in the model, or a corrupt file",
                cure="drop these rows, or divide all samples by a number",
            )
        return Code(values_BK, code.support_BK)

    return wrapper


def _power_of_two(exponent_B: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponent, for halves of any float's exponent; exact, as ``exp2`` need not be."""
    powers = [2.0**n for n in range(-_HALF_EXPONENT, _HALF_EXPONENT + 1)]
    table = torch.tensor(powers, dtype=torch.float64, device=exponent_B.device)
    return table[exponent_B + _HALF_EXPONENT].to(dtype)


@at_any_scale
@torch.no_grad()
def matching_pursuit(
    x_BD: Tensor,
    atoms_MD: Tensor,
    k: int,
    *,
    gram_MM: Gram | None = None,
    max_steps: int | None = None,
    rtol: float = 0.0,
    tau: float = 0.0,
    tau_absolute: float | Tensor = 0.0,
    refit: bool = False,
    nonnegative: bool = False,
    memory_bytes: int | None = None,
    backend: Backend = "auto",
    precision: Precision = "float32",
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
        rtol: stop a sample once ‖r‖ ≤ rtol·‖x‖, so that L0 follows the sample; k is then a limit.
        tau: pick no atom whose |product| with the residual is tau·‖x‖ or less: what is left is taken for noise, of
            which more steps would fit some. k is then a limit, too.
        tau_absolute: the same in the units of x; a (B,) tensor has one for each sample. The larger of the two counts.
        refit: replace the coefficients by least squares on the support found.
        nonnegative: z ≥ 0: only positive products are picked, and the refit keeps z ≥ 0.
        memory_bytes: bound on the products of one chunk; default 16 MiB on the CPU, 1 GiB on CUDA.
        backend: see backends.py.  precision: of the products, see products.py; on CUDA 'bfloat16' also reads a float16
            Gram matrix.
    Returns: Code with values in float32 (float64 for float64 input).
    Raises: ShapeError, DictionaryError, ActivationError (NaN or infinity in x).
    Numerics: float32 accumulation; ties go to the lowest index. Cost: O(B·M·(D + steps)) time.
    """
    k = whole(k, "k", "matching_pursuit")
    max_steps = None if max_steps is None else whole(max_steps, "max_steps", "matching_pursuit")
    x_BD, atoms_MD = checked_pair(x_BD, atoms_MD, k, "matching_pursuit")
    check_precision(precision, x_BD)
    _check_limits(rtol, tau, tau_absolute, memory_bytes, "matching_pursuit")
    gram_MM = checked_gram(atoms_MD, gram_MM, "matching_pursuit")
    if max_steps is not None and max_steps < 1:
        raise ShapeError("matching_pursuit: max_steps must be at least 1", got=max_steps)
    code, left_BK = pursued(
        x_BD,
        atoms_MD,
        k,
        gram_MM=gram_MM,
        max_steps=max_steps,
        rtol=rtol,
        tau=tau,
        tau_absolute=tau_absolute,
        nonnegative=nonnegative,
        memory_bytes=memory_bytes,
        backend=backend,
        precision=precision,
    )
    if not refit:
        return code
    where = coder_backend(x_BD.device, backend, x_BD.dtype, n_atoms=len(atoms_MD), k=k)
    if where != "torch" and precision == "float32":
        return _refit_from_left(x_BD, code, atoms_MD, gram_MM, left_BK, nonnegative)
    return refit_code(x_BD, code, atoms_MD, gram_MM, nonnegative=nonnegative)


def pursued(
    x_BD: Tensor,
    atoms_MD: Tensor,
    k: int,
    *,
    gram_MM: Gram | None = None,
    energy_B: Tensor | None = None,
    max_steps: int | None = None,
    rtol: float = 0.0,
    tau: float = 0.0,
    tau_absolute: float | Tensor = 0.0,
    nonnegative: bool = False,
    memory_bytes: int | None = None,
    backend: Backend = "auto",
    precision: Precision = "float32",
    ranks: Ranks = ALONE,
) -> tuple[Code, Tensor]:
    """``matching_pursuit`` of samples and atoms that are known to be right, without a look at them: on a GPU every
    look waits for it.

    Args: energy_B: ‖x‖², (B,), if at hand. Others: as ``matching_pursuit``; finite samples of a scale whose squares
        neither vanish nor overflow, in the atoms' dtype and on their device. ranks: as ``gram_of``.
    Returns: the code and the products of the residual with the atoms of its support.
    """
    where = coder_backend(x_BD.device, backend, x_BD.dtype, n_atoms=len(atoms_MD), k=k)
    gram_MM = gram_of(atoms_MD, _gram_dtype(where, precision), ranks) if gram_MM is None else gram_MM
    gram_MM = _as_read(gram_MM, where, precision)
    energy_B = _energies(x_BD) if energy_B is None else energy_B
    floor_B = _floor(x_BD, tau, tau_absolute)
    steps = 4 * k if max_steps is None else max_steps
    code = Code.empty(x_BD, k)
    left_BK = torch.zeros_like(code.values_BK)
    pursue = _kernels(where).pursue
    with_atoms = times(atoms_MD, precision)

    def work(rows: slice) -> None:
        products_CM = with_atoms(x_BD[rows])
        out = (code.values_BK[rows], code.support_BK[rows], left_BK[rows])
        pursue(products_CM, energy_B[rows], floor_B[rows], gram_MM, k, steps, rtol, nonnegative, *out)

    size = chunk_rows(x_BD, len(atoms_MD), memory_bytes, arrays=3 if where == "torch" else 1)
    _in_parts(len(x_BD), size, work, code.values_BK, code.support_BK, left_BK)
    return code, left_BK


def _in_parts(n: int, size: int, work: Callable[[slice], None], *out: Tensor) -> None:
    """``work`` on all rows; a part that failed is zeroed before it is begun again."""

    def undo(rows: slice) -> None:
        for part in out:
            part[rows] = 0

    cure = "fewer atoms, or another device"
    for _ in in_parts_that_fit(n, size, work, "sparse coding", cure, undo):
        pass


def _as_read(gram_MM: Gram, where: str, precision: Precision) -> Gram:
    dtype = _gram_dtype(where, precision)
    return gram_MM.to(dtype) if dtype is not None and isinstance(gram_MM, Tensor) else gram_MM


def _gram_dtype(where: str, precision: Precision) -> torch.dtype | None:
    """On chip a Gram matrix of 16 bits is read twice as fast. Its entries are at most 1: float16 has 3 bits more for
    them than bfloat16. None: the atoms'."""
    return torch.float16 if where == "triton" and precision == "bfloat16" else None


def _check_limits(rtol: float, tau: float, tau_absolute: float | Tensor, memory_bytes: int | None, where: str) -> None:
    # rtol is squared further on: a negative one would stop every sample at once.
    for name, value in (("rtol", rtol), ("tau", tau), ("tau_absolute", tau_absolute)):
        if not isinstance(value, Tensor) and not 0 <= number(value, name, where) < math.inf:
            raise ShapeError(f"{where}: {name} must be a number of 0 or more", got=value, cure="0 codes with k atoms")
    if memory_bytes is not None and memory_bytes < 1:
        raise ShapeError(f"{where}: memory_bytes must be at least 1", got=memory_bytes, cure="None takes the default")


def _floor(x_BD: Tensor, tau: float, tau_absolute: float | Tensor) -> Tensor:
    """The largest product of each sample that is not picked, (B,)."""
    floor_B = tau * torch.linalg.vector_norm(x_BD, dim=1) if tau else x_BD.new_zeros(len(x_BD))
    if isinstance(tau_absolute, Tensor):
        return torch.maximum(floor_B, tau_absolute.to(floor_B))
    return floor_B.clamp_(min=tau_absolute) if tau_absolute else floor_B


def _energies(x_BD: Tensor) -> Tensor:
    """‖x‖², (B,); in chunks, as squares of all samples at once would not stay in a CPU's cache."""
    if on_gpu(x_BD.device):
        return torch.linalg.vector_norm(x_BD, dim=1).square()
    parts = [(x_BD[rows] * x_BD[rows]).sum(dim=1) for rows in chunks(x_BD, x_BD.shape[1], None, arrays=1)]
    return torch.cat(parts) if parts else x_BD.new_zeros(0)


def _kernels(backend: str) -> Any:
    if backend == "numba":
        from ksvd_sae.learning.kernels import pursuit_numba

        return pursuit_numba
    if backend == "triton":
        from ksvd_sae.learning.kernels import pursuit_triton

        return pursuit_triton
    from ksvd_sae.learning.kernels import pursuit_torch

    return pursuit_torch


def _refit_from_left(
    x_BD: Tensor, code: Code, atoms_MD: Tensor, gram_MM: Gram, left_BK: Tensor, nonnegative: bool
) -> Code:
    """Refit from the products that the pursuit left: no atom is gathered, save for supports that nearly depend."""
    pursued_BK = code.values_BK.clone()
    if not on_gpu(x_BD.device):
        from ksvd_sae.learning.kernels import least_squares_numba

        assert isinstance(gram_MM, Tensor)
        pivots_B = least_squares_numba.refit(gram_MM, nonnegative, code.values_BK, code.support_BK, left_BK)
    else:
        pivots_B = refit_from_left(gram_MM, code, left_BK, nonnegative)
    bad_B = ~(pivots_B > DEPENDENT)
    if bool(bad_B.any()):
        bad = Code(pursued_BK[bad_B], code.support_BK[bad_B])
        code.values_BK[bad_B] = refit_code(x_BD[bad_B], bad, atoms_MD, gram_MM, nonnegative=nonnegative).values_BK
    return code


@at_any_scale
@torch.no_grad()
def orthogonal_matching_pursuit(
    x_BD: Tensor,
    atoms_MD: Tensor,
    k: int,
    *,
    choice: Choice = "product",
    gram_MM: Gram | None = None,
    rtol: float = 0.0,
    tau: float = 0.0,
    tau_absolute: float | Tensor = 0.0,
    nonnegative: bool = False,
    memory_bytes: int | None = None,
    backend: Backend = "auto",
    precision: Precision = "float32",
) -> Code:
    """Code each row greedily with at most k atoms, coefficients by least squares after every pick.

    Source: Pati et al. 1993, with the progressive Cholesky factor of Batch-OMP (Rubinstein et al. 2008); the
    orthonormalised picks u_s = (atom_j − Σ_l w_l u_l)/L_ss and their products with all atoms are kept, so a step costs
    one pass over s·M products (v2 in Zhu et al. 2020) and the triangular L gives the coefficients at the end.
    nonnegative: least squares under z ≥ 0 after every pick, in which picked atoms may leave again (Lawson & Hanson
    1974; Nguyen et al. 2019).

    Args:
        choice: 'product' picks the atom with the largest |product| with the residual; 'error' the one that lowers the
            error of the refitted code the most, p² / (‖atom‖² − Σ_l w_l²): order-recursive matching pursuit, also
            known as orthogonal least squares (Gharavi-Alkhansari & Huang 1998), and what SPAMS' ``omp`` computes.
            It has no non-negative form here. Then tau bounds |product| / √(‖atom‖² − Σ_l w_l²), the square root of
            what the error falls by.
        All else, Returns, Raises: as ``matching_pursuit``.

    A sample stops early when its residual is orthogonal to all atoms, or when the best atom depends on those it
    already has.
    Cost: O(B·M·(D + k²)) time; chunk·M floats (numba, and k·M a thread), chunk·M·(k + 2) (torch).
    """
    where_ = "orthogonal_matching_pursuit"
    k = whole(k, "k", where_)
    x_BD, atoms_MD = checked_pair(x_BD, atoms_MD, k, where_)
    check_precision(precision, x_BD)
    _check_limits(rtol, tau, tau_absolute, memory_bytes, where_)
    energy_B = _energies(x_BD)
    floor_B = _floor(x_BD, tau, tau_absolute)
    gram_MM = checked_gram(atoms_MD, gram_MM, where_)
    if choice not in get_args(Choice):
        raise ShapeError(f"{where_}: no choice of the name {choice!r}", limit=", ".join(get_args(Choice)))
    by_error = choice == "error"
    if by_error and nonnegative:
        raise ShapeError(
            f"{where_}: choice 'error' has no non-negative form",
            cause="what an atom takes off the error under z ≥ 0 has no closed form",
            cure="use choice 'product' (coder 'omp')",
        )
    code = Code.empty(x_BD, k)
    method: Method = "nonnegative_omp" if nonnegative else "omp"
    where = coder_backend(x_BD.device, backend, x_BD.dtype, n_atoms=len(atoms_MD), k=k, method=method)
    gram_MM = _as_read(gram_MM, where, precision)
    pursue = _kernels(where).pursue_orthogonally
    with_atoms = times(atoms_MD, precision)

    def work(rows: slice) -> None:
        products_CM = with_atoms(x_BD[rows])
        out = (code.values_BK[rows], code.support_BK[rows])
        pursue(products_CM, energy_B[rows], floor_B[rows], gram_MM, k, rtol, nonnegative, by_error, *out)

    size = chunk_rows(x_BD, len(atoms_MD), memory_bytes, arrays=k + 3 if where == "torch" else 1)
    _in_parts(len(x_BD), size, work, code.values_BK, code.support_BK)
    return code


@own_modes()
@torch.no_grad()
@at_any_scale
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
