"""Activations at the ends of what their type holds: unit atoms and finite codes, or our own error; never NaN."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ksvd_sae.activations.statistics import outlier_limit, row_norms
from ksvd_sae.dictionary import Dictionary
from ksvd_sae.errors import ActivationError, ConstantSamplesError, KsvdSaeError, ShapeError
from ksvd_sae.learning.coding import Coding
from ksvd_sae.learning.dbksvd import DictionaryLearner, LearnerOptions
from ksvd_sae.sae import sae_from_dictionary
from tests import tolerances
from tests.activations.test_harvest import Reader
from tests.activations.test_harvest import run as run_harvest
from tests.strategies import generator, generic, unit_atoms

N, D, M, K = 200, 8, 12, 3
X_ND = torch.randn(N, D, generator=generator(0))
LARGEST = torch.finfo(torch.float32).max
UP_TO_1 = X_ND / X_ND.abs().max()


def one_row_times(scale: float) -> Tensor:
    x_ND = UP_TO_1.clone()
    x_ND[7] *= scale / x_ND[7].abs().max()
    return x_ND


# name: samples, what training about their mean raises, what it raises without a centre, what coding raises
Case = tuple[Tensor, type[KsvdSaeError] | None, type[KsvdSaeError] | None, type[KsvdSaeError] | None]
CASES: dict[str, Case] = {
    "1e30": (X_ND * 1e30, None, None, None),
    "subnormal": (X_ND * 1e-40, None, None, None),
    "least number": (torch.where(X_ND > 0, 1e-45, 0.0), None, None, None),
    "of 1e-44 to 1e37": (X_ND * torch.logspace(-44, 37, N)[:, None], None, None, None),
    "largest float16": (torch.where(X_ND > 0, 65504.0, -65504.0).half(), None, None, None),
    "one row of 1e30": (one_row_times(1e30), None, ShapeError, None),
    "1e30, and little beside": (X_ND * 1e24 + 1e30, None, None, None),
    "zero": (torch.zeros(N, D), ConstantSamplesError, ConstantSamplesError, None),
    "all equal": (torch.full((N, D), 3.0), ConstantSamplesError, ConstantSamplesError, None),
    "all 1e30": (torch.full((N, D), 1e30), ConstantSamplesError, ConstantSamplesError, None),
    "all subnormal": (torch.full((N, D), 1e-42), ConstantSamplesError, ConstantSamplesError, None),
    "NaN": (X_ND * math.nan, ActivationError, ActivationError, ActivationError),
    "infinite": (X_ND * math.inf, ActivationError, ActivationError, ActivationError),
    "float16 that overflowed": ((X_ND * 1e5).half(), ActivationError, ActivationError, ActivationError),
    "above float32": (X_ND.double() * 1e300, ActivationError, ActivationError, ActivationError),
}
CODINGS = {
    **{coder: Coding(K, coder=coder) for coder in ("mp", "mp_refit", "omp", "ormp")},
    **{f"{coder}, nonnegative": Coding(K, coder=coder, nonnegative=True) for coder in ("mp_refit", "omp")},
    "matryoshka": Coding(K, coder="matryoshka", groups=(4, 8)),
    "projection": Coding(D, coder="projection"),
}


def atoms_for(coding: Coding) -> Tensor:
    whole = coding.coder == "projection"
    return torch.linalg.qr(unit_atoms(D, D))[0].float() if whole else unit_atoms(M, D, dtype=torch.float32)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("update", ["sweep", "two_sweeps", "exact"])
@pytest.mark.parametrize("groups", [None, (4, 8)], ids=["plain", "groups"])
@pytest.mark.parametrize("centre", [True, False], ids=["centred", "raw"])
@pytest.mark.parametrize("batches", [False, True], ids=["fit", "partial_fit"])
def test_training(case: str, update: Any, groups: Any, centre: bool, batches: bool) -> None:
    x_ND, error = CASES[case][0], CASES[case][1 if centre else 2]
    options = LearnerOptions(
        M, Coding(K, groups=groups), update=update, centre=centre, passes=2, batch_samples=100, duplicate_cosine=0.9
    )
    learner = DictionaryLearner(options, device="cpu")

    def learn() -> None:
        if batches:
            learner.partial_fit(x_ND[:100]).partial_fit(x_ND[100:])
        else:
            learner.fit(x_ND)

    if error is not None:
        with pytest.raises(error, match="DB-KSVD"):
            learn()
        return
    learn()
    assert (learner.atoms_MD.norm(dim=1) - 1).abs().max() < 1e-5
    assert torch.isfinite(learner.centre_D).all()
    assert all(math.isfinite(line.fvu) and math.isfinite(line.fvu_after_update) for line in learner.log)
    rebuilt_ND = learner.decode(learner.encode(x_ND))
    assert torch.isfinite(rebuilt_ND).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gradient", [False, True], ids=["plain", "gradient"])
def test_sae(case: str, coding: str, dtype: str, gradient: bool) -> None:
    x_ND, error = CASES[case][0].clone().requires_grad_(gradient), CASES[case][3]
    dictionary = Dictionary(atoms_for(CODINGS[coding]), torch.zeros(D), CODINGS[coding])
    sae = sae_from_dictionary(dictionary, model_name="some/model", hook_name="blocks.0.hook_resid_post", dtype=dtype)
    if error is not None:
        with pytest.raises(error, match=f"{N} of {N} samples|of {N} samples hold NaN or infinity"):
            sae.encode(x_ND)
        return
    latents_NF = sae.encode(x_ND)
    assert torch.isfinite(latents_NF).all()
    assert torch.isfinite(sae.decode(latents_NF)).all()
    if gradient:
        latents_NF.sum().backward()  # type: ignore[no-untyped-call]
        assert x_ND.grad is not None
        assert torch.isfinite(x_ND.grad).all()


@pytest.mark.parametrize("coding", [name for name in CODINGS if name != "projection"])
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("floor", [{}, {"tau": 0.1}, {"tau_absolute": 0.1}], ids=str)
def test_a_row_of_another_size_changes_no_other(coding: str, scale: float, floor: dict[str, float]) -> None:
    own, atoms_MD = replace(CODINGS[coding], **floor), atoms_for(CODINGS[coding])  # type: ignore[arg-type]
    x_BD = generic(20, D, M, K).x_BD.float()
    plain, odd_B = own.encode(x_BD, atoms_MD).to_dense(M), torch.arange(20) == 7
    scaled = own.encode(torch.where(odd_B[:, None], x_BD * scale, x_BD), atoms_MD).to_dense(M)
    assert torch.equal(scaled[~odd_B], plain[~odd_B])
    if "tau_absolute" not in floor:
        assert (scaled[7] / scale - plain[7]).abs().max() <= tolerances.CODE_ERROR[torch.float32] + 1e-3 * (
            scale < 1e-38
        )
    else:
        assert (scaled[7] == 0).all() == (scale < 1)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("backend", ["float32", "float64"])
def test_coefficients_above_their_type(coding: str, backend: str) -> None:
    """Each number of the sample is finite; its norm, and what codes it, is not."""
    dtype = getattr(torch, backend)
    own, atoms_MD = CODINGS[coding], atoms_for(CODINGS[coding]).to(dtype)
    x_BD = torch.stack([torch.ones(D, dtype=dtype), atoms_MD[0].sign() * torch.finfo(dtype).max])
    with pytest.raises(ActivationError, match=rf"(?s)1 of 2 samples have coefficients that {backend}.*limit.*cure"):
        own.encode(x_BD, atoms_MD)
    assert torch.isfinite(own.encode(x_BD / 8, atoms_MD).values_BK).all()


@pytest.mark.parametrize("coding", ["matryoshka", "projection"])
@pytest.mark.parametrize("scale", [2.0**-120, 2.0**120])
def test_any_scale_with_a_floor(coding: str, scale: float) -> None:
    """tau of a norm that float32 does not hold was NaN, and no atom passed it."""
    own, atoms_MD = CODINGS[coding], atoms_for(CODINGS[coding])
    if coding == "matryoshka":
        own = Coding(K, coder="matryoshka", groups=(4, 8), tau=0.1)
    x_BD = generic(20, D, M, K).x_BD.float()
    plain, scaled = own.encode(x_BD, atoms_MD), own.encode(x_BD * scale, atoms_MD)
    assert torch.equal(scaled.support_BK, plain.support_BK)
    assert (scaled.values_BK / scale - plain.values_BK).abs().max() <= tolerances.CODE_ERROR[torch.float32]


def test_rows_that_are_nothing_beside_others_give_no_atoms() -> None:
    x_ND = normalize(X_ND, dim=1) * torch.where(torch.arange(N) % 2 == 0, 1e-14, 1.0)[:, None]
    learner = DictionaryLearner(LearnerOptions(N // 2, Coding(K), centre=False, redraw="data"), device="cpu").fit(x_ND)
    assert (learner.atoms_MD.norm(dim=1) - 1).abs().max() < 1e-5
    with pytest.raises(ShapeError, match=r"(?s)100 samples, n_atoms = 101.*nothing beside them"):
        DictionaryLearner(LearnerOptions(N // 2 + 1, Coding(K), centre=False), device="cpu").fit(x_ND)


# ---------------------------------------------------------------- harvests


class Scaled(Reader):
    """Activations of another size, a few of them of another again."""

    scale, loud, n_loud = 1.0, 1.0, 0

    def read(self, tokens_BL: Tensor) -> Tensor:
        x_ND = super().read(tokens_BL) * self.scale
        x_ND[::40] *= self.loud
        self.n_loud += len(x_ND[::40])
        return x_ND


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("scale", "loud"), [(1e-30, 1e3), (1e26, 1e3), (1e-44, 1e10), (1e-10, 1e30)], ids=str)
def test_harvest(scale: float, loud: float, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outliers are told apart at every size, and statistics are numbers."""
    monkeypatch.setattr(Scaled, "scale", scale)
    monkeypatch.setattr(Scaled, "loud", loud)
    reader = Scaled()
    shards = run_harvest(tmp_path / "a" / "harvest", reader, dtype=dtype)
    x_ND, statistics = shards.tensor(), shards.statistics
    assert sum(part["outliers"] for part in shards.manifest["parts"].values()) == reader.n_loud
    norms_N = x_ND.double().norm(dim=1)
    assert float(norms_N.max()) < 4 * float(norms_N.median())
    assert statistics.median_norm == pytest.approx(float(norms_N.median()), rel=0.01)
    assert 0 < statistics.scale < math.inf
    assert torch.isfinite(statistics.centre_D).all()


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1.0, 1e30])
def test_norms(size: float) -> None:
    rows_ND = torch.zeros(3, D)
    rows_ND[:2] = size
    norms_N = row_norms(rows_ND)
    assert norms_N[:2].tolist() == pytest.approx([size * D**0.5] * 2, rel=1e-3)
    assert norms_N[2] == 0


@pytest.mark.parametrize(
    ("norms", "factor", "words"),
    [
        ([math.inf, math.inf, 1.0], 4.0, "overflow"),
        ([math.nan, 1.0, 1.0], None, "overflow"),
        ([0.0, 0.0, 1.0], 4.0, "zeros for most tokens"),
    ],
)
def test_norms_of_which_none_is_in_the_middle(norms: list[float], factor: float | None, words: str) -> None:
    with pytest.raises(ActivationError, match=rf"(?s)outlier filter.*got.*{words}.*cure"):
        outlier_limit(torch.tensor(norms), factor)


def test_tokens_of_zeros() -> None:
    assert outlier_limit(torch.zeros(3), 4.0) == (0, 0)
    assert outlier_limit(torch.tensor([0.0, 0.0, 1.0]), None) == (0, math.inf)
