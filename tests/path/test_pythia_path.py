"""eval_configs/pythia-160m.yaml from text to report, through the command line, on a tiny model of that name."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.activations.text import contexts
from ksvd_sae.report.headline import HEADLINES
from ksvd_sae.report.raw import RawResults, unpack
from ksvd_sae.run.config import load_config
from ksvd_sae.store import MANIFEST
from tests import tiny_models, tolerances
from tests.command_line import EVAL_CONFIGS, REPOSITORY
from tests.path.conftest import CELL, CONFIG, SHRUNK, Workplace
from tests.recompute import check_recomputable

DICTIONARIES = list(
    load_config(EVAL_CONFIGS / f"{CONFIG}.yaml", [f"{key}={value}" for key, value in SHRUNK.items()]).dictionaries
)
LEARNED = [f"{name}{CELL}" for name in ("db-ksvd", "matryoshka", "db-ksvd-tuned", "matryoshka-tuned")]
Done = subprocess.CompletedProcess[str]


def strict_json(path: Path) -> Any:
    """Parsed by the letter of JSON: Python's parser lets NaN and Infinity through."""

    def refuse(word: str) -> NoReturn:
        raise AssertionError(f"{path} holds {word}")

    return json.loads(path.read_text(), parse_constant=refuse)


def files(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob(pattern)) if p.is_file()}


def harvest_of(place: Workplace) -> Path:
    """The folder of the run's one harvest."""
    (manifest,) = (place.folder / "cache" / "activations").glob("*/manifest.json")
    return manifest.parent


def succeeded(done: Done) -> Done:
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def finished(workplace: Workplace) -> tuple[Workplace, Done]:
    """The whole run, once for all tests; each must hold whichever of the others ran before it."""
    return workplace, succeeded(workplace.ksvd_sae("run"))


@pytest.fixture
def place(finished: tuple[Workplace, Done]) -> Workplace:
    return finished[0]


def test_the_harvest_is_what_transformers_computes(place: Workplace) -> None:
    """Loaded by name, the model is as published: no norm is folded into its weights, nothing is centred."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    snapshot = place.hf_home / "hub" / "models--EleutherAI--pythia-160m-deduped" / "snapshots" / tiny_models.REVISION
    model = AutoModelForCausalLM.from_pretrained(snapshot)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(snapshot)
    shards = ActivationShards.open(harvest_of(place))
    n_heldout = len((shards.folder / "heldout_documents.jsonl").read_text().splitlines())
    texts = [path.read_text() for path in sorted((place.folder / "text").iterdir())][n_heldout:]
    tokens_BL = torch.stack(list(contexts(iter(texts), tokenizer, 32)))
    with torch.no_grad():
        # hidden_states[0] are the embeddings: [9] is what block 8 gives.
        true_BLD = model(tokens_BL, output_hidden_states=True).hidden_states[9]
    true_ND = true_BLD[tokens_BL != tokenizer.bos_token_id][: shards.n_samples].double()
    found_ND = shards.tensor().double()
    assert found_ND.shape == true_ND.shape
    bound = tolerances.HOOK_AGAINST_TRANSFORMERS * float(true_ND.abs().max())
    # Shuffled, so by the nearest row: the first thousand of each are in the other.
    assert float(torch.cdist(found_ND[:1000], true_ND).amin(dim=1).max()) <= bound
    assert float(torch.cdist(true_ND[:1000], found_ND).amin(dim=1).max()) <= bound


def test_every_dictionary_has_its_headline_scores(place: Workplace) -> None:
    table = pd.read_csv(place.results / "comparison.csv")
    assert set(table["dictionary"]) == set(DICTIONARIES)
    evals = {"heldout", "core", "sparse_probing", "sparse_probing_sae_probes", "scr"}
    assert evals <= set(table["eval"])
    for headline in (headline for headline in HEADLINES if not headline.optional):
        for metric in filter(None, (headline.metric, headline.minus, headline.reference)):
            rows = table[(table["eval"] == headline.eval) & (table["metric"] == metric)]
            assert sorted(rows["dictionary"]) == sorted(DICTIONARIES), (headline.eval, metric)
            assert np.isfinite(rows["value"]).all(), (headline.eval, metric)
    assert set(table.loc[table["eval"] == "core", "data"]) == {"text-heldout"}


def test_the_evals_really_scored_the_dictionaries(place: Workplace) -> None:
    """Each eval tells dictionaries apart: none got another's scores, or those of doing nothing."""
    table = pd.read_csv(place.results / "comparison.csv")
    scores = table.pivot_table(index="dictionary", columns=["eval", "metric"], values="value")
    for metric in (("heldout", "fvu"), ("core", "ce_loss_score"), ("core", "kl_div_with_sae")):
        assert scores[metric].nunique() == len(DICTIONARIES), metric
    assert (scores["heldout", "l0"] <= 20).all()
    # The model without a dictionary is the same one for all.
    assert scores["core", "ce_loss_without_sae"].nunique() == 1
    assert scores["sparse_probing", "llm_test_accuracy"].nunique() == 1
    # 20 of 32 components keep most of the variance, and atoms that were learned more than as many random ones.
    assert scores.loc["pca-k20", ("heldout", "fvu")] < 0.5
    assert all(scores.loc[LEARNED, ("heldout", "fvu")] < scores.loc[f"random{CELL}", ("heldout", "fvu")])


