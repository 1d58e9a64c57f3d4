"""A study as typed values: which dictionaries, at which layers, k and seeds, coded how.

The YAML names a base run (model, text, harvest) and axes. A cell is one training; every training is measured under each
of its entry's codings. ``cells`` orders them so that a study that stops early has whole seeds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ksvd_sae.config import DictionaryConfig, DictionaryName, RunConfig, load_config, views
from ksvd_sae.errors import ConfigError

_DICTIONARY: TypeAdapter[Any] = TypeAdapter(DictionaryConfig)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CodingVariant(_Strict):
    """A way to code with a trained dictionary; what is left out is as trained."""

    coder: Literal["mp", "mp_refit", "omp", "ormp", "matryoshka"]
    k: int | None = Field(None, ge=1)
    k_factor: float = Field(1.0, gt=0, description="times the k of training, if k is null")
    rtol: float = Field(0.0, ge=0)
    nonnegative: bool | None = None

    def k_of(self, trained_k: int) -> int:
        return self.k or max(1, round(self.k_factor * trained_k))


class Entry(_Strict):
    """One kind of dictionary.

    dictionary: its config without k and seed. codings: by name; empty: the dictionary's own encoder (SAEs).
    layers, k, seeds: where they differ from the study's.
    """

    dictionary: dict[str, Any]
    codings: dict[DictionaryName, CodingVariant] = Field(default_factory=dict)
    layers: list[int] | None = None
    k: list[int] | None = None
    seeds: list[int] | None = None


class StudyConfig(_Strict):
    """A study; its name is its folder under results/."""

    name: DictionaryName
    base: str = Field(description="YAML of the run to start from, relative to the study's file")
    overrides: list[str] = Field(default_factory=list, description="as --set, applied to the base")
    layers: list[int] = Field(min_length=1)
    k: list[int] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    contexts: int = Field(16, ge=2, description="held-out contexts to splice into")
    context_tokens: int = Field(97, ge=2, description="their length, with BOS")
    entries: dict[DictionaryName, Entry] = Field(min_length=1)


@dataclass(frozen=True)
class Cell:
    """One training and the codings to measure it under (empty: its own encoder)."""

    entry: str
    layer: int
    k: int
    seed: int
    dictionary: Any
    codings: dict[str, CodingVariant]

    @property
    def name(self) -> str:
        return f"{self.entry}-l{self.layer}-k{self.k}-s{self.seed}"


def load_study(path: Path) -> tuple[StudyConfig, dict[int, RunConfig]]:
    """The study and the base run at each of its layers.

    Raises: ConfigError: missing file, bad YAML, unknown key or value, an entry that is no dictionary.
    """
    try:
        raw = yaml.safe_load(path.read_text())
        study = StudyConfig.model_validate({"name": path.stem, **raw})
    except FileNotFoundError as error:
        raise ConfigError(f"reading study {path}: no such file", cure="check the path") from error
    except (yaml.YAMLError, TypeError, ValidationError) as error:
        raise ConfigError(f"reading study {path}: {error}", cure="see eval_configs/study-engine.yaml") from error
    list(cells(study))  # every entry must be a dictionary at every k
    base = (path.parent / study.base).resolve()
    runs = {}
    for layer in study.layers:
        hook = f"model.hook=blocks.{layer}.hook_resid_post"
        runs[layer] = load_config(base, [*study.overrides, hook, f"name={study.name}"])
    return study, runs


def cells(study: StudyConfig) -> Iterator[Cell]:
    """Every training: seeds outermost, then k in the order given, layers, entries."""
    for seed, k, layer in product(study.seeds, study.k, study.layers):
        for name, entry in study.entries.items():
            if (
                seed in (entry.seeds or study.seeds)
                and k in (entry.k or study.k)
                and layer in (entry.layers or study.layers)
            ):
                yield Cell(name, layer, k, seed, _dictionary(name, entry, k, seed), entry.codings)


def _dictionary(name: str, entry: Entry, k: int, seed: int) -> Any:
    raw = {**entry.dictionary, "k": k}
    if raw.get("kind") not in ("pca", "random"):
        raw["seed"] = seed
    try:
        found = _DICTIONARY.validate_python(raw)
    except ValidationError as error:
        raise ConfigError(
            f"study entry {name!r}: {error}", cure="see the dictionary configs in ksvd_sae/config.py"
        ) from error
    if views(found) != ("signed",):
        raise ConfigError(
            f"study entry {name!r}: a study measures codes as they come",
            got=f"view: {found.view}",
            cause="error and behaviour are the same in every view",
            cure="leave view out",
        )
    return found
