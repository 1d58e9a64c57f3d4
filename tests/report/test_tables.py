"""The tidy table and its headline: order, derived columns, what is bold, what is refused."""

import numpy as np
import pandas as pd
import pytest

from ksvd_sae.errors import EvaluationError
from ksvd_sae.report import scores, tables
from ksvd_sae.report.headline import HEADLINES, column_texts, count_text, percent_text, score_texts

CONTROLS = frozenset({"pca", "random"})


def _cell(markdown: str, row: str, column: str) -> str:
    head, _, *rows = [[part.strip() for part in line.split(" | ")] for line in markdown.strip("| \n").splitlines()]
    heads = [text.strip("| ") for text in head]
    found = next(parts for parts in rows if parts[0].strip("| ") == row)
    return found[heads.index(column)].strip("| ")


def _set(frame: pd.DataFrame, dictionary: str, metric: str, value: float | None) -> None:
    hit = (frame["dictionary"] == dictionary) & (frame["metric"] == metric)
    assert hit.any()
    frame.loc[hit, "value"] = value


class TestCheck:
    def test_accepts_a_run(self, frame):
        scores.check_table(frame)

    @pytest.mark.parametrize("column", scores.COLUMNS)
    def test_names_the_missing_column(self, frame, column):
        with pytest.raises(EvaluationError, match=f"missing: {column}"):
            scores.check_table(frame.drop(columns=column))

    def test_refuses_unknown_columns(self, frame):
        with pytest.raises(EvaluationError, match="unknown: stderr"):
            scores.check_table(frame.assign(stderr=0.1))

    def test_refuses_no_rows(self):
        with pytest.raises(EvaluationError, match="no rows"):
            scores.check_table(pd.DataFrame(columns=scores.COLUMNS))

    @pytest.mark.parametrize("seed", [0, None])
    def test_refuses_a_score_given_twice(self, frame, seed):
        frame["seed"] = seed
        twice = pd.concat([frame, frame.tail(1).assign(value=0.5, n=7, source="other.json")])
        with pytest.raises(EvaluationError, match="2 rows score what another row scores"):
            scores.check_table(twice)

    @pytest.mark.parametrize(("column", "other"), [("view", "other"), ("data", "other"), ("seed", 1)])
    def test_accepts_what_differs_in_any_part_of_the_key(self, frame, column, other):
        scores.check_table(pd.concat([frame, frame.tail(1).assign(**{column: other})]))

    def test_refuses_text_for_numbers(self, frame):
        with pytest.raises(EvaluationError, match="column 'value' holds what is no number"):
            scores.check_table(frame.astype({"value": object}).assign(value="high"))
        with pytest.raises(EvaluationError, match="column 'k' holds what is no whole number"):
            scores.check_table(frame.assign(k=19.5))

    def test_refuses_a_score_without_a_dictionary(self, frame):
        frame.loc[3, "dictionary"] = None
        with pytest.raises(EvaluationError, match=r"without a dictionary\n  got: row 3"):
            scores.check_table(frame)


class TestCsv:
    def test_round_trip(self, frame, tmp_path):
        frame.loc[0, "value"] = 0.123456789
        frame.loc[1, "n"] = None
        scores.write_csv(frame, tmp_path / "scores.csv")
        back = scores.read_csv(tmp_path / "scores.csv")
        assert list(back.columns) == scores.COLUMNS
        key = [*scores.KEY]
        one, two = (scores.typed_frame(f).sort_values(key).reset_index(drop=True) for f in (frame, back))
        # Nine significant digits: half a unit in the last is 5e-9 of the value.
        pd.testing.assert_frame_equal(one, two, rtol=5e-9)
        scores.write_csv(back, tmp_path / "again.csv")
        assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "scores.csv").read_bytes()

    def test_round_trip_keeps_the_summary(self, frame, tmp_path):
        scores.write_csv(frame, tmp_path / "scores.csv")
        pd.testing.assert_frame_equal(
            tables.summary(scores.read_csv(tmp_path / "scores.csv")), tables.summary(frame), rtol=5e-9
        )

    def test_order_within_a_dictionary_does_not_depend_on_gathering(self, frame, tmp_path):
        scores.write_csv(frame, tmp_path / "one.csv")
        gathered = pd.concat([part[::-1] for _, part in frame.groupby("dictionary", sort=False)])
        scores.write_csv(gathered, tmp_path / "two.csv")
        assert (tmp_path / "one.csv").read_text() == (tmp_path / "two.csv").read_text()

    @pytest.mark.parametrize("name", ["NA", "None", "nan", "1.0", 'a "b", c', "ÜβΩ"])
    def test_names_survive(self, name, tmp_path, methods, table_of):
        scores.write_csv(table_of({name: methods["db-ksvd"]}), tmp_path / "scores.csv")
        assert set(scores.read_csv(tmp_path / "scores.csv")["dictionary"]) == {name}

    def test_a_refused_table_leaves_the_old_file(self, frame, tmp_path):
        scores.write_csv(frame, tmp_path / "scores.csv")
        before = (tmp_path / "scores.csv").read_bytes()
        with pytest.raises(EvaluationError):
            scores.write_csv(pd.concat([frame, frame]), tmp_path / "scores.csv")
        assert (tmp_path / "scores.csv").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["scores.csv"]

    @pytest.mark.parametrize("content", [b"", b"a,b\n1,2,3\n", b"a,b\n1,2\n", b"\xff\xfe\x00", None])
    def test_refuses_other_files(self, content, tmp_path):
        if content is not None:
            (tmp_path / "scores.csv").write_bytes(content)
        with pytest.raises(EvaluationError, match=r"reading (scores|a table)"):
            scores.read_csv(tmp_path / "scores.csv")


