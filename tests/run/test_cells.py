"""Cells of a grid: what a YAML says once stands for many dictionaries, of which any part can be run by itself."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ksvd_sae.errors import ConfigError, ManifestError
from ksvd_sae.report.compare import compare
from ksvd_sae.run.cells import chosen
from ksvd_sae.run.config import RunConfig, dump_config, load_config, parse_config
from ksvd_sae.run.read_yaml import parse_yaml
from tests.run.test_pipeline import RAW, _one_thread, place, run_in, snapshot, trainings

GRID: dict[str, Any] = {"m": [24, 48], "k": [2, 3]}
# The fixtures are used by their names.
__all__ = ["_one_thread", "place", "trainings"]


def raw(**changes: Any) -> dict[str, Any]:
    dictionaries = {
        "ours": {"kind": "db_ksvd", "batch_samples": 500},
        "omp": {"kind": "recoded", "of": "ours"},
        "pca": {"kind": "pca"},
        "fixed": {"kind": "random", "n_atoms": 30, "k": 4},
    }
    return {**deepcopy(RAW), "grid": GRID, "dictionaries": {**dictionaries, **changes}}


def gridded(**changes: Any) -> RunConfig:
    return parse_config(raw(**changes))


def of(name: str) -> list[str]:
    return [f"{name}-m{m}-k{k}" for m in GRID["m"] for k in GRID["k"]]


class TestGrid:
    def test_a_dictionary_for_each_cell(self) -> None:
        methods = gridded().dictionaries
        assert list(methods) == [*of("ours"), *of("omp"), "pca-k2", "pca-k3", "fixed"]
        for m in GRID["m"]:
            for k in GRID["k"]:
                assert (methods[f"ours-m{m}-k{k}"].size, methods[f"ours-m{m}-k{k}"].budget) == (m, k)
                assert methods[f"omp-m{m}-k{k}"].source == f"ours-m{m}-k{k}"
                assert methods[f"omp-m{m}-k{k}"].budget == k
        assert methods["pca-k3"].budget == 3

    def test_what_has_a_value_of_its_own_keeps_it(self) -> None:
        methods = gridded(ours={"kind": "db_ksvd", "k": 5}).dictionaries
        assert [(n, m.budget) for n, m in methods.items() if n.startswith("ours")] == [("ours-m24", 5), ("ours-m48", 5)]
        assert [n for n in methods if n.startswith("omp")] == ["omp-m24", "omp-m48"]

    def test_one_cell_may_be_changed_or_left_out(self) -> None:
        changes = {"ours-m24-k3": {"passes": 7}, "pca-k2": None}
        methods = gridded(**changes).dictionaries
        assert "pca-k2" not in methods
        assert [m.passes for n, m in methods.items() if n.startswith("ours")] == [1, 7, 1, 1]  # type: ignore[attr-defined]
        assert list(methods) == [n for n in gridded().dictionaries if n != "pca-k2"]

    def test_as_if_it_were_written_out(self) -> None:
        """So keys are those of the same dictionaries without a grid, and what is written out loads again."""
        run = gridded()
        again = parse_config(parse_yaml(dump_config(run), "copy"))
        assert again.grid is None
        assert again.dictionaries == run.dictionaries
        assert dump_config(again) == dump_config(run)

    def test_a_run_without_a_grid_says_nothing_of_it(self) -> None:
        assert "grid" not in dump_config(parse_config(RAW))

    def test_values_can_be_set(self, tmp_path: Path) -> None:
        path = tmp_path / "a.yaml"
        path.write_text(dump_config(parse_config(RAW)))
        run = load_config(path, ["grid.k=[2]", "dictionaries={pca: {kind: pca}}"])
        assert list(run.dictionaries) == ["pca-k2"]

    @pytest.mark.parametrize(
        ("grid", "words"),
        [
            ({"n": [1]}, r"(?s)unknown key 'grid\.n'.*valid keys here: k, m"),
            ({"m": 24}, r"(?s)grid\.m: .*list.*m takes a list of a whole number above 0"),
            ({"k": [0]}, r"grid\.k\.0: .*greater than 0"),
            ({"k": [2, 2]}, r"grid\.k: \[2, 2\] names a value twice"),
            ({"k": [2]}, r"dictionaries\.ours-k2\.n_atoms: Field required"),
            ({"m": [24], "k": [2, 30]}, r"omp-m24-k30: k = 30 is above the 24 atoms of 'ours-m24-k30'"),
            ([24], r"grid: "),
        ],
    )
    def test_mistakes(self, grid: Any, words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            parse_config({**raw(), "grid": grid})

    def test_an_unknown_key_of_a_cell(self) -> None:
        with pytest.raises(ConfigError, match=r"(?s)'dictionaries\.ours-m24-k2\.pases'.*ours-m24-k2\.passes"):
            gridded(ours={"kind": "db_ksvd", "pases": 2})

    def test_no_dictionary_to_take_atoms_from(self) -> None:
        with pytest.raises(ConfigError, match=r"omp-m24-k2\.of: no dictionary 'ours-m24-k2'"):
            gridded(**{"ours-m24-k2": None})


class TestChosen:
    @pytest.mark.parametrize(
        ("cells", "names"),
        [
            ("m=24,k=2", ["ours-m24-k2", "omp-m24-k2", "pca-k2"]),
            ("m=48, k=2, k=3", [*of("ours")[2:], *of("omp")[2:], "pca-k2", "pca-k3"]),
            ("dictionary=ours", of("ours")),
            ("dictionary=omp,m=24,k=3", ["ours-m24-k3", "omp-m24-k3"]),
            ("dictionary=pca", ["pca-k2", "pca-k3"]),
            ("dictionary=fixed", ["fixed"]),
            ("k=4", ["fixed"]),
        ],
    )
    def test_by_key_and_value(self, cells: str, names: list[str]) -> None:
        """With those that they take their atoms from; a PCA, which has no m, is in the cells of every m."""
        assert chosen(gridded().dictionaries, cells) == set(names)

    def test_of_a_run_without_a_grid(self) -> None:
        assert chosen(parse_config(RAW).dictionaries, "m=24") == set(RAW["dictionaries"])
        assert chosen(parse_config(RAW).dictionaries, "dictionary=topk-sae") == {"topk-sae"}

    @pytest.mark.parametrize(
        ("cells", "words"),
        [
            ("n=24", r"(?s)--cells 'n=24': 'n=24' is not.*keys: dictionary, m, k"),
            ("24", r"(?s)'24' is not.*e\.g\. --cells m="),
            ("", r"keys: dictionary, m, k"),
            ("m=24,", r"keys: dictionary, m, k"),
            ("m=25", r"(?s)no dictionary of this config has m=25.*m: 24, 48, 30"),
            ("k=20", r"(?s)has k=20.*k: 2, 3, 4.*did you mean k=2\?"),
            ("dictionary=our", r"(?s)has dictionary=our.*ours, omp, pca, fixed.*did you mean dictionary=ours"),
            ("m=30,k=2,dictionary=fixed", r"(?s)has all of them.*ours-m24-k2, "),
        ],
    )
    def test_mistakes_name_what_is_allowed(self, cells: str, words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            chosen(gridded().dictionaries, cells)


def scored(report: Path) -> set[str]:
    return set(pd.read_csv(report.parent / "comparison.csv")["dictionary"])


def test_cells_one_after_another_end_up_in_one_comparison(place: Path, trainings: list[str]) -> None:
    run = run_in(place, gridded())
    first = run.part("m=24,k=2")
    names = ["ours-m24-k2", "omp-m24-k2", "pca-k2"]
    assert list(first.config.dictionaries) == names
    first.evaluate(train=True)
    assert scored(compare(first)) == set(names)
    assert trainings == ["db_ksvd", "pca"]

    second = run.part("dictionary=fixed")
    assert list(second.config.dictionaries) == [*names, "fixed"]
    second.evaluate(train=True)
    assert scored(compare(second)) == {*names, "fixed"}
    assert trainings == ["db_ksvd", "pca", "random"], "what is finished is not learned again"
    assert scored(compare(run.part("k=2,m=24"))) == {*names, "fixed"}

    with pytest.raises(ManifestError, match="ksvd-sae evaluate"):
        compare(run)
    run.evaluate(train=True)
    assert scored(compare(run)) == set(run.config.dictionaries)
    assert len(trainings) == len(run.config.dictionaries) - len(of("omp"))


def test_a_cell_alone_is_the_cell_of_the_whole(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its training and its scores lie under the same names, byte for byte."""
    run = run_in(place, gridded())
    part = run.part("m=24,k=3")
    part.evaluate(train=True)
    alone = {p: b for p, b in snapshot(place / "cache").items() if "seconds" not in b.decode(errors="ignore")}
    assert any(path.startswith("dictionaries/db_ksvd-") for path in alone)
    assert any(path.startswith("evaluations/heldout/ours-m24-k3-") for path in alone)
    run.evaluate(train=True)
    whole = snapshot(place / "cache")
    assert {path: whole[path] for path in alone} == alone
    rows = {(r["dictionary"], r["metric"]): r["value"] for r in run.evaluated()["rows"]}
    mine = {(r["dictionary"], r["metric"]): r["value"] for r in part.evaluated()["rows"]}
    assert mine == {key: rows[key] for key in mine}


