"""The trainings that a run's config asks for: each dictionary once, or once for each of several seeds."""

from collections.abc import Iterator
from dataclasses import dataclass

from ksvd_sae.methods.base import Method
from ksvd_sae.run.config import RunConfig, seed_name


@dataclass(frozen=True)
class Replica:
    """One training of a dictionary.

    name: the dictionary's. method: with the seed filled in. seed: None where nothing is drawn.
    label: the name, with the seed where the dictionary has several.
    """

    name: str
    method: Method
    seed: int | None
    label: str


def replicas(run: RunConfig) -> Iterator[Replica]:
    """Every training of the run, dictionary by dictionary in the config's order."""
    for name, method in run.dictionaries.items():
        seeds = _seeds(run, method)
        for seed in seeds:
            seeded = method if seed is None else method.varied(seed=seed)
            yield Replica(name, seeded, seed, name if len(seeds) == 1 else seed_name(name, seed))


def source_training(run: RunConfig, method: Method) -> Method | None:
    """The training that a dictionary takes its atoms from: of its own seed, where the source has none."""
    source = run.source_of(method)
    if source is None or not source.is_drawn(None) or source.own_seed is not None or method.own_seed is None:
        return source
    return source.varied(seed=method.own_seed)


def _seeds(run: RunConfig, method: Method) -> list[int | None]:
    if not method.is_drawn(run.source_of(method)):
        return [None]
    return [method.own_seed] if method.own_seed is not None else [*(run.training_seeds or [run.seed])]
