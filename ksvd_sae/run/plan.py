"""What a run will take, before it runs: tokens, disk, memory and time of each stage on this machine.

Rates are measured (``probe.py``) and multiplied by what the config asks for and is not there yet. Where the model
cannot be loaded, its figures follow from its sizes by arithmetic, and without its sizes they are left out; either way
the stage says so.
"""

import heapq
import logging
import math
import shutil
from abc import ABC, abstractmethod
from functools import cached_property
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, computed_field

from ksvd_sae.activations import harvest as harvesting
from ksvd_sae.activations.shards import STAGE
from ksvd_sae.device import give_back_memory
from ksvd_sae.errors import DiskSpaceError, KsvdSaeError, MemorySpaceError
from ksvd_sae.evals.base import Eval, Work
from ksvd_sae.memory import free_bytes, resident_bytes
from ksvd_sae.run.pipeline import Run
from ksvd_sae.run.probe import ModelRates, TrainingRates, Trainings, clock
from ksvd_sae.run.replicas import Replica, replicas
from ksvd_sae.store import content_hash, is_finished

logger = logging.getLogger(__name__)
How = Literal["done", "measured", "arithmetic", "not known"]
# Of every run's tables, plots and report, and of each dictionary's part in them and in the evals' result files.
_RESULT_BYTES, _RESULT_BYTES_EACH = 4 << 20, 1 << 20
# Of a shard: batches, what is put together of them, and the one before, which is being written.
_SHARD_COPIES = 4
# Of a dictionary's examples, tables and plots.
_REPORT_S = 1.5


