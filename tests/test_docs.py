"""README.md and docs/ say what is there: links, commands and the example; the site builds without a warning."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.main import get_command

import ksvd_sae
from ksvd_sae.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs` builds it: mkdocs.yml makes every warning an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_built(site: Path) -> None:
    pages = [page.relative_to(ROOT / "docs").with_suffix(".html") for page in PAGES if page != README]
    assert [str(page) for page in pages if not (site / page).is_file()] == []


def test_the_python_page_has_every_public_name(site: Path) -> None:
    page = (site / "reference" / "python.html").read_text() + (site / "reference" / "config.html").read_text()
    assert [name for name in ksvd_sae._PUBLIC if f'id="ksvd_sae.{name}"' not in page] == []


def test_docstrings_read_as_sections(site: Path) -> None:
    page = (site / "reference" / "python.html").read_text()
    assert "<p><strong>Raises:</strong> ShapeError" in page
    assert "<p><strong>Returns:</strong> Code" in page
    # "rtol, max_steps: see ..." is a row for each; doctests are code.
    assert page.count("<code>max_steps</code>") >= 2
    assert "&gt;&gt;&gt;" not in page


def test_the_config_page_has_every_key_of_our_configs(site: Path) -> None:
    page = (site / "reference" / "config.html").read_text()
    runs = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "eval_configs").glob("*.yaml"))]
    runs = [run for run in runs if "dictionaries" in run]
    assert len(runs) > 5
    kinds = {dictionary["kind"] for run in runs for dictionary in run["dictionaries"].values()}
    keys = {key for run in runs for key in _keys(run) if key not in {"kind", *_names(run)}}
    assert [kind for kind in sorted(kinds) if f"kind: {kind}<" not in page] == []
    assert [key for key in sorted(keys) if f"<code>{key}</code>" not in page] == []


def test_the_command_page_has_every_command(site: Path) -> None:
    page = (site / "reference" / "cli.html").read_text()
    assert [name for name in _commands() if f"<code>ksvd-sae {name}</code>" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    inside = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    assert [link for link in inside if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page: Path) -> None:
    named = re.findall(r"(?<![/\w])ksvd-sae ([a-z]+)", page.read_text())
    assert set(named) <= set(_commands())


def test_readme_is_short() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 120


def test_the_example_of_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert example is not None
    names: dict[str, Any] = {}
    exec(compile(example[1], str(README), "exec"), names)
    from sae_lens import SAE

    loaded = SAE.load_from_disk("my-dictionary")
    assert names["latents"].shape == (100, 1024)
    assert int((names["latents"] != 0).sum(dim=1).max()) <= 16
    assert torch.equal(loaded.encode(names["x"][:100]), names["latents"])
    assert torch.equal(loaded.decode(names["latents"]), names["x_hat"])


REPRODUCTIONS = re.findall(
    r"^## (.*?)$.*?```python\n(.*?)```\n\n```text\n(.*?)```",
    (ROOT / "docs" / "upstream.md").read_text(),
    re.DOTALL | re.MULTILINE,
)


@pytest.mark.parametrize(("title", "code", "output"), REPRODUCTIONS, ids=[title for title, _, _ in REPRODUCTIONS])
def test_what_is_to_be_filed_upstream_still_holds(
    title: str, code: str, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this fails, upstream has mended it: take it off the page, and see what can go here."""
    try:
        exec(compile(code, title, "exec"), {})
    except KeyError as error:
        print(f"KeyError: {error}")
    assert capsys.readouterr().out == output


def _commands() -> list[str]:
    return list(get_command(app).commands)  # type: ignore[attr-defined]


def _keys(value: Any) -> Iterator[str]:
    """Keys of a mapping and of those inside it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _keys(inner)


def _names(run: dict[str, Any]) -> Iterator[str]:
    """Keys that a config's author chooses: names of dictionaries, data sets and entities."""
    yield from run["dictionaries"]
    evaluation = run.get("evaluation") or {}
    yield from (evaluation.get("scr") or {}).get("pairs", {})
    yield from (evaluation.get("ravel") or {}).get("attributes", {})


def test_what_was_survived_is_what_was_counted() -> None:
    counted = json.loads((ROOT / "results" / "reliability.json").read_text())
    page = (ROOT / "docs" / "survival.md").read_text()
    rows = "".join(f"| {row['test']} | {row['tried']:,} | {row['survived']:,} | {row['lost']:,} |\n" for row in counted)
    assert counted
    assert page.endswith("|---|---:|---:|---:|\n" + rows)
