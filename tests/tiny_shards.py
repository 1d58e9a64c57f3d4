"""A finished harvest on disk without a model: shards, statistics and manifest as the harvest stage leaves them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksvd_sae.activations import shards
from ksvd_sae.activations.shards import ActivationShards
from tests.strategies import planted


def write_harvest(
    folder: Path, key: dict[str, Any], train_ND: Tensor, heldout_ND: Tensor, shard_samples: int = 400
) -> ActivationShards:
    """Write both parts under ``key`` and open the training part."""
    return shards.write_harvest(folder, key, train_ND.split(shard_samples), heldout_ND.split(shard_samples))


def raw_activations(n_samples: int, d_in: int = 16, n_atoms: int = 24, k: int = 3, seed: int = 0) -> Tensor:
    """Sparse in planted atoms, at a scale and around a mean far from 0 and 1, as real activations are."""
    x_ND = planted(n_samples, d_in, n_atoms, k, noise=0.02, seed=seed).x_BD
    return 50 * x_ND + 300 * torch.linspace(-1, 1, d_in)
