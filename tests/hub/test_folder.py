"""What is written for the Hub: SAEs under the registered name, true metadata, joinable results, a manifest of all."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.topk_sae import TopK

from ksvd_sae.dictionary import Dictionary
from ksvd_sae.errors import ConfigError, DictionaryError, KsvdSaeError, ManifestError
from ksvd_sae.hub.layout import Manifest
from ksvd_sae.hub.load import load
from ksvd_sae.hub.source import FinishedRun, open_source
from ksvd_sae.hub.write import write_folder
from ksvd_sae.run.config import parse_config
from ksvd_sae.run.pipeline import Run
from ksvd_sae.store import content_hash, file_sha256
from tests.command_line import REPOSITORY
from tests.hub.conftest import CONFIG, HOOK, REPO, Published
from tests.tiny_saes import tiny_dictionary
from tests.tiny_shards import raw_activations
from tests.tolerances import SAE_CODE

IDS = (
    "learned/split",
    "learned/signed",
    "one-sign/nonnegative",
    "weighted/split",
    "weighted/signed",
    "steps/split",
    "steps/signed",
    "steps/matching_pursuit",
    "linear/nonnegative",
)


def config_of(folder: Path, sae_id: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / HOOK / sae_id / "cfg.json").read_text())
    return config


def test_a_folder_for_each_dictionary_and_view(published: Published) -> None:
    manifest = Manifest.read(published.folder / "manifest.json", "test")
    assert set(manifest.saes) == {f"{HOOK}/{sae_id}" for sae_id in IDS}
    files = {str(p.relative_to(published.folder)) for p in published.folder.rglob("*") if p.is_file()}
    assert files == {*manifest.files, "manifest.json"}
    assert all(file_sha256(published.folder / name) == sha for name, sha in manifest.files.items())
    own = {"cfg.json", "sae_weights.safetensors"}
    for sae_id in IDS:
        held = {path.name for path in (published.folder / HOOK / sae_id).iterdir()}
        alone = sae_id in ("linear/nonnegative", "steps/matching_pursuit")
        shown = {"neuronpedia"} if sae_id == "learned/split" else set()
        assert held == own | shown | (set() if alone else {"dictionary.json", "atoms.safetensors"}), sae_id


def test_the_config_says_what_is_true(published: Published) -> None:
    config = config_of(published.folder, "learned/split")
    assert config["architecture"] == "db_ksvd"
    metadata = config["metadata"]
    assert "import ksvd_sae" in metadata.pop("needs")
    assert metadata.pop("trained_by").startswith("ksvd-sae ")
    assert metadata.pop("sae_lens_version")
    assert metadata == {
        "model_name": "some/model",
        "hook_name": HOOK,
        "context_size": 12,
        "prepend_bos": True,
        "dataset_path": "owner/some-texts",
        "exclude_special_tokens": True,
        "outlier_factor": 4.0,
        "tokens_harvested": 2000,
        "training_tokens": 2000,
        "model_from_pretrained_kwargs": {},
        "sae_lens_training_version": None,
    }


@pytest.mark.parametrize(
    ("text", "dataset"),
    [
        ({"source": "hub", "dataset": "owner/some-texts"}, "owner/some-texts"),
        ({"source": "hub", "dataset": "wikitext"}, "wikitext"),
        ({"source": "hub", "dataset": "csv", "data_files": "tables/*.csv"}, None),
        ({"source": "hub", "dataset": "tests/hub"}, None),
        ({"source": "hub", "dataset": "/home/me/texts"}, None),
        ({"source": "hub", "dataset": "~/texts"}, None),
        ({"source": "folder", "dataset": "owner/some-texts"}, None),
        ({"source": "bbc-news"}, None),
    ],
)
def test_only_what_others_can_have_is_named_as_a_data_set(
    text: dict[str, str], dataset: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    run = Run(parse_config({**CONFIG, "text": text}))
    assert FinishedRun(run, Path("results/tiny")).dataset == dataset


def test_split_is_the_default(published: Published) -> None:
    source = open_source(published.results, ["learned"], "split")
    assert [entry.view for entry in source.entries if entry.dictionary is not None] == ["split"]
    sae = load(published.folder, f"{HOOK}/learned/split")
    acts_BF = sae.encode(raw_activations(50)).detach()
    assert float(acts_BF.min()) == 0
    signed = load(published.folder, f"{HOOK}/learned/signed").encode(raw_activations(50)).detach()
    assert float(signed.min()) < 0
    assert torch.equal(acts_BF[:, :24] - acts_BF[:, 24:], signed)


@pytest.mark.parametrize("view", ["split", "signed"])
def test_what_dashboards_ask_for(published: Published, view: str) -> None:
    """The interface that SAEDashboard reads: it encodes all latents at once only where activation_fn is a TopK."""
    sae, x_BLD = load(published.folder, f"{HOOK}/weighted/{view}"), raw_activations(12).reshape(3, 4, 16)
    assert isinstance(sae.activation_fn, TopK)
    assert sae.activation_fn.k == 3
    assert not sae.hook_z_reshaping_mode
    before = sae.encode(x_BLD)
    sae.fold_W_dec_norm()
    chosen = [0, 5, 23]
    assert torch.allclose(sae.encode(x_BLD)[:, :, chosen], before[:, :, chosen], rtol=SAE_CODE)
    assert sae.W_dec[chosen].shape == (3, 16)
    assert (sae.cfg.metadata["model_name"], sae.cfg.metadata.hook_name) == ("some/model", HOOK)
    assert json.dumps(sae.cfg.to_dict())


def test_the_same_run_gives_the_same_bytes(published: Published, tmp_path: Path) -> None:
    again = write_folder(open_source(published.results, [], "both"), REPO, tmp_path / "again", "mit")
    assert again == Manifest.read(published.folder / "manifest.json", "test")


def test_results_are_named_after_the_sae(published: Published) -> None:
    folder = published.folder / "results" / "tiny"
    for view in ("split", "signed"):
        name = f"{REPO}_{HOOK}/learned/{view}_eval_results.json".replace("/", "_")
        result = json.loads((folder / "saebench" / "core" / name).read_text())
        assert result["scores"] == ("learned.s0.split" if view == "split" else "learned.s0")
        assert result["sae_lens_release_id"] == REPO
        assert result["sae_lens_id"] == f"{HOOK}/learned/{view}"
    assert (folder / "comparison.csv").read_bytes() == (published.results / "comparison.csv").read_bytes()
    assert (folder / "plots" / "metrics.png").is_file()


def test_nothing_tells_where_it_was_made(published: Published) -> None:
    texts = [path for path in published.folder.rglob("*") if path.suffix in (".json", ".md", ".csv")]
    assert len(texts) > 20
    secret = str(published.folder.parent)
    assert [path for path in texts if secret in path.read_text()] == []


def test_what_saelens_loads_alone(published: Published) -> None:
    """Its own matching pursuit, whose codes are the dictionary's, and a linear encoder, which says that it is none."""
    x_BD = raw_activations(2500)[2000:]
    theirs = SAE.load_from_disk(published.folder / HOOK / "steps/matching_pursuit")
    ours = load(published.folder, f"{HOOK}/steps/split")
    assert type(theirs).__module__ == "sae_lens.saes.matching_pursuit_sae"
    assert torch.equal(theirs.encode(x_BD) != 0, ours.encode(x_BD) != 0)
    assert torch.allclose(theirs.encode(x_BD), ours.encode(x_BD), rtol=SAE_CODE, atol=1e-3)
    linear = SAE.load_from_disk(published.folder / HOOK / "linear/nonnegative")
    assert linear.cfg.architecture() == "topk"
    assert torch.equal(linear.W_dec, load(published.folder, f"{HOOK}/learned/split").W_dec)
    for sae, of in ((theirs, "steps"), (linear, "learned")):
        assert sae.cfg.metadata.stands_beside == f"{HOOK}/{of}/split"
        assert "needs" not in sae.cfg.metadata


