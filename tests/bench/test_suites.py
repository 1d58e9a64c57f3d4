"""Every suite runs from end to end at tiny shapes, peers included, and what they compute is right."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ksvd_sae.bench import peers, suites
from ksvd_sae.bench.measure import Job, measure
from ksvd_sae.bench.peers import PEERS
from ksvd_sae.bench.rows import OURS, Who
from ksvd_sae.bench.settings import ALL, Settings
from ksvd_sae.errors import ConfigError, MissingExtraError
from tests.tolerances import PEER_FVU, PEER_UPDATE_FVU

FIELDS = {
    *("suite", "case", "impl", "config", "backend", "device", "threads", "n", "d", "m", "k", "dtype", "data"),
    *("median_s", "q20_s", "q80_s", "fvu", "peak_mib", "floor_s", "seed", "warmups", "repeats", "tf32"),
    *("scaled_from", "samples_per_s", "commit", "versions"),
}
# omp-gpu is built from source and SPAMS has no wheel for every machine: the development set does without them there.
INSTALLED = tuple(name for name, peer in PEERS.items() if find_spec(peer.module) is not None)

Row = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """results/bench after one smoke run of everything."""
    folder = tmp_path_factory.mktemp("results") / "bench"
    settings = Settings(data="planted", small=True, threads=1, repeats=2, peers=",".join(INSTALLED))
    _, failures = suites.run(ALL, settings, folder)
    assert failures == []
    return folder


def rows(folder: Path, suite: str) -> list[Row]:
    lines = (folder / f"{suite}.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def one(found: list[Row], impl: str, config: str, backend: str | None = None) -> Row:
    matching = [r for r in found if (r["impl"], r["config"]) == (impl, config) and backend in (None, r["backend"])]
    assert len(matching) == 1, [(r["impl"], r["config"], r["backend"]) for r in found]
    return matching[0]


def test_peers_that_need_no_compiler_are_here() -> None:
    assert {"dictlearn", "scikit-learn", "sae-lens"} <= set(INSTALLED)


@pytest.mark.parametrize("suite", ALL)
def test_rows_are_whole(folder: Path, suite: str) -> None:
    for row in rows(folder, suite):
        assert row.keys() >= FIELDS
        assert row["suite"] == suite
        assert 0 < row["q20_s"] <= row["median_s"] <= row["q80_s"]
        assert row["fvu"] is None or 0 < row["fvu"] < 1
        assert row["samples_per_s"] == pytest.approx(row["n"] / row["median_s"])
        assert row["versions"]["torch"]
        if Path("/proc/self/clear_refs").exists():
            assert row["peak_mib"] >= 0


@pytest.mark.parametrize("suite", ["coding", "update", "train"])
def test_every_peer_asked_for_has_its_rows(folder: Path, suite: str) -> None:
    able = {name for name in INSTALLED if suite in PEERS[name].suites}
    assert {row["impl"] for row in rows(folder, suite)} == {OURS, *able}
    for row in rows(folder, suite):
        if row["impl"] != OURS:
            assert PEERS[row["impl"]].package in row["versions"]


def test_all_omp_implementations_reach_the_same_error(folder: Path) -> None:
    found = rows(folder, "coding")
    wanted = {coder: one(found, OURS, coder, "torch")["fvu"] for coder in ("omp", "ormp")}
    omps = [row for row in found if row["config"] == "omp"]
    assert {row["impl"] for row in omps} == {OURS, *INSTALLED} - {"sae-lens"}
    for row in omps:
        # What SPAMS calls OMP picks by error.
        same = wanted["ormp" if row["impl"] == "spams" else "omp"]
        assert row["fvu"] == pytest.approx(same, rel=PEER_FVU), row["impl"]


@pytest.mark.parametrize(("config", "backend"), [("mp", "torch"), ("mp, non-negative", None)])
def test_code_of_sae_lens_is_that_of_matching_pursuit(folder: Path, config: str, backend: str | None) -> None:
    """With as many steps as atoms allowed it repeats picks that ours may add to: no better, and not far worse."""
    found = rows(folder, "coding")
    ours, theirs = one(found, OURS, config, backend)["fvu"], one(found, "sae-lens", config)["fvu"]
    assert ours <= theirs < 1.5 * ours


def test_exact_updates_agree(folder: Path) -> None:
    """K-SVD one atom after the other, in the order of the rows, by two implementations."""
    found = rows(folder, "update")
    ours, theirs = one(found, OURS, "exact, 1 at a time"), one(found, "dictlearn", "ksvd")
    assert theirs["fvu"] == pytest.approx(ours["fvu"], rel=PEER_UPDATE_FVU)
    for row in (ours, theirs, one(found, OURS, "sweep")):
        assert row["fvu"] < row["fvu_before"]


def test_training_lowers_the_error_and_the_curve_ends_at_it(folder: Path) -> None:
    found = rows(folder, "train")
    ours = [row for row in found if row["impl"] == OURS]
    assert [row["passes"] for row in ours] == sorted(row["passes"] for row in ours)
    assert ours[-1]["fvu"] < ours[0]["fvu"]
    for row in ours:
        seconds, samples, error = row["curve"][-1]
        assert error == row["fvu"]
        assert samples == row["samples_seen"] == row["passes"] * row["n"]
        assert seconds <= row["q80_s"] + row["q20_s"]
    for row in found:
        if row["impl"] != OURS:
            reached = [seconds for seconds, _, error in ours[-1]["curve"] if error <= row["fvu"]]
            assert row["ours_s"] == (reached[0] if reached else None)


def test_scaling_varies_one_at_a_time(folder: Path) -> None:
    for row in rows(folder, "scaling"):
        assert row["case"] == f"{row['varied']} = {row[row['varied']]}"
    sizes = {(row["n"], row["d"], row["m"], row["k"]) for row in rows(folder, "scaling")}
    base = (128, 32, 64, 4)
    assert all(sum(a != b for a, b in zip(base, other, strict=True)) <= 1 for other in sizes)


# ---------------------------------------------------------------- peers


def test_slow_implementations_get_fewer_samples(tmp_path: Path) -> None:
    settings = Settings(data="planted", small=True, samples=512, repeats=1, peers="scikit-learn", budget_s=1e-9)
    found, _ = suites.run(("coding",), settings, tmp_path)
    row = one(found, "scikit-learn", "omp")
    assert (row["n"], row["case_n"], row["scaled_from"], row["n_common"]) == (128, 512, 128, 128)


def test_missing_peers_end_the_run_before_it_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    absent = peers.Peer("spams_peer", "no_such_module", "no-such-package", frozenset({"coding"}))
    monkeypatch.setitem(PEERS, "spams", absent)
    with pytest.raises(MissingExtraError, match=r"spams") as caught:
        suites.run(ALL, Settings(data="planted", small=True), tmp_path)
    assert "pip install 'ksvd-sae[bench]'" in str(caught.value)
    assert "no-such-package" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_peers_are_chosen_by_name() -> None:
    coding, update = frozenset({"coding"}), frozenset({"update"})
    assert peers.chosen("none", coding) == ()
    assert peers.chosen("all", update) == ("dictlearn", "sae-lens")
    assert peers.chosen("sae-lens, dictlearn", update) == ("sae-lens", "dictlearn")
    with pytest.raises(ConfigError, match="'spams' has nothing to measure"):
        peers.chosen("spams", update)
    with pytest.raises(ConfigError, match="'spasm' is not known"):
        peers.chosen("spasm", coding)


def test_a_peer_that_fails_is_named_and_costs_nobody_else() -> None:
    def broken(_: Any) -> None:
        raise ZeroDivisionError("theirs")

    failures: list[str] = []
    good = Job(Who("good", "x", "numpy"), 1, lambda _: 1, lambda _: {})
    bad = Job(Who("bad", "x", "numpy"), 1, broken, lambda _: {})
    assert [m.job for m in measure([bad, good], 1, failures)] == [good]
    assert failures == ["bad x (numpy, float32): ZeroDivisionError: theirs"]
    with pytest.raises(ZeroDivisionError):
        measure([Job(Who(OURS, "x", "torch"), 1, broken, lambda _: {})], 1, failures)
