"""Samples whose mean moves away from the centre that they are coded about.

Batch by batch there is no mean of all samples to take off: the first batch's stands for it, and stays, as the atoms are
learned about it and codes would change their meaning with it. If the samples then move, every sample has the way that
they went in its code, and atoms turn into that direction. Of planted samples that moved by 1, 2, 5 and 20 times what
they lie apart the FVU is 0.38, 0.50, 0.77 and 3.9 (without a drift 0.27), where learning from all samples at once
leaves 0.28 to 0.34 (one-off). So the mean of what has come is followed, and training stops where it has gone further
than the samples lie apart.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ksvd_sae.errors import ActivationError

# ‖mean − centre‖², in mean squared distances of a sample from its batch's mean; a first batch of n is off by 1/n.
_FURTHEST = 1.0


@dataclass(frozen=True)
class Drift:
    """The mean of the samples so far, about the centre and in the space that atoms live in.

    Attributes:
        n_samples: that the mean is of.
        mean_D: float64; None is 0, as after learning about the mean of all samples.
        within: Σ‖x − x̄‖² about the mean of each batch, and n_within: Σ (n − 1) of these batches.
    """

    n_samples: int = 0
    mean_D: Tensor | None = None
    within: float = 0.0
    n_within: int = 0

    def with_next(self, x_BD: Tensor, variance: float, exponent: int) -> "Drift":
        """After one more batch.

        Args: as ``checked_batch`` gives them.
        Raises: ActivationError where the mean has gone too far.
        Cost: a look at the samples, and a wait for a GPU.
        """
        n = self.n_samples + len(x_BD)
        mean_D = x_BD.mean(dim=0, dtype=torch.float64) * 2.0**exponent * (len(x_BD) / n)
        if self.mean_D is not None:
            mean_D = mean_D + self.mean_D * (self.n_samples / n)
        new = Drift(n, mean_D, self.within + variance * 4.0**exponent, self.n_within + len(x_BD) - 1)
        distance, apart = float(torch.linalg.vector_norm(mean_D)), (new.within / max(1, new.n_within)) ** 0.5
        if distance**2 > _FURTHEST * apart**2:
            raise ActivationError(
                "DB-KSVD: the samples have drifted away from the centre, which is the mean of the first batch",
                got=f"a mean over {n} samples {distance:.3g} from it, where samples lie {apart:.3g} apart",
                limit=f"{_FURTHEST**0.5 * apart:.3g}",
                cause="batches that are not shuffled, of other tokens, layers or models than the first, or a first "
                "batch that is not like the rest",
                cure="fit with all samples (a tensor, a memory-mapped array, activation shards); or shuffle them "
                "before they are cut into batches; or centre=False; what was learned so far is kept",
            )
        return new
