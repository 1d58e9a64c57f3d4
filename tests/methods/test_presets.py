"""Presets of DB-KSVD: options by one name, which what is written beside it overrules."""

from typing import Any, get_args

import pytest
from pydantic import ValidationError

from ksvd_sae.methods.db_ksvd import DBKSVDMethod, Preset, preset_options

SIZES: dict[str, Any] = {"n_atoms": 64, "k": 20}


@pytest.mark.parametrize("preset", get_args(Preset))
def test_is_the_options_that_it_stands_for(preset: Preset) -> None:
    """And is trained as they are: the key of a training is the same."""
    named = DBKSVDMethod(preset=preset, **SIZES)
    written = DBKSVDMethod(**SIZES, **preset_options(preset, 20))
    assert named.model_dump(exclude={"preset"}) == written.model_dump(exclude={"preset"})
    assert named.key() == written.key()
    assert named.key() != DBKSVDMethod(**SIZES).key()
    assert DBKSVDMethod.model_validate(named.model_dump()) == named


def test_what_is_written_beside_it_counts() -> None:
    method = DBKSVDMethod.model_validate({**SIZES, "preset": "features", "train_k": 2, "init": "data"})
    assert (method.train_k, method.init, method.nonnegative) == (2, "data", True)
    assert method.varied(seed=3).train_k == 2


def test_learns_with_a_third_of_the_atoms() -> None:
    found = {k: DBKSVDMethod(preset="features", n_atoms=64, k=k).train_k for k in (1, 2, 5, 20, 40)}
    assert found == {1: 1, 2: 1, 5: 2, 20: 7, 40: 13}


@pytest.mark.parametrize("raw", [{"preset": "feature", **SIZES}, {"preset": "features", "n_atoms": 64}, {"preset": []}])
def test_what_is_wrong_is_an_error_of_its_key(raw: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        DBKSVDMethod.model_validate(raw)
    assert caught.value.errors()[0]["loc"][0] in ("preset", "k", "n_atoms")
