"""Means and intervals of a study's rows, its table and its plot."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy import stats

from ksvd_sae.errors import EvaluationError
from ksvd_sae.report.efficiency import efficiency_plot
from ksvd_sae.report.study import correlations, family, frontier_plot, markdown, summarise


def row(entry: str = "db-ksvd", seed: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "entry": entry,
        "weighting": "none",
        "layer": 9,
        "k": 20,
        "coding": "mp",
        "coding_k": 20,
        "seed": seed,
        "samples_seen": 1000,
        "train_seconds": 2.0,
        "l0": 20.0,
        "fvu": 0.1 + 0.01 * seed,
        "nats_lost": 0.5,
        "loss_recovered": 0.9,
        "kl": 0.6,
        "dead_fraction": 0.0,
        **changes,
    }


def test_mean_and_interval() -> None:
    table = summarise([row(seed=s) for s in range(3)])
    assert len(table) == 1
    assert table.loc[0, "seeds"] == 3
    assert table.loc[0, "fvu"] == pytest.approx(0.11)
    low, high = stats.t.interval(0.95, 2, loc=0.11, scale=stats.sem([0.1, 0.11, 0.12]))
    assert table.loc[0, "fvu_ci"] == pytest.approx((high - low) / 2)


def test_one_seed_has_no_interval() -> None:
    table = summarise([row()])
    assert np.isnan(table.loc[0, "fvu_ci"])
    assert "±" not in markdown(table, "x").split("##")[1]


def test_settings_are_kept_apart_and_sorted_by_behaviour() -> None:
    rows = [row(), row("topk-sae", nats_lost=0.3), row(coding="omp", nats_lost=0.4), row(layer=13), row(k=10)]
    text = markdown(summarise(rows), "some-study")
    heads = [line for line in text.splitlines() if line.startswith("## Layer")]
    assert heads == ["## Layer 9, k = 10", "## Layer 9, k = 20", "## Layer 13, k = 20"]
    block = text.split("## Layer 9, k = 20")[1].split("##")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in block.splitlines() if line[:1] == "|"]
    assert rows[2:] == [["topk-sae", "mp"], ["db-ksvd", "omp"], ["db-ksvd", "mp"]]


def test_a_value_that_is_missing_is_said() -> None:
    assert "n/a" in markdown(summarise([row(kl=None)]), "x")


def test_what_goes_with_nats_lost() -> None:
    """Nats lost are the Fisher error and nothing else; FVU goes its own way. A layer of two settings says nothing."""
    rows = [
        row(entry, layer=layer, fvu=fvu, fisher_error=nats * 2 + 0.1, nats_lost=nats)
        for layer in (9, 13)
        for entry, fvu, nats in (("a", 0.1, 0.5), ("b", 0.2, 0.3), ("c", 0.3, 0.6), ("d", 0.4, 0.2))[: layer // 4]
    ][:6]
    found = correlations(summarise(rows)).set_index("layer")
    assert found.loc[9, "settings"] == 2
    assert np.isnan(found.loc[9, "fvu"])
    assert found.loc[13, "fisher_error"] == pytest.approx(1)
    assert found.loc[13, "fvu"] == pytest.approx(np.corrcoef([0.1, 0.2, 0.3], [0.5, 0.3, 0.6])[0, 1])
    text = markdown(summarise(rows), "x").split("## What goes with nats lost")[1]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert lines[2:] == [["9", "20", "2", "n/a", "n/a"], ["13", "20", "3", "0.327", "1.000"]]


def test_no_rows() -> None:
    with pytest.raises(EvaluationError, match="no rows yet"):
        summarise([])


def test_family() -> None:
    assert [family(n) for n in ("db-ksvd", "db-ksvd-std", "topk-sae-fisher")] == ["db-ksvd", "db-ksvd", "topk-sae"]


def test_plots_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    save = Figure.savefig

    def recorded(self: Figure, *arguments: Any, **options: Any) -> None:
        save(self, *arguments, **options)
        texts.extend(text.get_text() for text in self.findobj(Text))

    monkeypatch.setattr(Figure, "savefig", recorded)
    rows = [row(seed=s, entry=e, fvu=0.1 + i) for s in range(2) for i, e in enumerate(("db-ksvd", "topk-sae-std"))]
    paths = [frontier_plot(summarise(rows), tmp_path / "frontier.png")]
    seen = [{**r, "fisher_error": 0.4 + r["fvu"]} for r in rows]
    paths.append(frontier_plot(summarise(seen), tmp_path / "fisher.png", "fisher_error"))
    points = [{"dictionary": "a", "samples_seen": 10**i, "seconds": 2.0**i, "fvu": 1 / (i + 1)} for i in range(3)]
    paths.append(efficiency_plot(points, tmp_path / "efficiency.png"))
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000
    # The style shows formulas as they are written, so no label may be one.
    assert "held-out FVU" in texts
    assert [text for text in texts if "\\" in text] == []
