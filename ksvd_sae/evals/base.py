"""An eval: its options in a YAML, how it scores a panel of SAEs, and how its scores read.

An eval is a folder of its own with a subclass of ``Eval`` and a line in evals/__init__.py. Nothing else knows evals
apart: runs, tables, reports and the comparison with published scores ask the eval.
"""

import json
import logging
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from pydantic import JsonValue
from typing_extensions import Self

from ksvd_sae.activations.gradients import GradientMoments
from ksvd_sae.activations.harvest import HELDOUT_DOCUMENTS
from ksvd_sae.activations.language import ActivationReader
from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.activations.vision.heldout import HeldoutImages
from ksvd_sae.activations.weights import OwnWeights
from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.items import Item
from ksvd_sae.evals.llm_cache import TensorCache
from ksvd_sae.store import content_hash, copy_of_other_name, versions, write_json
from ksvd_sae.strict import Strict

if TYPE_CHECKING:
    from sae_lens.saes.sae import SAE

logger = logging.getLogger(__name__)
LearnedOn: TypeAlias = "Callable[[ActivationShards, str, Path, Mapping[str, int], int | None], SAE[Any]]"
Reads: TypeAlias = Literal["activations", "text", "images"]
# What an eval's ``dataset`` says for the run's own held-out documents.
HELDOUT_DATA = "heldout"
# ``Eval.hooks``: the model runs up to the block that the hook is in, or a layer's output is what is read.
IN_A_BLOCK, LAYER_OUTPUT = r"blocks\.\d+\..+", r"blocks\.\d+\.hook_resid_post"
ARROWS = {"lower": "↓", "higher": "↑"}
_SCORING_PACKAGES = ("sae-bench", "sae-lens", "transformer-lens", "transformers", "torch", "scikit-learn")


def scoring_versions() -> dict[str, str]:
    """Versions of what SAEBench's scores are computed by."""
    return {name: version for name, version in versions().items() if name in _SCORING_PACKAGES}


@dataclass(frozen=True)
class Column:
    """One column of the headline table.

    Attributes:
        label: the column's name.
        eval: the eval that scores it.
        metric: the metric's name in that eval.
        style: how its numbers are written.
        meaning: what it is, with its unit, as a phrase.
        better: the better direction; None for what is no contest (a budget, an amount).
        minus: a metric of the same eval to subtract, for differences.
        reference: a metric of the same eval to name beside it: what no dictionary reaches by itself.
        reference_is: what gives that, as a phrase.
        matters: the least difference that says something; None: not known, and every significant one does.
        optional: no column where nothing was scored; for evals that run only where a config asks for them.
        last: stands behind the columns of all evals.
    """

    label: str
    eval: str
    metric: str
    style: Literal["count", "score", "percent"]
    meaning: str
    better: Literal["lower", "higher"] | None = None
    minus: str | None = None
    reference: str | None = None
    reference_is: str = "the same probe on the raw activations"
    matters: float | None = None
    optional: bool = False
    last: bool = False

    @property
    def arrow(self) -> str:
        return ARROWS.get(self.better or "", "")

    @property
    def heading(self) -> str:
        return f"{self.label} {self.arrow}".strip()


@dataclass(frozen=True)
class Panelist:
    """One SAE or dictionary under evaluation.

    name: as in the tables. content: hash of what it is. load: gives a fresh SAELens SAE (evals change it in place).
    learned_on: gives an SAE of the same kind, options and seed that is learned on other activations. Takes these, their
        hash, a folder to work in, values of 'n_atoms' and 'k' in place of its own, and a seed (None: its own); None for
        what cannot be learned elsewhere.
    dictionary: what it shares with its trainings by other seeds, and with nothing else; "" for what has none.
    """

    name: str
    content: str
    load: "Callable[[], SAE[Any]]"
    learned_on: "LearnedOn | None" = None
    dictionary: str = ""


