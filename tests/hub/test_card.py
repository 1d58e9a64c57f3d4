"""The model card: a header that the Hub reads, tables that are tables, numbers that are the run's."""

import re
from copy import deepcopy
from html import unescape
from pathlib import Path

import markdown
import pytest
import yaml
from huggingface_hub import ModelCard

from ksvd_sae.hub.card import model_card
from ksvd_sae.hub.source import Source
from ksvd_sae.report.tables import cells, headings, intervals, summary
from tests.hub.conftest import CONFIG, HOOK, REPO, Published


@pytest.fixture(scope="module")
def card(published: Published) -> ModelCard:
    return ModelCard.load(published.folder / "README.md")


def tables(card: ModelCard) -> list[list[list[str]]]:
    """Every table as a browser would show it: rows of texts."""
    page = markdown.markdown(card.text, extensions=["tables", "fenced_code"])
    found = []
    for table in re.findall(r"<table>.*?</table>", page, re.DOTALL):
        rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
        texts = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
        found.append([[unescape(re.sub(r"<[^>]+>", "", text)) for text in row] for row in texts])
    return found


def test_header(card: ModelCard) -> None:
    assert card.data.to_dict() == {
        "library_name": "saelens",
        "base_model": "some/model",
        "datasets": ["owner/some-texts"],
        "license": "mit",
        "tags": ["sparse-autoencoder", "dictionary-learning", "k-svd", "interpretability", "saelens"],
    }


def test_what_nobody_named_is_not_in_the_header(published: Published) -> None:
    header = ModelCard(model_card(published.source, REPO, None)).data.to_dict()
    assert "license" not in header


def test_weights_of_somebody(published: Published) -> None:
    """A fine-tune has the architecture's name; whose weights it has is said, and the Hub is told where they are."""
    entry = deepcopy(published.source.entries[0])
    for weights, base in (
        ({"name": "me/fine-tune", "revision": "0" * 40, "content": "abc"}, "me/fine-tune"),
        ({"name": "my-folder", "content": "abc"}, "some/model"),
    ):
        entry.sae.cfg.metadata.model_weights = weights
        card = ModelCard(model_card(Source([entry]), REPO, None))
        assert card.data.base_model == base
        assert f"weights of its own: {weights['name']}" in card.text


def test_every_dictionary_is_listed(card: ModelCard, published: Published) -> None:
    listed = {row[0]: row[1:] for row in tables(card)[0][1:]}
    own = [entry.sae_id for entry in published.source.entries if entry.stock is None]
    assert list(listed) == own
    assert listed[f"{HOOK}/learned/split"] == ["24", "48", "3", "MP", "raw"]
    assert listed[f"{HOOK}/weighted/signed"] == ["24", "24", "3", "MP, refit", "std"]


def test_scores_are_the_runs(card: ModelCard, published: Published) -> None:
    assert published.source.run is not None
    frame = published.source.run.scores
    table = summary(frame)
    expected = cells(table, widths=intervals(frame))
    head, *rows = tables(card)[-1]
    assert head == [
        "score",
        "learned (signed)",
        "learned (split)",
        "one-sign (non-negative)",
        "weighted (signed)",
        "steps (signed)",
    ]
    shown = {row[0]: row[1:] for row in rows}
    fvu = headings(table).index("FVU ↓")
    assert shown["FVU ↓"] == [row[fvu].text for row in expected[:5]]
    assert all(re.fullmatch(r"0\.\d+ ± 0\.\d+", text) for text in shown["FVU ↓"])
    assert "stable ↑" in shown
    assert "n/a" not in shown["samples seen"]
    assert "**FVU ↓**: fraction of variance unexplained" in card.text
    assert "some-texts-heldout, n = 500" in card.text
    assert "Published is the first training of each" in card.text


def test_what_saelens_loads_alone_has_its_own_scores(card: ModelCard) -> None:
    head, *rows = tables(card)[1]
    assert head == ["sae_id", "is", "FVU", "L0"]
    scores = {row[0].removeprefix(f"{HOOK}/"): row[1:] for row in rows}
    assert list(scores) == ["learned/split", "linear/nonnegative", "steps/split", "steps/matching_pursuit"]
    assert scores["linear/nonnegative"][0] == "topk of SAELens"
    assert scores["steps/matching_pursuit"][0] == "matching_pursuit of SAELens"

    fvu = {name: float(row[1]) for name, row in scores.items()}
    assert fvu["linear/nonnegative"] > 1.1 * fvu["learned/split"], "another code"
    assert fvu["steps/matching_pursuit"] == pytest.approx(fvu["steps/split"], rel=1e-3)
    assert "every support was the same" in card.text


def test_how_it_was_made(card: ModelCard, published: Published) -> None:
    assert "2,000 tokens of some-texts, in contexts of 12 tokens that begin with a BOS" in " ".join(card.text.split())
    assert "BOS, EOS, padding" in card.text
    options = re.search(r"Options: `(\{kind: db_ksvd.*?\})`", card.text)
    assert options is not None
    assert yaml.safe_load(options[1]) == {**CONFIG["dictionaries"]["learned"], "seed": 0}
    assert published.source.entries[0].training is not None
    assert f"in {published.source.entries[0].training['seconds']} seconds on cpu, seed 0" in card.text
    assert "SAELens did not train" in card.text


def test_links_lead_to_files(card: ModelCard, published: Published) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", card.text)
    inside = [link for link in links if not link.startswith("https://")]
    assert any(link.endswith("metrics.png") for link in inside)
    assert [link for link in inside if not (Path(published.folder) / link).is_file()] == []
