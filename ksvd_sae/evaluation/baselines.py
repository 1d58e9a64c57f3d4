"""SAEs trained by SAELens' own trainer on the same shards as the dictionaries."""

import contextlib
import io
import logging
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAE, SAEMetadata
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.config import TopKSAEConfig
from ksvd_sae.errors import ManifestError, ShapeError
from ksvd_sae.progress import progress

logger = logging.getLogger(__name__)


def train_topk_sae(
    config: TopKSAEConfig,
    shards: ActivationShards,
    folder: Path,
    *,
    model_name: str,
    hook_name: str,
    context_size: int,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """Train a TopK SAE and save it in SAELens' format, decoder rows of unit norm, in raw units.

    The trainer sees centred activations scaled to an average variance of 1 per dimension: Adam's step size means
    nothing without a scale. Both maps are folded into the weights afterwards, which is exact for TopK.

    Returns: facts for the manifest (samples_seen, seconds, dead latents of the last window).
    """
    if config.k > config.n_atoms or config.k > shards.d_in:
        raise ShapeError("train_topk_sae: k too large", got=config.k, limit=min(config.n_atoms, shards.d_in))
    started = time.perf_counter()
    torch.manual_seed(seed)
    statistics = shards.statistics
    centre_D, scale = statistics.centre_D.float().to(device), 1 / statistics.scale
    total = config.passes * shards.n_samples
    batch_samples = min(config.batch_samples, shards.n_samples)
    steps = total // batch_samples
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=shards.d_in,
            d_sae=config.n_atoms,
            k=config.k,
            aux_loss_coefficient=config.aux_loss_coefficient,
            device=str(device),
        )
    )
    trainer_config = SAETrainerConfig(
        total_training_samples=steps * batch_samples,
        train_batch_size_samples=batch_samples,
        lr=config.lr,
        lr_end=config.lr / 100,
        lr_decay_steps=round(config.lr_decay_fraction * steps),
        lr_warm_up_steps=round(0.02 * steps),
        dead_feature_window=max(1, shards.n_samples // batch_samples),
        device=str(device),
        logger=LoggingConfig(log_to_wandb=False),
    )
    with progress("train topk_sae", total, "samples") as advance:

        def scaled() -> Iterator[Tensor]:
            for batch_BD in _endless(shards, batch_samples, seed):
                advance(len(batch_BD))
                yield (batch_BD.to(device) - centre_D) * scale

        # The trainer draws its own bar on stderr; ours shows the same.
        with contextlib.redirect_stderr(io.StringIO()):
            trainer: SAETrainer[Any, Any] = SAETrainer(trainer_config, sae, scaled())
            trainer.fit()
    sae.cfg.metadata = SAEMetadata(
        model_name=model_name, hook_name=hook_name, context_size=context_size, prepend_bos=True
    )
    sae.save_inference_model(folder)
    _to_raw_units(folder, centre_D.cpu(), scale)
    return {
        "samples_seen": trainer.n_training_samples,
        "dead_at_end": int(trainer.dead_neurons.sum()),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _endless(shards: ActivationShards, batch_samples: int, seed: int) -> Iterator[Tensor]:
    """Full batches, pass after pass, each pass in another order."""
    for index in count():
        for batch_BD in shards.batches(batch_samples, seed=seed + index):
            if len(batch_BD) == batch_samples:
                yield batch_BD


@torch.no_grad()
def _to_raw_units(folder: Path, centre_D: Tensor, scale: float) -> None:
    """Rewrite the saved SAE of z = scale·(x − centre) as one of x.

    (z − b_dec)·W_enc + b_enc = scale·[(x − centre − b_dec/scale)·W_enc + b_enc/scale]: the choice of the top k is
    the same, codes shrink by scale, and with unit decoder rows only the two biases change.
    """
    sae: Any = SAE.load_from_disk(folder)
    sae.b_enc.data /= scale
    sae.b_dec.data = sae.b_dec.data / scale + centre_D
    sae.save_model(folder)


def load_sae(folder: Path, device: torch.device) -> SAE[Any]:
    """A SAELens SAE from disk (safetensors and JSON: nothing is unpickled)."""
    if not (folder / "cfg.json").exists():
        raise ManifestError(f"loading SAE {folder}: no cfg.json there", cure="run `ksvd-sae train` first")
    return SAE.load_from_disk(folder, device=str(device))
