"""Dictionaries by coders: every score in the cell that it belongs to, and none made up."""

from typing import Any

import pandas as pd
import pytest

from ksvd_sae.report.pivot import coder_section
from ksvd_sae.report.scores import COLUMNS, typed_frame
from ksvd_sae.report.sections import Section
from ksvd_sae.run.config import RunConfig, parse_config
from tests.run.test_config import RAW

SIZES: dict[str, Any] = {"n_atoms": 64, "k": 4}
DICTIONARIES: dict[str, dict[str, Any]] = {
    "ksvd": {"kind": "db_ksvd", **SIZES},
    "ksvd.omp": {"kind": "recoded", "of": "ksvd", "coder": "omp", "view": "both"},
    "ksvd.linear": {"kind": "linear_topk", "of": "ksvd"},
    "sae": {"kind": "topk_sae", **SIZES},
    "sae.omp": {"kind": "recoded", "of": "sae", "coder": "omp"},
    "alone": {"kind": "random", **SIZES},
}


def config(**more: dict[str, Any]) -> RunConfig:
    return parse_config({**RAW, "dictionaries": {**DICTIONARIES, **more}})


def rows(
    eval_name: str = "heldout", metric: str = "fvu", view: str = "signed", seed: int = 0, **values: float | None
) -> list[dict[str, Any]]:
    common = {"data": "text", "view": view, "eval": eval_name, "metric": metric, "seed": seed}
    return [{**common, "dictionary": name.replace("_", "."), "value": value} for name, value in values.items()]


def frame_of(found: list[dict[str, Any]]) -> pd.DataFrame:
    return typed_frame(pd.DataFrame(found, columns=list(COLUMNS)))


def section_of(found: list[dict[str, Any]], run: RunConfig) -> Section | None:
    return coder_section(frame_of(found), run)


def table(section: Section | None, heading: str) -> dict[str, dict[str, str]]:
    assert section is not None
    assert section.heads[:2] == ("score", "dictionary")
    return {row[1]: dict(zip(section.heads[2:], row[2:], strict=True)) for row in section.rows if row[0] == heading}


def test_every_score_in_its_cell() -> None:
    found = section_of(
        rows(ksvd=0.1, ksvd_omp=0.09, ksvd_linear=0.15, sae=0.14, sae_omp=0.1, alone=0.7) + rows(metric="l0", ksvd=4.0),
        config(),
    )
    assert table(found, "FVU ↓") == {
        "ksvd": {"own encoder": "–", "linear TopK": "0.1500", "MP": "0.1000", "OMP": "0.0900"},
        "sae": {"own encoder": "0.1400", "linear TopK": "–", "MP": "–", "OMP": "0.1000"},
    }
    assert found is not None
    assert {row[0] for row in found.rows} == {"FVU ↓"}, "scores that no one has are left out"


def test_differences_seeds_views_and_missing_scores() -> None:
    core = "core"
    found = section_of(
        rows(core, "ce_loss_with_sae", ksvd=4.5, sae=4.0)
        + rows(core, "ce_loss_with_sae", seed=1, ksvd=4.7)
        + rows(core, "ce_loss_without_sae", ksvd=4.0, sae=4.0)
        + rows(core, "ce_loss_without_sae", seed=1, ksvd=4.0)
        + rows(core, "ce_loss_with_sae", "split", ksvd_omp=9.0)
        + rows(core, "ce_loss_without_sae", "split", ksvd_omp=4.0)
        + rows(core, "ce_loss_with_sae", ksvd_omp=4.25, sae_omp=None)
        + rows(core, "ce_loss_without_sae", ksvd_omp=4.0, sae_omp=4.0),
        config(),
    )
    lost = table(found, "nats lost ↓")
    mean, width = lost["ksvd"]["MP"].split(" ± ")
    # Student's t of one degree of freedom times the standard error of 0.5 and 0.7.
    assert (float(mean), float(width)) == (pytest.approx(0.6), pytest.approx(12.706 * 0.1, abs=1e-3))
    assert float(lost["ksvd"]["OMP"]) == pytest.approx(0.25), "one seed: no interval"
    assert lost["sae"]["OMP"] == "n/a"
    assert float(lost["sae"]["own encoder"]) == 0


def test_what_differs_besides_the_coder_is_said() -> None:
    changed = {
        "a": {"kind": "recoded", "of": "ksvd", "coder": "mp", "k": 2},
        "b": {"kind": "recoded", "of": "sae", "coder": "mp_refit", "nonnegative": False},
        "c": {"kind": "linear_topk", "of": "ksvd", "signed": False, "weighting": "std"},
    }
    found = table(section_of(rows(ksvd=0.1, a=0.2, b=0.3, c=0.4), config(**changed)), "FVU ↓")
    assert list(found["ksvd"]) == [
        "own encoder",
        "linear TopK",
        "linear TopK, without signs, in the metric std",
        "MP",
        "MP, k = 2",
        "MP, refit, with signs",
        "OMP",
    ]
    assert (float(found["ksvd"]["MP"]), float(found["ksvd"]["MP, k = 2"])) == (0.1, 0.2)
    assert float(found["sae"]["MP, refit, with signs"]) == 0.3


def test_a_run_without_such_dictionaries_has_no_table() -> None:
    assert section_of(rows(ours=0.1), parse_config(RAW)) is None
