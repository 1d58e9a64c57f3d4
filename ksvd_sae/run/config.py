"""A run as typed values: YAML in, checked, YAML out.

A config names a model and a place in it, a text or images, what to harvest, the dictionaries to learn on the harvest,
and the evals to run on them. ``load_config`` reads one, applies ``--set`` overrides, and turns every mistake into a
ConfigError that names the key and the nearest valid one.
"""

import difflib
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, StringConstraints, ValidationError, field_validator, model_validator
from typing_extensions import ParamSpec

from ksvd_sae.activations.harvest import Harvest, HarvestConfig
from ksvd_sae.activations.language import ModelConfig
from ksvd_sae.activations.text import TextConfig
from ksvd_sae.activations.vision.harvest import ImageHarvest, ImageHarvestConfig
from ksvd_sae.activations.vision.images import ImagesConfig
from ksvd_sae.activations.vision.model import VisionModelConfig
from ksvd_sae.errors import ConfigError
from ksvd_sae.evals import EVALS, EvaluationConfig, ImageEvaluationConfig
from ksvd_sae.evals.atoms import AtomsConfig, ImageAtomsConfig
from ksvd_sae.methods import METHODS
from ksvd_sae.methods.base import Method, View
from ksvd_sae.run.cells import KINDS, Grid, in_cells
from ksvd_sae.run.find_config import find_config
from ksvd_sae.run.read_yaml import parse_yaml, read_yaml
from ksvd_sae.strict import Strict

# Of a dictionary's name, in the split view.
SPLIT_SUFFIX = ".split"
# Names become file names.
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
DictionaryName = Annotated[str, StringConstraints(pattern=_NAME)]
P = ParamSpec("P")
T = TypeVar("T")

if TYPE_CHECKING:
    AnyMethod = Method
else:
    AnyMethod = Annotated[reduce(or_, METHODS), Field(discriminator="kind")]


def view_name(name: str, view: View) -> str:
    """What a dictionary's view is called where a name must say it by itself: in the names of result files."""
    return f"{name}{SPLIT_SUFFIX}" if view == "split" else name


def seed_name(name: str, seed: int | None) -> str:
    """What one of several trainings of a dictionary is called where its name must tell it from the others."""
    return f"{name}.s{seed}"


class RunConfig(Strict):
    """One experiment, on text or on images. Its name is its folder under results/."""

    name: str = Field(pattern=_NAME)
    seed: int = 0
    training_seeds: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=list,
        description="learn each dictionary without a seed of its own once for each, for error bars; empty: with `seed`",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    model: ModelConfig | VisionModelConfig
    harvest: HarvestConfig | ImageHarvestConfig
    # Its cells are among the dictionaries, so that it is written nowhere.
    grid: Grid | None = Field(None, exclude=True, description="sizes and budgets that dictionaries are learned at")
    dictionaries: dict[DictionaryName, AnyMethod] = Field(min_length=1)
    evaluation: EvaluationConfig | ImageEvaluationConfig
    report: AtomsConfig | ImageAtomsConfig

    @property
    @abstractmethod
    def harvested(self) -> Harvest | ImageHarvest:
        """What its dictionaries are learned on."""

    @property
    @abstractmethod
    def data_name(self) -> str:
        """The true name of its text or images."""

    def source_of(self, method: Method) -> Method | None:
        """The dictionary that another's atoms are those of."""
        return None if method.source is None else self.dictionaries[method.source]

    @property
    def controls(self) -> frozenset[str]:
        """Dictionaries whose atoms are a control's, however they are coded."""
        return frozenset(n for n, method in self.dictionaries.items() if (self.source_of(method) or method).is_control)

    @property
    def saes(self) -> frozenset[str]:
        """What dictionaries are compared with."""
        return frozenset(name for name, method in self.dictionaries.items() if method.is_sae)

    def only(self, names: Collection[str]) -> "RunConfig":
        """The same run with some of its dictionaries."""
        return self.model_copy(update={"dictionaries": {n: m for n, m in self.dictionaries.items() if n in names}})

    def of_tokens(self, train_tokens: int) -> "RunConfig":
        """The same run on so many training tokens, under a name that says so.

        Raises: ValueError: options of a dictionary that do not fit so few.
        """
        harvest = self.harvest.model_copy(update={"train_tokens": train_tokens})
        for name, method in self.dictionaries.items():
            _named(name, method.check, harvest)
        return self.model_copy(update={"name": f"{self.name}.so-far-{train_tokens}", "harvest": harvest})

    @field_validator("dictionaries")
    @classmethod
    def _completed(cls, methods: dict[str, Method]) -> dict[str, Method]:
        return {name: _named(name, method.completed, name, methods) for name, method in methods.items()}

    @model_validator(mode="after")
    def _checked(self) -> "RunConfig":
        for name, method in self.dictionaries.items():
            _named(name, method.check, self.harvest)
        return self

    @model_validator(mode="after")
    def _names(self) -> "RunConfig":
        """Names of result files tell trainings and views apart."""
        if len(set(self.training_seeds)) < len(self.training_seeds):
            raise ValueError(f"training_seeds: {self.training_seeds} names a seed twice")
        for name, method in self.dictionaries.items():
            taken = {seed_name(name, seed): f"a training of {name!r}" for seed in self.training_seeds}
            if "split" in method.views:
                taken[view_name(name, "split")] = f"the split view of {name!r}"
            for other in taken.keys() & self.dictionaries.keys():
                raise ValueError(
                    f"dictionaries.{other}: its results would have the names of {taken[other]}; give it another name"
                )
        return self


