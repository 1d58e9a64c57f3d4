"""The stages of a run in order, from one config: harvest, train, evaluate.

Each stage finds its input by content hash and reuses its own finished output, so running a config again does only
what is missing. Activations and dictionaries lie in the cache (``store.cache_dir``).

Of several processes (together.py) each calls the same stages. What they share out, they leave in the cache, where
rank 0 finds all of it as one process finds what it did before.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ksvd_sae.activations.collecting import SoFar
from ksvd_sae.activations.gradients import GradientMoments, open_gradients
from ksvd_sae.activations.language import ActivationReader
from ksvd_sae.activations.shards import STAGE as HARVEST_STAGE
from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.errors import ConfigError, EvaluationError, KsvdSaeError, ManifestError
from ksvd_sae.evals.base import EvalResults, EvalSetting, Heldout, Panelist, scoring_versions
from ksvd_sae.methods.base import Method, Source, TrainingSetting, View
from ksvd_sae.run.cells import chosen
from ksvd_sae.run.config import RunConfig, view_name
from ksvd_sae.run.data import RunData, run_data
from ksvd_sae.run.replicas import Replica, replicas, source_training
from ksvd_sae.run.trained import TrainedDictionary
from ksvd_sae.store import (
    MANIFEST,
    cache_dir,
    content_hash,
    is_finished,
    read_manifest,
    require_writable,
    write_manifest,
)
from ksvd_sae.together import ALONE, Task, Together

if TYPE_CHECKING:
    from sae_lens.saes.sae import SAE

logger = logging.getLogger(__name__)
TRAIN_STAGE = "train"
EVALUATE_STAGE = "evaluate"


@dataclass
class Scores:
    """What a run has scored so far.

    rows: of the comparison. results: of evals, as they came. news: what came last, its eval's name or a dictionary's.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    results: list[EvalResults] = field(default_factory=list)
    news: str = ""


