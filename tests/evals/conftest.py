"""A small harvest, and all that SAEBench needs to run on a tiny model: texts on disk and a model found by its name."""

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from sae_bench.evals.autointerp import main as autointerp
from sae_bench.evals.core import main as core
from sae_bench.evals.scr_and_tpp import main as scr
from sae_bench.evals.sparse_probing import main as probing
from transformer_lens import HookedTransformer

from ksvd_sae.evals.base import EvalSetting, Panelist
from ksvd_sae.evals.scr.run import PROFESSIONS
from ksvd_sae.evals.sparse_probing.run import LABELS
from ksvd_sae.store import content_hash
from tests.tiny_saes import COLOURS, METALS, MODEL_NAME, TREES, WORDS, one_thread, tiny_model

TEXT = "tiny-text"
ONE_TEXT = "one-text"
# Documents of more than 100 characters: autointerp leaves shorter ones out.
LONG_TEXT = "long-text"
CLASSES = "three-classes"
BIASED = "tiny-bias_in_bios"
# Fills a context of 12 tokens behind <bos>, so all contexts of ONE_TEXT are the same.
THE_TEXT = " ".join(WORDS[:11])
COMMIT = "c0ffee" + 34 * "0"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local data sets by name: texts for core, labelled texts for sparse probing."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=15)) for _ in range(80)]
    _write_rows(folder / TEXT / "train.jsonl", [{"text": text} for text in texts])
    long = random.Random(1)
    _write_rows(folder / LONG_TEXT / "train.jsonl", [{"text": " ".join(long.choices(WORDS, k=40))} for _ in range(80)])
    _write_rows(folder / ONE_TEXT / "train.jsonl", [{"text": THE_TEXT}] * 80)
    for split, n in (("train", 30), ("test", 15)):
        labelled = [
            {"text": " ".join(draw.choices(vocabulary, k=8)), "label": label}
            for label, vocabulary in enumerate((COLOURS, METALS, TREES))
            for _ in range(n)
        ]
        _write_rows(folder / CLASSES / f"{split}.jsonl", labelled)
        # Professions differ in their colours, genders in their metals; trees are noise.
        biased = [
            {"hard_text": " ".join([*draw.choices(work, k=3), *draw.choices(marks, k=2), *draw.choices(TREES, k=3)])}
            | {"profession": number, "gender": gender}
            for number, work in zip((3, 7), (COLOURS[:3], COLOURS[3:]), strict=True)
            for gender, marks in enumerate((METALS[:3], METALS[3:]))
            for _ in range(n)
        ]
        _write_rows(folder / BIASED / f"{split}.jsonl", biased)
    return folder


@pytest.fixture
def model_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Makes the tiny model the one that is found by name; the names that were asked for, in order."""
    asked: list[str] = []

    def load(name: str, **options: Any) -> HookedTransformer:
        asked.append(name)
        return tiny_model()

    monkeypatch.setattr(HookedTransformer, "from_pretrained_no_processing", load)
    # SAEBench collects garbage after every SAE: a second each time, in a process with so many modules.
    for module in (autointerp, core, probing, scr):
        monkeypatch.setattr(module, "gc", SimpleNamespace(collect=lambda: 0))
    # Data sets that are not streamed are converted once, into the user's cache.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return asked


@pytest.fixture
def setting(data_folder: Path, tmp_path: Path, model_loads: list[str], monkeypatch: pytest.MonkeyPatch) -> EvalSetting:
    monkeypatch.setitem(LABELS, CLASSES, ["0", "1", "2"])
    monkeypatch.setitem(PROFESSIONS, BIASED, {"nurse": 3, "professor": 7})
    return EvalSetting(
        model_name=MODEL_NAME,
        dtype="float32",
        device="cpu",
        data_folder=data_folder,
        data_hash="0123456789ab",
        artifacts=tmp_path / "artifacts",
    )


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout in which the caller is; written by hand, as little as git takes for one."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path / "checkout"
    (folder / ".git" / "refs" / "heads").mkdir(parents=True)
    (folder / ".git" / "objects").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (folder / ".git" / "refs" / "heads" / "main").write_text(COMMIT + "\n")
    monkeypatch.chdir(folder)
    return folder


@dataclass
class CountedPanel:
    """Panelists that remember each time they are loaded."""

    makers: dict[str, Any]
    loads: list[str] = field(default_factory=list)
    contents: dict[str, str] = field(default_factory=dict)

    def panelists(self) -> list[Panelist]:
        return [
            Panelist(name, content_hash(self.contents.get(name, f"content of {name}")), partial(self._load, name))
            for name in self.makers
        ]

    def _load(self, name: str) -> Any:
        self.loads.append(name)
        return self.makers[name]()