def test_only_what_the_same_evals_scored_is_finished(place: Path) -> None:
    run = run_in(place, gridded())
    part = run.part("m=24,k=2")
    part.train()
    assert list(run.part("k=4").config.dictionaries) == ["fixed"], "learned, not scored"
    part.evaluate()
    assert "ours-m24-k2" in run.part("k=4").config.dictionaries
    other = {**raw(), "evaluation": {**RAW["evaluation"], "heldout": None, "stability": None}}
    assert list(run_in(place, parse_config(other)).part("k=4").config.dictionaries) == ["fixed"]
    ours = next((place / "cache" / "dictionaries").glob("db_ksvd-*/manifest.json"))
    ours.unlink()
    left = run.part("k=4").config.dictionaries
    assert "ours-m24-k2" not in left, "it would have to be learned again"
    assert "pca-k2" in left


def test_of_several_seeds_all_must_be_finished(place: Path) -> None:
    run = run_in(place, parse_config({**raw(), "training_seeds": [0]}))
    run.part("m=24,k=2").evaluate(train=True)
    assert "ours-m24-k2" in run.part("k=4").config.dictionaries
    more = run_in(place, parse_config({**raw(), "training_seeds": [0, 1]}))
    assert "ours-m24-k2" not in more.part("k=4").config.dictionaries
    assert "pca-k2" in more.part("k=4").config.dictionaries, "it draws nothing"
