"""Scores that others published of SAEBench's SAEs, and whether a run's own scores may stand beside them.

The numbers lie beside this module as CSV; README.md there says where they come from, how they were measured, and how
near they are to what SAEBench itself published.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.resources import files
from io import StringIO
from typing import Any

import pandas as pd

from ksvd_sae.evals.base import Eval

COMPARABLE = "comparable"
REPRODUCED, MEANS = "saebench_reproduced.csv", "saebench_published_means.csv"
SOURCES = {
    REPRODUCED: "one SAE, scored again by github.com/meowmaryexe/SAEBench-Reliability (core within 0.0045 of "
    "SAEBench's own results; means of RAVEL's scores over an architecture within 0.0221)",
    MEANS: "mean over the SAEs of L0 40 to 200, read off SAEBench's published plots (± 0.003)",
}
# SAEBench versions whose definitions were compared.
VERSIONS = ("0.3.2", "0.6.0")
# L0s further apart than this factor are no match.
L0_FACTOR = 1.25


@dataclass(frozen=True)
class PublishedScore:
    """One published number.

    l0: of the SAE; None for a mean. l0_range: of the SAEs that a mean is over; None for one SAE.
    version: of SAEBench. file: the CSV that it stands in, a key of SOURCES.
    """

    eval: str
    metric: str
    model: str
    layer: int
    d_sae: int
    architecture: str
    trainer: int | None
    l0: float | None
    l0_range: tuple[float, float] | None
    value: float
    version: str
    file: str

    @property
    def hook(self) -> str:
        return f"blocks.{self.layer}.hook_resid_post"

    def l0_ratio(self, l0: float) -> float:
        """How far an L0 is from this one's, as a factor of 1 or more; within a mean's range it is 1."""
        if self.l0_range is not None:
            low, high = self.l0_range
            return max(1.0, low / l0, l0 / high) if l0 > 0 else math.inf
        if not self.l0 or not l0 > 0:
            return math.inf
        return max(l0 / self.l0, self.l0 / l0)


@dataclass(frozen=True)
class OwnScore:
    """One score of a run: of a dictionary in one view."""

    dictionary: str
    view: str
    d_sae: int
    l0: float
    eval: str
    metric: str
    value: float


@dataclass(frozen=True)
class RunProtocol:
    """How a run scored.

    evals: by name, those that ran. version: of SAEBench; None if not known. prepend_bos: whether its contexts begin
    with a BOS, as those of published SAEs do.
    """

    model: str
    hook: str
    evals: Mapping[str, Eval]
    version: str | None
    prepend_bos: bool = True


@dataclass(frozen=True)
class Match:
    """A score of the run and the published one of an architecture that is nearest.

    reasons: what stands in the way of comparing them, beside their L0s.
    """

    published: PublishedScore
    own: OwnScore
    reasons: tuple[str, ...]

    @property
    def has_same_l0(self) -> bool:
        """As near as L0s of the same budget are."""
        limit = 1.0 if self.published.l0_range else L0_FACTOR
        return self.published.l0_ratio(self.own.l0) <= limit

    @property
    def verdict(self) -> str:
        """COMPARABLE, or everything that stands in the way."""
        theirs = "40 to 200" if self.published.l0 is None else f"{self.published.l0:.1f}"
        l0 = [] if self.has_same_l0 else [f"L0 {self.own.l0:.1f}, theirs {theirs}"]
        return "; ".join([*self.reasons, *l0]) or COMPARABLE


@lru_cache(maxsize=1)
def published_scores() -> tuple[PublishedScore, ...]:
    """Every published score of the package."""
    reproduced = _read(REPRODUCED)
    core = reproduced[reproduced["eval"] == "core"]
    l0_of = {_sae(row): float(row["l0"]) for row in core.to_dict("records")}
    scores = [_reproduced(row, l0_of) for row in reproduced.to_dict("records")]
    return (*scores, *(_mean(row) for row in _read(MEANS).to_dict("records")))


def _read(name: str) -> pd.DataFrame:
    text = files(__package__).joinpath(name).read_text(encoding="utf-8")
    whole = dict.fromkeys(("layer", "d_sae", "trainer"), "Int64")
    texts = dict.fromkeys(("eval", "metric", "model", "architecture", "sae_bench", "source"), "object")
    columns = StringIO(text).readline().strip().split(",")
    known = {name: dtype for name, dtype in {**whole, **texts, "value": "float64"}.items() if name in columns}
    return pd.read_csv(StringIO(text), dtype=known)


def _sae(row: Mapping[Any, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "layer", "d_sae", "architecture", "trainer"))


def _reproduced(row: Mapping[Any, Any], l0_of: Mapping[tuple[Any, ...], float]) -> PublishedScore:
    return PublishedScore(
        eval=str(row["eval"]),
        metric=str(row["metric"]),
        model=str(row["model"]),
        layer=int(row["layer"]),
        d_sae=int(row["d_sae"]),
        architecture=str(row["architecture"]),
        trainer=int(row["trainer"]),
        l0=l0_of[_sae(row)],
        l0_range=None,
        value=float(row["value"]),
        # Core's rows say '0.6.0-equivalent protocol'.
        version=str(row["sae_bench"]).split("-")[0],
        file=REPRODUCED,
    )


def _mean(row: Mapping[Any, Any]) -> PublishedScore:
    metric, value = str(row["metric"]), float(row["value"])
    inverted = metric.removeprefix("1 - ")
    if inverted != metric:
        metric, value = inverted.split(" ")[0], round(1 - value, 6)
    return PublishedScore(
        eval=str(row["eval"]),
        metric=metric,
        model=str(row["model"]),
        layer=int(row["layer"]),
        d_sae=int(row["d_sae"]),
        architecture=str(row["architecture"]),
        trainer=None,
        l0=None,
        l0_range=(40.0, 200.0) if isinstance(row["l0"], str) else None,
        value=value,
        version="0.3.2",
        file=MEANS,
    )


def same_model(one: str, other: str) -> bool:
    """Whether two names are of one model: owners are often left out."""
    return one.split("/")[-1].lower() == other.split("/")[-1].lower()


def of_place(protocol: RunProtocol) -> list[PublishedScore]:
    """The published scores of the run's model and hook."""
    return [s for s in published_scores() if same_model(s.model, protocol.model) and s.hook == protocol.hook]


