"""A sparse code: what coders return and updates read."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Code:
    """A sparse code: row i is Σ_s values[i, s]·atoms[support[i, s]].

    Attributes:
        values_BK: signed coefficients (float); unused slots hold exactly 0.
        support_BK: atom indices (int32), distinct among the used slots of a row; unused slots hold 0.
    """

    values_BK: Tensor
    support_BK: Tensor

    @classmethod
    def empty(cls, x_BD: Tensor, k: int) -> "Code":
        """All slots unused, for these samples."""
        return cls(x_BD.new_zeros(len(x_BD), k), torch.zeros(len(x_BD), k, dtype=torch.int32, device=x_BD.device))

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
