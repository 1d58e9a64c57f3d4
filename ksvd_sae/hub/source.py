"""What is published: the dictionaries of a finished run with their scores, or one dictionary alone."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from sae_lens.saes.sae import SAE, SAEMetadata

from ksvd_sae import __version__
from ksvd_sae.activations.text_datasets import FORMATS
from ksvd_sae.activations.vision.model import place_of, shown_name
from ksvd_sae.dictionary import CONFIG_FILE, Dictionary
from ksvd_sae.errors import ConfigError, DictionaryError, ManifestError
from ksvd_sae.hub.stock import Stock, by_matching_pursuit
from ksvd_sae.methods.base import KeptAsDictionary, KeptAsSAE, Method
from ksvd_sae.report.scores import read_csv
from ksvd_sae.report.tables import cells, intervals, summary
from ksvd_sae.run.config import ImageRunConfig, RunConfig, TextRunConfig, load_config, view_name
from ksvd_sae.run.pipeline import EVALUATE_STAGE, TRAIN_STAGE, Run
from ksvd_sae.run.trained import TrainedDictionary
from ksvd_sae.sae import sae_from_dictionary
from ksvd_sae.store import MANIFEST, read_manifest

Views = Literal["split", "signed", "both"]
_DATASET = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# What codes without signs are called where a view is named.
NONNEGATIVE = "nonnegative"
# What SAELens knows of text that nothing else has.
_OF_CONTEXTS = frozenset(("context_size", "prepend_bos"))
NEEDS = f"the package ksvd-sae {__version__}: `import ksvd_sae` before loading makes SAELens know this architecture"


@dataclass(frozen=True)
class Entry:
    """An SAE to publish.

    name: in its run. hook: of the model. view: 'split', 'signed', 'nonnegative', or what codes in its stead.
    sae: as SAELens has it. dictionary: that it was made from; None for an SAE for SAELens alone.
    training: the manifest of its training; None where there is none. method: its options in a run.
    stock: for SAELens alone: what it is beside the dictionary.
    """

    name: str
    hook: str
    view: str
    sae: SAE[Any]
    dictionary: Dictionary | None = None
    training: Mapping[str, Any] | None = None
    method: Method | None = None
    stock: Stock | None = None

    @property
    def sae_id(self) -> str:
        return f"{self.hook}/{self.name}/{self.view}"


@dataclass(frozen=True)
class FinishedRun:
    """A run whose comparison is written. folder: under results/."""

    run: Run
    folder: Path

    @classmethod
    def open(cls, folder: Path) -> "FinishedRun":
        """Raises: ConfigError, ManifestError: trainings that are not there, or not those that were scored."""
        finished = cls(Run(load_config(folder / "config.yaml"), folder.parent), folder)
        scored = {label: known[0] for label, known in finished.manifest["key"]["dictionaries"].items()}
        stale = [t.label for t in finished.trained if t.manifest["hash"] != scored.get(t.label)]
        if stale:
            raise ManifestError(
                f"publishing {folder}: its scores are not of the dictionaries that are there",
                got=", ".join(stale),
                cause="they were trained again, with another config or version, after the comparison was written",
                cure=f"`ksvd-sae run {folder / 'config.yaml'}` scores what is there",
            )
        return finished

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Of the evaluation."""
        return read_manifest(self.folder, EVALUATE_STAGE)

    @property
    def config(self) -> RunConfig:
        return self.run.config

    @property
    def dataset(self) -> str | None:
        """The data's name on the Hub; None where it is not from there: nobody else has the path of a local one."""
        data = self.config.images if isinstance(self.config, ImageRunConfig) else self._on_text.text
        named = data.source == "hub" and data.dataset not in FORMATS and _DATASET.fullmatch(str(data.dataset))
        return data.dataset if named and not Path(str(data.dataset)).exists() else None

    @property
    def _on_text(self) -> TextRunConfig:
        assert isinstance(self.config, TextRunConfig)
        return self.config

    @cached_property
    def scores(self) -> pd.DataFrame:
        return read_csv(self.folder / "comparison.csv")

    @cached_property
    def headline(self) -> tuple[pd.DataFrame, list[list[str]]]:
        """The headline table, and its cells as shown, with their intervals."""
        table = summary(self.scores)
        return table, [[cell.text for cell in row] for row in cells(table, widths=intervals(self.scores))]

    @cached_property
    def trained(self) -> list[TrainedDictionary]:
        return self.run.trained()

    @cached_property
    def first(self) -> dict[str, TrainedDictionary]:
        """The first training of each dictionary, by name."""
        return {trained.name: trained for trained in reversed(self.trained)}

    def examples(self, name: str) -> str | None:
        """The file of atoms in context of the first training of a dictionary; None where the run shows none."""
        file = self.manifest["examples"].get(name)
        return None if file is None else str(file)

    def result_files(self, name: str) -> Iterator[tuple[str, str, str, str]]:
        """(eval, its seed or '', view, file) of every result that the first training of a dictionary has."""
        trained = self.first[name]
        for view in trained.method.views:
            panelist = view_name(trained.label, view)
            for eval_name, files in self.manifest["files"].items():
                for scored, file in files.items():
                    who, _, seed = scored.partition(", seed ")
                    if who == panelist:
                        yield eval_name, seed, view_folder(view, trained.manifest["signed"]), file


