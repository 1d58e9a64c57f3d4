"""One dictionary by its config: DB-KSVD, a SAE, PCA or a random control from shards, or a published SAE."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ksvd_sae.activations.gradients import GradientMoments
from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.dictionary import Dictionary
from ksvd_sae.errors import ConfigError
from ksvd_sae.learning.backends import coder_backend
from ksvd_sae.learning.dbksvd import BatchLog, DoubleBatchKSVD
from ksvd_sae.learning.matryoshka import paper_groups
from ksvd_sae.learning.pca import principal_components
from ksvd_sae.learning.weighting import Weighting, make_weighting
from ksvd_sae.methods.derived_config import RecodedConfig
from ksvd_sae.methods.options import View, WeightingConfig
from ksvd_sae.methods.published.config import PublishedSAEConfig
from ksvd_sae.progress import progress
from ksvd_sae.run.config import DBKSVDConfig, DictionaryConfig, IdentityConfig, PCAConfig, RandomConfig, SAEConfig

TRAIN_LOG = "train_log.jsonl"
# Where a DB-KSVD training stands, from which it goes on if it was stopped.
CHECKPOINT = "training.safetensors"
CHECKPOINT_BATCHES = 64
# Goes up when the same config learns another dictionary than before: finished trainings are found by it.
ALGORITHM = {"db_ksvd": 2}
# What configs got later, with the value at which trainings come out as before: left out of keys there.
_ADDED: dict[str, dict[str, Any]] = {
    "db_ksvd": {"precision": "float32"},
    "random": {"weighting": WeightingConfig().model_dump(mode="json")},
}
# Coder and view are for afterwards; the seed is in keys by itself, as a run has one too; the other dictionary that one
# is of counts by what it is, not by its name.
_NOT_OF_TRAINING = {"coder", "view", "seed", "of"}


def training_fields(config: DictionaryConfig, *, seed: bool = False) -> dict[str, Any]:
    """What of a config its dictionary follows from, for keys; the seed if asked for."""
    kept = {"seed"} if seed else set()
    if isinstance(config, RecodedConfig):
        # Its coder is what makes it another dictionary than the one that it is of.
        kept = {*kept, "coder"}
    fields = config.model_dump(mode="json", exclude=_NOT_OF_TRAINING - kept)
    added = _ADDED.get(config.kind, {})
    return {name: value for name, value in fields.items() if name not in added or value != added[name]}


@dataclass(frozen=True)
class TrainingSetting:
    """What a training needs besides its config and the activations.

    gradient_moments: called only for the weightings that need them.
    """

    model_name: str
    hook: str
    context_tokens: int
    seed: int
    device: torch.device
    harvest_hash: str
    gradient_moments: Callable[[], GradientMoments]

    def wrap(self, dictionary: Dictionary, view: View = "signed") -> Any:
        """The dictionary as a SAELens SAE of this model and hook."""
        from ksvd_sae.sae import sae_from_dictionary

        return sae_from_dictionary(
            dictionary,
            model_name=self.model_name,
            hook_name=self.hook,
            context_size=self.context_tokens,
            device=str(self.device),
            view=view,
        )

    def weighting(self, wanted: WeightingConfig, shards: ActivationShards) -> Weighting | None:
        """The metric that the config asks for, from the harvest's moments."""
        outer_DD = self.gradient_moments().outer_DD if wanted.kind.startswith("fisher") else None
        variance_D = shards.statistics.variance_D
        return make_weighting(
            wanted.kind, variance_D=variance_D, outer_DD=outer_DD, power=wanted.power, ridge=wanted.ridge
        )

    def save(self, dictionary: Dictionary, folder: Path) -> None:
        """The dictionary, and beside it the SAE, with codes as they come."""
        provenance = {"model": self.model_name, "hook": self.hook, "harvest": self.harvest_hash}
        dictionary = replace(dictionary, provenance=provenance)
        dictionary.save(folder)
        self.wrap(dictionary).save_model(folder / "sae")


