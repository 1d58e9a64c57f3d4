"""Atoms as the page shows them: in context, texts in pieces, each with a strength; or on images, as pictures.

Blanks that would not be seen get a sign, and so does what would change how the text around it is drawn.
"""

import json
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ksvd_sae.errors import EvaluationError
from ksvd_sae.store import content_hash

# Shown at once; the others of an atom and sign are behind a click.
SHOWN_AT_ONCE = 3
LEVELS = 9
STRATA = {
    "strongest": "the largest share of the reconstructions (Σ z²)",
    "frequent": "drawn from the third of the other live atoms that fires most",
    "middle": "drawn from the middle third",
    "rare": "drawn from the third that fires least",
}
_SIGNS = {"\n": "↵", "\r": "␍", "\t": "⇥"}
# Joiners shape the letters beside them.
_KEPT = "\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"


@dataclass(frozen=True)
class Piece:
    """Text of one strength: a token that the atom codes, or the tokens between two of those.

    level: 1 to LEVELS with the activation's sign; 0: no activation, or hardly any. note: the activation.
    """

    text: str
    level: int
    note: str
    peak: bool

    @property
    def look(self) -> str:
        """Class in the page: p for positive or n for negative, and the level."""
        return f"{'p' if self.level > 0 else 'n'}{abs(self.level)}"


@dataclass(frozen=True)
class Example:
    """A token and what stands around it."""

    value: str
    pieces: list[Piece]


@dataclass(frozen=True)
class Side:
    """The strongest tokens of one sign."""

    heading: str
    examples: list[Example]

    @property
    def first(self) -> list[Example]:
        return self.examples[:SHOWN_AT_ONCE]

    @property
    def more(self) -> list[Example]:
        return self.examples[SHOWN_AT_ONCE:]


@dataclass(frozen=True)
class PicturedSide:
    """The images with the strongest codes of one sign: of each the picture, its value and its name."""

    heading: str
    pictures: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Atom:
    """One atom: its index, what is known of it, the logit lens' tokens, and its sides."""

    index: int
    facts: list[tuple[str, str]]
    lens: list[tuple[str, list[str]]]
    sides: list[Side] | list[PicturedSide]


@dataclass(frozen=True)
class DictionaryAtoms:
    """The sample of one dictionary's atoms by stratum: (stratum, what it is, atoms)."""

    name: str
    anchor: str
    summary: str
    strata: list[tuple[str, str, list[Atom]]]
    on_images: bool = False


