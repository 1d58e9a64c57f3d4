"""A kind of dictionary: its options in a YAML, how it is made and loaded, and what the tables say of it.

A kind is a subclass of ``Method`` in a file of its own and a line in methods/__init__.py. Nothing else knows kinds
apart: configs, runs, grids and tables ask the method.
"""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, JsonValue, model_validator
from torch import Tensor
from typing_extensions import Self

from ksvd_sae.activations.collecting import CollectingConfig
from ksvd_sae.activations.gradients import GradientConfig, GradientMoments
from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.activations.weights import OwnWeights
from ksvd_sae.dictionary import Dictionary
from ksvd_sae.errors import ManifestError
from ksvd_sae.learning.coding import AnyCoder, Coding
from ksvd_sae.learning.pca import covariance
from ksvd_sae.learning.weighting import DEFAULT_POWER, Weighting, WeightingKind, make_weighting
from ksvd_sae.ranks import ALONE, Ranks
from ksvd_sae.strict import Strict

if TYPE_CHECKING:
    from sae_lens.saes.sae import SAE

    from ksvd_sae.activations.language import ActivationReader

# How a signed code is given to evals; see ksvd_sae/sae.py.
View = Literal["signed", "split"]
Coder = Literal["mp", "mp_refit", "omp", "ormp", "matryoshka"]
CODER_LABELS: dict[AnyCoder, str] = {
    "mp": "MP",
    "mp_refit": "MP, refit",
    "omp": "OMP",
    "ormp": "ORMP",
    "matryoshka": "Matryoshka MP",
    "projection": "projection",
}
TRAIN_LOG = "train_log.jsonl"
_COVARIANCE_BATCH = 16_384


class WeightingConfig(Strict):
    """The metric that a dictionary is learned in; see ksvd_sae/learning/weighting.py. A bare name is short for kind."""

    kind: WeightingKind = "none"
    power: float = Field(
        0.5, gt=0, le=2, description="of 'std' and, there 1 unless given, 'whiten': 1 makes all equally loud"
    )
    ridge: float | None = Field(None, ge=0, description="fraction of the mean moment; null takes the kind's default")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        named = {"kind": value} if isinstance(value, str) else value
        if isinstance(named, dict) and named.get("kind") == "whiten":
            return {"power": DEFAULT_POWER["whiten"], **named}
        return named

    @property
    def needs_gradients(self) -> bool:
        return self.kind.startswith("fisher")


@dataclass(frozen=True)
class Facts:
    """What a training says of its dictionary: the manifest and the tables have it from here.

    Attributes:
        d_sae: latents, of the codes as they come.
        k: the budget; None where a published SAE does not say.
        signed: whether codes have signs.
        samples_seen: activations used in training, repeats counted; None where it is not known.
        timed: whether seconds are those of a training; downloading is none.
        seconds: of the training alone, where it took less than the whole stage.
        more: what else the manifest keeps.
    """

    d_sae: int
    k: int | None
    signed: bool
    samples_seen: int | None
    timed: bool = True
    seconds: float | None = None
    more: Mapping[str, JsonValue] = field(default_factory=dict)

    def manifest(self, seconds: float) -> dict[str, JsonValue]:
        """As the manifest keeps them. Args: seconds: that the stage took."""
        own = {name: value for name, value in asdict(self).items() if name not in ("timed", "seconds", "more")}
        known = self.seconds if self.seconds is not None else round(seconds, 1)
        return {**own, "seconds": known if self.timed else None, **self.more}