class TestSummary:
    def test_columns_and_order(self, frame, methods, table_of):
        table = tables.summary(frame)
        assert list(table.columns) == [
            *("dictionary", "view", "d_sae", "k", "L0", "samples seen", "FVU", "loss recovered", "KL"),
            *("nats lost", "probing top-1", "probing top-5", "dead"),
        ]
        assert list(table["dictionary"]) == list(methods)
        turned = table_of(dict(reversed(methods.items())))
        assert list(tables.summary(turned)["dictionary"]) == list(reversed(methods))

    def test_every_number(self, frame, methods):
        table = tables.summary(frame).set_index("dictionary")
        names = ["d_sae", "k", "L0", "samples seen", "FVU", "dead", "loss recovered", "KL", "nats lost"]
        for name, values in methods.items():
            expected = dict(zip([*names, "probing top-1", "probing top-5"], values, strict=True))
            assert {key: table.loc[name, key] for key in expected} == pytest.approx(expected)

    def test_missing_and_infinite_scores_are_nan(self, frame):
        _set(frame, "topk-sae", "fvu", None)
        _set(frame, "topk-sae", "kl_div_with_sae", float("inf"))
        _set(frame, "topk-sae", "ce_loss_without_sae", float("nan"))
        frame = frame[~((frame["dictionary"] == "topk-sae") & (frame["eval"] == "sparse_probing"))]
        row = tables.summary(frame).set_index("dictionary").loc["topk-sae"]
        assert row[["FVU", "KL", "nats lost", "probing top-1", "probing top-5"]].isna().all()
        assert row["loss recovered"] == 0.94

    def test_two_views_share_their_training(self, frame):
        other = frame[(frame["dictionary"] == "db-ksvd") & (frame["eval"] != "training")].assign(
            view="non-negative", d_sae=8192
        )
        _set(other, "db-ksvd", "fvu", 0.2)
        table = tables.summary(pd.concat([frame, other]))
        mine = table[table["dictionary"] == "db-ksvd"]
        assert list(mine["view"]) == ["signed", "non-negative"]
        assert list(mine["FVU"]) == [0.115, 0.2]
        assert list(mine["d_sae"]) == [4096, 8192]
        assert list(mine["samples seen"]) == [1_048_576] * 2
        assert tables.entry_labels(table)[:3] == ["db-ksvd (signed)", "db-ksvd (non-negative)", "db-ksvd-refit"]

    def test_the_split_view_stands_behind_its_signed_one(self, frame, methods, tmp_path):
        mine = frame[frame["dictionary"] == "db-ksvd"]
        split = mine.assign(view="split", d_sae=8192)
        # Gathered the wrong way round, and apart.
        mixed = pd.concat([split, frame[frame["dictionary"] != "db-ksvd"], mine], ignore_index=True)
        table = tables.summary(mixed)
        assert list(table["dictionary"]) == ["db-ksvd", *methods]
        assert list(table["view"][:2]) == ["signed", "split"]
        assert list(table["d_sae"][:2]) == [4096, 8192]
        lines = tables.to_markdown(table, CONTROLS).splitlines()[2:]
        assert [line.split("|")[2].strip() for line in lines[:3]] == ["signed", "split", "signed"]
        scores.write_csv(mixed, tmp_path / "scores.csv")
        stored = scores.read_csv(tmp_path / "scores.csv")
        assert list(dict.fromkeys(stored["view"][stored["dictionary"] == "db-ksvd"])) == ["signed", "split"]

    def test_legend_says_what_is_counted(self, frame):
        legend = dict(tables.legend(frame))
        assert "two an atom" in legend["d_sae"]
        assert "% of d_sae" in legend["dead ↓"]

    def test_training_alone_makes_a_row(self, frame, methods):
        table = tables.summary(frame[frame["eval"] == "training"])
        assert list(table["dictionary"]) == list(methods)
        assert table["FVU"].isna().all()
        assert table["samples seen"].notna().all()

    def test_takes_the_data_set_that_scores_most(self, frame):
        extra = frame[(frame["dictionary"] == "db-ksvd") & (frame["metric"] == "fvu")].assign(data="other", value=0.9)
        both = pd.concat([extra, frame])
        assert tables.summary(both)["FVU"].max() == 0.6
        assert "on bbc-news heldout" in dict(tables.legend(both))["FVU ↓"]

    def test_mean_over_seeds_and_its_interval(self, frame, methods, table_of):
        other = list(methods["db-ksvd"])
        other[4] += 0.004  # FVU
        other[8] += 0.02  # nats lost
        both = pd.concat([frame, table_of({"db-ksvd": tuple(other)}, seed=1)])
        means, widths = tables.summary(both), tables.intervals(both)
        assert list(means["dictionary"]) == list(methods), "a row a dictionary"
        assert means["FVU"][0] == pytest.approx(0.117)
        # Student's t of two values: 12.706 · |difference| / 2.
        assert widths["FVU"][0] == pytest.approx(12.7062 * 0.002, rel=1e-4)
        assert means["nats lost"][0] == pytest.approx(0.224)
        assert widths["nats lost"][0] == pytest.approx(12.7062 * 0.01, rel=1e-4)
        assert widths["L0"][0] == 0
        assert widths["FVU"][1:].isna().all(), "one seed has no interval"
        assert widths[["d_sae", "k"]].isna().all(axis=None)

    def test_differences_are_taken_within_seeds(self, frame, methods, table_of):
        """A clean loss that swings with the seed leaves no trace in nats lost."""
        second = table_of({"db-ksvd": methods["db-ksvd"]}, seed=1)
        loss = second["metric"].isin(["ce_loss_with_sae", "ce_loss_without_sae"])
        second.loc[loss, "value"] += 1.0
        both = pd.concat([frame, second])
        assert tables.intervals(both)["nats lost"][0] == pytest.approx(0, abs=1e-9)

    def test_evaluation_seeds_of_one_training(self, frame):
        probing = frame[(frame["eval"] == "sparse_probing") & (frame["dictionary"] == "db-ksvd")]
        more = [probing.assign(eval_seed=seed, value=probing["value"] + 0.01 * seed) for seed in (1, 2)]
        both = pd.concat([frame, *more])
        assert tables.summary(both)["probing top-1"][0] == pytest.approx(0.712 + 0.01)
        assert tables.intervals(both)["probing top-1"][0] == pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-4)
        assert "evaluation seeds" in tables.seeds_text(both)

    def test_intervals_are_shown(self, frame, methods, table_of):
        other = list(methods["db-ksvd"])
        other[4] += 0.00002
        both = pd.concat([frame, table_of({"db-ksvd": tuple(other)}, seed=1)])
        shown = tables.to_markdown(tables.summary(both), widths=tables.intervals(both)).splitlines()
        assert shown[2].count(" ± ") == 1, "equal scores of two seeds have no spread to show"
        assert " ± " not in shown[3]
        assert "0.115 ± 0.0001" in shown[2], "an interval smaller than the last digit is not written as 0"

    def test_differing_seeds_of_different_dictionaries_are_fine(self, frame):
        frame["seed"] = frame["seed"].astype("Int64")
        frame.loc[frame["dictionary"] == "pca", "seed"] = pd.NA
        frame.loc[frame["dictionary"] == "topk-sae", "seed"] = 3
        assert tables.summary(frame)["nats lost"].notna().all()

    def test_refuses_two_sizes_under_one_name(self, frame):
        frame.loc[0, "k"] = 40
        with pytest.raises(EvaluationError, match=r"several k\n  got: \[20, 40\]"):
            tables.summary(frame)

    def test_leaves_its_input_alone(self, frame):
        before = frame.copy(deep=True)
        tables.summary(frame)
        pd.testing.assert_frame_equal(frame, before)


