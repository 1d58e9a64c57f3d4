"""The paper's whole grid, of every cell and every eval that a small random model can be scored by."""

from pathlib import Path

import numpy as np
import pytest

from tests.path.test_paper_path import KINDS, MODELS, SMALLER, WARNINGS, PaperRun
from tests.tiny_saes import one_thread

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), *WARNINGS]


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_grid(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with one_thread():
        table = PaperRun(name, tmp_path, monkeypatch, SMALLER)()
    cells = {f"{kind}-m{m}-k{k}" for kind in KINDS if kind != "pca" for m in (512, 768) for k in (4, 8, 16)}
    assert set(table["dictionary"]) == {*cells, "pca-k4", "pca-k8", "pca-k16"}
    evals = {"heldout", "core", "sparse_probing", "sparse_probing_sae_probes", "scr", "training"}
    assert set(table["eval"]) == evals
    for eval_name in evals:
        scored = table[table["eval"] == eval_name]
        assert set(scored["dictionary"]) == set(table["dictionary"]), eval_name
    scores = table[table["metric"] == "ce_loss_score"].set_index("dictionary")["value"]
    assert np.isfinite(scores).all()
    assert scores.nunique() == len(scores)
    # More atoms a token are less error, at either size.
    fvu = table[table["metric"] == "fvu"].set_index("dictionary")["value"]
    for kind in ("db-ksvd", "matryoshka", "db-ksvd-tuned", "matryoshka-tuned"):
        for m in (512, 768):
            assert fvu[f"{kind}-m{m}-k4"] > fvu[f"{kind}-m{m}-k8"] > fvu[f"{kind}-m{m}-k16"], (kind, m)
