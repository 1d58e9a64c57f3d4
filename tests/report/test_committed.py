"""The results in the repository: whole, small, and what they say follows from what they keep."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.command_line import REPOSITORY
from tests.recompute import check_recomputable

RESULTS = REPOSITORY / "results"
RUNS = sorted(path.parent.name for path in RESULTS.glob("*/comparison.csv"))
# Run before raw results were kept whole: what these evals wrote was left out for its size. Their scores are in
# comparison.csv.
NOT_KEPT = {"demo-full": frozenset({"heldout", "core", "autointerp"})}


@pytest.mark.parametrize("name", RUNS)
def test_tables_follow_from_what_is_kept(name: str, tmp_path: Path) -> None:
    check_recomputable(RESULTS / name, tmp_path, NOT_KEPT.get(name, frozenset()))


def test_measured_rows_are_of_commits() -> None:
    found = {
        path: [json.loads(line)["commit"] for line in path.read_text().splitlines()]
        for path in RESULTS.glob("*/*.jsonl")
    }
    names = {path.relative_to(RESULTS).with_suffix("").as_posix(): commits for path, commits in found.items()}
    dirty = {name: n for name, commits in names.items() if (n := sum(commit.endswith("+") for commit in commits))}
    assert dirty == {}, "measure them again from a clean checkout"


def test_there_are_runs() -> None:
    assert {"demo", *NOT_KEPT} <= set(RUNS)


def test_they_are_few_and_small() -> None:
    """A clone stays quick, and a change of results can be read."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "results"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    sizes = {name: (REPOSITORY / name).stat().st_size for name in listed.stdout.splitlines()}
    assert len(sizes) <= 150
    assert sum(sizes.values()) <= 25e6
    assert max(size for name, size in sizes.items() if name.endswith("report.html")) < 2e6
