"""The stages in order, from one config: harvest, train, evaluate, compare.

Each stage finds its input by content hash and reuses its own finished output, so running a config again does only
what is missing. Activations and dictionaries lie in the cache (``provenance.cache_dir``), results under results/.
"""

import hashlib
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ksvd_sae.activations.gradients import GradientMoments, gradients_key, open_gradients
from ksvd_sae.activations.harvest import HELDOUT_DOCUMENTS, harvest_folder, harvest_key, run_harvest
from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.device import resolve_device
from ksvd_sae.dictionary import Dictionary
from ksvd_sae.errors import ConfigError, ManifestError
from ksvd_sae.methods.derived_config import DerivedConfig, LinearTopKConfig, metric
from ksvd_sae.methods.options import View
from ksvd_sae.methods.published.config import PublishedSAEConfig
from ksvd_sae.methods.recoding import Source, derive_dictionary
from ksvd_sae.methods.trainers import (
    ALGORITHM,
    TRAIN_LOG,
    TrainingSetting,
    clear_unfinished,
    train_dictionary,
    training_fields,
)
from ksvd_sae.offline import bbc_news
from ksvd_sae.offline.eval_data import write_eval_data
from ksvd_sae.offline.gemma import GGUF_SHA256, MODEL_NAME, prepare_gemma
from ksvd_sae.run.config import DictionaryConfig, RunConfig, SAEConfig, views
from ksvd_sae.run.replicas import Replica, other_training, replicas
from ksvd_sae.run.trained import TrainedDictionary
from ksvd_sae.store import cache_dir, content_hash, is_finished, read_manifest, write_manifest

if TYPE_CHECKING:
    from ksvd_sae.evals.saebench.runner import EvalSetting, Panelist

logger = logging.getLogger(__name__)
TRAIN_STAGE = "train"
EVALUATE_STAGE = "evaluate"


