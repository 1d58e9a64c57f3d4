"""The headline columns, gathered from the evals, and how their numbers read."""

import math
from collections.abc import Sequence

from ksvd_sae.evals import EVALS as KINDS
from ksvd_sae.evals.base import Column

MISSING = "n/a"
# How much a published SAE was trained is not always told: that is not 0, nor a missing score.
UNKNOWN = "unknown"

TRAINING = Column("samples seen", "training", "samples_seen", "count", "activations used in training, repeats counted")
_OF_EVALS = [column for kind in KINDS for column in kind.columns]
HEADLINES: tuple[Column, ...] = (
    TRAINING,
    *(column for column in _OF_EVALS if not column.last),
    *(column for column in _OF_EVALS if column.last),
)
# The evals in the order in which tables list them.
EVALS = (TRAINING.eval, *(kind.name for kind in KINDS))
ON_TEXT, ON_IMAGES = (frozenset(kind.name for kind in KINDS if kind.reads == data) for data in ("text", "images"))

# Columns that describe a dictionary rather than score it: (name, what it is).
DESCRIPTIONS = {
    "dictionary": "the method, under its name in the config",
    "view": "the codes as scored: signed as they come; split, the same codes with the positive and the negative part "
    "of an atom as two latents; or non-negative as they come",
    "d_sae": "number of latents: an atom each, in the split view two an atom",
    "k": "the budget: most atoms a token may use",
    "L0": "atoms a token really uses, on average",
}


def score_texts(values: Sequence[float]) -> list[str]:
    """A column of scores with three or four significant digits, and as far as that allows equal decimals."""
    finite = [abs(value) for value in values if math.isfinite(value) and value != 0]
    decimals = max((2 - math.floor(math.log10(value)) for value in finite), default=3)
    texts = [_score_text(value, decimals) for value in values]
    # Unequal scores that read the same get the fourth digit; what differs by rounding alone is equal.
    if len({*texts} - {MISSING}) < len({f"{value:.6g}" for value in values if math.isfinite(value)}):
        texts = [_score_text(value, decimals + 1) for value in values]
    return texts


def _score_text(value: float, decimals: int) -> str:
    if not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -4 or exponent > 5:
        return f"{value:.2e}"
    return f"{value:.{max(0, min(decimals, 3 - exponent))}f}"


def count_text(value: float) -> str:
    """An amount with thousands separators."""
    return f"{value:,.0f}" if math.isfinite(value) else MISSING


def mean_count_text(value: float) -> str:
    """A mean of amounts, such as L0: one decimal."""
    return f"{value:,.1f}" if math.isfinite(value) else MISSING


def percent_text(value: float) -> str:
    """A fraction as a percentage; a small one is not rounded to nothing."""
    if not math.isfinite(value):
        return MISSING
    percent = 100 * value
    if percent == 0:
        return "0%"
    return f"{percent:.1f}%" if abs(percent) >= 0.1 else f"{percent:.2g}%"


def column_texts(label: str, values: Sequence[float]) -> list[str]:
    """The numbers of the headline table's column ``label`` as text."""
    style = {column.label: column.style for column in HEADLINES}.get(label, "count")
    if label == "L0":
        return [mean_count_text(value) for value in values]
    if label == "samples seen":
        return [count_text(value) if math.isfinite(value) else UNKNOWN for value in values]
    if style == "percent":
        return [percent_text(value) for value in values]
    return score_texts(values) if style == "score" else [count_text(value) for value in values]


def with_intervals(label: str, texts: Sequence[str], half_widths: Sequence[float]) -> list[str]:
    """A column's texts with ± half-widths to the decimals of their means; as they are where it is none or 0."""
    percent = {column.label: column.style for column in HEADLINES}.get(label) == "percent"
    return [
        f"{text} ± {_spread_text(text, 100 * width if percent else width)}"
        if math.isfinite(width) and width > 0
        else text
        for text, width in zip(texts, half_widths, strict=True)
    ]


def _spread_text(text: str, width: float) -> str:
    number = text.rstrip("%")
    if "e" in number:
        return f"{width:.1e}"
    decimals = len(number.split(".")[1]) if "." in number else 0
    # An interval that rounds to nothing is not nothing.
    return f"{width:,.{decimals}f}" if width >= 0.5 * 10**-decimals else f"{width:.1g}"
