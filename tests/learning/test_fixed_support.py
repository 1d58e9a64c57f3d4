"""Gradients of codes: against finite differences in float64 with the support held fixed, and where there are none."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ksvd_sae.learning.code import Code
from ksvd_sae.learning.coding import ANY_CODERS, AnyCoder, Coding
from ksvd_sae.learning.fixed_support import _made_again
from tests import tolerances
from tests.strategies import Problem, coherent, generator, generic, with_duplicates, with_zero_rows

STEP = 1e-6
SIGNED = ("ormp", "projection")
every_coder = pytest.mark.parametrize(
    ("coder", "nonnegative"),
    [(coder, positive) for coder in ANY_CODERS for positive in (False, True) if not (positive and coder in SIGNED)],
)
PROBLEMS = {
    "generic": generic(11, 10, 24, 6, 3),
    "coherent": coherent(generic(11, 10, 24, 6, 3)),
    "zero rows": with_zero_rows(generic(9, 10, 24, 6)),
    "one atom": generic(5, 4, 24, 1),
    "one sample": generic(1, 10, 24, 6),
    "no samples": generic(0, 10, 24, 6),
}


def coding_of(coder: AnyCoder, problem: Problem, **options: Any) -> Coding:
    groups = (8, len(problem.atoms_MD) - 8) if coder == "matryoshka" else None
    return Coding(problem.k, coder, groups=groups, **options)


def atoms_for(coder: AnyCoder, problem: Problem) -> Tensor:
    return torch.linalg.qr(problem.atoms_MD[: problem.k].T).Q.T if coder == "projection" else problem.atoms_MD


@dataclass(frozen=True)
class Differentiated:
    code: Code
    to_x_BD: Tensor
    to_atoms_MD: Tensor


def tangential(rows_MD: Tensor, atoms_MD: Tensor) -> Tensor:
    """What is left of rows along the unit sphere at the atoms."""
    return rows_MD - (rows_MD * atoms_MD).sum(dim=1, keepdim=True) * atoms_MD


def differentiated(coding: Coding, x_BD: Tensor, atoms_MD: Tensor, v_BM: Tensor | None = None) -> Differentiated:
    """Gradients of Σ v·z, z the dense code; v is drawn unless given."""
    x_BD, atoms_MD = x_BD.clone().requires_grad_(), atoms_MD.clone().requires_grad_()
    plain = coding.encode(x_BD.detach(), atoms_MD.detach())
    code = coding.with_gradient(plain, x_BD, atoms_MD)
    assert torch.equal(code.values_BK, plain.values_BK), "gradients change no bit"
    assert torch.equal(code.support_BK, plain.support_BK)
    dense_BM = code.to_dense(len(atoms_MD))
    (dense_BM * (drawn_like(dense_BM) if v_BM is None else v_BM)).sum().backward()  # type: ignore[no-untyped-call]
    assert x_BD.grad is not None
    assert atoms_MD.grad is not None
    return Differentiated(plain, x_BD.grad, tangential(atoms_MD.grad, atoms_MD.detach()))


def drawn_like(rows: Tensor, seed: int = 5) -> Tensor:
    return torch.randn(rows.shape, generator=generator(seed), dtype=rows.dtype)


def slope(coding: Coding, x: tuple[Tensor, Tensor], atoms: tuple[Tensor, Tensor], code: Code) -> Tensor:
    """Of Σ v·z along the second of each pair, by a central difference, for each sample: the choice must not move."""
    v_BM = drawn_like(code.to_dense(len(atoms[0])))
    ends = []
    for sign in (1, -1):
        there = coding.encode(x[0] + sign * STEP * x[1], normalize(atoms[0] + sign * STEP * atoms[1], dim=1))
        assert torch.equal(there.support_BK, code.support_BK)
        assert torch.equal(there.values_BK != 0, code.values_BK != 0)
        ends.append((there.to_dense(len(atoms[0])) * v_BM).sum(dim=1))
    return (ends[0] - ends[1]) / (2 * STEP)


@every_coder
@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("options", [{}, {"max_steps": 5}, {"rtol": 0.4}, {"tau": 0.2}, {"tau_absolute": 0.5}], ids=str)
def test_against_finite_differences(coder: AnyCoder, nonnegative: bool, kind: str, options: dict[str, Any]) -> None:
    problem = PROBLEMS[kind]
    atoms_MD, x_BD = atoms_for(coder, problem), problem.x_BD
    coding = coding_of(coder, problem, nonnegative=nonnegative, **options)
    got = differentiated(coding, x_BD, atoms_MD)
    dx_BD, still_BD = drawn_like(x_BD, 6) * (x_BD != 0), torch.zeros_like(x_BD)
    by_x_B = slope(coding, (x_BD, dx_BD), (atoms_MD, torch.zeros_like(atoms_MD)), got.code)
    scale = 1 + float(by_x_B.abs().max()) if len(x_BD) else 1
    assert (got.to_x_BD * dx_BD).sum(dim=1) == pytest.approx(by_x_B, abs=scale * tolerances.FINITE_DIFFERENCE)
    if coder == "projection":
        # Only orthonormal atoms are taken: there is no step to take.
        return
    d_atoms_MD = tangential(drawn_like(atoms_MD, 7), atoms_MD)
    by_atoms = float(slope(coding, (x_BD, still_BD), (atoms_MD, d_atoms_MD), got.code).sum())
    wanted = pytest.approx(by_atoms, abs=(1 + abs(by_atoms)) * tolerances.FINITE_DIFFERENCE)
    assert float((got.to_atoms_MD * d_atoms_MD).sum()) == wanted


def test_projection_to_atoms() -> None:
    problem = PROBLEMS["generic"]
    atoms_MD, v_BM = atoms_for("projection", problem), torch.ones(11, 6, dtype=torch.float64)
    got = differentiated(coding_of("projection", problem), problem.x_BD, atoms_MD, v_BM)
    assert torch.allclose(got.to_atoms_MD, tangential(v_BM.T @ problem.x_BD, atoms_MD))


@every_coder
def test_what_is_not_used_gets_nothing(coder: AnyCoder, nonnegative: bool) -> None:
    problem = PROBLEMS["zero rows"]
    coding = coding_of(coder, problem, nonnegative=nonnegative, tau=0.3)
    got = differentiated(coding, problem.x_BD, atoms_for(coder, problem))
    if coder != "projection":
        assert bool((got.to_x_BD[::2] == 0).all()), "no atom, no coefficient"
    used_M = got.code.usage(len(got.to_atoms_MD)) > 0
    assert bool((got.to_atoms_MD[~used_M] == 0).all())
    assert bool((got.to_atoms_MD[used_M] != 0).any(dim=1).all())


@every_coder
def test_float32_of_the_machines_backend(coder: AnyCoder, nonnegative: bool) -> None:
    problem = generic(200, 10, 24, 6, 3)
    coding, atoms_MD = coding_of(coder, problem, nonnegative=nonnegative), atoms_for(coder, problem)
    x_BD, atoms_MD = problem.x_BD.float(), atoms_MD.float()
    code, exact = coding.encode(x_BD, atoms_MD), coding.encode(x_BD.double(), atoms_MD.double())
    dense_BM, exact_BM = code.to_dense(len(atoms_MD)), exact.to_dense(len(atoms_MD))
    same_B = ((dense_BM != 0) == (exact_BM != 0)).all(dim=1)
    assert float(same_B.double().mean()) > tolerances.SUPPORT_AGREEMENT_FLOAT32
    v_BM = drawn_like(exact_BM) * same_B[:, None]
    got = differentiated(coding, x_BD, atoms_MD, v_BM.float())
    wanted = differentiated(coding, x_BD.double(), atoms_MD.double(), v_BM)
    assert got.to_x_BD.dtype == got.to_atoms_MD.dtype == torch.float32
    for one, exactly in ((got.to_x_BD, wanted.to_x_BD), (got.to_atoms_MD, wanted.to_atoms_MD)):
        assert float((one - exactly).norm() / exactly.norm()) < tolerances.GRADIENT_FLOAT32


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("coder", ["mp", "matryoshka"])
def test_steps_made_again_end_at_the_code(coder: AnyCoder, nonnegative: bool) -> None:
    problem = generic(200, 10, 24, 6, 3).to(torch.float32)
    coding = coding_of(coder, problem, nonnegative=nonnegative)
    code = coding.encode(problem.x_BD, problem.atoms_MD)
    own_BKD, z_BK = problem.atoms_MD[code.support_BK.long()].double(), code.values_BK.double()
    columns = (slice(0, 6),) if coder == "mp" else (slice(0, 3), slice(3, 6))
    slot_TB, size_TB = _made_again(
        own_BKD @ own_BKD.mT,
        (own_BKD @ problem.x_BD.double()[..., None]).squeeze(-1),
        z_BK,
        tuple((slots, 4 * (slots.stop - slots.start)) for slots in columns),
        nonnegative,
        torch.finfo(torch.float32).eps,
    )
    sums_BK = torch.zeros_like(z_BK).scatter_add_(1, slot_TB.T, size_TB.T)
    gap_B = (sums_BK - z_BK).norm(dim=1) / z_BK.norm(dim=1)
    assert float(gap_B.max()) < tolerances.CODE_ERROR[torch.float32]
    assert bool(((size_TB != 0).sum(dim=0) > (z_BK != 0).sum(dim=1)).any()), "some atom is picked again"


def test_atoms_that_depend_on_each_other() -> None:
    """Least norm: its gradient to the sample is that of the pseudoinverse."""
    problem = with_duplicates(generic(7, 5, 8, 4))
    support_BK = torch.tensor([0, 4, 1, 2], dtype=torch.int32).repeat(7, 1)
    own_KD = problem.atoms_MD[support_BK[0].long()]
    inverse_KD = torch.linalg.pinv(own_KD.T)
    code, v_BK = Code(problem.x_BD @ inverse_KD.T, support_BK), torch.ones(7, 4, dtype=torch.float64)
    x_BD, atoms_MD = problem.x_BD.clone().requires_grad_(), problem.atoms_MD.clone().requires_grad_()
    Coding(4, "mp_refit").with_gradient(code, x_BD, atoms_MD).values_BK.sum().backward()  # type: ignore[no-untyped-call]
    assert x_BD.grad is not None
    assert torch.allclose(x_BD.grad, v_BK @ inverse_KD, atol=tolerances.COEFFICIENT[torch.float64])
    assert atoms_MD.grad is not None
    assert bool(torch.isfinite(atoms_MD.grad).all())


def test_a_chunk_of_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = PROBLEMS["generic"]
    for coder in ("mp", "omp"):
        coding = Coding(problem.k, coder)
        whole = differentiated(coding, problem.x_BD, problem.atoms_MD)
        with monkeypatch.context() as few:
            few.setattr("ksvd_sae.learning.fixed_support._GATHERED_BYTES", {"cpu": 3 * 8 * 6 * 10})
            parts = differentiated(coding, problem.x_BD, problem.atoms_MD)
        assert torch.allclose(parts.to_x_BD, whole.to_x_BD)
        assert torch.allclose(parts.to_atoms_MD, whole.to_atoms_MD)


def test_twice_is_refused() -> None:
    problem = PROBLEMS["generic"]
    x_BD = problem.x_BD.clone().requires_grad_()
    coding = Coding(problem.k, "omp")
    code = coding.with_gradient(coding.encode(problem.x_BD, problem.atoms_MD), x_BD, problem.atoms_MD)
    (once_BD,) = torch.autograd.grad(code.values_BK.square().sum(), x_BD, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        once_BD.sum().backward()  # type: ignore[no-untyped-call]
