"""The stages of a run from a harvest on: what is finished is reused, what does not fit is refused, nothing is lost."""

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sae_lens import SAE
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import save_file

from ksvd_sae.activations.collecting import Collection
from ksvd_sae.activations.gradients import GRADIENTS_FILE, GradientMoments, gradients_folder, gradients_key
from ksvd_sae.activations.harvest import HELDOUT_DOCUMENTS
from ksvd_sae.dictionary import Dictionary
from ksvd_sae.errors import ConfigError, EvaluationError, KsvdSaeError, ManifestError
from ksvd_sae.learning.dbksvd import DictionaryLearner
from ksvd_sae.methods import METHODS, db_ksvd
from ksvd_sae.methods.base import TRAIN_LOG, Derived, Facts, Method
from ksvd_sae.methods.db_ksvd import DBKSVDMethod
from ksvd_sae.report.compare import compare, table_so_far
from ksvd_sae.run.config import RunConfig, parse_config
from ksvd_sae.run.pipeline import Run, Scores
from ksvd_sae.run.replicas import replicas
from ksvd_sae.run.trained import TrainedDictionary
from ksvd_sae.store import MANIFEST, content_hash, file_sha256, write_json, write_manifest
from tests.tiny_saes import one_thread
from tests.tiny_shards import raw_activations, write_harvest
from tests.tolerances import HELDOUT_METRIC, UNIT_NORM

D_IN = 16
RAW: dict[str, Any] = {
    "name": "tiny-run",
    "device": "cpu",
    "model": {"name": "some/model", "hook": "blocks.0.hook_resid_post"},
    "text": {"source": "hub", "dataset": "owner/some-texts"},
    "harvest": {"train_tokens": 2000, "heldout_tokens": 500, "context_tokens": 12},
    "dictionaries": {
        "db-ksvd": {"kind": "db_ksvd", "n_atoms": 24, "k": 3, "batch_samples": 500, "passes": 2},
        "topk-sae": {"kind": "topk_sae", "n_atoms": 24, "k": 3, "passes": 2, "batch_samples": 128},
        "pca": {"kind": "pca", "k": 3},
        "random": {"kind": "random", "n_atoms": 24, "k": 3},
    },
    "evaluation": {"core": None, "sparse_probing": None},
    # There is no model here to read text.
    "report": {"atoms": 0},
}


def config_with(**changes: Any) -> RunConfig:
    """RAW with whole top-level values replaced."""
    return parse_config({**deepcopy(RAW), **changes})


def only(*names: str, **more: dict[str, Any]) -> RunConfig:
    return config_with(dictionaries={**{name: RAW["dictionaries"][name] for name in names}, **more})


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Folder with cache/ and results/, where the harvest of RAW is finished."""
    harvested = config_with().harvested
    key, folder = harvested.key, harvested.folder(tmp_path / "cache")
    x_ND = raw_activations(2500)
    write_harvest(folder, key, x_ND[:2000], x_ND[2000:])
    rows = [{"text": f"document {i}"} for i in range(3)]
    (folder / HELDOUT_DOCUMENTS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run_in(place: Path, config: RunConfig | None = None) -> Run:
    return Run(config or config_with(), place / "results", place / "cache")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds that are really learned, in order."""
    done: list[str] = []

    def counted(kind: type[Method]) -> Any:
        original = kind.train

        def train(self: Method, *rest: Any) -> Facts:
            done.append(self.kind)
            return original(self, *rest)

        return train

    for kind in METHODS:
        if not issubclass(kind, Derived):
            monkeypatch.setattr(kind, "train", counted(kind))
    return done


# ---------------------------------------------------------------- the model


def own_weights(folder: Path) -> Path:
    """A folder that is taken for a model's until it is loaded."""
    folder.mkdir()
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def test_saes_say_what_they_are_of(place: Path) -> None:
    """Which weights, and whether contexts began with a BOS: as learned, as loaded, and as evals are told."""
    folder = own_weights(place / "tuned")
    config = parse_config({**deepcopy(RAW), "model": {**RAW["model"], "weights": str(folder)}})
    shutil.copytree(config_with().harvested.folder(place / "cache"), config.harvested.folder(place / "cache"))
    path = config.harvested.folder(place / "cache") / MANIFEST
    write_manifest(path.parent, "harvest", config.harvested.key, **facts_of(path), prepend_bos=False)
    run = run_in(place, config)
    content = str(config.model.content_hash())
    for trained in run.train():
        stored = json.loads(next(trained.folder.rglob("cfg.json")).read_text())["metadata"]
        for metadata in (stored, run.load_sae(trained).cfg.metadata.to_dict()):
            assert metadata["model_weights"] == {"name": "tuned", "content": content}, trained.name
            assert metadata["prepend_bos"] is False
    assert run.eval_setting.model == {"name": "some/model", "weights": content, "prepend_bos": False}
    assert run.evaluate()["prepend_bos"] is False


