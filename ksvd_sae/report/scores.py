"""The tidy table of scores, one a row: its columns, what is refused, and its CSV."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from ksvd_sae.errors import EvaluationError
from ksvd_sae.report.headline import EVALS
from ksvd_sae.store import atomic_path

logger = logging.getLogger(__name__)

COLUMNS = ["dictionary", "view", "d_sae", "k", "l0", "eval", "data", "metric", "value", "seed", "eval_seed"]
COLUMNS += ["n", "source"]
TEXT_COLUMNS = ["dictionary", "view", "eval", "data", "metric", "source"]
WHOLE_COLUMNS = ["d_sae", "k", "seed", "eval_seed", "n"]
REAL_COLUMNS = ["l0", "value"]
# One score has one row.
KEY = ["dictionary", "view", "eval", "data", "metric", "seed", "eval_seed"]
FIRST_VIEWS = ("signed", "split")


def check_table(frame: pd.DataFrame) -> None:
    """Refuse a frame that is no table of scores.

    Raises:
        EvaluationError: no rows; columns missing or unknown; unnamed, non-numeric or repeated scores.
    """
    missing = [name for name in COLUMNS if name not in frame.columns]
    unknown = [str(name) for name in frame.columns if name not in COLUMNS]
    if missing or unknown:
        raise EvaluationError(
            "reading a table of scores: its columns are not those of one"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; unknown: {', '.join(unknown)}" if unknown else ""),
            got=list(frame.columns),
            limit=COLUMNS,
        )
    if frame.empty:
        raise EvaluationError(
            "reading a table of scores: it has no rows",
            cause="no eval ran, or none gave a score",
            cure="turn on an eval in the config's `evaluation`",
        )
    typed = typed_frame(frame)
    for name in ("dictionary", "eval", "metric"):
        if (typed[name] == "").any():
            raise EvaluationError(f"reading a table of scores: rows without a {name}", got=_rows(typed[name] == ""))
    repeated = typed.duplicated(KEY, keep=False)
    if repeated.any():
        first = typed.loc[repeated, KEY].iloc[0].to_dict()
        raise EvaluationError(
            f"reading a table of scores: {int(repeated.sum())} rows score what another row scores",
            got=", ".join(f"{name}={value}" for name, value in first.items()),
            limit=f"one row for each ({', '.join(KEY)})",
            cause="results of two runs were put into one table",
            cure="keep one of them, or give each its own seed or data name",
        )


def _rows(mask: "pd.Series[bool]") -> str:
    return f"row {', '.join(str(index) for index in np.flatnonzero(mask.to_numpy())[:5])}"


def typed_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns in their order and types: text without gaps, whole numbers and reals with them."""
    typed = pd.DataFrame(index=frame.index)
    for name in COLUMNS:
        column = frame[name]
        try:
            if name in TEXT_COLUMNS:
                typed[name] = column.astype(object).where(column.notna(), "").astype(str).astype(object)
            elif name in WHOLE_COLUMNS:
                typed[name] = pd.to_numeric(column).astype("Int64")
            else:
                reals = pd.to_numeric(column).astype("float64")
                typed[name] = reals.where(np.isfinite(reals))
        except (TypeError, ValueError) as error:
            kind = "whole number" if name in WHOLE_COLUMNS else "number"
            raise EvaluationError(
                f"reading a table of scores: column {name!r} holds what is no {kind} ({error})",
                got=str(column.dtype),
                limit=f"{kind}s, or nothing where there is none",
            ) from error
    return typed


def ranks(column: "pd.Series[str]", first: tuple[str, ...] = ()) -> dict[str, int]:
    """Position of each name: those of ``first``, then the others as they first appear."""
    return {name: rank for rank, name in enumerate(dict.fromkeys([*first, *column]))}


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write the scores, whole or not at all, in an order that does not depend on how they were gathered.

    Dictionaries keep the order of their first appearance; within one, rows go by view (signed first), seed,
    evaluation seed, eval, data and metric. Values have nine significant digits.
    """
    check_table(frame)
    typed = typed_frame(frame)
    order = pd.DataFrame(
        {
            "dictionary": typed["dictionary"].map(ranks(typed["dictionary"])),
            "view": typed["view"].map(ranks(typed["view"], FIRST_VIEWS)),
            "seed": typed["seed"].fillna(-1).astype("int64"),
            "eval_seed": typed["eval_seed"].fillna(-1).astype("int64"),
            "eval": typed["eval"].map(ranks(typed["eval"], EVALS)),
            "data": typed["data"].map(ranks(typed["data"])),
            "metric": typed["metric"],
        }
    )
    typed = typed.loc[order.sort_values(list(order.columns), kind="stable").index]
    with atomic_path(Path(path)) as temporary:
        typed.to_csv(temporary, index=False, float_format="%.9g", lineterminator="\n", encoding="utf-8")
    logger.info("wrote %d scores to %s", len(typed), path)


def read_csv(path: Path) -> pd.DataFrame:
    """Read what ``write_csv`` wrote.

    Raises:
        EvaluationError: no such file, not a CSV, or not a table of scores.
    """
    try:
        # Only an empty cell is a gap: a dictionary may be called "NA" or "None".
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise EvaluationError(f"reading scores from {path}: {error}", cure="run the evaluation stage") from error
    frame = frame.apply(lambda column: column if column.name in TEXT_COLUMNS else column.replace({"": None}))
    check_table(frame)
    return typed_frame(frame)
