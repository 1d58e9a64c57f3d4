"""A finished run without a language model, what is published of it, and a Hub to publish it to."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, file_download

from ksvd_sae.activations.harvest import HELDOUT_DOCUMENTS
from ksvd_sae.hub.source import Source, open_source
from ksvd_sae.hub.write import write_folder
from ksvd_sae.report.compare import compare
from ksvd_sae.report.raw import RAW, RawResults, write_raw
from ksvd_sae.run.config import parse_config
from ksvd_sae.run.pipeline import Run
from tests.hub.server import OWNER, TOKEN, Hub, served
from tests.tiny_hub import new_sessions
from tests.tiny_saes import one_thread
from tests.tiny_shards import raw_activations, write_harvest

REPO = f"{OWNER}/dictionaries"
HOOK = "blocks.0.hook_resid_post"
LEARNED = {"kind": "db_ksvd", "n_atoms": 24, "k": 3, "batch_samples": 500}
LINEAR = {"kind": "linear_topk", "passes": 4, "batch_samples": 128, "lr": 5e-3}
CONFIG: dict[str, Any] = {
    "name": "tiny",
    "device": "cpu",
    "training_seeds": [0, 1],
    "model": {"name": "some/model", "hook": HOOK},
    "text": {"source": "hub", "dataset": "owner/some-texts"},
    "harvest": {"train_tokens": 2000, "heldout_tokens": 500, "context_tokens": 12},
    "dictionaries": {
        "learned": {**LEARNED, "view": "both"},
        "one-sign": {**LEARNED, "nonnegative": True, "coder": "omp"},
        "weighted": {**LEARNED, "weighting": "std", "coder": "mp_refit"},
        # As many steps as atoms: what SAELens' matching pursuit does.
        "steps": {**LEARNED, "max_steps_factor": 1},
        "linear": {**LINEAR, "of": "learned"},
        "linear-weighted": {**LINEAR, "of": "weighted"},
        "pca": {"kind": "pca", "k": 3},
    },
    "evaluation": {"core": None, "sparse_probing": None},
    # There is no model here to read text.
    "report": {"atoms": 0},
}

SHOWN = {"document": 0, "peak": 1, "tokens": [" a", " b"]}
# Atoms in context, which a run with a model finds.
EXAMPLES = {
    "format": 2,
    **{"n_tokens": 400, "n_contexts": 40, "context_tokens": 12, "n_atoms": 24, "signed": True},
    "atoms": [
        {
            "atom": 3,
            "logit_lens": None,
            "histogram": {side: {"centres": [1.0], "counts": [2]} for side in ("positive", "negative")},
            "positive": [{**SHOWN, "activations": [0.5, 1.0]}],
            "negative": [{**SHOWN, "activations": [0.5, -1.0]}],
        }
    ],
}


@dataclass(frozen=True)
class Published:
    """results: the run's folder. source: what of it is published. folder: as it is written."""

    results: Path
    source: Source
    folder: Path


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="package")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    """Read only."""
    place = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KSVD_SAE_CACHE", str(place / "cache"))
        results = finished_run(place)
        source = open_source(results, [], "both")
        write_folder(source, REPO, place / "published", "mit")
        yield Published(results, source, place / "published")


def finished_run(place: Path) -> Path:
    """A run's folder under results/, with a file as SAEBench's core writes one for each view of a dictionary."""
    run = Run(parse_config(CONFIG), place / "results")
    folder, x_ND = run.harvest_folder, raw_activations(2500)
    write_harvest(folder, run.config.harvested.key, x_ND[:2000], x_ND[2000:])
    (folder / HELDOUT_DOCUMENTS).write_text('{"text": "a document"}\n')
    run.evaluate(train=True)
    compare(run)
    manifest = json.loads((run.results / "manifest.json").read_text())
    with RawResults(run.results) as raw:
        members = {name: place / "raw" / name for name in raw}
        for name, path in members.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw[name])
    manifest["files"]["core"] = {}
    for panelist in ("learned.s0", "learned.s0.split"):
        file = f"0123456789ab/{panelist}-0123456789ab_custom_sae_eval_results.json"
        manifest["files"]["core"][panelist] = file
        members[f"saebench/core/{file}"] = path = place / "raw" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"sae_lens_id": "custom_sae", "sae_lens_release_id": panelist, "scores": panelist}))
    manifest["examples"] = {"learned": "learned-0123456789ab.json"}
    members["atoms/learned-0123456789ab.json"] = path = place / "raw" / "atoms.json"
    path.write_text(json.dumps(EXAMPLES))
    (run.results / "manifest.json").write_text(json.dumps(manifest))
    write_raw(run.results / RAW, members)
    return run.results


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub of the test's own; this process has its token and an empty cache, and waits for nothing."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # By which newer clients send large files where the package is there: a storage with a protocol of its own.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    new_sessions()
    with served() as hub:
        at_endpoint(hub.endpoint, monkeypatch)
        yield hub
    monkeypatch.undo()
    new_sessions()


def at_endpoint(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT, which the client reads once, does it."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    # Before 1.0 the second has a copy of the first's.
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
