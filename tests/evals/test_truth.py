"""Kinds of dictionaries in a world whose features are known: SAELens' scores, and what a threshold may do."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from sae_lens.synthetic.evals import (
    ClassificationMetricsCalculator,
    compute_classification_metrics,
    mean_correlation_coefficient,
)

from ksvd_sae.activations.harvest import HELDOUT_DOCUMENTS
from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.dictionary import Dictionary
from ksvd_sae.errors import ConfigError, EvaluationError
from ksvd_sae.evals.base import EvalSetting, LearnedOn, Measured
from ksvd_sae.evals.truth import TruthEval
from ksvd_sae.evals.truth.run import THRESHOLDS, measure
from ksvd_sae.evals.truth.worlds import World
from ksvd_sae.learning.coding import Coding
from ksvd_sae.methods import METHODS
from ksvd_sae.run.config import parse_config
from ksvd_sae.run.pipeline import Run
from ksvd_sae.sae import sae_from_dictionary
from tests.tiny_shards import raw_activations, write_harvest

CONFIG = TruthEval(world="tiny", train_samples=3000, test_samples=2000, seed=3)


@pytest.fixture(scope="module")
def world() -> World:
    return World("tiny", CONFIG.seed)


@pytest.fixture
def setting(tmp_path: Path) -> EvalSetting:
    return EvalSetting("some/model", "float32", "cpu", tmp_path / "data", "", tmp_path / "artifacts")


def of_atoms(world: World, coding: Coding, noise: float = 0.0) -> LearnedOn:
    """The features that fire most often, coded about the mean of the samples."""

    def learned(
        shards: ActivationShards, of: str, folder: Path, sizes: Mapping[str, int], seed: int | None = None
    ) -> Any:
        often = torch.argsort(world.model.activation_generator.firing_probabilities, descending=True)
        generator = torch.Generator().manual_seed(0)
        atoms_MD = world.features_GD[often[: sizes["n_atoms"]]]
        noisy_MD = atoms_MD + noise * torch.randn(atoms_MD.shape, generator=generator) / atoms_MD.shape[1] ** 0.5
        rows_MD = torch.nn.functional.normalize(noisy_MD, dim=1)
        dictionary = Dictionary(rows_MD, shards.centre_D.float(), coding)
        return sae_from_dictionary(dictionary, model_name="some/model", hook_name="blocks.0.hook_resid_post")

    return learned


def test_samples_are_those_of_the_seed(world: World) -> None:
    state = torch.get_rng_state()
    once = list(world.samples(5000, seed=7))
    assert torch.equal(torch.get_rng_state(), state), "nobody else's draws are disturbed"
    drawn = []
    for batch in world.samples(5000, seed=7):
        torch.rand(3)
        drawn.append(batch)
    assert [len(x_BD) for x_BD, _ in once] == [4096, 904]
    for (x_BD, loud_BG), (again_BD, loud_again_BG) in zip(once, drawn, strict=True):
        assert torch.equal(x_BD, again_BD)
        assert torch.equal(loud_BG, loud_again_BG)
    x_BD, loud_BG = once[0]
    bias_D = world.model.feature_dict.bias.detach()
    assert torch.allclose(x_BD, loud_BG @ world.features_GD + bias_D, atol=1e-4), "samples are sums of features"


def test_the_features_themselves_are_true(world: World, setting: EvalSetting) -> None:
    scores = measure(CONFIG, "atoms", of_atoms(world, Coding(12, "omp", nonnegative=True)), setting).scores
    random = torch.nn.functional.normalize(torch.randn(128, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    assert scores["mcc"] == pytest.approx(1, abs=1e-5)
    assert scores["uniqueness"] == 1
    assert mean_correlation_coefficient(random, world.features_GD) < 0.65
    noisy = measure(CONFIG, "atoms", of_atoms(world, Coding(12, "omp", nonnegative=True), noise=1.0), setting).scores
    assert noisy["mcc"] < scores["mcc"]
    assert noisy["f1"] < scores["f1"]


@pytest.mark.parametrize("seed", [0, 3])
def test_random_atoms_of_a_worlds_seed_are_not_its_features(seed: int) -> None:
    """Both would be the first normal numbers of that seed."""
    world = World("tiny", seed)
    drawn_MD = torch.nn.functional.normalize(torch.randn(256, 32, generator=torch.Generator().manual_seed(seed)), dim=1)
    assert mean_correlation_coefficient(drawn_MD, world.features_GD) < 0.7


def test_scores_are_saelens_and_the_threshold_is_chosen_on_other_samples(world: World, setting: EvalSetting) -> None:
    learned_on = of_atoms(world, Coding(8, nonnegative=True), noise=0.3)
    measured = measure(CONFIG, "atoms", learned_on, setting)
    assert isinstance(measured, Measured)
    assert measured.n == 2000
    scores = measured.scores
    with torch.no_grad():
        x_BD, loud_BG = (torch.cat(parts) for parts in zip(*world.samples(2000, seed=3), strict=True))
        train_BD = torch.cat([x for x, _ in world.samples(3000, seed=1)])
        sae = learned_on(_Centre(train_BD.mean(dim=0)), "", Path(), {"n_atoms": 128, "k": 1})  # type: ignore[arg-type, misc]
        codes_BF = sae.encode(x_BD)
        for name, share in (("", 0.0), ("_thresholded", scores["threshold"])):
            kept_BF = codes_BF * (codes_BF > share * torch.linalg.vector_norm(x_BD - sae.b_dec, dim=1)[:, None])
            wanted = compute_classification_metrics(kept_BF, loud_BG, sae.W_dec, world.features_GD)
            assert scores["f1" + name] == pytest.approx(wanted.f1_score, abs=2e-3)
            assert scores["precision" + name] == pytest.approx(wanted.precision, abs=2e-3)
            assert scores["recall" + name] == pytest.approx(wanted.recall, abs=2e-3)
            assert scores["l0" + name] == pytest.approx(float((kept_BF != 0).sum(dim=1).float().mean()), abs=0.02)
            error = float((sae.decode(kept_BF) - x_BD).square().sum() / (x_BD - x_BD.mean(dim=0)).square().sum())
            assert scores["r2" + name] == pytest.approx(1 - error, abs=1e-3)
        tried = {}
        for share in THRESHOLDS:
            calculator = ClassificationMetricsCalculator(sae.W_dec, world.features_GD)
            for other_BD, loud_other_BG in world.samples(2000, seed=2):
                other_BF = sae.encode(other_BD)
                sizes_B1 = torch.linalg.vector_norm(other_BD - sae.b_dec, dim=1)[:, None]
                calculator.add_batch(other_BF * (other_BF > share * sizes_B1), loud_other_BG)
            tried[share] = calculator.compute().f1_score
        assert tried[scores["threshold"]] == pytest.approx(max(tried.values()), abs=1e-3)
    assert scores["true_l0"] == pytest.approx(float((loud_BG > 0).sum(dim=1).float().mean()))
    assert scores["threshold"] > 0, "eight atoms a sample are more than fire"
    assert scores["f1_thresholded"] > scores["f1"] + 0.05
    assert scores["precision_thresholded"] > scores["precision"]


class _Centre:
    def __init__(self, centre_D: torch.Tensor):
        self.centre_D = centre_D


PLAIN: dict[str, Any] = {
    "name": "truth",
    "device": "cpu",
    "model": {"name": "some/model", "hook": "blocks.0.hook_resid_post"},
    "text": {"source": "hub", "dataset": "owner/some-texts"},
    "harvest": {"train_tokens": 2000, "heldout_tokens": 500, "context_tokens": 12, "gradient_tokens": 100},
    "dictionaries": {
        "learned": {"kind": "db_ksvd", "n_atoms": 24, "k": 3, "view": "both"},
        "fisher": {"kind": "db_ksvd", "n_atoms": 24, "k": 3, "weighting": "fisher_diag"},
        "nested": {"kind": "db_ksvd", "n_atoms": 24, "k": 3, "groups": [8, 16]},
        "by-omp": {"kind": "recoded", "of": "learned"},
        "pca": {"kind": "pca", "k": 3},
    },
    "evaluation": {"core": None, "sparse_probing": None, "truth": CONFIG.model_dump()},
    "report": {"atoms": 0},
}


def without(*names: str) -> dict[str, Any]:
    kept = {name: options for name, options in PLAIN["dictionaries"].items() if name not in names}
    return {**PLAIN, "dictionaries": kept}


def run_in(folder: Path, config: dict[str, Any]) -> Run:
    """A run whose harvest is there."""
    run = Run(parse_config(config), folder / "results", folder / "cache")
    x_ND = raw_activations(2500)
    write_harvest(run.harvest_folder, run.config.harvested.key, x_ND[:2000], x_ND[2000:])
    (run.harvest_folder / HELDOUT_DOCUMENTS).write_text(json.dumps({"text": "a document"}) + "\n")
    return run


def test_every_kind_of_a_run_is_scored(tmp_path: Path) -> None:
    run = run_in(tmp_path, without("fisher", "nested"))
    frame = pd.DataFrame(run.evaluate(train=True)["rows"])
    truth = frame[frame["eval"] == "truth"]
    assert set(truth["data"]) == {"world tiny"}
    f1 = truth[truth["metric"] == "f1"].set_index("dictionary")["value"]
    # The split view is of the same dictionary and has no row.
    assert sorted(f1.index) == ["by-omp", "learned", "pca"]
    assert f1["by-omp"] != f1["learned"]
    assert set(truth.loc[truth["metric"] == "l0", "value"].round(1)) != {3.0}, "the world's budget, not the run's"
    assert not list((tmp_path / "cache" / "artifacts").rglob("sae")), "what was learned there is not kept"


def test_what_does_not_fit_the_world_is_an_error_that_names_it(tmp_path: Path) -> None:
    run = run_in(tmp_path, without("fisher", "learned", "by-omp"))
    with pytest.raises(EvaluationError, match=r"(?s)learning nested in the world 'tiny'.*Matryoshka groups"):
        run.evaluate(train=True)
    assert [path.name.split("-")[0] for path in run.evaluations.glob("truth/*.json")] == ["pca"], "the other is kept"


def test_a_budget_that_no_kind_can_have_is_one_error(setting: EvalSetting, world: World) -> None:
    for options in ({"k": 33}, {"k": 9, "n_atoms": 8}):
        config = CONFIG.model_copy(update=options)
        with pytest.raises(EvaluationError, match=r"(?s)too large for the world 'tiny'.*dimensions.*truth.k"):
            measure(config, "atoms", of_atoms(world, Coding(3)), setting)


def test_a_training_with_fewer_atoms_keeps_their_part_of_the_worlds_budget() -> None:
    raw = {"kind": "db_ksvd", "n_atoms": 24, "k": 20, "train_k": 6}
    method = parse_config({**PLAIN, "dictionaries": {"learned": {**raw, "k": 10, "train_k": 3}}}).dictionaries[
        "learned"
    ]
    there = method.resized({"n_atoms": 128, "k": 13}).model_dump()
    assert (there["n_atoms"], there["k"], there["train_k"]) == (128, 13, 4)
    assert method.resized({"n_atoms": 128, "k": 1}).model_dump()["train_k"] == 1
    with pytest.raises(ConfigError, match=r"dictionaries\.learned: train_k = 6 is above k = 5"):
        parse_config({**PLAIN, "dictionaries": {"learned": {**raw, "k": 5}}})


def test_gradients_and_published_saes_have_no_world(tmp_path: Path) -> None:
    assert [kind.__name__ for kind in METHODS if not kind.learns] == ["PublishedSAEMethod"]
    run = run_in(tmp_path, without())
    trained = run.train_one("learned", run.config.dictionaries["learned"])
    assert trained.learns_anywhere
    assert not replace(trained, view="split").learns_anywhere
    assert not replace(trained, method=run.config.dictionaries["fisher"]).learns_anywhere
