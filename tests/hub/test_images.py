"""A run on images: published, its card read, and loaded from the Hub with the same codes."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import ksvd_sae
from ksvd_sae.hub.source import open_source
from ksvd_sae.hub.upload import upload
from ksvd_sae.hub.write import write_folder
from ksvd_sae.report.compare import compare
from ksvd_sae.run.config import parse_config
from ksvd_sae.run.pipeline import Run
from tests.evals.vision.conftest import heldout_of, planted
from tests.hub.conftest import REPO, Published
from tests.hub.server import Hub

HOOK = "encoder.layer.1-layernorm"
LEARNED = {"kind": "db_ksvd", "n_atoms": 24, "k": 3, "batch_samples": 500}
PREPROCESSING = {"do_resize": True, "size": {"shortest_edge": 256}, "resample": 3}
CONFIG: dict[str, Any] = {
    "name": "tiny",
    "device": "cpu",
    "model": {"name": "some/vision-model", "layer": 1, "final_norm": True},
    "images": {"source": "hub", "dataset": "owner/some-images"},
    "harvest": {"train_tokens": 1800, "heldout_tokens": 1800},
    "dictionaries": {
        "learned": LEARNED,
        "linear": {"kind": "linear_topk", "of": "learned", "passes": 2, "batch_samples": 128, "lr": 5e-3},
        "pca": {"kind": "pca", "k": 3},
    },
    "evaluation": {"spatial": {"min_images": 3}},
    "report": {"atoms": 2, "examples": 2},
}


@pytest.fixture(scope="module")
def on_images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    """Read only; the model is in a folder."""
    place = tmp_path_factory.mktemp("run-on-images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KSVD_SAE_CACHE", str(place / "cache"))
        run = Run(parse_config(CONFIG), place / "results")
        x_IPD, _, labels = planted()
        heldout_of(run.harvest_folder, x_IPD, [*labels], run.config.harvested.key, preprocessing=PREPROCESSING)
        run.evaluate(train=True)
        compare(run)
        source = open_source(run.results, [], "both")
        write_folder(source, REPO, place / "published", "mit")
        yield Published(run.results, source, place / "published")


def test_loaded_from_the_hub_it_gives_the_same_codes(on_images: Published, hub: Hub) -> None:
    upload(on_images.folder, REPO)
    assert on_images.source.run is not None
    run, trained, x_BD = on_images.source.run.run, on_images.source.run.first["learned"], planted()[0].flatten(0, 1)
    expected_BM = run.load_sae(trained).encode(x_BD)
    assert torch.equal(ksvd_sae.load(REPO, f"{HOOK}/learned/signed").encode(x_BD), expected_BM)
    split_BF = ksvd_sae.load(REPO, f"{HOOK}/learned/split").encode(x_BD)
    assert torch.equal(split_BF[:, :24] - split_BF[:, 24:], expected_BM)
    learned = ksvd_sae.Dictionary.load(trained.folder)
    assert torch.equal(ksvd_sae.load_dictionary(REPO, f"{HOOK}/learned/split").atoms_MD, learned.atoms_MD)


def test_the_config_has_nothing_of_text(on_images: Published) -> None:
    expected = {
        "model_name": "some/vision-model",
        "hook_name": HOOK,
        "tokens": ["patches"],
        "dataset_path": "owner/some-images",
        "outlier_factor": None,
        "tokens_harvested": 1800,
        "training_tokens": 1800,
    }
    names = [entry.sae_id for entry in on_images.source.entries]
    assert names == [f"{HOOK}/{one}" for one in ("learned/split", "learned/signed", "linear/nonnegative")]
    for name in names:
        metadata = json.loads((on_images.folder / name / "cfg.json").read_text())["metadata"]
        known = {**metadata, "training_tokens": 1800}
        assert expected.items() <= known.items(), name
        assert not metadata.keys() & {"context_size", "prepend_bos", "exclude_special_tokens", "model_weights"}, name


def test_the_card(on_images: Published) -> None:
    card = ModelCard.load(on_images.folder / "README.md")
    header = card.data.to_dict()
    assert header["base_model"] == "some/vision-model"
    assert header["datasets"] == ["owner/some-images"]
    assert header["tags"][-1] == "vision"
    text = " ".join(card.text.split())
    for says in (
        "what block 1 of the vision transformer gives, counted from 0, through the model's final norm",
        "`layernorm(hidden_states[2])`",
        "1,800 tokens of 60 images of some-images: patches, a grid of 5 × 6 patches an image",
        f"resized by Pillow: `{json.dumps(PREPROCESSING, sort_keys=True)}`",
        "| probe kept ↑ |",
        "**spatial ↑**",
        "Evals of images have ViSAEBench's definitions",
    ):
        assert says in text, says
    for of_text in ("BOS", "splice", "SAEBench's own files", "contexts"):
        assert of_text not in text.replace("ViSAEBench's own", ""), of_text
    published = {path.name for path in on_images.folder.rglob("*")}
    assert "comparison.csv" in published
    # Parts of others' images.
    assert "neuronpedia" not in published


@pytest.mark.parametrize("name", ["/home/me/models/own-dinov2", "~/models/own-dinov2", "own-dinov2"])
def test_one_dictionary_of_a_model_in_a_folder(on_images: Published, tmp_path: Path, name: str) -> None:
    """Alone it knows less, and what it knows is true; nobody else has the path of its model."""
    assert on_images.source.run is not None
    known = ksvd_sae.Dictionary.load(on_images.source.run.first["learned"].folder)
    replace(known, provenance={**known.provenance, "model": name}).save(tmp_path / "alone")
    write_folder(open_source(tmp_path / "alone", [], "split"), REPO, tmp_path / "out", None)

    sae_id = f"{HOOK}/alone/split"
    metadata = ksvd_sae.load(tmp_path / "out", sae_id).cfg.metadata
    assert (metadata.model_name, metadata.hook_name) == ("own-dinov2", HOOK)
    assert not {"context_size", "prepend_bos"} & metadata.keys()
    assert ksvd_sae.load_dictionary(tmp_path / "out", sae_id).provenance["model"] == "own-dinov2"
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "base_model" not in card.data.to_dict()
    assert "of the activations of own-dinov2 at" in card.text
    assert "what block 1 of the vision transformer gives" in " ".join(card.text.split())
    assert "models/own" not in "".join(
        p.read_text() for p in (tmp_path / "out").rglob("*") if p.suffix in (".md", ".json")
    )