def matches(own: Iterable[OwnScore], protocol: RunProtocol) -> list[Match]:
    """Each of the run's scores beside the published ones of its model, hook, width and metric.

    Of each architecture the SAE of the nearest L0. Scores of single SAEs go before means, and those of the run's
    version before others.
    """
    found, here = list[Match](), of_place(protocol)
    for score in own:
        candidates = [s for s in here if (s.eval, s.metric, s.d_sae) == (score.eval, score.metric, score.d_sae)]
        for architecture in dict.fromkeys(s.architecture for s in candidates):
            kind = _preferred([s for s in candidates if s.architecture == architecture], protocol)
            nearest = min(kind, key=partial(_ratio, score.l0))
            # One of the two may have no L0.
            if math.isfinite(nearest.l0_ratio(score.l0)):
                found.append(beside(nearest, score, protocol))
    return sorted(found, key=_order)


def _preferred(kind: list[PublishedScore], protocol: RunProtocol) -> list[PublishedScore]:
    single = [s for s in kind if s.l0_range is None] or kind
    return [s for s in single if s.version == protocol.version] or single


def _ratio(l0: float, score: PublishedScore) -> float:
    return score.l0_ratio(l0)


def _order(match: Match) -> tuple[Any, ...]:
    score = match.own
    return score.eval, score.metric, score.d_sae, score.l0, score.dictionary, score.view, match.published.architecture


def beside(published: PublishedScore, own: OwnScore, protocol: RunProtocol) -> Match:
    """The two, and what stands in the way of comparing them."""
    reasons = (
        *_of_settings(published.eval, protocol),
        *_of_version(published, protocol),
        *_of_signs(own, protocol),
        *([] if protocol.prepend_bos else ["contexts without a BOS, theirs with one"]),
    )
    return Match(published, own, reasons)


def _of_settings(eval_name: str, protocol: RunProtocol) -> list[str]:
    section = protocol.evals.get(eval_name)
    if section is None or section.published is None:
        return [f"whether {eval_name} ran with the published settings was not checked"]
    ours, theirs = section.as_published(), section.published
    differing = [name for name, value in theirs.items() if name not in ours or ours[name] != value]
    return [f"{name} {_said(ours.get(name))}, theirs {_said(theirs[name])}" for name in differing]


def _said(value: Any) -> str:
    if value is None:
        return "SAEBench's own"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple | dict) else str(value)


def _of_version(published: PublishedScore, protocol: RunProtocol) -> list[str]:
    if protocol.version not in VERSIONS:
        known = " and ".join(VERSIONS)
        return [f"SAEBench {protocol.version or 'of an unknown version'}: only {known} were compared"]
    section = protocol.evals.get(published.eval)
    changed = None if section is None else section.redefined.get(published.metric)
    if changed is not None and published.version != protocol.version:
        return [f"of SAEBench {published.version}, here {protocol.version}: {changed}"]
    return []


def _of_signs(own: OwnScore, protocol: RunProtocol) -> list[str]:
    section = protocol.evals.get(own.eval)
    if own.view == "signed" and section is not None and section.reads_signs:
        return [f"signed codes, of which {own.eval} reads the positive part only"]
    return []