class TestBySeed:
    def test_one_row_a_training_and_its_means_are_the_summary(self, frame, methods, table_of):
        seedless = frame["dictionary"] == "pca"
        frame["seed"] = frame["seed"].astype("Int64").mask(seedless)
        other = list(methods["db-ksvd"])
        other[2], other[4], other[8] = 21.0, other[4] + 0.004, other[8] + 0.02  # L0, FVU, nats lost
        both = pd.concat([frame, table_of({"db-ksvd": tuple(other)}, seed=7)])
        trainings = tables.by_seed(both)
        rows = [(r["dictionary"], r["seed"] if pd.notna(r["seed"]) else None) for r in trainings.to_dict("records")]
        assert rows == [("db-ksvd", 0), ("db-ksvd", 7), *((n, None if n == "pca" else 0) for n in list(methods)[1:])]
        assert list(trainings["FVU"][:2]) == pytest.approx([0.115, 0.119])
        assert list(trainings["nats lost"][:2]) == pytest.approx([0.214, 0.234])
        assert list(trainings["L0"][:2]) == [20.0, 21.0]
        table = tables.summary(both)
        shared = [name for name in trainings.columns if name != "seed"]
        assert shared == [name for name in table.columns if name not in ("d_sae", "k")]
        means = trainings.drop(columns=["view", "seed"]).groupby("dictionary", sort=False).mean().reset_index()
        pd.testing.assert_frame_equal(means, table[[name for name in shared if name != "view"]])

    def test_evaluation_seeds_are_averaged_and_views_kept_apart(self, frame):
        probing = frame[(frame["eval"] == "sparse_probing") & (frame["dictionary"] == "db-ksvd")]
        more = probing.assign(eval_seed=1, value=probing["value"] + 0.01)
        split = frame[(frame["dictionary"] == "db-ksvd") & (frame["eval"] == "heldout")].assign(
            view="split", d_sae=8192
        )
        trainings = tables.by_seed(pd.concat([frame, more, split]))
        assert list(trainings["view"][:2]) == ["signed", "split"]
        assert trainings["probing top-1"][0] == pytest.approx(0.712 + 0.005)
        assert np.isnan(trainings["probing top-1"][1])
        assert list(trainings["samples seen"][:2]) == [1_048_576] * 2, "a training is a dictionary's, whatever its view"

    def test_scores_that_are_not_finite_are_left_out(self, frame):
        _set(frame, "topk-sae", "fvu", float("inf"))
        trainings = tables.by_seed(frame).set_index("dictionary")
        assert np.isnan(trainings.loc["topk-sae", "FVU"])
        assert trainings["FVU"].notna().sum() == len(trainings) - 1