@dataclass(frozen=True)
class Heldout:
    """The part of a run's text that no dictionary has learned from.

    name: as a data set. shards: its activations. reader: loads the language model; None where a vision model gave them.
    gradient_moments: of the training part; None where none were collected. gradients_hash: of how they were; None where
    none were.
    """

    name: str
    shards: ActivationShards
    reader: Callable[[], ActivationReader] | None
    gradient_moments: Callable[[], GradientMoments] | None = None
    gradients_hash: str | None = None

    @property
    def documents(self) -> Path:
        """JSONL with the documents under 'text'."""
        return self.shards.folder / HELDOUT_DOCUMENTS

    @cached_property
    def images(self) -> HeldoutImages:
        """Of a run on images."""
        return HeldoutImages(self.shards)

    def loaded_reader(self) -> ActivationReader:
        """The language model, loaded. Of a run on text."""
        assert self.reader is not None, "evals of text are refused for runs on images"
        return self.reader()

    @property
    def harvest_hash(self) -> str:
        return str(self.shards.manifest["hash"])

    @property
    def outlier_limit(self) -> float | None:
        """Norm above which a token is an outlier, which the harvest leaves out; None: none is."""
        limit: float | None = self.shards.manifest["statistics"]["outlier_limit"]
        return limit


@dataclass(frozen=True)
class EvalSetting:
    """Where evals run and what they read.

    data_folder: holds a folder for each local data set, by name. data_hash: of the local data sets.
    cache: for what the language model gives, shared by the panel; None: SAEBench asks the model for each SAE anew.
    memory_bytes: for what is too large for the cache.
    heldout: what ``dataset: heldout`` stands for; None where there is none.
    weights: in place of those that the model's name stands for; None: those.
    prepend_bos: whether texts begin with a BOS; None leaves it to the model's tokenizer, where that is as harvested.
    """

    model_name: str
    dtype: str
    device: str
    data_folder: Path
    data_hash: str
    artifacts: Path
    cache: TensorCache | None = None
    memory_bytes: int = 2 << 30
    heldout: Heldout | None = None
    weights: OwnWeights | None = None
    prepend_bos: bool | None = None

    @property
    def model(self) -> JsonValue:
        """The model in keys: its name, and whatever makes what it gives another's."""
        given: dict[str, JsonValue] = {}
        if self.weights is not None:
            given["weights"] = self.weights.content
        if self.prepend_bos is not None:
            given["prepend_bos"] = self.prepend_bos
        return {"name": self.model_name, **given} if given else self.model_name

    def data(self, name: str) -> str:
        """The true name of the data set that an eval's ``dataset`` names."""
        return self.heldout.name if name == HELDOUT_DATA and self.heldout is not None else name

    @cached_property
    def between_calls(self) -> dict[str, object]:
        """What an eval keeps from one panel to the next, such as a model that took long to load."""
        return {}


@dataclass(frozen=True)
class EvalResults:
    """What one eval gave for the panel.

    Attributes:
        eval: its name. data: the data's true name, with the judge where one judges.
        n: what a score is averaged over; by panelist where that differs.
        files: panelist -> result file. metrics: panelist -> metric -> value (None: not finite).
        seed: that the eval drew with; None if it draws nothing.
    """

    eval: str
    data: str
    n: int | dict[str, int]
    files: dict[str, Path]
    metrics: dict[str, dict[str, float | None]]
    seed: int | None = None

    def averaged_over(self, panelist: str) -> int:
        """What the panelist's scores are averaged over."""
        return self.n[panelist] if isinstance(self.n, dict) else self.n