@dataclass(frozen=True)
class TrainingSetting:
    """Where a dictionary is made: a model and its hook, activations, a device, a seed.

    gradient_moments: called only for the metrics that need them.
    training_text: the loaded language model and the contexts that the activations come from, from their beginning;
        called only by trainings that run the model. None: there is none.
    weights: the model's, where they are not those that its name stands for.
    ranks: the processes that make it together; those of a method that ``learns_by_ranks``.
    """

    model_name: str
    hook: str
    context_tokens: int
    seed: int
    device: torch.device
    harvest_hash: str
    shards: ActivationShards
    gradient_moments: Callable[[], GradientMoments]
    weights: OwnWeights | None = None
    training_text: "Callable[[], tuple[ActivationReader, Iterator[Tensor]]] | None" = None
    ranks: Ranks = ALONE

    @property
    def of_weights(self) -> dict[str, Any]:
        """What metadata and provenance say of the model's weights, where its name does not."""
        return {} if self.weights is None else {"model_weights": self.weights.as_metadata()}

    def wrap(self, dictionary: Dictionary, view: View = "signed") -> "SAE[Any]":
        """The dictionary as a SAELens SAE of this model and hook."""
        from ksvd_sae.sae import sae_from_dictionary

        return sae_from_dictionary(
            dictionary,
            model_name=self.model_name,
            hook_name=self.hook,
            context_size=self.context_tokens,
            device=str(self.device),
            view=view,
            prepend_bos=self.shards.prepend_bos,
            **self.of_weights,
        )

    def weighting(self, wanted: WeightingConfig) -> Weighting | None:
        """The metric that the config asks for, from the harvest's moments; 'whiten' reads all of its samples."""
        covariance_DD = None
        if wanted.kind == "whiten":
            batches = (batch_BD.to(self.device) for batch_BD in self.shards.batches(_COVARIANCE_BATCH))
            covariance_DD = covariance(batches, self.shards.centre_D)
        return make_weighting(
            wanted.kind,
            variance_D=self.shards.statistics.variance_D,
            covariance_DD=covariance_DD,
            outer_DD=self.gradient_moments().outer_DD if wanted.needs_gradients else None,
            power=wanted.power,
            ridge=wanted.ridge,
        )

    def save(self, dictionary: Dictionary, folder: Path) -> None:
        """The dictionary, and beside it the SAE, with codes as they come."""
        provenance = {"model": self.model_name, "hook": self.hook, "harvest": self.harvest_hash, **self.of_weights}
        dictionary = replace(dictionary, provenance=provenance)
        dictionary.save(folder)
        self.wrap(dictionary).save_model(folder / "sae")


@dataclass(frozen=True)
class Source:
    """A trained dictionary that another takes its atoms from; samples_seen by its training."""

    method: "Method"
    folder: Path
    samples_seen: int | None


@dataclass(frozen=True)
class Waypoint:
    """A dictionary on its way: what it is after so many samples and seconds of training."""

    samples_seen: int
    seconds: float
    dictionary: Dictionary


