"""The benchmark of learning by several processes: a smoke run, and what it counts and predicts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ksvd_sae.bench import processes
from ksvd_sae.bench.processes import LARGE, SMALL, UPDATES
from tests.bench.test_suites import FIELDS


def test_a_smoke_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    processes.main(tmp_path / "processes.jsonl", small=True)
    assert "efficiency" in capsys.readouterr().out
    found = [json.loads(line) for line in (tmp_path / "processes.jsonl").read_text().splitlines()]
    cases = [(row["case"], row["config"]) for row in found]
    assert cases == [(f"{case} {size}", update) for size in (1, 2) for case in ("strong", "weak") for update in UPDATES]
    by_case = dict(zip(cases, found, strict=True))
    for row in found:
        assert row.keys() >= FIELDS
        assert (row["sent_bytes"] > 0, row["messages"] > 0) == (row["processes"] > 1,) * 2
        assert row["n"] == SMALL.n * (row["processes"] if "weak" in row["case"] else 1)
    for update, sweeps in zip(UPDATES, (1, 2), strict=True):
        assert by_case["strong 2", update]["fvu"] == pytest.approx(by_case["strong 1", update]["fvu"], rel=1e-3)
        # What docs/processes.md says: of each atom its gradient and products with all, and then itself.
        sums = sweeps * 4 * SMALL.m * (SMALL.d + SMALL.m + SMALL.d)
        assert sums < by_case["strong 2", update]["sent_bytes"] < 1.5 * sums


def test_what_is_predicted() -> None:
    table = processes.prediction()
    assert all(word in table for word in ("| gram |", "| **sending** |", "64 GPUs"))
    # Slower networks tell, and each holds less; the Gram matrix stays.
    assert processes.sending_s(LARGE, 64) > processes.sending_s(LARGE, 8)
    held = [sum(processes.memory_bytes(LARGE, gpus).values()) for gpus in (1, 8, 64)]
    assert held == sorted(held, reverse=True)
    assert held[-1] > 2 * LARGE.m**2
    twice, once = (processes.sent_bytes(replace(LARGE, m=m)) for m in (2 * LARGE.m, LARGE.m))
    assert twice[1] == 2 * once[1]
    assert twice[2] > 3 * once[2]
