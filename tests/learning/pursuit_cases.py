"""What the Triton coders must do on any device: on a GPU, and on the CPU through Triton's interpreter.

Triton decides when it is imported whether it interprets, so ``TestInterpreted`` needs a process of its own:
test_pursuit_triton.py starts one on this file, with TRITON_INTERPRET=1.
"""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ksvd_sae.errors import ShapeError
from ksvd_sae.learning import reference
from ksvd_sae.learning.kernels import pursuit_triton
from ksvd_sae.learning.sparse_coding import Choice, Code, matching_pursuit, orthogonal_matching_pursuit
from tests import tolerances
from tests.strategies import EDGE_CASES, Problem, generic, with_near_duplicates, with_zero_rows

Array = NDArray[np.float64]
FLOAT32 = torch.float32
# All products at once, or in blocks of 8 in memory: as 65,536 atoms would be, in blocks of 1,024.
BLOCKS = {"one block": pursuit_triton.REGISTERS_M, "blocks of 8": 8}
# Ties have no one answer, and zero pivots differ by rounding: only the error is compared.
NOT_UNIQUE = ("duplicate atoms",)


@dataclass
class Result:
    """A code on the CPU, and what pursue says is left along its atoms."""

    code: Code
    left_CK: Tensor

    def dense(self, n_atoms: int) -> Array:
        out: Array = self.code.to_dense(n_atoms).double().numpy()
        return out


def code(
    problem: Problem,
    device: torch.device,
    kind: str = "mp",
    *,
    max_steps: int | None = None,
    rtol: float = 0.0,
    tau: float = 0.0,
    nonnegative: bool = False,
    gram_dtype: torch.dtype = FLOAT32,
    block: int = pursuit_triton.REGISTERS_M,
) -> Result:
    x_BD, atoms_MD, k = problem.x_BD.to(device, FLOAT32), problem.atoms_MD.to(device, FLOAT32), problem.k
    gram_MM = (atoms_MD @ atoms_MD.T).to(gram_dtype)
    values_BK = torch.zeros(len(x_BD), k, device=device)
    support_BK = torch.zeros(len(x_BD), k, dtype=torch.int32, device=device)
    left_BK = torch.zeros(len(x_BD), k, device=device)
    energy_B = (x_BD * x_BD).sum(dim=1)
    chunk = (x_BD @ atoms_MD.T, energy_B, tau * energy_B.sqrt(), gram_MM, k)
    if kind != "mp":
        out = (values_BK, support_BK, block)
        pursuit_triton.pursue_orthogonally(*chunk, rtol, nonnegative, kind == "ormp", *out)
    else:
        steps = 4 * k if max_steps is None else max_steps
        pursuit_triton.pursue(*chunk, steps, rtol, nonnegative, values_BK, support_BK, left_BK, block)
    return Result(Code(values_BK.cpu(), support_BK.cpu()), left_BK.cpu())


def expected(problem: Problem, kind: str, max_steps: int | None = None, rtol: float = 0.0, tau: float = 0.0) -> Array:
    """(B, M) by the slow float64 coders."""
    x, atoms = problem.x_BD.double().numpy(), problem.atoms_MD.double().numpy()
    codes = np.zeros((len(x), len(atoms)))
    for row, sample in enumerate(x):
        stop: dict[str, float] = {"rtol": rtol, "floor": tau * float(np.linalg.norm(sample))}
        if kind == "ormp":
            codes[row] = reference.order_recursive_matching_pursuit(sample, atoms, problem.k, **stop)
        elif kind == "omp":
            codes[row] = reference.orthogonal_matching_pursuit(sample, atoms, problem.k, **stop)
        else:
            codes[row] = reference.matching_pursuit(sample, atoms, problem.k, max_steps, **stop)
    return codes


def nonnegative_expected(problem: Problem) -> Array:
    """Matching pursuit that picks the largest product and stops when none is above 0, from residuals."""
    x, atoms = problem.x_BD.double().numpy(), problem.atoms_MD.double().numpy()
    codes = np.zeros((len(x), len(atoms)))
    for sample, dense in zip(x, codes, strict=True):
        for _ in range(4 * problem.k):
            products = atoms @ (sample - dense @ atoms)
            best = int(products.argmax())
            if products[best] <= 0 or (dense[best] == 0 and np.count_nonzero(dense) == problem.k):
                break
            dense[best] += products[best]
    return codes


