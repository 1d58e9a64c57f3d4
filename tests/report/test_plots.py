"""Every figure is drawn, shows its data, and keeps a dictionary's colour."""

import matplotlib
import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest

from ksvd_sae.errors import EvaluationError
from ksvd_sae.report import plots, style

CONTROLS = frozenset({"pca", "random"})


def _pixels(path):
    return (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)


def _colour_count(path, colour):
    """Pixels of exactly this colour."""
    wanted = np.round(np.array(matplotlib.colors.to_rgb(colour)) * 255).astype(int)
    return int((_pixels(path) == wanted).all(axis=-1).sum())


def _assert_drawn(path, colours):
    """A PNG of some size with ink on it, and something in each of the colours."""
    pixels = _pixels(path)
    assert min(pixels.shape[:2]) > 400
    inked = (pixels < 128).any(axis=-1).mean()
    assert 0.001 < inked < 0.9
    # Ink from edge to edge rather than in a corner.
    rows, columns = np.nonzero((pixels < 250).any(axis=-1))
    assert np.ptp(rows) > 0.8 * pixels.shape[0]
    assert np.ptp(columns) > 0.8 * pixels.shape[1]
    for colour in colours:
        assert _colour_count(path, colour) > 20, colour


class TestErrorAgainstBehaviour:
    def test_crowded_methods_are_enlarged(self, frame, tmp_path, methods):
        path = plots.error_against_behaviour(frame, tmp_path / "a.png", CONTROLS)
        _assert_drawn(path, style.palette(methods).values())
        plots.error_against_behaviour(frame, tmp_path / "b.png")
        assert _pixels(path).shape[1] > _pixels(tmp_path / "b.png").shape[1]

    def test_no_enlargement_where_controls_are_near(self, frame, tmp_path, methods, table_of):
        near = table_of({**methods, "pca": methods["db-ksvd"], "random": methods["topk-sae"]})
        path = plots.error_against_behaviour(near, tmp_path / "a.png", CONTROLS)
        assert _pixels(path).shape[1] == pytest.approx(7.2 * style.DPI, abs=1)

    @pytest.mark.parametrize("names", [["db-ksvd"], ["pca"], ["db-ksvd", "pca"], ["db-ksvd", "topk-sae"]])
    def test_few_points(self, frame, names, tmp_path):
        path = plots.error_against_behaviour(frame[frame["dictionary"].isin(names)], tmp_path / "a.png", CONTROLS)
        _assert_drawn(path, [style.palette([name])[name] for name in names])

    def test_equal_points(self, tmp_path, methods, table_of):
        frame = table_of({"a": methods["db-ksvd"], "b": methods["db-ksvd"]})
        _assert_drawn(plots.error_against_behaviour(frame, tmp_path / "a.png"), [])

    def test_names_who_lacks_a_score(self, frame, tmp_path, methods):
        whole = _pixels(plots.error_against_behaviour(frame, tmp_path / "a.png", CONTROLS))
        lacking = frame[~((frame["dictionary"] == "topk-sae") & (frame["eval"] == "core"))]
        path = plots.error_against_behaviour(lacking, tmp_path / "b.png", CONTROLS)
        assert _colour_count(path, style.palette(methods)["topk-sae"]) == 0
        # The line that names it takes room at the bottom.
        assert not np.array_equal(_pixels(path)[-60:], whole[-60:])

    def test_refuses_to_draw_nothing(self, frame, tmp_path):
        with pytest.raises(EvaluationError, match="no dictionary has both"):
            plots.error_against_behaviour(frame[frame["eval"] != "core"], tmp_path / "a.png")
        assert not list(tmp_path.iterdir())

    def test_names_are_not_read_as_formulas(self, frame, tmp_path):
        frame["dictionary"] = frame["dictionary"].replace({"db-ksvd": "$\\frac{$"})
        _assert_drawn(plots.error_against_behaviour(frame, tmp_path / "a.png", CONTROLS), [])