class Method(Strict, ABC):
    """One kind of dictionary: what a YAML says of it, and all that is done with that.

    Class attributes:
        version: goes up when the same options come to make another dictionary; trainings are found by it.
        learns: whether it is made from activations.
        runs_model: whether its training runs the language model.
        has_atoms: whether others can take atoms from it.
        may_vary: options that a grid of runs, or several seeds, may set.
        chosen_at_load: options that its training does not follow from.
        newer: options that trainings before them did not have: left out (null, 0, false) they change no key.
        has_waypoints: whether what it is on the way of a training is what training on fewer samples would give, so not
            where a schedule ends with the training.
        unfinished: files that a stopped training goes on from.
    """

    kind: str

    version: ClassVar[int] = 1
    learns: ClassVar[bool] = True
    runs_model: ClassVar[bool] = False
    has_atoms: ClassVar[bool] = True
    may_vary: ClassVar[frozenset[str]] = frozenset()
    chosen_at_load: ClassVar[frozenset[str]] = frozenset()
    newer: ClassVar[frozenset[str]] = frozenset()
    has_waypoints: ClassVar[bool] = False
    unfinished: ClassVar[frozenset[str]] = frozenset({TRAIN_LOG})

    # ------------------------------------------------------------ what is known before it is made

    @property
    def is_control(self) -> bool:
        """Whether it is what every method must beat; no contestant."""
        return False

    @property
    def is_sae(self) -> bool:
        """Whether it is an SAE, what DB-KSVD is compared with."""
        return False

    @property
    @abstractmethod
    def has_signs(self) -> bool:
        """Whether its codes have signs, as far as the options tell."""

    @property
    def uses_both_signs(self) -> bool:
        """Whether an atom may be used with either sign, whatever the codes look like."""
        return self.has_signs

    @property
    def budget(self) -> int | None:
        """Most atoms a token; None where that is not known before it is made."""
        return None

    @property
    def size(self) -> int | None:
        """Atoms; None where that is not known before it is made."""
        return None

    @property
    def coding(self) -> Coding | None:
        """How pursuit makes its codes; None where none does."""
        return None

    @property
    def metric(self) -> WeightingConfig:
        """What it is learned in."""
        return WeightingConfig()

    @property
    def group_sizes(self) -> tuple[int, ...] | None:
        """Of a Matryoshka dictionary's groups."""
        return None

    @property
    def views(self) -> tuple[View, ...]:
        """In which it is evaluated, signed first; 'signed' stands for codes as they come."""
        return ("signed",)

    @property
    def learns_anywhere(self) -> bool:
        """Whether it can be learned on any activations."""
        return self.learns and not self.runs_model and not self.metric.needs_gradients

    @property
    def learns_by_ranks(self) -> bool:
        """Whether several processes can make it together: each calls ``train``, and rank 0 saves it."""
        return False

    @property
    def coder_label(self) -> str:
        """What turns activations into codes, as tables name it."""
        return "own encoder"

    @property
    def source(self) -> str | None:
        """The dictionary of the same run that its atoms are those of; None where it has its own."""
        return None

    @property
    def own_seed(self) -> int | None:
        """Where its training draws by a seed of its own rather than by the run's."""
        return None

    def is_drawn(self, source: "Method | None") -> bool:
        """Whether another seed makes another dictionary. Args: source: where it takes its atoms from."""
        return "seed" in self.may_vary

    def varied(self, **options: JsonValue) -> Self:
        """The same with other values of options that ``may_vary``."""
        return type(self).model_validate({**self.model_dump(), **options})

    def resized(self, sizes: Mapping[str, int]) -> Self:
        """The same kind with other values of those of the options that it has."""
        return self.model_copy(update={n: size for n, size in sizes.items() if getattr(self, n, None) is not None})

    def completed(self, name: str, others: "Mapping[str, Method]") -> "Method":
        """With what it leaves open taken from the run's other dictionaries.

        Args: name: of this one.
        Raises: ValueError: options that do not fit another's.
        """
        return self

    def batch(self, n_samples: int) -> int:
        """Samples that training has in hand at a time, of so many."""
        own: int | None = getattr(self, "batch_samples", None)
        return min(n_samples, own or 4 * (self.size or 1024))

    def operations(self, n_samples: int, d_in: int) -> float:
        """About how many multiplications learning from samples takes: one try tells the time of another size."""
        return float(n_samples * d_in * (self.size or d_in)) if self.learns else 0.0

    def operations_of_batch(self, d_in: int) -> float:
        """About how many of them are done once a batch, whatever its size."""
        return float((self.size or d_in) * d_in)

    def floats_of_sample(self, d_in: int) -> float:
        """How many numbers training holds at least of each sample of a batch."""
        return float(d_in)

    def floats(self, d_in: int) -> float:
        """About how many numbers training holds: one try tells the memory of another size."""
        return self.batch(1 << 62) * self.floats_of_sample(d_in) + (self.size or d_in) * d_in

    def check(self, harvest: CollectingConfig) -> None:
        """Raise ValueError where the options do not fit each other or what is harvested."""
        if self.metric.needs_gradients and not harvest.has_gradients:
            cure = "set harvest.gradient_tokens (ten times d_in is plenty), or use weighting 'std'"
            if not isinstance(harvest, GradientConfig):
                cure = "a model of images has no loss to take them of; use weighting 'std'"
            raise ValueError(f"weighting {self.metric.kind!r} needs gradients; {cure}")
        if self.size is None:
            return
        if (self.budget or 0) > self.size:
            raise ValueError(f"k = {self.budget} is above n_atoms = {self.size}")
        if self.size > harvest.train_tokens:
            raise ValueError(
                f"n_atoms = {self.size} is above harvest.train_tokens = {harvest.train_tokens}; harvest more tokens "
                "or ask for fewer atoms"
            )

    def check_elsewhere(self, model_name: str, hook: str) -> None:
        """Raise where something outside of this machine is not as the run needs it, before the run does any work."""

    def key(self) -> dict[str, JsonValue]:
        """What of the options its training follows from; the seed is a key's by itself, and so is the source."""
        as_before = {name for name in self.newer if not getattr(self, name)}
        fields = self.model_dump(mode="json", exclude={"view", "seed", "of", *self.chosen_at_load, *as_before})
        return {**fields, "version": self.version}

    def choices(self) -> dict[str, JsonValue]:
        """What of the options its codes follow from and its training does not."""
        chosen: dict[str, JsonValue] = self.model_dump(mode="json", include=set(self.chosen_at_load))
        return chosen

    @classmethod
    def note(cls, names: list[str]) -> str | None:
        """What a reader of tables must know of the run's dictionaries of this kind."""
        return None

    # ------------------------------------------------------------ made, and loaded

    @abstractmethod
    def train(self, setting: TrainingSetting, folder: Path, source: Source | None) -> Facts:
        """Make the dictionary and save it in ``folder``.

        Args: source: the trained dictionary that ``source`` names; None where it names none.
        """

    @abstractmethod
    def load(self, setting: TrainingSetting, folder: Path, view: View = "signed") -> "SAE[Any]":
        """What ``train`` saved, as a SAELens SAE that codes as the options ask for."""

    @abstractmethod
    def dictionary(self, setting: TrainingSetting, folder: Path) -> Dictionary:
        """What ``train`` saved, as atoms that code by pursuit, for whoever takes them from here."""

    def waypoints(self, setting: TrainingSetting, spacing: float) -> Iterator[Waypoint] | None:
        """Its training from the start, with the dictionary on its way; None without ``has_waypoints``.

        Args: spacing: factor between the samples seen at one point and the next.
        """
        return None

    def clear_unfinished(self, folder: Path) -> None:
        """Leave of a training that was stopped what it can go on from."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.name in self.unfinished:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


class Seeded(Method):
    """A training that draws."""

    seed: int | None = Field(None, description="of the training alone; null takes the run's")

    may_vary: ClassVar[frozenset[str]] = frozenset({"seed"})

    @property
    def own_seed(self) -> int | None:
        return self.seed


class Viewed(Method):
    """Codes with signs, which can be given in two ways."""

    view: Literal["signed", "split", "both"] = Field(
        "signed",
        description="what evals see of signed codes; signed: codes as they come; split: an atom's positive and "
        "negative part as two latents; both: each in a row of its own",
    )

    @property
    def has_signs(self) -> bool:
        return True

    @property
    def views(self) -> tuple[View, ...]:
        return ("signed", "split") if self.view == "both" else (self.view,)


class KeptAsDictionary(Viewed):
    """What is on disk is a ``Dictionary``."""

    def load(self, setting: TrainingSetting, folder: Path, view: View = "signed") -> "SAE[Any]":
        return for_flat_heads(setting.wrap(self.dictionary(setting, folder), view))

    def dictionary(self, setting: TrainingSetting, folder: Path) -> Dictionary:
        return Dictionary.load(folder)


class KeptAsSAE(Method):
    """What is on disk is a SAELens SAE, whose codes are as its own encoder makes them."""

    @property
    def has_signs(self) -> bool:
        return False

    def load(self, setting: TrainingSetting, folder: Path, view: View = "signed") -> "SAE[Any]":
        return load_sae(folder, setting.device)

    def dictionary(self, setting: TrainingSetting, folder: Path) -> Dictionary:
        """The decoder's rows and bias, in the metric that it was trained in, coded by MP without negative
        coefficients."""
        from ksvd_sae.sae import decoder

        rows_MD, centre_D = decoder(load_sae(folder, torch.device("cpu")), f"taking the atoms of {folder}")
        weighting = setting.weighting(self.metric)
        return Dictionary(
            unit_rows(rows_MD, weighting),
            centre_D,
            # Not every published SAE has a budget; whoever recodes it does.
            Coding(self.budget or 1, nonnegative=True),
            weighting,
        )


def load_sae(folder: Path, device: torch.device) -> "SAE[Any]":
    """A SAELens SAE from disk (safetensors and JSON: nothing is unpickled)."""
    from sae_lens.saes.sae import SAE

    if not (folder / "cfg.json").exists():
        raise ManifestError(f"loading SAE {folder}: no cfg.json there", cure="run `ksvd-sae train` first")
    return for_flat_heads(SAE.load_from_disk(folder, device=str(device)))


def for_flat_heads(sae: "SAE[Any]") -> "SAE[Any]":
    """The SAE for activations as harvests and evals give them: heads, if the hook has them, are flattened."""
    sae.turn_off_forward_pass_hook_z_reshaping()
    return sae


def unit_rows(raw_MD: Tensor, weighting: Weighting | None) -> Tensor:
    """Directions of raw space as unit rows of a metric's."""
    rows_MD = raw_MD.double() if weighting is None else weighting.apply(raw_MD.double())
    return torch.nn.functional.normalize(rows_MD, dim=1).float()


