"""Trainings of one dictionary against each other: atoms are matched one to one, sign and order are no difference."""

import json
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from ksvd_sae.evals.base import EvalSetting, Panelist
from ksvd_sae.evals.stability import SAME, StabilityEval, agreement
from ksvd_sae.report.raw import result_name
from tests.evals.test_truth import PLAIN, run_in
from tests.strategies import generator, unit_atoms

ATOMS_MD = unit_atoms(7, 40, 0)


def training(name: str, W_dec: Tensor, dictionary: str = "a", **more: Any) -> Panelist:
    sae: Any = SimpleNamespace(W_dec=3 * W_dec, **more)
    return Panelist(name, f"content of {name}", lambda: sae, None, dictionary)


def changed(share: float) -> Tensor:
    """Other order and signs, and so large a share of the rows new."""
    rows_MD = ATOMS_MD.clone()
    n_new = round(share * len(rows_MD))
    rows_MD[:n_new] = unit_atoms(n_new, 40, 1) if n_new else rows_MD[:0]
    order = torch.randperm(len(rows_MD), generator=generator(2))
    signs = torch.where(torch.arange(len(rows_MD)) % 2 == 0, 1.0, -1.0)
    return rows_MD[order] * signs[:, None]


def test_order_and_signs_are_no_difference() -> None:
    assert agreement(ATOMS_MD, changed(0)) == pytest.approx({"stable_fraction": 1, "mean_cosine": 1}, abs=1e-5)


def test_the_matching_is_the_best_of_all() -> None:
    other_MD = changed(3 / 7)
    cosines = (ATOMS_MD @ other_MD.T).abs()
    best = max(permutations(range(7)), key=lambda order: sum(float(cosines[i, j]) for i, j in enumerate(order)))
    matched = [float(cosines[i, j]) for i, j in enumerate(best)]
    assert agreement(ATOMS_MD, other_MD) == pytest.approx(
        {"stable_fraction": sum(c > SAME for c in matched) / 7, "mean_cosine": sum(matched) / 7}, abs=1e-6
    )
    assert sum(c > SAME for c in matched) == 4


def test_each_training_against_the_others(setting: EvalSetting, tmp_path: Path) -> None:
    panel = [
        training("a.s0", ATOMS_MD),
        training("a.s1", changed(0)),
        training("a.s2", changed(3 / 7)),
        training("alone", ATOMS_MD, "alone"),
        training("nobody's", ATOMS_MD, ""),
        training("nobody's either", ATOMS_MD, ""),
    ]
    found = StabilityEval().run(panel, setting, tmp_path)
    stable = {name: scores["stable_fraction"] for name, scores in found.metrics.items()}
    assert stable == pytest.approx({"a.s0": (1 + 4 / 7) / 2, "a.s1": (1 + 4 / 7) / 2, "a.s2": 4 / 7})
    assert found.n == {"a.s0": 2, "a.s1": 2, "a.s2": 2}
    assert json.loads(found.files["a.s2"].read_text())["scores"] == found.metrics["a.s2"]

    def load() -> Any:
        raise AssertionError("what is known is not computed again")

    known = [Panelist(one.name, one.content, load, None, one.dictionary) for one in panel]
    assert StabilityEval().run(known, setting, tmp_path).metrics == found.metrics
    # Another set of trainings has other scores.
    fewer = StabilityEval().run([panel[0], panel[2]], setting, tmp_path)
    assert fewer.metrics["a.s0"]["stable_fraction"] == pytest.approx(4 / 7)


def test_a_split_dictionary_is_as_stable_as_with_signs(setting: EvalSetting, tmp_path: Path) -> None:
    split = [
        training(name, torch.cat([rows_MD, -rows_MD]), atoms_MD=rows_MD)
        for name, rows_MD in (("one", ATOMS_MD), ("other", changed(3 / 7)))
    ]
    assert StabilityEval().run(split, setting, tmp_path).metrics["one"]["stable_fraction"] == pytest.approx(4 / 7)


def test_a_run_of_several_seeds_has_the_column(tmp_path: Path) -> None:
    dictionaries = {
        "learned": {"kind": "db_ksvd", "n_atoms": 24, "k": 3, "view": "both"},
        "pca": {"kind": "pca", "k": 3},
    }
    evaluation = {"core": None, "sparse_probing": None}
    config = {**PLAIN, "training_seeds": [0, 1], "dictionaries": dictionaries, "evaluation": evaluation}
    frame = pd.DataFrame(run_in(tmp_path, config).evaluate(train=True)["rows"])
    stable = frame[frame["metric"] == "stable_fraction"]
    # PCA draws nothing: it is trained once.
    assert sorted(zip(stable["dictionary"], stable["view"], stable["seed"], strict=True)) == [
        ("learned", view, seed) for view in ("signed", "split") for seed in (0, 1)
    ]
    assert stable["value"].nunique() == 1, "a pair has one agreement, in each view"
    assert 0 < float(stable["value"].iloc[0]) < 1
    assert result_name("stability", "learned.s0-1.json") == "stability/learned.s0-1.json", "no result of SAEBench's"
