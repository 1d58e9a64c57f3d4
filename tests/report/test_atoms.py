"""Atoms on the page: every token is text, what is not seen is made visible, and the page stays small."""

import json
import re

import pytest

from ksvd_sae.errors import EvaluationError
from ksvd_sae.report import atoms
from ksvd_sae.report.atoms import LEVELS, dictionary_atoms, number, read_examples, visible
from ksvd_sae.report.report import write_report
from tests.report.test_report import Page


@pytest.fixture
def write(frame, manifest, tmp_path):
    """Write a report on these atoms and parse it."""

    def write(*sections):
        path = write_report(tmp_path / "report.html", "Demo", frame, {}, [], manifest, atoms=sections)
        html = path.read_text(encoding="utf-8")
        page = Page(html)
        assert page.open == []
        return html, page

    return write


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", " the"),
        (" ", "␣"),
        ("   ", "␣␣␣"),
        ("\n\n", "↵↵"),
        ("\r\n\t", "␍↵⇥"),
        ("", "∅"),
        ("a\u202eb", "a⟨U+202E⟩b"),
        ("\u200b\u00a0\u0000", "⟨U+200B⟩⟨U+00A0⟩⟨U+0000⟩"),
        ("नमस्ते\u200d", "नमस्ते\u200d"),
        ("<script>&\"'", "<script>&\"'"),
        ("سلام", "سلام"),
        ("\ud800", "⟨U+D800⟩"),
    ],
)
def test_blanks_and_controls_are_visible(text, shown):
    assert visible(text) == shown


def test_numbers():
    assert [number(v) for v in (0.012345, 1.5, 99.96, 3673.4, -17860.0)] == ["0.0123", "1.5", "100", "3,673", "−17,860"]
    assert [number(v, sign=True) for v in (2.0, -2.0)] == ["+2", "−2"]


def example(tokens, activations, peak):
    return {"document": 0, "peak": peak, "tokens": tokens, "activations": activations}


def atom(**changes):
    entry = {"atom": 5, "stratum": "rare", "density": 0.5, "strongest": 8.0, "nearest": None, "logit_lens": None}
    return {**entry, "positive": [], **changes}


def only_atom(entry):
    found = {"n_tokens": 10, "n_documents": 2, "n_atoms": 9, "n_dead": 1, "signed": True, "atoms": [entry]}
    ((_, _, (one,)),) = dictionary_atoms("name", found).strata
    return one


def test_pieces():
    """Each sign has its own scale; the blank before a word stands by itself; quiet neighbours are one piece."""
    sides = only_atom(
        atom(
            positive=[example([" a", " b", "\n", " c", " d"], [0.0, 0.1, 4.0, 8.0, -1.0], 3)],
            negative=[example(["e"], [-2.0], 0)],
        )
    ).sides
    assert [side.heading for side in sides] == ["Strongest positive", "Strongest negative"]
    assert sides[0].examples[0].value == "+8"
    pieces = [(piece.text, piece.level, piece.note, piece.peak) for piece in sides[0].examples[0].pieces]
    level = {0.5: round(LEVELS * 0.5), 1: LEVELS}
    # 0.1 of 8 is less than half of a level.
    assert pieces == [
        ("a b", 0, "", False),
        ("↵", level[0.5], "+4", False),
        (" ", 0, "", False),
        ("c", LEVELS, "+8", True),
        (" ", 0, "", False),
        ("d", -level[0.5], "−1", False),
    ]
    assert [piece.look for piece in sides[0].examples[0].pieces if piece.level] == ["p4", "p9", "n4"]


def test_a_side_without_examples_is_left_out():
    assert [s.heading for s in only_atom(atom(negative=[example(["e"], [-2.0], 0)])).sides] == ["Strongest negative"]
    assert [s.heading for s in only_atom(atom(positive=[example(["e"], [2.0], 0)])).sides] == ["Strongest"]
    assert only_atom(atom()).sides == []


def test_few_at_once_and_the_others_behind_a_click():
    (side,) = only_atom(atom(positive=[example([str(i)], [9.0 - i], 0) for i in range(5)])).sides
    assert [e.pieces[0].text for e in side.first] == ["0", "1", "2"]
    assert [e.pieces[0].text for e in side.more] == ["3", "4"]


def test_facts():
    found = only_atom(atom(density=0.00955, nearest={"atom": 3, "cosine": -0.001}))
    assert found.facts == [("fires on", "0.955% of tokens"), ("up to", "8"), ("nearest", "atom 3, cosine 0.00")]
    assert only_atom(atom(density=1.0)).facts[0] == ("fires on", "all tokens")
    assert only_atom(atom(nearest={"atom": 3, "cosine": -0.5})).facts[2] == ("nearest", "atom 3, cosine −0.50")


def test_page_shows_every_atom(write, examples_of):
    signed, plain = dictionary_atoms("one", examples_of()), dictionary_atoms("two", examples_of(signed=False))
    html, page = write(signed, plain)
    assert html.count('<article class="atom">') == 48
    assert (html.count("Strongest positive"), html.count("Strongest negative")) == (24, 24)
    assert html.count("<h5>Strongest</h5>") == 24
    assert len(page.attributes("li")) >= 24 * 8 * 3
    anchors = [attrs["href"] for attrs in page.attributes("a")]
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {f"#{signed.anchor}", f"#{plain.anchor}", "#headline", "#atoms", "#seeds", "#provenance"} <= set(anchors)
    assert {anchor.removeprefix("#") for anchor in anchors} <= ids
    assert len([attrs for _, attrs in page.tags if "id" in attrs]) == len(ids), "ids are unique"
    # The examples' text, in the direction of its own letters.
    assert html.count('dir="auto"') == 24 * 8 * 3


def test_tokens_and_names_are_text(write, examples_of):
    nasty = "<script>alert(1)</script>\"'&{{ 7 * 6 }}"
    found = examples_of(n_atoms=4)
    for entry in found["atoms"]:
        entry["logit_lens"] = {"raised": [nasty], "lowered": [f" {nasty}"]}
        for shown in entry["positive"]:
            shown["tokens"] = [nasty] * 25
    html, page = write(dictionary_atoms(nasty, found))
    assert "<script>alert" not in html
    assert "42" not in re.findall(r"<mark[^>]*>(.*?)</mark>", html)
    assert len(page.attributes("script")) == 1
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 4 * 8 * 25


def test_ten_dictionaries_stay_below_three_megabytes(write, examples_of):
    html, _ = write(*(dictionary_atoms(f"dictionary-{i}", examples_of(seed=i)) for i in range(10)))
    # Half of it is left for the plots.
    assert len(html.encode()) < 1.5e6


def test_files_are_read(tmp_path, examples_of):
    (tmp_path / "a-0.json").write_text(json.dumps(examples_of(n_atoms=4)))
    (found,) = read_examples({"a": tmp_path / "a-0.json"})
    assert found == dictionary_atoms("a", examples_of(n_atoms=4))
    assert [stratum for stratum, _, _ in found.strata] == list(atoms.STRATA)
    assert found.summary == "4 of 4,096 atoms · none unused on 16,331 tokens of 36 documents"


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"atoms": [{}], "n_dead": 0}'])
def test_a_file_that_is_none(tmp_path, content):
    if content is not None:
        (tmp_path / "a-0.json").write_text(content)
    with pytest.raises(EvaluationError, match=r"(?s)atoms of 'a'.*ksvd-sae evaluate"):
        read_examples({"a": tmp_path / "a-0.json"})
