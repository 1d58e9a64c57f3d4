"""A dictionary from another one: the same atoms under another coder, or in another metric.

Crossing dictionaries with coders tells apart what limits an SAE: its linear encoder, the atoms that it learned, or the
metric that it learned them in.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.dictionary import Dictionary
from ksvd_sae.errors import ConfigError
from ksvd_sae.learning.weighting import Weighting
from ksvd_sae.methods.derived_config import DerivedConfig, LinearTopKConfig, RecodedConfig, metric
from ksvd_sae.methods.published.config import PublishedSAEConfig
from ksvd_sae.methods.trainers import TrainingSetting
from ksvd_sae.run.config import DictionaryConfig, SAEConfig


@dataclass(frozen=True)
class Source:
    """A trained dictionary that another takes its atoms from.

    samples_seen: by its training; None if a published SAE does not say.
    """

    config: DictionaryConfig
    folder: Path
    samples_seen: int | None


def derive_dictionary(
    config: DerivedConfig, source: Source, shards: ActivationShards, folder: Path, setting: TrainingSetting
) -> dict[str, Any]:
    """Make what the config asks for from ``source`` and save it in ``folder``, as ``train_dictionary`` does.

    Args: config: ``filled``.
    Returns: facts for the manifest. samples_seen: by the training of the other dictionary and by its own encoder
        together (encoder_samples are the latter), None if that of the other is not known; n_latents; seconds, if given,
        are its own.
    Raises: ShapeError (k out of range, options that do not fit the atoms).
    """
    dictionary = as_dictionary(source.config, source.folder, shards, setting)
    if config.weighting != metric(source.config):
        dictionary = in_metric(dictionary, setting.weighting(metric(config), shards))
    if isinstance(config, RecodedConfig):
        setting.save(recoded(dictionary, config), folder)
        return {"samples_seen": source.samples_seen, "n_latents": dictionary.n_atoms}
    assert isinstance(config, LinearTopKConfig)
    from ksvd_sae.methods.linear_encoder import train_linear_topk

    facts = train_linear_topk(
        config,
        dictionary,
        shards,
        folder,
        model_name=setting.model_name,
        hook_name=setting.hook,
        context_size=setting.context_tokens,
        seed=setting.seed,
        device=setting.device,
    )
    return {
        **facts,
        "samples_seen": None if source.samples_seen is None else source.samples_seen + facts["samples_seen"],
        "encoder_samples": facts["samples_seen"],
        "n_latents": (2 if config.signed else 1) * dictionary.n_atoms,
    }


def as_dictionary(
    config: DictionaryConfig, folder: Path, shards: ActivationShards, setting: TrainingSetting
) -> Dictionary:
    """A trained dictionary as one that codes by pursuit.

    Of an SAE: the decoder's rows and bias, in the metric that it was trained in, coded by MP without negative
    coefficients.
    Raises: ConfigError: an encoder that was fitted to another dictionary's atoms.
    """
    if isinstance(config, LinearTopKConfig):
        raise ConfigError(
            f"as_dictionary: the atoms are those of another dictionary, {config.of!r}", cure="take that one"
        )
    if not isinstance(config, SAEConfig | PublishedSAEConfig):
        return Dictionary.load(folder)
    from ksvd_sae.methods.sae.training import load_sae

    sae = load_sae(folder, torch.device("cpu"))
    weighting = setting.weighting(metric(config), shards)
    return Dictionary(
        _unit_rows(sae.W_dec.detach(), weighting),
        sae.b_dec.detach().float().clone(),
        config.k or 1,  # not every published SAE has one; whoever recodes it does
        nonnegative=True,
        weighting=weighting,
    )


def in_metric(dictionary: Dictionary, weighting: Weighting | None) -> Dictionary:
    """The same directions of raw space, coded in another metric (None: the plain one)."""
    return replace(dictionary, atoms_MD=_unit_rows(dictionary.raw_atoms(), weighting), weighting=weighting)


def recoded(dictionary: Dictionary, config: RecodedConfig) -> Dictionary:
    """The same atoms under the config's coder."""
    assert config.k is not None
    assert config.nonnegative is not None
    assert config.rtol is not None
    return replace(
        dictionary,
        k=config.k,
        coder=config.coder,
        rtol=config.rtol,
        nonnegative=config.nonnegative,
        # A limit that was chosen for another k says nothing of this one.
        max_steps=dictionary.max_steps if config.k == dictionary.k else None,
        groups=None,
    )


def _unit_rows(raw_MD: Tensor, weighting: Weighting | None) -> Tensor:
    rows_MD = raw_MD.double() if weighting is None else weighting.apply(raw_MD.double())
    return torch.nn.functional.normalize(rows_MD, dim=1).float()