@dataclass(frozen=True)
class Source:
    """All that goes into a published folder. run: None for a dictionary alone."""

    entries: list[Entry]
    run: FinishedRun | None = None

    @property
    def model_name(self) -> str:
        return str(self.entries[0].sae.cfg.metadata.model_name)

    @property
    def weights(self) -> Mapping[str, str] | None:
        """Of the model, where they are not those that its name stands for: name, content, revision if on the Hub."""
        weights: Mapping[str, str] | None = self.entries[0].sae.cfg.metadata.model_weights
        return weights

    @property
    def base_model(self) -> str | None:
        """The model's name on the Hub; None for a vision model of a folder."""
        if place_of(self.hook) is not None and "/" not in self.model_name:
            return None
        return self.weights["name"] if self.weights is not None and "revision" in self.weights else self.model_name

    @property
    def hook(self) -> str:
        return self.entries[0].hook


def view_folder(view: str, signed: bool) -> str:
    return view if signed else NONNEGATIVE


def open_source(folder: Path, names: list[str], views: Views) -> Source:
    """What lies in a run's folder under results/, or in a dictionary's.

    Args:
        names: of a run's dictionaries; empty: all of its own, controls left out.
        views: of codes with signs.
    Raises: ConfigError (neither; no such name), ManifestError, DictionaryError.
    """
    if (folder / "config.yaml").is_file():
        return _of_run(FinishedRun.open(folder), names, views)
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(
            f"publishing {folder}: neither a run nor a dictionary",
            limit=f"a run's folder under results/ (config.yaml, comparison.csv), or one with {CONFIG_FILE}",
            cure="`ksvd-sae run CONFIG` writes the one, `ksvd-sae train CONFIG` and Dictionary.save the other",
        )
    if names:
        raise ConfigError(f"publishing {folder}: it holds one dictionary", cure="leave --dictionary out")
    return Source(_of_dictionary(folder, views))


def _of_run(finished: FinishedRun, names: list[str], views: Views) -> Source:
    methods, controls = finished.run.config.dictionaries, finished.run.config.controls
    own = [n for n, m in methods.items() if isinstance(m, KeptAsDictionary) and n not in controls]
    if unknown := [name for name in names if name not in own]:
        raise ConfigError(
            f"publishing {finished.folder}: no dictionary {', '.join(map(repr, unknown))} to publish",
            limit=", ".join(own) or "none: the run has SAEs and controls alone",
        )
    if not own:
        raise ConfigError(f"publishing {finished.folder}: the run has SAEs and controls, and no dictionary of its own")
    entries: list[Entry] = []
    for name in names or own:
        entries += _entries(finished, finished.first[name], views)
    return Source(entries, finished)


def _entries(finished: FinishedRun, trained: TrainedDictionary, views: Views) -> list[Entry]:
    """The dictionary in its views, and what SAELens loads alone."""
    run, method = finished.run, trained.method
    dictionary = _for_others(method.dictionary(run.setting(method), trained.folder))
    common = metadata_of_run(finished, trained)
    entries = [
        Entry(
            trained.name,
            run.config.model.hook,
            view,
            _wrapped(dictionary, view, common),
            dictionary,
            trained.manifest,
            method,
        )
        for view in _views(dictionary, views)
    ]
    first = entries[0]
    stock = by_matching_pursuit(dictionary, run.shards("heldout"))
    if stock is not None:
        entries.append(_for_saelens_alone(first, trained, "matching_pursuit", stock))
    for other in finished.first.values():
        if other.method.source == trained.name and isinstance(other.method, KeptAsSAE):
            sae = other.method.load(run.setting(other.method), other.folder)
            # A class of ours needs this package as much as the dictionary does.
            if type(sae).__module__.startswith("sae_lens."):
                entries.append(_for_saelens_alone(first, other, NONNEGATIVE, Stock(sae, same=False)))
    return entries


