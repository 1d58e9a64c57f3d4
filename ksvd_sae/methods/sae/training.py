"""SAEs trained by SAELens' own trainer on the same shards as the dictionaries."""

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAE, SAEMetadata, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.errors import ConfigError, ManifestError, ShapeError
from ksvd_sae.learning.matryoshka import paper_groups
from ksvd_sae.learning.weighting import Weighting
from ksvd_sae.methods.options import SAETraining
from ksvd_sae.methods.sae.raw_units import TrainedSpace, to_raw_units
from ksvd_sae.methods.sae.sparse_steps import (
    SparseBatchTopKTrainingSAE,
    SparseMatryoshkaTrainingSAE,
    SparseTopKTrainingSAE,
    sparse_steps_pay,
)
from ksvd_sae.progress import Advance, progress
from ksvd_sae.run.config import (
    BatchTopKSAEConfig,
    JumpReLUSAEConfig,
    MatryoshkaBatchTopKSAEConfig,
    SAEConfig,
    TopKSAEConfig,
)

LOG_FILE = "train_log.jsonl"
# Samples that say how large weighted activations are, and where a BatchTopK SAE's threshold lies.
_SCALE_SAMPLES, _THRESHOLD_SAMPLES = 65_536, 16_384


def train_sae(
    config: SAEConfig,
    shards: ActivationShards,
    folder: Path,
    *,
    model_name: str,
    hook_name: str,
    context_size: int,
    seed: int,
    device: torch.device,
    weighting: Weighting | None = None,
    log_steps: int = 20,
) -> dict[str, Any]:
    """Train an SAE and save it in SAELens' format, decoder rows of unit norm, in raw units.

    The trainer sees centred activations, weighted if asked for and scaled to an average variance of 1 a dimension:
    Adam's step size means nothing without a scale. All of it is folded into the weights afterwards, exactly
    (``to_raw_units``). BatchTopK and Matryoshka SAEs become JumpReLU SAEs, as SAELens saves them, except for their
    threshold (``_set_threshold``).

    Into ``folder`` go the SAE; train_log.jsonl, a line every ``log_steps`` steps (samples_seen; fvu of the batch in the
    trainer's coordinates, before the step; l0; dead: latents that have not fired for as many steps as a pass has); and
    snapshot-<n> for each n of ``config.snapshots``: the SAE after the first step that has seen n samples, at the
    learning rate of that step.

    Args: weighting: the metric to train in; None for the activations' own.
    Returns: facts for the manifest: samples_seen, seconds, dead_at_end, l0_at_end (of the last batch), products
        ('sparse' or 'dense': how steps were computed).
    Raises: ShapeError (k too large, groups, a weighting of another width), ConfigError (a snapshot beyond the end).
    """
    batch_samples, steps = size_of_training(config, shards)
    _check(config, shards, weighting, steps * batch_samples)
    torch.manual_seed(seed)
    metadata = SAEMetadata(model_name=model_name, hook_name=hook_name, context_size=context_size, prepend_bos=True)
    sae = _training_sae(config, steps, {"d_in": shards.d_in, "device": str(device), "metadata": metadata})
    space = trained_space(shards, weighting).to(device)
    save = partial(_save, sae, space, shards, batch_samples)
    return fit_sae(config, sae, space, shards, folder, save, seed=seed, log_steps=log_steps, snapshots=config.snapshots)


def size_of_training(config: SAETraining, shards: ActivationShards) -> tuple[int, int]:
    """Samples in a batch, and steps."""
    batch_samples = min(config.batch_samples, shards.n_samples)
    return batch_samples, config.passes * shards.n_samples // batch_samples


def fit_sae(
    config: SAETraining,
    sae: Any,
    space: TrainedSpace,
    shards: ActivationShards,
    folder: Path,
    save: Callable[[Path], None],
    *,
    seed: int,
    log_steps: int,
    snapshots: Sequence[int] = (),
) -> dict[str, Any]:
    """SAELens' trainer on the shards in ``space``, with log and snapshots, saved by ``save``; see ``train_sae``.

    Args: sae: SAELens' training SAE, on the device of ``space``.
    """
    started, device = time.perf_counter(), space.centre_D.device
    batch_samples, steps = size_of_training(config, shards)
    data = (space.apply(batch_BD.to(device)) for batch_BD in _endless(shards, batch_samples, seed))
    folder.mkdir(parents=True, exist_ok=True)
    # The trainer draws its own bar on stderr; ours shows the same.
    with progress(f"train {_kind(config)}", steps * batch_samples, "samples") as advance:
        monitor = _Monitor(folder, log_steps, steps, snapshots, save, advance)
        trainer = _Trainer(_trainer_config(config, steps, batch_samples, shards.n_samples, device), sae, data, monitor)
        with contextlib.redirect_stderr(io.StringIO()):
            trainer.fit()
    save(folder)
    return {
        "samples_seen": trainer.n_training_samples,
        "dead_at_end": monitor.last["dead"],
        "l0_at_end": round(monitor.last["l0"], 2),
        "products": "sparse" if isinstance(sae, _SPARSE) else "dense",
        "seconds": round(time.perf_counter() - started, 1),
    }


