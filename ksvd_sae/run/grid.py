"""A study: a grid of runs. Which dictionaries, at which layers, k and seeds, coded how.

The YAML names a base run (model, text, harvest) and axes. Each layer becomes a run of its own: its dictionaries are the
study's entries at each k, and again under each of an entry's codings.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from ksvd_sae.errors import ConfigError
from ksvd_sae.methods.base import Coder
from ksvd_sae.run.config import DictionaryName, RunConfig, load_config, parse_config, seed_name
from ksvd_sae.run.find_config import find_config
from ksvd_sae.run.read_yaml import read_yaml
from ksvd_sae.strict import Strict

OWN_ENCODER = "own"


class CodingVariant(Strict):
    """A way to code with a trained dictionary by pursuit; what is left out is as trained.

    nonnegative: null: as the dictionary's own codes, so that of SAEs: true.
    """

    coder: Coder
    k: int | None = Field(None, ge=1)
    k_factor: float = Field(1.0, gt=0, description="times the k of training, if k is null")
    rtol: float = Field(0.0, ge=0)
    tau: float | None = Field(None, ge=0, lt=1, description="null: as trained")
    nonnegative: bool | None = None

    def k_of(self, trained_k: int) -> int:
        return self.k or max(1, round(self.k_factor * trained_k))

    def recoded(self, of: str, trained_k: int) -> dict[str, Any]:
        """As a dictionary of a run that takes its atoms from another."""
        own = self.model_dump(exclude={"k", "k_factor"})
        return {"kind": "recoded", "of": of, "k": self.k_of(trained_k), **own}


class Entry(Strict):
    """One kind of dictionary.

    dictionary: its config without k and seed; ``of`` names another entry, whose dictionary of the same layer, k and
        seed it takes its atoms from.
    codings: by name; null, and none at all, for the dictionary's own encoder. SAEs can be coded by pursuit too.
    layers, k, seeds: where they differ from the study's.
    """

    dictionary: dict[str, Any]
    codings: dict[DictionaryName, CodingVariant | None] = Field(default_factory=dict)
    layers: list[int] | None = None
    k: list[int] | None = None
    seeds: list[int] | None = None


class StudyConfig(Strict):
    """A study; its name is its folder under results/."""

    name: DictionaryName
    base: str = Field(description="the run to start from: a YAML, relative to the study's file, or a config's name")
    overrides: list[str] = Field(default_factory=list, description="as --set, applied to the base")
    layers: list[int] = Field(min_length=1)
    k: list[int] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    contexts: int = Field(16, ge=2, description="held-out contexts to splice into")
    context_tokens: int = Field(97, ge=2, description="their length, with BOS")
    entries: dict[DictionaryName, Entry] = Field(min_length=1)


@dataclass(frozen=True)
class Cell:
    """Where a dictionary of a layer's run stands in the grid.

    trained: the entry's dictionary in that run, which this one is or takes its atoms from. k: that it is trained with.
    """

    entry: str
    trained: str
    coding: str
    layer: int
    k: int


@dataclass(frozen=True)
class LayerRun:
    """The run of one layer, and the place in the grid of each of its dictionaries that is to be measured."""

    config: RunConfig
    cells: dict[str, Cell]


def load_study(path: str | Path) -> tuple[StudyConfig, dict[int, LayerRun]]:
    """The study and the run of each of its layers.

    Args: path: the study's YAML, or the name of a study that comes with the package.
    Raises: ConfigError: missing file, bad YAML, unknown key or value, an entry that is no dictionary.
    """
    path = find_config(path)
    raw = read_yaml(path, "study")
    try:
        study = StudyConfig.model_validate({"name": path.stem, **raw})
    except ValidationError as error:
        raise ConfigError(f"reading study {path}: {error}", cure="see eval_configs/study-engine.yaml") from error
    base = find_config(study.base, path.parent).resolve()
    return study, {layer: layer_run(study, base, layer) for layer in study.layers}


def layer_run(study: StudyConfig, base: Path, layer: int) -> LayerRun:
    """The run of one layer.

    Raises: ConfigError: an entry that is no dictionary, or does not fit the base run.
    """
    hook = f"model.hook=blocks.{layer}.hook_resid_post"
    start = load_config(base, [*study.overrides, hook, f"name={study.name}"])
    dictionaries: dict[str, Any] = {}
    cells: dict[str, Cell] = {}
    for k, name in product(study.k, study.entries):
        entry = study.entries[name]
        if k in (entry.k or study.k) and layer in (entry.layers or study.layers):
            for trained, seed in _trainings(study, name, k):
                dictionaries[trained] = _dictionary(study, entry, k, seed)
                for coding, coded, raw in _codings(entry, trained, k):
                    dictionaries[coded] = raw or dictionaries[trained]
                    cells[coded] = Cell(name, trained, coding, layer, k)
    evaluation = {
        "core": None,
        "sparse_probing": None,
        "loss": {"contexts": study.contexts, "context_tokens": study.context_tokens},
    }
    raw = {
        **start.model_dump(mode="json", exclude={"dictionaries", "evaluation", "report"}),
        "training_seeds": study.seeds,
        "dictionaries": dictionaries,
        "evaluation": evaluation,
        "report": {"atoms": 0},
    }
    config = parse_config(raw, f"study {study.name}, layer {layer}")
    for name, method in config.dictionaries.items():
        if method.views != ("signed",):
            raise ConfigError(
                f"study entry {cells[name].entry!r}: a study measures codes as they come",
                got=f"views: {', '.join(method.views)}",
                cause="error and behaviour are the same in every view",
                cure="leave view out",
            )
    return LayerRun(config, cells)


def _trainings(study: StudyConfig, name: str, k: int) -> list[tuple[str, int | None]]:
    """Names of an entry's dictionaries at a k, each with the seed that it has of its own.

    Where an entry has the study's seeds, one dictionary is trained once for each; else one dictionary has each seed.
    """
    own, trained = study.entries[name].seeds, f"{name}-k{k}"
    if own is None or own == study.seeds:
        return [(trained, None)]
    return [(trained if len(own) == 1 else seed_name(trained, seed), seed) for seed in own]


def _dictionary(study: StudyConfig, entry: Entry, k: int, seed: int | None) -> dict[str, Any]:
    """Its config for a run."""
    raw = {**entry.dictionary, "k": k}
    if seed is not None:
        raw["seed"] = seed
    if (of := raw.get("of")) in study.entries:
        sources = {own: trained for trained, own in _trainings(study, str(of), k)}
        raw["of"] = sources.get(seed, next(iter(sources.values())))
    return raw


def _codings(entry: Entry, trained: str, k: int) -> Iterator[tuple[str, str, dict[str, Any] | None]]:
    """(coding, name in the run, config) of all that is measured of a training; None: as it was trained."""
    for coding, variant in (entry.codings or {OWN_ENCODER: None}).items():
        if variant is None:
            yield coding, trained, None
        else:
            yield coding, f"{trained}-{coding}", variant.recoded(trained, k)
