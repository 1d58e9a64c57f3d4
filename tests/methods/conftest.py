"""What tests of SAEs from the Hub start from."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny_hub import new_sessions, offline_hub


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The Hub's cache, offline."""
    offline_hub(tmp_path / "hub", monkeypatch)
    yield tmp_path / "hub"
    monkeypatch.undo()
    new_sessions()