class Run:
    """One config and where its stages read and write.

    Args:
        config: the run.
        results: folder that holds results/<name>.
        cache: where activations and dictionaries go; default ``cache_dir()``.
        together: the processes that run it; they see the same cache.
    """

    def __init__(
        self,
        config: RunConfig,
        results: Path = Path("results"),
        cache: Path | None = None,
        together: Together = ALONE,
    ):
        self.config, self.together = config, together
        self.cache = (cache or cache_dir()).resolve()
        self.results = (results / config.name).resolve()

    @cached_property
    def device(self) -> torch.device:
        return self.together.device(self.config.device)

    def prepare(self) -> None:
        """Make the cache, and the model findable. Comes before anything that imports the Hub libraries.

        Raises: ManifestError (no cache can be made), else as ``ModelConfig.prepare``.
        """
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ManifestError(
                f"the cache {self.cache} cannot be made: {error}",
                cause="a home folder that is not there or cannot be written",
                cure="set KSVD_SAE_CACHE to a folder of your own, and HF_HOME to one for what the Hub gives",
            ) from error
        # A model that is made here is made by one, and found by the others.
        self.together.first(self.config.model.prepare)
        if not self.together.is_first:
            self.config.model.prepare()

    def check_results(self) -> None:
        """Raise ManifestError if tables and report could not be written once there are scores."""
        require_writable(self.results, f"results of {self.config.name}")

    def part(self, cells: str) -> "Run":
        """The run of some of its dictionaries, and of all others that are finished, so that tables have both.

        Args: cells: see ``chosen``.
        """
        wanted, names = chosen(self.config.dictionaries, cells), self.config.dictionaries
        finished = set(self.together.first(lambda: sorted(self._finished()))) - wanted
        logger.info("cells: %d dictionaries of %d, beside %d that are finished", len(wanted), len(names), len(finished))
        return Run(self.config.only(wanted | finished), self.results.parent, self.cache, self.together)

    def _finished(self) -> set[str]:
        """Dictionaries that a finished evaluation has scores of, by the evals of this run."""

        def apart(key: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
            return key["dictionaries"], content_hash({name: key[name] for name in key if name != "dictionaries"})

        (wanted, ours), done = apart(self._evaluation_key), set[str]()
        for folder in self.evaluations.glob(f"{self.config.name}-*"):
            if (folder / MANIFEST).exists():
                scored, theirs = apart(read_manifest(folder, EVALUATE_STAGE)["key"])
                done |= {label for label in wanted if theirs == ours and scored.get(label) == wanted[label]}
        left = {r.name for r in replicas(self.config) if r.label not in done or not self.is_trained(r.method)}
        return self.config.dictionaries.keys() - left

    # ------------------------------------------------------------ harvest

    @cached_property
    def data(self) -> RunData:
        """What the model reads, and its activations."""
        return run_data(self.config, self.cache)

    @cached_property
    def _harvest_key(self) -> dict[str, Any]:
        return self.data.key

    @cached_property
    def harvest_folder(self) -> Path:
        return self.data.folder

    def harvest(self) -> ActivationShards:
        """Activations of the run, and gradient moments if asked for, collected or reused.

        Raises: whatever a dictionary needs from elsewhere and is not there, before the model is loaded; else as
            ``run_harvest`` or ``run_image_harvest``.
        """
        model = self.config.model

        def check() -> None:
            for method in self.config.dictionaries.values():
                if not self.is_trained(method):
                    method.check_elsewhere(model.name, model.hook)

        self.together.first(check)
        return self.data.harvest(self.device, self.together)

    def so_far(self) -> "Run":
        """The run of the training tokens that its harvest has collected up to now, as if no more were asked for; itself
        once that is all.

        The harvest may be going on meanwhile: nobody waits for the other, and what it gives is the same.
        Raises: ManifestError (there is nothing yet, or it cannot be shared), ConfigError (too little for a
            dictionary), DiskSpaceError.
        """
        n_tokens = self.together.first(self._share_so_far)
        if n_tokens is None:
            return self
        return Run(self._of_tokens(n_tokens), self.results.parent, self.cache, self.together)

    def _share_so_far(self) -> int | None:
        """Training tokens of the harvest that has been given what there is; None: all are collected."""
        wanted = self.config.harvest
        while not is_finished(self.harvest_folder, HARVEST_STAGE, self._harvest_key):
            try:
                there = SoFar.of(self.harvest_folder, self._harvest_key)
                n_tokens = there.n_tokens("train")
                if n_tokens >= wanted.train_tokens:
                    break
                there.check(wanted)
                run = Run(self._of_tokens(n_tokens), self.results.parent, self.cache)
                if not is_finished(run.harvest_folder, HARVEST_STAGE, run._harvest_key):
                    there.share(run.harvest_folder, wanted)
            except FileNotFoundError:
                # The harvest has just ended, which removes its raw parts; or somebody else has removed one.
                continue
            logger.info(
                "so far: %s of %s training tokens; any command works on these with --set harvest.train_tokens=%d --set "
                "name=%s in place of --so-far",
                f"{n_tokens:,}",
                f"{wanted.train_tokens:,}",
                n_tokens,
                run.config.name,
            )
            return n_tokens
        logger.info("so far: all training tokens are collected")
        return None

    def _of_tokens(self, n_tokens: int) -> RunConfig:
        try:
            return self.config.of_tokens(n_tokens)
        except ValueError as error:
            raise ConfigError(
                f"so far: too few tokens are collected: {error}",
                got=f"{n_tokens:,} of {self.config.harvest.train_tokens:,} training tokens",
                cause="the harvest has only begun",
                cure="run again once there are more; or leave that dictionary out, as with --cells",
            ) from error

    def reader(self) -> ActivationReader:
        """The language model, loaded."""
        return self.data.reader(self.device)

    def shards(self, part: str = "train") -> ActivationShards:
        """The finished harvest; ManifestError if there is none."""
        return self.data.shards(part)

    def gradient_moments(self) -> GradientMoments:
        """The finished moments of the loss's gradient; ManifestError if none were collected."""
        return open_gradients(self.harvest_folder, self.data.gradients_key())

    # ------------------------------------------------------------ train

    def train(self) -> list[TrainedDictionary]:
        """Every training of the config, done or reused, in the config's order."""
        if self.together.size > 1:
            self._share_trainings()
            if self.together.is_first:
                # Those that failed elsewhere fail here again, and say why.
                for replica in replicas(self.config):
                    self.train_replica(replica)
            self.together.wait()
        return [self.train_replica(replica) for replica in replicas(self.config)]

    def _share_trainings(self) -> None:
        """Dictionaries that all processes can learn together, one after another; then the others, each by one of them.

        One of the others that fails is left out.
        """
        alone: dict[Path, Replica] = {}
        for replica in replicas(self.config):
            source = source_training(self.config, replica.method)
            if replica.method.learns_by_ranks:
                self.train_replica(replica, self.together)
            else:
                alone.setdefault(self._training(replica.method, source)[0], replica)
        # Sources first: sorted by whether there is one.
        ordered = dict(sorted(alone.items(), key=lambda entry: entry[1].method.source is not None))
        numbers = {folder: number for number, folder in enumerate(ordered)}

        def after(method: Method) -> int | None:
            source = source_training(self.config, method)
            return None if source is None else numbers.get(self._training(source, None)[0])

        self.together.share([Task(partial(self._try_training, r), after(r.method)) for r in ordered.values()])
        self.together.wait()

    def _try_training(self, replica: Replica) -> None:
        try:
            self.train_replica(replica)
        except KsvdSaeError as error:
            logger.error("%s failed: %s", replica.label, error.what)

    def trained(self) -> list[TrainedDictionary]:
        """Every training of the config; ManifestError if one has not been done."""
        return [self._opened(replica) for replica in replicas(self.config)]

    def _training(self, method: Method, source: Method | None) -> tuple[Path, dict[str, Any]]:
        """Where a training is, and everything that it follows from."""
        key: dict[str, Any] = {
            "harvest": content_hash(self._harvest_key),
            "dictionary": method.key(),
            "seed": self._seed(method),
        }
        if method.metric.needs_gradients:
            key["gradients"] = content_hash(self.data.gradients_key())
        if source is not None:
            key["of"] = content_hash(self._training(source, None)[1])
        return self.cache / "dictionaries" / f"{method.kind}-{content_hash(key)}", key

    def is_trained(self, method: Method) -> bool:
        folder, key = self._training(method, source_training(self.config, method))
        return is_finished(folder, TRAIN_STAGE, key)

    def _seed(self, method: Method) -> int:
        return self.config.seed if method.own_seed is None else method.own_seed

    def train_one(self, name: str, method: Method) -> TrainedDictionary:
        """One dictionary, learned or reused; it need not be in the config, but what it is derived from must be."""
        return self.train_replica(Replica(name, method, self._seed(method), name))

    def train_replica(self, replica: Replica, together: Together = ALONE) -> TrainedDictionary:
        """One training, done or reused. Args: together: the processes that all call this, for one that they share."""
        method, source = replica.method, source_training(self.config, replica.method)
        folder, key = self._training(method, source)
        if together.first(lambda: is_finished(folder, TRAIN_STAGE, key)):
            logger.info("train %s: reusing %s", replica.label, folder)
            return self._opened(replica)
        taken_from = None
        if source is not None and method.source is not None:
            other = self.train_one(method.source, source)
            taken_from = Source(other.method, other.folder, other.manifest["samples_seen"])
        setting = replace(self.setting(method), ranks=together.ranks(self.device))
        with together.writing(folder, f"train {replica.label}"):
            if together.first(lambda: is_finished(folder, TRAIN_STAGE, key)):
                return self._opened(replica)
            together.first(lambda: method.clear_unfinished(folder))
            started = time.perf_counter()
            facts = method.train(setting, folder, taken_from).manifest(time.perf_counter() - started)
            if together.is_first:
                known = {"tokens_harvested": setting.shards.n_samples} if method.learns else {}
                write_manifest(folder, TRAIN_STAGE, key, name=replica.label, device=str(self.device), **known, **facts)
        logger.info("train %s: %s s, %s", replica.label, facts["seconds"], folder)
        return self._opened(replica)

    def _opened(self, replica: Replica) -> TrainedDictionary:
        folder, key = self._training(replica.method, source_training(self.config, replica.method))
        manifest = read_manifest(folder, TRAIN_STAGE, key)
        return TrainedDictionary(replica.name, replica.method, folder, manifest, replica.seed, replica.label)

    def content(self, replica: Replica, view: View = "signed") -> str:
        """Hash of a dictionary as it codes, known before it is trained."""
        key = self._training(replica.method, source_training(self.config, replica.method))[1]
        return TrainedDictionary.content_of(content_hash(key), replica.method, view)

    def trained_seconds(self, replica: Replica) -> float | None:
        """What it took to learn the atoms, whoever's they are; None where nobody did here."""
        source = source_training(self.config, replica.method)
        folder, key = self._training(source or replica.method, None)
        seconds: float | None = read_manifest(folder, TRAIN_STAGE, key)["seconds"]
        return seconds

    def setting(self, method: Method | None = None, shards: ActivationShards | None = None) -> TrainingSetting:
        """What a training gets besides its options.

        Args: method: None: one without a seed of its own. shards: to learn from; None: the harvest's.
        """
        model = self.config.model
        return TrainingSetting(
            model_name=model.name,
            hook=model.hook,
            context_tokens=self.data.context_tokens(),
            seed=self.config.seed if method is None else self._seed(method),
            device=self.device,
            harvest_hash=content_hash(self._harvest_key),
            shards=shards or self.shards(),
            gradient_moments=self.gradient_moments,
            weights=model.own_weights(),
            training_text=partial(self.data.training_text, self.device),
        )

    def load_sae(self, trained: TrainedDictionary) -> "SAE[Any]":
        """The trained dictionary as a SAELens SAE in its view, with the coder that the config asks for."""
        sae = trained.method.load(self.setting(trained.method), trained.folder, trained.view)
        # SAELens' name of it, which SAEBench's plots look for.
        sae.cfg.metadata.training_tokens = trained.manifest["samples_seen"]
        return sae

    # ------------------------------------------------------------ evaluate

    def evaluate(self, show: Callable[[Scores], None] | None = None, *, train: bool = False) -> dict[str, Any]:
        """Every eval of the config on every view of every dictionary, each result computed once.

        Args:
            show: called with what there is whenever scores have come in.
            train: train what has not been trained yet, each dictionary right before its first scores.
        Returns: the stage's manifest.
        Raises: EvaluationError if a score is missing (finished ones are kept), ManifestError if a stage before is.
        """
        together, found = self.together, False
        if together.first(self.is_evaluated):
            found = True
        else:
            if not train:
                self.trained()
            with together.writing(self._evaluation_folder, f"evaluate {self.config.name}"):
                # Another run may have finished it meanwhile.
                found = together.first(self.is_evaluated)
                if not found:
                    if together.size > 1:
                        self._share_evaluation(train)
                    if together.is_first:
                        self._evaluate(show)
        if found:
            if train:
                self.train()
            logger.info("evaluate: reusing %s", self._evaluation_folder)
        return self.evaluated()

    def _share_evaluation(self, train: bool) -> None:
        """Each score, and what the report shows of atoms, by one of the processes; what fails is left out."""
        from ksvd_sae.evals.panel import shared_tasks
        from ksvd_sae.evals.saebench.loaded_model import LoadedModel

        if train:
            self._share_trainings()
        every = list(replicas(self.config))
        finished = self.together.first(lambda: [r.label for r in every if self.is_trained(r.method)])
        trained = [self._opened(replica) for replica in every if replica.label in finished]
        panel = [self._panelist(view) for one in trained for view in one.in_views()]
        setting, sections = self.eval_setting, list(self.config.evaluation.seeded())
        with LoadedModel(setting.weights, setting.prepend_bos).in_use() as model:
            for at_once in (True, False):
                some = [section for section in sections if section.at_once == at_once]
                tasks = shared_tasks(panel, some, setting, self.evaluations, model)
                if not at_once and len(trained) == len(every):
                    tasks.append(Task(self._try_examples))
                self.together.share(tasks)
                # As in ``_scored``.
                setting.between_calls.clear()
        self.together.wait()

    def _try_examples(self) -> None:
        try:
            self._examples()
        except KsvdSaeError as error:
            logger.error("the report's atoms failed: %s", error.what)

    def _evaluate(self, show: Callable[[Scores], None] | None) -> dict[str, Any]:
        from ksvd_sae.evals.panel import result_files

        started, scores = time.perf_counter(), Scores()
        for scores in self._scored():
            if show is not None:
                show(scores)
        # In the config's order, whichever ended first.
        position = {section.name: i for i, section in enumerate(self.config.evaluation.evals()) if not section.at_once}
        rows = sorted(scores.rows, key=lambda row: position.get(row["eval"], -1))
        return write_manifest(
            self._evaluation_folder,
            EVALUATE_STAGE,
            self._evaluation_key,
            rows=[{**row, "value": None if row["value"] != row["value"] else row["value"]} for row in rows],
            files=result_files(
                sorted(scores.results, key=lambda result: position.get(result.eval, -1)), self.evaluations
            ),
            examples={name: path.name for name, path in self._examples().items()},
            config=self.config.model_dump(mode="json", serialize_as_any=True),
            device=str(self.device),
            seconds=round(time.perf_counter() - started, 1),
            harvest_seconds=self.shards().manifest["seconds"],
            **self.data.read_as(),
        )

    def _scored(self) -> Iterator[Scores]:
        """What there is, whenever a dictionary has been scored by the evals that are had at once, or the panel by
        another."""
        from ksvd_sae.evals.panel import run_evals, tidy_rows

        evaluation, setting, output = self.config.evaluation, self.eval_setting, self.evaluations
        scores, facts, panel = Scores(), dict[str, dict[str, Any]](), list[Panelist]()
        failures: dict[str, KsvdSaeError] = {}
        for replica in replicas(self.config):
            try:
                trained = self.train_replica(replica)
                results = self.at_once(trained)
            except KsvdSaeError as error:
                logger.error("%s failed: %s", replica.label, error.what)
                failures[replica.label] = error
                continue
            panel += [self._panelist(view) for view in trained.in_views()]
            l0 = {name: scores["l0"] for r in results for name, scores in r.metrics.items() if "l0" in scores}
            facts |= {view.panelist: view.facts(l0.get(view.panelist)) for view in trained.in_views()}
            scores.results += results
            scores.rows += [row for result in results for row in tidy_rows(result, facts, output)]
            for view in trained.in_views():
                scores.rows += view.training_rows(facts[view.panelist], self.config.data_name)
            scores.news = replica.label
            yield scores
        # What the evals above keep, such as a model, they need no more.
        setting.between_calls.clear()
        if not panel:
            raise next(iter(failures.values()))
        left = [section for section in evaluation.seeded() if not section.at_once]
        # What other processes have scored is only read.
        processes = evaluation.processes if self.together.size == 1 else 1
        for result in run_evals(panel, left, setting, output, processes):
            # Nobody here has what it compares: several trainings, or a kind that can be learned elsewhere.
            if not result.metrics:
                continue
            scores.results.append(result)
            scores.rows += tidy_rows(result, facts, output)
            scores.news = result.eval
            yield scores
        if len(failures) > 1:
            raise EvaluationError(
                f"{len(failures)} dictionaries could not be learned or scored; what the others gave is kept",
                cause="\n".join(f"{label}: {failure}" for label, failure in failures.items()),
                cure="mend what they say and run again",
            )
        for failure in failures.values():
            raise failure

    def at_once(self, trained: TrainedDictionary) -> list[EvalResults]:
        """Scores of a dictionary, in all of its views, by the evals that are cheap."""
        panel = [self._panelist(view) for view in trained.in_views()]
        sections = [section for section in self.config.evaluation.seeded() if section.at_once]
        return [section.run(panel, self.eval_setting, self.evaluations) for section in sections]

    @property
    def evaluations(self) -> Path:
        """Holds a folder of result files for each eval."""
        return self.cache / "evaluations"

    def panel(self) -> list[Panelist]:
        """Every view of every finished training, as evals take them; ManifestError if one has not been done."""
        return [self._panelist(viewed) for trained in self.trained() for viewed in trained.in_views()]

    def _panelist(self, trained: TrainedDictionary) -> Panelist:
        elsewhere = partial(self.learned_on, trained.method) if trained.learns_anywhere else None
        dictionary = view_name(trained.name, trained.view)
        return Panelist(trained.panelist, trained.content, partial(self.load_sae, trained), elsewhere, dictionary)

    def learned_on(
        self,
        method: Method,
        shards: ActivationShards,
        of: str,
        folder: Path,
        sizes: Mapping[str, int],
        seed: int | None = None,
    ) -> "SAE[Any]":
        """See ``Panelist.learned_on``. Args: of: the shards' hash."""
        if seed is not None and method.is_drawn(self.config.source_of(method)):
            method = method.varied(seed=seed)
        setting = replace(self.setting(method, shards), harvest_hash=of)
        resized, source, taken_from = method.resized(sizes), source_training(self.config, method), None
        if source is not None:
            other, place = source.resized(sizes), folder / "source"
            place.mkdir()
            facts = other.train(replace(setting, seed=self._seed(source)), place, None)
            taken_from = Source(other, place, facts.samples_seen)
        resized.train(setting, folder, taken_from)
        return resized.load(setting, folder)

    @cached_property
    def eval_setting(self) -> EvalSetting:
        """What evals read and where they keep what can be used again."""
        return self.data.eval_setting(self.device, self.gradient_moments)

    def heldout(self) -> Heldout:
        """What no dictionary learns from; ManifestError before it is harvested."""
        return self.data.heldout(self.device, self.gradient_moments)

    def _examples(self) -> dict[str, Path]:
        """What the report shows of the atoms of each dictionary's first training, in the codes that it gives itself."""
        first = {t.name: t for t in reversed(self.trained())}
        chosen = [first[name] for name in self.config.dictionaries]
        panel = [Panelist(t.name, t.content, partial(self.load_sae, t)) for t in chosen]
        heldout = self.eval_setting.heldout
        assert heldout is not None
        return self.data.atoms_shown(panel, heldout, self.evaluations / "examples")

    @property
    def _evaluation_key(self) -> dict[str, Any]:
        return {
            "harvest": content_hash(self._harvest_key),
            "evaluation": self.config.evaluation.key(),
            "dictionaries": {
                r.label: [
                    content_hash(self._training(r.method, source_training(self.config, r.method))[1]),
                    r.method.choices(),
                    list(r.method.views),
                ]
                for r in replicas(self.config)
            },
            "report": self.config.report.model_dump(mode="json"),
            "versions": scoring_versions(),
        }

    @property
    def _evaluation_folder(self) -> Path:
        return self.evaluations / f"{self.config.name}-{content_hash(self._evaluation_key)}"

    def is_evaluated(self) -> bool:
        return is_finished(self._evaluation_folder, EVALUATE_STAGE, self._evaluation_key)

    def evaluated(self) -> dict[str, Any]:
        """Manifest of the finished evaluation; ManifestError if there is none."""
        return read_manifest(self._evaluation_folder, EVALUATE_STAGE, self._evaluation_key)