class Stage(BaseModel):
    """One stage of a run.

    name: as commands and configs have it. amount: what it has to do. how: where its time comes from; 'done' has nothing
    left. seconds, host_bytes, device_bytes, disk_bytes: that it takes (most memory at a time; disk that stays); None:
    not known. apart: it is in a process of its own, beside others. note: what a reader must know of them.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    amount: str
    how: How
    seconds: float | None = 0.0
    host_bytes: int | None = 0
    device_bytes: int | None = 0
    disk_bytes: int | None = 0
    apart: bool = False
    note: str | None = None


class Problem(BaseModel):
    """Too little disk or memory, and the key to change, with a value that fits; None: none does."""

    what: Literal["disk", "memory"]
    stage: str
    needed_bytes: int
    free_bytes: int
    key: str | None
    value: str | None

    def error(self) -> KsvdSaeError:
        kind = DiskSpaceError if self.what == "disk" else MemorySpaceError
        cure = "a larger disk (KSVD_SAE_CACHE), or a machine with more memory"
        if self.key is not None:
            cure = f"--set {self.key}={self.value}"
        return kind(
            f"plan: {self.stage} does not fit into the {self.what} that is free",
            got=f"{self.free_bytes / 2**30:.2f} GiB free",
            limit=f"{self.needed_bytes / 2**30:.2f} GiB needed",
            cure=cure,
        )


class Plan(BaseModel):
    """A run's stages in order, on this machine.

    disk_bytes: most that is needed at a time beyond what is there. base_bytes: memory of a process that has done
    nothing yet, which is in that of each stage. probe_s: what the measuring took.
    """

    config: str
    device: str
    threads: int
    train_tokens: int
    heldout_tokens: int
    stages: list[Stage]
    disk_bytes: int
    disk_free_bytes: int
    host_free_bytes: int
    device_free_bytes: int | None
    base_bytes: int
    processes: int
    probe_s: float
    problems: list[Problem]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def seconds(self) -> float:
        """Of all stages whose time is known; evals side by side where the config says so."""
        apart, rest = self._apart_and_rest()
        return sum(s.seconds or 0.0 for s in rest) + side_by_side_s([s.seconds or 0.0 for s in apart], self.processes)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def host_bytes(self) -> int:
        """Most at a time."""
        return max([self.apart_bytes(self.processes), *(stage.host_bytes or 0 for stage in self.stages)])

    def apart_bytes(self, processes: int) -> int:
        """Of as many stages in processes of their own, those that take most, and the process that waits for them."""
        most = sorted((s.host_bytes or 0 for s in self._apart_and_rest()[0]), reverse=True)[:processes]
        return sum(most) + self.base_bytes * (len(most) > 1)

    def _apart_and_rest(self) -> tuple[list[Stage], list[Stage]]:
        return [s for s in self.stages if s.apart], [s for s in self.stages if not s.apart]

    def check(self) -> None:
        """Raise for the first thing that does not fit."""
        for problem in self.problems:
            raise problem.error()


def side_by_side_s(seconds: list[float], processes: int) -> float:
    """When the last of them ends, if each process takes the longest that is left."""
    ends = [0.0] * max(1, processes)
    for one in sorted(seconds, reverse=True):
        heapq.heapreplace(ends, ends[0] + one)
    return max(ends)


class Planner(ABC):
    """Plans one run. Args: run: prepared."""

    # How much the model reads at a time.
    batch_key: ClassVar[str]

    def __init__(self, run: Run):
        self.run, self.config = run, run.config
        self.why: str | None = None
        self._rates: dict[str, TrainingRates | str] = {}

    # ------------------------------------------------------------ what the model reads

    @cached_property
    @abstractmethod
    def model(self) -> ModelRates | None:
        """What the model was measured at; by arithmetic where it is not here; None where its sizes are not, either, and
        where nothing is left to do for it."""

    @property
    @abstractmethod
    def _batch(self) -> tuple[int, int]:
        """(units that the model reads at a time, tokens of a unit)."""

    @property
    def _kept_share(self) -> float:
        """The part of what is read that is kept."""
        return 1.0

    @abstractmethod
    def _amount(self) -> str:
        """What is harvested."""

    @abstractmethod
    def _shown(self) -> tuple[str, float | None]:
        """What the report looks for atoms in, and the seconds that it takes; None: not known."""

    # ------------------------------------------------------------ what is there

    @cached_property
    def harvested(self) -> bool:
        return is_finished(self.run.harvest_folder, STAGE, self.config.harvested.key)

    @cached_property
    def panel(self) -> list[tuple[Replica, str]]:
        """Trainings in each of their views, and their content."""
        every = replicas(self.config)
        return [(one, self.run.content(one, view)) for one in every for view in one.method.views]

    def unscored(self, section: Eval) -> list[Replica]:
        output, heldout = self.run.evaluations, self.run.heldout() if self.harvested else None
        return [replica for replica, content in self.panel if not section.is_scored(content, output, heldout)]

    # ------------------------------------------------------------ rates

    @property
    def how_model(self) -> How:
        return "measured" if self.why is None else "arithmetic" if self.model is not None else "not known"

    @cached_property
    def trainings(self) -> Trainings | None:
        if self.harvested:
            return Trainings(self.run, next(self.run.shards().batches(4096)))
        return None if self.model is None else Trainings(self.run, self.model.rows_ND)

    def rates(self, replica: Replica) -> TrainingRates | str:
        """Of a training; its seed changes none. Why, where it cannot be tried."""
        method = replica.method
        key = content_hash(method.model_dump(mode="json", exclude={"seed"}))
        if key not in self._rates:
            if self.trainings is None:
                self._rates[key] = "the width of the activations is not known"
            elif not method.learns or not (self.config.source_of(method) or method).learns:
                self._rates[key] = "made elsewhere, and fetched"
            elif method.runs_model:
                self._rates[key] = "its training runs the language model, which is not tried"
            else:
                try:
                    self._rates[key] = self.trainings.rates(method, self.config.harvest.train_tokens)
                except KsvdSaeError as error:
                    self._rates[key] = error.what
        return self._rates[key]

    # ------------------------------------------------------------ stages

    def plan(self) -> Plan:
        """Every stage, and what does not fit."""
        started = clock()
        config, device = self.config, self.run.device
        free = free_bytes(torch.device("cpu"))
        give_back_memory()
        base_bytes = resident_bytes()
        stages = [*self._harvest(), *self._trainings(), *self._evals()]
        for stage in stages:
            if stage.how != "done" and stage.host_bytes is not None:
                stage.host_bytes += base_bytes
        made = Plan(
            config=config.name,
            device=str(device),
            threads=torch.get_num_threads(),
            train_tokens=config.harvest.train_tokens,
            heldout_tokens=config.harvest.heldout_tokens,
            stages=stages,
            disk_bytes=sum(stage.disk_bytes or 0 for stage in stages) + self._raw_bytes,
            disk_free_bytes=shutil.disk_usage(self.run.cache).free,
            host_free_bytes=free + base_bytes,
            device_free_bytes=free_bytes(device) if device.type == "cuda" else None,
            base_bytes=base_bytes,
            processes=config.evaluation.processes,
            probe_s=round(clock() - started, 1),
            problems=[],
        )
        return made.model_copy(update={"problems": self._problems(made)})

    @cached_property
    def _tokens_left(self) -> int:
        collected = harvesting.collected_tokens(self.run.harvest_folder)
        wanted = {"heldout": self.config.harvest.heldout_tokens, "train": self.config.harvest.train_tokens}
        return 0 if self.harvested else sum(max(0, n - collected.get(part, 0)) for part, n in wanted.items())

    @property
    def _token_bytes(self) -> int | None:
        """Of an activation as it is stored."""
        if self.harvested:
            return self.run.shards().d_in * getattr(torch, self.config.harvest.dtype).itemsize
        return None if self.model is None else self.model.d_in * getattr(torch, self.config.harvest.dtype).itemsize

    @property
    def _kept_tokens(self) -> int:
        """Activations that are stored: parts end with whole batches."""
        harvest, (units, tokens) = self.config.harvest, self._batch
        batch = round(units * tokens * self._kept_share)
        return harvest.train_tokens + harvest.heldout_tokens + (self._n_parts * batch) // 2

    @property
    def _n_parts(self) -> int:
        harvest = self.config.harvest
        return sum(-(-tokens // harvest.shard_tokens) for tokens in (harvest.train_tokens, harvest.heldout_tokens))

    @property
    def _raw_bytes(self) -> int:
        """Beside the shuffled shards, until these are written."""
        return 0 if self.harvested else self._kept_tokens * (self._token_bytes or 0)

    def _harvest(self) -> list[Stage]:
        if self.harvested:
            return [Stage(name="harvest", amount=self._amount(), how="done")]
        return [self._reading("harvest", self._amount(), self._tokens_left, self.model)]

    def _unknown(self, name: str, amount: str, why: str | None) -> Stage:
        nothing = dict.fromkeys(("seconds", "host_bytes", "device_bytes", "disk_bytes"))
        return Stage(name=name, amount=amount, how="not known", note=why, **nothing)

    def _reading(self, name: str, amount: str, tokens: int, model: ModelRates | None) -> Stage:
        if model is None:
            return self._unknown(name, amount, self.why)
        harvest, stored = self.config.harvest, self._kept_tokens * (self._token_bytes or 0)
        read = tokens / self._kept_share + self._overshoot(tokens)
        # Written and read again twice: as it comes, and shuffled.
        seconds = model.load_s + read * model.read_s + 4 * stored * model.write_s
        in_hand = _SHARD_COPIES * min(harvest.shard_tokens, harvest.train_tokens) * (self._token_bytes or 0)
        host, device = self._memory(model, in_hand)
        return Stage(
            name=name,
            amount=amount if tokens >= harvest.train_tokens else f"{amount}, {tokens:,} left",
            how=self.how_model,
            seconds=seconds,
            host_bytes=host,
            device_bytes=device,
            disk_bytes=stored,
            note=self.why,
        )

    def _overshoot(self, tokens: int) -> float:
        """Half a batch for each part that is still to come."""
        share = tokens / max(1, self.config.harvest.train_tokens + self.config.harvest.heldout_tokens)
        return share * self._n_parts * math.prod(self._batch) / 2

    def _memory(self, model: ModelRates, in_hand: int, held: int = 0) -> tuple[int, int]:
        """(host, device): of loading or of reading, whichever is more. Args: held: beside the model."""
        if self.run.device.type == "cuda":
            return max(model.load_bytes, in_hand), model.weight_bytes + model.read_bytes + held
        return max(model.load_bytes, model.weight_bytes + model.read_bytes + held + in_hand), 0

    def _trainings(self) -> list[Stage]:
        return [self._training(replica) for replica in replicas(self.config)]

    def _training(self, replica: Replica) -> Stage:
        method, name = replica.method, f"train {replica.label}"
        samples = getattr(method, "passes", 1) * self.config.harvest.train_tokens if method.learns else 0
        amount = f"{samples:,} samples" if method.size is None else f"{samples:,} samples, {method.size:,} atoms"
        if self.run.is_trained(method):
            return Stage(name=name, amount=amount, how="done")
        rates = self.rates(replica)
        if isinstance(rates, str):
            return self._unknown(name, amount, rates)
        shard = min(self.config.harvest.shard_tokens, self.config.harvest.train_tokens)
        in_hand = 2 * shard * (self._token_bytes or 0)
        on_gpu = self.run.device.type == "cuda"
        return Stage(
            name=name,
            amount=amount,
            how="measured",
            seconds=rates.seconds,
            host_bytes=in_hand + (0 if on_gpu else rates.peak_bytes),
            device_bytes=rates.peak_bytes if on_gpu else 0,
            disk_bytes=rates.disk_bytes,
            note="of a smaller size, in proportion to operations" if rates.scaled else None,
        )

    def _evals(self) -> list[Stage]:
        finished = self.run.is_evaluated()
        stages = [self._eval(section, finished) for section in self.config.evaluation.seeded()]
        shown, shown_s = self._shown()
        amount = f"{shown}, {len(self.config.dictionaries)} dictionaries"
        if finished:
            return [*stages, Stage(name="report", amount=amount, how="done")]
        n_bytes = _RESULT_BYTES + _RESULT_BYTES_EACH * len(self.panel)
        if shown_s is None:
            return [*stages, self._unknown("report", amount, self.why)]
        seconds = shown_s + _REPORT_S * len(self.config.dictionaries)
        host, device = (0, 0) if self.model is None else self._memory(self.model, 0)
        last = Stage(name="report", amount=amount, how=self.how_model, seconds=seconds, disk_bytes=n_bytes)
        return [*stages, last.model_copy(update={"host_bytes": host, "device_bytes": device})]

    def work(self, section: Eval) -> Work | None:
        return section.work(self.config.harvest.heldout_tokens, max(1, len(self.config.training_seeds)))

    def _eval(self, section: Eval, finished: bool) -> Stage:
        seed = "" if section.own_seed is None or not self.config.evaluation.seeds else f", seed {section.own_seed}"
        name, left = f"evaluate {section.name}{seed}", [] if finished else self.unscored(section)
        if not left:
            return Stage(name=name, amount=f"{len(self.panel)} dictionaries", how="done")
        amount, work, model = f"{len(left)} dictionaries", self.work(section), self.model
        if work is None:
            return self._unknown(name, amount, "nobody has counted what it does")
        asks = work.read + work.rest + work.read_each + work.rest_each
        apart = self.config.evaluation.processes > 1 and not section.at_once
        slower = model.slower if apart and model is not None else 1.0
        if model is None and asks:
            return self._unknown(name, amount, self.why)
        n, seconds, notes = len(left), work.other_s + len(left) * work.other_each_s, []
        guessed = seconds
        if model is not None and asks:
            read, rest, predicted = (
                once + n * each
                for once, each in (
                    (work.read, work.read_each),
                    (work.rest, work.rest_each),
                    (work.predicted, work.predicted_each),
                )
            )
            asked_s = read * model.read_s + rest * model.rest_s + predicted * model.predict_s
            seconds += self._loading(section) + slower * asked_s
            amount = f"{read + rest:,.0f} tokens, {amount}"
        if work.coded_each:
            known = [rates for rates in map(self.rates, left) if isinstance(rates, TrainingRates)]
            if not known and not asks:
                return self._unknown(name, amount, "how fast dictionaries code is not known")
            coded_s = sum(work.coded_each * rates.code_s + work.passes_each * rates.pass_s for rates in known)
            seconds += slower * coded_s
            if len(known) < n:
                notes.append(f"without the codes of {n - len(known)} that are not known")
        if guessed > 0.1 * seconds:
            notes.append(f"{guessed:.0f} s of it are in proportion to the demo's, not measured")
        host, device = (0, 0) if model is None or not asks else self._memory(model, 0, self._held(work, model))
        wide = model.d_in * 4 if model is not None else 0
        kept = work.kept * wide + min(work.cached * wide, getattr(self.config.evaluation, "llm_cache_gb", 0) * 1e9)
        return Stage(
            name=name,
            amount=amount,
            how=self.how_model if asks else "measured",
            seconds=seconds,
            host_bytes=host,
            device_bytes=device,
            disk_bytes=int(kept),
            apart=apart,
            note="; ".join([*notes, *([self.why] if asks and self.why else [])]) or None,
        )

    def _held(self, work: Work, model: ModelRates) -> int:
        """Bytes of the untouched model's probabilities."""
        most = float(getattr(self.config.evaluation, "llm_memory_gb", 0)) * 1e9
        return int(min(4 * work.held * model.vocabulary, most))

    def _loading(self, section: Eval) -> float:
        """The model is loaded by the first eval of a process, and by those that want it in another form."""
        evals = [one for one in self.config.evaluation.evals() if not one.at_once]
        first = [one.name for one in evals if not one.loads_own_model][: self.config.evaluation.processes]
        loads = section.at_once or section.loads_own_model or section.name in first
        return self.model.load_s if loads and self.model is not None else 0.0

    # ------------------------------------------------------------ what does not fit

    def _problems(self, made: Plan) -> list[Problem]:
        problems = []
        if made.disk_bytes > made.disk_free_bytes:
            key, value = self._less_disk(made)
            problems.append(
                Problem(
                    what="disk",
                    stage="the run",
                    needed_bytes=made.disk_bytes,
                    free_bytes=made.disk_free_bytes,
                    key=key,
                    value=value,
                )
            )
        for stage in made.stages:
            for needed, there in (
                (stage.host_bytes, made.host_free_bytes),
                (stage.device_bytes, made.device_free_bytes),
            ):
                if needed and there is not None and needed > there:
                    key, value = self._less_memory(stage, needed, there)
                    one = Problem(
                        what="memory", stage=stage.name, needed_bytes=needed, free_bytes=there, key=key, value=value
                    )
                    problems.append(one)
        if not problems and made.host_bytes > made.host_free_bytes:
            fewer = (n for n in range(made.processes, 0, -1) if made.apart_bytes(n) <= made.host_free_bytes)
            beside = {"needed_bytes": made.host_bytes, "free_bytes": made.host_free_bytes}
            cure = {"key": "evaluation.processes", "value": str(next(fewer))}
            problems.append(Problem(what="memory", stage=f"{made.processes} evals side by side", **beside, **cure))
        return problems

    def _less_disk(self, made: Plan) -> tuple[str | None, str | None]:
        """The number of tokens for which there is room; in half the bytes, if that is enough."""
        token_bytes = 2 * (self._token_bytes or 0)
        over = made.disk_bytes - made.disk_free_bytes
        if self.config.harvest.dtype == "float32" and over <= self._raw_bytes:
            return "harvest.dtype", "bfloat16"
        fewer = self.config.harvest.train_tokens - -(-over // max(1, token_bytes))
        fewer = fewer // 1024 * 1024
        return ("harvest.train_tokens", str(fewer)) if token_bytes and fewer > 0 else (None, None)

    def _less_memory(self, stage: Stage, needed: int, there: int) -> tuple[str | None, str | None]:
        """The largest power of two of the part that can be smaller, if that is enough."""
        kind, _, label = stage.name.partition(" ")
        config, over = self.config, needed - there
        if kind == "train":
            replica = next(one for one in replicas(config) if one.label == label)
            d_in = self.model.d_in if self.model is not None else self.run.shards().d_in
            batch = replica.method.batch(config.harvest.train_tokens)
            rates = self.rates(replica)
            peak = rates.peak_bytes if isinstance(rates, TrainingRates) else 0
            a_sample = peak * replica.method.floats_of_sample(d_in) / max(1.0, replica.method.floats(d_in))
            smaller = _power_of_two(batch - over / max(1.0, a_sample))
            if hasattr(replica.method, "batch_samples") and smaller:
                return f"dictionaries.{replica.name}.batch_samples", str(smaller)
            return None, None
        model = self.model
        if model is None:
            return None, None
        if kind == "harvest":
            shard_bytes = _SHARD_COPIES * (self._token_bytes or 1)
            shard = min(config.harvest.shard_tokens, config.harvest.train_tokens)
            smaller = _power_of_two(shard - over / shard_bytes)
            if model.load_bytes <= there and smaller:
                return "harvest.shard_tokens", str(smaller)
            units = _power_of_two(self._batch[0] * (1 - over / max(1, model.read_bytes)))
            if model.load_bytes <= there and units:
                return self.batch_key, str(units)
        if config.model.dtype == "float32" and needed - model.load_bytes // 2 <= there:
            return "model.dtype", "bfloat16"
        return None, None


def _power_of_two(most: float) -> int:
    """The largest that is no larger; 0 for none."""
    return 1 << (int(most).bit_length() - 1) if most >= 1 else 0