class Coded(Viewed):
    """A dictionary that codes by pursuit: the options of ``ksvd_sae.learning.coding.Coding``."""

    k: int = Field(gt=0)
    coder: Coder = Field("mp", description="how the dictionary codes when evaluated")
    nonnegative: bool = False
    rtol: float = Field(0.0, ge=0.0)
    tau: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="pick no atom whose product with what is left of a token is this share of the token's norm or "
        "less; k is then a limit",
    )

    newer: ClassVar[frozenset[str]] = frozenset({"tau"})
    chosen_at_load: ClassVar[frozenset[str]] = frozenset({"coder"})

    @model_validator(mode="after")
    def _signs(self) -> Self:
        if self.nonnegative and self.coder == "ormp":
            raise ValueError("coder 'ormp' has signs; for nonnegative codes use 'omp'")
        if self.nonnegative and self.view != "signed":
            raise ValueError(f"view {self.view!r} needs signs to split; leave view out, as nonnegative codes have none")
        if self.coder == "matryoshka" and self.group_sizes is None:
            raise ValueError("coder 'matryoshka' needs groups; give their sizes, or take coder 'mp'")
        return self

    @property
    def coding(self) -> Coding:
        """The coder that it is evaluated with."""
        return Coding(self.k, self.coder, self.rtol, None, self.nonnegative, self.group_sizes, self.tau)

    @property
    def has_signs(self) -> bool:
        return not self.nonnegative

    @property
    def budget(self) -> int:
        return self.k

    @property
    def coder_label(self) -> str:
        return CODER_LABELS[self.coder]