class TestMarkdown:
    def test_best_real_method_is_bold(self, frame, methods):
        markdown = tables.to_markdown(tables.summary(frame), CONTROLS)
        assert _cell(markdown, "db-ksvd-refit", "FVU ↓") == "**0.108**"
        assert _cell(markdown, "topk-sae", "loss recovered ↑") == "**0.940**"
        assert _cell(markdown, "topk-sae", "nats lost ↓") == "**0.183**"
        assert _cell(markdown, "db-ksvd", "FVU ↓") == "0.115"
        # Both never lose an atom; the control that ties with them stays plain.
        assert [_cell(markdown, name, "dead ↓") for name in methods] == ["**0%**", "**0%**", "3.7%", "0%", "0.02%"]

    def test_controls_do_not_win(self, frame):
        _set(frame, "pca", "fvu", 0.01)
        table = tables.summary(frame)
        assert _cell(tables.to_markdown(table, CONTROLS), "db-ksvd-refit", "FVU ↓") == "**0.1080**"
        assert _cell(tables.to_markdown(table), "pca", "FVU ↓") == "**0.0100**"

    def test_no_bold_without_a_contest(self, frame):
        alone = tables.summary(frame[frame["dictionary"].isin({"db-ksvd", *CONTROLS})])
        assert "**" not in tables.to_markdown(alone, CONTROLS)
        frame["value"] = 0.5
        assert "**" not in tables.to_markdown(tables.summary(frame), CONTROLS)

    def test_a_missing_score_is_shown_and_never_best(self, frame):
        _set(frame, "topk-sae", "ce_loss_score", None)
        markdown = tables.to_markdown(tables.summary(frame), CONTROLS)
        assert _cell(markdown, "topk-sae", "loss recovered ↑") == "n/a"
        assert _cell(markdown, "db-ksvd-refit", "loss recovered ↑") == "**0.934**"
        assert "nan" not in markdown

    def test_columns_are_aligned(self, frame):
        lines = tables.to_markdown(tables.summary(frame), CONTROLS).splitlines()
        assert len({len(line) for line in lines}) == 1
        bars = [[i for i, letter in enumerate(line) if letter == "|"] for line in lines]
        assert bars == [bars[0]] * len(lines)

    def test_names_cannot_break_the_table(self, frame, methods):
        frame["dictionary"] = frame["dictionary"].replace({"db-ksvd": "a|b\n<script>"})
        lines = tables.to_markdown(tables.summary(frame)).splitlines()
        assert len(lines) == 2 + len(methods)
        assert lines[2].startswith("| a\\|b &lt;script> ")

    def test_document(self, frame, tmp_path):
        tables.write_markdown(frame, tmp_path / "table.md", ["TopK saw\nfive times as much."], CONTROLS, title="Demo")
        text = (tmp_path / "table.md").read_text(encoding="utf-8")
        assert text.startswith("# Demo\n\n| dictionary ")
        for headline in HEADLINES:
            assert (f"- **{headline.heading}**: " in text) == (not headline.optional)
        assert "on bbc-news heldout, n = 65,536" in text
        assert "nats a token" in text
        assert "the same probe on the raw activations gives 0.632" in text
        assert "leaving out the controls pca and random" in text
        assert "One training seed (0)" in text
        assert text.endswith("## Notes\n\n- TopK saw five times as much.\n")

    def test_legend_says_what_was_not_scored(self, frame):
        legend = dict(tables.legend(frame[frame["eval"] != "core"]))
        assert legend["KL ↓"].endswith("; not scored here")
        assert "not scored" not in legend["FVU ↓"]