def test_another_code_is_not_passed_off_as_the_same(published: Published) -> None:
    """Default steps, a metric, a refit: SAELens' matching pursuit would code otherwise, so it is not written."""
    assert [e.name for e in published.source.entries if e.view == "matching_pursuit"] == ["steps"]
    # WeightedTopKSAE is a class of this package.
    assert "linear-weighted" not in {entry.name for entry in published.source.entries}


def test_one_dictionary_alone(tmp_path: Path) -> None:
    known = replace(tiny_dictionary(), provenance={"model": "tiny", "hook": HOOK})
    known.save(tmp_path / "my dictionary")
    write_folder(open_source(tmp_path / "my dictionary", [], "split"), REPO, tmp_path / "out", None)
    sae_id = f"{HOOK}/my-dictionary/split"
    assert torch.equal(load(tmp_path / "out", sae_id).b_dec, known.centre_D)
    metadata = config_of(tmp_path / "out", "my-dictionary/split")["metadata"]
    assert not {"dataset_path", "exclude_special_tokens", "training_tokens"} & metadata.keys(), "what nobody knows"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "not recorded" in card
    assert "without a run that scored it" in card
    assert "None was named" in card


def test_a_training_alone(published: Published, tmp_path: Path) -> None:
    assert published.source.run is not None
    trained = published.source.run.first["learned"]
    write_folder(open_source(trained.folder, [], "signed"), REPO, tmp_path / "out", "mit")
    metadata = config_of(tmp_path / "out", "learned.s0/signed")["metadata"]
    assert (metadata["training_tokens"], metadata["tokens_harvested"]) == (2000, 2000)
    assert "2,000 samples" in (tmp_path / "out" / "README.md").read_text()


