"""Runs on images: their keys, and what of a config is refused before anything is read."""

from typing import Any

import pytest
import yaml

from ksvd_sae.activations.vision.harvest import ImageHarvestConfig
from ksvd_sae.errors import ConfigError
from ksvd_sae.evals import EVALS
from ksvd_sae.offline.pictures import CROPS_OF_A_PHOTO
from ksvd_sae.run.config import ImageRunConfig, TextRunConfig, dump_config, load_config, parse_config
from ksvd_sae.run.grid import layer_run, load_study
from tests.command_line import EVAL_CONFIGS

RAW: dict[str, Any] = {
    "name": "tiny",
    "model": {"name": "facebook/dinov2-small", "layer": 11},
    "images": {"source": "folder", "dataset": "images"},
    "harvest": {"train_tokens": 2000, "heldout_tokens": 500},
    "dictionaries": {"learned": {"kind": "db_ksvd", "n_atoms": 24, "k": 3}},
}


def with_changes(**changes: Any) -> dict[str, Any]:
    return {**RAW, **changes}


@pytest.mark.parametrize("name", ["dinov2-s", "dinov2-b"])
def test_the_yamls_are_read_and_written(name: str) -> None:
    run = load_config(name)
    assert isinstance(run, ImageRunConfig)
    text = dump_config(run)
    assert parse_config(yaml.safe_load(text)) == run
    assert list(yaml.safe_load(text))[:6] == ["name", "seed", "training_seeds", "device", "model", "images"]
    kinds = {method.kind for method in run.dictionaries.values()}
    assert {"db_ksvd", "topk_sae", "batchtopk_sae", "matryoshka_batchtopk_sae", "pca", "random"} == kinds


def test_the_demos_need_no_hub() -> None:
    photos, digits = load_config("vision-demo"), load_config("vision-demo-digits")
    for run in (photos, digits):
        assert isinstance(run, ImageRunConfig)
        assert parse_config(yaml.safe_load(dump_config(run))) == run
        assert (run.model.source, run.images.source) == ("offline", "offline")
        sources = run.harvested.key["sources"]
        assert sources.keys() == {"model", "images"}
    # Photographs have no classes.
    assert photos.evaluation.left_out() == ["probe_preservation", "image_probing"]
    assert digits.evaluation.left_out() == []
    # Whole photographs are held out.
    assert isinstance(photos.harvest, ImageHarvestConfig)
    assert photos.harvest.heldout_tokens == 5 * CROPS_OF_A_PHOTO * 256
    assert photos.harvest.batch_images == CROPS_OF_A_PHOTO


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "facebook/dinov2-base", "source": "offline"}, "has facebook/dinov2-small alone"),
        ({"source": "offline", "revision": "main"}, "goes with a model on the Hub"),
    ],
)
def test_what_no_package_has_is_refused(model: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(with_changes(model={**RAW["model"], **model}))


def test_a_model_from_the_hub_has_the_key_that_it_had() -> None:
    run = parse_config(RAW)
    assert run.model.model_dump().keys() == {"name", "layer", "final_norm", "also", "dtype"}


def test_a_text_makes_another_run() -> None:
    run = load_config("demo")
    assert isinstance(run, TextRunConfig)
    assert list(yaml.safe_load(dump_config(run)))[:6] == ["name", "seed", "training_seeds", "device", "model", "text"]


def test_what_runs_by_default() -> None:
    run = parse_config(RAW)
    names = [section.name for section in run.evaluation.evals()]
    assert names == ["heldout", "probe_preservation", "image_probing", "spatial", "stability"]
    left = parse_config(with_changes(evaluation={"spatial": None})).evaluation.left_out()
    assert left == ["spatial"]
    assert not any(kind.reads == "images" for kind in map(type, load_config("demo").evaluation.evals()))


@pytest.mark.parametrize("name", [kind.name for kind in EVALS if kind.reads == "text"])
@pytest.mark.parametrize("section", [{}, None])
def test_evals_of_text_are_refused(name: str, section: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} cannot be had on images") as caught:
        parse_config(with_changes(evaluation={name: section}))
    able = [kind.name for kind in EVALS if kind.reads != "text"]
    assert ", ".join(able) in caught.value.what


@pytest.mark.parametrize("name", [kind.name for kind in EVALS if kind.reads == "images"])
def test_evals_of_images_are_no_keys_of_a_text_run(name: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key 'evaluation.{name}'"):
        load_config("demo", [f"evaluation.{name}={{}}"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text": {"source": "bbc-news"}}, "unknown key 'text'"),
        ({"model": {"name": "x", "layer": 1, "hok": "y"}}, "unknown key 'model.hok'"),
        ({"harvest": {**RAW["harvest"], "gradient_tokens": 100}}, "unknown key 'harvest.gradient_tokens'"),
        ({"evaluation": {"spatil": None}}, "unknown key 'evaluation.spatil'"),
        ({"model": {"name": "x", "layer": -1}}, "model.layer"),
        ({"evaluation": {"transfer": {}}}, "evaluation.transfer.images"),
        (
            {"evaluation": {"transfer": {"images": {"source": "folder", "dataset": "x", "colum": "y"}}}},
            "unknown key 'evaluation.transfer.images.colum'",
        ),
        (
            {"dictionaries": {"a": {"kind": "db_ksvd", "n_atoms": 24, "k": 3, "weighting": "fisher"}}},
            "use weighting 'std'",
        ),
        ({"dictionaries": {"a": {"kind": "db_ksvd", "n_atoms": 4000, "k": 3}}}, "above harvest.train_tokens"),
        (
            {"evaluation": {"monosemanticity": {"backbone": {"name": "facebook/dinov2-small", "layer": 3}}}},
            "the run's own model",
        ),
    ],
)
def test_what_does_not_fit(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(with_changes(**changes))


def test_the_nearest_key_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(with_changes(images={"source": "folder", "dataset": "x", "label_colum": "y"}))
    assert caught.value.cure == "did you mean 'images.label_column'?"


def test_studies_of_layers_are_of_text() -> None:
    study, _ = load_study("study-engine")
    with pytest.raises(ConfigError):
        layer_run(study, EVAL_CONFIGS / "dinov2-s.yaml", 3)
