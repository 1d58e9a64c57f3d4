"""atoms·atomsᵀ: whole where it fits into memory, else row by row as a pursuit asks for it.

A pursuit reads the rows of the atoms that it picks, one a step. Whole, in float32, they are 4·M² bytes: 64 MiB for
4,096 atoms, 16 GiB for 65,536. Up to a quarter of the device's memory (``fits``) they are held: the rest is for the
atoms, the samples' products and whatever else runs there. Above it each row is a product made where it is read: the
pursuit runs in plain torch, and every step multiplies up to as much as the samples' own products do, B·M·D.
"""

import torch
from torch import Tensor

from ksvd_sae.device import memory_bytes
from ksvd_sae.learning.products import products
from ksvd_sae.ranks import ALONE, Ranks

_SHARE = 4
# Where several processes multiply a part each and send it: between CPUs sending takes as long as multiplying.
_SENT_BETWEEN = {"cuda"}


def fits(n_atoms: int, device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the Gram matrix of so many atoms is held there as a whole."""
    return _SHARE * n_atoms**2 * dtype.itemsize <= memory_bytes(device)


class GramRows:
    """The Gram matrix of atoms that is never held as a whole: made as it is read."""

    def __init__(self, atoms_MD: Tensor):
        self._atoms_MD = atoms_MD

    @property
    def shape(self) -> tuple[int, int]:
        return len(self._atoms_MD), len(self._atoms_MD)

    def __getitem__(self, atom_C: Tensor) -> Tensor:
        """Rows, (C, M); what several samples read is made once."""
        few_N, place_C = torch.unique(atom_C, return_inverse=True)
        return products(self._atoms_MD[few_N], self._atoms_MD)[place_C]

    def diagonal(self) -> Tensor:
        return self._atoms_MD.square().sum(dim=1)

    def among(self, support_CK: Tensor) -> Tensor:
        """Entries among the atoms of each row, (C, K, K) float64."""
        own_CKD = self._atoms_MD[support_CK].double()
        return own_CKD @ own_CKD.mT

    def combined(self, values_CK: Tensor, support_CK: Tensor) -> Tensor:
        """Σ_k values_k·row_k, (C, M)."""
        sums_CD = torch.einsum("ck,ckd->cd", values_CK, self._atoms_MD[support_CK])
        return products(sums_CD, self._atoms_MD)


Gram = Tensor | GramRows


def gram_of(atoms_MD: Tensor, dtype: torch.dtype | None = None, ranks: Ranks = ALONE) -> Gram:
    """The Gram matrix of these atoms, as it is read on their device.

    Args: dtype: of a whole one; None: the atoms'. ranks: of the processes that all need it, of the same atoms: on GPUs
        each makes its part of the rows.
    """
    dtype = dtype or atoms_MD.dtype
    if not fits(len(atoms_MD), atoms_MD.device, atoms_MD.dtype):
        return GramRows(atoms_MD)
    if ranks.size == 1 or atoms_MD.device.type not in _SENT_BETWEEN:
        return products(atoms_MD, atoms_MD).to(dtype)
    gram_MM = atoms_MD.new_empty(len(atoms_MD), len(atoms_MD), dtype=dtype)
    own = ranks.part(len(atoms_MD))
    gram_MM[own] = products(atoms_MD[own], atoms_MD).to(dtype)
    ranks.give_parts(gram_MM)
    return gram_MM
