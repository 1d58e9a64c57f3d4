"""A run as typed values: YAML in, checked, YAML out.

A config names a model and a hook, a text, what to harvest, the dictionaries to learn on the
harvest, and the evals to run on them. ``load_config`` reads one, applies ``--set`` overrides, and
turns every mistake into a ConfigError that names the key and the nearest valid one.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, StringConstraints, ValidationError, field_validator, model_validator

from ksvd_sae.errors import ConfigError
from ksvd_sae.evals.config import EvaluationConfig, ReportConfig, Strict
from ksvd_sae.methods.derived_config import DerivedConfig, LinearTopKConfig, RecodedConfig, filled
from ksvd_sae.methods.options import SAETraining, View, Viewed, WeightingConfig
from ksvd_sae.methods.published.config import PublishedSAEConfig

Dtype = Literal["float32", "bfloat16", "float16"]
# Of a dictionary's name, in the split view.
SPLIT_SUFFIX = ".split"


class ModelConfig(Strict):
    """The language model and the place in it."""

    name: str = Field(description="a TransformerLens model name")
    hook: str = Field(description="any TransformerLens hook name, e.g. blocks.8.hook_resid_post")
    source: Literal["hub", "offline"] = Field("hub", description="offline: assembled from Python packages")
    dtype: Dtype = "float32"


class TextConfig(Strict):
    """Where documents come from."""

    source: Literal["hub", "folder", "bbc-news"] = Field(
        "hub", description="hub: a data set on the Hub; folder: local files; bbc-news: 2,225 articles from a package"
    )
    dataset: str | None = Field(None, description="Hub name, or the folder's path")
    split: str = "train"
    column: str = "text"
    streaming: bool = True

    @model_validator(mode="after")
    def _named(self) -> "TextConfig":
        if self.source != "bbc-news" and not self.dataset:
            raise ValueError(f"text.source {self.source!r} needs text.dataset")
        return self


class HarvestConfig(Strict):
    """How activations are collected."""

    train_tokens: int = Field(gt=0)
    heldout_tokens: int = Field(gt=0)
    context_tokens: int = Field(128, ge=2)
    batch_contexts: int = Field(16, ge=1)
    shard_tokens: int = Field(65_536, ge=1)
    outlier_factor: float | None = Field(
        4.0, gt=1.0, description="leave out tokens with a norm above this multiple of the median; null keeps all"
    )
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_tokens: int = Field(
        0, ge=0, description="tokens to collect the moments of the loss's gradient from; 0 collects none"
    )
    gradient_batch_contexts: int = Field(4, ge=1)


class _Learned(Strict):
    n_atoms: int = Field(gt=0)
    k: int = Field(gt=0)
    seed: int | None = Field(None, description="of the training alone; null takes the run's")
    weighting: WeightingConfig = Field(default_factory=lambda: WeightingConfig())


class DBKSVDConfig(_Learned, Viewed):
    """A DB-KSVD dictionary (arXiv 2505.18441)."""

    kind: Literal["db_ksvd"] = "db_ksvd"
    passes: int = Field(1, ge=1)
    batch_samples: int | None = Field(None, ge=1, description="null: 4 times n_atoms; the paper: 65536")
    update: Literal["sums", "exact"] = "sums"
    atom_batch: int = Field(128, ge=1, description="atoms updated in parallel by the exact update")
    init: Literal["data", "random"] = "data"
    redraw: Literal["residual", "data", "random", "none"] = Field(
        "residual", description="what replaces unused and repeated atoms; the paper: random"
    )
    duplicate_cosine: float | None = Field(0.99, gt=0, description="atoms this parallel repeat each other; paper: null")
    average: bool = Field(True, description="give the running average of the atoms over the batches; paper: false")
    centre: bool = Field(True, description="subtract the mean; paper: false")
    groups: Literal["paper"] | list[int] | None = Field(
        None, description="Matryoshka groups: 'paper' for 2^8, 2^8, 2^9, …, or sizes that add up to n_atoms"
    )
    nonnegative: bool = False
    rtol: float = Field(0.0, ge=0.0)
    max_steps_factor: int = Field(4, ge=1, description="MP takes at most this many times k steps")
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32", description="of the products in training's coding; tf32 needs a GPU"
    )
    coder: Literal["mp", "mp_refit", "omp", "ormp", "matryoshka"] = Field(
        "mp", description="how the dictionary codes when evaluated"
    )

    @model_validator(mode="after")
    def _signs(self) -> "DBKSVDConfig":
        if self.nonnegative and self.coder == "ormp":
            raise ValueError("coder 'ormp' has signs; for nonnegative codes use 'omp'")
        if self.nonnegative and self.view != "signed":
            raise ValueError(f"view {self.view!r} needs signs to split; leave view out, as nonnegative codes have none")
        return self


class SAEConfig(_Learned, SAETraining):
    """An SAE trained by SAELens on the same shards: what all kinds share."""

    snapshots: list[Annotated[int, Field(gt=0)]] = Field(
        default_factory=list, description="samples seen at which to save the SAE as it is then, in snapshot-<samples>"
    )


class TopKSAEConfig(SAEConfig):
    """A TopK SAE."""

    kind: Literal["topk_sae"] = "topk_sae"
    aux_loss_coefficient: float = Field(1 / 32, ge=0)


class BatchTopKSAEConfig(SAEConfig):
    """A BatchTopK SAE: k latents a sample on average over a batch; at inference one threshold (JumpReLU)."""

    kind: Literal["batchtopk_sae"] = "batchtopk_sae"
    aux_loss_coefficient: float = Field(1 / 32, ge=0)


class MatryoshkaBatchTopKSAEConfig(SAEConfig):
    """A BatchTopK SAE whose first latents, up to the end of each group, must do by themselves as well."""

    kind: Literal["matryoshka_batchtopk_sae"] = "matryoshka_batchtopk_sae"
    aux_loss_coefficient: float = Field(1 / 32, ge=0)
    groups: Literal["paper"] | list[Annotated[int, Field(gt=0)]] = Field(
        "paper", description="as a DB-KSVD dictionary's: 'paper' for 2^8, 2^8, 2^9, …, or sizes that add up to n_atoms"
    )


class JumpReLUSAEConfig(SAEConfig):
    """A JumpReLU SAE: a learned threshold for each latent. k is a target of the loss, not a limit.

    Thresholds start low and move by about a learning rate a step: a short training ends with an L0 far from k. On
    Gemma-3-270M, layer 9, 1,024 latents, lr 4e-3 and the coefficient below, L0 was 21 for k = 20 after 1,286 steps;
    after 385 steps, with coefficient 1, it was 32.
    """

    kind: Literal["jumprelu_sae"] = "jumprelu_sae"
    sparsity_loss: Literal["quadratic", "step", "tanh"] = Field(
        "quadratic", description="quadratic aims at L0 = k (Gemma Scope 2); step and tanh know only l0_coefficient"
    )
    l0_coefficient: float = Field(3.0, gt=0, description="quadratic: the larger, the nearer L0 ends to k")
    l0_warm_up_fraction: float = Field(0.1, ge=0, le=1, description="of the steps: l0_coefficient grows from 0")
    initial_threshold: float = Field(0.01, ge=0, description="of activations scaled to variance 1, like bandwidth")
    bandwidth: float = Field(0.05, gt=0)
    threshold_gradient_to_all: bool = Field(
        False, description="whether the sparsity loss moves the encoder too (Anthropic) or thresholds alone (DeepMind)"
    )
    pre_act_loss_coefficient: float | None = Field(None, gt=0, description="against dead latents; null leaves it out")


class PCAConfig(Viewed):
    """Control: the first k principal components, coded by projection."""

    kind: Literal["pca"] = "pca"
    k: int = Field(gt=0)


class IdentityConfig(Viewed):
    """Control: the activation as it is, a latent a dimension, none left out: what an eval says without a dictionary."""

    kind: Literal["identity"] = "identity"

    @property
    def k(self) -> None:
        """As many as the activations have dimensions, which is not known before they are there."""


class RandomConfig(Viewed):
    """Control: random unit atoms, no direction likelier than another in their metric, coded as DB-KSVD codes."""

    kind: Literal["random"] = "random"
    n_atoms: int = Field(gt=0)
    k: int = Field(gt=0)
    seed: int | None = Field(None, description="of the draw alone; null takes the run's")
    coder: Literal["mp", "mp_refit", "omp", "ormp"] = "mp"
    weighting: WeightingConfig = Field(default_factory=lambda: WeightingConfig())


# Names become file names.
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
DictionaryName = Annotated[str, StringConstraints(pattern=_NAME)]
DictionaryConfig = Annotated[
    DBKSVDConfig
    | TopKSAEConfig
    | BatchTopKSAEConfig
    | MatryoshkaBatchTopKSAEConfig
    | JumpReLUSAEConfig
    | PublishedSAEConfig
    | PCAConfig
    | IdentityConfig
    | RandomConfig
    | RecodedConfig
    | LinearTopKConfig,
    Field(discriminator="kind"),
]


def views(config: DictionaryConfig) -> tuple[View, ...]:
    """The views in which a dictionary is evaluated; 'signed' stands for codes as they come, a SAE's too."""
    wanted: Literal["signed", "split", "both"] = getattr(config, "view", "signed")
    return ("signed", "split") if wanted == "both" else (wanted,)


