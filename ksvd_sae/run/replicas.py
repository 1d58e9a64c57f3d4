"""The trainings that a run's config asks for: each dictionary once, or once for each of several seeds."""

from collections.abc import Iterator
from dataclasses import dataclass

from ksvd_sae.methods.derived_config import DerivedConfig, RecodedConfig
from ksvd_sae.run.config import DictionaryConfig, RunConfig, seed_name


@dataclass(frozen=True)
class Replica:
    """One training of a dictionary.

    name: the dictionary's. config: with the seed filled in. seed: None where nothing is drawn.
    label: the name, with the seed where the dictionary has several.
    """

    name: str
    config: DictionaryConfig
    seed: int | None
    label: str


def replicas(run: RunConfig) -> Iterator[Replica]:
    """Every training of the run, dictionary by dictionary in the config's order."""
    for name, config in run.dictionaries.items():
        seeds = _seeds(run, config)
        for seed in seeds:
            seeded = config if seed is None else config.model_copy(update={"seed": seed})
            yield Replica(name, seeded, seed, name if len(seeds) == 1 else seed_name(name, seed))


def other_training(run: RunConfig, config: DerivedConfig) -> DictionaryConfig:
    """The training that a derived dictionary takes its atoms from: of its own seed, where the other has one."""
    other = run.dictionaries[config.of]
    if not _is_drawn(run, other) or getattr(other, "seed", None) is not None:
        return other
    return other.model_copy(update={"seed": config.seed})


def _is_drawn(run: RunConfig, config: DictionaryConfig) -> bool:
    """Whether a training depends on a seed; a pursuit does not, but the atoms may."""
    drawn = run.dictionaries[config.of] if isinstance(config, RecodedConfig) else config
    return "seed" in type(drawn).model_fields


def _seeds(run: RunConfig, config: DictionaryConfig) -> list[int | None]:
    if not _is_drawn(run, config):
        return [None]
    own: int | None = getattr(config, "seed", None)
    return [own] if own is not None else [*(run.training_seeds or [run.seed])]
