"""A study's YAML becomes cells in an order that leaves whole seeds behind, and mistakes are named."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ksvd_sae.errors import ConfigError
from ksvd_sae.methods.db_ksvd import DBKSVDMethod
from ksvd_sae.methods.sae import TopKSAEMethod
from ksvd_sae.run.grid import Cell, CodingVariant, load_study
from ksvd_sae.run.replicas import Replica, replicas, source_training
from tests.command_line import EVAL_CONFIGS

RAW: dict[str, Any] = {
    "base": str(EVAL_CONFIGS / "demo.yaml"),
    "layers": [3, 5],
    "k": [4, 2],
    "seeds": [0, 7],
    "entries": {
        "plain": {"dictionary": {"kind": "db_ksvd", "n_atoms": 32}, "codings": {"mp": {"coder": "mp"}}},
        "once": {"dictionary": {"kind": "topk_sae", "n_atoms": 32}, "layers": [5], "k": [4], "seeds": [7]},
        "control": {"dictionary": {"kind": "random", "n_atoms": 32}, "seeds": [0]},
    },
}


TOPK: dict[str, Any] = {"dictionary": {"kind": "topk_sae", "n_atoms": 32}}
LINEAR: dict[str, Any] = {"dictionary": {"kind": "linear_topk", "of": "a"}}


def write(folder: Path, **changes: Any) -> Path:
    (folder / "study.yaml").write_text(yaml.safe_dump({**RAW, **changes}, sort_keys=False))
    return folder / "study.yaml"


def trainings(folder: Path, **changes: Any) -> list[tuple[int, str, Cell, Replica]]:
    """(layer, name, place, training) of all that a study measures."""
    _, layers = load_study(write(folder, **changes))
    return [
        (layer, replica.name, grid.cells[replica.name], replica)
        for layer, grid in layers.items()
        for replica in replicas(grid.config)
        if replica.name in grid.cells
    ]


def test_cells(tmp_path: Path) -> None:
    study, layers = load_study(write(tmp_path))
    measured = trainings(tmp_path)
    assert study.name == "study"
    assert [grid.config.model.hook for grid in layers.values()] == [
        "blocks.3.hook_resid_post",
        "blocks.5.hook_resid_post",
    ]
    # 2 layers × 2 k × 2 seeds, one setting, 2 layers × 2 k.
    assert [sum(cell.entry == name for _, _, cell, _ in measured) for name in RAW["entries"]] == [8, 1, 4]
    assert {(layer, cell.k, replica.seed) for layer, _, cell, replica in measured if cell.entry == "plain"} == {
        (layer, k, seed) for layer in (3, 5) for k in (4, 2) for seed in (0, 7)
    }
    assert {(cell.k, replica.seed) for _, _, cell, replica in measured if cell.entry == "once"} == {(4, 7)}
    plain = layers[3].config.dictionaries["plain-k4"]
    assert isinstance(plain, DBKSVDMethod)
    assert (plain.k, plain.seed, plain.n_atoms) == (4, None, 32)


def test_an_entry_of_another_takes_the_atoms_of_its_layer_k_and_seed(tmp_path: Path) -> None:
    entries = {"a": {**TOPK, "layers": [5]}, "x": LINEAR, "y": {"dictionary": {"kind": "recoded", "of": "a", "k": 9}}}
    with pytest.raises(ConfigError, match=r"x-k4.*no dictionary 'a-k4'"):
        load_study(write(tmp_path, entries=entries))
    entries["a"] = TOPK
    _, layers = load_study(write(tmp_path, entries=entries))
    measured = [found for found in trainings(tmp_path, entries=entries) if found[2].entry != "a"]
    assert len(measured) == 2 * 2 * 2 * 2
    for layer, _, cell, replica in measured:
        source = source_training(layers[layer].config, replica.method)
        assert isinstance(source, TopKSAEMethod)
        assert (source.k, source.seed, source.n_atoms) == (cell.k, replica.seed, 32)
        assert replica.method.budget == cell.k
    assert {
        method.has_signs for _, _, cell, replica in measured if cell.entry == "y" for method in [replica.method]
    } == {False}


def test_an_entry_with_seeds_of_its_own(tmp_path: Path) -> None:
    """Those of an entry that takes its atoms from it must be the same."""
    entries = {"a": {**TOPK, "seeds": [7, 9]}, "x": {**LINEAR, "seeds": [7, 9]}}
    _, layers = load_study(write(tmp_path, entries=entries, layers=[3], k=[4]))
    measured = trainings(tmp_path, entries=entries, layers=[3], k=[4])
    assert [(name, replica.seed) for _, name, _, replica in measured] == [
        ("a-k4.s7", 7),
        ("a-k4.s9", 9),
        ("x-k4.s7", 7),
        ("x-k4.s9", 9),
    ]
    for _, _, _, replica in measured[2:]:
        source = source_training(layers[3].config, replica.method)
        assert source is not None
        assert source.own_seed == replica.seed


def test_codings(tmp_path: Path) -> None:
    codings = {"own": None, "omp": {"coder": "omp", "k": 9}, "ormp": {"coder": "ormp", "nonnegative": False}}
    measured = trainings(tmp_path, entries={"a": {**TOPK, "codings": codings}}, layers=[3], k=[4], seeds=[0])
    methods = {cell.coding: replica.method for _, _, cell, replica in measured}
    assert {coding: (method.kind, method.budget, method.has_signs) for coding, method in methods.items()} == {
        "own": ("topk_sae", 4, False),
        "omp": ("recoded", 9, False),
        "ormp": ("recoded", 4, True),
    }
    assert {cell.k for _, _, cell, _ in measured} == {4}


def test_study_in_the_repository_loads() -> None:
    study, _ = load_study(EVAL_CONFIGS / "study-engine.yaml")
    assert study.k == [20, 10, 40]
    assert len(study.seeds) == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer": [1]}, "layer"),
        ({"seeds": []}, "seeds"),
        ({"entries": {"x": {"dictionary": {"kind": "lasso"}}}}, "x-k4.*lasso"),
        ({"entries": {"x": {"dictionary": {"kind": "db_ksvd"}}}}, "n_atoms"),
        ({"entries": {"x": {"dictionary": {"kind": "random", "n_atoms": 32, "view": "both"}}}}, "leave view out"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml"),
        (
            {"entries": {"x": {"dictionary": {"kind": "recoded", "of": "y"}}}},
            r"dictionaries\.x-k4\.of: no dictionary 'y'",
        ),
        (
            {"entries": {"x": {"dictionary": {"kind": "recoded", "of": "x"}}}},
            "x-k4.*no dictionary 'x'|goes round in a circle",
        ),
        (
            {
                "entries": {
                    "a": {"dictionary": {"kind": "pca"}},
                    "x": {"dictionary": {"kind": "linear_topk", "of": "a"}},
                }
            },
            "x-k4.*'a-k4' has as many atoms as it uses",
        ),
        ({"entries": {"x": {**TOPK, "codings": {"c": {"coder": "ormp"}}}}}, "x-k4-c.*coder 'ormp' has signs"),
        (
            {"entries": {"x": {**TOPK, "codings": {"c": {"coder": "matryoshka"}}}}},
            "x-k4-c.*coder 'matryoshka' needs groups",
        ),
        (
            {"entries": {"a": TOPK, "x": {**LINEAR, "codings": {"c": {"coder": "omp"}}}}},
            "x-k4-c.*'x-k4' has its atoms from another.*name that one: of: a-k4",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        load_study(write(tmp_path, **changes))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)no such file.*cure"):
        load_study(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="reading study"):
        load_study(tmp_path)


def test_a_base_beside_the_study_goes_before_one_of_the_package(tmp_path: Path) -> None:
    """And either may be named by what it is called."""
    path = write(tmp_path, base="demo")
    _, runs = load_study(path)
    assert runs[3].config.model.name == "google/gemma-3-270m"
    (tmp_path / "demo").write_text((EVAL_CONFIGS / "pythia-160m.yaml").read_text())
    _, runs = load_study(path)
    assert runs[3].config.model.name == "EleutherAI/pythia-160m-deduped"


def test_k_of_a_coding() -> None:
    assert CodingVariant(coder="mp").k_of(20) == 20
    assert CodingVariant(coder="mp", k=7).k_of(20) == 7
    assert CodingVariant(coder="mp", k_factor=0.5).k_of(20) == 10
    assert CodingVariant(coder="mp", k_factor=0.01).k_of(20) == 1
