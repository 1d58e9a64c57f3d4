"""The GPU script runs from end to end on the CPU at tiny shapes, and its check can fail."""

import json
from pathlib import Path

import pytest
import torch

from ksvd_sae.bench import gpu, gpu_model
from ksvd_sae.learning.sparse_coding import Code, matching_pursuit

ROW = {
    *("suite", "case", "impl", "backend", "device", "threads", "n", "d", "m", "k", "dtype"),
    *("median_s", "q20_s", "q80_s", "fvu", "peak_mib", "floor_s", "commit", "versions"),
}


def test_smoke_run_appends_whole_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bench" / "gpu.jsonl"
    for _ in range(2):
        gpu.main("cpu", small=True, output=output, minutes=5)
    rows = [json.loads(line, parse_constant=pytest.fail) for line in output.read_text().splitlines()]
    suites = [row["suite"] for row in rows]
    assert suites[: len(suites) // 2] == suites[len(suites) // 2 :]
    assert set(suites) == {"coding", "update", "batch", "train", "stage", "ceiling", "harvest"}
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16"}
    assert {row["config"] for row in rows if row["suite"] == "coding"} == {"mp", "mp_refit", "omp", "ormp"}
    for row in rows:
        assert row.keys() >= ROW
        assert row["impl"] == "ksvd_sae" or row["suite"] == "harvest"
        assert 0 < row["q20_s"] <= row["median_s"] <= row["q80_s"]
        if row["suite"] in ("coding", "update", "batch", "train"):
            assert 0 < row["fvu"] < 1
            assert row["floor_s"] > 0
    assert {row["config"] for row in rows if row["suite"] == "stage"} >= {"gram", "leave", "redraw"}
    shown = capsys.readouterr().out
    assert "checks: passed" in shown
    assert "launches: none tried, as it runs on CUDA devices" in shown
    assert "Self CPU" in (output.parent / "gpu-profile.txt").read_text()


def test_a_deadline_leaves_out_what_there_is_no_time_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock of which each look takes a minute: one at the beginning, one before each step."""
    now = iter(range(0, 100_000, 60))
    monkeypatch.setattr(gpu, "monotonic", lambda: next(now))
    gpu.main("cpu", small=True, output=tmp_path / "gpu.jsonl", minutes=3)
    shown = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [row["suite"] for row in rows] == ["batch", "coding"]
    assert "train bfloat16: left out, the time is over" in shown
    assert "counters: left out" in shown


def test_a_step_that_fails_leaves_the_others_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(gpu.Bench, "stages", broken)
    with pytest.raises(SystemExit):
        gpu.main("cpu", small=True, output=tmp_path / "gpu.jsonl", minutes=5)
    suites = {json.loads(line)["suite"] for line in (tmp_path / "gpu.jsonl").read_text().splitlines()}
    assert suites == {"coding", "update", "batch", "train", "harvest", "ceiling"}
    assert "stages: RuntimeError: CUDA error: an illegal memory access" in capsys.readouterr().out


def test_one_step(tmp_path: Path) -> None:
    gpu.main("cpu", small=True, output=tmp_path / "gpu.jsonl", minutes=5, only="omp")
    (line,) = (tmp_path / "gpu.jsonl").read_text().splitlines()
    assert json.loads(line)["config"] == "omp"


def test_the_model_counts_what_it_says() -> None:
    shape = gpu.PAPER[0]
    n, d, m, k = 65_536, 2304, 4096, 20
    by_name = {stage.name: stage for stage in gpu_model.stages(shape, "bfloat16")}
    assert by_name["products"].bfloat16_flops == 2 * n * m * d
    assert by_name["pursuit"].gathered_bytes == pytest.approx(2 * n * k * m, rel=0.01)
    assert by_name["leave"].gathered_bytes == 4 * n * k * d
    # Gradients, and the lower triangle of XᵀX in blocks of 1,024 rows: 10 of 16 blocks.
    assert by_name["sums"].bfloat16_flops == pytest.approx(2 * n * m * d + 2 * n * m * m * 10 / 16, rel=0.05)
    assert gpu_model.predicted_s(shape, "bfloat16") == pytest.approx(sum(stage.seconds for stage in by_name.values()))
    assert gpu_model.predicted_s(shape, "float32") > gpu_model.predicted_s(shape, "bfloat16")
    for line in ("| products |", "| **batch** |"):
        assert line in gpu_model.as_table(shape)


def test_a_coder_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_in_float32(x_BD: torch.Tensor, atoms_MD: torch.Tensor, k: int, **options: object) -> Code:
        code = matching_pursuit(x_BD, atoms_MD, k)
        return code if x_BD.dtype == torch.float64 else Code(code.values_BK * 1.01, code.support_BK)

    monkeypatch.setattr(gpu, "matching_pursuit", wrong_in_float32)
    problems = gpu.check(torch.device("cpu"))
    assert any(problem.startswith("mp:") for problem in problems)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    assert torch.cuda.is_available(), "this test was asked for (-m gpu) on a machine without a GPU"
    assert gpu.check(torch.device("cuda")) == []
