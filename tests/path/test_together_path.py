"""A whole run by 2 and 3 processes: what one process gives, also after one of them was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from ksvd_sae.dictionary import Dictionary
from tests import tiny_models, tolerances
from tests.command_line import environment, free_port

CONFIG = {
    "name": "together",
    "device": "cpu",
    "training_seeds": [0, 1],
    "model": {"name": tiny_models.PYTHIA, "hook": "blocks.2.hook_resid_post"},
    "text": {"source": "folder", "dataset": "text"},
    # Uneven: two parts of held-out text and three of training's.
    "harvest": {
        "train_tokens": 2500,
        "heldout_tokens": 1200,
        "context_tokens": 32,
        "batch_contexts": 8,
        "shard_tokens": 1000,
        "gradient_tokens": 500,
    },
    "dictionaries": {
        # As few atoms as samples tell apart, whatever the last digits; and none that is a sample: of it one atom leaves
        # rounding, by which the second is then picked.
        "db-ksvd": {"kind": "db_ksvd", "n_atoms": 16, "k": 2, "batch_samples": 300, "passes": 40, "init": "random"},
        "by-svd": {"kind": "db_ksvd", "n_atoms": 16, "k": 2, "update": "exact", "init": "random"},
        "by-omp": {"kind": "recoded", "of": "db-ksvd", "coder": "omp"},
        "of-random": {"kind": "recoded", "of": "random", "coder": "omp"},
        "random": {"kind": "random", "n_atoms": 16, "k": 2},
        "pca": {"kind": "pca", "k": 2},
        "topk": {"kind": "topk_sae", "n_atoms": 16, "k": 2, "passes": 2, "batch_samples": 128},
    },
    "evaluation": {
        "core": {
            "dataset": "heldout",
            "context_tokens": 32,
            "batch_contexts": 4,
            "reconstruction_batches": 2,
            "sparsity_batches": 2,
        },
        "sparse_probing": None,
        "loss": {"contexts": 4, "context_tokens": 32},
        "stability": {},
    },
    "report": {"atoms": 3, "examples": 2},
}
COMMAND = ["-m", "ksvd_sae", "run", "together.yaml"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    tiny_models.pythia_160m(folder / "hf-home")
    tiny_models.write_text_folder(folder / "text", 150)
    (folder / "together.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


def begun(place: Path, name: str, *command: str, **more: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *command, "--results", f"{name}/results"],
        cwd=place,
        env={**environment(hf_home=place / "hf-home", cache=place / name / "cache"), **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Killed with all that it started.
        start_new_session=True,
    )


def ended(process: "subprocess.Popen[str]") -> tuple[str, str]:
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    return out, err


def begun_without_torchrun(place: Path, name: str, size: int) -> list["subprocess.Popen[str]"]:
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    return [begun(place, name, *COMMAND, **common, RANK=str(rank)) for rank in range(size)]


@pytest.fixture(scope="module")
def alone(place: Path) -> Path:
    ended(begun(place, "alone", *COMMAND))
    return place / "alone"


def scores(where: Path) -> "pd.Series[float]":
    rows = pd.read_csv(where / "results" / "together" / "comparison.csv")
    rows = rows[rows["metric"] != "seconds"]
    return rows.set_index(["dictionary", "seed", "view", "eval", "metric"])["value"]


def same(where: Path, alone: Path) -> None:
    """The same harvest, the same dictionaries but for rounding, the same scores within what that does."""
    for path in (alone / "cache" / "activations").rglob("*.safetensors"):
        assert (where / path.relative_to(alone)).read_bytes() == path.read_bytes(), path
    trained = [path.parent for path in (alone / "cache" / "dictionaries").glob("*/dictionary.json")]
    assert len(trained) > 5
    for folder in trained:
        ours, theirs = (Dictionary.load(one).atoms_MD for one in (where / folder.relative_to(alone), folder))
        assert float(1 - (ours * theirs).sum(dim=1).min()) < tolerances.RANKS_COSINE, folder
    found, wanted = scores(where), scores(alone)
    assert found.index.equals(wanted.index)
    assert found.to_numpy() == pytest.approx(wanted.to_numpy(), rel=tolerances.RANKS_SCORE, abs=1e-6, nan_ok=True)
    assert (where / "results" / "together" / "report.html").exists()


@pytest.mark.timeout(1800)
def test_three_processes_of_which_one_is_killed_and_then_two(place: Path, alone: Path) -> None:
    ranks = begun_without_torchrun(place, "killed", 3)
    cache = place / "killed" / "cache"
    while not list(cache.glob("dictionaries/*/training.safetensors")):
        assert ranks[1].poll() is None, ranks[1].communicate()[1]
        time.sleep(0.05)
    os.killpg(ranks[1].pid, signal.SIGKILL)
    killed = time.monotonic()
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert time.monotonic() - killed < 60
    for number in (0, 2):
        assert ranks[number].returncode != 0
        assert "another process is gone" in said[number]
    assert not list(cache.glob("dictionaries/*/manifest.json"))
    # Only rank 0 tells what is done.
    assert "harvest: " in said[0]
    assert "harvest: " not in said[2]

    out, err = ended(
        begun(place, "killed", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *COMMAND)
    )
    same(place / "killed", alone)
    assert out.count("report: ") == 1
    assert err.count("harvest: reusing") == 1
    log = next(cache.glob("dictionaries/db_ksvd-*/train_log.jsonl")).read_text().splitlines()
    assert [json.loads(line)["batch"] for line in log] == list(range(len(log)))


@pytest.mark.timeout(1800)
def test_three_processes(place: Path, alone: Path) -> None:
    ranks = begun_without_torchrun(place, "three", 3)
    said = [ended(rank) for rank in ranks]
    same(place / "three", alone)
    assert [out.count("report: ") for out, _ in said] == [1, 0, 0]
    # One process after that has nothing left to do.
    _, err = ended(begun(place, "three", *COMMAND))
    assert "evaluate: reusing" in err
