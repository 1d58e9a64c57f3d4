"""Counts of what was tried and what survived, for results/reliability.json."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.command_line import REPOSITORY

COUNTS = REPOSITORY / "results" / "reliability.json"


@dataclass
class Tally:
    """test -> (tried, survived)."""

    counts: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, test: str, tried: int, survived: int) -> None:
        before = self.counts.get(test, (0, 0))
        self.counts[test] = before[0] + tried, before[1] + survived

    def count(self, test: str, survived: bool) -> None:
        self.add(test, 1, survived)

    def write(self, path: Path) -> None:
        """Beside the counts of other tests that are there."""
        known = {row["test"]: row for row in json.loads(path.read_text())} if path.exists() else {}
        for test, (tried, survived) in self.counts.items():
            known[test] = {"test": test, "tried": tried, "survived": survived, "lost": tried - survived}
        path.write_text(json.dumps([known[test] for test in sorted(known)], indent=1) + "\n")


@pytest.fixture(scope="session")
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """Written to results/reliability.json where that is asked for."""
    counted = Tally()
    yield counted
    if request.config.getoption("--reliability"):
        counted.write(COUNTS)
