"""The instruments: timing, memory, ceilings and fits."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ksvd_sae.bench import ceilings
from ksvd_sae.bench.measure import Job, limited_threads, measure
from ksvd_sae.bench.problems import Shape, initial_atoms, planted, planted_problem
from ksvd_sae.bench.rows import Who, append, read, row
from ksvd_sae.bench.scaling import slope
from ksvd_sae.bench.settings import Settings
from ksvd_sae.errors import ConfigError, ManifestError, ShapeError
from ksvd_sae.memory import peak_growth
from tests.tolerances import RSS_MIB, TEMPORARY_MIB

CPU = torch.device("cpu")


def job(name: str, calls: list[str], seconds: float = 0.0) -> Job:
    def call(given: int) -> int:
        calls.append(name)
        time.sleep(seconds)
        return given + 1

    return Job(Who(name, "x", "numpy"), 10, call, lambda result: {"fvu": result}, lambda: 41)


def test_implementations_take_turns() -> None:
    calls: list[str] = []
    both = measure([job("a", calls), job("b", calls)], 3, [])
    assert calls == ["a", "b", *["a", "b"] * 3]
    assert [len(m.seconds) for m in both] == [3, 3]
    assert [m.scores for m in both] == [{"fvu": 42}] * 2


def test_the_first_call_can_count() -> None:
    calls: list[str] = []
    (timed,) = measure([job("a", calls, 0.01)], 1, [], time_first=True)
    assert calls == ["a"]
    assert 0.01 <= timed.seconds[0] < 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the meter is Linux's")
def test_peak_memory_sees_what_is_freed_again() -> None:
    def call() -> int:
        np.ones(TEMPORARY_MIB << 17)  # float64: 2^17 of them are a MiB
        return 7

    result, peak_mib = peak_growth(call, CPU)
    assert result == 7
    assert peak_mib == pytest.approx(TEMPORARY_MIB, abs=RSS_MIB)
    _, nothing_mib = peak_growth(lambda: None, CPU)
    assert nothing_mib is not None
    assert nothing_mib < RSS_MIB


def test_floors_are_the_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rates of anything between a busy core and a large server.
    assert 1e5 < ceilings.gemm_flop_per_s(64, 32, 48, CPU) < 1e15
    assert 1e5 < ceilings.copy_bytes_per_s(1 << 16, CPU) < 1e15
    monkeypatch.setattr(ceilings, "gemm_flop_per_s", lambda *_: 1e9)
    monkeypatch.setattr(ceilings, "copy_bytes_per_s", lambda *_: 1e6)
    shape = Shape("", n=100, d=32, m=64, k=4)
    assert ceilings.coding_floor_s(shape, CPU) == pytest.approx(2 * 100 * 64 * 32 / 1e9 + 4 * 100 * 4 * 64 / 1e6)
    assert ceilings.update_floor_s(shape, CPU) == pytest.approx(12 * 100 * 4 * 32 / 1e6)


def test_the_fit_finds_an_exponent() -> None:
    x = [1, 2, 4, 8]
    exact = slope(x, [3 * value**1.5 for value in x])
    assert exact is not None
    assert exact.exponent == pytest.approx(1.5)
    assert exact.interval == pytest.approx(0, abs=1e-6)
    straight = slope(x, [5.0 + 2 * value for value in x])
    assert straight is not None
    assert (straight.per_unit, straight.r_squared) == pytest.approx((2, 1))
    assert slope(x[:2], [1.0, 2.0]) is None


def test_planted_samples_and_the_heldout_ones_are_of_the_same_atoms() -> None:
    problem = planted_problem(Shape("", 200, 16, 24, 3), 50, seed=1)
    x_ND, atoms_MD = planted(Shape("", 250, 16, 24, 3), seed=1)
    torch.testing.assert_close(torch.cat([problem.x_ND, problem.heldout_ND]) + problem.centre_D, x_ND)
    assert torch.equal(problem.atoms_MD, atoms_MD)
    with pytest.raises(ShapeError, match="fewer nonzero samples than atoms"):
        initial_atoms(torch.eye(3), 4, seed=0)


def test_threads_are_limited_and_given_back() -> None:
    before = torch.get_num_threads()
    with limited_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_a_row_has_medians_quantiles_and_no_nan(tmp_path: Path) -> None:
    who = Who("peer", "omp", "C++", packages=("numpy",))
    fields = row(
        *("coding", "planted", who),
        **{"n": 10, "d": 2, "m": 3, "k": 1},
        seconds=[5.0, 1.0, 2.0, 3.0, 4.0, 6.0],
        warmups=1,
        seed=0,
        fvu=float("nan"),
        peak_mib=None,
        floor_s=float("inf"),
        extra=1,
    )
    assert (fields["q20_s"], fields["median_s"], fields["q80_s"], fields["repeats"]) == (2.0, 3.5, 5.0, 6)
    assert fields["fvu"] is None
    assert fields["floor_s"] is None
    assert fields["versions"]["numpy"] == np.__version__
    path = tmp_path / "bench" / "coding.jsonl"
    for _ in range(2):
        append(path, [fields])
    assert read(path) == [fields, fields]
    path.write_text("{}\n{")
    with pytest.raises(ManifestError, match="line 2: not JSON"):
        read(path)
    path.write_text("[1]\n")
    with pytest.raises(ManifestError, match="line 1: not a row"):
        read(path)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="no such data"):
        Settings(data="images")
    with pytest.raises(ConfigError, match="--samples: must be at least 1"):
        Settings(samples=0)
    with pytest.raises(ConfigError, match="activations have the model's dimension"):
        Settings(dim=3).problem(Shape("", 1, 1, 1, 1))
