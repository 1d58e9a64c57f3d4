"""Plans of runs on images: images, patches, disk and memory as a harvest then has them; what is refused and with which
cure."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ksvd_sae.errors import EvaluationError, MemorySpaceError
from ksvd_sae.run import plan as planning
from ksvd_sae.run import probe
from ksvd_sae.run.config import RunConfig, parse_config
from ksvd_sae.run.pipeline import Run
from ksvd_sae.run.plan import Plan
from ksvd_sae.run.planners import planner_of
from tests import tiny_vision
from tests.run.test_plan import stage

PATCHES = (tiny_vision.PIXELS // tiny_vision.PATCH) ** 2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its judge and images."""
    folder = tmp_path_factory.mktemp("plan")
    tiny_vision.save_dinov2(folder / "model", tiny_vision.dinov2())
    tiny_vision.save_dinov2(folder / "judge", tiny_vision.dinov2(d_model=16, seed=1))
    tiny_vision.write_images(folder / "images", 5)
    return folder


def config(place: Path, **model: Any) -> RunConfig:
    judge = {"backbone": {"name": str(place / "judge"), "layer": 2}}
    others = {"images": {"source": "folder", "dataset": str(place / "images")}, "n_images": 6}
    return parse_config(
        {
            "name": "tiny",
            "device": "cpu",
            "model": {"name": str(place / "model"), "layer": 1, **model},
            "images": {"source": "folder", "dataset": str(place / "images")},
            "harvest": {"train_tokens": 8 * PATCHES, "heldout_tokens": 4 * PATCHES, "batch_images": 4},
            "dictionaries": {"learned": {"kind": "db_ksvd", "n_atoms": 32, "k": 4, "batch_samples": 512}},
            "evaluation": {"monosemanticity": judge, "transfer": others},
        }
    )


def planned(config: RunConfig, folder: Path) -> Plan:
    folder.mkdir(exist_ok=True)
    return planner_of(Run(config, folder / "results", folder)).plan()


def test_a_plan_is_what_a_harvest_then_has(place: Path, tmp_path: Path) -> None:
    asked = config(place)
    plan = planned(asked, tmp_path)
    assert [one.name.removeprefix("evaluate ") for one in plan.stages] == [
        *("harvest", "train learned", "heldout", "probe_preservation", "image_probing", "spatial", "monosemanticity"),
        *("transfer", "stability", "report"),
    ]
    assert [(one.name, one.note) for one in plan.stages if one.how != "measured"] == []
    harvest = stage(plan, "harvest")
    assert harvest.amount.startswith(f"8 + 4 images of {PATCHES} tokens: 2,048 + 1,024 tokens at encoder.layer.1")
    assert "4 images by judge" in stage(plan, "evaluate monosemanticity").amount
    assert stage(plan, "evaluate image_probing").note == "without its probes"
    others = stage(plan, "evaluate transfer")
    assert others.amount == "6 images by model, 1 dictionaries"
    assert others.note == "without its probes"
    assert others.disk_bytes == 6 * PATCHES * tiny_vision.D_MODEL * 4
    assert plan.problems == []
    assert Plan.model_validate_json(plan.model_dump_json(exclude={"seconds", "host_bytes"})) == plan
    assert not list(tmp_path.glob("activations/*")), "nothing was run"

    run = Run(asked, tmp_path / "results", tmp_path)
    run.harvest()
    stored = sum(path.stat().st_size for path in run.harvest_folder.rglob("*") if path.is_file())
    # Up to half a batch more for each of two parts, and what is said beside the numbers.
    assert harvest.disk_bytes == pytest.approx(stored, rel=0.25)
    evaluation = asked.evaluation.model_copy(update={"seeds": [0, 1]})
    again = planned(asked.model_copy(update={"evaluation": evaluation}), tmp_path)
    assert stage(again, "harvest").how == "done"
    # The first seed's are there for the second.
    assert stage(again, "evaluate transfer, seed 0").amount == others.amount
    assert stage(again, "evaluate transfer, seed 1").amount == "1 dictionaries"
    assert f"images of {PATCHES} tokens" in stage(again, "harvest").amount
    assert {one.how for one in again.stages[1:]} == {"measured"}


def test_too_little_memory_asks_for_fewer_images_at_a_time(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = probe.probe_images

    def hungry(*arguments: Any) -> probe.ImageRates:
        return replace(measured(*arguments), load_bytes=0, read_bytes=4 << 30)

    monkeypatch.setattr("ksvd_sae.run.planners.probe_images", hungry)
    monkeypatch.setattr(planning, "free_bytes", lambda _: 2 << 30)
    monkeypatch.setattr(planning, "resident_bytes", lambda: 0)
    plan = planned(config(place), tmp_path)
    with pytest.raises(MemorySpaceError, match=r"--set harvest\.batch_images=1"):
        plan.check()


def test_of_a_model_that_is_not_here_nothing_is_said(place: Path, tmp_path: Path) -> None:
    plan = planned(config(place, name=str(tmp_path / "nowhere")), tmp_path / "cache")
    assert {one.how for one in plan.stages if one.name != "evaluate stability"} == {"not known"}
    assert "loading model" in (stage(plan, "harvest").note or "")
    assert stage(plan, "harvest").disk_bytes is None


def test_other_images_that_are_not_there_are_refused_before_the_harvest(place: Path, tmp_path: Path) -> None:
    asked = config(place)
    others = asked.evaluation.transfer.model_copy(
        update={"images": asked.images.model_copy(update={"dataset": str(tmp_path / "nowhere")})}
    )
    evaluation = asked.evaluation.model_copy(update={"transfer": others})
    run = Run(asked.model_copy(update={"evaluation": evaluation}), tmp_path / "results", tmp_path)
    with pytest.raises(EvaluationError, match=r"transfer: image folder .*nowhere"):
        run.harvest()
    assert not run.harvest_folder.exists()