class TextRunConfig(RunConfig):
    """One experiment on a language model and a text. Its name is its folder under results/."""

    model: ModelConfig
    text: TextConfig
    harvest: HarvestConfig
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    report: AtomsConfig = Field(default_factory=AtomsConfig, description="what the report shows beside scores")

    @property
    def harvested(self) -> Harvest:
        return Harvest(self.model, self.text, self.harvest, self.seed)

    @property
    def data_name(self) -> str:
        return self.text.name

    @model_validator(mode="after")
    def _hook(self) -> "TextRunConfig":
        """What an eval cannot do at a hook is said before anything is harvested."""
        hook = self.model.hook
        asked = [section.name for section in self.evaluation.evals() if not section.can_be_had_at(hook)]
        if asked:
            able = ", ".join(kind.name for kind in EVALS if kind.reads != "images" and kind.can_be_had_at(hook))
            switches = ", ".join(f"evaluation.{name}: null" for name in asked)
            raise ValueError(
                f"model.hook: {', '.join(asked)} cannot be had at {hook!r}; set {switches} "
                f"(to be had there: {able}), or take a hook such as blocks.0.hook_resid_post, where all can"
            )
        return self


class ImageRunConfig(RunConfig):
    """One experiment on a vision model and images: a run with ``images`` in place of ``text``."""

    model: VisionModelConfig
    images: ImagesConfig
    harvest: ImageHarvestConfig
    evaluation: ImageEvaluationConfig = Field(default_factory=ImageEvaluationConfig)
    report: ImageAtomsConfig = Field(
        default_factory=ImageAtomsConfig, description="what the report shows beside scores"
    )

    @property
    def harvested(self) -> ImageHarvest:
        return ImageHarvest(self.model, self.images, self.harvest, self.seed)

    @property
    def data_name(self) -> str:
        return self.images.name

    @model_validator(mode="after")
    def _judged_by_another(self) -> "ImageRunConfig":
        """Images that are alike to the model whose activations are coded say nothing of the dictionary."""
        for section in self.evaluation.evals():
            judge = getattr(section, "backbone", None)
            if isinstance(judge, VisionModelConfig) and judge.name == self.model.name:
                raise ValueError(
                    f"evaluation.{section.name}.backbone is the run's own model, {judge.name}; give another, such as "
                    "google/vit-base-patch16-224-in21k"
                )
        return self


def on_text(config: RunConfig, what: str) -> TextRunConfig:
    """The run, where something is for runs on text alone. Args: what: is done, for the message."""
    if not isinstance(config, TextRunConfig):
        raise ConfigError(f"{what}: {config.name} is a run on images", cure="take a run on text")
    return config


