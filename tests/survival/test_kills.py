"""Stages that are killed at random moments end, when they are run again, with the bits of an undisturbed run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import REPOSITORY
from tests.survival.conftest import Tally


@pytest.mark.parametrize(
    "kills", [8, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(3 * 3600)])], ids=str
)
def test_killed_stages(kills: int, tmp_path: Path, tally: Tally) -> None:
    command = [sys.executable, "-m", "tests.survival.kills", str(tmp_path), str(kills), str(kills)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    counts = json.loads(done.stdout)
    for stage, (tried, survived) in counts.items():
        for number in range(tried):
            tally.count(f"SIGKILL during {stage}", survived=number < survived)
    assert sum(tried for tried, _ in counts.values()) == kills
    assert all(tried == survived for tried, survived in counts.values()), done.stderr[-6000:]
