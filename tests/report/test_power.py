"""What evals could see: by scores and items whose spreads are known."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ksvd_sae.report.items import COLUMNS
from ksvd_sae.report.power import power, power_section
from tests.report.test_pivot import frame_of

SEEDS, ITEMS, DICTIONARIES = 3, 12, 5
METRICS = {"sae-probes top-5": ("sparse_probing_sae_probes", "sae_top_5_test_accuracy")}


def made_up(
    eval_name: str, metric: str
) -> tuple[pd.DataFrame, pd.DataFrame, "np.ndarray[tuple[int, ...], np.dtype[np.float64]]"]:
    """Scores and items, and the cells that they are of: dictionaries × seeds × items."""
    cells = np.random.default_rng(0).normal(0.5, 0.1, (DICTIONARIES, SEEDS, ITEMS))
    scores, items = [], []
    for d in range(DICTIONARIES):
        for seed in range(SEEDS):
            owner = {"dictionary": f"d{d}", "view": "signed", "seed": seed, "eval_seed": 42}
            key = {"eval": eval_name, "metric": metric, **owner}
            sizes = {"d_sae": 8, "k": 2, "l0": 2.0, "data": "texts", "n": ITEMS, "source": "x.json"}
            scores.append({**key, **sizes, "value": cells[d, seed].mean()})
            items += [{**key, "item": f"i{i}", "value": cells[d, seed, i], "weight": 1.0} for i in range(ITEMS)]
    return frame_of(scores), pd.DataFrame(items, columns=COLUMNS).astype({"seed": "Int64", "eval_seed": "Int64"}), cells


def row_of(table: pd.DataFrame, score: str) -> "pd.Series[float]":
    (index,) = table.index[table["score"] == score]
    return table.loc[index]


def factor(df: float) -> float:
    return float(stats.t.ppf(0.975, df) + stats.t.ppf(0.8, df))


def test_shared_items_by_the_definition() -> None:
    frame, items, cells = made_up(*METRICS["sae-probes top-5"])
    found = row_of(power(frame, items), "sae-probes top-5")
    sd_seeds = np.sqrt(np.mean([cells[d].mean(axis=1).var(ddof=1) for d in range(DICTIONARIES)]))
    pairs = [(a, b) for a in range(DICTIONARIES) for b in range(a)]
    sd_items = np.sqrt(np.mean([(cells[a] - cells[b]).mean(axis=0).var(ddof=1) for a, b in pairs]))
    assert (found["seeds"], found["items"], found["matters"]) == (SEEDS, ITEMS, 0.02)
    assert (found["sd_seeds"], found["sd_items"]) == (pytest.approx(sd_seeds), pytest.approx(sd_items))
    parts = [2 * sd_seeds**2 / SEEDS, sd_items**2 / ITEMS]
    square = sum(parts)
    df = square**2 / (parts[0] ** 2 / (DICTIONARIES * (SEEDS - 1)) + parts[1] ** 2 / (ITEMS - 1))
    assert found["visible"] == pytest.approx(factor(df) * math.sqrt(square))
    for needed, sd in (("seeds_needed", 2**0.5 * sd_seeds), ("items_needed", sd_items)):
        n = int(found[needed])
        assert factor(n - 1) * sd / n**0.5 <= 0.02 < factor(n - 2) * sd / (n - 1) ** 0.5


def test_items_of_a_dictionarys_own_are_in_the_spread_over_seeds() -> None:
    frame, items, cells = made_up("autointerp", "autointerp_score")
    found = row_of(power(frame, items), "autointerp")
    sd_seeds = np.sqrt(np.mean([cells[d].mean(axis=1).var(ddof=1) for d in range(DICTIONARIES)]))
    assert found["sd_items"] == pytest.approx(np.sqrt(2 * cells.var(axis=2, ddof=1).mean()))
    wanted = factor(DICTIONARIES * (SEEDS - 1)) * math.sqrt(2 * sd_seeds**2 / SEEDS)
    assert found["visible"] == pytest.approx(wanted)


def test_section_names_what_is_not_known() -> None:
    frame, items, _ = made_up(*METRICS["sae-probes top-5"])
    section = power_section(frame, items.iloc[:0])
    assert section is not None
    (row,) = section.rows
    cells = dict(zip(section.heads, row, strict=True))
    assert (cells["items"], cells["SD over items"], cells["items needed"]) == ("unknown", "–", "–")
    assert int(cells["seeds needed"]) > 3
    one = frame[frame["seed"] == 0]
    assert power_section(one, items.iloc[:0]) is None
    section = power_section(one, items[items["seed"] == 0])
    assert section is not None
    assert section.rows[0][2] == f"{ITEMS} data sets"
