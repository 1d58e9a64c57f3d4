"""Tables from rows, and the command that prints them."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ksvd_sae.bench import rows, tables
from ksvd_sae.bench.gpu import GOALS
from ksvd_sae.bench.rows import Who, row
from ksvd_sae.cli import app

SIZES: dict[str, Any] = {"d": 8, "m": 16, "k": 2, "warmups": 1, "seed": 0, "floor_s": 0.5}


def coding(impl: str, seconds: list[float], n: int = 100, **facts: Any) -> dict[str, Any]:
    fields = {"fvu": 0.25, "peak_mib": 12.3, "fvu_common": 0.2, "n_common": 50, "case_n": 100, **SIZES, **facts}
    note = "slow" if n < 100 else None
    return row("coding", "planted", Who(impl, "omp", "C++", note=note), n=n, seconds=seconds, **fields)


def cells(text: str, start: str) -> list[list[str]]:
    """The rows of the first table after a heading."""
    lines = text.split(start, 1)[1].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    table = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def test_fastest_first_scaled_and_annotated(tmp_path: Path) -> None:
    rows.append(tmp_path / "coding.jsonl", [coding("slow", [5.0], n=50), coding("ksvd_sae", [1.0, 2.0, 3.0])])
    text = tables.render(tmp_path)
    head, _, *body = cells(text, "## coding")
    assert [line[0] for line in body] == ["**ksvd_sae**", "slow"]
    slow = dict(zip(head, body[1], strict=True))
    assert slow["samples/s ↑"] == "10"
    assert slow["seconds ↓"] == "10"  # 5 s for half of the samples
    assert slow["samples timed"] == "50"
    assert slow["FVU ↓"] == "0.2000"
    assert slow["of floor"] == "10%"
    assert "FVU on the same 50 samples for all" in text
    assert "- slow, omp: slow." in text


def test_the_last_of_equal_rows_counts(tmp_path: Path) -> None:
    again = [coding("spams", [4.0]), coding("spams", [1.0]), coding("spams", [2.0], case_n=200, n=200)]
    rows.append(tmp_path / "coding.jsonl", again)
    assert [row["median_s"] for row in tables.latest(again)] == [1.0, 2.0]
    text = tables.render(tmp_path)
    assert text.count("### planted") == 2
    assert "4.00" not in text


def test_scaling_shows_exponents_and_flat_memory(tmp_path: Path) -> None:
    found = []
    for n in (10, 20, 40, 80):
        facts = {"fvu": 0.1, "peak_mib": 5 + n / 100, "output_mib": n / 100, "varied": "n", **SIZES}
        found.append(row("scaling", f"n = {n}", Who("ksvd_sae", "mp", "numba"), n=n, seconds=[n * 0.01], **facts))
    rows.append(tmp_path / "scaling.jsonl", found)
    text = tables.render(tmp_path)
    head, _, body = cells(text, "## scaling")
    line = dict(zip(head, body, strict=True))
    assert (line["variable"], line["from"], line["to"]) == ("n", "10", "80")
    assert line["exponent of time"] == "1.00 ± 0.00"
    assert line["R² of a line"] == "1.000"
    assert "mp: memory beyond the code itself 5.0 MiB at n = 10, 5.0 MiB at n = 80." in text


def test_rows_of_the_gpu_script_without_the_newer_fields(tmp_path: Path) -> None:
    old = {
        "suite": "coding",
        "case": "gemma",
        "device": "H200",
        "backend": "torch",
        "commit": "abc",
        "impl": "ksvd_sae",
    }
    old |= {"n": 8, "d": 4, "m": 4, "k": 2, "median_s": 0.1, "fvu": 0.5, "peak_mib": None, "floor_s": None}
    rows.append(tmp_path / "gpu.jsonl", [old])
    _, _, body = cells("\n\n| suite" + tables.render(tmp_path).split("| suite")[1], "\n")
    assert body == [
        "coding",
        "gemma",
        "H200",
        "",
        "",
        "torch",
        "8",
        "4",
        "4",
        "2",
        "100",
        "n/a",
        "0.5000",
        "n/a",
        "abc",
    ]


def test_goals_of_the_gpu_are_reached_missed_or_not_measured(tmp_path: Path) -> None:
    rows.append(tmp_path / "coding.jsonl", [coding("spams", [1.0])])
    text = tables.render(tmp_path)
    assert text.count("| not measured") == len(GOALS)
    batch, training = (next(goal for goal in GOALS if goal.suite == suite) for suite in ("batch", "train"))
    found = []
    runs = ((batch, "H200", 0.9), (batch, "H200", 0.013), (training, "H200", 11), (batch, "cpu", 0.001))
    for goal, device, seconds in runs:
        facts = {"suite": goal.suite, "case": goal.case, "config": goal.config, "device": device, "backend": "triton"}
        facts |= {"dtype": f"float{len(found)}", "commit": "abc", "impl": "ksvd_sae", "n": 8, "d": 4, "m": 4, "k": 2}
        found.append({**facts, "median_s": seconds, "fvu": 0.5, "peak_mib": None, "floor_s": None})
    rows.append(tmp_path / "gpu.jsonl", found)
    text = tables.render(tmp_path)
    assert text.count("| not measured") == len(GOALS) - 2
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ") and "≤" in line}
    assert [cell.strip() for cell in lines[batch.what].split("|")[2:5]] == ["13 ms, float1", "yes", "H200"]
    assert [cell.strip() for cell in lines[training.what].split("|")[3:5]] == ["no", "H200"]


# ---------------------------------------------------------------- the command


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    names = ("ksvd_sae", "transformers", "datasets", "transformer_lens", "sae_lens", "httpx")
    levels = {name: logging.getLogger(name).level for name in names}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, was in levels.items():
        logging.getLogger(name).setLevel(was)


def invoke(*words: str) -> Any:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, ["bench", *words])


def test_command_measures_and_tabulates(tmp_path: Path) -> None:
    results = ("--results", str(tmp_path))
    done = invoke("coding", "--small", "--peers", "none", "--repeats", "1", *results)
    assert done.exit_code == 0, done.output
    found = [json.loads(line) for line in (tmp_path / "bench" / "coding.jsonl").read_text().splitlines()]
    assert f"{len(found)} rows in" in done.stdout
    assert {row["impl"] for row in found} == {"ksvd_sae"}
    nonnegative = {"mp, non-negative", "omp, non-negative"}
    assert {row["config"] for row in found} == {"mp", "mp_refit", "omp", "ormp", *nonnegative}
    done = invoke("table", "--write", *results)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "bench" / "README.md").read_text() in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("table",), "no rows in"),
        (("coding", "--small", "--peers", "spasm"), "'spasm' is not known"),
        (("update", "--small", "--peers", "spams"), "'spams' has nothing to measure there"),
        (("coding", "--samples", "0", "--small"), "must be at least 1"),
    ],
)
def test_command_says_what_is_wrong(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    done = invoke(*words, "--results", str(tmp_path))
    assert done.exit_code == 1
    assert message in done.stderr
    assert "Traceback" not in done.output


def test_a_failed_peer_ends_the_command_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> tuple[list[Any], list[str]]:
        return [], ["coding: spams omp: ValueError: theirs"]

    monkeypatch.setattr("ksvd_sae.bench.suites.run", run)
    done = invoke("coding", "--small", "--results", str(tmp_path))
    assert done.exit_code == 1
    assert "FAILED: coding: spams omp: ValueError: theirs" in done.stderr