def _named(name: str, check: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Call ``check``; what it says is wrong gets the dictionary's key before it."""
    try:
        return check(*arguments, **options)
    except ValueError as error:
        dot = "." if str(error).startswith("of: ") else ": "
        raise ValueError(f"dictionaries.{name}{dot}{error}") from error


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run from YAML.

    Args:
        path: the YAML file, or the name of a config that comes with the package. ``name`` defaults to the file's stem.
        overrides: ``key.sub=value`` strings; values are YAML, so ``null``, ``1e-3`` and ``[1, 2]`` work;
            ``dictionaries.NAME=null`` leaves a dictionary out.
    Raises:
        ConfigError: missing file, bad YAML, unknown key (with the nearest valid one), wrong type or value.
    """
    path = find_config(path)
    raw = read_yaml(path, "config")
    raw.setdefault("name", path.stem)
    for override in overrides:
        _apply(raw, override)
    return parse_config(raw, str(path))


def parse_config(raw: dict[str, Any], where: str = "config") -> RunConfig:
    """Check a mapping as a run; see ``load_config``."""
    raw = in_cells(raw)
    try:
        return _run_kind(raw).model_validate(raw)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        location = [str(part) for part in problem["loc"]]
        # pydantic puts the union's tag into the path; it is no key of the YAML.
        if location[:1] == ["dictionaries"] and len(location) > 2 and location[2] in KINDS:
            del location[2]
        key = ".".join(location)
        if problem["type"] == "extra_forbidden":
            valid = _valid_keys(location[:-1], raw)
            near = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.4)
            raise ConfigError(
                f"{where}: unknown key {key!r}",
                cure=f"did you mean {'.'.join([*location[:-1], near[0]])!r}?"
                if near
                else f"valid keys here: {', '.join(valid)}",
            ) from error
        raise ConfigError(
            f"{where}: {key or 'the run'}: {problem['msg'].removeprefix('Value error, ')}",
            got=repr(problem["input"]) if key and not isinstance(problem["input"], dict) else None,
            cure=_allowed(location, raw) or "eval_configs/ has examples",
        ) from error


def _run_kind(raw: dict[str, Any]) -> type[RunConfig]:
    """What a mapping is to be checked as."""
    return ImageRunConfig if "images" in raw else TextRunConfig


def _valid_keys(location: list[str], raw: dict[str, Any]) -> list[str]:
    """The keys that the model at ``location`` has."""
    return sorted(_model_at(location, raw).model_fields)


def _model_at(location: list[str], raw: dict[str, Any]) -> type[BaseModel]:
    """What the keys at ``location`` are checked by."""
    model: type[BaseModel] = _run_kind(raw)
    if location[:1] == ["dictionaries"] and len(location) > 1:
        model, location = KINDS[raw["dictionaries"][location[1]]["kind"]], location[2:]
    for part in location:
        annotation = model.model_fields[part].annotation
        options = [annotation, *get_args(annotation)]
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return model


def _allowed(location: list[str], raw: dict[str, Any]) -> str | None:
    """What the key takes: its values or type, with its limits, and what it is for."""
    try:
        model = _model_at(location[:-1], raw)
        field = model.model_fields[location[-1]]
        schema = model.model_json_schema()
    except (KeyError, IndexError, StopIteration, TypeError):
        return None
    of_key = schema["properties"][field.alias or location[-1]]
    kinds = [_kind(part, schema.get("$defs", {})) for part in of_key.get("anyOf", [of_key])]
    purpose = f" ({field.description})" if field.description else ""
    return f"{location[-1]} takes {' or '.join(kinds)}{purpose}"


def _kind(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "$ref" in schema:
        schema = definitions.get(schema["$ref"].rsplit("/", 1)[-1], {})
    if "enum" in schema or "const" in schema:
        return ", ".join(map(str, schema.get("enum", [schema.get("const")])))
    kind = str(schema.get("type", "a value"))
    words = {
        "integer": "a whole number",
        "number": "a number",
        "string": "text",
        "boolean": "true or false",
        "null": "null",
        "object": "keys with values",
    }
    limits = {"exclusiveMinimum": "above", "minimum": "of at least", "exclusiveMaximum": "below", "maximum": "up to"}
    if kind == "array":
        return f"a list of {_kind(schema.get('items', {}), definitions)}"
    return " ".join([words.get(kind, kind), *(f"{limits[name]} {schema[name]}" for name in limits if name in schema)])


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f"--set {override!r}: not of the form key.sub=value", cure="e.g. --set harvest.train_tokens=8192"
        )
    *parents, last = key.strip().split(".")
    node = raw
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {part!r} holds a value, not keys", got=repr(child))
        node = child
    try:
        node[last] = parse_yaml(text, f"--set {override!r}")
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML ({error})") from error


def dump_config(config: RunConfig) -> str:
    """The run as YAML that ``load_config`` reads back to an equal run."""
    dumped = config.model_dump(mode="json", serialize_as_any=True)
    # A reader expects the data beside its model; what is of one kind of run alone comes last in the model.
    first = [key for key in ("name", "seed", "training_seeds", "device", "model", "text", "images") if key in dumped]
    return yaml.safe_dump({key: dumped[key] for key in dict.fromkeys([*first, *dumped])}, sort_keys=False)
