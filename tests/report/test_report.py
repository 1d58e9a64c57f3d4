"""The page stands alone, says what the table says, and treats every name as text."""

import base64
import json
import re
from html import unescape
from html.parser import HTMLParser

import pandas as pd
import pytest

from ksvd_sae.errors import EvaluationError
from ksvd_sae.report import plots, tables
from ksvd_sae.report.report import reading_guide, write_report
from ksvd_sae.run.config import RunConfig, load_config, parse_config

CONTROLS = frozenset({"pca", "random"})

# Attributes that make a browser fetch.
FETCHING = ("src", "href", "srcset", "data", "action", "poster", "background", "formaction", "ping", "manifest")
VOID = {"meta", "img", "input", "br", "link", "hr"}


class Page(HTMLParser):
    """Tags in order, their attributes, the text inside each open tag, and whether tags close as they opened."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.rows, self.styles = [], [], [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            self.styles += data
        elif "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def attributes(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def write(frame, png, manifest, tmp_path):
    """Write a report with some parts replaced and parse it."""

    def write(**changes):
        parts = {
            "title": "Demo",
            "frame": frame,
            "plots": {"A caption": png},
            "notes": ["A note."],
            "manifest": manifest,
            "controls": CONTROLS,
        }
        html = write_report(tmp_path / "report.html", **{**parts, **changes}).read_text(encoding="utf-8")
        page = Page(html)
        assert page.open == []
        return html, page

    return write


def test_loads_nothing(write, frame, tmp_path):
    plots.metric_bars(frame, tmp_path / "bars.png")
    html, page = write(plots={"Bars": tmp_path / "bars.png"})
    assert not re.search(r"(?i)(https?:)?//[a-z0-9]", _text_of(html))
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in FETCHING:
            # A link to a place in the page fetches nothing.
            inside = ("data:", "#") if (tag, name) == ("a", "href") else ("data:",)
            assert attrs.get(name, "data:").startswith(inside), (tag, name)
        assert not [name for name in attrs if name.startswith("on")]
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    policy = next(attrs["content"] for attrs in page.attributes("meta") if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'; img-src data:;")


def _text_of(html):
    """The page less its images and its script's own comments, which begin with // and a blank."""
    return re.sub(r"base64,[A-Za-z0-9+/=]+|^\s*// .*$", "", html, flags=re.MULTILINE)


def test_plots_are_inside_in_order_with_captions(write, frame, png, tmp_path):
    plots.metric_bars(frame, tmp_path / "bars.png")
    html, page = write(plots={"One": png, "Two & more": tmp_path / "bars.png"})
    images = page.attributes("img")
    assert [image["alt"] for image in images] == ["One", "Two & more"]
    for image, path in zip(images, (png, tmp_path / "bars.png"), strict=True):
        assert base64.b64decode(image["src"].partition("base64,")[2], validate=True) == path.read_bytes()
    assert "<figcaption>Two &amp; more</figcaption>" in html


def test_headline_table_says_what_markdown_says(write, frame, methods):
    _, page = write()
    table = tables.summary(frame)
    start = next(i for i, row in enumerate(page.rows) if row and row[0].startswith("dictionary"))
    shown = page.rows[start + 1 : start + 1 + len(methods)]
    expected = [[cell.text for cell in row] for row in tables.cells(table, CONTROLS)]
    for row in expected:
        row[0] += "control" if row[0] in CONTROLS else ""
    assert shown == expected


def test_best_cells_are_marked(write, frame):
    _, page = write()
    marked = [attrs["data-value"] for attrs in page.attributes("td") if "best" in attrs.get("class", "").split()]
    assert sorted(map(float, marked)) == pytest.approx(sorted([0.108, 0.94, 0.197, 0.183, 0.741, 0.872, 0, 0]))


def test_every_header_sorts_and_numbers_carry_their_value(write, frame):
    html, page = write()
    heads = [*tables.summary(frame).columns, *tables.by_seed(frame).columns]
    assert len([attrs for attrs in page.attributes("button") if attrs.get("class") == "sort"]) == len(heads)
    assert html.count("data-sortable>") == 2
    assert 'setAttribute("aria-sort", order)' in html


def test_every_training_is_listed(write, frame, methods, table_of):
    other = list(methods["db-ksvd"])
    other[4] += 0.0012345  # FVU
    both = pd.concat([frame, table_of({"db-ksvd": tuple(other)}, seed=12)])
    both.loc[(both["dictionary"] == "pca") & (both["metric"] == "fvu"), "value"] = None
    both["seed"] = both["seed"].astype("Int64").mask(both["dictionary"] == "random")
    html, page = write(frame=both)
    heads = tables.headings(tables.by_seed(both))
    start = next(i for i, row in enumerate(page.rows) if row and row[2:3] == ["seed"])
    listed = [dict(zip(heads, row, strict=True)) for row in page.rows[start + 1 : start + 2 + len(methods)]]
    assert [row["dictionary"] for row in listed] == ["db-ksvd", *methods]
    assert [row["seed"] for row in listed] == ["0", "12", "0", "0", "0", "none"]
    assert [row["FVU ↓"] for row in listed] == ["0.115", "0.116235", "0.108", "0.131", "n/a", "0.6"]
    assert listed[0]["samples seen"] == "1,048,576"
    assert f"{len(methods) + 1} trainings, one a row" in html
    assert f"All {len(both)} scores" in html
    assert not re.search(r"(?i)>\s*(nan|<na>)\s*<", html)