def view_name(name: str, view: View) -> str:
    """What a dictionary's view is called where a name must say it by itself: in the names of result files."""
    return f"{name}{SPLIT_SUFFIX}" if view == "split" else name


def seed_name(name: str, seed: int | None) -> str:
    """What one of several trainings of a dictionary is called where its name must tell it from the others."""
    return f"{name}.s{seed}"


class RunConfig(Strict):
    """One experiment. Its name is its folder under results/."""

    name: str = Field(pattern=_NAME)
    seed: int = 0
    training_seeds: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=list,
        description="learn each dictionary without a seed of its own once for each, for error bars; empty: with `seed`",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    model: ModelConfig
    text: TextConfig
    harvest: HarvestConfig
    dictionaries: dict[DictionaryName, DictionaryConfig] = Field(min_length=1)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    report: ReportConfig = Field(default_factory=lambda: ReportConfig())

    @field_validator("dictionaries")
    @classmethod
    def _taken_from_others(cls, found: dict[str, DictionaryConfig]) -> dict[str, DictionaryConfig]:
        return {name: filled(name, c, found) if isinstance(c, DerivedConfig) else c for name, c in found.items()}

    @model_validator(mode="after")
    def _sizes(self) -> "RunConfig":
        for name, dictionary in self.dictionaries.items():
            n_atoms = getattr(dictionary, "n_atoms", None)
            if n_atoms is not None and (dictionary.k or 0) > n_atoms:
                raise ValueError(f"dictionaries.{name}: k = {dictionary.k} is above n_atoms = {n_atoms}")
            weighting = getattr(dictionary, "weighting", None)
            if weighting is not None and weighting.kind.startswith("fisher") and not self.harvest.gradient_tokens:
                raise ValueError(
                    f"dictionaries.{name}: weighting {weighting.kind!r} needs gradients; set harvest.gradient_tokens "
                    "(ten times d_in is plenty), or use weighting 'std'"
                )
            if n_atoms is not None and n_atoms > self.harvest.train_tokens:
                raise ValueError(
                    f"dictionaries.{name}: n_atoms = {n_atoms} is above harvest.train_tokens = "
                    f"{self.harvest.train_tokens}; harvest more tokens or ask for fewer atoms"
                )
        return self

    @model_validator(mode="after")
    def _names(self) -> "RunConfig":
        """Names of result files tell trainings and views apart."""
        if len(set(self.training_seeds)) < len(self.training_seeds):
            raise ValueError(f"training_seeds: {self.training_seeds} names a seed twice")
        for name, dictionary in self.dictionaries.items():
            taken = {seed_name(name, seed): f"a training of {name!r}" for seed in self.training_seeds}
            if "split" in views(dictionary):
                taken[view_name(name, "split")] = f"the split view of {name!r}"
            for other in taken.keys() & self.dictionaries.keys():
                raise ValueError(
                    f"dictionaries.{other}: its results would have the names of {taken[other]}; give it another name"
                )
        return self


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run from YAML.

    Args:
        path: the YAML file. ``name`` defaults to the file's stem.
        overrides: ``key.sub=value`` strings; values are YAML, so ``null``, ``1e-3`` and ``[1, 2]`` work;
            ``dictionaries.NAME=null`` leaves a dictionary out.
    Raises:
        ConfigError: missing file, bad YAML, unknown key (with the nearest valid one), wrong type or value.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        near = ", ".join(sorted(str(p) for p in path.parent.glob("*.yaml"))) if path.parent.is_dir() else ""
        raise ConfigError(
            f"reading config {path}: no such file", cure=f"give one of: {near}" if near else "check the path"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"reading config {path}: not YAML ({error})", cure="eval_configs/ has examples") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"reading config {path}: not a mapping of keys to values", got=type(raw).__name__)
    raw.setdefault("name", path.stem)
    for override in overrides or []:
        _apply(raw, override)
    if isinstance(raw.get("dictionaries"), dict):
        # --set dictionaries.NAME=null leaves one out.
        raw["dictionaries"] = {name: value for name, value in raw["dictionaries"].items() if value is not None}
    return parse_config(raw, str(path))


