"""A study's dictionaries against its SAEs, seed by seed: what is more than noise.

On either side stands the setting with the least mean nats lost, so both are the best of several and equally lucky.
"""

from collections.abc import Hashable
from typing import Any

import pandas as pd

from ksvd_sae.report.statistics import Difference, difference

COLUMNS = ["layer", "k", "weighting", "dictionary", "sae", "seeds", "nats_lost", "fvu"]
ANY = "any"
_SETTING = ["entry", "coding", "coding_k"]


def against_saes(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The best dictionary minus the best SAE of each layer, k and weighting, and of any weighting.

    Args: rows: as a study writes them.
    Returns: COLUMNS; nats_lost and fvu are ``Difference``s, paired by training seed; negative is in the dictionary's
        favour. Only settings that code as many atoms as they learned with (coding_k = k) take part.
    """
    frame = pd.DataFrame(rows)
    frame = frame[frame["coding_k"] == frame["k"]]
    is_sae = frame["kind"].str.endswith("_sae")
    lines = []
    for (layer, k), group in frame.groupby(["layer", "k"], sort=True):
        for weighting in [*dict.fromkeys(group["weighting"]), ANY]:
            of_it = group if weighting == ANY else group[group["weighting"] == weighting]
            saes, dictionaries = of_it[is_sae[of_it.index]], of_it[~is_sae[of_it.index]]
            if saes.empty or dictionaries.empty:
                continue
            own, theirs = _best(dictionaries), _best(saes)
            found = {metric: _difference(own, theirs, metric) for metric in ("nats_lost", "fvu")}
            names = {"dictionary": _name(own), "sae": _name(theirs), "seeds": found["nats_lost"].estimate.n}
            lines.append({"layer": layer, "k": k, "weighting": weighting, **names, **found})
    return pd.DataFrame(lines, columns=COLUMNS)


def versus_markdown(table: pd.DataFrame) -> str:
    """The table as a section of the report; '' if nothing can be compared."""
    if table.empty:
        return ""
    lead = (
        "## Against the SAEs\n\nThe setting of least nats lost among the dictionaries minus that among the SAEs: mean "
        "over pairs of the same training seed ± half-width of the 95 % interval (Student's t). Better, worse: the "
        "interval leaves out 0; negative differences are in the dictionary's favour."
    )
    lines = ["| layer | k | weighting | dictionary | SAE | seeds | nats lost | FVU |"]
    lines.append("|---:|---:|---|---|---|---:|---|---|")
    for row in table.to_dict("records"):
        cells = [str(row[name]) for name in COLUMNS[:6]] + [_text(row, "nats_lost", 3), _text(row, "fvu", 4)]
        lines.append("| " + " | ".join(cells) + " |")
    return lead + "\n\n" + "\n".join(lines)


def _best(settings: pd.DataFrame) -> pd.DataFrame:
    """Rows of the setting whose mean nats lost are least, of those with the most seeds."""
    groups = [group for _, group in settings.groupby(_SETTING, sort=False)]
    most = max(group["seed"].nunique() for group in groups)
    return min((g for g in groups if g["seed"].nunique() == most), key=lambda group: float(group["nats_lost"].mean()))


def _difference(own: pd.DataFrame, theirs: pd.DataFrame, metric: str) -> Difference:
    mine, other = (
        pd.DataFrame({"seed": g["seed"], "eval_seed": float("nan"), "value": g[metric]}) for g in (own, theirs)
    )
    return difference(mine, other, "lower")


def _name(group: pd.DataFrame) -> str:
    row = group.iloc[0]
    return str(row["entry"]) if row["coding"] == "own" else f"{row['entry']}, {row['coding']}"


def _text(row: dict[Hashable, Any], metric: str, digits: int) -> str:
    found: Difference = row[metric]
    mean, width = found.estimate.mean, found.estimate.half_width
    if width != width:
        return f"{mean:+.{digits}f}"
    return f"{found.verdict}, {mean:+.{digits}f} ± {width:.{digits}f}"
