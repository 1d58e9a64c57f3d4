"""Where a coder runs.

=========  ==========================  =====================================================================
backend    where                       how
=========  ==========================  =====================================================================
``numba``  CPU, float32                one thread a sample, its products in cache for all its steps
``triton`` CUDA, float32               one program a sample, its products in registers for all its steps
``torch``  anywhere, float32, float64  a chunk of samples step by step; slow on the CPU, fallback elsewhere
=========  ==========================  =====================================================================

``auto`` takes the first that can run; where the Gram matrix is too large to be held (gram.py) that is ``torch``. Which
one ran belongs into manifests and tables: ``coder_backend`` tells.
"""

from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from ksvd_sae.errors import ShapeError
from ksvd_sae.learning.gram import fits

Backend = Literal["auto", "torch", "numba", "triton"]
Method = Literal["mp", "omp", "nonnegative_omp"]
# The products of a chunk are written by one pass and read by another: they should stay in the CPU's cache.
_CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 1 << 30}


def on_gpu(device: torch.device) -> bool:
    """Whether work runs there while the host goes on, so that asking for a number waits for all of it."""
    return device.type != "cpu"


def coder_backend(
    device: torch.device,
    backend: Backend = "auto",
    dtype: torch.dtype = torch.float32,
    *,
    n_atoms: int = 1,
    k: int = 1,
    method: Method = "mp",
) -> Literal["torch", "numba", "triton"]:
    """The backend that a pursuit runs on there.

    Args: n_atoms, k: of the dictionary; method: what is to run. The Triton kernels have limits of size, and no
        non-negative OMP.
    Raises: ShapeError for a backend that is forced where it cannot run, with the reason.
    """
    if backend not in ("auto", "torch", "numba", "triton"):
        raise ShapeError(f"coding: no backend of the name {backend!r}", limit="auto, torch, numba, triton")
    if backend == "torch":
        return "torch"

    def why_not(name: str) -> str | None:
        if name == "numba":
            reason = _why_not_numba(device, dtype)
        else:
            reason = _why_not_triton(device, dtype, n_atoms, k, method)
        if reason is None and not fits(n_atoms, device):
            reason = f"the Gram matrix of {n_atoms} atoms is too large to be held"
        return reason

    if backend == "numba" or backend == "triton":
        if reason := why_not(backend):
            raise ShapeError(f"coding: backend {backend!r} cannot run: {reason}", cure="use backend 'auto'")
        return backend
    # On the CPU Triton only interprets.
    if on_gpu(device) and not why_not("triton"):
        return "triton"
    return "torch" if why_not("numba") else "numba"


def _why_not_numba(device: torch.device, dtype: torch.dtype) -> str | None:
    if find_spec("numba") is None:
        return "numba is not installed"
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    return None if dtype == torch.float32 else f"it computes in float32, not {dtype}"


def _why_not_triton(device: torch.device, dtype: torch.dtype, n_atoms: int, k: int, method: Method) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if dtype != torch.float32:
        return f"it computes in float32, not {dtype}"
    if method == "nonnegative_omp":
        return "it has no non-negative OMP: there picked atoms may leave again"
    from ksvd_sae.learning.kernels import pursuit_triton

    return pursuit_triton.why_not(device, n_atoms, k, orthogonal=method == "omp")


def chunk_rows(x_BD: Tensor, n_atoms: int, memory_bytes: int | None, arrays: int) -> int:
    """How many rows, such that ``arrays`` arrays of chunk × M fit into ``memory_bytes``."""
    budget = memory_bytes or _CHUNK_BYTES.get(x_BD.device.type, 64 << 20)
    return max(1, budget // (arrays * n_atoms * x_BD.element_size()))


def chunks(x_BD: Tensor, n_atoms: int, memory_bytes: int | None, arrays: int) -> list[slice]:
    """Row ranges of that many."""
    size = chunk_rows(x_BD, n_atoms, memory_bytes, arrays)
    return [slice(start, start + size) for start in range(0, len(x_BD), size)]
