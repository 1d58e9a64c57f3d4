"""Some dictionaries against others, score by score, for whatever question a table of scores raises."""

from collections.abc import Sequence
from difflib import get_close_matches

import pandas as pd

from ksvd_sae.errors import EvaluationError
from ksvd_sae.report.headline import Headline
from ksvd_sae.report.scores import check_table, typed_frame
from ksvd_sae.report.statistics import SEEDS, difference
from ksvd_sae.report.tables import headline_scores, shown_headlines

COLUMNS = ["score", "difference", "half_width", "n", "verdict"]


def contrast(frame: pd.DataFrame, ones: Sequence[str], others: Sequence[str]) -> pd.DataFrame:
    """The mean score of ``ones`` minus that of ``others``, paired by seed, for every score that all of them have.

    Args: frame: the scores, see ``scores.COLUMNS``. Of a dictionary with two views the first counts.
    Returns: COLUMNS, as ``verdicts.verdicts`` has them.
    Raises: EvaluationError: no such dictionary, none given, or no score that all have.
    """
    check_table(frame)
    typed = typed_frame(frame)
    known = list(dict.fromkeys(typed["dictionary"]))
    for name in [*ones, *others]:
        if name not in known:
            near = get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
            raise EvaluationError(
                f"contrast: no scores of a dictionary {name!r}",
                cure=f"did you mean {' or '.join(map(repr, near))}?",
            )
    if not ones or not others:
        raise EvaluationError("contrast: nothing to compare", cure="name at least one dictionary on either side")
    rows = []
    for headline in shown_headlines(typed):
        pair = _mean(typed, headline, ones), _mean(typed, headline, others)
        if headline.better is None or pair[0].empty or pair[1].empty:
            continue
        found = difference(*pair, headline.better)
        rows.append([headline.label, found.estimate.mean, found.estimate.half_width, found.estimate.n, found.verdict])
    if not rows:
        raise EvaluationError("contrast: there is no score that all of these have", got=", ".join([*ones, *others]))
    return pd.DataFrame(rows, columns=COLUMNS)


def _mean(typed: pd.DataFrame, headline: Headline, names: Sequence[str]) -> pd.DataFrame:
    """Mean over dictionaries, seed by seed; only seeds that all of them have a finite score of."""
    scores = headline_scores(typed, headline)
    scores = scores[scores["dictionary"].isin(names)].dropna(subset=["value"])
    first = scores.groupby("dictionary")["view"].transform(lambda views: min(views, key=lambda view: view == "split"))
    scores = scores[scores["view"] == first]
    by_seed = scores.groupby(SEEDS, dropna=False, sort=True)["value"].agg(["mean", "size"]).reset_index()
    return by_seed[by_seed["size"] == len(set(names))].rename(columns={"mean": "value"})[[*SEEDS, "value"]]
