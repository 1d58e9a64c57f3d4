"""What of a run depends on what its model reads: text or images."""

import hashlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksvd_sae.activations.gradients import GradientMoments, gradients_key
from ksvd_sae.activations.harvest import HELDOUT_DOCUMENTS, run_harvest, training_contexts
from ksvd_sae.activations.language import ActivationReader, check_contexts, layers_alone, load_model
from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.activations.vision.harvest import run_image_harvest
from ksvd_sae.activations.vision.model import ImageReader
from ksvd_sae.errors import ConfigError, ManifestError
from ksvd_sae.evals import EVALS
from ksvd_sae.evals.base import EvalSetting, Heldout, Panelist
from ksvd_sae.evals.llm_cache import TensorCache
from ksvd_sae.run.config import ImageRunConfig, RunConfig, TextRunConfig
from ksvd_sae.store import atomic_path, content_hash
from ksvd_sae.together import ALONE, Together


@dataclass(frozen=True)
class RunData(ABC):
    """The activations of a run's model, and what evals and the report take of what the model read.

    cache: the run's, where the harvest has a folder.
    """

    config: RunConfig
    cache: Path

    @cached_property
    def key(self) -> dict[str, Any]:
        return self.config.harvested.key

    @cached_property
    def folder(self) -> Path:
        return self.config.harvested.folder(self.cache)

    def shards(self, part: str) -> ActivationShards:
        """Of the finished harvest; ManifestError if there is none."""
        return ActivationShards.open(self.folder, part, self.key)

    @property
    def heldout_name(self) -> str:
        """True name of the held-out part as a data set."""
        return f"{self.config.data_name}-heldout"

    @abstractmethod
    def harvest(self, device: torch.device, together: Together = ALONE) -> ActivationShards:
        """Activations, collected or reused."""

    @abstractmethod
    def context_tokens(self) -> int:
        """Tokens that the model reads at once."""

    @abstractmethod
    def gradients_key(self) -> dict[str, Any]:
        """See ``gradients_key``. Of a run that harvests them."""

    @abstractmethod
    def eval_setting(self, device: torch.device, gradient_moments: Callable[[], GradientMoments]) -> EvalSetting:
        """What evals read and where they keep what can be used again."""

    @abstractmethod
    def reader(self, device: torch.device) -> ActivationReader:
        """The language model, loaded. Of a run on text."""

    @abstractmethod
    def training_text(self, device: torch.device) -> tuple[ActivationReader, Iterator[Tensor]]:
        """The language model, loaded, and the contexts of the training part. Of a run on text."""

    @abstractmethod
    def heldout(self, device: torch.device, gradient_moments: Callable[[], GradientMoments]) -> Heldout:
        """What no dictionary learns from; ManifestError before it is harvested."""

    @abstractmethod
    def read_as(self) -> dict[str, Any]:
        """What of the data is not as usual, for manifests."""

    @abstractmethod
    def atoms_shown(self, panel: list[Panelist], heldout: Heldout, output: Path) -> dict[str, Path]:
        """What the report shows of each panelist's atoms, a file each."""


def run_data(config: RunConfig, cache: Path) -> RunData:
    if isinstance(config, ImageRunConfig):
        return ImageData(config, cache)
    assert isinstance(config, TextRunConfig)
    return TextData(config, cache)