class Derived(Seeded):
    """What takes its atoms from another dictionary of the run; what it leaves open is as in the other."""

    of: str = Field(description="the name of the other dictionary")
    k: int | None = Field(None, gt=0, description="null: that of the other")
    weighting: WeightingConfig | None = Field(
        None, description="the metric to code in; null: the one that the other was learned in"
    )

    has_atoms: ClassVar[bool] = False

    @property
    def budget(self) -> int | None:
        return self.k

    @property
    def metric(self) -> WeightingConfig:
        return self.weighting or WeightingConfig()

    @property
    def source(self) -> str:
        return self.of

    def completed(self, name: str, others: Mapping[str, Method]) -> Method:
        other = others.get(self.of)
        if other is None:
            raise ValueError(f"of: no dictionary {self.of!r} in this run; there are {', '.join(others)}")
        if other.source is not None:
            raise ValueError(f"of: {_why_not_twice(name, others)}")
        if not other.has_atoms:
            raise ValueError(f"of: {self.of!r} has no atoms of its own: there is nothing to code")
        if other.own_seed is not None and self.seed not in (None, other.own_seed):
            raise ValueError(
                f"seed = {self.seed}, but {self.of!r} is trained with seed {other.own_seed}; leave one out"
            )
        k = self.k or other.budget
        if k is None:
            raise ValueError(f"the k of {self.of!r} is not known before it is fetched; give k")
        # How many atoms a published SAE has is not known before it is fetched.
        if other.size is not None and k > other.size:
            raise ValueError(f"k = {k} is above the {other.size} atoms of {self.of!r}")
        seed = other.own_seed if self.seed is None else self.seed
        return self.like(other).model_copy(update={"k": k, "seed": seed, "weighting": self.weighting or other.metric})

    @abstractmethod
    def like(self, other: Method) -> Self:
        """With what a kind of its own leaves open taken from ``other``. Raises: ValueError."""

    def atoms_of(self, source: Source, setting: TrainingSetting) -> Dictionary:
        """The other's atoms, in the metric to code in."""
        dictionary = source.method.dictionary(setting, source.folder)
        if self.weighting == source.method.metric:
            return dictionary
        weighting = setting.weighting(self.metric)
        return replace(dictionary, atoms_MD=unit_rows(dictionary.raw_atoms(), weighting), weighting=weighting)


def _why_not_twice(name: str, others: Mapping[str, Method]) -> str:
    """A derived dictionary's other is derived too: the way from one to the next, and what to write instead."""
    chain: list[str] = [name]
    while (other := others.get(chain[-1])) is not None and other.source is not None and chain[-1] not in chain[:-1]:
        chain.append(other.source)
    way = " -> ".join(chain)
    if chain[-1] in chain[:-1]:
        return f"goes round in a circle ({way}); name a dictionary that is learned"
    return f"{chain[1]!r} has its atoms from another ({way}); name that one: of: {chain[-1]}"
