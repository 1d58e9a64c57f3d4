"""The average of the atoms over the batches: less noise for the same samples.

An update from one batch fits that batch: the atoms jump about their best place, the more the fewer samples an atom has
in a batch. Larger batches jump less but leave fewer updates; the average keeps the updates of small batches and loses
their noise (Polyak & Juditsky 1992), at the cost of one M × D multiply-add a batch: held-out FVU 0.1058 instead of
0.1144 in batches of 4 M ("What the options of DB-KSVD are worth" in the docs, section Batches and their average). Early
atoms are far off, so the weights grow as a polynomial of the batch (Shamir & Zhang 2013).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

# The average looks back over about the last half to quarter of an atom's batches; 2 and 8 came out within 1 % of it.
_ETA = 3


@dataclass(frozen=True)
class Average:
    """Σ_t w_t·atoms_t with w_t rising like t^_ETA, for each atom since it was drawn.

    Attributes:
        mean_MD: as averaged, not of unit norm.
        age_M: batches since each atom was drawn (int64).
    """

    mean_MD: Tensor
    age_M: Tensor

    @classmethod
    def of(cls, atoms_MD: Tensor) -> "Average":
        """Of nothing yet."""
        return cls(atoms_MD, torch.zeros(len(atoms_MD), dtype=torch.int64, device=atoms_MD.device))

    def with_next(self, atoms_MD: Tensor, fresh_M: Tensor) -> "Average":
        """After one more batch; fresh atoms start anew, and so do those that have turned by more than 90°."""
        turned_M = (self.mean_MD * atoms_MD).sum(dim=1) <= 0
        age_M = torch.where(fresh_M | turned_M, 0, self.age_M) + 1
        weight_M1 = ((_ETA + 1) / (age_M + _ETA).to(atoms_MD.dtype))[:, None]
        return Average(torch.lerp(self.mean_MD, atoms_MD, weight_M1), age_M)

    @property
    def atoms_MD(self) -> Tensor:
        """Unit rows."""
        return normalize(self.mean_MD, dim=1)