def train_topk_sae(config: TopKSAEConfig, shards: ActivationShards, folder: Path, **setting: Any) -> dict[str, Any]:
    """``train_sae`` by its first name."""
    return train_sae(config, shards, folder, **setting)


def load_sae(folder: Path, device: torch.device) -> SAE[Any]:
    """A SAELens SAE from disk (safetensors and JSON: nothing is unpickled)."""
    if not (folder / "cfg.json").exists():
        raise ManifestError(f"loading SAE {folder}: no cfg.json there", cure="run `ksvd-sae train` first")
    return SAE.load_from_disk(folder, device=str(device))


# ---------------------------------------------------------------- what SAELens is given


_SPARSE = (SparseTopKTrainingSAE, SparseBatchTopKTrainingSAE, SparseMatryoshkaTrainingSAE)


def _kind(config: SAETraining) -> str:
    return str(type(config).model_fields["kind"].default)


def _check(config: SAEConfig, shards: ActivationShards, weighting: Weighting | None, n_total: int) -> None:
    if max(config.snapshots, default=0) > n_total:
        raise ConfigError(
            "train_sae: a snapshot after the last sample",
            got=max(config.snapshots),
            limit=f"{n_total}: {config.passes} passes in whole batches",
        )
    if config.k > config.n_atoms or config.k > shards.d_in:
        raise ShapeError("train_sae: k too large", got=config.k, limit=min(config.n_atoms, shards.d_in))
    if weighting is not None and weighting.d_in != shards.d_in:
        raise ShapeError("train_sae: the weighting has another width", got=weighting.d_in, limit=shards.d_in)
    if isinstance(config, MatryoshkaBatchTopKSAEConfig) and sum(_groups(config)) != config.n_atoms:
        raise ShapeError(
            "train_sae: groups do not add up to n_atoms",
            got=f"{list(_groups(config))}, sum {sum(_groups(config))}",
            limit=config.n_atoms,
            cure="groups: paper",
        )


def _groups(config: MatryoshkaBatchTopKSAEConfig) -> tuple[int, ...]:
    return paper_groups(config.n_atoms) if config.groups == "paper" else tuple(config.groups)


def _training_sae(config: SAEConfig, steps: int, common: dict[str, Any]) -> Any:
    """SAELens' training SAE of the config's kind.

    Args: common: d_in, device, metadata.
    """
    common, sparse = {**common, "d_sae": config.n_atoms}, sparse_steps_pay(torch.device(common["device"]))
    if isinstance(config, JumpReLUSAEConfig):
        jumprelu = JumpReLUTrainingSAEConfig(
            jumprelu_init_threshold=config.initial_threshold,
            jumprelu_bandwidth=config.bandwidth,
            jumprelu_sparsity_loss_mode=config.sparsity_loss,
            l0_coefficient=config.l0_coefficient,
            l0_warm_up_steps=round(config.l0_warm_up_fraction * steps),
            jumprelu_ste_to_input=config.threshold_gradient_to_all,
            pre_act_loss_coefficient=config.pre_act_loss_coefficient,
            target_l0=config.k if config.sparsity_loss == "quadratic" else None,
            **common,
        )
        return JumpReLUTrainingSAE(jumprelu)
    if not isinstance(config, TopKSAEConfig | BatchTopKSAEConfig | MatryoshkaBatchTopKSAEConfig):
        raise ConfigError("train_sae: no SAE of this kind", got=type(config).__name__)
    common = {**common, "k": config.k, "aux_loss_coefficient": config.aux_loss_coefficient}
    if isinstance(config, TopKSAEConfig):
        return (SparseTopKTrainingSAE if sparse else TopKTrainingSAE)(TopKTrainingSAEConfig(**common))
    if isinstance(config, BatchTopKSAEConfig):
        return (SparseBatchTopKTrainingSAE if sparse else BatchTopKTrainingSAE)(BatchTopKTrainingSAEConfig(**common))
    widths = list(accumulate(_groups(config)))
    nested = MatryoshkaBatchTopKTrainingSAEConfig(matryoshka_widths=widths, **common)
    return (SparseMatryoshkaTrainingSAE if sparse else MatryoshkaBatchTopKTrainingSAE)(nested)


