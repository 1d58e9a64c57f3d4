"""Dictionaries that are of another: what they leave open is the other's, and what cannot be is named."""

from typing import Any

import pytest
import yaml

from ksvd_sae.errors import ConfigError
from ksvd_sae.methods.base import WeightingConfig
from ksvd_sae.methods.linear_topk import LinearTopKMethod
from ksvd_sae.methods.recoded import RecodedMethod
from ksvd_sae.run.config import RunConfig, dump_config, load_config, parse_config
from tests.command_line import EVAL_CONFIGS
from tests.run.test_config import RAW

KSVD: dict[str, Any] = {"kind": "db_ksvd", "n_atoms": 64, "k": 8, "rtol": 0.1, "weighting": "std"}
LEARNED: dict[str, Any] = {
    "ksvd": KSVD,
    "plus": {**KSVD, "nonnegative": True},
    "topk": {"kind": "topk_sae", "n_atoms": 32, "k": 4},
    "pca": {"kind": "pca", "k": 8},
    "random": {"kind": "random", "n_atoms": 16, "k": 2, "coder": "omp"},
}


def run_with(**more: dict[str, Any]) -> RunConfig:
    return parse_config({**RAW, "dictionaries": {**LEARNED, **more}})


def recoded(**fields: Any) -> RecodedMethod:
    found = run_with(it={"kind": "recoded", **fields}).dictionaries["it"]
    assert isinstance(found, RecodedMethod)
    return found


def linear(**fields: Any) -> LinearTopKMethod:
    found = run_with(it={"kind": "linear_topk", **fields}).dictionaries["it"]
    assert isinstance(found, LinearTopKMethod)
    return found


@pytest.mark.parametrize(
    ("of", "k", "nonnegative", "rtol", "weighting"),
    [
        ("ksvd", 8, False, 0.1, "std"),
        ("plus", 8, True, 0.1, "std"),
        ("topk", 4, True, 0.0, "none"),
        ("pca", 8, False, 0.0, "none"),
        ("random", 2, False, 0.0, "none"),
    ],
)
def test_what_is_left_open_is_the_others(of: str, k: int, nonnegative: bool, rtol: float, weighting: str) -> None:
    found = recoded(of=of)
    assert (found.coder, found.k, found.nonnegative, found.rtol) == ("omp", k, nonnegative, rtol)
    assert found.weighting == WeightingConfig(kind=weighting)  # type: ignore[arg-type]


def test_what_is_said_stays() -> None:
    found = recoded(of="ksvd", coder="mp", k=3, nonnegative=True, rtol=0.5, weighting="none")
    assert (found.coder, found.k, found.nonnegative, found.rtol) == ("mp", 3, True, 0.5)
    assert found.weighting == WeightingConfig()
    assert not linear(of="ksvd", signed=False).signed
    assert linear(of="topk", signed=True).signed


@pytest.mark.parametrize(("of", "signed"), [("ksvd", True), ("plus", False), ("topk", False), ("random", True)])
def test_signs_of_a_linear_encoder_are_the_others(of: str, signed: bool) -> None:
    assert linear(of=of).signed is signed


def test_order_in_the_file_does_not_matter() -> None:
    first = {"it": {"kind": "recoded", "of": "topk"}, **LEARNED}
    assert parse_config({**RAW, "dictionaries": first}).dictionaries["it"].k == 4


def test_round_trip() -> None:
    run = run_with(a={"kind": "recoded", "of": "topk"}, b={"kind": "linear_topk", "of": "ksvd", "passes": 2})
    assert parse_config(yaml.safe_load(dump_config(run))) == run


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {"it": {"kind": "recoded", "of": "kvsd"}},
            r"dictionaries\.it\.of: no dictionary 'kvsd'.*there are ksvd, plus",
        ),
        ({"it": {"kind": "recoded"}}, r"dictionaries\.it\.of: Field required"),
        ({"it": {"kind": "recoded", "of": "it"}}, r"dictionaries\.it\.of: goes round in a circle \(it -> it\)"),
        (
            {"a": {"kind": "recoded", "of": "b"}, "b": {"kind": "linear_topk", "of": "a"}},
            r"dictionaries\.a\.of: goes round in a circle \(a -> b -> a\)",
        ),
        (
            {"a": {"kind": "recoded", "of": "b"}, "b": {"kind": "recoded", "of": "topk"}},
            r"dictionaries\.a\.of: 'b' has its atoms from another \(a -> b -> topk\); name that one: of: topk",
        ),
        (
            {"it": {"kind": "recoded", "of": "topk", "k": 33}},
            r"dictionaries\.it: k = 33 is above the 32 atoms of 'topk'",
        ),
        ({"it": {"kind": "recoded", "of": "pca", "k": 9}}, "k = 9 is above the 8 atoms of 'pca'"),
        ({"it": {"kind": "linear_topk", "of": "random", "k": 17}}, "k = 17 is above the 16 atoms of 'random'"),
        (
            {"own": {**KSVD, "seed": 1}, "it": {"kind": "recoded", "of": "own", "seed": 2}},
            r"dictionaries\.it: seed = 2, but 'own' is trained with seed 1",
        ),
        (
            {"it": {"kind": "linear_topk", "of": "pca"}},
            r"dictionaries\.it\.of: 'pca' has as many atoms as it uses: TopK has nothing to choose",
        ),
        (
            {"all": {"kind": "identity"}, "it": {"kind": "recoded", "of": "all"}},
            r"dictionaries\.it\.of: 'all' has no atoms of its own",
        ),
        ({"it": {"kind": "recoded", "of": "topk", "coder": "ormp"}}, "coder 'ormp' has signs; use 'omp'"),
        ({"it": {"kind": "recoded", "of": "topk", "view": "split"}}, "view 'split' needs signs"),
        ({"it": {"kind": "recoded", "of": "topk", "weighting": "fisher"}}, r"needs gradients; set harvest\.gradient_t"),
        ({"it": {"kind": "linear_topk", "of": "ksvd", "coder": "omp"}}, r"unknown key 'dictionaries\.it\.coder'"),
        ({"it": {"kind": "recoded", "of": "ksvd", "codr": "omp"}}, r"did you mean 'dictionaries\.it\.coder'"),
    ],
)
def test_mistakes_are_named(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        run_with(**more)


def test_ormp_with_signs_may_be() -> None:
    assert recoded(of="topk", coder="ormp", nonnegative=False).coder == "ormp"
    assert recoded(of="ksvd", coder="ormp", view="both").nonnegative is False


def test_encoder_vs_dictionary_is_a_whole_grid() -> None:
    """Every dictionary in both metrics, under a linear encoder, MP and OMP, none with signs; names say all."""
    run = load_config(EVAL_CONFIGS / "encoder-vs-dictionary.yaml")
    learned = {name: method for name, method in run.dictionaries.items() if method.source is None}
    assert len(learned) == 6
    assert not any(method.uses_both_signs for method in run.dictionaries.values())
    assert {method.metric.kind for method in learned.values()} == {"none", "fisher_diag"}
    for name, method in learned.items():
        assert method.metric.kind == ("fisher_diag" if name.endswith("-fisher") else "none")
        coded = {n: other for n, other in run.dictionaries.items() if other.source == name}
        coders = {other.coder_label for other in coded.values()} | {method.coder_label} - {"own encoder"}
        assert coders == {"linear TopK", "MP", "OMP"}
        assert {n: f"{name}.{getattr(c, 'coder', 'linear')}" for n, c in coded.items()} == {n: n for n in coded}
        assert {(other.budget, other.metric.kind) for other in coded.values()} == {(20, method.metric.kind)}
