"""DB-KSVD dictionaries (arXiv 2505.18441), plain and Matryoshka."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, JsonValue, model_validator
from typing_extensions import Self

from ksvd_sae.activations.collecting import CollectingConfig
from ksvd_sae.dictionary import Dictionary
from ksvd_sae.learning.backends import coder_backend
from ksvd_sae.learning.coding import Coding
from ksvd_sae.learning.dbksvd import BatchLog, DictionaryLearner, LearnerOptions
from ksvd_sae.learning.matryoshka import NamedGroups, check_groups, group_sizes
from ksvd_sae.learning.products import Precision
from ksvd_sae.learning.redraw import Redraw
from ksvd_sae.learning.training import Update
from ksvd_sae.methods.base import (
    TRAIN_LOG,
    Coded,
    Facts,
    KeptAsDictionary,
    Seeded,
    Source,
    TrainingSetting,
    Waypoint,
    WeightingConfig,
)
from ksvd_sae.progress import progress

# Where a training stands, from which it goes on if it was stopped.
CHECKPOINT = "training.safetensors"
CHECKPOINT_BATCHES = 64


Preset = Literal["features", "behaviour", "paper"]


def preset_options(preset: Preset, k: int) -> dict[str, JsonValue]:
    """The options that a preset stands for; why these: docs/truth.md."""
    if preset == "features":
        # A third of the atoms in learning leaves less noise to fit; one sign, as most latents are read.
        return {"nonnegative": True, "init": "random", "train_k": max(1, round(k / 3)), "coder": "omp"}
    if preset == "behaviour":
        return {"weighting": "fisher_diag", "coder": "omp"}
    # But for its SVD of each atom, which `update: exact` is.
    own: dict[str, JsonValue] = {
        "update": "two_sweeps",
        "batch_samples": 65_536,
        "init": "random",
        "redraw": "random",
        "rtol": 0.05,
    }
    return own | {"duplicate_cosine": None, "average": False, "centre": False}


class DBKSVDMethod(Coded, Seeded, KeptAsDictionary):
    """A DB-KSVD dictionary; what the options are worth: docs/learning.md."""

    kind: Literal["db_ksvd"] = "db_ksvd"
    preset: Preset | None = Field(
        None,
        description="options for a purpose, where they are left out; features: latents that mean something; behaviour: "
        "the least loss of the model; paper: arXiv 2505.18441",
    )
    n_atoms: int = Field(gt=0)
    weighting: WeightingConfig = Field(default_factory=WeightingConfig)
    train_k: int | None = Field(None, ge=1, description="most atoms a token in learning; null: k")
    passes: int = Field(1, ge=1)
    batch_samples: int | None = Field(None, ge=1, description="null: 4 times n_atoms; the paper: 65536")
    update: Update = "sweep"
    atom_batch: int = Field(128, ge=1, description="atoms updated in parallel by the exact update")
    init: Literal["data", "random"] = "data"
    redraw: Redraw = Field("residual", description="what replaces unused and repeated atoms; the paper: random")
    duplicate_cosine: float | None = Field(0.99, gt=0, description="atoms this parallel repeat each other; paper: null")
    coherence: float | None = Field(
        None, gt=0, lt=1, description="bound on the |cos| of atoms that learning pushes them towards; paper: null"
    )
    average: bool = Field(True, description="give the running average of the atoms over the batches; paper: false")
    centre: bool = Field(True, description="subtract the mean; paper: false")
    groups: NamedGroups | list[int] | None = Field(
        None,
        description="Matryoshka groups: 'paper' for 2^8, 2^8, 2^9, …, 'eighth' for an eighth of the atoms and the "
        "rest, or sizes that add up to n_atoms",
    )
    exact_budgets: bool = Field(
        False, description="groups have k in all; else, as in the paper, ⌈k / groups⌉ each, which may be more"
    )
    max_steps_factor: int = Field(4, ge=1, description="MP takes at most this many times k steps")
    precision: Precision = Field("float32", description="of the products in training's coding")

    version: ClassVar[int] = 3
    may_vary: ClassVar[frozenset[str]] = frozenset({"k", "seed", "passes"})
    newer: ClassVar[frozenset[str]] = Coded.newer | {"coherence", "train_k", "exact_budgets"}
    has_waypoints: ClassVar[bool] = True
    unfinished: ClassVar[frozenset[str]] = frozenset({CHECKPOINT, TRAIN_LOG})

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("preset") in get_args(Preset) and isinstance(raw.get("k"), int):
            return {**preset_options(raw["preset"], raw["k"]), **raw}
        return raw

    def key(self) -> dict[str, JsonValue]:
        """Options are what counts, however they are written."""
        own = super().key()
        del own["preset"]
        return own

    @property
    def size(self) -> int:
        return self.n_atoms

    def resized(self, sizes: Mapping[str, int]) -> Self:
        """``train_k`` stays the same part of k."""
        new = super().resized(sizes)
        if self.train_k is None:
            return new
        return new.model_copy(update={"train_k": max(1, round(new.k * self.train_k / self.k))})

    def batch(self, n_samples: int) -> int:
        return min(n_samples, self.batch_samples or max(1024, 4 * self.n_atoms))

    def operations(self, n_samples: int, d_in: int) -> float:
        """Products and sums with the atoms, a row of the Gram matrix a pick, and of each batch the Gram matrix."""
        of_a_sample = self.n_atoms * (2 * d_in + self.k)
        return n_samples * (of_a_sample + self.operations_of_batch(d_in) / self.batch(n_samples))

    def floats_of_sample(self, d_in: int) -> float:
        """As it was read, centred and weighted, what is left of it, and its part in the update."""
        return 4.0 * d_in

    def operations_of_batch(self, d_in: int) -> float:
        return 2.0 * self.n_atoms**2 * d_in

    def check(self, harvest: CollectingConfig) -> None:
        super().check(harvest)
        if (self.train_k or 0) > self.k:
            raise ValueError(f"train_k = {self.train_k} is above k = {self.k}; learn with as many atoms or fewer")
        if self.exact_budgets:
            if self.group_sizes is None:
                raise ValueError("exact_budgets are those of groups; give groups, or leave it out")
            check_groups(self.group_sizes, self.n_atoms, self.train_k or self.k, exact=True)

    @property
    def metric(self) -> WeightingConfig:
        return self.weighting

    @property
    def group_sizes(self) -> tuple[int, ...] | None:
        return None if self.groups is None else group_sizes(self.groups, self.n_atoms)

    @property
    def coding(self) -> Coding:
        return replace(super().coding, max_steps=self.max_steps_factor * self.k, exact_budgets=self.exact_budgets)

    @property
    def learns_by_ranks(self) -> bool:
        return self.update != "exact"

    def train(self, setting: TrainingSetting, folder: Path, source: Source | None) -> Facts:
        """Goes on from the checkpoint that it finds in the folder."""
        samples = setting.shards
        with progress("train db_ksvd", self.passes * samples.n_samples, "samples") as advance:
            seen = 0

            def on_batch(entry: BatchLog) -> None:
                nonlocal seen
                advance(entry.samples_seen - seen, f"FVU {entry.fvu:.4f} L0 {entry.l0:.1f} dead {entry.dead}")
                seen = entry.samples_seen

            learned = self._learner(setting, on_batch, folder).fit(samples, resume=True)
        if setting.ranks.rank == 0:
            setting.save(Dictionary.from_estimator(learned), folder)
        return Facts(
            d_sae=self.n_atoms,
            k=self.k,
            signed=self.has_signs,
            samples_seen=learned.samples_seen,
            more={
                "dead_at_end": learned.log[-1].dead,
                "redrawn": sum(entry.redrawn for entry in learned.log),
                "backend": coder_backend(setting.device, n_atoms=self.n_atoms, k=self.k),
            },
        )

    def dictionary(self, setting: TrainingSetting, folder: Path) -> Dictionary:
        learned = super().dictionary(setting, folder)
        return replace(learned, coding=replace(learned.coding, coder=self.coder))

    def waypoints(self, setting: TrainingSetting, spacing: float) -> Iterator[Waypoint]:
        """One training: without a schedule, what it is after n samples is what training on n samples gives."""
        points: list[Waypoint] = []
        started, waiting, last_seen = time.perf_counter(), 0.0, 0

        def on_batch(entry: BatchLog) -> None:
            nonlocal waiting, last_seen
            now = time.perf_counter()
            at_end = entry.samples_seen >= self.passes * setting.shards.n_samples
            if not last_seen or entry.samples_seen >= spacing * last_seen or at_end:
                last_seen = entry.samples_seen
                dictionary = Dictionary.from_estimator(learner)
                evaluated = replace(dictionary, coding=replace(dictionary.coding, coder=self.coder))
                points.append(Waypoint(entry.samples_seen, now - started - waiting, evaluated))
            # Copying the atoms is no training.
            waiting += time.perf_counter() - now

        learner = self._learner(setting, on_batch, None)
        learner.fit(setting.shards)
        return iter(points)

    def _learner(
        self, setting: TrainingSetting, on_batch: Callable[[BatchLog], None], folder: Path | None
    ) -> DictionaryLearner:
        """Not yet fitted; log and checkpoints go into ``folder``."""
        options = LearnerOptions(
            self.n_atoms,
            # Which coder, whoever loads the dictionary says.
            replace(self.coding, coder="mp"),
            train_k=self.train_k,
            passes=self.passes,
            batch_samples=self.batch_samples,
            update=self.update,
            atom_batch=self.atom_batch,
            init=self.init,
            redraw=self.redraw,
            duplicate_cosine=self.duplicate_cosine,
            coherence=self.coherence,
            average=self.average,
            centre=self.centre,
            weighting=setting.weighting(self.weighting),
            precision=self.precision,
            seed=setting.seed,
        )
        return DictionaryLearner(
            options,
            device=str(setting.device),
            log_path=None if folder is None else folder / TRAIN_LOG,
            checkpoint_path=None if folder is None else folder / CHECKPOINT,
            checkpoint_every=None if folder is None else CHECKPOINT_BATCHES,
            on_batch=on_batch,
            ranks=setting.ranks,
        )
