"""SAELens: its matching-pursuit encoder, a TopK encoder, and one training step or a whole training of a TopK SAE.

Its matching pursuit knows no negative coefficients. On [D; −D] it finds the signed code of D, with twice the atoms to
look at; on D alone it is faster and reaches less. It takes one atom a step, k steps.
"""

import io
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitSAEConfig
from sae_lens.saes.sae import SAE
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from ksvd_sae.bench.peers import Coder, Trainer, Updater
from ksvd_sae.bench.problems import Problem
from ksvd_sae.bench.rows import Who
from ksvd_sae.learning.sparse_coding import Code
from ksvd_sae.progress import printed_to

_PACKAGES = ("sae-lens",)
# Those of the demo's TopK SAE.
_PASSES, _BATCH, _LR = 10, 1024, 4e-3


def coders(problem: Problem, device: torch.device) -> list[Coder]:
    return [_pursuit(problem.shape.k, device, signed) for signed in (True, False)] + [_topk(problem, device)]


def _pursuit(k: int, device: torch.device, signed: bool) -> Coder:
    def directions(atoms_MD: Tensor) -> Tensor:
        return torch.cat([atoms_MD, -atoms_MD]) if signed else atoms_MD

    def prepare(x_ND: Tensor, atoms_MD: Tensor) -> Callable[[], Any]:
        rows_FD = directions(atoms_MD)
        sae = MatchingPursuitSAE(
            MatchingPursuitSAEConfig(
                d_in=rows_FD.shape[1],
                d_sae=len(rows_FD),
                device=str(device),
                residual_threshold=0.0,
                max_iterations=k,
                stop_on_duplicate_support=False,
            )
        )
        sae.W_dec.data = rows_FD.clone()
        return lambda: _encoded(sae, x_ND)

    def rebuild(code_NF: Tensor, atoms_MD: Tensor) -> Tensor:
        return code_NF @ directions(atoms_MD)

    config = "mp" if signed else "mp, non-negative"
    note = "non-negative on [D; −D], k steps" if signed else "coefficients cannot be negative; k steps"
    return Coder(Who("sae-lens", config, "torch", device=device, packages=_PACKAGES, note=note), prepare, rebuild)


def _topk(problem: Problem, device: torch.device) -> Coder:
    """The trained SAE if there is one for these activations, else an encoder tied to the atoms, for its time alone."""
    folder, centre_D = problem.topk_folder, problem.centre_D.to(device)
    shift_D = torch.zeros_like(centre_D) if folder is None else centre_D
    loaded: SAE[Any] | None = None if folder is None else SAE.load_from_disk(folder, device=str(device))

    def encoder(atoms_MD: Tensor) -> SAE[Any]:
        if loaded is not None:
            return loaded
        m, d = atoms_MD.shape
        sae = TopKSAE(TopKSAEConfig(d_in=d, d_sae=m, k=problem.shape.k, device=str(device)))
        sae.W_enc.data, sae.W_dec.data = atoms_MD.T.contiguous(), atoms_MD.clone()
        return sae

    def prepare(x_ND: Tensor, atoms_MD: Tensor) -> Callable[[], Any]:
        sae, raw_ND = encoder(atoms_MD), x_ND + shift_D
        return lambda: _encoded(sae, raw_ND)

    @torch.no_grad()
    def rebuild(code_NF: Tensor, atoms_MD: Tensor) -> Tensor:
        rebuilt_ND: Tensor = encoder(atoms_MD).decode(code_NF)
        return rebuilt_ND - shift_D

    note = "encoder tied to the atoms: shown for its time, not its error" if folder is None else "the config's own SAE"
    config = "topk, tied" if folder is None else "topk"
    return Coder(
        Who("sae-lens", config, "torch", device=device, packages=_PACKAGES, note=note), prepare, rebuild, greedy=False
    )


@torch.no_grad()
def _encoded(sae: SAE[Any], x_ND: Tensor) -> Tensor:
    code_NF: Tensor = sae.encode(x_ND)
    return code_NF


def updaters(problem: Problem, device: torch.device) -> list[Updater]:
    """One step (forward, backward, Adam) on all samples: what gradient descent pays for the same data."""

    def prepare(x_ND: Tensor, code: Code, atoms_MD: Tensor) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
        trainer = _sae_trainer(x_ND, len(atoms_MD), problem.shape.k, steps=1, batch=len(x_ND), lr=_LR, seed=0)
        scaled_ND = _scaled(x_ND)
        return lambda: None, lambda _: trainer.step(scaled_ND).loss.detach()

    note = "a gradient step on the same samples, for scale: its error after one step says nothing"
    who = Who("sae-lens", "TopK SAE, one step", "torch", device=device, packages=_PACKAGES, note=note)
    return [Updater(who, prepare, None)]


def trainers(problem: Problem, seed: int) -> list[Trainer]:
    def prepare(x_ND: Tensor, atoms_MD: Tensor) -> Callable[[], Any]:
        batch = min(_BATCH, len(x_ND))
        steps = max(1, _PASSES * len(x_ND) // batch)
        trainer = _sae_trainer(x_ND, len(atoms_MD), problem.shape.k, steps=steps, batch=batch, lr=_LR, seed=seed)

        def fit() -> Any:
            # The trainer draws its bar on stderr.
            with printed_to(io.StringIO(), "stderr"):
                return trainer.fit()

        return fit

    note = "trained with its own encoder, from its own start; its decoder rows are coded by OMP like the others"
    who = Who("sae-lens", "TopK SAE", "torch", packages=_PACKAGES, note=note)
    return [Trainer(who, _PASSES, prepare, lambda sae: sae.W_dec.detach().float())]


def _scaled(x_ND: Tensor) -> Tensor:
    """To an average variance of 1 per dimension: Adam's step size means nothing without a scale."""
    return x_ND / x_ND.square().mean().sqrt()


def _sae_trainer(
    x_ND: Tensor, m: int, k: int, *, steps: int, batch: int, lr: float, seed: int
) -> "SAETrainer[Any, Any]":
    torch.manual_seed(seed)
    device, scaled_ND = str(x_ND.device), _scaled(x_ND)
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[Tensor]:
        while True:
            order = torch.randperm(len(scaled_ND), generator=generator).to(scaled_ND.device)
            for picks in torch.split(order, batch):
                if len(picks) == batch:
                    yield scaled_ND[picks]

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=x_ND.shape[1], d_sae=m, k=k, device=device))
    config = SAETrainerConfig(
        total_training_samples=steps * batch,
        train_batch_size_samples=batch,
        lr=lr,
        lr_end=lr / 100,
        lr_decay_steps=round(0.2 * steps),
        lr_warm_up_steps=round(0.02 * steps),
        dead_feature_window=max(1, len(x_ND) // batch),
        device=device,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(config, sae, batches())