def facts_of(manifest: Path) -> dict[str, Any]:
    given = ("stage", "hash", "key", "versions", "commit", "written", "checksum", "prepend_bos")
    return {name: value for name, value in json.loads(manifest.read_text()).items() if name not in given}


@pytest.mark.parametrize(
    ("wanted", "harvested", "told"),
    [("auto", True, None), ("auto", False, False), (True, True, True), (False, False, False)],
)
def test_what_evals_are_told_of_bos(wanted: Any, harvested: bool, told: bool | None, place: Path) -> None:
    """Nothing where it is as ever: what was scored so is found again."""
    config = config_with(harvest={**RAW["harvest"], "prepend_bos": wanted})
    folder = config.harvested.folder(place / "cache")
    if not folder.exists():
        shutil.copytree(config_with().harvested.folder(place / "cache"), folder)
    write_manifest(folder, "harvest", config.harvested.key, **facts_of(folder / MANIFEST), prepend_bos=harvested)
    assert run_in(place, config).eval_setting.prepend_bos is told


def test_weights_that_changed_at_their_place(place: Path) -> None:
    folder = own_weights(place / "tuned")
    config = parse_config({**deepcopy(RAW), "model": {**RAW["model"], "weights": str(folder)}})
    before = run_in(place, config).harvest_folder
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    assert run_in(place, config).harvest_folder != before


# ---------------------------------------------------------------- train


