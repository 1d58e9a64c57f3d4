"""The report in a real browser: it shows what it says, sorts and filters, and asks nobody for anything."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ksvd_sae.report import plots
from ksvd_sae.report.atoms import dictionary_atoms
from ksvd_sae.report.report import write_report
from tests.browser import Browser, chromium

pytestmark = pytest.mark.browser

CONTROLS = frozenset({"pca", "random"})
RIGHT_TO_LEFT = "سلام"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def report(
    frame: pd.DataFrame, manifest: dict[str, Any], examples_of: Callable[..., dict[str, Any]], tmp_path: Path
) -> Path:
    examples = {"db-ksvd": examples_of(), "topk-sae": examples_of(signed=False, seed=1)}
    right_to_left = examples["topk-sae"]["atoms"][0]["positive"][0]
    right_to_left["tokens"] = [f" {RIGHT_TO_LEFT}"] * 25
    return write_report(
        tmp_path / "report.html",
        "Demo",
        frame,
        {"Metrics": plots.metric_bars(frame, tmp_path / "bars.png")},
        ["A note."],
        manifest,
        CONTROLS,
        atoms=[dictionary_atoms(name, found) for name, found in examples.items()],
    )


def column(browser: Browser, table: str, index: int) -> list[str]:
    """The text of a column's cells that are shown, from top to bottom."""
    script = """
        const rows = [...document.querySelector(arguments[0]).tBodies[0].rows].filter((row) => !row.hidden);
        return rows.map((row) => row.cells[arguments[1]].textContent);
    """
    found: list[str] = browser.run(script, table, index)
    return found


def click_head(browser: Browser, table: str, name: str) -> int:
    """Click the header that begins with ``name``; returns its column."""
    heads: list[str] = browser.run(
        "return [...document.querySelector(arguments[0]).tHead.rows[0].cells].map((cell) => cell.textContent.trim())",
        table,
    )
    index = next(i for i, head in enumerate(heads) if head.startswith(name))
    browser.driver.find_elements("css selector", f"{table} thead button")[index].click()
    return index


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_loads_without_complaint_and_fetches_nothing(browser: Browser, report: Path, width: int, dark: bool) -> None:
    browser.complaints(), browser.requests()
    browser.open(report, width, dark=dark)
    browser.run("for (const part of document.querySelectorAll('details')) part.open = true")
    assert browser.complaints() == []
    assert browser.requests() == [report.resolve().as_uri()]
    # Wide tables scroll in their own frame: the page itself is as wide as its window.
    inner, outer = browser.run("const e = document.documentElement; return [e.scrollWidth, e.clientWidth]")
    assert inner == outer
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(21, 24, 28)" if dark else "rgb(255, 255, 255)")
    shown = browser.run("return [...document.images].map((image) => image.complete && image.naturalWidth > 0)")
    assert shown == [True]