def read_examples(files: Mapping[str, Path]) -> list[DictionaryAtoms]:
    """The sampled atoms of dictionaries from their result files.

    Args: files: dictionary -> file.
    Raises: EvaluationError if a file is missing or is none of atoms in context.
    """
    dictionaries = []
    for name, path in files.items():
        try:
            dictionaries.append(dictionary_atoms(name, json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"putting atoms of {name!r} into the report: {type(error).__name__}: {error}",
                cause=f"{path.name} is missing, or was altered",
                cure=f"delete it from {path.parent} and run `ksvd-sae evaluate` again",
            ) from error
    return dictionaries


def dictionary_atoms(name: str, result: Mapping[str, Any]) -> DictionaryAtoms:
    """What the page shows of one dictionary's file."""
    n_dead, shown, on_images = result["n_dead"], result["atoms"], "n_images" in result
    token, whole = ("patches", "images") if on_images else ("tokens", "documents")
    summary = (
        f"{len(shown):,} of {result['n_atoms']:,} atoms · {f'{n_dead:,}' if n_dead else 'none'} unused on "
        f"{result['n_tokens']:,} {token} of {result[f'n_{whole}']:,} {whole}"
    )
    strata = [
        (stratum, STRATA[stratum], [(_atom_on_images if on_images else _atom)(entry) for entry in entries])
        for stratum, entries in groupby(shown, key=lambda entry: str(entry["stratum"]))
    ]
    # Names may hold what an address cannot; two names never share a hash.
    return DictionaryAtoms(name, f"atoms-{content_hash(name)}", summary, strata, on_images)


def _facts(entry: Mapping[str, Any], what: str) -> list[tuple[str, str]]:
    """Args: what: an atom fires on."""
    nearest = entry["nearest"]
    facts = [("fires on", _percent(entry["density"], what)), ("up to", number(entry["strongest"]))]
    if nearest is not None:
        # + 0.0: no -0.00.
        cosine = f"{round(nearest['cosine'], 2) + 0.0:.2f}".replace("-", "−")
        facts.append(("nearest", f"atom {nearest['atom']}, cosine {cosine}"))
    return facts


def _headings(entry: Mapping[str, Any]) -> dict[str, str]:
    positive = "Strongest positive" if "negative" in entry else "Strongest"
    return {"positive": positive, "negative": "Strongest negative"}


def _atom_on_images(entry: Mapping[str, Any]) -> Atom:
    sides, signed = list[PicturedSide](), "negative" in entry
    for name, heading in _headings(entry).items():
        if (side := entry.get(name)) is not None:
            shown = zip(side["pictures"], side["values"], side["images"], strict=True)
            pictures = [(f"data:image/jpeg;base64,{p}", number(value, sign=signed), name) for p, value, name in shown]
            sides.append(PicturedSide(heading, pictures))
    return Atom(entry["atom"], _facts(entry, "patches"), [], sides)


def _atom(entry: Mapping[str, Any]) -> Atom:
    lens, facts = entry["logit_lens"], _facts(entry, "tokens")
    signed, headings = "negative" in entry, _headings(entry)
    scales = {
        name: max((abs(e["activations"][e["peak"]]) for e in entry.get(name, [])), default=0.0) for name in headings
    }
    sides = [
        Side(heading, [_example(example, scales, signed) for example in entry[name]])
        for name, heading in headings.items()
        if entry.get(name)
    ]
    tokens = [] if lens is None else [(end, [visible(text) for text in lens[end]]) for end in ("raised", "lowered")]
    return Atom(entry["atom"], facts, tokens, sides)


def _example(example: Mapping[str, Any], scales: Mapping[str, float], signed: bool) -> Example:
    peak = example["peak"]
    tokens = zip(example["tokens"], example["activations"], strict=True)
    pieces = [piece for i, (text, value) in enumerate(tokens) for piece in _pieces(text, value, scales, i == peak)]
    if pieces[0].text == " ":
        del pieces[0]
    value = example["activations"][peak]
    return Example(number(value, sign=signed), list(_joined(pieces)))


def _pieces(text: str, value: float, scales: Mapping[str, float], peak: bool) -> Iterator[Piece]:
    """A token as a piece; the blank before a word is one by itself: lines break there, and no colour begins there."""
    scale = scales["positive" if value > 0 else "negative"]
    # Examples are the strongest of their document only: elsewhere in it a token of the other sign may be stronger.
    share = min(1.0, abs(value) / scale) if scale else 0.0
    level = round(LEVELS * share) * (1 if value > 0 else -1)
    if text.startswith(" ") and text.strip(" "):
        yield Piece(" ", 0, "", False)
        text = text[1:]
    yield Piece(visible(text), level or int(peak), number(value, sign=True) if level or peak else "", peak)


def _joined(pieces: list[Piece]) -> Iterator[Piece]:
    """Neighbours without activation as one piece."""
    for quiet, run in groupby(pieces, key=lambda piece: not piece.level):
        if quiet:
            yield Piece("".join(piece.text for piece in run), 0, "", False)
        else:
            yield from run


def visible(text: str) -> str:
    """A token's text with a sign for each blank that would not be seen, and no control characters."""
    if not text:
        return "∅"
    if not text.strip(" "):
        return "␣" * len(text)
    return "".join(_SIGNS.get(letter) or (letter if _is_plain(letter) else f"⟨U+{ord(letter):04X}⟩") for letter in text)


def _is_plain(letter: str) -> bool:
    if letter == " " or letter in _KEPT:
        return True
    return unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp")


def number(value: float, sign: bool = False) -> str:
    """An activation with three digits at least, and a true minus."""
    text = f"{abs(value):,.0f}" if abs(value) >= 100 else f"{abs(value):.3g}"
    return ("−" if value < 0 else "+" if sign else "") + text


def _percent(share: float, what: str) -> str:
    percent = 100 * share
    return f"{percent:.3g}% of {what}" if percent < 99.95 else f"all {what}"
