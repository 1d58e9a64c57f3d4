"""The figure of dictionaries by coders: there where dictionaries are crossed with coders, and only there."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ksvd_sae.report import style
from ksvd_sae.report.coder_plot import coders_compared, shown_scores
from ksvd_sae.run.config import parse_config
from tests.report.test_pivot import config, frame_of, rows
from tests.run.test_config import RAW

NAMES = ("ksvd", "ksvd.omp", "ksvd.linear", "sae", "sae.omp", "alone")


def drawn(path: Path, **fvu: float) -> np.ndarray:
    found = [row for seed in (0, 1) for row in rows(seed=seed, **{n: v + 0.001 * seed for n, v in fvu.items()})]
    colours = style.palette(NAMES)
    assert coders_compared(frame_of(found), config(), path, frozenset({"alone"}), colours) == path
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def colour_seen(image: np.ndarray, name: str) -> bool:
    wanted = np.array([int(style.palette(NAMES)[name][i : i + 2], 16) for i in (1, 3, 5)])
    return bool((np.abs(image - wanted).max(axis=2) < 24).sum() > 20)


def test_every_dictionary_is_drawn_and_scores_move_it(tmp_path: Path) -> None:
    one = drawn(tmp_path / "one.png", ksvd=0.1, ksvd_omp=0.09, ksvd_linear=0.15, sae=0.14, sae_omp=0.1, alone=9.0)
    assert colour_seen(one, "ksvd")
    assert colour_seen(one, "sae")
    assert not colour_seen(one, "alone")
    other = drawn(tmp_path / "other.png", ksvd=0.1, ksvd_omp=0.09, ksvd_linear=0.11, sae=0.14, sae_omp=0.1)
    assert one.shape != other.shape or (one != other).any()


def test_nothing_to_compare_is_no_figure(tmp_path: Path) -> None:
    path = tmp_path / "none.png"
    assert coders_compared(frame_of(rows(ours=0.1)), parse_config(RAW), path, frozenset(), {}) is None
    assert coders_compared(frame_of(rows(ksvd=0.1)), config(), path, frozenset(), style.palette(NAMES)) is None
    assert not path.exists()


def test_error_behaviour_and_meaning_once_each() -> None:
    values: dict[str, Any] = {"ksvd": 0.1, "ksvd_omp": 0.2, "alone": 9.0}
    found = rows(**values) + rows("autointerp", "autointerp_score", **values)
    for part in ("ce_loss_with_sae", "ce_loss_without_sae"):
        found += rows("core", part, **values)

    def labels(frame_rows: list[dict[str, Any]]) -> list[str]:
        shown = shown_scores(frame_of(frame_rows), config(), frozenset({"alone"}))
        assert all({of for of, _ in cells} == {"ksvd"} for cells in shown.values())
        return [headline.label for headline in shown]

    assert labels(found) == ["FVU", "nats lost", "autointerp"]
    # With both, the one of ordinary tokens on contexts of its own; one coder is nothing to compare.
    assert labels(found + rows("loss", "nats_lost", **values)) == ["FVU", "nats lost, spliced", "autointerp"]
    assert labels(found + rows("loss", "nats_lost", ksvd=0.1)) == ["FVU", "nats lost", "autointerp"]
