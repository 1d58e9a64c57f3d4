"""Curves of the eval truth: a point a value, dictionary and world, each measured once."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ksvd_sae.errors import ConfigError, EvaluationError
from ksvd_sae.report.curves import write_curves
from ksvd_sae.run.config import RunConfig
from ksvd_sae.run.curves import load_curves, measure_curves
from ksvd_sae.run.find_config import shipped_configs
from ksvd_sae.run.grid import load_study
from ksvd_sae.run.rows import Rows

BASE: dict[str, Any] = {
    "device": "cpu",
    "model": {"name": "some/model", "hook": "blocks.0.hook_resid_post"},
    "text": {"source": "hub", "dataset": "owner/some-texts"},
    "harvest": {"train_tokens": 2000, "heldout_tokens": 500, "context_tokens": 12, "gradient_tokens": 100},
    "dictionaries": {
        "learned": {"kind": "db_ksvd", "n_atoms": 24, "k": 3},
        "fisher": {"kind": "db_ksvd", "n_atoms": 24, "k": 3, "weighting": "fisher_diag"},
        "pca": {"kind": "pca", "k": 3},
    },
    "evaluation": {
        "seeds": [0, 1],
        "truth": {"world": "tiny", "train_samples": 1500, "test_samples": 1000, "n_atoms": 64},
    },
}
BOTH = ["learned", "pca"]
CURVES: dict[str, Any] = {
    "samples": {"set": ["evaluation.truth.train_samples"], "values": [300, 1500], "dictionaries": BOTH},
    "budget": {
        "set": ["evaluation.truth.k"],
        "values": [2, 8],
        "dictionaries": ["learned"],
        "seeds": [5],
        "against": "l0",
    },
    "bound": {
        "set": ["dictionaries.learned.coherence"],
        "values": [None, 0.5],
        "overrides": ["evaluation.truth.twice=true"],
        "dictionaries": ["learned"],
        "seeds": [0],
    },
    "stop": {"set": ["dictionaries.learned.tau"], "values": [0, 0.3], "dictionaries": BOTH, "logarithmic": False},
}


def write(folder: Path, curves: dict[str, Any] = CURVES, base: dict[str, Any] = BASE) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    path = folder / "tiny-curves.yaml"
    path.write_text(yaml.safe_dump({"base": "base.yaml", "curves": curves}, sort_keys=False))
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KSVD_SAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_point_for_each_value_dictionary_and_world(tmp_path: Path, cache: Path) -> None:
    config, runs = load_curves(write(tmp_path))
    rows = Rows(tmp_path / "rows.jsonl")
    measured = measure_curves(config, runs, rows, cache)
    assert [(row["curve"], row["value"], row["dictionary"], row["seed"]) for row in measured] == [
        *(("samples", n, name, seed) for n in (300, 1500) for seed in (0, 1) for name in BOTH),
        *(("budget", k, "learned", 5) for k in (2, 8)),
        *(("bound", bound, "learned", 0) for bound in (None, 0.5)),
        *(("stop", tau, name, seed) for tau in (0, 0.3) for seed in (0, 1) for name in BOTH),
    ]
    scores = {(row["curve"], row["value"], row["dictionary"], row["seed"]): row for row in measured}
    assert scores["budget", 2, "learned", 5]["l0"] == pytest.approx(2)
    assert scores["budget", 8, "learned", 5]["l0"] == pytest.approx(8)
    assert scores["stop", 0.3, "learned", 0]["l0"] < scores["stop", 0, "learned", 0]["l0"] - 1
    # What a key does not touch stays, digit by digit: worlds and trainings are drawn by seeds alone.
    for name, seed in (("learned", 0), ("learned", 1), ("pca", 0)):
        same = [scores[curve, value, name, seed]["f1"] for curve, value in (("samples", 1500), ("stop", 0))]
        assert same[0] == same[1]
    assert 0 < scores["bound", None, "learned", 0]["stable_fraction"] < 1
    assert "stable_fraction" not in scores["stop", 0, "learned", 0]
    assert scores["bound", None, "learned", 0]["f1"] == scores["stop", 0, "learned", 0]["f1"]
    assert scores["samples", 1500, "learned", 0]["f1"] != scores["samples", 300, "learned", 0]["f1"]
    assert not list(cache.glob("activations/*")), "no language model has run"

    before = (tmp_path / "rows.jsonl").read_text()
    assert measure_curves(config, runs, rows, cache) == measured
    assert (tmp_path / "rows.jsonl").read_text() == before
    changed = {**BASE, "dictionaries": {**BASE["dictionaries"], "pca": {"kind": "pca", "k": 3, "view": "split"}}}
    measure_curves(*load_curves(write(tmp_path, base=changed)), rows, cache)
    assert (tmp_path / "rows.jsonl").read_text() == before, "how codes are shown changes none"


def test_table_and_figure(tmp_path: Path, cache: Path) -> None:
    plot, n_points = write_curves(*load_curves(write(tmp_path)), tmp_path / "results")
    folder = tmp_path / "results" / "tiny-curves"
    assert (plot, n_points) == (folder / "curves.png", 20)
    assert plot.stat().st_size > 10_000
    table = (folder / "table.md").read_text()
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    few = [row["f1"] for row in rows if (row["curve"], row["value"], row["dictionary"]) == ("samples", 300, "learned")]
    line = next(line for line in table.splitlines() if line.startswith("|") and "300" in line and "learned" in line)
    assert f"{sum(few) / 2:.3f} ± " in line
    assert "`dictionaries.learned.tau`" in table
    assert "`dictionaries.learned.coherence`, `evaluation.truth.twice=true`" in table
    assert [" stable |" in part for part in table.split("## ")[1:]] == [False, False, True, False]
    assert any(line.startswith("| none ") for line in table.splitlines())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dictionaries": ["learnt"]}, r"(?s)no dictionary 'learnt' that can be learned in a world.*learned, pca"),
        ({"dictionaries": ["fisher"]}, "no dictionary 'fisher' that can be learned"),
        ({"set": ["evaluation.truth.k_factor"]}, "unknown key 'evaluation.truth.k_factor'"),
        ({"sett": []}, "(?s)reading curves.*sett.*truth-curves"),
        ({"values": []}, "(?s)reading curves.*values"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_learned(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_curves(write(tmp_path, {"samples": {**CURVES["samples"], **changes}}))


def test_a_base_without_the_eval(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"base\.yaml has no evaluation\.truth"):
        load_curves(write(tmp_path, base={**BASE, "evaluation": {}}))


def test_a_point_that_fails_leaves_the_others(tmp_path: Path, cache: Path) -> None:
    config, runs = load_curves(write(tmp_path, {"budget": {**CURVES["budget"], "values": [2, 70]}}))
    with pytest.raises(EvaluationError, match="k = 70 is too large"):
        measure_curves(config, runs, Rows(tmp_path / "rows.jsonl"), cache)
    assert len(Rows(tmp_path / "rows.jsonl").all()) == 1


def test_those_that_come_with_the_package() -> None:
    found = [name for name, path in shipped_configs().items() if "curves" in yaml.safe_load(path.read_text())]
    assert {"truth-curves", "truth-rates", "truth-rule"} <= set(found)
    for name in found:
        config, runs = load_curves(name)
        assert config.name == name
        assert all(isinstance(run, RunConfig) for points in runs.values() for _, run in points)
    with pytest.raises(ConfigError):
        load_study("truth-curves")