class TestBars:
    def test_all_metrics(self, frame, tmp_path, methods):
        _assert_drawn(plots.metric_bars(frame, tmp_path / "a.png"), style.palette(methods).values())

    def test_gaps_and_negatives(self, frame, tmp_path, methods):
        frame.loc[(frame["dictionary"] == "topk-sae") & (frame["eval"] != "heldout"), "value"] = None
        frame.loc[(frame["dictionary"] == "db-ksvd") & (frame["metric"] == "ce_loss_with_sae"), "value"] = 2.9
        _assert_drawn(plots.metric_bars(frame, tmp_path / "a.png"), style.palette(methods).values())

    def test_only_what_was_scored_has_a_panel(self, frame, tmp_path):
        whole = _pixels(plots.metric_bars(frame, tmp_path / "a.png"))
        part = _pixels(plots.metric_bars(frame[frame["eval"] == "heldout"], tmp_path / "b.png"))
        assert part.shape[0] < whole.shape[0]
        assert part.shape[1] < whole.shape[1]

    def test_refuses_to_draw_nothing(self, frame, tmp_path):
        with pytest.raises(EvaluationError, match="none has a score"):
            plots.metric_bars(frame[frame["eval"] == "training"], tmp_path / "a.png")


class TestTraining:
    def test_curves(self, logs, tmp_path):
        _assert_drawn(plots.training_curves(logs, tmp_path / "a.png"), style.palette(logs).values())

    def test_one_batch_and_an_empty_log(self, logs, tmp_path):
        few = {"db-ksvd": logs["db-ksvd"][:1], "none": []}
        _assert_drawn(plots.training_curves(few, tmp_path / "a.png"), [style.palette(few)["db-ksvd"]])

    def test_refuses_to_draw_nothing(self, tmp_path):
        with pytest.raises(EvaluationError, match="logs are empty"):
            plots.training_curves({"db-ksvd": []}, tmp_path / "a.png")


class TestDensities:
    def test_histograms(self, densities, tmp_path):
        _assert_drawn(plots.density_histogram(densities, tmp_path / "a.png"), style.palette(densities).values())

    def test_an_atom_that_always_fires_and_one_that_never_does(self, tmp_path):
        made = {"always": np.ones(4), "never": np.zeros(4), "none": np.zeros(0), "both": np.array([0.0, 1e-7, 1.0])}
        path = plots.density_histogram(made, tmp_path / "a.png")
        colours = style.palette(name for name in made if name != "none")
        assert _colour_count(path, colours["always"]) > 100
        assert _colour_count(path, colours["never"]) == 0

    @pytest.mark.parametrize("values", [[0.5, 1.5], [-0.1], [np.nan]])
    def test_refuses_what_is_no_share(self, values, tmp_path):
        with pytest.raises(EvaluationError, match="not shares of tokens"):
            plots.density_histogram({"db-ksvd": np.array(values)}, tmp_path / "a.png")

    def test_refuses_to_draw_nothing(self, tmp_path):
        with pytest.raises(EvaluationError, match="there are none"):
            plots.density_histogram({}, tmp_path / "a.png")


class TestStyle:
    def test_usual_methods_keep_their_colour(self, methods):
        every = style.palette(methods)
        for name in methods:
            assert style.palette([name]) == {name: every[name]}
            assert style.palette([name], controls=frozenset()) == {name: every[name]}
        assert len(set(every.values())) == len(methods)

    def test_others_get_colours_of_their_own(self):
        names = ["x", "topk-sae", "y", "db-ksvd", "z", "pca", "shuffled"]
        chosen = style.palette(names, frozenset({"pca", "shuffled"}))
        assert list(chosen) == names
        assert len(set(chosen.values())) == len(names)
        red, green, blue = matplotlib.colors.to_rgb(chosen["shuffled"])
        assert red == green == blue

    def test_more_dictionaries_than_colours(self):
        names = [f"d{i}" for i in range(20)]
        assert len(style.palette(names)) == 20

    def test_given_colours_are_used(self, frame, tmp_path, methods):
        path = plots.metric_bars(frame, tmp_path / "a.png", colours={"db-ksvd": "#123456"})
        assert _colour_count(path, "#123456") > 100
        assert _colour_count(path, style.palette(methods)["db-ksvd"]) == 0

    def test_equal_scores_give_equal_bytes_and_settings_stay(self, frame, tmp_path):
        before = dict(matplotlib.rcParams)
        one, two = (plots.metric_bars(frame, tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
        assert one == two
        assert dict(matplotlib.rcParams) == before

    def test_counts(self):
        assert [style.short_count(value) for value in (0, 512, 65_536, 1.5e6, 2e9)] == [
            *("0", "512", "65.54k", "1.5M", "2B")
        ]
