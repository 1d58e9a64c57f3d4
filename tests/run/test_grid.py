"""A study's YAML becomes cells in an order that leaves whole seeds behind, and mistakes are named."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ksvd_sae.errors import ConfigError
from ksvd_sae.run.config import DBKSVDConfig
from ksvd_sae.run.grid import CodingVariant, cells, load_study
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


def test_cells(tmp_path: Path) -> None:
    study, runs = load_study(write(tmp_path))
    found = list(cells(study))
    assert study.name == "study"
    assert [run.model.hook for run in runs.values()] == ["blocks.3.hook_resid_post", "blocks.5.hook_resid_post"]
    # 2 layers × 2 k × 2 seeds, one setting, 2 layers × 2 k.
    assert [sum(cell.entry == name for cell in found) for name in RAW["entries"]] == [8, 1, 4]
    assert [cell.seed for cell in found] == sorted(cell.seed for cell in found), "seeds come one after the other"
    assert [cell.k for cell in found if cell.seed == 0] == [4] * 4 + [2] * 4
    assert len({cell.name for cell in found}) == len(found)
    first = found[0].dictionary
    assert isinstance(first, DBKSVDConfig)
    assert (first.k, first.seed, first.n_atoms) == (4, 0, 32)


def test_an_entry_of_another_takes_the_cell_of_its_layer_k_and_seed(tmp_path: Path) -> None:
    entries = {"a": {**TOPK, "layers": [5]}, "x": LINEAR, "y": {"dictionary": {"kind": "recoded", "of": "a", "k": 9}}}
    study, _ = load_study(write(tmp_path, entries=entries))
    found = [cell for cell in cells(study) if cell.entry != "a"]
    assert len(found) == 2 * 2 * 2 * 2
    assert all((cell.of.k, cell.of.seed, cell.of.n_atoms) == (cell.k, cell.seed, 32) for cell in found)
    assert all(cell.dictionary.k == cell.k for cell in found)
    assert {cell.dictionary.seed for cell in found if cell.entry == "x"} == {0, 7}
    assert {cell.dictionary.nonnegative for cell in found if cell.entry == "y"} == {True}


def test_codings_of_an_sae(tmp_path: Path) -> None:
    codings = {"own": None, "omp": {"coder": "omp"}, "ormp": {"coder": "ormp", "nonnegative": False}}
    study, _ = load_study(write(tmp_path, entries={"a": {**TOPK, "codings": codings}}))
    assert {tuple(cell.codings) for cell in cells(study)} == {("own", "omp", "ormp")}
    assert next(cells(study)).codings["own"] is None


def test_study_in_the_repository_loads() -> None:
    study, _ = load_study(EVAL_CONFIGS / "study-engine.yaml")
    assert study.k == [20, 10, 40]
    assert len(study.seeds) == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer": [1]}, "layer"),
        ({"seeds": []}, "seeds"),
        ({"entries": {"x": {"dictionary": {"kind": "lasso"}}}}, "study entry 'x'"),
        ({"entries": {"x": {"dictionary": {"kind": "db_ksvd"}}}}, "n_atoms"),
        ({"entries": {"x": {"dictionary": {"kind": "random", "n_atoms": 32, "view": "both"}}}}, "leave view out"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml"),
        ({"entries": {"x": {"dictionary": {"kind": "recoded", "of": "y"}}}}, "study entry 'x'.*no dictionary 'y'"),
        ({"entries": {"x": {"dictionary": {"kind": "recoded", "of": "x"}}}}, "study entry 'x'.*goes round in a circle"),
        (
            {
                "entries": {
                    "a": {"dictionary": {"kind": "pca"}},
                    "x": {"dictionary": {"kind": "linear_topk", "of": "a"}},
                }
            },
            "study entry 'x'.*'a' is a PCA",
        ),
        ({"entries": {"x": {**TOPK, "codings": {"c": {"coder": "ormp"}}}}}, "'x': coding 'c': coder 'ormp' has signs"),
        ({"entries": {"x": {**TOPK, "codings": {"c": {"coder": "matryoshka"}}}}}, "'x': coding 'c' needs the groups"),
        (
            {"entries": {"a": TOPK, "x": {**LINEAR, "codings": {"c": {"coder": "omp"}}}}},
            "'x': coding 'c' would leave the fitted encoder out.*give the coding to 'a'",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        load_study(write(tmp_path, **changes))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)no such file.*cure"):
        load_study(tmp_path / "absent.yaml")


def test_k_of_a_coding() -> None:
    assert CodingVariant(coder="mp").k_of(20) == 20
    assert CodingVariant(coder="mp", k=7).k_of(20) == 7
    assert CodingVariant(coder="mp", k_factor=0.5).k_of(20) == 10
    assert CodingVariant(coder="mp", k_factor=0.01).k_of(20) == 1