def _for_saelens_alone(first: Entry, trained: TrainedDictionary, view: str, stock: Stock) -> Entry:
    sae = stock.sae
    known = {key: value for key, value in first.sae.cfg.metadata.items() if key != "needs"}
    known |= {"training_tokens": trained.manifest["samples_seen"], "stands_beside": first.sae_id}
    own = {key: value for key, value in sae.cfg.metadata.items() if key not in _OF_CONTEXTS}
    sae.cfg.metadata = SAEMetadata(**{**own, **known})
    sae.cfg.reshape_activations = first.sae.cfg.reshape_activations
    return Entry(trained.name, first.hook, view, sae, None, trained.manifest, trained.method, stock)


def metadata_of_run(finished: FinishedRun, trained: TrainedDictionary) -> dict[str, Any]:
    """What ``cfg.metadata`` says of a run's dictionary, by SAELens' names where it has some."""
    config, setting = finished.config, finished.run.setting(trained.method)
    common = {
        "dataset_path": finished.dataset or config.data_name,
        "outlier_factor": config.harvest.outlier_factor,
        "tokens_harvested": setting.shards.n_samples,
        # By this name SAEBench's plots find it.
        "training_tokens": trained.manifest["samples_seen"],
    }
    if isinstance(config, ImageRunConfig):
        return {**_of_model(config.model.name, config.model.hook), "tokens": ["patches", *config.model.also], **common}
    assert isinstance(config, TextRunConfig)
    return {
        "model_name": config.model.name,
        **setting.of_weights,
        "hook_name": config.model.hook,
        "context_size": config.harvest.context_tokens,
        "prepend_bos": setting.shards.prepend_bos,
        "exclude_special_tokens": True,
        **common,
    }


def _of_model(name: str, hook: str) -> dict[str, Any]:
    """What metadata say of the model; of a vision model no context and no BOS."""
    if place_of(hook) is None:
        return {"model_name": name, "hook_name": hook}
    return {"model_name": shown_name(name), "hook_name": hook, **dict.fromkeys(_OF_CONTEXTS)}


def _for_others(dictionary: Dictionary) -> Dictionary:
    """Without the path of a vision model's folder."""
    known = dictionary.provenance
    if place_of(known["hook"]) is None:
        return dictionary
    return replace(dictionary, provenance={**known, "model": shown_name(known["model"])})


def _of_dictionary(folder: Path, views: Views) -> list[Entry]:
    dictionary = Dictionary.load(folder)
    known = dictionary.provenance
    if not all(isinstance(known.get(key), str) for key in ("model", "hook")):
        raise DictionaryError(
            f"publishing {folder}: the dictionary does not say which model and hook it is of",
            got=f"provenance {known}",
            cure="dataclasses.replace(dictionary, provenance={'model': ..., 'hook': ...}).save(folder)",
        )
    training = read_manifest(folder, TRAIN_STAGE) if (folder / MANIFEST).is_file() else None
    dictionary, common = _for_others(dictionary), _of_model(known["model"], known["hook"])
    common |= {"model_weights": known["model_weights"]} if "model_weights" in known else {}
    if training is not None:
        # Trainings did not always say of how many tokens, and not all are of a harvest.
        of = {"tokens_harvested": training["tokens_harvested"]} if "tokens_harvested" in training else {}
        common |= {**of, "training_tokens": training["samples_seen"]}
    name = re.sub(r"[^A-Za-z0-9._-]+|^\W+", "-", folder.resolve().name if training is None else training["name"])
    return [
        Entry(name, known["hook"], view, _wrapped(dictionary, view, common), dictionary, training)
        for view in _views(dictionary, views)
    ]


def _views(dictionary: Dictionary, views: Views) -> list[str]:
    if dictionary.coding.nonnegative:
        return [NONNEGATIVE]
    return ["split", "signed"] if views == "both" else [views]


def _wrapped(dictionary: Dictionary, view: str, metadata: Mapping[str, Any]) -> SAE[Any]:
    return sae_from_dictionary(
        dictionary,
        view="split" if view == "split" else "signed",
        **{
            **metadata,
            "model_from_pretrained_kwargs": {},
            # SAELens' default is its own version, as if it had trained this.
            "sae_lens_training_version": None,
            "trained_by": f"ksvd-sae {__version__}",
            "needs": NEEDS,
        },
    )
