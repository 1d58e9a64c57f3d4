"""A finished harvest on disk without a model: shards, statistics and manifest as the harvest stage leaves them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksvd_sae.activations.shards import (
    STAGE,
    STATISTICS_FILE,
    ActivationShards,
    shard_name,
    write_shard,
    write_statistics,
)
from ksvd_sae.activations.statistics import RunningStatistics
from ksvd_sae.store import write_manifest
from tests.strategies import planted


def write_harvest(
    folder: Path, key: dict[str, Any], train_ND: Tensor, heldout_ND: Tensor, shard_samples: int = 400
) -> ActivationShards:
    """Write both parts under ``key`` and open the training part."""
    running, parts = RunningStatistics(train_ND.shape[1]), {}
    running.add(train_ND)
    for part, x_ND in (("train", train_ND), ("heldout", heldout_ND)):
        shards = [
            write_shard(folder / part / shard_name(index), x_CD) for index, x_CD in enumerate(x_ND.split(shard_samples))
        ]
        parts[part] = {"n_samples": len(x_ND), "shards": shards, "outliers": 0}
    statistics = running.result(float(torch.linalg.vector_norm(train_ND, dim=1).median()))
    write_statistics(folder / STATISTICS_FILE, statistics)
    write_manifest(
        folder,
        STAGE,
        key,
        d_in=train_ND.shape[1],
        parts=parts,
        statistics={
            "n_samples": statistics.n_samples,
            "mean_norm": statistics.mean_norm,
            "median_norm": statistics.median_norm,
            "scale": statistics.scale,
            "outlier_limit": None,
        },
        seconds=0.0,
    )
    return ActivationShards.open(folder, key=key)


def raw_activations(n_samples: int, d_in: int = 16, n_atoms: int = 24, k: int = 3, seed: int = 0) -> Tensor:
    """Sparse in planted atoms, at a scale and around a mean far from 0 and 1, as real activations are."""
    x_ND = planted(n_samples, d_in, n_atoms, k, noise=0.02, seed=seed).x_BD
    return 50 * x_ND + 300 * torch.linspace(-1, 1, d_in)