def assert_agrees(problem: Problem, got: Array, wanted: Array, unique: bool = True) -> None:
    """The same error of every sample; the same supports and coefficients too where there is but one answer."""
    x, atoms = problem.x_BD.double().numpy(), problem.atoms_MD.double().numpy()
    scale = np.linalg.norm(x, axis=1)
    error_gap = np.linalg.norm(x - got @ atoms, axis=1) - np.linalg.norm(x - wanted @ atoms, axis=1)
    assert (np.abs(error_gap) <= tolerances.CODE_ERROR[FLOAT32] * scale).all()
    if unique:
        # Supports by this too: an atom in one of them only has the other's coefficient, 0, to answer for.
        assert (np.abs(got - wanted) <= tolerances.COEFFICIENT[FLOAT32] * scale[:, None]).all()


def assert_well_formed(result: Result, problem: Problem) -> None:
    """Distinct atoms of the dictionary, used slots first, exact zeros after them."""
    for values, support, left in zip(
        result.code.values_BK.tolist(), result.code.support_BK.tolist(), result.left_CK.tolist(), strict=True
    ):
        n_used = sum(value != 0 for value in values)
        assert all(value != 0 for value in values[:n_used])
        assert len(set(support[:n_used])) == n_used
        assert all(0 <= atom < len(problem.atoms_MD) for atom in support)
        rest = (*values[n_used:], *support[n_used:], *left[n_used:])
        assert not any(rest)


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
class PursuitCases:
    """Subclasses say where by ``device``, and how many samples of a table's case are enough."""

    device = torch.device("cpu")
    most_samples = 1000

    @pytest.mark.parametrize("kind", ["mp", "omp", "ormp"])
    @pytest.mark.parametrize("case", EDGE_CASES)
    def test_edge_cases(self, case: str, kind: str, block: int) -> None:
        problem = EDGE_CASES[case].to(FLOAT32)
        problem = Problem(problem.x_BD[: self.most_samples], problem.atoms_MD, problem.k)
        result = code(problem, self.device, kind, block=block)
        assert_well_formed(result, problem)
        got = result.dense(len(problem.atoms_MD))
        if kind == "ormp" and problem.k == problem.x_BD.shape[1]:
            # The last pick solves a sample whatever new atom it is: by error all of them tie.
            scale = problem.x_BD.double().norm(dim=1)
            gap_B = (problem.x_BD.double() - torch.from_numpy(got) @ problem.atoms_MD.double()).norm(dim=1)
            assert (gap_B <= tolerances.SOLVED[FLOAT32] * scale).all()
            return
        assert_agrees(problem, got, expected(problem, kind), unique=case not in NOT_UNIQUE)

    @pytest.mark.parametrize("kind", ["mp", "omp", "ormp"])
    def test_same_picks_as_torch(self, kind: str, block: int) -> None:
        problem = generic(3, 17, 43, 4, seed=3).to(FLOAT32)
        result = code(problem, self.device, kind, block=block)
        if kind != "mp":
            choice: Choice = "error" if kind == "ormp" else "product"
            other = orthogonal_matching_pursuit(problem.x_BD, problem.atoms_MD, problem.k, choice=choice)
        else:
            other = matching_pursuit(problem.x_BD, problem.atoms_MD, problem.k, backend="torch")
        assert torch.equal(result.code.support_BK, other.support_BK), "in the order of the picks"
        assert_agrees(problem, result.dense(43), other.to_dense(43).double().numpy())

    @pytest.mark.parametrize("kind", ["mp", "omp", "ormp"])
    def test_rtol_stops_at_the_same_step(self, kind: str, block: int) -> None:
        rtol, problem = 0.5, generic(4, 9, 21, 6, seed=5).to(FLOAT32)
        result = code(problem, self.device, kind, rtol=rtol, block=block)
        assert (result.code.l0() < problem.k).any(), "the case must have samples that rtol stops"
        assert_agrees(problem, result.dense(21), expected(problem, kind, rtol=rtol))

    @pytest.mark.parametrize("tau", [0.6, 0.3])
    @pytest.mark.parametrize("kind", ["mp", "omp", "ormp"])
    def test_tau_leaves_what_is_small(self, kind: str, tau: float, block: int) -> None:
        problem = generic(4, 9, 21, 6, seed=5).to(FLOAT32)
        result = code(problem, self.device, kind, tau=tau, block=block)
        assert (result.code.l0() < problem.k).any(), "the case must have samples that tau stops"
        assert_agrees(problem, result.dense(21), expected(problem, kind, tau=tau))

    @pytest.mark.parametrize("max_steps", [0, 1, 5])
    def test_max_steps(self, max_steps: int, block: int) -> None:
        problem = generic(3, 9, 21, 3, seed=6).to(FLOAT32)
        result = code(problem, self.device, max_steps=max_steps, block=block)
        assert_agrees(problem, result.dense(21), expected(problem, "mp", max_steps=max_steps))

    def test_an_atom_picked_again_adds_to_its_coefficient(self, block: int) -> None:
        problem = generic(3, 4, 6, 2, seed=8).to(FLOAT32)
        once = code(problem, self.device, max_steps=2, block=block).dense(6)
        again = code(problem, self.device, max_steps=40, block=block).dense(6)
        assert (np.abs(again - once) > 1e-2).any(), "the case must have an atom that is picked again"
        assert_agrees(problem, again, expected(problem, "mp", max_steps=40))

    def test_nonnegative(self, block: int) -> None:
        problem = with_zero_rows(generic(6, 7, 13, 4, seed=9)).to(FLOAT32)
        result = code(problem, self.device, nonnegative=True, block=block)
        assert (result.code.values_BK >= 0).all()
        assert_agrees(problem, result.dense(13), nonnegative_expected(problem))

    def test_nonnegative_without_a_positive_product(self, block: int) -> None:
        # A power of two: padding would put in products of 0.
        atoms_MD = generic(1, 5, 8, 1, seed=2).atoms_MD.abs()
        problem = Problem(-atoms_MD[:2].clone(), atoms_MD, 3)
        assert (code(problem, self.device, nonnegative=True, block=block).code.values_BK == 0).all()

    def test_what_is_left_along_the_support(self, block: int) -> None:
        problem = with_zero_rows(generic(4, 11, 29, 4, seed=4)).to(FLOAT32)
        result = code(problem, self.device, block=block)
        residual_BD = problem.x_BD.double() - torch.from_numpy(result.dense(29)) @ problem.atoms_MD.double()
        products_BM = residual_BD @ problem.atoms_MD.double().T
        wanted_BK = products_BM.gather(1, result.code.support_BK.long()) * (result.code.values_BK != 0)
        scale_B1 = problem.x_BD.double().norm(dim=1, keepdim=True)
        assert ((result.left_CK - wanted_BK).abs() <= tolerances.CODE_ERROR[FLOAT32] * scale_B1).all()
        assert (wanted_BK.abs() > 100 * tolerances.CODE_ERROR[FLOAT32] * scale_B1).any(), "MP leaves something"

    @pytest.mark.parametrize("kind", ["mp", "omp", "ormp"])
    def test_ties_go_to_the_lowest_atom(self, kind: str, block: int) -> None:
        # Multiples of 1/8 and axes: all arithmetic is exact, so equal products are equal.
        axes_DD = torch.eye(5)
        atoms_MD = torch.cat([axes_DD, -axes_DD, axes_DD])
        x_BD = torch.tensor([[1, -1, 1, 1, -1], [0.5, 2, -2, 0.125, 0.5], [-3, 0, 0, 3, 0]])
        result = code(Problem(x_BD, atoms_MD, 5), self.device, kind, block=block)
        picks = [
            support[: int(n)] for support, n in zip(result.code.support_BK.tolist(), result.code.l0(), strict=True)
        ]
        assert picks == [[0, 1, 2, 3, 4], [1, 2, 0, 4, 3], [0, 3]]
        assert torch.equal(result.code.to_dense(15)[:, :5], x_BD)

    @pytest.mark.parametrize("kind", ["mp", "omp", "ormp"])
    def test_float16_gram(self, kind: str, block: int) -> None:
        problem = generic(3, 23, 41, 4, seed=7).to(FLOAT32)
        result = code(problem, self.device, kind, gram_dtype=torch.float16, block=block)
        assert_well_formed(result, problem)
        x, atoms = problem.x_BD.double().numpy(), problem.atoms_MD.double().numpy()
        exact = np.linalg.norm(x - expected(problem, kind) @ atoms, axis=1)
        got = np.linalg.norm(x - result.dense(41) @ atoms, axis=1)
        assert (got <= exact + tolerances.BFLOAT16 * np.linalg.norm(x, axis=1)).all()

    @pytest.mark.parametrize("kind", ["omp", "ormp"])
    def test_omp_residual_is_orthogonal_to_the_support(self, kind: str, block: int) -> None:
        problem = generic(2, 20, 31, 9, seed=1).to(FLOAT32)
        result = code(problem, self.device, kind, block=block)
        residual_BD = problem.x_BD.double() - torch.from_numpy(result.dense(31)) @ problem.atoms_MD.double()
        products_BK = (residual_BD @ problem.atoms_MD.double().T).gather(1, result.code.support_BK.long())
        assert (products_BK.abs() <= tolerances.ORTHOGONAL[FLOAT32] * problem.x_BD.norm(dim=1, keepdim=True)).all()

    @pytest.mark.parametrize("distance", [1e-2, 1e-4])
    def test_omp_with_nearly_dependent_atoms(self, distance: float, block: int) -> None:
        problem = with_near_duplicates(generic(6, 8, 12, 4, seed=2), distance).to(FLOAT32)
        gap = self.error(problem, code(problem, self.device, "omp", block=block).dense(12))
        gap -= self.error(problem, expected(problem, "omp"))
        assert (gap <= tolerances.DEPENDENT_ATOM[FLOAT32] * self.error(problem, np.zeros((6, 12)))).all()

    @pytest.mark.parametrize("distance", [1e-2, 1e-4])
    def test_ormp_with_nearly_dependent_atoms(self, distance: float, block: int) -> None:
        """Exactly computed, the difference of two such atoms is as good as an atom; in float32 it is rounding."""
        problem = with_near_duplicates(generic(6, 8, 12, 4, seed=2), distance).to(FLOAT32)
        fewer = Problem(problem.x_BD, problem.atoms_MD, 3)
        by_k = [self.error(p, code(p, self.device, "ormp", block=block).dense(12)) for p in (fewer, problem)]
        scale = self.error(problem, np.zeros((6, 12)))
        assert (by_k[1] <= by_k[0] + tolerances.DEPENDENT_ATOM[FLOAT32] * scale).all()

    def error(self, problem: Problem, dense: Array) -> Array:
        x, atoms = problem.x_BD.double().numpy(), problem.atoms_MD.double().numpy()
        norms: Array = np.linalg.norm(x - dense @ atoms, axis=1)
        return norms

    @pytest.mark.parametrize("kind", ["omp", "ormp"])
    @pytest.mark.parametrize(("angle", "n_picks"), [(1e-2, 2), (8e-4, 1), (1e-4, 1)])
    def test_omp_leaves_out_an_atom_too_close_to_the_others(
        self, angle: float, n_picks: int, kind: str, block: int
    ) -> None:
        atoms_MD = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])
        problem = Problem(torch.tensor([[1.0, 1.0], [2.0, -1.0]]), atoms_MD, 2)
        assert code(problem, self.device, kind, block=block).code.l0().tolist() == [n_picks] * 2

    @pytest.mark.parametrize("kind", ["omp", "ormp"])
    def test_omp_does_not_pick_an_atom_again(self, kind: str, block: int) -> None:
        # Two orthogonal atoms. What rounding leaves of the first product is larger than the second.
        products_CM = torch.tensor([[size, 1e-14] for size in (0.1, 0.3, 0.7, 1.1, 1.3)]).to(self.device)
        gram_MM = torch.diag(torch.tensor([0.987, 1.0])).to(self.device)
        energy_C = 2 * products_CM[:, 0] ** 2
        values_CK, support_CK = torch.zeros_like(products_CM), torch.zeros_like(products_CM, dtype=torch.int32)
        out = (values_CK, support_CK, block)
        chunk = (products_CM, energy_C, torch.zeros_like(energy_C), gram_MM)
        pursuit_triton.pursue_orthogonally(*chunk, 2, 0.0, False, kind == "ormp", *out)
        assert support_CK.tolist() == [[0, 1]] * 5


