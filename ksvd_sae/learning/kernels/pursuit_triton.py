"""The Triton pursuits from the host: whether they can run, what they are given, how they are launched.

The kernels themselves, and what they cost, are in pursuit_triton_jit.py.
"""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksvd_sae.errors import ShapeError
from ksvd_sae.learning.kernels import limits
from ksvd_sae.learning.kernels.pursuit_triton_jit import pursue_sample, pursue_sample_orthogonally, triton

# Products in registers: 16 a thread leave none to spill. Above _ALONE atoms a program of so many warps would fill a
# multiprocessor, and nothing would be read while it looks for its maximum: there 32 a thread, in 64 registers (what
# does not fit are constants, read again from the nearest cache), leave room for two.
_HELD_PER_WARP = 512
REGISTERS_M = 32 * _HELD_PER_WARP
_ALONE = 8192
_SHARING: dict[str, Any] = {"num_warps": REGISTERS_M // 1024, "maxnreg": 64}
# The best of what was tried on a device, by its name, BLOCK_M and the Gram matrix's type (bench/gpu.py writes it).
LAUNCHES = Path(__file__).with_name("launches.json")
_tried: dict[str, Any] | None = None
# Products in memory: 4 a thread are one wide load, of a float32 row, or half a one of float16.
_STREAMED_PER_WARP = 128
_STREAMED_WARPS = 8
# OMP's inverse Cholesky factor: 128² floats are 32 for each thread of 16 warps.
_FACTOR_PER_WARP = 1024
ORTHOGONAL_K = 128
# Twice an atom's index, with a sign in the lowest bit, is an int32.
_MOST_ATOMS = 2**30


def why_not(device: torch.device, n_atoms: int, k: int, orthogonal: bool = False) -> str | None:
    """Why these kernels cannot run there, or None if they can. ``orthogonal``: asked for pursue_orthogonally."""
    if triton is None:
        return "triton is not installed"
    interpreted = not isinstance(pursue_sample, triton.JITFunction)
    if device.type != "cuda" and not interpreted:
        return f"it runs on CUDA devices, not on {device.type} (unless TRITON_INTERPRET=1 is set before the import)"
    if n_atoms > _MOST_ATOMS:
        return f"it numbers atoms up to {_MOST_ATOMS}, and there are {n_atoms}"
    if orthogonal and k > ORTHOGONAL_K:
        return f"it holds a k × k factor in registers, for k up to {ORTHOGONAL_K}, not {k}"
    return None


def pursue(
    products_CM: Tensor,
    energy_C: Tensor,
    floor_C: Tensor,
    gram_MM: Tensor,
    k: int,
    max_steps: int,
    rtol: float,
    nonnegative: bool,
    values_CK: Tensor,
    support_CK: Tensor,
    left_CK: Tensor,
    registers_m: int = REGISTERS_M,
) -> None:
    """Matching pursuit from the products of a chunk with all atoms, into the last three tensors (zeroed).

    Args:
        products_CM: x·atomsᵀ; overwritten if M is above ``registers_m``.
        energy_C: ‖x‖².
        floor_C: no product of this size or less is picked.
        gram_MM: atoms·atomsᵀ, float32 or float16; the rest is float32.
        k, max_steps, rtol: as in ``sparse_coding.matching_pursuit``.
        nonnegative: pick the largest product rather than the largest |product|, and stop where none is above 0.
        values_CK, support_CK (int32): the code; unused slots are left as they are.
        left_CK: products of the final residual with the atoms of the support.
        registers_m: most atoms whose products are held in registers.
    Raises: ShapeError where the kernel cannot run, or for a tensor of another shape, type or layout.
    Numerics: picks as in the torch version up to ties of rounding; equal products go to the lowest index.
    """
    outputs = {"values_CK": values_CK, "support_CK": support_CK, "left_CK": left_CK}
    _check("pursue", products_CM, energy_C, floor_C, gram_MM, k, outputs)
    n, n_atoms = products_CM.shape
    if n == 0 or max_steps < 1:
        return
    with _on(products_CM.device):
        pursue_sample[(n,)](
            products_CM,
            energy_C,
            floor_C,
            gram_MM,
            values_CK,
            support_CK,
            left_CK,
            n_atoms,
            k,
            max_steps,
            float(rtol**2),
            NONNEGATIVE=nonnegative,
            **launch(n_atoms, k, registers_m, products_CM.device, gram_MM.dtype),
        )


def pursue_orthogonally(
    products_CM: Tensor,
    energy_C: Tensor,
    floor_C: Tensor,
    gram_MM: Tensor,
    k: int,
    rtol: float,
    nonnegative: bool,
    by_error: bool,
    values_CK: Tensor,
    support_CK: Tensor,
    most_m: int = REGISTERS_M,
) -> None:
    """Orthogonal matching pursuit from the products of a chunk, which it overwrites, into the last two tensors.

    Args, Raises: as ``pursue``.
        by_error: pick what lowers the error of the refitted code the most; takes another chunk × M floats.
        most_m: most products that are handled at a time.
    Numerics: the coefficients fit the residual that the picks were made from, whatever the rounding of the
    factor; with a float16 Gram matrix both are off by its rounding.
    """
    if nonnegative:
        raise ShapeError(
            "pursue_orthogonally: non-negative coefficients are not in this kernel",
            cause="their least squares may take an atom out again, and its factor only grows",
            cure="use backend 'torch' or 'numba'",
        )
    outputs = {"values_CK": values_CK, "support_CK": support_CK}
    _check("pursue_orthogonally", products_CM, energy_C, floor_C, gram_MM, k, outputs)
    n, n_atoms = products_CM.shape
    if n == 0:
        return
    eps = torch.finfo(torch.float32).eps
    # Without it the kernel takes a pointer that it does not follow.
    new_CM = gram_MM.diagonal().float().repeat(n, 1) if by_error else products_CM
    with _on(products_CM.device):
        pursue_sample_orthogonally[(n,)](
            products_CM,
            new_CM,
            energy_C,
            floor_C,
            gram_MM,
            values_CK,
            support_CK,
            n_atoms,
            k,
            max(rtol, eps) ** 2,
            limits.dependent(eps),
            limits.least_new(eps),
            BY_ERROR=by_error,
            **launch_orthogonal(n_atoms, k, most_m),
        )


def launch(
    n_atoms: int,
    k: int,
    registers_m: int = REGISTERS_M,
    device: torch.device | None = None,
    gram_dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Block sizes and compiler options of ``pursue``; on a device that was tried out those that were best there."""
    held = n_atoms <= registers_m
    block_m = n_atoms if held else min(registers_m, _STREAMED_PER_WARP * _STREAMED_WARPS)
    block_m = triton.next_power_of_2(block_m)
    warps = max(1, block_m // (_HELD_PER_WARP if held else _STREAMED_PER_WARP))
    blocks = {"BLOCK_M": block_m, "BLOCK_K": triton.next_power_of_2(k)}
    options: dict[str, Any] = {"num_warps": warps}
    if held:
        options |= _SHARING if block_m > _ALONE else {}
        options |= _measured(device, block_m, gram_dtype)
        options = options if _tried is None else _tried
    return {"IN_REGISTERS": held, **blocks, **options, "enable_fp_fusion": True}


@contextmanager
def launched_as(options: dict[str, Any]) -> Iterator[None]:
    """``pursue`` with these compiler options, whatever is best: to try them out."""
    global _tried
    _tried = options
    try:
        yield
    finally:
        _tried = None


def _measured(device: torch.device | None, block_m: int, gram_dtype: torch.dtype) -> dict[str, Any]:
    if device is None or device.type != "cuda":
        return {}
    best: dict[str, Any] = _launches().get(torch.cuda.get_device_name(device), {})
    return dict(best.get(f"{block_m} {gram_dtype}".replace("torch.", ""), {}))


@lru_cache
def _launches() -> dict[str, Any]:
    launches: dict[str, Any] = json.loads(LAUNCHES.read_text())
    return launches


def launch_orthogonal(n_atoms: int, k: int, most_m: int = REGISTERS_M) -> dict[str, Any]:
    """Block sizes and compiler options of ``pursue_orthogonally``."""
    block_k = triton.next_power_of_2(k)
    warps = max(_STREAMED_WARPS, block_k**2 // _FACTOR_PER_WARP)
    block_m = triton.next_power_of_2(min(n_atoms, most_m, warps * _STREAMED_PER_WARP))
    warps = max(1, block_m // _STREAMED_PER_WARP, block_k**2 // _FACTOR_PER_WARP)
    return {"BLOCK_M": block_m, "BLOCK_K": block_k, "num_warps": warps, "enable_fp_fusion": True}


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever device the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _check(
    operation: str,
    products_CM: Tensor,
    energy_C: Tensor,
    floor_C: Tensor,
    gram_MM: Tensor,
    k: int,
    outputs: dict[str, Tensor],
) -> None:
    """Kernels take bare pointers: a tensor of another shape or layout would be read past its end."""
    n, n_atoms = products_CM.shape
    reason = why_not(products_CM.device, n_atoms, k, orthogonal=operation == "pursue_orthogonally")
    if reason:
        raise ShapeError(f"{operation}: the Triton kernel cannot run: {reason}", cure="use backend 'auto'")
    floats, grams = (torch.float32,), (torch.float32, torch.float16)
    expected: dict[str, tuple[Tensor, tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "products_CM": (products_CM, (n, n_atoms), floats),
        "energy_C": (energy_C, (n,), floats),
        "floor_C": (floor_C, (n,), floats),
        "gram_MM": (gram_MM, (n_atoms, n_atoms), grams),
    }
    for name, tensor in outputs.items():
        expected[name] = (tensor, (n, k), (torch.int32,) if name == "support_CK" else floats)
    for name, (tensor, shape, dtypes) in expected.items():
        fits = tensor.shape == shape and tensor.dtype in dtypes and tensor.is_contiguous()
        if not fits or tensor.device != products_CM.device:
            raise ShapeError(
                f"{operation}: {name} does not fit the kernel",
                got=f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, strides {tensor.stride()}",
                limit=f"{shape}, contiguous, {' or '.join(map(str, dtypes))} on {products_CM.device}",
            )