def test_complaints_and_requests_are_seen(browser: Browser, tmp_path: Path) -> None:
    """What the test above relies on: a page that does wrong is caught."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; script-src 'unsafe-inline'\">"
        "<img src='https://example.invalid/policy.png'><script>throw new Error('broken')</script>"
    )
    browser.complaints(), browser.requests()
    browser.open(page)
    complaints = "\n".join(browser.complaints())
    assert "broken" in complaints
    assert "Content Security Policy" in complaints
    page.write_text("<img src='https://example.invalid/open.png'>")
    browser.open(page)
    assert "https://example.invalid/open.png" in browser.requests()


def test_headers_sort(browser: Browser, report: Path) -> None:
    browser.open(report)
    given = column(browser, "table.headline", 0)
    fvu = click_head(browser, "table.headline", "FVU")
    values = [float(text) for text in column(browser, "table.headline", fvu)]
    assert values == sorted(values)
    assert column(browser, "table.headline", 0)[0] == "db-ksvd-refit" != given[0]
    click_head(browser, "table.headline", "FVU")
    assert [float(text) for text in column(browser, "table.headline", fvu)] == sorted(values, reverse=True)
    click_head(browser, "table.headline", "FVU")
    assert column(browser, "table.headline", 0) == given
    click_head(browser, "table.headline", "dictionary")
    assert column(browser, "table.headline", 0) == sorted(given)


def test_filter(browser: Browser, report: Path, frame: pd.DataFrame) -> None:
    browser.open(report)
    field = browser.driver.find_element("id", "filter")
    assert not field.is_displayed(), "behind a click"
    browser.run("document.querySelector('#scores').closest('details').open = true")
    assert field.is_displayed()
    names = list(dict.fromkeys(frame["dictionary"]))
    assert column(browser, "#scores", 0) == names
    field.send_keys("KSVD signed")
    assert column(browser, "#scores", 0) == ["db-ksvd", "db-ksvd-refit"]
    assert browser.driver.find_element("id", "shown").text == f"2 of {len(names)}"
    field.clear()
    field.send_keys("no such score")
    assert column(browser, "#scores", 0) == []


def test_atoms_are_shown(browser: Browser, report: Path) -> None:
    browser.open(report)
    parts = browser.driver.find_elements("css selector", "details.dictionary")
    assert [part.find_element("tag name", "summary").text.split()[0] for part in parts] == ["db-ksvd", "topk-sae"]
    atom = parts[0].find_element("css selector", "article.atom")
    assert not atom.is_displayed()
    parts[0].find_element("tag name", "summary").click()
    assert atom.is_displayed()
    for text in ("atom 0", "fires on 2% of tokens", "Strongest positive", "Strongest negative", "+900", "−90"):
        assert text in atom.text
    assert len([line for line in atom.find_elements("tag name", "li") if line.is_displayed()]) == 6
    atom.find_element("css selector", ".sides details summary").click()
    assert len([line for line in atom.find_elements("tag name", "li") if line.is_displayed()]) == 11
    # The stronger, the darker; each sign has its colour; beside it, no colour.
    colours = browser.run(
        """return [...arguments[0].querySelectorAll("mark")]
            .map((mark) => [mark.className, getComputedStyle(mark).backgroundColor]);""",
        atom,
    )
    shades = dict(colours)
    assert shades["p9 peak"] != shades["n9 peak"]
    assert len({shade for look, shade in shades.items() if look.startswith("p")}) == len(
        {look.removesuffix(" peak") for look in shades if look.startswith("p")}
    )


def test_links_lead_to_their_part_and_open_it(browser: Browser, report: Path) -> None:
    browser.open(report)
    browser.driver.find_element("css selector", ".contents li:nth-child(2) a").click()
    part = browser.driver.find_elements("css selector", "details.dictionary")[1]
    assert part.get_attribute("open") is not None
    top = browser.run("return arguments[0].querySelector('h3').getBoundingClientRect().top", part)
    assert 0 <= top < 300
    browser.driver.find_element("css selector", "nav a[href='#provenance']").click()
    top = browser.run("return document.getElementById('provenance').getBoundingClientRect().top")
    bottom = browser.run("return document.querySelector('nav').getBoundingClientRect().bottom")
    assert bottom <= top, "the bar does not cover what its links lead to"


def test_text_runs_in_its_own_direction(browser: Browser, report: Path) -> None:
    browser.open(report)
    script = """
        document.querySelectorAll("details").forEach((part) => { part.open = true; });
        const lines = [...document.querySelectorAll(".text")];
        const line = lines.find((found) => found.textContent.includes(arguments[0]));
        const other = lines.find((found) => !found.textContent.includes(arguments[0]));
        return [line, other].map((found) => getComputedStyle(found).direction);
    """
    assert browser.run(script, RIGHT_TO_LEFT) == ["rtl", "ltr"]


def test_without_javascript(report: Path, tmp_path: Path, frame: pd.DataFrame) -> None:
    """Everything can be read; nothing is offered that does not work."""
    with chromium(tmp_path / "profile", javascript=False) as plain:
        plain.open(report)
        assert all(not button.is_enabled() for button in plain.driver.find_elements("css selector", "button.sort"))
        part = plain.driver.find_element("css selector", "details.dictionary")
        part.find_element("tag name", "summary").click()
        assert part.find_element("css selector", "article.atom").is_displayed()
        plain.driver.find_element("xpath", "//summary[contains(., 'trainings')]").click()
        assert not plain.driver.find_element("id", "filter").is_displayed()
        rows = plain.driver.find_elements("css selector", "#scores tbody tr")
        assert (len(rows), rows[0].is_displayed()) == (frame["dictionary"].nunique(), True)
