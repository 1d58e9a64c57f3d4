"""The eval on held-out activations: computed once for a dictionary and a harvest."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from ksvd_sae.activations.language import ActivationReader
from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.base import EvalResults, EvalSetting, Heldout
from ksvd_sae.evals.heldout import HeldoutEval
from ksvd_sae.evals.heldout.metrics import heldout_metrics
from ksvd_sae.sae import DBKSVDSAE
from tests.evals.conftest import CountedPanel
from tests.tiny_saes import tiny_db_ksvd_sae, tiny_topk_sae
from tests.tiny_shards import raw_activations, write_harvest


def no_model() -> ActivationReader:
    raise AssertionError("held-out errors need no model")


def heldout_part(folder: Path) -> Heldout:
    return Heldout("heldout text", ActivationShards.open(folder, "heldout"), no_model)


@pytest.fixture
def score(shards: ActivationShards, setting: EvalSetting, tmp_path: Path) -> Callable[..., EvalResults]:
    def run(counted: CountedPanel, harvest: Path = shards.folder) -> EvalResults:
        where = replace(setting, heldout=heldout_part(harvest))
        return HeldoutEval().run(counted.panelists(), where, tmp_path)

    return run


def test_scores_are_kept(score: Callable[..., EvalResults], shards: ActivationShards) -> None:
    counted = CountedPanel({"db-ksvd": tiny_db_ksvd_sae, "topk-sae": tiny_topk_sae})
    found = score(counted)
    assert (found.eval, found.data, found.n) == ("heldout", "heldout text", dict.fromkeys(counted.makers, 500))
    wanted = heldout_metrics(tiny_db_ksvd_sae(), heldout_part(shards.folder).shards.batches(500))
    assert found.metrics["db-ksvd"] == pytest.approx(wanted.scores)
    stored = json.loads(found.files["db-ksvd"].read_text())
    assert stored["n_tokens"] == 500
    assert stored["density"] == pytest.approx(wanted.density_F.tolist(), abs=1e-6)
    counted.loads.clear()
    assert score(counted) == found
    assert counted.loads == []


def test_scores_of_another_name_are_reused(score: Callable[..., EvalResults]) -> None:
    found = score(CountedPanel({"db-ksvd": tiny_db_ksvd_sae}))
    named = CountedPanel({"db-ksvd.s0": tiny_db_ksvd_sae}, contents={"db-ksvd.s0": "content of db-ksvd"})
    again = score(named)
    assert named.loads == []
    assert again.metrics == {"db-ksvd.s0": found.metrics["db-ksvd"]}
    assert again.files["db-ksvd.s0"].name.startswith("db-ksvd.s0-")


def test_scores_of_something_else_are_computed(score: Callable[..., EvalResults], tmp_path: Path) -> None:
    counted = CountedPanel({"db-ksvd": tiny_db_ksvd_sae, "topk-sae": tiny_topk_sae})
    first = score(counted)
    counted.contents["db-ksvd"] = "learned again"
    again = score(counted)
    assert again.files["db-ksvd"] != first.files["db-ksvd"]
    assert again.files["topk-sae"] == first.files["topk-sae"]
    x_ND = raw_activations(500, seed=1)
    write_harvest(tmp_path / "another", {"made": "by hand, again"}, x_ND[:300], x_ND[300:])
    other = score(counted, tmp_path / "another")
    assert not set(other.files.values()) & {*first.files.values(), *again.files.values()}
    assert sorted(counted.loads) == ["db-ksvd"] * 3 + ["topk-sae"] * 2


def test_without_held_out_activations(setting: EvalSetting, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no held-out activations"):
        HeldoutEval().run([], setting, tmp_path)


class NotANumber(DBKSVDSAE):
    def decode(self, feature_acts: Tensor) -> Tensor:
        return super().decode(feature_acts) * math.nan


def test_an_error_that_is_no_number_is_no_score(score: Callable[..., EvalResults]) -> None:
    found = score(CountedPanel({"broken": lambda: NotANumber(tiny_db_ksvd_sae().cfg)}))
    assert found.metrics["broken"]["fvu"] is None
    assert found.metrics["broken"]["l0"] == pytest.approx(4)
