"""What several seeds say: means with their 95 % intervals, and paired differences with a verdict.

A score belongs to a training seed (which dictionary was learned) and an evaluation seed (which probes, texts or latents
it was scored with). Dictionaries are what one wants to know about, so training seeds are the sample: scores of one
dictionary under several evaluation seeds are averaged first. Where there is only one training, the interval is over its
evaluation seeds, and says only how much of the score is the evaluation's luck.

A difference of two dictionaries also depends on the items that they were scored on: contexts, data sets, letters. Where
these are known, its error covers both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

SEEDS = ["seed", "eval_seed"]
Over = Literal["training seeds", "evaluation seeds", "seeds and items", "items", "nothing"]
Better = Literal["lower", "higher"]
Verdict = Literal["better", "worse", "level", "cannot tell", "no error bar"]
_CONFIDENCE, LEVEL, POWER = 0.95, 0.05, 0.8
# Relative: scores are sums of many float32 numbers.
_FLOAT32 = 1e-5


@dataclass(frozen=True)
class Estimate:
    """A mean and how well it is known.

    half_width: of the 95 % interval (Student's t); NaN for a single value. n: values that the interval is over.
    """

    mean: float
    half_width: float
    n: int
    over: Over


@dataclass(frozen=True)
class Items:
    """What two scores are means over: columns seed, eval_seed, item, value (see ``items.headline_items``).

    shared: both are of the same items, which then pair; else each training has its own.
    """

    of: pd.DataFrame
    against: pd.DataFrame
    shared: bool


@dataclass(frozen=True)
class Difference:
    """A dictionary's score minus a baseline's.

    mean: over pairs of seeds. error: its standard error, with ``df`` degrees of freedom; NaN where it is not known.
    n: pairs. n_items: that the error covers; 0: it is over seeds alone.
    """

    mean: float
    error: float
    df: float
    n: int
    over: Over
    n_items: int = 0

    @property
    def half_width(self) -> float:
        """Of the 95 % interval (Student's t)."""
        return self._t(1 - _CONFIDENCE) * self.error

    @property
    def p(self) -> float:
        """Of no difference, two-sided; NaN where there is no interval."""
        if not math.isfinite(self.error):
            return math.nan
        if self.error == 0:
            return float(self.mean == 0)
        return float(2 * stats.t.sf(abs(self.mean) / self.error, self.df))

    def visible(self, level: float) -> float:
        """The difference that a test at this level would find four times in five."""
        return (self._t(level) + float(stats.t.ppf(POWER, self.df))) * self.error

    def _t(self, level: float) -> float:
        return float(stats.t.ppf(1 - level / 2, self.df)) if math.isfinite(self.error) else math.nan


@dataclass(frozen=True)
class Judged:
    """What a difference says. p: corrected. visible: see ``Difference.visible``, at the corrected level."""

    p: float
    visible: float
    verdict: Verdict


def half_width(values: list[float]) -> float:
    """Of the 95 % interval of the mean, Student's t; NaN for fewer than two values."""
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1) * stats.sem(values))


def estimate(scores: pd.DataFrame) -> Estimate:
    """Mean of a score over seeds.

    Args: scores: columns seed, eval_seed (missing where there is none) and value. Values that are not finite are left
        out, with what they say of n.
    """
    known = scores[scores["value"].map(math.isfinite).astype(bool)]
    by_training = known.groupby(known["seed"].fillna(-1), sort=True)["value"].mean().tolist()
    if len(by_training) > 1:
        return _estimate(by_training, "training seeds")
    by_evaluation = known.groupby(known["eval_seed"].fillna(-1), sort=True)["value"].mean().tolist()
    return _estimate(by_evaluation, "evaluation seeds" if len(by_evaluation) > 1 else "nothing")


def _estimate(values: list[float], over: Over) -> Estimate:
    mean, width = math.fsum(values) / len(values) if values else float("nan"), half_width(values)
    # What is smaller than the scores' digits is no difference.
    digits = _FLOAT32 * max(map(abs, values), default=0.0)
    return Estimate(0.0 if abs(mean) < digits else mean, 0.0 if width < digits else width, len(values), over)


def difference(scores: pd.DataFrame, baseline: pd.DataFrame, items: Items | None = None) -> Difference:
    """What a dictionary's scores have over a baseline's, paired by training and evaluation seed.

    A dictionary that is learned without a seed (missing ``seed``) is compared with every training of the other.
    Seeds that only one of the two has are left out.

    The error over seeds (S) and shared items (I) is √(s²/S of the seeds' means + s²/I of the items' means), with
    Satterthwaite's degrees of freedom. What is of neither counts twice, so the interval is wide where that is all there
    is (docs/results.md has a simulation). A training's own items are already in the spread over seeds.

    Args: scores, baseline: as for ``estimate``. items: of both, with the same seeds.
    """
    gap = estimate(_paired(scores, baseline, SEEDS))
    error = gap.half_width / float(stats.t.ppf((1 + _CONFIDENCE) / 2, gap.n - 1)) if gap.n > 1 else math.nan
    plain = Difference(gap.mean, error, gap.n - 1, gap.n, gap.over)
    if items is None or gap.n == 0 or gap.over == "evaluation seeds":
        return plain
    return _shared(plain, items) if items.shared else _own(plain, items)