def _trainer_config(
    config: SAETraining, steps: int, batch_samples: int, n_samples: int, device: torch.device
) -> SAETrainerConfig:
    return SAETrainerConfig(
        total_training_samples=steps * batch_samples,
        train_batch_size_samples=batch_samples,
        lr=config.lr,
        lr_end=config.lr / 100,
        lr_decay_steps=round(config.lr_decay_fraction * steps),
        lr_warm_up_steps=round(0.02 * steps),
        dead_feature_window=max(1, n_samples // batch_samples),
        device=str(device),
        logger=LoggingConfig(log_to_wandb=False),
    )


def trained_space(
    shards: ActivationShards, weighting: Weighting | None, centre_D: Tensor | None = None
) -> TrainedSpace:
    """The coordinates in which activations have an average variance of 1 a dimension.

    Args: centre_D: None takes the mean of the activations.
    """
    statistics = shards.statistics
    centre_D = statistics.centre_D.float() if centre_D is None else centre_D
    if weighting is None:
        return TrainedSpace(centre_D, 1 / statistics.scale)
    squares, n = 0.0, 0
    for batch_BD in shards.batches(min(16_384, shards.n_samples)):
        squares += float(weighting.apply(batch_BD - centre_D).double().square().mean()) * len(batch_BD)
        n += len(batch_BD)
        if n >= _SCALE_SAMPLES:
            break
    return TrainedSpace(centre_D, (n / squares) ** 0.5, weighting)


def _endless(shards: ActivationShards, batch_samples: int, seed: int) -> Iterator[Tensor]:
    """Full batches, pass after pass, each pass in another order."""
    for index in count():
        for batch_BD in shards.batches(batch_samples, seed=seed + index):
            if len(batch_BD) == batch_samples:
                yield batch_BD


def _save(sae: Any, space: TrainedSpace, shards: ActivationShards, batch_samples: int, folder: Path) -> None:
    """The training SAE as it is now, as an inference SAE in raw units."""
    if isinstance(sae, BatchTopKTrainingSAE):
        _set_threshold(sae, space, shards, batch_samples)
    with tempfile.TemporaryDirectory() as trained:
        sae.save_inference_model(trained)
        to_raw_units(SAE.load_from_disk(trained), space).save_model(folder)


@torch.no_grad()
def _set_threshold(sae: Any, space: TrainedSpace, shards: ActivationShards, batch_samples: int) -> None:
    """The threshold of inference: the smallest activation that the weights as they are choose, mean over batches.

    SAELens takes a running mean over the last hundred steps or so that starts at 0: after 60 steps it is half of what
    it should be, and the SAE uses many more latents than k.
    """
    smallest, left = [], _THRESHOLD_SAMPLES
    for batch_BD in shards.batches(batch_samples):
        acts_BM = sae.encode(space.apply(batch_BD.to(space.centre_D.device)))
        if bool((acts_BM > 0).any()):
            smallest.append(acts_BM[acts_BM > 0].min().double())
        left -= len(batch_BD)
        if left <= 0:
            break
    if smallest:
        sae.topk_threshold.fill_(torch.stack(smallest).mean())


# ---------------------------------------------------------------- after every step


class _Trainer(SAETrainer[Any, Any]):
    """SAELens' trainer; calls ``on_step(trainer, output)`` after every step."""

    def __init__(
        self,
        config: SAETrainerConfig,
        sae: Any,
        data: Iterator[Tensor],
        on_step: Callable[["_Trainer", TrainStepOutput], None],
    ):
        super().__init__(config, sae, data)
        self._on_step = on_step
        # Adam in one pass over the weights instead of ten or so; the same update to rounding.
        if torch.device(config.device).type == "cpu":
            for group in self.optimizer.param_groups:
                group["fused"] = True

    def step(self, batch: Tensor) -> TrainStepOutput:
        output = super().step(batch)
        self._on_step(self, output)
        return output


class _Monitor:
    """The log, the progress bar and the snapshots.

    last: the last line of the log.
    """

    def __init__(
        self,
        folder: Path,
        log_steps: int,
        steps: int,
        snapshots: Sequence[int],
        save: Callable[[Path], None],
        advance: Advance,
    ):
        self._folder, self._log_steps, self._steps = folder, log_steps, steps
        self._waiting, self._save, self._advance = sorted(set(snapshots)), save, advance
        self.last: dict[str, Any] = {}
        (folder / LOG_FILE).write_text("")

    def __call__(self, trainer: _Trainer, output: TrainStepOutput) -> None:
        # The trainer counts the step when this is over.
        done = trainer.n_training_steps + 1
        if done % self._log_steps == 0 or done in (1, self._steps):
            self.last = _entry(trainer, output)
            with (self._folder / LOG_FILE).open("a") as file:
                file.write(json.dumps(self.last) + "\n")
        self._advance(
            len(output.sae_in), f"FVU {self.last['fvu']:.4f} L0 {self.last['l0']:.1f} dead {self.last['dead']}"
        )
        while self._waiting and trainer.n_training_samples >= self._waiting[0]:
            self._save(self._folder / f"snapshot-{self._waiting.pop(0)}")


@torch.no_grad()
def _entry(trainer: _Trainer, output: TrainStepOutput) -> dict[str, Any]:
    z_BD, acts = output.sae_in, output.feature_acts
    fired = acts.values() if acts.is_sparse else acts
    error = float((output.sae_out - z_BD).double().square().sum())
    return {
        "samples_seen": trainer.n_training_samples,
        "fvu": error / float((z_BD - z_BD.mean(dim=0)).double().square().sum()),
        "l0": int((fired != 0).sum()) / len(z_BD),
        "dead": int(trainer.dead_neurons.sum()),
    }