class Run:
    """One config and where its stages read and write.

    Args:
        config: the run.
        results: folder that holds results/<name>.
        cache: where activations and dictionaries go; default ``cache_dir()``.
    """

    def __init__(self, config: RunConfig, results: Path = Path("results"), cache: Path | None = None):
        self.config = config
        self.cache = (cache or cache_dir()).resolve()
        self.results = (results / config.name).resolve()

    @cached_property
    def device(self) -> torch.device:
        return resolve_device(self.config.device)

    def prepare(self) -> None:
        """Make the model findable. Comes before anything that imports the Hub libraries."""
        model = self.config.model
        if model.source == "offline":
            if model.name != MODEL_NAME:
                raise ConfigError(
                    f"model.source offline has no model {model.name!r}",
                    limit=MODEL_NAME,
                    cure=f"set model.name to {MODEL_NAME} or model.source to hub",
                )
            prepare_gemma()

    # ------------------------------------------------------------ harvest

    @cached_property
    def _harvest_key(self) -> dict[str, Any]:
        sources = {}
        if self.config.model.source == "offline":
            sources["model"] = GGUF_SHA256
        if self.config.text.source == "bbc-news":
            sources["text"] = bbc_news.corpus_hash()
        if self.config.text.source == "folder":
            from ksvd_sae.activations.text import text_folder_hash

            sources["text"] = text_folder_hash(Path(str(self.config.text.dataset)).expanduser())
        return harvest_key(self.config, sources)

    @property
    def harvest_folder(self) -> Path:
        return harvest_folder(self.cache, self._harvest_key)

    def harvest(self) -> ActivationShards:
        """Activations of the run, and gradient moments if asked for, collected or reused."""
        from ksvd_sae.activations.text import documents

        self.fetch_published()

        def texts() -> Iterator[str]:
            return documents(self.config.text, self.config.seed)

        return run_harvest(self.config, self.harvest_folder, self._harvest_key, self._reader, texts)

    def _reader(self) -> Any:
        from ksvd_sae.activations.language import ActivationReader, load_model

        return ActivationReader(load_model(self.config.model, self.device), self.config.model.hook)

    def fetch_published(self) -> None:
        """Download the published SAEs that are not here yet, and check their model and hook.

        Raises: HubError, ConfigError, DictionaryError: before the model is loaded.
        """
        for config in self.config.dictionaries.values():
            if isinstance(config, PublishedSAEConfig) and not self._is_trained(config):
                from ksvd_sae.methods.published.saes import check_fetched

                check_fetched(config, model_name=self.config.model.name, hook_name=self.config.model.hook)

    def shards(self, part: str = "train") -> ActivationShards:
        """The finished harvest; ManifestError if there is none."""
        return ActivationShards.open(self.harvest_folder, part, self._harvest_key)

    def gradient_moments(self) -> GradientMoments:
        """The finished moments of the loss's gradient; ManifestError if none were collected."""
        return open_gradients(self.harvest_folder, self._gradients_key)

    @property
    def _gradients_key(self) -> dict[str, Any]:
        return gradients_key(content_hash(self._harvest_key), self.config.harvest)

    # ------------------------------------------------------------ train

    def train(self) -> list[TrainedDictionary]:
        """Every training of the config, done or reused, in the config's order."""
        shards = self.shards()
        return [self._train(replica, shards) for replica in replicas(self.config)]

    def trained(self) -> list[TrainedDictionary]:
        """Every training of the config; ManifestError if one has not been done."""
        return [
            TrainedDictionary(r.name, r.config, folder, read_manifest(folder, TRAIN_STAGE, key), r.seed, r.label)
            for r in replicas(self.config)
            for folder, key in [self._training(r.config)]
        ]

    def _training(self, config: DictionaryConfig, of: DictionaryConfig | None = None) -> tuple[Path, dict[str, Any]]:
        key: dict[str, Any] = {
            "harvest": content_hash(self._harvest_key),
            "dictionary": training_fields(config),
            "seed": self._seed(config),
        }
        if config.kind in ALGORITHM:
            key["algorithm"] = ALGORITHM[config.kind]
        if metric(config).kind.startswith("fisher"):
            key["gradients"] = content_hash(self._gradients_key)
        if isinstance(config, DerivedConfig):
            key["of"] = content_hash(self._training(of or other_training(self.config, config))[1])
        return self.cache / "dictionaries" / f"{config.kind}-{content_hash(key)}", key

    def _is_trained(self, config: DictionaryConfig) -> bool:
        folder, key = self._training(config)
        return is_finished(folder, TRAIN_STAGE, key)

    def training_key(self, config: DictionaryConfig) -> str:
        """Short name of what the dictionary follows from: config, activations, algorithm."""
        return self._training(config)[0].name

    def _seed(self, config: DictionaryConfig) -> int:
        own: int | None = getattr(config, "seed", None)
        return self.config.seed if own is None else own

    def train_one(
        self, name: str, config: DictionaryConfig, shards: ActivationShards, of: DictionaryConfig | None = None
    ) -> TrainedDictionary:
        """One dictionary, learned or reused; it need not be in the config.

        Args: of: what a derived one takes its atoms from, learned first; None: found in the config by its name.
        """
        return self._train(Replica(name, config, self._seed(config), name), shards, of)

    def _train(
        self, replica: Replica, shards: ActivationShards, of: DictionaryConfig | None = None
    ) -> TrainedDictionary:
        name, config = replica.label, replica.config
        folder, key = self._training(config, of)
        if is_finished(folder, TRAIN_STAGE, key):
            logger.info("train %s: reusing %s", name, folder)
        else:
            clear_unfinished(folder)
            started = time.perf_counter()
            if isinstance(config, DerivedConfig):
                other = self.train_one(config.of, of or other_training(self.config, config), shards)
                source = Source(other.config, other.folder, other.manifest["samples_seen"])
                # The time that the other took is its own.
                started = time.perf_counter()
                facts = derive_dictionary(config, source, shards, folder, self.setting(config))
            else:
                facts = train_dictionary(config, shards, folder, self.setting(config))
            facts.setdefault("seconds", round(time.perf_counter() - started, 1))
            write_manifest(folder, TRAIN_STAGE, key, name=name, device=str(self.device), **facts)
            logger.info("train %s: %.1f s, %s", name, facts["seconds"], folder)
        manifest = read_manifest(folder, TRAIN_STAGE, key)
        return TrainedDictionary(replica.name, config, folder, manifest, replica.seed, replica.label)

    def setting(self, config: DictionaryConfig | None = None) -> TrainingSetting:
        """What a training gets besides its config (None: one without a seed of its own) and the activations."""
        model = self.config.model
        return TrainingSetting(
            model_name=model.name,
            hook=model.hook,
            context_tokens=self.config.harvest.context_tokens,
            seed=self.config.seed if config is None else self._seed(config),
            device=self.device,
            harvest_hash=content_hash(self._harvest_key),
            gradient_moments=self.gradient_moments,
        )

    def wrap(self, dictionary: Dictionary, view: View = "signed") -> Any:
        """The dictionary as a SAELens SAE of this run's model and hook."""
        return self.setting().wrap(dictionary, view)

    def load_sae(self, trained: TrainedDictionary) -> Any:
        """The trained dictionary as a SAELens SAE in its view, with the coder that the config asks for."""
        if isinstance(trained.config, SAEConfig | LinearTopKConfig | PublishedSAEConfig):
            from ksvd_sae.methods.sae.training import load_sae

            return load_sae(trained.folder, self.device)
        dictionary = Dictionary.load(trained.folder)
        coder = getattr(trained.config, "coder", dictionary.coder)
        sae = self.wrap(replace(dictionary, coder=coder), trained.view)
        # Evals give activations with the heads flattened.
        sae.turn_off_forward_pass_hook_z_reshaping()
        return sae

    # ------------------------------------------------------------ evaluate

    def evaluate(self) -> dict[str, Any]:
        """Every eval of the config on every view of every dictionary, each result computed once.

        Returns: the stage's manifest.
        Raises: EvaluationError if a score is missing (finished ones are kept), ManifestError if a stage before is.
        """
        if is_finished(self._evaluation_folder, EVALUATE_STAGE, self._evaluation_key):
            logger.info("evaluate: reusing %s", self._evaluation_folder)
            return self.evaluated()
        from ksvd_sae.evals.panel import evaluate_heldout, evaluate_saebench, result_files, tidy_rows

        started, evaluation = time.perf_counter(), self.config.evaluation
        trained, panel, setting = self._viewed(), self.panel(), self.eval_setting()
        output = self.cache / "evaluations"
        heldout = evaluate_heldout(panel, self.shards("heldout"), content_hash(self._harvest_key), output / "heldout")
        results = [replace(heldout, data=self.heldout_name)]
        results += evaluate_saebench(panel, evaluation, setting, self.heldout_name, output)
        facts = {t.panelist: t.facts(heldout.metrics[t.panelist]["l0"]) for t in trained}
        trained_on = self.heldout_name.removesuffix("-heldout")
        rows = [row for result in results for row in tidy_rows(result, facts)]
        rows += [row for t in trained for row in t.training_rows(facts[t.panelist], trained_on)]
        return write_manifest(
            self._evaluation_folder,
            EVALUATE_STAGE,
            self._evaluation_key,
            rows=[{**row, "value": None if row["value"] != row["value"] else row["value"]} for row in rows],
            files=result_files(results),
            examples={name: path.name for name, path in self._examples(output / "examples").items()},
            config=self.config.model_dump(mode="json"),
            device=str(self.device),
            seconds=round(time.perf_counter() - started, 1),
        )

    def panel(self) -> "list[Panelist]":
        """Every view of every finished training, as evals take them; ManifestError if one has not been done."""
        from ksvd_sae.evals.saebench.runner import Panelist

        return [Panelist(t.panelist, t.content, partial(self.load_sae, t)) for t in self._viewed()]

    def _viewed(self) -> list[TrainedDictionary]:
        return [viewed for t in self.trained() for viewed in t.in_views()]

    def eval_setting(self) -> "EvalSetting":
        """What SAEBench's evals read and where they keep what can be used again."""
        from ksvd_sae.evals.llm_cache import TensorCache
        from ksvd_sae.evals.saebench.runner import EvalSetting

        evaluation = self.config.evaluation
        data_folder, data_hash = self.local_data()
        return EvalSetting(
            model_name=self.config.model.name,
            dtype=self.config.model.dtype,
            device=str(self.device),
            data_folder=data_folder,
            data_hash=data_hash,
            artifacts=self.cache / "artifacts",
            cache=TensorCache(self.cache / "llm", int(evaluation.llm_cache_gb * 1e9)),
            memory_bytes=int(evaluation.llm_memory_gb * 1e9),
        )

    def _examples(self, output: Path) -> dict[str, Path]:
        """Atoms in context of the first training of every dictionary, in the codes that it gives itself."""
        from ksvd_sae.evals.atoms.examples import run_examples
        from ksvd_sae.evals.saebench.runner import Panelist

        first = {t.name: t for t in reversed(self.trained())}
        chosen = [first[name] for name in self.config.dictionaries]
        panel = [Panelist(t.name, t.content, partial(self.load_sae, t)) for t in chosen]
        return run_examples(panel, self.config, self.shards("heldout"), self._reader, output)

    @property
    def _evaluation_key(self) -> dict[str, Any]:
        # Left out where there is none: evaluations from before there were views stay finished.
        other_views = {name: views(c) for name, c in self.config.dictionaries.items() if views(c) != ("signed",)}
        return {
            "harvest": content_hash(self._harvest_key),
            "evaluation": self.config.evaluation.model_dump(mode="json"),
            "dictionaries": {r.label: content_hash(self._training(r.config)[1]) for r in replicas(self.config)},
            "coders": {name: getattr(c, "coder", None) for name, c in self.config.dictionaries.items()},
            **({"views": {name: list(found) for name, found in other_views.items()}} if other_views else {}),
            **({"report": self.config.report.model_dump(mode="json")} if self.config.report.atoms else {}),
        }

    @property
    def _evaluation_folder(self) -> Path:
        return self.cache / "evaluations" / f"{self.config.name}-{content_hash(self._evaluation_key)}"

    def evaluated(self) -> dict[str, Any]:
        """Manifest of the finished evaluation; ManifestError if there is none."""
        return read_manifest(self._evaluation_folder, EVALUATE_STAGE, self._evaluation_key)

    # ------------------------------------------------------------ compare

    def compare(self) -> Path:
        """Tables, plots and report from a finished evaluation; returns the report's path."""
        from ksvd_sae.report.compare import write_comparison

        manifest = self.evaluated()
        logs = {t.label: t.folder / TRAIN_LOG for t in self.trained() if (t.folder / TRAIN_LOG).exists()}
        return write_comparison(self.results, self.config, manifest, self.cache / "evaluations", logs)

    # ------------------------------------------------------------ data for evals

    def local_data(self) -> tuple[Path, str]:
        """Folder with the local data sets that evals read by name, and a hash of them."""
        folder = self.cache / "data" / content_hash(self._harvest_key)
        heldout = self.harvest_folder / HELDOUT_DOCUMENTS
        if not heldout.exists():
            raise ManifestError(f"evaluate: {heldout} is missing", cure="run `ksvd-sae harvest` first")
        target = folder / self.heldout_name / "train.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(heldout, target)
        write_eval_data(folder, self.config.evaluation)
        digest = hashlib.sha256()
        for path in sorted(folder.rglob("*.jsonl")):
            digest.update(path.read_bytes())
        return folder, digest.hexdigest()[:12]

    @property
    def heldout_name(self) -> str:
        """True name of the held-out documents as a data set."""
        text = self.config.text
        source = text.source if text.source == "bbc-news" else Path(str(text.dataset)).name
        return f"{source}-heldout"