@dataclass(frozen=True)
class TextData(RunData):
    """A language model and a text."""

    config: TextRunConfig

    def harvest(self, device: torch.device, together: Together = ALONE) -> ActivationShards:
        return run_harvest(self.config.harvested, self.folder, partial(self.reader, device), together)

    def reader(self, device: torch.device) -> ActivationReader:
        self._check_layers()
        model = load_model(self.config.model, device)
        check_contexts(model, self._context_lengths())
        return ActivationReader(model, self.config.model.hook, self.config.harvest.keep_special_tokens)

    def training_text(self, device: torch.device) -> tuple[ActivationReader, Iterator[Tensor]]:
        reader = self.reader(device)
        return reader, training_contexts(self.config.harvested, self.shards("train"), reader)

    def _check_layers(self) -> None:
        """Raise ConfigError for what needs more of the model than the residual stream between its layers."""
        asked = {f"evaluation.{one.name}": "null" for one in self.config.evaluation.evals() if not one.of_layers}
        asked |= {"harvest.gradient_tokens": "0"} if self.config.harvest.has_gradients else {}
        # The model's config may have to come from the Hub.
        if asked and layers_alone(self.config.model):
            able = ", ".join(kind.name for kind in EVALS if kind.of_layers)
            raise ConfigError(
                f"model {self.config.model.title!r}: {', '.join(asked)} cannot be had of it",
                limit=f"evals: {able}",
                cause="TransformerLens has neither a model of its own for it nor a bridge: only the residual stream "
                "between its layers is known",
                cure=", ".join(f"{key}: {value}" for key, value in asked.items()),
            )

    def _context_lengths(self) -> dict[str, int]:
        """Tokens of a context, by key: of the harvest, and of every eval that is to run."""
        lengths = {"harvest.context_tokens": self.config.harvest.context_tokens}
        for section in self.config.evaluation.evals():
            if isinstance(tokens := getattr(section, "context_tokens", None), int):
                lengths[f"evaluation.{section.name}.context_tokens"] = tokens
        return lengths

    def context_tokens(self) -> int:
        return self.config.harvest.context_tokens

    def gradients_key(self) -> dict[str, Any]:
        return gradients_key(content_hash(self.key), self.config.harvest)

    def eval_setting(self, device: torch.device, gradient_moments: Callable[[], GradientMoments]) -> EvalSetting:
        self._check_layers()
        evaluation = self.config.evaluation
        data_folder, data_hash = self._local_data()
        return EvalSetting(
            model_name=self.config.model.name,
            dtype=self.config.model.dtype,
            device=str(device),
            data_folder=data_folder,
            data_hash=data_hash,
            artifacts=self.cache / "artifacts",
            weights=self.config.model.own_weights(),
            prepend_bos=self._prepend_bos(),
            cache=TensorCache(self.cache / "llm", int(evaluation.llm_cache_gb * 1e9)),
            memory_bytes=int(evaluation.llm_memory_gb * 1e9),
            heldout=self.heldout(device, gradient_moments),
        )

    def heldout(self, device: torch.device, gradient_moments: Callable[[], GradientMoments]) -> Heldout:
        asked = self.config.harvest.has_gradients
        return Heldout(
            self.heldout_name,
            self.shards("heldout"),
            partial(self.reader, device),
            gradient_moments if asked else None,
            content_hash(self.gradients_key()) if asked else None,
        )

    def _prepend_bos(self) -> bool | None:
        """What evals are to be told of BOS: nothing where the model has one by itself, as the harvest found it."""
        harvested = self.shards("train").prepend_bos
        return None if harvested and self.config.harvest.prepend_bos == "auto" else harvested

    def _local_data(self) -> tuple[Path, str]:
        """Folder with the local data sets that evals read by name, and a hash of them."""
        folder = self.cache / "data" / content_hash(self.key)
        heldout = self.folder / HELDOUT_DOCUMENTS
        if not heldout.exists():
            raise ManifestError(f"evaluate: {heldout} is missing", cure="run `ksvd-sae harvest` first")
        target = folder / self.heldout_name / "train.jsonl"
        with atomic_path(target) as temporary:
            shutil.copyfile(heldout, temporary)
        for section in self.config.evaluation.evals():
            section.write_data(folder)
        digest = hashlib.sha256()
        for path in sorted(folder.rglob("*.jsonl")):
            digest.update(path.read_bytes())
        return folder, digest.hexdigest()[:12]

    def read_as(self) -> dict[str, Any]:
        """A split inside documents (see ``Split``), contexts without a BOS."""
        shards = self.shards("heldout")
        split = shards.manifest["parts"]["heldout"].get("split")
        bos = {} if shards.prepend_bos else {"prepend_bos": False}
        return bos if split is None else {"split": split, **bos}

    def atoms_shown(self, panel: list[Panelist], heldout: Heldout, output: Path) -> dict[str, Path]:
        from ksvd_sae.evals.atoms.examples import run_examples

        config = self.config
        return run_examples(panel, config.report, config.harvest, config.seed, heldout, output)


@dataclass(frozen=True)
class ImageData(RunData):
    """A vision model and images."""

    config: ImageRunConfig

    def harvest(self, device: torch.device, together: Together = ALONE) -> ActivationShards:
        for section in self.config.evaluation.evals():
            section.source_hash()
        needs_labels = any(section.needs_labels for section in self.config.evaluation.evals())
        reader = partial(ImageReader, self.config.model, device)
        return run_image_harvest(
            self.config.harvested, self.folder, reader, needs_labels=needs_labels, together=together
        )

    def context_tokens(self) -> int:
        grid: dict[str, int] = self.shards("train").manifest["grid"]
        return grid["others"] + grid["rows"] * grid["columns"]

    def gradients_key(self) -> dict[str, Any]:
        raise ManifestError("gradients: a run on images has none")

    def eval_setting(self, device: torch.device, gradient_moments: Callable[[], GradientMoments]) -> EvalSetting:
        return EvalSetting(
            model_name=self.config.model.name,
            dtype=self.config.model.dtype,
            device=str(device),
            data_folder=self.folder,
            data_hash=content_hash(self.key),
            artifacts=self.cache / "artifacts",
            heldout=self.heldout(device, gradient_moments),
        )

    def reader(self, device: torch.device) -> ActivationReader:
        raise ConfigError("a run on images has no language model", cure="take a config with `text`")

    def training_text(self, device: torch.device) -> tuple[ActivationReader, Iterator[Tensor]]:
        raise ConfigError("a run on images has no text", cure="take a config with `text`")

    def heldout(self, device: torch.device, gradient_moments: Callable[[], GradientMoments]) -> Heldout:
        return Heldout(self.heldout_name, self.shards("heldout"), None)

    def read_as(self) -> dict[str, Any]:
        return {}

    def atoms_shown(self, panel: list[Panelist], heldout: Heldout, output: Path) -> dict[str, Path]:
        from ksvd_sae.evals.atoms.on_images import run_image_examples

        return run_image_examples(panel, self.config.report, self.config.seed, heldout, output)
