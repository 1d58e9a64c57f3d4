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

from ksvd_sae.errors import ConfigError
from ksvd_sae.methods.derived_config import DerivedConfig, LinearTopKConfig, filled
from ksvd_sae.run.config import DictionaryConfig, DictionaryName, RunConfig, SAEConfig, load_config, views

_DICTIONARY: TypeAdapter[Any] = TypeAdapter(DictionaryConfig)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CodingVariant(_Strict):
    """A way to code with a trained dictionary by pursuit; what is left out is as trained.

    nonnegative: null: as the dictionary's own codes, so that of SAEs: true.
    """

    coder: Literal["mp", "mp_refit", "omp", "ormp", "matryoshka"]
    k: int | None = Field(None, ge=1)
    k_factor: float = Field(1.0, gt=0, description="times the k of training, if k is null")
    rtol: float = Field(0.0, ge=0)
    nonnegative: bool | None = None

    def k_of(self, trained_k: int) -> int:
        return self.k or max(1, round(self.k_factor * trained_k))


class Entry(_Strict):
    """One kind of dictionary.

    dictionary: its config without k and seed; ``of`` names another entry, whose cell of the same layer, k and seed it
        takes its atoms from.
    codings: by name; null, and none at all, for the dictionary's own encoder. SAEs can be coded by pursuit too.
    layers, k, seeds: where they differ from the study's.
    """

    dictionary: dict[str, Any]
    codings: dict[DictionaryName, CodingVariant | None] = Field(default_factory=dict)
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
    """One training and the codings to measure it under (None, and no coding: its own encoder).

    of: the config of what it takes its atoms from, if it does.
    """

    entry: str
    layer: int
    k: int
    seed: int
    dictionary: Any
    codings: dict[str, CodingVariant | None]
    of: Any = None

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
                yield _cell(study, name, layer, k, seed)


def _cell(study: StudyConfig, name: str, layer: int, k: int, seed: int) -> Cell:
    entry = study.entries[name]
    dictionary, of = _dictionary(name, entry, k, seed), None
    if isinstance(dictionary, DerivedConfig):
        found = {name: dictionary}
        if dictionary.of != name and dictionary.of in study.entries:
            found[dictionary.of] = _dictionary(dictionary.of, study.entries[dictionary.of], k, seed)
        try:
            dictionary, of = filled(name, dictionary, found), found.get(dictionary.of)
        except ValueError as error:
            raise ConfigError(
                f"study entry {name!r}: {error}",
                limit=f"entries: {', '.join(study.entries)}",
                cure="let of name an entry that is learned",
            ) from error
    for coding, variant in entry.codings.items():
        _check_coding(name, dictionary, coding, variant)
    return Cell(name, layer, k, seed, dictionary, entry.codings, of)


def _check_coding(name: str, dictionary: Any, coding: str, variant: CodingVariant | None) -> None:
    if variant is None:
        return
    if isinstance(dictionary, LinearTopKConfig):
        raise ConfigError(
            f"study entry {name!r}: coding {coding!r} would leave the fitted encoder out",
            cure=f"give the coding to {dictionary.of!r}, whose atoms these are",
        )
    if isinstance(dictionary, SAEConfig) and variant.coder == "matryoshka":
        raise ConfigError(
            f"study entry {name!r}: coding {coding!r} needs the groups of a DB-KSVD dictionary", cure="coder: omp"
        )
    if variant.coder == "ormp" and isinstance(dictionary, SAEConfig) and variant.nonnegative is not False:
        raise ConfigError(
            f"study entry {name!r}: coding {coding!r}: coder 'ormp' has signs, the SAE's codes have none",
            cure="coder: omp, or nonnegative: false to let the codes have signs",
        )


def _dictionary(name: str, entry: Entry, k: int, seed: int) -> Any:
    raw = {**entry.dictionary, "k": k}
    if raw.get("kind") not in ("pca", "random", "recoded"):
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