def heldout_fvu(run: Run, trained: TrainedDictionary) -> float:
    """Of the SAE that evals get, in float64 numpy."""
    x_BD = run.shards("heldout").tensor()
    rebuilt = run.load_sae(trained)(x_BD).detach().double().numpy()
    x = x_BD.double().numpy()
    return float(((x - rebuilt) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum())


def test_identity_leaves_activations_as_they_are(place: Path) -> None:
    run = run_in(place, only("pca", identity={"kind": "identity", "view": "both"}))
    trained = {t.name: t for t in run.train()}["identity"]
    x_BD = run.shards("heldout").tensor()[:20]
    signed, split = (run.load_sae(viewed) for viewed in trained.in_views())
    assert torch.equal(signed.encode(x_BD), x_BD)
    assert torch.equal(split.encode(x_BD), torch.cat([x_BD.clamp(min=0), (-x_BD).clamp(min=0)], dim=1))
    for sae in (signed, split):
        assert torch.equal(sae.decode(sae.encode(x_BD)), x_BD)
    table = pd.DataFrame(run.evaluate()["rows"]).set_index(["dictionary", "view", "metric"])["value"]
    for view in ("signed", "split"):
        assert table["identity", view, "fvu"] == 0
        assert table["identity", view, "l0"] == D_IN
    facts = trained.facts(None)
    assert (facts["k"], facts["d_sae"], facts["seed"]) == (D_IN, D_IN, None)


def test_all_kinds(place: Path) -> None:
    run = run_in(place)
    trained = {t.name: t for t in run.train()}
    assert list(trained) == ["db-ksvd", "topk-sae", "pca", "random"]
    for name, one in trained.items():
        assert one.folder.parent == place.resolve() / "cache" / "dictionaries"
        assert one.manifest["stage"] == "train"
        assert one.manifest["name"] == name
        assert one.manifest["seconds"] >= 0
        # SAELens loads what is on disk, and what evals get codes alike.
        stored = SAE.load_from_disk(one.folder if name == "topk-sae" else one.folder / "sae")
        loaded = run.load_sae(one)
        x_BD = run.shards("heldout").tensor()[:20]
        assert torch.equal(stored.encode(x_BD), loaded.encode(x_BD))
        assert int((loaded.encode(x_BD) != 0).sum(dim=1).max()) <= 3
        found = loaded.cfg.metadata
        assert (found.model_name, found.hook_name, found.context_size) == ("some/model", RAW["model"]["hook"], 12)
        norms_M = torch.linalg.vector_norm(loaded.W_dec.detach(), dim=1)
        assert float((norms_M - 1).abs().max()) < UNIT_NORM[torch.float32]
    seen = {name: one.manifest["samples_seen"] for name, one in trained.items()}
    assert seen == {"db-ksvd": 4000, "topk-sae": 4000 // 128 * 128, "pca": 2000, "random": 0}
    fvu = {name: heldout_fvu(run, one) for name, one in trained.items()}
    assert fvu["db-ksvd"] < fvu["random"] < 1
    assert fvu["db-ksvd"] < 0.5 * fvu["pca"]
    log = (trained["db-ksvd"].folder / TRAIN_LOG).read_text().splitlines()
    assert [json.loads(line)["samples_seen"] for line in log] == list(range(500, 4001, 500))


def test_provenance_travels_with_the_dictionary(place: Path) -> None:
    run = run_in(place, only("db-ksvd"))
    (trained,) = run.train()
    found = Dictionary.load(trained.folder).provenance
    assert found == {
        "model": "some/model",
        "hook": RAW["model"]["hook"],
        "harvest": content_hash(config_with().harvested.key),
    }


def test_pca_is_the_principal_subspace(place: Path) -> None:
    run = run_in(place, only("pca"))
    (trained,) = run.train()
    x = run.shards().tensor().double().numpy()
    kept = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)[2][:3]
    atoms = Dictionary.load(trained.folder).atoms_MD.double().numpy()
    assert np.linalg.svd(atoms @ kept.T)[1] == pytest.approx(1, abs=1e-6)


def test_finished_trainings_are_reused(place: Path, trainings: list[str]) -> None:
    first = run_in(place).train()
    assert trainings == ["db_ksvd", "topk_sae", "pca", "random"]
    before = snapshot(place / "cache")
    again = run_in(place).train()
    assert len(trainings) == 4
    assert again == first == run_in(place).trained()
    assert snapshot(place / "cache") == before


def test_coders_share_a_training(place: Path, trainings: list[str]) -> None:
    refit = {**RAW["dictionaries"]["db-ksvd"], "coder": "mp_refit"}
    run = run_in(place, only("db-ksvd", refit=refit, omp={**refit, "coder": "omp"}))
    plain, refitted, omp = run.train()
    assert trainings == ["db_ksvd"]
    assert plain.folder == refitted.folder == omp.folder
    assert len({plain.content, refitted.content, omp.content}) == 3
    saes = [run.load_sae(one) for one in (plain, refitted, omp)]
    assert [sae.cfg.coding.coder for sae in saes] == ["mp", "mp_refit", "omp"]
    x_BD = run.shards("heldout").tensor()
    errors = [float(torch.linalg.vector_norm(sae(x_BD).detach() - x_BD)) for sae in saes]
    assert errors[1] < errors[0]
    assert errors[2] < errors[0]


def test_content_is_the_same_under_another_name(place: Path) -> None:
    (first,) = run_in(place, only("db-ksvd")).train()
    (second,) = run_in(place, only(other=RAW["dictionaries"]["db-ksvd"])).train()
    assert first.content == second.content


@pytest.mark.parametrize(
    "change",
    [
        {"dictionaries": {"db-ksvd": {**RAW["dictionaries"]["db-ksvd"], "n_atoms": 25}}},
        {"dictionaries": {"db-ksvd": {**RAW["dictionaries"]["db-ksvd"], "passes": 1}}},
        {"dictionaries": {"db-ksvd": {**RAW["dictionaries"]["db-ksvd"], "max_steps_factor": 1}}},
    ],
    ids=["n_atoms", "passes", "max_steps_factor"],
)
def test_another_config_trains_in_another_folder(place: Path, trainings: list[str], change: dict[str, Any]) -> None:
    (first,) = run_in(place, only("db-ksvd")).train()
    before = snapshot(first.folder)
    (second,) = run_in(place, config_with(**change)).train()
    assert trainings == ["db_ksvd", "db_ksvd"]
    assert second.folder != first.folder
    assert second.content != first.content
    assert snapshot(first.folder) == before


def test_a_training_follows_from_its_options_and_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    method = config_with().dictionaries["db-ksvd"]
    key = method.key()
    assert key["precision"] == "float32"
    assert not {"coder", "view", "seed"} & set(key), "what is chosen afterwards, and what a key has by itself"
    monkeypatch.setattr(type(method), "version", 99)
    assert method.key() == {**key, "version": 99}


def test_another_seed_needs_another_harvest(place: Path) -> None:
    """The harvest shuffles by the seed, so what is learned on it depends on it too."""
    with pytest.raises(ManifestError, match=r"(?s)no manifest\.json there.*ksvd-sae harvest"):
        run_in(place, config_with(seed=1)).train()


def test_name_of_the_run_and_evaluation_do_not_matter_to_training(place: Path, trainings: list[str]) -> None:
    (first,) = run_in(place, only("pca")).train()
    other = config_with(name="other", dictionaries={"pca": RAW["dictionaries"]["pca"]}, evaluation={"core": {}})
    (second,) = run_in(place, other).train()
    assert second.folder == first.folder
    assert trainings == ["pca"]


# ---------------------------------------------------------------- what does not fit


def unsealed(path: Path) -> dict[str, Any]:
    """A manifest, without the checksum that tells that it was edited."""
    return {name: value for name, value in json.loads(path.read_text()).items() if name != "checksum"}


def edit_key_and_hash(manifest: dict[str, Any]) -> Any:
    key = {**manifest["key"], "seed": 5}
    return {**manifest, "key": key, "hash": content_hash(key)}


def edit_key(manifest: dict[str, Any]) -> Any:
    return {**manifest, "key": {**manifest["key"], "seed": 5}}


def edit_hash(manifest: dict[str, Any]) -> Any:
    return {**manifest, "hash": "0" * 12}


def edit_stage(manifest: dict[str, Any]) -> Any:
    return {**manifest, "stage": "harvest"}


def edit_away(manifest: dict[str, Any]) -> Any:
    return []


@pytest.mark.parametrize("edit", [edit_key_and_hash, edit_key, edit_hash, edit_stage, edit_away])
def test_edited_manifest_is_refused_and_nothing_deleted(place: Path, trainings: list[str], edit: Any) -> None:
    run = run_in(place, only("db-ksvd"))
    (trained,) = run.train()
    path = trained.folder / MANIFEST
    write_json(path, edit(unsealed(path)))
    before = snapshot(place)
    for stage in (run.train, run.trained):
        with pytest.raises(ManifestError):
            stage()
    assert snapshot(place) == before
    assert trainings == ["db_ksvd"]


def test_truncated_manifest_is_refused_and_nothing_deleted(place: Path) -> None:
    run = run_in(place, only("db-ksvd"))
    (trained,) = run.train()
    path = trained.folder / MANIFEST
    path.write_bytes(path.read_bytes()[:50])
    before = snapshot(place)
    with pytest.raises(ManifestError, match="not JSON"):
        run.train()
    assert snapshot(place) == before


def test_harvest_of_another_config_is_refused(place: Path) -> None:
    run = run_in(place)
    path = run.harvest_folder / MANIFEST
    write_json(path, edit_key_and_hash(unsealed(path)))
    with pytest.raises(ManifestError, match=r"another config\n  got: seed: found 5, wanted 0"):
        run.train()
    assert not (place / "cache" / "dictionaries").exists()


def test_gradient_moments_of_the_run(place: Path) -> None:
    with pytest.raises(ManifestError, match=r"set harvest\.gradient_tokens"):
        run_in(place).gradient_moments()
    run = run_in(place, config_with(harvest={**RAW["harvest"], "gradient_tokens": 100}))
    assert run.harvest_folder == run_in(place).harvest_folder
    key = gradients_key(content_hash(config_with().harvested.key), run.config.harvest)
    folder = gradients_folder(run.harvest_folder, key)
    GradientMoments(100, torch.eye(D_IN, dtype=torch.float64)).save(folder / GRADIENTS_FILE)
    with pytest.raises(ManifestError, match=r"set harvest\.gradient_tokens"):
        run.gradient_moments()
    write_manifest(folder, "gradients", key, sha256=file_sha256(folder / GRADIENTS_FILE))
    assert run.gradient_moments().n_tokens == 100


def test_no_cache_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(ManifestError, match=r"cannot be made(.*\n)*.*set KSVD_SAE_CACHE"):
        run_in(tmp_path).prepare()


def test_before_training(place: Path) -> None:
    with pytest.raises(ManifestError, match=r"run `ksvd-sae train CONFIG\.yaml`"):
        run_in(place).trained()


# ---------------------------------------------------------------- so far


def begin_harvest(run: Run, n_samples: int) -> Run:
    """Collect this run's harvest, in parts of 400, as far as so many training samples go; gives the run."""
    x_ND, collection = raw_activations(2500), Collection(run.harvest_folder, run.config.harvest, "contexts")

    def fill(part: str, x_ND: torch.Tensor) -> bool:
        return collection.fill(part, iter(x_ND.split(10)), 4, torch.cat, len, lambda *_: None)

    assert fill("heldout", x_ND[2000:])
    (run.harvest_folder / HELDOUT_DOCUMENTS).write_text('{"text": "a document"}\n')
    assert not fill("train", x_ND[:n_samples])
    return run


IN_PARTS = config_with(harvest={**RAW["harvest"], "shard_tokens": 400})


def test_training_on_what_there_is(tmp_path: Path, trainings: list[str]) -> None:
    run = begin_harvest(run_in(tmp_path, IN_PARTS), 900)
    some = run.so_far()
    assert some.config.name == "tiny-run.so-far-800"
    assert some.harvest().n_samples == 800
    first = some.train()
    assert [t.manifest.get("tokens_harvested") for t in first] == [800] * 4
    assert first[0].manifest["samples_seen"] == 2 * 800
    # As if no more had been asked for: what reads a run reads this one.
    fewer = {**RAW["harvest"], "shard_tokens": 400, "train_tokens": 800}
    assert run_in(tmp_path, config_with(harvest=fewer)).trained() == first
    assert SAE.load_from_disk(first[0].folder / "sae").cfg.d_sae == 24
    rows = {(row["dictionary"], row["metric"]): row["value"] for row in some.evaluate()["rows"]}
    assert rows["db-ksvd", "fvu"] == pytest.approx(heldout_fvu(some, first[0]), rel=1e-5)
    assert compare(some).parent.name == some.config.name
    # Nothing new, then more, then all.
    assert run_in(tmp_path, IN_PARTS).so_far().train() == first
    assert len(trainings) == 4
    more = begin_harvest(run, 1300).so_far()
    assert more.harvest().n_samples == 1200
    second = more.train()
    assert len(trainings) == 8
    assert not {t.folder for t in first} & {t.folder for t in second}
    with pytest.raises(ManifestError, match="no manifest"):
        run.train()
    x_ND = raw_activations(2500)
    write_harvest(run.harvest_folder, run.data.key, x_ND[:2000], x_ND[2000:])
    assert run.so_far() is run
    assert [t.manifest["tokens_harvested"] for t in run.train()] == [2000] * 4
    assert len(trainings) == 12


def test_the_harvest_ends_while_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its raw parts go, and what is there then is all."""
    run = begin_harvest(run_in(tmp_path, IN_PARTS), 900)
    x_ND, link = raw_activations(2500), os.link

    def end(*files: Path) -> None:
        write_harvest(run.harvest_folder, run.data.key, x_ND[:2000], x_ND[2000:])
        shutil.rmtree(run.harvest_folder / "raw", ignore_errors=True)
        link(*files)

    monkeypatch.setattr("os.link", end)
    assert run.so_far() is run


def test_all_is_collected_but_not_finished(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Then there is nothing to be had before the harvest's end."""
    caplog.set_level("INFO", "ksvd_sae")
    run = run_in(tmp_path, config_with(harvest={**RAW["harvest"], "shard_tokens": 400, "train_tokens": 800}))
    collection = begin_harvest(run_in(tmp_path, IN_PARTS), 900).harvest_folder
    shutil.copytree(collection, run.harvest_folder)
    assert run.so_far() is run
    assert run.harvest().n_samples == 800
    assert "all training tokens are collected" in caplog.text


def test_too_little_for_a_dictionary(tmp_path: Path) -> None:
    large = {"kind": "random", "n_atoms": 900, "k": 3}
    config = config_with(harvest={**RAW["harvest"], "shard_tokens": 400}, dictionaries={"large": large})
    run = begin_harvest(run_in(tmp_path, config), 900)
    wanted = r"(?s)so far: too few .* dictionaries\.large: n_atoms = 900 .* 800.*got: 800 of 2,000.*cure: run again"
    with pytest.raises(ConfigError, match=wanted):
        run.so_far()
    assert len(list((tmp_path / "cache" / "activations").iterdir())) == 1


# ---------------------------------------------------------------- two at once


def test_two_runs_on_one_cache_train_once(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The second waits for the first and takes its result: one log, and nothing half there."""
    caplog.set_level("INFO", "ksvd_sae")
    trainings, started = [], threading.Event()
    original = DictionaryLearner.fit

    def slow(self: Any, *args: Any, **options: Any) -> Any:
        trainings.append(threading.current_thread().name)
        started.set()
        time.sleep(0.5)
        return original(self, *args, **options)

    monkeypatch.setattr(DictionaryLearner, "fit", slow)
    found: list[TrainedDictionary] = []
    runs = [threading.Thread(target=lambda: found.extend(run_in(place, only("db-ksvd")).train())) for _ in range(3)]
    runs[0].start()
    assert started.wait(60)
    for run in runs[1:]:
        run.start()
    for run in runs:
        run.join(60)
    assert len(trainings) == 1
    assert len({one.folder for one in found}) == 1
    assert len(found) == 3
    lines = (found[0].folder / TRAIN_LOG).read_text().splitlines()
    assert len(lines) == 2 * 4
    assert sum("waiting for its result" in record.message for record in caplog.records) == 2
    assert f"process {os.getpid()}" in caplog.text


def test_a_training_that_fails_lets_the_next_one_try(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_in(place, only("db-ksvd"))
    with monkeypatch.context() as patch:
        patch.setattr(DictionaryLearner, "fit", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.train()
    assert len(run.train()) == 1


# ---------------------------------------------------------------- interrupted


class StopError(Exception):
    pass


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["db-ksvd", "topk-sae"])
def test_interrupted_training_is_done_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, kind: str, error: type[BaseException]
) -> None:
    """Stopped with a log and weights half there; the same bits come out as of a training that was not stopped."""
    run = run_in(place, only(kind))
    owner, name = (DictionaryLearner, "fit") if kind == "db-ksvd" else (SAETrainer, "fit")
    original = getattr(owner, name)

    def stopped(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopped)
        with pytest.raises(error):
            run.train()
    (left,) = (place / "cache" / "dictionaries").iterdir()
    assert not (left / MANIFEST).exists()
    with pytest.raises(ManifestError):
        run.trained()
    (left / "half-written.tmp").write_text("left over")
    (trained,) = run.train()
    assert trained.folder == left
    assert "half-written.tmp" not in snapshot(left)
    weights = snapshot(left)
    (left / MANIFEST).unlink()
    (again,) = run.train()
    compared = {name for name in weights if name.endswith(".safetensors")}
    assert compared
    assert {name: weights[name] for name in compared} == {name: snapshot(again.folder)[name] for name in compared}


def test_stopped_db_ksvd_goes_on_from_its_checkpoint(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left after being killed: the batches before the checkpoint are not done again, and no bit differs."""
    raw = {**RAW["dictionaries"]["db-ksvd"], "passes": 3, "batch_samples": 400}
    monkeypatch.setattr(db_ksvd, "CHECKPOINT_BATCHES", 2)
    run = run_in(place, only(long=raw))
    (whole,) = run.train()
    wanted, log = snapshot(whole.folder), (whole.folder / TRAIN_LOG).read_text().splitlines()
    shutil.rmtree(whole.folder)
    seen: list[int] = []

    def count_and_stop(entry: Any) -> None:
        seen.append(entry.samples_seen)
        if len(seen) == 5:
            raise StopError

    first = DBKSVDMethod._learner
    stopping = lambda self, setting, on_batch, folder: first(self, setting, count_and_stop, folder)  # noqa: E731
    monkeypatch.setattr(DBKSVDMethod, "_learner", stopping)
    with pytest.raises(StopError):
        run.train()
    assert (whole.folder / db_ksvd.CHECKPOINT).exists()
    (again,) = run.train()
    assert seen[5] == seen[4], "the fifth batch came after the last checkpoint"
    assert len(seen) == len(log) + 1
    assert not (again.folder / db_ksvd.CHECKPOINT).exists()
    assert {name: bits for name, bits in snapshot(again.folder).items() if name.endswith(".safetensors")} == {
        name: bits for name, bits in wanted.items() if name.endswith(".safetensors")
    }
    assert len((again.folder / TRAIN_LOG).read_text().splitlines()) == len(log)


def test_one_that_fails_leaves_those_before_it(place: Path, trainings: list[str]) -> None:
    """k above d_in is only known once the harvest is there."""
    too_many = {"kind": "db_ksvd", "n_atoms": 24, "k": D_IN + 1}
    run = run_in(place, only("pca", broken=too_many))
    with pytest.raises(KsvdSaeError, match="k is above d_in"):
        run.train()
    assert trainings == ["pca", "db_ksvd"]
    run_in(place, only("pca")).train()
    assert trainings == ["pca", "db_ksvd"]


# ---------------------------------------------------------------- evaluate and compare


def test_evaluate_and_compare_without_saebench(place: Path) -> None:
    run = run_in(place)
    run.train()
    with pytest.raises(ManifestError, match="ksvd-sae evaluate"):
        compare(run)
    manifest = run.evaluate()
    assert run.evaluated() == json.loads(json.dumps(manifest))
    rows = {(row["dictionary"], row["eval"], row["metric"]): row for row in manifest["rows"]}
    assert {(name, "heldout", "fvu") for name in RAW["dictionaries"]} <= set(rows)
    assert rows["pca", "heldout", "fvu"]["value"] == pytest.approx(heldout_fvu(run, run.trained()[2]), rel=1e-5)
    assert rows["pca", "heldout", "fvu"]["data"] == "some-texts-heldout"
    assert rows["pca", "heldout", "fvu"]["n"] == 500
    assert rows["db-ksvd", "training", "samples_seen"]["value"] == 4000
    assert {name: rows[name, "heldout", "l0"]["view"] for name in RAW["dictionaries"]} == {
        "db-ksvd": "signed",
        "topk-sae": "non-negative",
        "pca": "signed",
        "random": "signed",
    }
    report = compare(run)
    assert report == place.resolve() / "results" / "tiny-run" / "report.html"
    assert "core, sparse_probing" in (run.results / "comparison.md").read_text(), "what was not run is named"
    for path in run.results.rglob("*"):
        if path.suffix in (".json", ".md", ".csv", ".yaml", ".html", ".jsonl"):
            assert str(place) not in path.read_text(), path


def both_views(*names: str) -> RunConfig:
    return only(**{name: {**RAW["dictionaries"][name], "view": "both"} for name in names})


@torch.no_grad()
def test_both_views_of_one_training(place: Path, trainings: list[str]) -> None:
    run = run_in(place, both_views("db-ksvd", "pca", "random"))
    trained = run.train()
    assert trainings == ["db_ksvd", "pca", "random"]
    viewed = [one for t in trained for one in t.in_views()]
    names = ["db-ksvd", "db-ksvd.split", "pca", "pca.split", "random", "random.split"]
    assert [one.panelist for one in viewed] == names
    assert len({one.content for one in viewed}) == 6
    x_BD = run.shards("heldout").tensor()[:50]
    for signed, split in zip(viewed[::2], viewed[1::2], strict=True):
        assert split.folder == signed.folder
        one, two = run.load_sae(signed), run.load_sae(split)
        assert two.cfg.d_sae == 2 * one.cfg.d_sae
        assert torch.equal(two(x_BD), one(x_BD))
        assert float(two.encode(x_BD).min()) == 0 > float(one.encode(x_BD).min())
    manifest = run.evaluate()
    assert trainings == ["db_ksvd", "pca", "random"]
    assert list(manifest["files"]["heldout"]) == names
    assert all(file.startswith(f"{name}-") for name, file in manifest["files"]["heldout"].items())
    rows = {(row["dictionary"], row["view"], row["eval"], row["metric"]): row for row in manifest["rows"]}
    for name, size in (("db-ksvd", 24), ("pca", 3), ("random", 24)):
        found = [rows[name, view, "heldout", "fvu"] for view in ("signed", "split")]
        assert found[0]["value"] == pytest.approx(found[1]["value"], rel=HELDOUT_METRIC)
        assert [row["d_sae"] for row in found] == [size, 2 * size]
        assert found[0]["l0"] == pytest.approx(found[1]["l0"])
        assert found[1]["source"] == manifest["files"]["heldout"][f"{name}.split"]
        assert {rows[name, view, "training", "samples_seen"]["d_sae"] for view in ("signed", "split")} == {
            size,
            2 * size,
        }
    compare(run)
    markdown = (run.results / "comparison.md").read_text()
    scores = markdown.partition("\n## ")[0]
    shown = [[cell.strip() for cell in line.split("|")[1:4]] for line in scores.splitlines() if line[:2] == "| "][1:]
    assert shown[:2] == [["db-ksvd", "signed", "24"], ["db-ksvd", "split", "48"]]
    assert [row[:2] for row in shown[2:]] == [
        [name, view] for name in ("pca", "random") for view in ("signed", "split")
    ]
    assert "View 'split' cuts a signed code" in markdown


def test_view_alone_takes_the_scores_of_both(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view has one name and one content, whatever stands beside it."""
    run = run_in(place, both_views("db-ksvd"))
    run.train()
    first = run.evaluate()

    def refuse(*args: Any) -> None:
        raise AssertionError("a finished score is computed again")

    monkeypatch.setattr(Run, "load_sae", refuse)
    for view in ("split", "signed"):
        alone = run_in(place, only(**{"db-ksvd": {**RAW["dictionaries"]["db-ksvd"], "view": view}}))
        assert alone.evaluate()["rows"] == [row for row in first["rows"] if row["view"] == view]


def test_another_view_is_another_evaluation_of_the_same_training(place: Path) -> None:
    run, split = run_in(place, only("db-ksvd")), run_in(place, both_views("db-ksvd"))
    (trained,), (both,) = run.train(), split.train()
    assert trained.in_views() == [trained]
    assert both.manifest == trained.manifest
    run.evaluate()
    with pytest.raises(ManifestError):
        split.evaluated()


def test_content_is_known_before_the_training(place: Path) -> None:
    run = run_in(place)
    known = {replica.label: run.content(replica) for replica in replicas(run.config)}
    assert known == {one.label: one.content for one in run.train()}


def test_scores_come_in_as_trainings_end(place: Path, trainings: list[str]) -> None:
    """Each dictionary is scored as soon as it is there, and what has come in is whole."""
    run, shown = run_in(place), list[tuple[str, int, list[str], str]]()

    def show(scores: Scores) -> None:
        dictionaries = list(dict.fromkeys(row["dictionary"] for row in scores.rows))
        shown.append((scores.news, len(trainings), dictionaries, table_so_far(run.config, scores)))

    manifest = run.evaluate(show, train=True)
    names = list(RAW["dictionaries"])
    assert [news for news, *_ in shown] == names
    assert [n_trained for _, n_trained, *_ in shown] == [1, 2, 3, 4]
    assert [dictionaries for *_, dictionaries, _ in shown] == [names[: n + 1] for n in range(4)]
    assert all("FVU" in text and "probing" not in text for *_, text in shown)
    rows = run_in(place).evaluate()["rows"]
    assert rows == manifest["rows"]


def test_a_training_that_fails_takes_no_score_with_it(place: Path) -> None:
    """k above d_in is only known once the harvest is there."""
    broken = {"kind": "db_ksvd", "n_atoms": 24, "k": D_IN + 1}
    run, shown = run_in(place, only("pca", broken=broken, **{"random": RAW["dictionaries"]["random"]})), list[str]()
    with pytest.raises(KsvdSaeError, match="k is above d_in"):
        run.evaluate(lambda scores: shown.append(scores.news), train=True)
    assert shown == ["pca", "random"]
    with pytest.raises(ManifestError):
        run.evaluated()


def test_scores_of_another_coder_are_not_taken(place: Path) -> None:
    run_in(place, only("db-ksvd")).train()
    run_in(place, only("db-ksvd")).evaluate()
    other = run_in(place, only(**{"db-ksvd": {**RAW["dictionaries"]["db-ksvd"], "coder": "omp"}}))
    with pytest.raises(ManifestError):
        other.evaluated()
    scores = [
        {row["metric"]: row["value"] for row in run.evaluate()["rows"] if row["eval"] == "heldout"}
        for run in (run_in(place, only("db-ksvd")), other)
    ]
    assert scores[1]["fvu"] < scores[0]["fvu"]


def test_evaluating_again_codes_nothing_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_in(place, only("db-ksvd", "pca"))
    run.train()
    first = run.evaluate()

    def refuse(*args: Any) -> None:
        raise AssertionError("a finished score is computed again")

    monkeypatch.setattr(Run, "load_sae", refuse)
    assert run.evaluate()["rows"] == first["rows"]


def test_where_held_out_and_training_text_part_is_said(place: Path) -> None:
    """Only where it is inside documents."""
    run = run_in(place, only("pca"))
    run.train()
    assert "split" not in run.evaluate()
    assert "scored on other documents." in (compare(run).parent / "comparison.md").read_text()
    path, split = run.harvest_folder / MANIFEST, {"drawn": 1, "whole": 0, "cut_tokens": 500, "gap_tokens": 128}
    harvested = unsealed(path)
    harvested["parts"]["heldout"]["split"] = split
    path.write_text(json.dumps(harvested))
    shutil.rmtree(place / "cache" / "evaluations")
    again = run_in(place, only("pca"))
    assert again.evaluate()["split"] == split
    assert "128 tokens later" in (compare(again).parent / "comparison.md").read_text()


def test_missing_heldout_documents(place: Path) -> None:
    run = run_in(place, only("pca"))
    run.train()
    (run.harvest_folder / HELDOUT_DOCUMENTS).unlink()
    with pytest.raises(ManifestError, match=r"heldout_documents\.jsonl is missing"):
        run.evaluate()


def test_atoms_in_context_are_those_of_the_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage hands over what the config says; a change of it evaluates again, and 0 atoms asks nothing."""
    from ksvd_sae.evals.atoms import examples

    asked: list[Any] = []

    def record(
        panel: Any, setting: Any, documents: Path, reader: Any, harvest: str, output: Path, *, prepend_bos: bool
    ) -> dict[str, Path]:
        assert prepend_bos
        asked.append((panel, setting, documents, harvest, output))
        return {"pca": output / "pca-0.json"}

    monkeypatch.setattr(examples, "evaluate_examples", record)
    run = run_in(place, only("pca"))
    (trained,) = run.train()
    assert run.evaluate()["examples"] == {}
    assert asked == []
    run = run_in(
        place, config_with(dictionaries={"pca": RAW["dictionaries"]["pca"]}, report={"atoms": 5, "tokens": 99})
    )
    assert run.evaluate()["examples"] == {"pca": "pca-0.json"}
    ((panel, setting, documents, harvest, output),) = asked
    asked.clear()
    assert [(p.name, p.content) for p in panel] == [("pca", trained.content)]
    assert torch.equal(panel[0].load().W_dec, run.load_sae(trained).W_dec)
    assert (setting.atoms, setting.tokens, setting.examples, setting.context_tokens) == (5, 99, 8, 12)
    assert setting.norm_limit == run.shards("heldout").manifest["statistics"]["outlier_limit"]
    assert documents == run.harvest_folder / HELDOUT_DOCUMENTS
    assert harvest == content_hash(config_with().harvested.key)
    assert output == place.resolve() / "cache" / "evaluations" / "examples"
    several = config_with(
        dictionaries={name: RAW["dictionaries"][name] for name in ("pca", "db-ksvd")},
        report={"atoms": 5},
        training_seeds=[3, 4],
    )
    run = run_in(place, several)
    run.train()
    run.evaluate()
    chosen = asked[0][0]
    by_label = {t.label: t.content for t in run.trained()}
    assert [p.name for p in chosen] == ["pca", "db-ksvd"], "one training of each stands for all"
    assert [p.content for p in chosen] == [by_label["pca"], next(c for n, c in by_label.items() if n != "pca")]


def test_a_run_without_any_eval_says_so(place: Path) -> None:
    run = run_in(place, config_with(evaluation={"core": None, "sparse_probing": None, "heldout": None}))
    run.evaluate(train=True)
    with pytest.raises(EvaluationError, match=r"(?s)none has a score.*turn on an eval"):
        compare(run)


def test_what_is_finished_wants_no_lock(place: Path) -> None:
    """A cache that cannot be written any more is still read."""
    run = run_in(place, only("pca"))
    run.train()
    run.evaluate()
    shutil.rmtree(place / "cache" / "locks")
    (place / "cache" / "locks").write_text("no folder can be made here")
    again = run_in(place, only("pca"))
    assert again.harvest().n_samples > 0
    assert len(again.train()) == 1
    again.evaluate(train=True)