def _shared(plain: Difference, items: Items) -> Difference:
    pairs = _paired(items.of, items.against, [*SEEDS, "item"])
    cells = pairs.pivot_table(index="seed", columns="item", values="value", aggfunc="mean", dropna=False).to_numpy()
    names = {frozenset(of) for one in (items.of, items.against) for _, of in one.groupby(SEEDS, dropna=False)["item"]}
    # Where some have no value for an item, scores are not of the same items.
    if cells.shape[0] != plain.n or len(names) != 1 or cells.shape[1] < 2 or not np.isfinite(cells).all():
        return plain
    of_items = cells.mean(axis=0).var(ddof=1) / cells.shape[1]
    parts = [(of_items, cells.shape[1] - 1)]
    if plain.n > 1:
        parts.append((plain.error**2, plain.n - 1))
    return _with_items(plain, parts, cells.shape[1])


def _own(plain: Difference, items: Items) -> Difference:
    n_items = min(len(of) for one in (items.of, items.against) for _, of in one.groupby(SEEDS, dropna=False))
    if plain.n > 1:
        return replace(plain, over="seeds and items", n_items=n_items)
    values = [one["value"].to_numpy() for one in (items.of, items.against)]
    return _with_items(plain, [(v.var(ddof=1) / len(v), len(v) - 1) for v in values], n_items) if n_items > 1 else plain


def _with_items(plain: Difference, parts: list[tuple[float, int]], n_items: int) -> Difference:
    """The error from independent parts of its square, each with its degrees of freedom (Satterthwaite 1946)."""
    square = sum(part for part, _ in parts)
    df = square**2 / sum(part**2 / n for part, n in parts) if square else float(parts[0][1])
    over: Over = "seeds and items" if plain.n > 1 else "items"
    return replace(plain, error=math.sqrt(square), df=df, over=over, n_items=n_items)


def _paired(scores: pd.DataFrame, baseline: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """The differences: ``keys`` and value."""
    seedless = scores["seed"].isna().all() or baseline["seed"].isna().all()
    on = [key for key in keys if key != "seed"] if seedless else keys
    pairs = pd.merge(_keyed(scores, keys), _keyed(baseline, keys), on=on, suffixes=("", "_baseline"))
    if seedless:
        own = "seed_baseline" if scores["seed"].isna().all() else "seed"
        pairs["seed"] = pairs[own]
    return pairs.assign(value=pairs["value"] - pairs["value_baseline"])[[*keys, "value"]]


def _keyed(scores: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """With −1 for a missing seed, since missing ones do not merge."""
    return scores[[*keys, "value"]].assign(**{name: scores[name].fillna(-1).astype("int64") for name in SEEDS})


def judged(gaps: Sequence[Difference], better: Better, matters: float | None) -> list[Judged]:
    """Verdicts of a column's differences, corrected for their number (Holm 1979).

    Better, worse: the corrected p is below 0.05, and the test could have seen it: it would have found what matters, or
    the difference itself, four times in five. Level: the 95 % interval lies inside ± what matters (not corrected).
    What is of one training, with an interval over items alone, has neither.
    """
    ps = [gap.p for gap in gaps]
    n = sum(map(math.isfinite, ps))
    corrected = holm(ps)
    return [
        Judged(p, visible, _verdict(gap, p, visible, better, matters))
        for gap, p in zip(gaps, corrected, strict=True)
        for visible in [gap.visible(LEVEL / max(1, n))]
    ]


def holm(ps: Sequence[float]) -> list[float]:
    """Corrected p-values, each in its place: one wrong rejection among all of them has at most the chance of the level.

    NaN stays, and does not count.
    """
    order = sorted((i for i, p in enumerate(ps) if math.isfinite(p)), key=lambda i: ps[i])
    corrected, least = [math.nan] * len(ps), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * ps[i]))
        corrected[i] = least
    return corrected


def _verdict(gap: Difference, p: float, visible: float, better: Better, matters: float | None) -> Verdict:
    if not math.isfinite(p):
        return "no error bar"
    if gap.over == "items":
        return "cannot tell"
    if matters is not None and abs(gap.mean) + gap.half_width <= matters:
        return "level"
    could_see = matters is None or visible <= max(matters, abs(gap.mean))
    if p >= LEVEL or not could_see:
        return "cannot tell"
    return "better" if (gap.mean > 0) == (better == "higher") else "worse"
