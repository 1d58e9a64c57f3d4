"""Scores against L0, the Pareto front, and ranks."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from ksvd_sae.errors import EvaluationError
from ksvd_sae.report import l0_plots, rank_plot, style, tables
from tests.report.test_plots import _assert_drawn, _pixels

CONTROLS = frozenset({"pca", "random"})


@pytest.fixture
def many(methods, table_of):
    """The methods at three k, the controls at one."""
    rows = {}
    for name, (d_sae, _, _, seen, fvu, dead, recovered, *rest) in methods.items():
        for k in (20,) if name in CONTROLS else (10, 20, 40):
            better = (20 / k) ** 0.5
            values = (d_sae, k, float(k), seen, fvu * better, dead, 1 - (1 - recovered) * better, *rest)
            rows[name if name in CONTROLS else f"{name}-k{k}"] = values
    return table_of(rows)


def _colour_ink(path):
    """Pixels that are neither white nor grey."""
    return int((np.ptp(_pixels(path), axis=-1) > 60).sum())


class TestAgainstL0:
    def test_spans_a_range(self, frame, many):
        assert l0_plots.spans_a_range(many, CONTROLS)
        assert not l0_plots.spans_a_range(frame, CONTROLS)
        far = frame.copy()
        far.loc[far["dictionary"] == "pca", "l0"] = 200.0
        assert not l0_plots.spans_a_range(far, CONTROLS), "a control alone makes no range"
        assert l0_plots.spans_a_range(far, frozenset())
        far["l0"] = None
        assert not l0_plots.spans_a_range(far, CONTROLS)

    @pytest.mark.parametrize(
        ("label", "k", "name"),
        [
            ("topk-sae-k40", 40, "topk-sae"),
            ("topk-sae-40", 40, "topk-sae"),
            ("topk_k=40", 40, "topk_k="),
            ("db-ksvd-20 (split)", 20, "db-ksvd (split)"),
            ("db-ksvd-16k", 20, "db-ksvd-16k"),
            ("layer-20-sae", 20, "layer-20-sae"),
            ("k20", 20, "k20"),
            ("pca", math.nan, "pca"),
        ],
    )
    def test_family(self, label, k, name):
        assert l0_plots.family(label, k) == name

    def test_drawn_with_a_colour_a_family(self, many, tmp_path):
        path = l0_plots.metrics_against_l0(many, tmp_path / "a.png", CONTROLS)
        _assert_drawn(path, [style.palette([n])[n] for n in ("db-ksvd", "db-ksvd-refit", "topk-sae")])

    def test_single_dictionaries_keep_their_colour(self, frame, tmp_path):
        frame.loc[frame["dictionary"] == "topk-sae", "l0"] = 35.0
        path = l0_plots.metrics_against_l0(frame, tmp_path / "a.png", CONTROLS, colours={"topk-sae": "#123456"})
        _assert_drawn(path, ["#123456"])

    def test_intervals_are_drawn(self, many, tmp_path):
        """Two more seeds, as far above the first as below it: the means stay, and bars appear."""
        away = {"loss recovered": "ce_loss_score", "FVU": "fvu"}
        moved = many["metric"].isin(away.values())
        seeds = [many.assign(seed=s, value=many["value"] + by * moved) for s, by in ((0, 0), (1, 0.01), (2, -0.01))]
        several = pd.concat(seeds, ignore_index=True)
        assert tables.summary(several)["FVU"].to_numpy() == pytest.approx(tables.summary(many)["FVU"].to_numpy())
        for draw in (l0_plots.metrics_against_l0, l0_plots.pareto_against_l0):
            plain, barred = (_colour_ink(draw(f, tmp_path / "a.png", CONTROLS)) for f in (many, several))
            assert barred > 1.01 * plain

    def test_refuses_to_draw_nothing(self, many, tmp_path):
        training = many[many["eval"] == "training"]
        with pytest.raises(EvaluationError, match="none has a score"):
            l0_plots.metrics_against_l0(training, tmp_path / "a.png", CONTROLS)
        heldout = many[many["eval"] == "heldout"]
        assert not l0_plots.has_behaviour(heldout, CONTROLS)
        with pytest.raises(EvaluationError, match="no method has both"):
            l0_plots.pareto_against_l0(heldout, tmp_path / "a.png", CONTROLS)
        assert not list(tmp_path.iterdir())


class TestPareto:
    def test_front_by_comparing_all_pairs(self):
        rng = np.random.default_rng(0)
        for n in (1, 2, 5, 30):
            # Few values, so that ties occur in either coordinate and in both.
            points = [(float(x), float(y)) for x, y in rng.integers(0, 6, size=(n, 2))]

            def beats(a, b):
                return a[0] <= b[0] and a[1] >= b[1] and a != b

            wanted = {i for i, p in enumerate(points) if not any(beats(other, p) for other in points)}
            front = l0_plots.pareto_front(points)
            assert set(front) == wanted
            for i, j in itertools.pairwise(front):
                assert points[i] <= points[j]

    def test_drawn(self, many, tmp_path):
        path = l0_plots.pareto_against_l0(many, tmp_path / "a.png", CONTROLS)
        _assert_drawn(path, [style.palette(["topk-sae"])["topk-sae"]])

    def test_one_method(self, frame, tmp_path):
        alone = frame[frame["dictionary"] == "db-ksvd"]
        _assert_drawn(l0_plots.pareto_against_l0(alone, tmp_path / "a.png"), [])


class TestRanks:
    def test_best_is_first_whatever_the_direction(self, frame):
        found = rank_plot.ranks(frame, CONTROLS)
        assert list(found.index) == ["db-ksvd", "db-ksvd-refit", "topk-sae"]
        assert list(found["FVU ↓"]) == [2, 1, 3]
        assert list(found["loss recovered ↑"]) == [3, 2, 1]
        assert list(found["dead ↓"]) == [1.5, 1.5, 3], "ties share a mean"
        assert "samples seen" not in " ".join(found.columns)

    def test_metrics_that_not_all_have_are_left_out(self, frame):
        frame.loc[(frame["dictionary"] == "topk-sae") & (frame["metric"] == "kl_div_with_sae"), "value"] = None
        frame.loc[frame["metric"] == "dead_fraction", "value"] = 0.0
        found = rank_plot.ranks(frame, CONTROLS)
        assert not {"KL ↓", "dead ↓"} & set(found.columns)
        assert len(found.columns) == 5

    @pytest.mark.parametrize("names", [["db-ksvd"], ["pca", "random"], ["db-ksvd", "pca"]])
    def test_nothing_to_rank(self, frame, names, tmp_path):
        few = frame[frame["dictionary"].isin(names)]
        assert rank_plot.ranks(few, CONTROLS).empty
        with pytest.raises(EvaluationError, match="nothing to rank"):
            rank_plot.mean_ranks(few, tmp_path / "a.png", CONTROLS)

    def test_drawn(self, frame, many, tmp_path, methods):
        path = rank_plot.mean_ranks(frame, tmp_path / "a.png", CONTROLS)
        _assert_drawn(path, [style.palette([name])[name] for name in methods if name not in CONTROLS])
        assert _pixels(rank_plot.mean_ranks(many, tmp_path / "b.png", CONTROLS)).shape[0] > _pixels(path).shape[0]

    def test_views_are_methods_of_their_own(self, frame):
        split = frame[frame["dictionary"] == "db-ksvd"].assign(view="split")
        found = rank_plot.ranks(pd.concat([frame, split], ignore_index=True), CONTROLS)
        assert {"db-ksvd (signed)", "db-ksvd (split)"} < set(found.index)