def parse_config(raw: dict[str, Any], where: str = "config") -> RunConfig:
    """Check a mapping as a run; see ``load_config``."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        # pydantic puts the union's tag into the path; it is no key of the YAML.
        tags = {get_args(m.model_fields["kind"].annotation)[0] for m in _DICTIONARY_MODELS.values()}
        location = [str(part) for part in problem["loc"]]
        if location[:1] == ["dictionaries"] and len(location) > 2 and location[2] in tags:
            del location[2]
        key = ".".join(location)
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(location[-1], _valid_keys(location[:-1], raw), n=1, cutoff=0.4)
            raise ConfigError(
                f"{where}: unknown key {key!r}",
                cure=f"did you mean {'.'.join([*location[:-1], near[0]])!r}?"
                if near
                else f"valid keys here: {', '.join(_valid_keys(location[:-1], raw))}",
            ) from error
        raise ConfigError(
            f"{where}: {key or 'the run'}: {problem['msg']}",
            got=repr(problem["input"]) if key and not isinstance(problem["input"], dict) else None,
            cure="see the config's field in ksvd_sae/config.py or `ksvd-sae run --help`",
        ) from error


_DICTIONARY_MODELS: dict[str, type[BaseModel]] = {
    "db_ksvd": DBKSVDConfig,
    "topk_sae": TopKSAEConfig,
    "batchtopk_sae": BatchTopKSAEConfig,
    "matryoshka_batchtopk_sae": MatryoshkaBatchTopKSAEConfig,
    "jumprelu_sae": JumpReLUSAEConfig,
    "published_sae": PublishedSAEConfig,
    "pca": PCAConfig,
    "identity": IdentityConfig,
    "random": RandomConfig,
    "recoded": RecodedConfig,
    "linear_topk": LinearTopKConfig,
}


def _valid_keys(location: list[str], raw: dict[str, Any]) -> list[str]:
    """The keys that the model at ``location`` has."""
    if location[:1] == ["dictionaries"]:
        kind = raw["dictionaries"][location[1]].get("kind", "db_ksvd")
        return sorted(_DICTIONARY_MODELS[kind].model_fields)
    model: type[BaseModel] = RunConfig
    for part in location:
        annotation = model.model_fields[part].annotation
        options = [annotation, *get_args(annotation)]
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return sorted(model.model_fields)


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
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML ({error})") from error


def dump_config(config: RunConfig) -> str:
    """The run as YAML that ``load_config`` reads back to an equal run."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
