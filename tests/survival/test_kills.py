"""Stages that are stopped at random moments end, when they are run again, with the bits of an undisturbed run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import REPOSITORY
from tests.survival.conftest import Tally

STAGES = ("harvest", "train", "evaluate", "publish")


def stop(folder: Path, way: str, times: int, *stages: str) -> tuple[dict[str, list[int]], str]:
    """Of each stage, how often it was stopped, and how often all was as if it had not been; and what was said."""
    command = [sys.executable, "-m", "tests.survival.kills", str(folder), way, str(times), *stages]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout), done.stderr[-6000:]


@pytest.mark.parametrize(("way", "stages"), [("SIGKILL", STAGES), ("SIGTERM", STAGES[:2]), ("SIGINT", STAGES[1:3])])
def test_stopped_stages(way: str, stages: tuple[str, ...], tmp_path: Path) -> None:
    counts, said = stop(tmp_path, way, 2, *stages)
    assert counts == {stage: [2, 2] for stage in stages}, said


def test_two_processes_at_once(tmp_path: Path) -> None:
    counts, said = stop(tmp_path, "TWICE", 1, "harvest", "train", "evaluate")
    assert counts == {stage: [1, 1] for stage in ("harvest", "train", "evaluate")}, said


def test_training_on_what_a_harvest_has_so_far(tmp_path: Path) -> None:
    """Once while it stands still, as if at work in another process, once while it is dead."""
    counts, said = stop(tmp_path, "SO_FAR", 2, "harvest")
    assert counts == {"harvest": [2, 2]}, said


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("way", "stage", "times"),
    [
        *(("SIGKILL", stage, 50) for stage in STAGES),
        *((way, stage, 20) for way in ("SIGINT", "SIGTERM") for stage in STAGES[:3]),
        *(("TWICE", stage, 10) for stage in STAGES[:3]),
        ("SO_FAR", "harvest", 10),
    ],
)
def test_a_stage_that_is_stopped_often(way: str, stage: str, times: int, tmp_path: Path, tally: Tally) -> None:
    counts, said = stop(tmp_path, way, times, stage)
    what = {"TWICE": "two processes at once", "SO_FAR": "training on what there is"}.get(way, way)
    tally.add(f"{what} during {stage}", *counts[stage])
    assert counts == {stage: [times, times]}, said