def clear_unfinished(folder: Path) -> None:
    """Leave of a training that was stopped what it can go on from: its checkpoint and its log."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name in (CHECKPOINT, TRAIN_LOG):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def train_dictionary(
    config: DictionaryConfig, shards: ActivationShards, folder: Path, setting: TrainingSetting
) -> dict[str, Any]:
    """Learn what the config asks for and save it in ``folder``; returns facts for the manifest.

    A DB-KSVD training goes on from the checkpoint that it finds there.
    """
    if isinstance(config, DBKSVDConfig):
        return _train_db_ksvd(config, shards, folder, setting)
    if isinstance(config, SAEConfig):
        return _train_sae(config, shards, folder, setting)
    if isinstance(config, PublishedSAEConfig):
        return _take_published(config, shards, folder, setting)
    if isinstance(config, PCAConfig):
        centre_D = shards.centre_D
        atoms_MD = principal_components(shards.batches(16_384), config.k, centre_D)
        setting.save(Dictionary(atoms_MD, centre_D.float(), config.k, "projection"), folder)
        return {"samples_seen": shards.n_samples}
    if isinstance(config, IdentityConfig):
        d_in = shards.d_in
        setting.save(Dictionary(torch.eye(d_in), torch.zeros(d_in), d_in, "projection"), folder)
        return {"samples_seen": 0, "n_latents": d_in, "k": d_in}
    if isinstance(config, RandomConfig):
        return _draw_random(config, shards, folder, setting)
    raise ConfigError(
        f"train_dictionary: a dictionary of kind {config.kind!r} is made from another",
        cure="train it in a run, which makes the other first (ksvd_sae.methods.recoding.derive_dictionary)",
    )


def estimator(
    config: DBKSVDConfig,
    shards: ActivationShards,
    setting: TrainingSetting,
    *,
    on_batch: Callable[[BatchLog], None] | None = None,
    folder: Path | None = None,
) -> DoubleBatchKSVD:
    """The estimator that the config asks for, not yet fitted; log and checkpoints go into ``folder``."""
    return DoubleBatchKSVD(
        config.n_atoms,
        config.k,
        passes=config.passes,
        batch_samples=config.batch_samples,
        update=config.update,
        atom_batch=config.atom_batch,
        init=config.init,
        redraw=config.redraw,
        duplicate_cosine=config.duplicate_cosine,
        average=config.average,
        centre=config.centre,
        weighting=setting.weighting(config.weighting, shards),
        groups=paper_groups(config.n_atoms) if config.groups == "paper" else config.groups,
        nonnegative=config.nonnegative,
        rtol=config.rtol,
        max_steps=config.max_steps_factor * config.k,
        precision=config.precision,
        seed=setting.seed,
        device=str(setting.device),
        log_path=None if folder is None else folder / TRAIN_LOG,
        checkpoint_path=None if folder is None else folder / CHECKPOINT,
        checkpoint_every=None if folder is None else CHECKPOINT_BATCHES,
        on_batch=on_batch,
    )


def _train_db_ksvd(
    config: DBKSVDConfig, shards: ActivationShards, folder: Path, setting: TrainingSetting
) -> dict[str, Any]:
    with progress("train db_ksvd", config.passes * shards.n_samples, "samples") as advance:
        seen = 0

        def on_batch(entry: BatchLog) -> None:
            nonlocal seen
            advance(entry.samples_seen - seen, f"FVU {entry.fvu:.4f} L0 {entry.l0:.1f} dead {entry.dead}")
            seen = entry.samples_seen

        ksvd = estimator(config, shards, setting, on_batch=on_batch, folder=folder).fit(shards, resume=True)
    setting.save(Dictionary.from_estimator(ksvd), folder)
    return {
        "samples_seen": ksvd.samples_seen,
        "dead_at_end": ksvd.log[-1].dead,
        "redrawn": sum(entry.redrawn for entry in ksvd.log),
        "backend": coder_backend(setting.device, n_atoms=config.n_atoms, k=config.k),
    }


def _train_sae(config: SAEConfig, shards: ActivationShards, folder: Path, setting: TrainingSetting) -> dict[str, Any]:
    from ksvd_sae.methods.sae.training import train_sae

    return train_sae(
        config,
        shards,
        folder,
        model_name=setting.model_name,
        hook_name=setting.hook,
        context_size=setting.context_tokens,
        seed=setting.seed,
        device=setting.device,
        weighting=setting.weighting(config.weighting, shards),
    )


def _take_published(
    config: PublishedSAEConfig, shards: ActivationShards, folder: Path, setting: TrainingSetting
) -> dict[str, Any]:
    from ksvd_sae.methods.published.saes import take_published

    return take_published(config, folder, model_name=setting.model_name, hook_name=setting.hook, d_in=shards.d_in)


def _draw_random(
    config: RandomConfig, shards: ActivationShards, folder: Path, setting: TrainingSetting
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(setting.seed)
    atoms_MD = torch.randn(config.n_atoms, shards.d_in, generator=generator)
    atoms_MD = torch.nn.functional.normalize(atoms_MD, dim=1)
    weighting = setting.weighting(config.weighting, shards)
    setting.save(Dictionary(atoms_MD, shards.centre_D.float(), config.k, config.coder, weighting=weighting), folder)
    return {"samples_seen": 0}