@dataclass(frozen=True)
class Work:
    """What an eval has to do, counted, once for a panel and for each of its dictionaries.

    A plan multiplies it by the rates that it measures, and adds loading the model.

    read: tokens that the model reads up to the hook. rest: tokens that go on from there; there and back counts thrice.
    predicted: tokens whose next one's distribution is computed. coded: activations that a dictionary codes. passes:
    over the dense code of an activation, and of how many. images: of another source, which the run's vision model reads
    and keeps; a dictionary does with their tokens what it does with held-out ones, beside these.
    held: predictions whose distribution stays in memory, up to what the config gives.
    kept, cached: activations of the model that stay on disk, and in the cache of a size that the config gives.
    other_s: seconds of what is none of these, such as probes: as the demo took them on one core, in proportion.
    """

    read: float = 0
    rest: float = 0
    predicted: float = 0
    held: float = 0
    kept: float = 0
    cached: float = 0
    other_s: float = 0
    images: int = 0
    read_each: float = 0
    rest_each: float = 0
    predicted_each: float = 0
    coded_each: float = 0
    passes_each: float = 0
    other_each_s: float = 0


class Eval(Strict, ABC):
    """One eval: what a YAML says of it, and all that is done with that.

    Class attributes:
        name: its key in a config's ``evaluation``, and in tables.
        on_by_default: whether it runs where a config does not mention it.
        columns: of the headline table.
        cost: what it takes, in a phrase.
        demo_seconds: about what it takes in the demo, on one core: of several at a time, the longest begin.
        ours: it writes results of our own, not SAEBench's.
        at_once: it is cheap, and runs on each dictionary as soon as that is there.
        one_process: its dictionaries are for one process: it compares them, keeps files that two would write, or has a
            rate to keep to.
        loads_own_model: in another form than TransformerLens'; two at a time would take twice the memory.
        reads: what it takes from a run beside dictionaries: activations alone, or the text or images that they are of.
        of_layers: it can be had of a model of which only the residual stream between its layers is known.
        needs_labels: it needs the images' classes.
        hooks: names of the hooks that it can be had at, as a pattern.
        reads_signs: it reads the sign of a code: a signed code is scored by its positive part only.
        items_are: what its scores are means over, in the plural; "" for what does not say.
        own_items: each dictionary has items of its own, such as its latents: they do not pair.
        published: settings, by their names here, that its published scores were made with; None: none are published.
        redefined: metric -> what happened to it between the version of SAEBench that published and today's.
    """

    name: ClassVar[str]
    on_by_default: ClassVar[bool] = False
    columns: ClassVar[tuple[Column, ...]] = ()
    cost: ClassVar[str]
    demo_seconds: ClassVar[float] = 30
    ours: ClassVar[bool] = False
    at_once: ClassVar[bool] = False
    one_process: ClassVar[bool] = False
    loads_own_model: ClassVar[bool] = False
    reads: ClassVar[Reads] = "text"
    of_layers: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    hooks: ClassVar[str] = ".*"
    reads_signs: ClassVar[bool] = False
    items_are: ClassVar[str] = ""
    own_items: ClassVar[bool] = False
    published: ClassVar[Mapping[str, JsonValue] | None] = None
    redefined: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def can_be_had_at(cls, hook: str) -> bool:
        return re.fullmatch(cls.hooks, hook) is not None

    @abstractmethod
    def run(self, panel: list[Panelist], setting: EvalSetting, output: Path) -> EvalResults:
        """Score the panel; what has a result is not scored again.

        Args: output: folder that holds a folder of results for each eval.
        Raises: EvaluationError naming every panelist without a result, and why; finished results stay.
        """

    def work(self, heldout_tokens: int, trainings: int) -> Work | None:
        """What it has to do; None where nobody has counted.

        Args: heldout_tokens: that the run harvests. trainings: of each dictionary.
        """
        return None

    def is_scored(self, content: str, output: Path, heldout: Heldout | None) -> bool:
        """Whether a dictionary has a result of these settings; data and versions are looked at when it runs.

        Args: content: hash of what the dictionary is. output: as for ``run``. heldout: None before the harvest.
        """
        for path in (output / self.name).rglob(f"*-{content}_*.json"):
            followed = json.loads(path.read_text()).get("follows_from", {}).get("config", {})
            settings = self.model_dump(mode="json")
            if followed and all(settings.get(name) == value for name, value in followed.items()):
                return True
        return False

    def source_hash(self) -> str | None:
        """Of what it reads beside the run's own data, where that lies on this machine; None: nothing does.

        Raises: EvaluationError if it is not there; before anything is harvested.
        """
        return None

    def write_data(self, folder: Path) -> None:
        """Write the data sets of ours that it reads, each into a folder of its name."""

    @classmethod
    def items(cls, result: Mapping[str, Any]) -> Iterator[Item]:
        """What the headline scores of a result file are means of; none where it does not say."""
        yield from ()

    def notes(self) -> list[str]:
        """What a reader must know to read its scores right."""
        return []

    def as_published(self) -> dict[str, JsonValue]:
        """Its settings by the names that ``published`` has them under."""
        settings: dict[str, JsonValue] = self.model_dump(mode="json")
        return settings

    @property
    def own_seed(self) -> int | None:
        """What it draws with; None if it draws nothing."""
        return None

    def with_seed(self, seed: int) -> Self:
        """The same, drawing with another seed; itself if it draws nothing."""
        return self


