"""The headline columns: where each comes from, which direction is better, and how its numbers read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MISSING = "n/a"
# How much a published SAE was trained is not always told: that is not 0, nor a missing score.
UNKNOWN = "unknown"
ARROWS = {"lower": "↓", "higher": "↑"}

# The evals in the order in which tables list them: from the cheapest to know to the dearest.
EVALS = (
    "training",
    "heldout",
    "core",
    "sparse_probing",
    "sparse_probing_sae_probes",
    "scr",
    "absorption",
    "ravel",
    "autointerp",
)


@dataclass(frozen=True)
class Headline:
    """One column of the headline table.

    Args:
        label: the column's name.
        eval: the eval that scores it.
        metric: the metric's name in that eval.
        minus: a metric of the same eval to subtract, for differences.
        better: the better direction; None for what is no contest (a budget, an amount).
        style: how its numbers are written.
        meaning: what it is, with its unit, as a phrase.
        reference: a metric of the same eval to name beside it: what no dictionary reaches by itself.
        reference_is: what gives that, as a phrase.
        optional: no column where nothing was scored; for evals that run only where a config asks for them.
    """

    label: str
    eval: str
    metric: str
    style: Literal["count", "score", "percent"]
    meaning: str
    better: Literal["lower", "higher"] | None = None
    minus: str | None = None
    reference: str | None = None
    reference_is: str = "the same probe on the raw activations"
    optional: bool = False

    @property
    def arrow(self) -> str:
        return ARROWS.get(self.better or "", "")

    @property
    def heading(self) -> str:
        return f"{self.label} {self.arrow}".strip()


HEADLINES = (
    Headline("samples seen", "training", "samples_seen", "count", "activations used in training, repeats counted"),
    Headline(
        "FVU",
        "heldout",
        "fvu",
        "score",
        "fraction of variance unexplained: squared error over the variance of the activations "
        "(no unit; 0 is perfect, 1 is no better than the mean)",
        "lower",
    ),
    Headline(
        "loss recovered",
        "core",
        "ce_loss_score",
        "score",
        "how much of the cross-entropy between the model with its activations zeroed and the untouched model "
        "the reconstruction wins back (no unit; 1 is the untouched model, 0 is no better than zeros)",
        "higher",
    ),
    Headline(
        "KL",
        "core",
        "kl_div_with_sae",
        "score",
        "KL divergence between the model's next-token distributions with and without the reconstruction (nats a token)",
        "lower",
    ),
    Headline(
        "nats lost",
        "core",
        "ce_loss_with_sae",
        "score",
        "cross-entropy with the reconstruction minus that of the untouched model (nats a token)",
        "lower",
        minus="ce_loss_without_sae",
    ),
    Headline(
        "probing top-1",
        "sparse_probing",
        "sae_top_1_test_accuracy",
        "score",
        "test accuracy of a linear probe on the single best latent (fraction of texts)",
        "higher",
        reference="llm_top_1_test_accuracy",
    ),
    Headline(
        "probing top-5",
        "sparse_probing",
        "sae_top_5_test_accuracy",
        "score",
        "test accuracy of a linear probe on the five best latents (fraction of texts)",
        "higher",
        reference="llm_top_5_test_accuracy",
    ),
    *(
        Headline(
            f"sae-probes top-{k}",
            "sparse_probing_sae_probes",
            f"sae_top_{k}_test_accuracy",
            "score",
            f"test accuracy of a linear probe on the {latents} at a text's last token "
            "(fraction of texts, mean over data sets)",
            "higher",
            reference="llm_test_accuracy",
            reference_is="a probe on the whole activation",
            optional=True,
        )
        for k, latents in ((1, "single best latent"), (5, "five best latents"))
    ),
    Headline(
        "SCR top-20",
        "scr",
        "scr_metric_threshold_20",
        "score",
        "how much of a classifier's spurious gender bias goes when the 20 latents that carry it are zeroed "
        "(fraction; below 0: bias was added)",
        "higher",
        optional=True,
    ),
    Headline(
        "absorption",
        "absorption",
        "mean_absorption_fraction_score",
        "score",
        "how much of a word's first letter other latents carry where the letter's own do not "
        "(fraction, mean over words, then letters)",
        "lower",
        optional=True,
    ),
    Headline(
        "full absorption",
        "absorption",
        "mean_full_absorption_score",
        "score",
        "words on which the letter's own latents are silent and another latent stands in for them "
        "(fraction of words, mean over letters)",
        "lower",
        optional=True,
    ),
    Headline(
        "RAVEL",
        "ravel",
        "disentanglement_score",
        "score",
        "mean of cause and isolation: an attribute of an entity changed, its others kept (fraction of pairs)",
        "higher",
        optional=True,
    ),
    Headline(
        "RAVEL cause",
        "ravel",
        "cause_score",
        "score",
        "how often swapping an attribute's latents brings the other entity's answer (fraction of pairs)",
        "higher",
        optional=True,
    ),
    Headline(
        "RAVEL isolation",
        "ravel",
        "isolation_score",
        "score",
        "how often the answers to other attributes stay as they were (fraction of pairs)",
        "higher",
        optional=True,
    ),
    Headline(
        "autointerp",
        "autointerp",
        "autointerp_score",
        "score",
        "how often a judge that explained a latent in words predicts from them whether it fires in a text "
        "(fraction of texts, mean over latents)",
        "higher",
        optional=True,
    ),
    Headline(
        "dead",
        "heldout",
        "dead_fraction",
        "percent",
        "latents that no token uses (% of d_sae; in the split view each sign of an atom counts by itself)",
        "lower",
    ),
)

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
    # Unequal scores that read the same get the fourth digit.
    if len({*texts} - {MISSING}) < len({value for value in values if math.isfinite(value)}):
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
    style = {headline.label: headline.style for headline in HEADLINES}.get(label, "count")
    if label == "L0":
        return [mean_count_text(value) for value in values]
    if label == "samples seen":
        return [count_text(value) if math.isfinite(value) else UNKNOWN for value in values]
    if style == "percent":
        return [percent_text(value) for value in values]
    return score_texts(values) if style == "score" else [count_text(value) for value in values]


def with_intervals(label: str, texts: Sequence[str], half_widths: Sequence[float]) -> list[str]:
    """A column's texts with ± half-widths to the decimals of their means; as they are where it is none or 0."""
    percent = {headline.label: headline.style for headline in HEADLINES}.get(label) == "percent"
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
