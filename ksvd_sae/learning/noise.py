"""Where noise ends among the coefficients of a code, if it ends anywhere: how to choose tau without knowing features.

A pursuit that goes on after the features of a sample are found fits what is left, with coefficients of one small size.
Where features are sparse and loud enough, sizes have two humps: noise, and features. Between them lies tau.
"""

import torch
from torch import Tensor

# Sizes are shares of the sample's norm; pursuit has few above a half before features overlap.
_LARGEST, _BINS = 0.5, 25
# The second hump must rise by so much of the valley, by so many standard deviations of a count, and by so much of all.
_RISE, _DEVIATIONS, _OF_ALL = 0.02, 3.0, 1e-3


class SizeHistogram:
    """Sizes of coefficients, batch by batch: |coefficient| of unit atoms over the norm of the centred sample."""

    def __init__(self) -> None:
        self.counts = torch.zeros(_BINS, dtype=torch.float64)

    def add(self, sizes: Tensor) -> None:
        """Any shape; zeros, and what is above a half, are left out."""
        self.counts += sizes[(sizes > 0) & (sizes < _LARGEST)].double().cpu().histc(_BINS, 0, _LARGEST)

    def gap(self) -> float | None:
        """The size between two humps; None where there is one hump."""
        smooth = [float(self.counts[max(0, i - 1) : i + 2].mean()) for i in range(_BINS)]
        # The first hump ends where counts fall for the first time; behind it, the largest rise of all.
        first = next((i for i in range(_BINS - 1) if smooth[i] > smooth[i + 1]), _BINS - 1)
        rise, valley = max((max(smooth[i:]) - smooth[i], i) for i in range(first, _BINS))
        by_chance = _DEVIATIONS * (2 * smooth[valley] / 3) ** 0.5
        if rise <= max(_RISE * smooth[valley], by_chance, _OF_ALL * float(self.counts.sum())):
            return None
        return (valley + 0.5) * _LARGEST / _BINS
