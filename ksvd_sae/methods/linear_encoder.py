"""A linear encoder with TopK for a dictionary that stays as it is: what a SAE's way of coding makes of given atoms.

The trainer sees z = ((x − centre)·W)·s as for any SAE, with the dictionary's own centre and metric W. There its atoms
are unit rows; they are the decoder, whose bias is 0, and neither moves: W_enc and b_enc alone are trained.

The start is W_enc = c·W_decᵀ. With c = 1 each latent would rebuild its sample alone, and k of them overshoot: where
atoms share a direction, as on language models' residual streams, by k times, and the error is hundreds of times the
variance. So c is the one scale that fits the first samples best.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import SAE, SAEMetadata
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor

from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.dictionary import Dictionary
from ksvd_sae.errors import ShapeError
from ksvd_sae.methods.derived_config import LinearTopKConfig
from ksvd_sae.methods.sae.raw_units import TrainedSpace, to_raw_units
from ksvd_sae.methods.sae.sparse_steps import SparseTopKTrainingSAE, sparse_steps_pay
from ksvd_sae.methods.sae.training import fit_sae, trained_space

_SCALE_SAMPLES = 4096


def train_linear_topk(
    config: LinearTopKConfig,
    dictionary: Dictionary,
    shards: ActivationShards,
    folder: Path,
    *,
    model_name: str,
    hook_name: str,
    context_size: int,
    seed: int,
    device: torch.device,
    log_steps: int = 20,
) -> dict[str, Any]:
    """Fit the encoder and save a SAELens TopK SAE in raw units: unit decoder rows along the atoms, b_dec the centre.

    With ``config.signed`` the decoder is [D; −D], twice the latents, the atoms first. Saved and logged as by
    ``train_sae``; the class is SAELens' TopKSAE, or WeightedTopKSAE for a dictionary with a metric.

    Args: dictionary: of which atoms, centre and metric are taken.
    Returns: facts for the manifest, as ``train_sae`` gives; samples_seen are the encoder's alone.
    Raises: ShapeError (k too large, a dictionary of another width).
    """
    if config.k is None or config.k > min(dictionary.n_atoms, shards.d_in) or dictionary.d_in != shards.d_in:
        raise ShapeError(
            "train_linear_topk: the dictionary does not fit k or the activations",
            got=f"k = {config.k}, atoms {tuple(dictionary.atoms_MD.shape)}",
            limit=f"k at most {min(dictionary.n_atoms, shards.d_in)}, atoms of {shards.d_in} dimensions",
        )
    torch.manual_seed(seed)
    rows_FD = _rows(dictionary.atoms_MD, config)
    training_config = TopKTrainingSAEConfig(
        d_in=shards.d_in,
        d_sae=len(rows_FD),
        k=config.k,
        aux_loss_coefficient=config.aux_loss_coefficient,
        device=str(device),
        metadata=SAEMetadata(model_name=model_name, hook_name=hook_name, context_size=context_size, prepend_bos=True),
    )
    sae = (SparseTopKTrainingSAE if sparse_steps_pay(device) else TopKTrainingSAE)(training_config)
    with torch.no_grad():
        sae.W_dec.copy_(rows_FD)
        sae.W_enc.copy_(rows_FD.T)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    # Without gradients, Adam leaves them alone.
    sae.W_dec.requires_grad_(False)
    sae.b_dec.requires_grad_(False)
    space = trained_space(shards, dictionary.weighting, dictionary.centre_D).to(device)
    first_BD = next(shards.batches(min(_SCALE_SAMPLES, shards.n_samples)))
    _scale_(sae, space.apply(first_BD.to(device)))
    save = partial(_save, sae, space, _rows(dictionary.unit_raw_atoms(), config))
    return fit_sae(config, sae, space, shards, folder, save, seed=seed, log_steps=log_steps)


@torch.no_grad()
def _scale_(sae: TopKTrainingSAE, z_BD: Tensor) -> None:
    """Multiply the encoder by the c that makes ‖z − c·ẑ‖² least."""
    rebuilt_BD = sae.decode(sae.encode(z_BD)).double()
    squares = float(rebuilt_BD.square().sum())
    if squares > 0:
        sae.W_enc.mul_(float((z_BD.double() * rebuilt_BD).sum()) / squares)


def _rows(atoms_MD: Tensor, config: LinearTopKConfig) -> Tensor:
    return torch.cat([atoms_MD, -atoms_MD]) if config.signed else atoms_MD


def _save(sae: Any, space: TrainedSpace, rows_FD: Tensor, folder: Path) -> None:
    """The SAE in raw units, with the rows and the centre as they are, not as they come back through two maps."""
    with tempfile.TemporaryDirectory() as trained:
        sae.save_inference_model(trained)
        raw = to_raw_units(SAE.load_from_disk(trained), space)
    with torch.no_grad():
        raw.W_dec.copy_(rows_FD)
        raw.b_dec.copy_(space.centre_D)
    raw.save_model(folder)
