"""A plan: what it counts, what it says of what is not here, and what it refuses with which cure."""

import shutil
from collections import namedtuple
from copy import deepcopy
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from ksvd_sae.errors import DiskSpaceError, HubError, MemorySpaceError
from ksvd_sae.evals import EVALS
from ksvd_sae.methods.db_ksvd import DBKSVDMethod
from ksvd_sae.report.plan import plan_table
from ksvd_sae.run import plan as planning
from ksvd_sae.run import planners, probe
from ksvd_sae.run.config import RunConfig, load_config, parse_config
from ksvd_sae.run.pipeline import Run
from ksvd_sae.run.plan import Plan, side_by_side_s
from ksvd_sae.run.planners import planner_of
from ksvd_sae.run.probe import ModelRates, TrainingRates
from tests.run.test_pipeline import D_IN, RAW
from tests.tiny_shards import raw_activations, write_harvest

GIB = 2**30
Usage = namedtuple("Usage", "total used free")


def rates(**changes: Any) -> ModelRates:
    """A model that takes a millisecond a token."""
    known: dict[str, Any] = {
        "load_s": 5.0,
        "read_s": 1e-3,
        "rest_s": 2e-3,
        "predict_s": 3e-3,
        "gradient_s": 4e-3,
        "write_s": 0.0,
        "slower": 1.0,
        "vocabulary": 1000,
        "load_bytes": GIB,
        "weight_bytes": GIB // 2,
        "read_bytes": GIB // 4,
        "rows_ND": raw_activations(512),
    }
    return ModelRates(**{**known, **changes})


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plans a config with a model of known rates, and so much that is free."""
    (tmp_path / "cache").mkdir()

    def plan(
        config: RunConfig, *, disk: int = 100 * GIB, memory: int = 100 * GIB, tries: bool = False, **changes: Any
    ) -> Plan:
        if not tries:
            known = TrainingRates(1.0, 1e-6, 1e-7, 1 << 20, 1 << 20, False)
            monkeypatch.setattr(probe.Trainings, "rates", lambda *_: known)
        monkeypatch.setattr(planners, "probe_model", lambda run, **_: rates(**changes))
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(disk, 0, disk))
        monkeypatch.setattr(planning, "free_bytes", lambda _: memory)
        monkeypatch.setattr(planning, "resident_bytes", lambda: 0)
        return planner_of(Run(config, tmp_path / "results", tmp_path / "cache")).plan()

    return plan


def config(**changes: Any) -> RunConfig:
    return parse_config({**deepcopy(RAW), **changes})


def stage(plan: Plan, name: str) -> planning.Stage:
    (found,) = (one for one in plan.stages if one.name == name)
    return found


def test_every_stage_is_there_in_order(planned: Any) -> None:
    plan = planned(config())
    trained = [f"train {name}" for name in RAW["dictionaries"]]
    assert [one.name for one in plan.stages] == [
        "harvest",
        *trained,
        "evaluate heldout",
        "evaluate stability",
        "report",
    ]
    assert {one.how for one in plan.stages} == {"measured"}
    assert plan.problems == []
    assert plan.seconds == pytest.approx(sum(one.seconds or 0 for one in plan.stages))
    assert Plan.model_validate_json(plan.model_dump_json(exclude={"seconds", "host_bytes"})) == plan


def test_a_harvest_is_its_tokens_at_the_measured_rate_and_bytes(planned: Any) -> None:
    plan = planned(config(harvest={**RAW["harvest"], "train_tokens": 100_000, "heldout_tokens": 10_000}))
    harvest = stage(plan, "harvest")
    # A millisecond a token, of which a context's first is special; and up to a batch more than asked for.
    assert harvest.seconds == pytest.approx(5 + 110 * 12 / 11, rel=0.01)
    assert harvest.disk_bytes == pytest.approx(110_000 * D_IN * 4, rel=0.01)
    assert plan.disk_bytes >= 2 * harvest.disk_bytes, "as it came, and shuffled"
    halved = planned(config(harvest={**RAW["harvest"], "train_tokens": 100_000, "dtype": "bfloat16"}))
    assert stage(halved, "harvest").disk_bytes < 0.51 * harvest.disk_bytes


@pytest.mark.parametrize("each_s", [1e-3, 1e-6], ids=["slow", "quick: by many passes"])
def test_a_training_is_its_samples_at_the_measured_rate(
    planned: Any, monkeypatch: pytest.MonkeyPatch, each_s: float
) -> None:
    train = probe.Trainings._train

    def takes(self: Any, method: Any, folder: Path, source: Any, shards: Any, passes: int = 1) -> tuple[float, Path]:
        """A second, and a millisecond a sample."""
        return 1 + each_s * passes * shards.n_samples, train(self, method, folder, source, shards)[1]

    monkeypatch.setattr(probe.Trainings, "_train", takes)
    learned = {"kind": "db_ksvd", "n_atoms": 32, "k": 4, "batch_samples": 512}
    plan = planned(
        config(dictionaries={name: {**learned, "passes": n} for name, n in (("one", 1), ("fifty", 50))}), tries=True
    )
    assert stage(plan, "train one").seconds == pytest.approx(1 + 2000 * each_s, rel=0.01)
    assert stage(plan, "train fifty").seconds == pytest.approx(1 + 100_000 * each_s, rel=0.01)


def test_a_training_at_a_smaller_size_tells_batches_from_samples(planned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train, tried = probe.Trainings._train, list[Any]()

    def takes(self: Any, method: Any, folder: Path, source: Any, shards: Any) -> tuple[float, Path]:
        """A second, a millisecond a sample, and half a second a batch."""
        tried.append(method)
        seconds = 1 + 1e-3 * shards.n_samples + 0.5 * shards.n_samples / method.batch_samples
        return seconds, train(self, method, folder, source, shards)[1]

    def holds(call: Any, _: Any) -> tuple[Any, float]:
        """Ten MiB, and a hundredth of one a sample of the batch."""
        result = call()
        return result, 10 + 0.01 * tried[-1].batch_samples

    learned = {"kind": "db_ksvd", "n_atoms": 32, "k": 4, "batch_samples": 4096}
    asked = config(harvest={**RAW["harvest"], "train_tokens": 100_000}, dictionaries={"d": learned})
    method = asked.dictionaries["d"]
    monkeypatch.setattr(probe, "_OPERATIONS", method.operations(512, D_IN))
    monkeypatch.setattr(probe.Trainings, "_train", takes)
    monkeypatch.setattr(probe, "peak_growth", holds)
    training = stage(planned(asked, tries=True), "train d")
    assert {one.batch_samples for one in tried} == {512, 1024}
    assert training.note is not None
    assert training.seconds == pytest.approx(1 + 100 + 0.5 * 100_000 / 4096, rel=0.01)
    in_hand = 2 * RAW["harvest"].get("shard_tokens", 65_536) * D_IN * 4
    assert training.host_bytes == pytest.approx((10 + 0.01 * 4096) * 2**20 + in_hand, rel=0.01)


def test_what_is_there_is_done(planned: Any, tmp_path: Path) -> None:
    asked = config(dictionaries={"pca": {"kind": "pca", "k": 3}})
    run = Run(asked, tmp_path / "results", tmp_path / "cache")
    x_ND = raw_activations(2500)
    write_harvest(run.harvest_folder, asked.harvested.key, x_ND[:2000], x_ND[2000:])
    plan = planned(asked)
    assert [one.name for one in plan.stages if one.how == "done"] == ["harvest"]
    assert plan.disk_bytes < 10 << 20
    run.train()
    plan = planned(asked)
    assert [one.name for one in plan.stages if one.how == "done"] == ["harvest", "train pca"]
    (trained,) = run.trained()
    run.config.evaluation.heldout.run([run._panelist(trained)], run_setting(run), run.evaluations)  # type: ignore[attr-defined]
    assert stage(planned(asked), "evaluate heldout").how == "done"


def run_setting(run: Run) -> Any:
    """What the eval on held-out activations reads; there is no text here for the others."""
    from ksvd_sae.evals.base import EvalSetting

    place = run.cache / "artifacts"
    return EvalSetting("some/model", "float32", "cpu", place, "", place, heldout=run.heldout())


def test_what_was_collected_before_a_stop_is_not_read_again(planned: Any, tmp_path: Path) -> None:
    asked = config(harvest={**RAW["harvest"], "train_tokens": 100_000})
    raw = Run(asked, tmp_path / "results", tmp_path / "cache").harvest_folder / "raw"
    raw.mkdir(parents=True)
    (raw / "heldout-00000.json").write_text('{"n_samples": 500}')
    (raw / "train-00000.json").write_text('{"n_samples": 75000}')
    assert stage(planned(asked), "harvest").seconds == pytest.approx(5 + 25 * 12 / 11, rel=0.02)


@pytest.mark.parametrize("half", [True, False])
def test_too_small_a_disk_is_refused_with_a_value_that_fits(planned: Any, half: bool) -> None:
    harvest = {**RAW["harvest"], "train_tokens": 10_000_000}
    whole = planned(config(harvest=harvest))
    disk = int(whole.disk_bytes * (0.6 if half else 0.3))
    plan = planned(config(harvest=harvest), disk=disk)
    with pytest.raises(DiskSpaceError, match="harvest") as caught:
        plan.check()
    key, value = plan.problems[0].key, plan.problems[0].value
    assert f"--set {key}={value}" in str(caught.value)
    assert key == ("harvest.dtype" if half else "harvest.train_tokens")
    mended = {**harvest, key.removeprefix("harvest."): value if half else int(value)}
    planned(config(harvest=mended), disk=disk).check()


def test_too_little_memory_for_a_training_is_refused_with_a_batch_that_fits(planned: Any, monkeypatch: Any) -> None:
    learned = {"kind": "db_ksvd", "n_atoms": 64, "k": 3, "batch_samples": 65_536}
    asked = config(harvest={**RAW["harvest"], "train_tokens": 100_000}, dictionaries={"d": learned})
    method = asked.dictionaries["d"]
    # A hundred bytes a number that it holds: gigabytes.
    monkeypatch.setattr(probe, "peak_growth", lambda call, _: (call(), 1e-4 * method.floats(D_IN)))
    memory = int(1e-4 * method.floats(D_IN) * 2**20 * 0.3)
    small = {"load_bytes": 0, "weight_bytes": 0, "read_bytes": 0}
    plan = planned(asked, memory=memory, tries=True, **small)
    with pytest.raises(MemorySpaceError, match="train d"):
        plan.check()
    (problem,) = [one for one in plan.problems if one.stage == "train d"]
    assert problem.key == "dictionaries.d.batch_samples"
    assert 1 <= int(problem.value or 0) < 65_536


def test_too_little_memory_for_the_model_asks_for_half_its_bytes(planned: Any) -> None:
    plan = planned(config(), memory=int(0.7 * GIB))
    with pytest.raises(MemorySpaceError, match=r"model\.dtype=bfloat16"):
        plan.check()


def test_of_a_model_that_is_not_here_the_plan_says_what_is_arithmetic(
    planned: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def absent(*_: Any, **__: Any) -> Any:
        raise HubError("loading model: no network")

    asked = config(dictionaries={"pca": {"kind": "pca", "k": 3}}, evaluation={"core": {}, "sparse_probing": None})
    planned(asked, tries=True)
    monkeypatch.setattr(planners, "probe_model", absent)
    monkeypatch.setattr(planners, "model_sizes", lambda *_: planners.ModelSizes(24, 10**6, 1e5, 2e5, 3e5, 1000))
    plan = planner_of(Run(asked, tmp_path / "results", tmp_path / "cache")).plan()
    harvest, trained, core = (stage(plan, name) for name in ("harvest", "train pca", "evaluate core"))
    assert (harvest.how, trained.how, core.how) == ("arithmetic", "measured", "arithmetic")
    assert "no network" in (harvest.note or "")
    assert harvest.disk_bytes == pytest.approx(2500 * 24 * 4, rel=0.1)
    assert (core.seconds or 0) > (harvest.seconds or 0), "four million tokens"
    monkeypatch.setattr(planners, "model_sizes", absent)
    plan = planner_of(Run(asked, tmp_path / "results", tmp_path / "cache")).plan()
    # One training of each: nothing to match.
    assert {one.how for one in plan.stages if one.name != "evaluate stability"} == {"not known"}
    assert harvest.seconds is not None
    assert stage(plan, "harvest").seconds is None


def test_sizes_of_a_known_architecture() -> None:
    sizes = planners.model_sizes(load_config("gemma-2-2b").model, 128)
    assert sizes.d_in == 2304
    # 2.6 billion, and the output matrix by itself, as TransformerLens has it.
    assert sizes.weights == pytest.approx(3.2e9, rel=0.02)
    assert sizes.multiplications == pytest.approx(sizes.rest)


def test_a_large_dictionary_is_tried_at_a_smaller_size() -> None:
    method = DBKSVDMethod(n_atoms=16_384, k=20, batch_samples=65_536, passes=3)
    small = probe._within(method, 2304)
    assert small.operations(small.batch(1 << 62), 2304) <= probe._OPERATIONS
    assert method.operations(1 << 20, 2304) > 100 * small.operations(small.batch(1 << 62), 2304)
    assert probe._within(small, 2304) is small


def test_evals_side_by_side_end_with_the_longest() -> None:
    assert side_by_side_s([], 2) == 0
    assert side_by_side_s([5, 3, 2], 1) == 10
    assert side_by_side_s([5, 3, 2], 2) == 5
    assert side_by_side_s([5, 3, 3], 2) == 6


def test_evals_side_by_side_are_slower_and_take_memory_together(planned: Any) -> None:
    evals: dict[str, Any] = {"core": {"dataset": "heldout"}, "sparse_probing": None, "loss": {"contexts": 64}}
    evals["absorption"] = {}
    alone = planned(config(evaluation=evals))
    both = config(evaluation={**evals, "processes": 2, "llm_memory_gb": 2})
    beside = planned(both, slower=1.5, vocabulary=10**6)
    core, absorption, loss = (f"evaluate {name}" for name in ("core", "absorption", "loss"))
    # Five seconds are the model's loading.
    assert stage(beside, core).seconds - 5 == pytest.approx(1.5 * (stage(alone, core).seconds - 5))
    # It comes with each dictionary, before the others.
    assert stage(beside, loss).seconds == pytest.approx(stage(alone, loss).seconds)
    apart = sorted(stage(beside, name).seconds for name in (core, absorption))
    assert beside.seconds == pytest.approx(sum(one.seconds or 0 for one in beside.stages) - apart[0])
    # Probabilities of many tokens' next ones, beside a model of three quarters; the other eval has loaded its own.
    assert stage(beside, core).host_bytes == pytest.approx(2e9 + 0.75 * GIB)
    assert beside.host_bytes == pytest.approx(2e9 + 1.75 * GIB)
    assert beside.problems == []
    with pytest.raises(MemorySpaceError, match=r"evaluation\.processes=1"):
        planned(both, memory=3 * GIB, vocabulary=10**6).check()


@pytest.mark.parametrize("kind", EVALS)
def test_every_eval_counts_what_it_does(kind: Any) -> None:
    needed = {
        "monosemanticity": {"backbone": {"name": "some/model", "layer": 1}},
        "transfer": {"images": {"dataset": "some/images"}},
    }
    work = kind(**needed.get(kind.name, {})).work(10_000, 3)
    assert work is not None
    assert any(vars(work).values())


def test_the_table_says_what_is_free_and_what_is_not_known(planned: Any) -> None:
    plan = planned(config())
    plan.stages.append(planning.Stage(name="evaluate new", amount="", how="not known", seconds=None, note="no work"))
    console = Console(width=160, record=True, file=StringIO())
    console.print(plan_table(plan))
    text = console.export_text()
    assert "100.00 GiB" in text
    assert "not known" in text
    assert "?" in text


def test_random_tokens_are_ordinary() -> None:
    class Reader:
        class model:  # noqa: N801
            class cfg:  # noqa: N801
                d_vocab, device = 5, "cpu"

        @staticmethod
        def ordinary(ids: torch.Tensor) -> torch.Tensor:
            return ids > 1

    assert bool((probe._tokens(Reader(), 4, 16) > 1).all())  # type: ignore[arg-type]
