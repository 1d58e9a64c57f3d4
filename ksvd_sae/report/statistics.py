"""What several seeds say: means with their 95 % intervals, and paired differences with a verdict.

A score belongs to a training seed (which dictionary was learned) and an evaluation seed (which probes, texts or latents
it was scored with). Dictionaries are what one wants to know about, so training seeds are the sample: scores of one
dictionary under several evaluation seeds are averaged first. Where there is only one training, the interval is over its
evaluation seeds, and says only how much of the score is the evaluation's luck.
"""

import math
from dataclasses import dataclass
from typing import Literal

import pandas as pd
from scipy import stats

SEEDS = ["seed", "eval_seed"]
Over = Literal["training seeds", "evaluation seeds", "nothing"]
Verdict = Literal["better", "worse", "within noise", "no error bar"]
_CONFIDENCE = 0.95
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
class Difference:
    """A dictionary's score minus a baseline's, seed by seed; better or worse if the 95 % interval leaves out 0."""

    estimate: Estimate
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


def difference(scores: pd.DataFrame, baseline: pd.DataFrame, better: Literal["lower", "higher"]) -> Difference:
    """What a dictionary's scores have over a baseline's, paired by training and evaluation seed.

    A dictionary that is learned without a seed (missing ``seed``) is compared with every training of the other.
    Seeds that only one of the two has are left out.

    Args: scores, baseline: as for ``estimate``.
    """
    seedless = scores["seed"].isna().all() or baseline["seed"].isna().all()
    keys = ["eval_seed"] if seedless else SEEDS
    pairs = pd.merge(_keyed(scores), _keyed(baseline), on=keys, suffixes=("", "_baseline"))
    if seedless:
        own = "seed_baseline" if scores["seed"].isna().all() else "seed"
        pairs["seed"] = pairs[own]
    gap = estimate(pairs.assign(value=pairs["value"] - pairs["value_baseline"])[[*SEEDS, "value"]])
    return Difference(gap, _verdict(gap, better))


def _keyed(scores: pd.DataFrame) -> pd.DataFrame:
    """With −1 for a missing seed, since missing ones do not merge."""
    return scores[[*SEEDS, "value"]].assign(**{name: scores[name].fillna(-1).astype("int64") for name in SEEDS})


def _verdict(gap: Estimate, better: Literal["lower", "higher"]) -> Verdict:
    if not math.isfinite(gap.half_width):
        return "no error bar"
    if abs(gap.mean) <= gap.half_width:
        return "within noise"
    return "better" if (gap.mean > 0) == (better == "higher") else "worse"
