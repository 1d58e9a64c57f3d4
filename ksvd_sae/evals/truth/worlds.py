"""Synthetic worlds whose features are known, of the kind of SynthSAEBench (arXiv 2602.14687).

A sample is a sparse sum of features: unit vectors, far more than dimensions, that fire by Zipf's law, a few often and
most of them rarely; in trees, where a child fires only with its parent, one child at a time, and as loud as the parent;
in correlated groups. SAELens makes all of it (``sae_lens.synthetic``).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sae_lens.synthetic import (
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
)
from torch import Tensor

_BATCH = 4096


@dataclass(frozen=True)
class Shape:
    """features in d_in dimensions, in trees of four children a node to depth 3 from so many roots (0: none).

    correlated: in 25 directions. often, rarely: how often the first feature fires, and the last.
    """

    features: int
    d_in: int
    roots: int
    correlated: bool = True
    often: float = 0.4
    rarely: float = 5e-4


SHAPES = {
    "tiny": Shape(256, 32, 4),
    "small": Shape(2_048, 128, 32),
    # As many fire in a sample as in the one above, where children make up for their parents by firing more often.
    "small-flat": Shape(2_048, 128, 0, correlated=False, often=0.27, rarely=3.4e-4),
    "synthsaebench-16k": Shape(16_384, 768, 128),
}


# Added to a world's seed: random atoms that are drawn by the same seed would be the world's own features.
_APART = 1_000_003


class World:
    """A world of a name and a seed; the published one is that of seed 42.

    Args: noise: length of Gaussian noise, as a part of the samples' (both as root mean squares).
    """

    def __init__(self, name: str, seed: int, noise: float = 0.0):
        shape = SHAPES[name]
        self._noise_std = 0.0
        self.model = SyntheticModel(
            SyntheticModelConfig(
                num_features=shape.features,
                hidden_dim=shape.d_in,
                firing_probability=ZipfianFiringProbabilityConfig(
                    exponent=0.5, max_prob=shape.often, min_prob=shape.rarely
                ),
                hierarchy=HierarchyConfig(
                    total_root_nodes=shape.roots,
                    branching_factor=4,
                    max_depth=3,
                    mutually_exclusive_portion=1.0,
                    compensate_probabilities=True,
                    scale_children_by_parent=True,
                )
                if shape.roots
                else None,
                orthogonalization=OrthogonalizationConfig(num_steps=100, lr=3e-4),
                correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1) if shape.correlated else None,
                mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
                std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
                bias=0.5,
                seed=seed if (name, seed) == ("synthsaebench-16k", 42) else _APART + seed,
            )
        )
        if noise:
            some_BD = torch.cat([x_BD for x_BD, _ in self.samples(_BATCH, seed=0)])
            self._noise_std = noise * float(some_BD.square().mean().sqrt())

    @property
    def features_GD(self) -> Tensor:
        """Unit rows."""
        return self.model.feature_dict.feature_vectors.detach()

    def samples(self, n: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of n samples in all, (B, d_in), and how loud each feature is in them, (B, features).

        The same ones for the same seed, whatever is drawn elsewhere meanwhile.
        """
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            state = torch.get_rng_state()
        for start in range(0, n, _BATCH):
            with torch.random.fork_rng(devices=()):
                torch.set_rng_state(state)
                x_BD, loud_BG = self.model.sample_with_features(min(_BATCH, n - start))
                if self._noise_std:
                    x_BD = x_BD + self._noise_std * torch.randn_like(x_BD)
                state = torch.get_rng_state()
            yield x_BD, loud_BG

    def firing(self) -> float:
        """How many features fire in a sample, on average."""
        counts = [(loud_BG > 0).sum(dim=1).float() for _, loud_BG in self.samples(_BATCH, seed=0)]
        return float(torch.cat(counts).mean())
