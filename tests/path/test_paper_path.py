"""The paper's configs on small random models of true architecture, a part of the grid at a time (all: tests/slow)."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ksvd_sae.report.compare import compare
from ksvd_sae.report.published.section import TITLE
from ksvd_sae.run.config import load_config
from ksvd_sae.run.pipeline import Run
from tests import tiny_models
from tests.command_line import EVAL_CONFIGS
from tests.path.conftest import SHRUNK
from tests.tiny_hub import offline_hub
from tests.tiny_saes import one_thread

# Libraries' warnings, which in `ksvd-sae run` are no errors.
WARNINGS = [
    pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning"),
    pytest.mark.filterwarnings("ignore:Inconsistent values. penalty=l1 with l1_ratio=0.0:UserWarning"),
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
]
pytestmark = WARNINGS

MODELS = {"gemma-2-2b": tiny_models.small_gemma_2_2b, "pythia-160m": lambda home, _: tiny_models.pythia_160m(home)}
# What the paper's options are stays as it is. A random model answers no prompt of RAVEL right and knows no letters, and
# SAEBench's autointerp wants a tokenizer of less than five characters a token.
SMALLER = {
    **SHRUNK,
    "device": "cpu",
    "grid": "{m: [512, 768], k: [4, 8, 16]}",
    "model.dtype": "float32",
    "harvest.dtype": "float32",
    "evaluation.ravel": "null",
    "report.tokens": "500",
}
KINDS = ["db-ksvd", "matryoshka", "db-ksvd-tuned", "matryoshka-tuned", "topk-sae", "pca", "random"]


class PaperRun:
    """A config on its small model, in this process; text, results and cache lie in ``folder``."""

    def __init__(self, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str]):
        self.results = folder / "results" / name
        self._name, self._changes = name, changes
        MODELS[name](folder / "hf-home", monkeypatch)
        offline_hub(folder / "hf-home" / "hub", monkeypatch)
        tiny_models.write_text_folder(folder / "text", 300)
        monkeypatch.setenv("KSVD_SAE_CACHE", str(folder / "cache"))
        monkeypatch.chdir(folder)

    def __call__(self, cells: str | None = None) -> pd.DataFrame:
        """As ``ksvd-sae run``; the scores of its comparison."""
        overrides = [f"{key}={value}" for key, value in self._changes.items()]
        run = Run(load_config(EVAL_CONFIGS / f"{self._name}.yaml", overrides))
        run.prepare()
        run = run if cells is None else run.part(cells)
        run.harvest()
        run.evaluate(train=True)
        compare(run)
        return pd.read_csv(self.results / "comparison.csv")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PaperRun]:
    few = {f"evaluation.{name}": "null" for name in ("sparse_probing", "sparse_probing_sae_probes", "scr")}
    with pytest.MonkeyPatch.context() as monkeypatch, one_thread():
        yield PaperRun("gemma-2-2b", tmp_path_factory.mktemp("paper"), monkeypatch, {**SMALLER, **few})


def test_cells_of_the_grid_one_after_another(gemma: PaperRun) -> None:
    first = gemma("m=512,k=8")
    cell = [f"{kind}-m512-k8" if kind != "pca" else "pca-k8" for kind in KINDS]
    assert list(dict.fromkeys(first["dictionary"])) == cell
    assert {"heldout", "core"} <= set(first["eval"])
    scores = first.pivot_table(index="dictionary", columns=["eval", "metric"], values="value")
    assert np.isfinite(scores["core", "ce_loss_score"]).all()
    assert (scores["heldout", "l0"] <= 8).all()
    learned = scores.loc[[name for name in cell if "ksvd" in name or "matryoshka" in name], ("heldout", "fvu")]
    assert (learned < scores.loc["random-m512-k8", ("heldout", "fvu")]).all()

    second = gemma("dictionary=matryoshka,m=768,k=4")
    assert set(second["dictionary"]) == {*cell, "matryoshka-m768-k4"}
    again = second[second["dictionary"].isin(cell)].reset_index(drop=True)
    pd.testing.assert_frame_equal(again, first, check_like=True)
    assert "published SAEs of this model and hook have" in (gemma.results / "comparison.md").read_text()
    assert TITLE not in (gemma.results / "comparison.md").read_text(), "none of a width of 512"
