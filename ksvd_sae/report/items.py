"""The values that the headline scores are means of, item by item: a file beside the table."""

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals import EVALS as KINDS
from ksvd_sae.evals.base import Column
from ksvd_sae.report.scores import check_table, ranks, typed_frame
from ksvd_sae.store import atomic_path

FILE = "items.csv.gz"
# A score is Σ weight · value / Σ weight over the rows of its eval, metric, dictionary, view and seeds.
KEY = ["eval", "metric", "dictionary", "view", "seed", "eval_seed"]
COLUMNS = [*KEY, "item", "value", "weight"]
_OF_EVAL = {kind.name: kind for kind in KINDS}


def items_of(frame: pd.DataFrame, read: Callable[[str, str], Mapping[str, Any]]) -> pd.DataFrame:
    """The items of all results that the scores name.

    Args: frame: the scores. read: eval and ``source`` -> what the result file holds.
    Returns: COLUMNS.
    """
    check_table(frame)
    typed = typed_frame(frame)
    owners = ["eval", "dictionary", "view", "seed", "eval_seed", "source"]
    rows = [
        {**owner, "metric": item.metric, "item": item.name, "value": item.value, "weight": item.weight}
        for owner in typed[typed["eval"].isin(_OF_EVAL)][owners].drop_duplicates().to_dict("records")
        for item in _OF_EVAL[owner["eval"]].items(read(owner["eval"], owner["source"]))
    ]
    return _typed(pd.DataFrame(rows, columns=COLUMNS))


def reads_from(evaluations: Path) -> Callable[[str, str], Mapping[str, Any]]:
    """Reads result files of a folder of evaluations."""

    def read(eval_name: str, source: str) -> Mapping[str, Any]:
        result: dict[str, Any] = json.loads((evaluations / eval_name / source).read_text())
        return result

    return read


def _typed(items: pd.DataFrame) -> pd.DataFrame:
    whole = {name: pd.to_numeric(items[name]).astype("Int64") for name in ("seed", "eval_seed")}
    reals = {name: pd.to_numeric(items[name]).astype("float64") for name in ("value", "weight")}
    return items.assign(**whole, **reals)[COLUMNS]


def write_items(items: pd.DataFrame, path: Path) -> None:
    """Write them, in an order that does not depend on how they were gathered; equal items give equal bytes."""
    order = items.assign(
        eval=items["eval"].map({kind.name: rank for rank, kind in enumerate(KINDS)}),
        dictionary=items["dictionary"].map(ranks(items["dictionary"])),
        **{name: items[name].fillna(-1) for name in ("seed", "eval_seed")},
    )
    order = order.assign(place=order["item"].str.zfill(8))
    items = items.loc[order.sort_values([*KEY, "place"], kind="stable").index]
    text = items.to_csv(index=False, float_format="%.7g", lineterminator="\n")
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))


def read_items(folder: Path) -> pd.DataFrame:
    """What ``write_items`` wrote into a run's folder; no rows where an older comparison wrote none.

    Raises: EvaluationError: not such a file.
    """
    path = folder / FILE
    if not path.exists():
        return _typed(pd.DataFrame(columns=COLUMNS))
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, compression="gzip")
        return _typed(frame.assign(**{name: frame[name].replace({"": None}) for name in ("seed", "eval_seed")}))
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise EvaluationError(f"reading {path}: {error}", cause="cut off or altered", cure="compare again") from error


def headline_items(items: pd.DataFrame, headline: Column) -> pd.DataFrame:
    """What is behind a headline column: dictionary, view, seed, eval_seed, item, value.

    Values count alike here: their mean is the score, and their spread gives the score's error (linearised, where it
    is a ratio of sums).
    """
    keys = [*KEY[2:], "item"]
    rows = items[items["eval"] == headline.eval]
    own = rows.loc[rows["metric"] == headline.metric, [*keys, "value", "weight"]].reset_index(drop=True)
    if headline.minus is not None:
        # Missing seeds do not merge: −1 stands for them. The two have the same tokens, so the same weights.
        filled = {name: lambda part, n=name: part[n].fillna(-1) for name in ("seed", "eval_seed")}
        minus = rows.loc[rows["metric"] == headline.minus, [*keys, "value"]]
        merged = pd.merge(own.assign(**filled), minus.assign(**filled), "left", keys, suffixes=("", "_minus"))
        own["value"] = (merged["value"] - merged["value_minus"]).to_numpy()
    own["total"] = own["value"] * own["weight"]
    of_score = own.groupby(keys[:-1], dropna=False)
    mean = of_score["total"].transform("sum") / of_score["weight"].transform("sum")
    share = own["weight"] / of_score["weight"].transform("mean")
    return own.assign(value=mean + share * (own["value"] - mean))[[*keys, "value"]]