class TestOptionalColumns:
    """Evals that run only where a config asks for them have no column elsewhere."""

    @pytest.fixture
    def absorbed(self, frame):
        rows = frame[(frame["eval"] == "core") & (frame["metric"] == "l0")].head(2)
        rows = rows.assign(eval="absorption", data="vocabulary sample of 2000", n=310)
        rows = rows.assign(metric="mean_absorption_fraction_score", value=[0.25, 0.125])
        return pd.concat([frame, rows], ignore_index=True)

    def test_not_scored(self, frame):
        assert "absorption" not in tables.summary(frame)
        assert not any("absorption" in heading for heading, _ in tables.legend(frame))

    def test_scored(self, absorbed):
        table = tables.summary(absorbed)
        assert list(table["absorption"][:2]) == [0.25, 0.125]
        assert table["absorption"][2:].isna().all()
        assert "full absorption" not in table, "this score of the same eval is not there"
        assert dict(tables.legend(absorbed))["absorption ↓"].endswith("; on vocabulary sample of 2000, n = 310")

    def test_scored_but_not_finite(self, absorbed):
        """A score that is no number was asked for: its column stays."""
        absorbed.loc[absorbed["eval"] == "absorption", "value"] = np.nan
        assert tables.summary(absorbed)["absorption"].isna().all()


class TestNumbers:
    @pytest.mark.parametrize(
        ("values", "texts"),
        [
            ([0.115, 0.34, 0.6], ["0.115", "0.340", "0.600"]),
            ([0.0712, 0.41, 5.2], ["0.0712", "0.4100", "5.200"]),
            ([0.9401, 0.9404], ["0.9401", "0.9404"]),
            ([0.9401, 0.9404, float("nan")], ["0.9401", "0.9404", "n/a"]),
            ([0.5, 0.5], ["0.500", "0.500"]),
            # What sums of floats leave behind is no difference to show.
            ([0.1 + 0.2, 0.3, 0.25], ["0.300", "0.300", "0.250"]),
            ([0.0, 1.0, -0.25], ["0", "1.000", "-0.250"]),
            ([1234.5, 0.125], ["1234", "0.125"]),
            ([3.2e-7, 0.5], ["3.20e-07", "0.5000"]),
            ([float("nan"), float("inf")], ["n/a", "n/a"]),
            ([], []),
        ],
    )
    def test_scores(self, values, texts):
        assert score_texts(values) == texts

    def test_amounts(self):
        assert [count_text(value) for value in (0, 4096, 1_048_576.0, np.nan)] == ["0", "4,096", "1,048,576", "n/a"]
        shares = [percent_text(value) for value in (0, 1, 0.0371, 0.0002, 1e-5, np.nan)]
        assert shares == ["0%", "100.0%", "3.7%", "0.02%", "0.001%", "n/a"]
        assert column_texts("L0", [19.97, 1200.0]) == ["20.0", "1,200.0"]
