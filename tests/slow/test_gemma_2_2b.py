"""eval_configs/gemma-2-2b.yaml at the model's full size, on random weights: that the path carries it, and at what cost.

`layers-cut` is the same in 6 GB of memory: blocks up to the hook and one more, a small vocabulary, and weights beside a
name that TransformerLens does not know, by a bridge. `full` needs 17 GB.

With KSVD_SAE_WRITE_RESULTS=1 the cost is written to results/gemma-2-2b-random-weights/log.md.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from ksvd_sae.store import commit, versions
from tests import tiny_models
from tests.command_line import EVAL_CONFIGS, REPOSITORY, ksvd_sae, set_options

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CONFIG = "gemma-2-2b"
NAME = "db-ksvd"
LOG = REPOSITORY / "results" / "gemma-2-2b-random-weights" / "log.md"
D_IN, N_ATOMS, K, TRAIN_TOKENS, HELDOUT_TOKENS, BATCH_CONTEXTS = 2304, 4096, 20, 4096, 512, 8
# --set adds and changes keys but takes none away: all dictionaries at once are replaced by the one.
DICTIONARY = f"{NAME}-m{N_ATOMS}-k{K}"
ENTRY = {**yaml.safe_load((EVAL_CONFIGS / f"{CONFIG}.yaml").read_text())["dictionaries"][NAME], "passes": 1}
CHANGES = {
    "device": "cpu",
    "text.source": "folder",
    "text.dataset": "text",
    "harvest.train_tokens": str(TRAIN_TOKENS),
    "harvest.heldout_tokens": str(HELDOUT_TOKENS),
    "harvest.batch_contexts": str(BATCH_CONTEXTS),
    "grid": json.dumps({"m": [N_ATOMS], "k": [K]}),
    "dictionaries": json.dumps({NAME: ENTRY}),
    "evaluation": "{core: null, sparse_probing: null}",
}


@dataclass(frozen=True)
class Outcome:
    folder: Path
    done: subprocess.CompletedProcess[str]
    load: float  # of the machine before the run: programs that wanted a core, on average over a minute
    wall_s: float
    peak_bytes: int
    is_full: bool


@pytest.fixture(scope="module", params=["layers-cut", "full"])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("gemma-2-2b")
    hf_home, changes = folder / "hf-home", dict(CHANGES)
    hf_home.mkdir()
    if request.param == "full":
        tiny_models.gemma_2_2b(hf_home)
    else:
        (hf_home / "cut").mkdir()
        tiny_models.wide_gemma_2(hf_home / "cut", num_hidden_layers=14, vocab_size=tiny_models.VOCABULARY_SIZE)
        changes |= {"model.name": "gemma-2-cut", "model.weights": str(hf_home / "cut")}
    tiny_models.write_text_folder(folder / "text", 400)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    load, started = os.getloadavg()[0], time.perf_counter()
    done = ksvd_sae(
        "run",
        str(EVAL_CONFIGS / f"{CONFIG}.yaml"),
        *set_options(changes),
        folder=folder,
        hf_home=hf_home,
        cache=folder / "cache",
        threads=os.cpu_count() or 1,
    )
    wall_s = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    # The largest of all children so far: this run's only if it beats those before it.
    assert peak > before
    # pytest keeps the folders of its last runs; five gigabytes are too much to keep.
    shutil.rmtree(hf_home)
    return Outcome(folder, done, load, wall_s, peak * 1024, request.param == "full")


def test_the_run_ends_well(outcome: Outcome) -> None:
    assert outcome.done.returncode == 0, outcome.done.stderr


def test_activations_and_atoms_have_the_models_width(outcome: Outcome) -> None:
    (manifest,) = (outcome.folder / "cache" / "activations").glob("*/manifest.json")
    harvest = json.loads(manifest.read_text())
    assert harvest["d_in"] == D_IN
    assert harvest["parts"]["train"]["n_samples"] + harvest["parts"]["train"]["outliers"] >= TRAIN_TOKENS
    shard = manifest.parent / "train" / harvest["parts"]["train"]["shards"][0]["file"]
    assert load_file(shard)["activations"].dtype == torch.bfloat16
    (folder,) = (outcome.folder / "cache" / "dictionaries").iterdir()
    atoms_MD = load_file(folder / "atoms.safetensors")["atoms"]
    assert atoms_MD.shape == (N_ATOMS, D_IN)
    assert len((folder / "train_log.jsonl").read_text().splitlines()) == 1


def test_the_table_has_its_scores_and_says_what_was_not_run(outcome: Outcome) -> None:
    results = outcome.folder / "results" / CONFIG
    table = pd.read_csv(results / "comparison.csv")
    assert set(table["dictionary"]) == {DICTIONARY}
    assert set(table["eval"]) == {"heldout", "training"}
    scores = table.set_index("metric")["value"]
    assert np.isfinite(scores).all()
    assert 0 < scores["l0"] <= K
    assert "Not run, as the config says: core, sparse_probing" in (results / "comparison.md").read_text()


def test_the_log_is_written_if_asked_for(outcome: Outcome, tmp_path: Path) -> None:
    wanted = outcome.is_full and os.environ.get("KSVD_SAE_WRITE_RESULTS") == "1"
    target = LOG if wanted else tmp_path / "log.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(log(outcome))
    written = target.read_text()
    assert "random weights" in written
    assert re.search(r"peak memory.*\d GiB", written)
    assert str(outcome.folder) not in written


def log(outcome: Outcome) -> str:
    """What was run, on what, in which time and memory; with no path of this machine."""
    stages = re.findall(r"^(harvest|train, evaluate) done in (\d+) s", outcome.done.stderr, flags=re.MULTILINE)
    assert [name for name, _ in stages] == ["harvest", "train, evaluate"]
    command = f"ksvd-sae run eval_configs/{CONFIG}.yaml " + " ".join(f"--set '{k}={v}'" for k, v in CHANGES.items())
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rows = [
        ("whole command, wall time", f"{outcome.wall_s:.0f} s"),
        *((f"{name}, wall time", f"{seconds} s") for name, seconds in stages),
        (
            "peak memory (largest resident set of the process, mapped weight files included)",
            f"{outcome.peak_bytes / 2**30:.1f} GiB",
        ),
        ("machine", f"{len(os.sched_getaffinity(0))} CPU cores, {memory_bytes / 2**30:.0f} GiB memory, no GPU used"),
        ("other load at the start", f"{outcome.load:.1f} programs wanting a core: times are upper bounds"),
        ("commit", commit()),
        ("date", date.today().isoformat()),
        *versions().items(),
    ]
    return "\n".join(
        [
            "# gemma-2-2b.yaml at full size, on random weights",
            "",
            "**The weights were random** (bfloat16, normal with standard deviation 0.02, in the real model's sizes), "
            "the tokenizer was a small one, and the text was made up. So scores of this run say nothing about the "
            "quality of any dictionary, and none are given. What it shows: the whole path, from loading the model by "
            "name to the report, carries a model of 2.6 billion parameters, in this time and memory.",
            "",
            f"The config was cut down to {TRAIN_TOKENS:,} training tokens, {HELDOUT_TOKENS} held-out tokens "
            f"(batches of {BATCH_CONTEXTS} contexts of 128 tokens, blocks 0 to 12 of 26), one dictionary of "
            f"{N_ATOMS:,} atoms and one training batch; SAEBench's evals were left out.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
            "The command, with a Hub cache that holds the weights under the name google/gemma-2-2b:",
            "",
            "```",
            command,
            "```",
            "",
            "Written by `KSVD_SAE_WRITE_RESULTS=1 pytest -m slow tests/slow/test_gemma_2_2b.py`.",
            "",
        ]
    )
