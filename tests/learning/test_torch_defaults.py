"""What torch is set to for a whole process changes no bit of a training or a code, and breaks none."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from ksvd_sae.dictionary import Dictionary
from ksvd_sae.learning.sparse_coding import encode
from ksvd_sae.learning.weighting import weighting_by_std
from tests.learners import learner
from tests.strategies import planted, unit_atoms

X_ND = planted(400, 12, 20, 3, noise=0.1).x_BD + 0.5
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "two sweeps": {"update": "two_sweeps"},
    "exact": {"update": "exact", "atom_batch": 4},
    "random atoms": {"init": "random"},
    "groups": {"groups": (8, 12), "coder": "matryoshka"},
    "non-negative": {"nonnegative": True, "coder": "omp"},
    "weighted": {"weighting": weighting_by_std(X_ND.var(dim=0))},
    "bfloat16": {"precision": "bfloat16", "coder": "ormp"},
    "pushed apart": {"coherence": 0.6, "coder": "mp_refit"},
    "redrawn": {"redraw": "random", "duplicate_cosine": 0.8},
    "drawn from data": {"redraw": "data", "duplicate_cosine": 0.8},
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    # A device on which nothing can be computed shows each tensor that is made where the default says.
    "another device": lambda: torch.device("meta"),
    "no gradients": lambda: torch.inference_mode(),
}


def bits(options: dict[str, Any]) -> list[Tensor]:
    fitted = learner(20, 3, passes=2, batch_samples=130, **options).fit(X_ND)
    by_hand = learner(20, 3, **options)
    for batch_BD in X_ND.split(150):
        by_hand.partial_fit(batch_BD)
    code, dictionary = fitted.encode(X_ND), Dictionary.from_estimator(fitted)
    log = [number for line in fitted.log for number in (line.fvu, line.fvu_after_update, line.l0)]
    tensors = [fitted.atoms_MD, fitted.centre_D, by_hand.atoms_MD, code.values_BK, code.support_BK, fitted.decode(code)]
    return [*tensors, dictionary.decode(dictionary.encode(X_ND)), torch.tensor(log, dtype=torch.float64, device="cpu")]


@pytest.mark.parametrize("case", CASES)
def test_trainings_and_codes(case: str) -> None:
    wanted = bits(CASES[case])
    for name, setting in SETTINGS.items():
        with setting():
            got = bits(CASES[case])
        assert [one.dtype for one in got] == [one.dtype for one in wanted], name
        assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True)), name


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("coder", ["mp", "mp_refit", "omp", "ormp"])
def test_coders(coder: Any, backend: Any) -> None:
    atoms_MD = unit_atoms(20, 12, dtype=torch.float32)
    wanted = encode(X_ND, atoms_MD, 3, coder=coder, backend=backend)
    for name, setting in SETTINGS.items():
        with setting():
            got = encode(X_ND, atoms_MD, 3, coder=coder, backend=backend)
        assert torch.equal(got.values_BK, wanted.values_BK), name
        assert torch.equal(got.support_BK, wanted.support_BK), name