def test_the_report_is_there(finished: tuple[Workplace, Done]) -> None:
    place, done = finished
    report = (place.results / "report.html").read_text()
    assert all(name in report for name in DICTIONARIES)
    assert f"| matryoshka{CELL} " in done.stdout
    # All have k = 20: no plots against L0.
    plots = {path.stem for path in (place.results / "plots").glob("*.png")}
    assert plots == {"metrics", "error_against_behaviour", "density", "ranks", "training"}


def test_atoms_of_every_dictionary_are_shown_in_context(place: Workplace) -> None:
    report = (place.results / "report.html").read_text()
    with RawResults(place.results) as raw:
        samples = [json.loads(content) for name, content in raw.items() if name.startswith("atoms/")]
    assert len(samples) == len(DICTIONARIES)
    for sample in samples:
        assert len(sample["atoms"]) == min(24, sample["n_atoms"] - sample["n_dead"])
        assert all(atom["positive"] or atom.get("negative") for atom in sample["atoms"])
        assert sample["n_tokens"] >= 900
    assert all(f"<summary>{name} " in report for name in DICTIONARIES)


def test_raw_results_are_json_and_hold_every_score(place: Workplace, tmp_path: Path) -> None:
    unpack(place.results, tmp_path)
    (tmp_path / "scratch").mkdir()
    table = pd.read_csv(place.results / "comparison.csv")
    seen = table[table["metric"] == "samples_seen"].set_index("dictionary")["value"].to_dict()
    names = set()
    for eval_name in ("core", "sparse_probing", "sparse_probing_sae_probes", "scr"):
        results = {path.name: strict_json(path) for path in (tmp_path / "saebench" / eval_name).rglob("*.json")}
        assert len(results) == len(DICTIONARIES)
        names |= set(results)
        for name, result in results.items():
            assert result["eval_type_id"] == eval_name
            assert result["sae_cfg_dict"]["training_tokens"] == seen[name.rpartition("-")[0]]
            assert result["sae_cfg_dict"]["architecture"] == ("topk" if name.startswith("topk") else "db_ksvd")
    assert len(names) == len(DICTIONARIES), "SAEBench joins files by their names"
    assert len(list((tmp_path / "heldout").glob("*.json"))) == len(DICTIONARIES)
    for path in [*place.results.rglob("*.json"), *tmp_path.rglob("*.json")]:
        strict_json(path)
    check_recomputable(place.results, tmp_path / "scratch")


def test_results_hold_no_path_of_this_machine(place: Workplace) -> None:
    secrets = {str(place.folder), str(REPOSITORY), f"{Path.home()}/".replace("//", "/")} - {"/"}
    with RawResults(place.results) as raw:
        texts = {**files(place.results), **raw}
    assert len(texts) > 20
    for name, content in texts.items():
        assert [secret for secret in secrets if secret.encode() in content] == [], name


