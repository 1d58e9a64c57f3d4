"""SAEs trained by SAELens' own trainer on the same shards as the dictionaries."""

import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.sae import SAE, SAEMetadata, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.errors import ConfigError, ShapeError
from ksvd_sae.learning.fvu import fvu
from ksvd_sae.learning.weighting import Weighting
from ksvd_sae.methods.base import TRAIN_LOG, Facts, TrainingSetting
from ksvd_sae.methods.sae import SAEMethod, SAETraining
from ksvd_sae.methods.sae.raw_units import TrainedSpace, to_raw_units
from ksvd_sae.methods.sae.sparse_steps import SparseSteps, sparse_steps_pay
from ksvd_sae.progress import Advance, printed_to, progress

# Samples that say how large weighted activations are, and where a BatchTopK SAE's threshold lies.
_SCALE_SAMPLES, _THRESHOLD_SAMPLES = 65_536, 16_384


def train_sae(
    method: SAEMethod,
    setting: TrainingSetting,
    folder: Path,
    weighting: Weighting | None = None,
    log_steps: int = 20,
) -> Facts:
    """Train an SAE and save it in SAELens' format, decoder rows of unit norm, in raw units.

    The trainer sees centred activations, weighted if asked for and scaled to an average variance of 1 a dimension:
    Adam's step size means nothing without a scale. All of it is folded into the weights afterwards, exactly
    (``to_raw_units``). BatchTopK and Matryoshka SAEs become JumpReLU SAEs, as SAELens saves them, except for their
    threshold (``_set_threshold``).

    Into ``folder`` go the SAE; train_log.jsonl, a line every ``log_steps`` steps (samples_seen; fvu of the batch in the
    trainer's coordinates, before the step; l0; dead: latents that have not fired for as many steps as a pass has); and
    snapshot-<n> for each n of ``method.snapshots``: the SAE after the first step that has seen n samples, at the
    learning rate of that step.

    Args: weighting: the metric to train in; None for the activations' own.
    Returns: with dead_at_end, l0_at_end (of the last batch), products ('sparse' or 'dense': how steps were computed).
    Raises: ShapeError (k too large, groups, a weighting of another width), ConfigError (a snapshot beyond the end).
    """
    shards, device = setting.shards, setting.device
    batch_samples, steps = size_of_training(method, shards)
    last_snapshot, last_sample = max(method.snapshots, default=0), steps * batch_samples
    if last_snapshot > last_sample:
        raise ConfigError(
            "train_sae: a snapshot after the last sample",
            got=last_snapshot,
            limit=f"{last_sample}: {method.passes} passes in whole batches",
        )
    if weighting is not None and weighting.d_in != shards.d_in:
        raise ShapeError("train_sae: the weighting has another width", got=weighting.d_in, limit=shards.d_in)
    method.check_sizes(shards.d_in)
    torch.manual_seed(setting.seed)
    sae = method.training_sae(
        steps,
        sparse_steps_pay(device),
        d_in=shards.d_in,
        d_sae=method.n_atoms,
        device=str(device),
        **at_the_hook(setting),
    )
    if method.frozen_decoder:
        _freeze_decoder_(sae)
    space = trained_space(shards, weighting).to(device)
    save = partial(_save, sae, space, shards, batch_samples)
    return fit_sae(method, sae, space, setting, folder, save, method.k, log_steps, method.snapshots)


@torch.no_grad()
def _freeze_decoder_(sae: Any) -> None:
    # SAELens draws directions and gives them the norm 0.1.
    sae.W_dec.copy_(torch.nn.functional.normalize(sae.W_dec, dim=1))
    # Without a gradient, Adam leaves it alone.
    sae.W_dec.requires_grad_(False)


def at_the_hook(setting: TrainingSetting) -> dict[str, Any]:
    """What SAELens keeps of the place that an SAE is for, in its config."""
    metadata = SAEMetadata(
        model_name=setting.model_name,
        hook_name=setting.hook,
        context_size=setting.context_tokens,
        prepend_bos=setting.shards.prepend_bos,
        **setting.of_weights,
    )
    # At other hooks with heads SAELens' classes refuse it.
    return {"metadata": metadata, "reshape_activations": "hook_z" if setting.hook.endswith("hook_z") else "none"}


def size_of_training(options: SAETraining, shards: ActivationShards) -> tuple[int, int]:
    """Samples in a batch, and steps."""
    batch_samples = min(options.batch_samples, shards.n_samples)
    return batch_samples, options.passes * shards.n_samples // batch_samples


def fit_sae(
    options: SAETraining,
    sae: Any,
    space: TrainedSpace,
    setting: TrainingSetting,
    folder: Path,
    save: Callable[[Path], None],
    k: int,
    log_steps: int,
    snapshots: Sequence[int] = (),
) -> Facts:
    """SAELens' trainer on the shards in ``space``, with log and snapshots, saved by ``save``; see ``train_sae``.

    Args: sae: SAELens' training SAE, on the device of ``space``.  k: its budget.
    """
    started, device, shards = time.perf_counter(), space.centre_D.device, setting.shards
    batch_samples, steps = size_of_training(options, shards)
    data = (space.apply(batch_BD.to(device)) for batch_BD in _endless(shards, batch_samples, setting.seed))
    folder.mkdir(parents=True, exist_ok=True)
    # The trainer draws its own bar on stderr; ours shows the same.
    with progress(f"train {sae.cfg.architecture()} SAE", steps * batch_samples, "samples") as advance:
        monitor = _Monitor(folder, log_steps, steps, snapshots, save, advance)
        config = _trainer_config(options, steps, batch_samples, shards.n_samples, device)
        trainer = _Trainer(config, sae, data, monitor)
        with printed_to(io.StringIO(), "stderr"):
            trainer.fit()
    save(folder)
    return Facts(
        d_sae=sae.cfg.d_sae,
        k=k,
        signed=False,
        samples_seen=trainer.n_training_samples,
        seconds=round(time.perf_counter() - started, 1),
        more={
            "dead_at_end": monitor.last["dead"],
            "l0_at_end": round(monitor.last["l0"], 2),
            "products": "sparse" if isinstance(sae, SparseSteps) else "dense",
        },
    )


# ---------------------------------------------------------------- what SAELens is given


def _trainer_config(
    options: SAETraining, steps: int, batch_samples: int, n_samples: int, device: torch.device
) -> SAETrainerConfig:
    return SAETrainerConfig(
        total_training_samples=steps * batch_samples,
        train_batch_size_samples=batch_samples,
        lr=options.lr,
        lr_end=options.lr / 100,
        lr_decay_steps=round(options.lr_decay_fraction * steps),
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
        (folder / TRAIN_LOG).write_text("")

    def __call__(self, trainer: _Trainer, output: TrainStepOutput) -> None:
        # The trainer counts the step when this is over.
        done = trainer.n_training_steps + 1
        if done % self._log_steps == 0 or done in (1, self._steps):
            self.last = _entry(trainer, output)
            with (self._folder / TRAIN_LOG).open("a") as file:
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
    return {
        "samples_seen": trainer.n_training_samples,
        "fvu": fvu(z_BD, output.sae_out, "train_sae"),
        "l0": int((fired != 0).sum()) / len(z_BD),
        "dead": int(trainer.dead_neurons.sum()),
    }