@dataclass(frozen=True)
class Measured:
    """One panelist's result. scores: metric -> value. n: what they are averaged over. more: worth keeping beside."""

    scores: Mapping[str, float]
    n: int
    more: Mapping[str, JsonValue] = field(default_factory=dict)


class MeasuredHere(Eval):
    """An eval of our own on held-out activations or documents: a file of results for each panelist.

    Class attribute: counts: what ``Measured.n`` is called in a result.
    """

    ours: ClassVar[bool] = True
    counts: ClassVar[str] = "n_tokens"

    @abstractmethod
    def measure(self, panelist: Panelist, setting: EvalSetting, heldout: Heldout) -> Measured:
        """A panelist's result."""

    def follows_from(self, heldout: Heldout) -> dict[str, JsonValue]:
        """What a result follows from, beside the dictionary."""
        return {"config": self.model_dump(mode="json"), "harvest": heldout.harvest_hash}

    def is_scored(self, content: str, output: Path, heldout: Heldout | None) -> bool:
        if heldout is None:
            return False
        return any((output / self.name).glob(f"*-{content_hash(self._key(content, heldout))}.json"))

    def _key(self, content: str, heldout: Heldout) -> dict[str, JsonValue]:
        return {"eval": self.name, "dictionary": content, **self.follows_from(heldout)}

    def run(self, panel: list[Panelist], setting: EvalSetting, output: Path) -> EvalResults:
        heldout = setting.heldout
        if heldout is None:
            raise EvaluationError(f"{self.name}: no held-out activations", cure="run `ksvd-sae harvest` first")
        files, metrics, n = {}, {}, {}
        failures: list[EvaluationError] = []
        for panelist in panel:
            key = content_hash(self._key(panelist.content, heldout))
            path = output / self.name / f"{panelist.name}-{key}.json"
            if not path.exists() and not copy_of_other_name(path):
                logger.info("%s of %s", self.name, panelist.name)
                try:
                    measured = self.measure(panelist, setting, heldout)
                except EvaluationError as error:
                    failures.append(error)
                    continue
                scores = {name: value if math.isfinite(value) else None for name, value in measured.scores.items()}
                write_json(path, {"scores": scores, self.counts: measured.n, **measured.more})
            result = json.loads(path.read_text())
            files[panelist.name], metrics[panelist.name] = path, result["scores"]
            n[panelist.name] = result[self.counts]
        if len(failures) == 1:
            raise failures[0]
        if failures:
            raise EvaluationError(
                f"{self.name}: no score for {len(failures)} dictionaries; those of the others are kept",
                cause="\n".join(str(failure) for failure in failures),
                cure="mend what they say and run again",
            )
        return EvalResults(self.name, heldout.name, n, files, metrics, self.own_seed)


class SeededEval(Eval):
    """An eval that draws."""

    seed: int = 42

    @property
    def own_seed(self) -> int | None:
        return self.seed

    def with_seed(self, seed: int) -> Self:
        return self.model_copy(update={"seed": seed})