class TestInterpreted(PursuitCases):
    # An interpreted operation takes some 50 µs, and a program has hundreds.
    most_samples = 3

    @pytest.fixture(autouse=True)
    def interpreter(self) -> None:
        reason = pursuit_triton.why_not(self.device, 10, 3)
        assert reason is None, f"set TRITON_INTERPRET=1 to run this file on its own: {reason}"

    def test_a_tensor_that_does_not_fit_is_refused(self, block: int) -> None:
        def args(**other: Tensor) -> list[Tensor]:
            tensors = {
                "products_CM": torch.zeros(2, 6),
                "energy_C": torch.zeros(2),
                "floor_C": torch.zeros(2),
                "gram_MM": torch.eye(6),
                "values_CK": torch.zeros(2, 3),
                "support_CK": torch.zeros(2, 3, dtype=torch.int32),
                "left_CK": torch.zeros(2, 3),
            }
            return list((tensors | other).values())

        def pursue(**other: Tensor) -> None:
            *chunk, values_CK, support_CK, left_CK = args(**other)
            pursuit_triton.pursue(*chunk, 3, 12, 0.0, False, values_CK, support_CK, left_CK, block)

        pursue()
        for name, tensor in {
            "energy_C": torch.zeros(3),
            "floor_C": torch.zeros(2, dtype=torch.float64),
            "gram_MM": torch.eye(6, dtype=torch.float64),
            "values_CK": torch.zeros(3, 2).T,
            "support_CK": torch.zeros(2, 3, dtype=torch.int64),
            "left_CK": torch.zeros(2, 2),
        }.items():
            with pytest.raises(ShapeError, match=f"{name} does not fit"):
                pursue(**{name: tensor})