def refused(error: type[KsvdSaeError], match: str, *arguments: Any) -> None:
    with pytest.raises(error, match=match):
        open_source(*arguments)


def test_what_cannot_be_published(published: Published, tmp_path: Path) -> None:
    refused(ConfigError, "neither a run nor a dictionary", tmp_path, [], "split")
    refused(ConfigError, r"(?s)no dictionary 'pca'.*limit: learned, one-sign", published.results, ["pca"], "split")
    tiny_dictionary().save(tmp_path / "d")
    refused(DictionaryError, "(?s)which model and hook.*provenance", tmp_path / "d", [], "split")
    refused(ConfigError, "holds one dictionary", tmp_path / "d", ["d"], "split")


def test_scores_of_another_training_are_refused(published: Published, tmp_path: Path) -> None:
    results = tmp_path / "tiny"
    shutil.copytree(published.results, results)
    config = (results / "config.yaml").read_text()
    (results / "config.yaml").write_text(re.sub(r"training_seeds:\n- 0\n- 1", "training_seeds:\n- 1\n- 0", config))
    manifest = json.loads((results / "manifest.json").read_text())
    manifest["key"]["dictionaries"]["learned.s1"][0] = "another"
    manifest["hash"] = content_hash(manifest["key"])
    (results / "manifest.json").write_text(json.dumps(manifest))
    refused(ManifestError, r"(?s)not of the dictionaries that are there.*learned\.s1", results, [], "split")


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "../b", "a/..", "a/b--c", "", "a b/c"])
def test_names_that_are_no_repository(published: Published, tmp_path: Path, repo_id: str) -> None:
    with pytest.raises(ConfigError, match="owner/name"):
        write_folder(published.source, repo_id, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_somebody_elses_folder_is_left_alone(published: Published, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ManifestError, match="holds something else"):
        write_folder(published.source, REPO, tmp_path, None)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ManifestError, match="none that"):
        write_folder(published.source, REPO, tmp_path, None)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_write_that_breaks_off_leaves_what_was_there(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(published.source, REPO, tmp_path / "out", "mit")
    before = Manifest.read(tmp_path / "out" / "manifest.json", "test")

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Dictionary, "save", full)
    with pytest.raises(OSError, match="no space left"):
        write_folder(published.source, REPO, tmp_path / "out", "apache-2.0")
    assert Manifest.of(tmp_path / "out", list(before.saes)) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
