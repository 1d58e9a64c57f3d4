"""Runs suites by name and appends their rows to results/bench/<suite>.jsonl."""

import logging
from importlib import import_module
from pathlib import Path
from typing import Any

from ksvd_sae.bench import peers, rows
from ksvd_sae.bench.settings import SUITES, Settings

logger = logging.getLogger(__name__)


def run(names: tuple[str, ...], settings: Settings, folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the suites, appended as each ends, and messages of peers that failed.

    Raises: MissingExtraError, before anything is measured, if a peer that was asked for is not installed.
    """
    if unknown := [name for name in names if name not in SUITES]:
        raise ValueError(f"no such suites: {unknown}")
    peers.require(peers.chosen(settings.peers, frozenset(names)))
    measured, failures = [], []
    for name in names:
        logger.info("bench %s", name)
        outcome = import_module(f"ksvd_sae.bench.{name}").run(settings)
        rows.append(folder / f"{name}.jsonl", outcome.rows)
        measured += outcome.rows
        failures += [f"{name}: {failure}" for failure in outcome.failures]
    return measured, failures
