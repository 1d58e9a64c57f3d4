"""Benchmarks on activations: those of a finished harvest, with the config's dictionaries where they fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_lens import SAE

from ksvd_sae import import_sae
from ksvd_sae.bench.problems import activation_problem
from ksvd_sae.bench.settings import Settings
from ksvd_sae.bench.suites import run as run_suites
from ksvd_sae.errors import ManifestError, ShapeError
from ksvd_sae.learning.fvu import fvu
from ksvd_sae.run.config import load_config
from ksvd_sae.run.pipeline import Run
from tests.tiny_shards import raw_activations, write_harvest
from tests.tolerances import LOGGED_FVU

D, M, K = 16, 24, 3
CONFIG: dict[str, Any] = {
    "model": {"name": "gpt2", "hook": "blocks.8.hook_resid_post"},
    "text": {"source": "hub", "dataset": "owner/texts"},
    "harvest": {"train_tokens": 1000, "heldout_tokens": 100},
    "dictionaries": {
        "ours": {"kind": "db_ksvd", "n_atoms": M, "k": K, "batch_samples": 500},
        "sae": {"kind": "topk_sae", "n_atoms": M, "k": K, "passes": 1, "batch_samples": 100},
    },
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KSVD_SAE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture
def harvested(config: Path) -> Path:
    run = Run(load_config(config))
    x_ND = raw_activations(1200, D, M, K)
    write_harvest(run.harvest_folder, run._harvest_key, x_ND[:1000], x_ND[1000:])
    return config


def test_no_harvest_names_the_command(config: Path) -> None:
    with pytest.raises(ManifestError, match="are not in the cache") as caught:
        activation_problem(config, 100, M, K, 0, learn=True)
    assert f"`ksvd-sae harvest {config}`" in str(caught.value)
    assert "--data planted" in str(caught.value)


def test_too_few_samples(harvested: Path) -> None:
    with pytest.raises(ShapeError, match=r"the heldout part .* has too few samples"):
        activation_problem(harvested, 100, M, K, 201, learn=True)


def test_a_dictionary_is_learned_where_none_is_trained(harvested: Path) -> None:
    problem = activation_problem(harvested, 400, M, K, 50, learn=True)
    run = Run(load_config(harvested))
    torch.testing.assert_close(problem.x_ND + problem.centre_D, run.shards("train").tensor()[:400])
    torch.testing.assert_close(problem.heldout_ND + problem.centre_D, run.shards("heldout").tensor()[:50])
    assert problem.dictionary == "db-ksvd, one pass over 1,000 samples"
    assert tuple(problem.atoms_MD.shape) == (M, D)
    assert problem.topk_folder is None
    samples = activation_problem(harvested, 400, M, K, 0, learn=False)
    assert samples.dictionary == "samples"
    assert len(samples.heldout_ND) == 0


def test_trained_dictionaries_are_used_where_they_fit(harvested: Path, tmp_path: Path) -> None:
    trained = {one.name: one for one in Run(load_config(harvested)).train()}
    problem = activation_problem(harvested, 400, M, K, 0, learn=True)
    assert problem.dictionary == "tiny's db-ksvd"
    assert problem.topk_folder == trained["sae"].folder
    assert activation_problem(harvested, 400, M + 1, K, 0, learn=True).topk_folder is None
    settings = Settings(config=harvested, samples=400, atoms=M, k=K, repeats=1, peers="sae-lens")
    rows, failures = run_suites(("coding",), settings, tmp_path / "bench")
    assert failures == []
    topk = next(row for row in rows if row["config"] == "topk")
    assert topk["note"] == "the config's own SAE"
    assert 0 < topk["fvu"] < 1
    assert {row["dictionary"] for row in rows} == {"tiny's db-ksvd"}
    assert {row["data"] for row in rows} == {"gpt2 blocks.8.hook_resid_post, owner/texts"}


def test_the_atoms_of_the_sae_are_imported(harvested: Path, tmp_path: Path) -> None:
    """Its own encoder and the pursuits have the same atoms."""
    with pytest.raises(ManifestError, match=r"(?s)no trained TopK SAE of 24 latents and k = 3.*`ksvd-sae train"):
        activation_problem(harvested, 400, M, K, 0, learn=True, imported=True)
    trained = {one.name: one for one in Run(load_config(harvested)).train()}
    problem = activation_problem(harvested, 400, M, K, 50, learn=True, imported=True)
    dictionary = import_sae(trained["sae"].folder)
    assert torch.equal(problem.atoms_MD, dictionary.atoms_MD)
    run = Run(load_config(harvested))
    torch.testing.assert_close(problem.x_ND + dictionary.centre_D, run.shards("train").tensor()[:400])
    torch.testing.assert_close(problem.heldout_ND + dictionary.centre_D, run.shards("heldout").tensor()[:50])
    settings = Settings("imported", config=harvested, samples=400, atoms=M, k=K, repeats=1, peers="sae-lens")
    rows, failures = run_suites(("coding",), settings, tmp_path / "bench")
    assert failures == []
    assert {(row["case"], row["dictionary"]) for row in rows} == {("imported", "tiny's topk-sae")}
    own = next(row for row in rows if row["config"] == "topk")
    sae, x_ND = SAE.load_from_disk(trained["sae"].folder), run.shards("train").tensor()[:400]
    assert own["fvu"] == pytest.approx(fvu(x_ND, sae(x_ND).detach(), "test"), rel=LOGGED_FVU)
