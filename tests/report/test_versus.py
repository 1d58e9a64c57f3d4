"""The best dictionary against the best SAE, seed by seed."""

from typing import Any

import pytest
from tests.report.test_study import row

from ksvd_sae.report.versus import against_saes, versus_markdown


def of(entry: str, kind: str, nats: tuple[float, ...], weighting: str = "none", **changes: Any) -> list[dict[str, Any]]:
    coding = "own" if kind.endswith("_sae") else "omp"
    return [
        row(entry, seed, kind=kind, nats_lost=lost, weighting=weighting, **{"coding": coding, **changes})
        for seed, lost in enumerate(nats)
    ]


ROWS = [
    *of("db-ksvd", "db_ksvd", (0.50, 0.52, 0.54), fvu=0.1),
    *of("db-ksvd", "db_ksvd", (0.60, 0.62, 0.64), fvu=0.1, coding="mp"),
    # Fewer atoms than it learned with: no contestant, however good.
    *of("db-ksvd", "db_ksvd", (0.10, 0.10, 0.10), fvu=0.1, coding_k=10),
    *of("topk-sae", "topk_sae", (0.61, 0.60, 0.65), fvu=0.2),
    *of("batchtopk-sae", "batchtopk_sae", (0.61, 0.62, 0.64), fvu=0.2),
    *of("db-ksvd-std", "db_ksvd", (0.40, 0.45, 0.50), "std", fvu=0.1),
    *of("topk-sae-std", "topk_sae", (0.44, 0.45, 0.46), "std", fvu=0.2),
]


def test_the_best_of_either_side_in_each_weighting_and_in_any() -> None:
    table = against_saes(ROWS)
    names = table[["weighting", "dictionary", "sae", "seeds"]].to_numpy().tolist()
    assert names == [
        ["none", "db-ksvd, omp", "topk-sae", 3],
        ["std", "db-ksvd-std, omp", "topk-sae-std", 3],
        ["any", "db-ksvd-std, omp", "topk-sae-std", 3],
    ]
    plain, std = table.loc[0, "nats_lost"], table.loc[1, "nats_lost"]
    assert (plain.verdict, plain.estimate.mean) == ("better", pytest.approx(-0.1))
    assert (std.verdict, std.estimate.mean) == ("within noise", pytest.approx(0.0))
    # Three differences of standard deviation 0.04: t(2) = 4.303.
    assert std.estimate.half_width == pytest.approx(4.303 * 0.04 / 3**0.5, rel=1e-3)
    text = versus_markdown(table)
    assert "| 9 | 20 | none | db-ksvd, omp | topk-sae | 3 | better, -0.100 ± " in text


def test_a_setting_of_fewer_seeds_does_not_stand_for_its_side() -> None:
    """In a study that is not done, its one lucky seed would."""
    lucky = of("batchtopk-sae", "batchtopk_sae", (0.2,))
    table = against_saes([*of("db-ksvd", "db_ksvd", (0.5, 0.6)), *of("topk-sae", "topk_sae", (0.7, 0.7)), *lucky])
    assert table.loc[0, "sae"] == "topk-sae"


def test_nothing_to_compare_is_no_section() -> None:
    assert versus_markdown(against_saes(of("db-ksvd", "db_ksvd", (0.5, 0.6)))) == ""


def test_one_pair_has_no_verdict() -> None:
    table = against_saes([*of("db-ksvd", "db_ksvd", (0.5,)), *of("topk-sae", "topk_sae", (0.7,))])
    assert "| -0.200 |" in versus_markdown(table)