def test_names_are_text(write, frame, png):
    nasty = "<script>alert(1)</script>\"'&"
    frame["dictionary"] = frame["dictionary"].replace({"db-ksvd": nasty})
    frame["source"] = nasty
    frame["data"] = frame["data"] + nasty
    html, page = write(
        title=nasty,
        notes=[nasty],
        plots={nasty: png},
        manifest={nasty: nasty, "commit": nasty, "versions": {nasty: nasty}, "config": nasty},
        controls=CONTROLS | {nasty},
    )
    assert "<script>alert" not in html
    assert len(page.attributes("script")) == 1
    assert page.attributes("img")[0]["alt"] == nasty
    assert any(row and row[0] == nasty + "control" for row in page.rows)


def test_provenance(write, manifest):
    config = load_config_of_a_run()
    html, _ = write(manifest={**manifest, "config": config.model_dump(mode="json")})
    for fact in ("abcdef012345", "numpy 1.26.4", "2025-01-31T12:00:00+00:00", "<dt>training seeds</dt><dd>0</dd>"):
        assert fact in html
    shown = re.search(r"<summary>Config</summary>\s*<pre[^>]*>(.*?)</pre>", html, re.DOTALL)
    assert shown is not None
    assert shown.group(1).startswith("name: demo\nseed: 0\n")


def test_the_manifest_is_shown_without_what_stands_elsewhere(write, manifest):
    lists = {"files": {"core": {"a": "file-of-a.json"}}, "examples": {"a": "examples-of-a.json"}}
    config = load_config_of_a_run().model_dump(mode="json")
    html, _ = write(manifest={**manifest, **lists, "config": config})
    shown = re.search(r"<summary>Manifest[^<]*</summary>\s*<pre[^>]*>(.*?)</pre>", html, re.DOTALL)
    assert shown is not None
    assert set(json.loads(unescape(shown.group(1)))) == set(manifest)
    assert "of-a.json" not in html


def load_config_of_a_run() -> RunConfig:
    return parse_config(
        {
            "name": "demo",
            "model": {"name": "gemma", "hook": "blocks.8.hook_resid_post"},
            "text": {"source": "bbc-news"},
            "harvest": {"train_tokens": 65_536, "heldout_tokens": 8192},
            "dictionaries": {"db-ksvd": {"kind": "db_ksvd", "n_atoms": 512, "k": 20}},
        }
    )


def test_config_in_the_page_is_one_that_loads(write, manifest, tmp_path):
    config = load_config_of_a_run()
    html, _ = write(manifest={"key": {"config": config.model_dump(mode="json")}})
    shown = re.search(r"<summary>Config</summary>\s*<pre[^>]*>(.*?)</pre>", html, re.DOTALL)
    assert shown is not None
    (tmp_path / "demo.yaml").write_text(shown.group(1))
    assert load_config(tmp_path / "demo.yaml") == config


def test_old_config_and_none(write, manifest):
    html, _ = write()  # its config lacks most keys: shown as it is
    assert "&#34;hook&#34;: &#34;blocks.8.hook_resid_post&#34;" in html
    html, _ = write(manifest={})
    assert "<summary>Config</summary>" not in html


def test_refuses_what_is_no_png(write, tmp_path):
    (tmp_path / "fake.png").write_text("not an image")
    with pytest.raises(EvaluationError, match="is no PNG"):
        write(plots={"A": tmp_path / "fake.png"})
    with pytest.raises(EvaluationError, match="No such file"):
        write(plots={"A": tmp_path / "absent.png"})
    assert not (tmp_path / "report.html").exists()


def test_no_plots_and_no_notes(write):
    html, _ = write(plots={}, notes=[])
    assert 'id="plots"' not in html
    assert 'id="notes"' not in html


def test_guide_names_the_leaders(frame):
    table = tables.summary(frame)
    guide = reading_guide(table, CONTROLS)
    assert "Here db-ksvd-refit has the lowest error, and topk-sae recovers the most loss." in guide
    assert "Controls" in guide
    two = tables.summary(frame[frame["dictionary"].isin({"db-ksvd", "db-ksvd-refit"})])
    guide = reading_guide(two, CONTROLS)
    assert "Here db-ksvd-refit has both the lowest error and the most loss recovered." in guide
    assert "Controls" not in guide
    assert "Here" not in reading_guide(two.head(1), CONTROLS)


def test_two_views_of_one_reconstruction_do_not_compete(frame):
    """Rounding makes one of them better by nothing."""
    mine = frame[frame["dictionary"] == "db-ksvd-refit"]
    split = mine.assign(view="split")
    split.loc[split["metric"] == "fvu", "value"] -= 1e-9
    split.loc[split["metric"] == "ce_loss_score", "value"] = 0.95
    both = pd.concat([frame, split], ignore_index=True)
    guide = reading_guide(tables.summary(both), CONTROLS)
    assert "Here db-ksvd-refit has the lowest error, and topk-sae recovers the most loss." in guide
    alone = pd.concat([frame[frame["dictionary"] != "db-ksvd-refit"], split], ignore_index=True)
    guide = reading_guide(tables.summary(alone), CONTROLS)
    assert "Here db-ksvd-refit has both" in guide
