"""The GPU script runs from end to end on the CPU at tiny shapes, and its check can fail."""

import json
from pathlib import Path

import pytest
import torch

from ksvd_sae.bench import gpu
from ksvd_sae.learning.sparse_coding import Code, matching_pursuit

ROW = {
    *("suite", "case", "impl", "backend", "device", "threads", "n", "d", "m", "k", "dtype"),
    *("median_s", "q20_s", "q80_s", "fvu", "peak_mib", "floor_s", "commit", "versions"),
}


def test_smoke_run_appends_whole_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bench" / "gpu.jsonl"
    for _ in range(2):
        gpu.main("cpu", small=True, output=output)
    rows = [json.loads(line, parse_constant=pytest.fail) for line in output.read_text().splitlines()]
    once = ["coding"] * 6 + ["update", "update", "batch", "batch", "train", "train"]
    assert [row["suite"] for row in rows] == once * 2
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert {row["config"] for row in rows if row["suite"] == "coding"} == {"mp", "mp_refit", "omp", "ormp"}
    for row in rows:
        assert row.keys() >= ROW
        assert row["impl"] == "ksvd_sae"
        assert 0 < row["q20_s"] <= row["median_s"] <= row["q80_s"]
        assert 0 < row["fvu"] < 1
    assert "checks: passed" in capsys.readouterr().out


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
