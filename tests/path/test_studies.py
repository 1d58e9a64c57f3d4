"""`ksvd-sae study` and `ksvd-sae efficiency` with a real, tiny model: what the rows say must fit together."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command_line import EVAL_CONFIGS, ksvd_sae
from tests.path.conftest import CONFIG, SHRUNK, Workplace
from tests.tolerances import SPLICED_LOSS

KSVD: dict[str, Any] = {"kind": "db_ksvd", "n_atoms": 128, "passes": 2, "batch_samples": 2048}
TOPK: dict[str, Any] = {"kind": "topk_sae", "n_atoms": 128, "passes": 2, "batch_samples": 512}
LINEAR: dict[str, Any] = {"kind": "linear_topk", "passes": 2, "batch_samples": 512}
CODINGS = {"mp": {"coder": "mp"}, "refit": {"coder": "mp_refit"}, "omp": {"coder": "omp"}, "ormp": {"coder": "ormp"}}
LAYERS = [1, 2]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def study_file(place: Workplace) -> Path:
    harvest = {key: value for key, value in SHRUNK.items() if key.startswith(("text", "harvest", "grid"))}
    study = {
        "base": str(EVAL_CONFIGS / f"{CONFIG}.yaml"),
        "overrides": [f"{key}={value}" for key, value in harvest.items()] + ["harvest.gradient_tokens=512"],
        "layers": LAYERS,
        "k": [6],
        "seeds": [0, 1],
        "contexts": 4,
        "context_tokens": 24,
        "entries": {
            "db-ksvd": {"dictionary": KSVD, "codings": CODINGS},
            "db-ksvd-fisher": {"dictionary": {**KSVD, "weighting": "fisher_diag"}, "codings": {"mp": {"coder": "mp"}}},
            "topk-sae": {"dictionary": TOPK, "codings": {"own": None, "omp": {"coder": "omp"}}},
            "recoded": {"dictionary": {"kind": "recoded", "of": "db-ksvd", "coder": "omp"}, "layers": LAYERS[:1]},
            "linear": {"dictionary": {**LINEAR, "of": "topk-sae"}, "layers": LAYERS[:1]},
            "finetuned": {"dictionary": {"kind": "finetuned", "of": "db-ksvd", "tokens": 256}, "layers": LAYERS[:1]},
        },
    }
    path = place.folder / "tiny-study.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


@pytest.fixture(scope="module")
def measured(workplace: Workplace) -> list[dict[str, Any]]:
    """Rows of the study, run twice: the second run must have had nothing to do."""
    path = study_file(workplace)
    where = {"folder": workplace.folder, "hf_home": workplace.hf_home, "cache": workplace.folder / "cache"}
    done = ksvd_sae("study", str(path), **where)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr
    assert "34 new rows, 0 still to measure" in done.stdout
    again = ksvd_sae("study", str(path), **where)  # type: ignore[arg-type]
    assert "0 new rows, 0 still to measure" in again.stdout, again.stderr
    return rows_of(workplace.folder / "results" / "tiny-study" / "rows.jsonl")


def test_every_cell_has_its_row(measured: list[dict[str, Any]]) -> None:
    cells = [(row["entry"], row["layer"], row["seed"], row["coding"]) for row in measured]
    assert len(set(cells)) == len(cells) == 2 * 2 * (len(CODINGS) + 1 + 2) + 2 * (1 + 1 + 1)
    assert {row["weighting"] for row in measured} == {"none", "fisher_diag"}


def test_numbers_fit_together(measured: list[dict[str, Any]]) -> None:
    for row in measured:
        assert 0 < row["fvu"] < 1
        assert 0 < row["l0"] <= 6 + 1e-9
        assert row["kl"] > 0
        assert row["n_predictions"] == 4 * 23, "contexts of 24 tokens have 23 next ones"
        # Weights are random: the model knows nothing, and the ablated loss may be the lower one. The scale must fit.
        gap = row["ce_ablated"] - row["ce_clean"]
        assert row["loss_recovered"] == pytest.approx(1 - row["nats_lost"] / gap, rel=SPLICED_LOSS, abs=SPLICED_LOSS)
    for layer in LAYERS:
        here = [row for row in measured if row["layer"] == layer]
        assert len({row["ce_clean"] for row in here}) == 1
        for seed in (0, 1):
            fvu = {row["coding"]: row["fvu"] for row in here if row["entry"] == "db-ksvd" and row["seed"] == seed}
            assert fvu["mp"] > fvu["refit"] > fvu["omp"] > fvu["ormp"]


def test_one_dictionary_under_another_coder(measured: list[dict[str, Any]]) -> None:
    """An entry of another's atoms is the other under that coding, bit for bit; a SAE's own encoder is not the best."""
    fvu = {(r["entry"], r["coding"], r["seed"]): r["fvu"] for r in measured if r["layer"] == LAYERS[0]}
    seen = {(r["entry"], r["seed"]): r["samples_seen"] for r in measured if r["layer"] == LAYERS[0]}
    for seed in (0, 1):
        assert fvu["recoded", "own", seed] == fvu["db-ksvd", "omp", seed]
        assert fvu["topk-sae", "omp", seed] < fvu["topk-sae", "own", seed]
        assert seen["recoded", seed] == seen["db-ksvd", seed]
        assert seen["linear", seed] == 2 * seen["topk-sae", seed]
        # 8 contexts of 32 tokens; BOS is none of the samples.
        assert 0 < seen["finetuned", seed] - seen["db-ksvd", seed] <= 8 * 31
        assert fvu["finetuned", "own", seed] != fvu["db-ksvd", "mp", seed]
    assert {r["n_atoms"] for r in measured} == {128}


def test_seeds_differ(measured: list[dict[str, Any]]) -> None:
    by_cell: dict[Any, set[float]] = {}
    for row in measured:
        by_cell.setdefault((row["entry"], row["layer"], row["coding"]), set()).add(row["fvu"])
    assert all(len(values) == 2 for values in by_cell.values())


def test_report(workplace: Workplace, measured: list[dict[str, Any]]) -> None:
    folder = workplace.folder / "results" / "tiny-study"
    assert list(folder.glob("*.png"))
    table = "".join(path.read_text() for path in folder.glob("*.md"))
    assert all(entry in table for entry in {row["entry"] for row in measured})


def test_efficiency(workplace: Workplace) -> None:
    changes = {"dictionaries": json.dumps({"db-ksvd": {**KSVD, "k": 6}, "topk-sae": {**TOPK, "k": 6}})}
    options = ("--passes", "1", "--passes", "3")
    done = workplace.ksvd_sae("efficiency", *options, changes=changes)
    assert done.returncode == 0, done.stderr
    path = workplace.results / "rows.jsonl"
    rows = rows_of(path)
    assert workplace.ksvd_sae("efficiency", *options, changes=changes).returncode == 0
    assert rows_of(path) == rows, "nothing is measured twice"
    ours = [row for row in rows if row["dictionary"] == "db-ksvd"]
    seen = [row["samples_seen"] for row in ours]
    assert seen == sorted(seen)
    assert 0 < seen[0] <= 2048, "measured after the first batch"
    assert ours[-1]["fvu"] < ours[0]["fvu"]
    theirs = {row["samples_seen"]: row["fvu"] for row in rows if row["dictionary"] == "topk-sae"}
    assert len(theirs) == 2
    assert theirs[max(theirs)] < theirs[min(theirs)]
    # Another learning rate is another training: it gets rows of its own.
    other = {"dictionaries": json.dumps({"topk-sae": {**TOPK, "k": 6, "lr": 5e-4}})}
    assert workplace.ksvd_sae("efficiency", "--passes", "1", changes=other).returncode == 0
    assert len(rows_of(path)) == len(rows) + 1
    assert (workplace.results / "efficiency.png").exists()