def test_the_config_with_the_results_gives_the_same_run(place: Workplace) -> None:
    stored = yaml.safe_load((place.results / "config.yaml").read_text())
    assert stored == strict_json(place.results / MANIFEST)["config"]
    assert list(stored["dictionaries"]) == DICTIONARIES


def test_a_second_run_reuses_every_stage(place: Workplace, tmp_path: Path) -> None:
    """Without a model: its Hub cache is an empty folder."""
    before, cached = files(place.results), files(place.folder / "cache")
    again = succeeded(place.ksvd_sae("run", hf_home=tmp_path))
    assert "harvest: reusing" in again.stderr
    for name in DICTIONARIES:
        assert f"train {name}: reusing" in again.stderr
    assert "evaluate: reusing" in again.stderr
    assert files(place.results) == before
    assert files(place.folder / "cache") == cached


def test_evals_side_by_side_give_the_same_scores(place: Workplace, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(place.folder / "cache", cache, ignore=shutil.ignore_patterns("evaluations", "artifacts", "llm"))
    done = succeeded(place.ksvd_sae("evaluate", changes={"evaluation.processes": "2"}, cache=cache))
    assert "scr of db-ksvd" in done.stderr, "what an eval's process logs is shown"
    rows, again = (
        strict_json(next((folder / "evaluations").glob(f"{CONFIG}-*/{MANIFEST}")))["rows"]
        for folder in (place.folder / "cache", cache)
    )
    assert again == rows


def test_each_stage_alone(place: Workplace, tmp_path: Path) -> None:
    """One dictionary of the config changed: each stage does what that needs, and refuses to go before the other."""
    changes = {f"dictionaries.random{CELL}.k": "7"}
    kept = files(place.results)

    early = place.ksvd_sae("evaluate", changes=changes)
    assert early.returncode == 1
    assert "ManifestError" in early.stderr
    assert "ksvd-sae train" in early.stderr
    assert "Traceback" not in early.stderr

    assert "training tokens of 32 dimensions" in succeeded(place.ksvd_sae("harvest", changes=changes)).stdout

    trained = succeeded(place.ksvd_sae("train", changes=changes))
    assert f"train db-ksvd{CELL}: reusing" in trained.stderr
    assert f"train random{CELL}: reusing" not in trained.stderr

    early = place.ksvd_sae("compare", changes=changes)
    assert early.returncode == 1
    assert "ksvd-sae evaluate" in early.stderr

    evaluated = succeeded(place.ksvd_sae("evaluate", changes=changes))
    assert "core of pca-k20: reusing" in evaluated.stderr
    assert f"core of random{CELL}: reusing" not in evaluated.stderr

    compared = succeeded(place.ksvd_sae("compare", "--results", str(tmp_path), changes=changes))
    table = pd.read_csv(tmp_path / CONFIG / "comparison.csv")
    assert set(table["dictionary"]) == set(DICTIONARIES)
    assert set(table.loc[table["dictionary"] == f"random{CELL}", "k"]) == {7}
    assert str(tmp_path / CONFIG / "report.html") in compared.stdout
    # Only compare writes results, and it was told to write elsewhere.
    assert files(place.results) == kept


def test_gradients_beside_the_finished_harvest(place: Workplace) -> None:
    shards = files(harvest_of(place), "shard-*")
    done = succeeded(place.ksvd_sae("harvest", changes={"harvest.gradient_tokens": "500"}))
    assert "harvest: reusing" in done.stderr
    (path,) = harvest_of(place).glob(f"gradients-*/{MANIFEST}")
    assert strict_json(path)["n_tokens"] >= 500
    assert files(harvest_of(place), "shard-*") == shards


def test_a_stage_before_its_input(place: Workplace, tmp_path: Path) -> None:
    """On an empty cache; test_each_stage_alone has the others."""
    done = place.ksvd_sae("train", cache=tmp_path)
    assert done.returncode == 1
    assert "ManifestError" in done.stderr
    assert "ksvd-sae harvest" in done.stderr
    assert "Traceback" not in done.stderr
    assert files(tmp_path) == {}
