"""The trainings that a run's config asks for: each dictionary once, or once for each of several seeds."""

from collections.abc import Iterator
from dataclasses import dataclass

from ksvd_sae.config import DictionaryConfig, RunConfig, seed_name


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


def _seeds(run: RunConfig, config: DictionaryConfig) -> list[int | None]:
    if "seed" not in type(config).model_fields:
        return [None]
    own: int | None = getattr(config, "seed", None)
    return [own] if own is not None else [*(run.training_seeds or [run.seed])]
