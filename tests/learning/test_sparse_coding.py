"""The coders against the float64 reference and scikit-learn, and the invariants that any code must keep."""

from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.linear_model import orthogonal_mp_gram
from torch import Tensor
from torch.nn.functional import normalize

from ksvd_sae.errors import ActivationError, DictionaryError, KsvdSaeError, ShapeError
from ksvd_sae.learning import backends, least_squares, reference, sparse_coding
from ksvd_sae.learning.backends import coder_backend
from ksvd_sae.learning.sparse_coding import (
    CODERS,
    Code,
    Coder,
    encode,
    matching_pursuit,
    orthogonal_matching_pursuit,
    project,
    refit_code,
)
from tests import tolerances
from tests.strategies import (
    DTYPES,
    EDGE_CASES,
    Problem,
    dtypes,
    generator,
    generic,
    problems,
    unit_atoms,
    with_near_duplicates,
)

Array = NDArray[np.float64]
# "mp" takes the backend of the machine: numba in float32 on a CPU; "mp_torch" is the version that runs anywhere;
# "+" is non-negative.
BOTH = ("mp", "mp_torch", "mp_refit", "mp_refit_torch", "omp", "omp_torch")
GREEDY = (*BOTH, "ormp", "ormp_torch", *(f"{coder}+" for coder in BOTH))


def run(coder: str, problem: Problem, k: int | None = None, **options: Any) -> Code:
    """A coder by its name in the tests: '+' for non-negative, '_torch' for the version that runs anywhere."""
    k = problem.k if k is None else k
    name = coder.rstrip("+")
    options |= {"nonnegative": coder.endswith("+"), "backend": "torch" if name.endswith("_torch") else "auto"}
    name = name.removesuffix("_torch")
    if "memory_bytes" in options:  # not an option of encode
        if name == "ormp":
            options["choice"] = "error"
        pursue = cast(Callable[..., Code], matching_pursuit if name == "mp" else orthogonal_matching_pursuit)
        return pursue(problem.x_BD, problem.atoms_MD, k, **options)
    return encode(problem.x_BD, problem.atoms_MD, k, coder=cast(Coder, name), **options)


def dense(code: Code, n_atoms: int) -> Array:
    """The code as float64 (B, M), written out here so that it does not rest on Code.to_dense."""
    out = np.zeros((len(code), n_atoms))
    for row, (values, support) in enumerate(zip(code.values_BK.tolist(), code.support_BK.tolist(), strict=True)):
        for value, atom in zip(values, support, strict=True):
            out[row, atom] += value
    return out


def residual(problem: Problem, code: Code) -> Array:
    atoms = problem.atoms_MD.double().numpy()
    rest: Array = problem.x_BD.double().numpy() - dense(code, len(atoms)) @ atoms
    return rest


def errors(problem: Problem, code: Code) -> Array:
    """‖residual‖ / ‖x‖ of each sample; 0 for a zero sample that is coded as zero."""
    norms = np.linalg.norm(problem.x_BD.double().numpy(), axis=1)
    relative: Array = np.linalg.norm(residual(problem, code), axis=1) / np.where(norms > 0, norms, 1)
    return relative


def reference_codes(problem: Problem, coder: str, rtol: float = 0.0, tau: float = 0.0) -> Array:
    """(B, M) by the slow float64 coders; refit is least squares on their support."""
    x, atoms = problem.x_BD.double().numpy(), problem.atoms_MD.double().numpy()
    signed = not coder.endswith("+")
    codes = np.zeros((len(x), len(atoms)))
    for row, sample in enumerate(x):
        stop: dict[str, float] = {"rtol": rtol, "floor": tau * float(np.linalg.norm(sample))}
        if coder.startswith("ormp"):
            codes[row] = reference.order_recursive_matching_pursuit(sample, atoms, problem.k, **stop)
            continue
        if coder.startswith("omp"):
            slow = (
                reference.orthogonal_matching_pursuit if signed else reference.nonnegative_orthogonal_matching_pursuit
            )
            codes[row] = slow(sample, atoms, problem.k, **stop)
            continue
        codes[row] = reference.matching_pursuit(sample, atoms, problem.k, None, nonnegative=not signed, **stop)
        used = np.flatnonzero(codes[row])
        if "refit" in coder and len(used):
            solve = reference.nonnegative_least_squares
            codes[row, used] = (
                np.linalg.lstsq(atoms[used].T, sample, rcond=None)[0] if signed else solve(sample, atoms[used])
            )
    return codes


def assert_agrees(problem: Problem, code: Code, expected: Array, dtype: torch.dtype, unique: bool = True) -> None:
    """Same products and errors; same coefficients and supports too, where the problem has but one answer."""
    x, atoms = problem.x_BD.double().numpy(), problem.atoms_MD.double().numpy()
    scale = np.linalg.norm(x, axis=1, keepdims=True)
    got, wanted = residual(problem, code), x - expected @ atoms
    error_gap = np.abs(np.linalg.norm(got, axis=1) - np.linalg.norm(wanted, axis=1))
    # The coders follow ‖r‖² by subtraction and stop where it vanishes in rounding.
    solved = np.linalg.norm(wanted, axis=1) <= tolerances.SOLVED[dtype] * scale[:, 0]
    assert (error_gap <= np.where(solved, tolerances.SOLVED[dtype], tolerances.CODE_ERROR[dtype]) * scale[:, 0]).all()
    got, wanted, expected, scale = got[~solved], wanted[~solved], expected[~solved], scale[~solved]
    code = Code(code.values_BK[torch.from_numpy(~solved)], code.support_BK[torch.from_numpy(~solved)])
    if not unique:
        return
    assert (np.abs(got @ atoms.T - wanted @ atoms.T) <= tolerances.CODE_ERROR[dtype] * scale).all()
    found, limit = dense(code, len(atoms)), tolerances.COEFFICIENT[dtype] * scale
    assert (np.abs(found - expected) <= limit).all()
    # An atom whose coefficient is rounding noise may be in one support only.
    assert ((found != 0) | (np.abs(expected) <= limit)).all()
    assert ((expected != 0) | (np.abs(found) <= limit)).all()


class TestAgainstReference:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("coder", GREEDY)
    @pytest.mark.parametrize("case", EDGE_CASES)
    def test_edge_cases(self, case: str, coder: str, dtype: torch.dtype) -> None:
        problem = EDGE_CASES[case].to(dtype)
        code = run(coder, problem)
        assert code.values_BK.shape == code.support_BK.shape == (len(problem.x_BD), problem.k)
        assert (code.values_BK.dtype, code.support_BK.dtype) == (dtype, torch.int32)
        assert_agrees(problem, code, reference_codes(problem, coder), dtype, unique=case != "duplicate atoms")

    @pytest.mark.parametrize("coder", GREEDY)
    @given(problem=problems("generic", "zero rows", "coherent"))
    def test_float64(self, coder: str, problem: Problem) -> None:
        code = run(coder, problem)
        assert_agrees(problem, code, reference_codes(problem, coder), torch.float64)

    @pytest.mark.parametrize("coder", GREEDY)
    def test_float32_errors_and_supports_at_a_realistic_shape(self, coder: str) -> None:
        problem = generic(101, 37, 83, 9, seed=3).to(torch.float32)
        code = run(coder, problem)
        expected = reference_codes(problem, coder)
        same = ((dense(code, 83) != 0) == (expected != 0)).all(axis=1)
        assert same.mean() >= tolerances.SUPPORT_AGREEMENT_FLOAT32
        rows = torch.from_numpy(np.flatnonzero(same))
        subset = Problem(problem.x_BD[rows], problem.atoms_MD, problem.k)
        assert_agrees(subset, Code(code.values_BK[rows], code.support_BK[rows]), expected[same], torch.float32)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("coder", [c for c in GREEDY if "refit" not in c])
    @pytest.mark.parametrize("rtol", [0.9, 0.5, 0.2])
    def test_rtol_stops_at_the_same_step(self, rtol: float, coder: str, dtype: torch.dtype) -> None:
        problem = generic(41, 9, 21, 7, seed=5).to(dtype)
        code = run(coder, problem, rtol=rtol)
        assert_agrees(problem, code, reference_codes(problem, coder, rtol), dtype)
        stopped = code.l0().numpy() < problem.k
        assert stopped.any(), "the case must have samples that rtol stops"
        assert (errors(problem, code)[stopped] <= rtol + tolerances.CODE_ERROR[dtype]).all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("coder", GREEDY)
    @pytest.mark.parametrize("tau", [0.6, 0.35, 0.2])
    def test_tau_leaves_what_is_small(self, tau: float, coder: str, dtype: torch.dtype) -> None:
        problem = generic(41, 9, 21, 7, seed=5).to(dtype)
        code = run(coder, problem, tau=tau)
        assert_agrees(problem, code, reference_codes(problem, coder, tau=tau), dtype)
        l0 = code.l0()
        assert l0.min() < l0.max() or tau == 0.6, "the case must have samples that tau stops earlier than others"
        assert (l0 < problem.k).any()
        # What is left has no product above the bound, where k was not the end: refits only make it smaller.
        if coder.startswith("mp") and "refit" not in coder:
            left = residual(problem, code) @ problem.atoms_MD.double().numpy().T
            sizes = (left if coder.endswith("+") else np.abs(left)).max(axis=1)
            bound = (tau + tolerances.CODE_ERROR[dtype]) * np.linalg.norm(problem.x_BD.double().numpy(), axis=1)
            assert (sizes <= bound)[l0.numpy() < problem.k].all()

    @pytest.mark.parametrize("scale", [1.0, 2.0**-60, 2.0**60])
    @pytest.mark.parametrize("coder", GREEDY)
    def test_tau_absolute_is_in_the_units_of_the_samples(self, coder: str, scale: float) -> None:
        problem = generic(41, 9, 21, 7, seed=5).to(torch.float32)
        norms_B1 = torch.linalg.vector_norm(problem.x_BD, dim=1, keepdim=True)
        of_norm_2 = Problem(2 * scale * problem.x_BD / norms_B1, problem.atoms_MD, problem.k)
        relative, absolute = run(coder, of_norm_2, tau=0.3), run(coder, of_norm_2, tau_absolute=0.6 * scale)
        assert (relative.l0() < problem.k).any()
        assert ((relative.l0() == absolute.l0()).double().mean()) > 0.95, "but for rounding at the bound"
        assert torch.equal(relative.support_BK[:, 0], absolute.support_BK[:, 0])
        neither = run(coder, of_norm_2, tau=0.3, tau_absolute=0.1 * scale)
        assert torch.equal(neither.values_BK, relative.values_BK), "the larger of the two counts"

    @pytest.mark.parametrize("backend", ["torch", "numba"])
    def test_choice_by_error_is_not_the_choice_by_product(self, backend: Literal["torch", "numba"]) -> None:
        """The second atom is near the first: its product with what is left is small, but so is what of it is new."""
        first, near, new = (1.0, 0.0, 0.0), (0.8, 0.6, 0.0), (0.0, 0.0, 1.0)
        atoms_MD = torch.tensor([first, near, new])
        x_BD = torch.tensor([[2.0, 0.3, 0.25]])
        supports = {
            choice: orthogonal_matching_pursuit(x_BD, atoms_MD, 2, choice=choice, backend=backend).support_BK.tolist()
            for choice in ("product", "error")
        }
        assert supports == {"product": [[0, 2]], "error": [[0, 1]]}

    @pytest.mark.parametrize("max_steps", [1, 2, 5, 30])
    def test_max_steps(self, max_steps: int) -> None:
        problem = generic(23, 9, 21, 3, seed=6)
        code = matching_pursuit(problem.x_BD, problem.atoms_MD, problem.k, max_steps=max_steps)
        x, atoms = problem.x_BD.numpy(), problem.atoms_MD.numpy()
        expected = np.stack([reference.matching_pursuit(sample, atoms, 3, max_steps) for sample in x])
        assert_agrees(problem, code, expected, torch.float64)

    def test_an_atom_may_be_picked_again(self) -> None:
        """Two atoms at 60 degrees: MP comes back to each of them, a plain 'k picks' does not get there."""
        atoms_MD = torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5]], dtype=torch.float64)
        x_BD = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
        problem = Problem(x_BD, atoms_MD, 2)
        two_picks = matching_pursuit(x_BD, atoms_MD, 2, max_steps=2)
        eight_picks = matching_pursuit(x_BD, atoms_MD, 2)
        assert errors(problem, eight_picks)[0] < 0.1 * errors(problem, two_picks)[0]
        assert_agrees(problem, eight_picks, reference_codes(problem, "mp"), torch.float64)

    @pytest.mark.parametrize("coder", ["mp", "mp_torch", "omp", "ormp"])
    def test_ties_go_to_the_lowest_index(self, coder: str) -> None:
        atoms_MD = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, -1, 0], [1, 0, 0]])
        code = run(coder, Problem(torch.tensor([[2.0, 2, 0], [0, 2, 2], [-3, 0, 0]]), atoms_MD, 1))
        assert code.support_BK.tolist() == [[1], [0], [1]]
        assert code.values_BK.tolist() == [[2], [2], [-3]]

    @pytest.mark.parametrize("coder", ["mp", "mp_torch", "omp", "ormp"])
    def test_ties_of_atoms_that_are_far_apart(self, coder: str) -> None:
        """The compiled loop looks for the largest product in blocks of atoms."""
        atoms_MD = torch.eye(2)[[1] * 300]
        atoms_MD[[5, 150, 290]] = torch.eye(2)[0]
        code = run(coder, Problem(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), atoms_MD, 1))
        assert code.support_BK.tolist() == [[5], [0]]

    @pytest.mark.parametrize("coder", GREEDY)
    def test_given_gram_changes_nothing(self, coder: str) -> None:
        problem = generic(17, 9, 21, 4).to(torch.float32)
        gram_MM = problem.atoms_MD @ problem.atoms_MD.T
        plain = run(coder, problem)
        given_gram = run(coder, problem, gram_MM=gram_MM)
        assert torch.equal(plain.values_BK, given_gram.values_BK)
        assert torch.equal(plain.support_BK, given_gram.support_BK)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_precision_samples_are_coded_in_float32(self, dtype: torch.dtype) -> None:
        problem = generic(9, 7, 13, 3).to(torch.float32)
        half = matching_pursuit(problem.x_BD.to(dtype), problem.atoms_MD, 3)
        full = matching_pursuit(problem.x_BD.to(dtype).float(), problem.atoms_MD, 3)
        assert half.values_BK.dtype == torch.float32
        assert torch.equal(half.values_BK, full.values_BK)
        assert torch.equal(half.support_BK, full.support_BK)


class TestBackends:
    """The compiled loop against the torch version; both have already met the reference above."""

    @pytest.mark.parametrize("rtol", [0.0, 0.3])
    @pytest.mark.parametrize("n_atoms", [1, 2, 127, 128, 129, 255, 300])
    def test_numba_and_torch_agree(self, n_atoms: int, rtol: float) -> None:
        """Sizes around the kernel's block of 128 atoms."""
        pytest.importorskip("numba", reason="numba is optional")
        problem = generic(203, 33, n_atoms, min(n_atoms, 9), seed=n_atoms).to(torch.float32)
        codes = [
            matching_pursuit(problem.x_BD, problem.atoms_MD, problem.k, rtol=rtol, backend=backend)
            for backend in ("torch", "numba")
        ]
        gap = np.abs(dense(codes[0], n_atoms) - dense(codes[1], n_atoms)).max(axis=1)
        scale = np.linalg.norm(problem.x_BD.double().numpy(), axis=1)
        same = gap <= tolerances.COEFFICIENT[torch.float32] * scale
        assert same.mean() >= tolerances.SUPPORT_AGREEMENT_FLOAT32
        error_gap = np.abs(errors(problem, codes[0]) - errors(problem, codes[1]))
        assert (error_gap[same] <= tolerances.CODE_ERROR[torch.float32]).all()

    @pytest.mark.parametrize("backend", ["torch", "numba"])
    def test_number_of_threads_does_not_matter(self, backend: Literal["torch", "numba"]) -> None:
        """The compiled loop runs a sample on each thread: none may write where another reads."""
        pytest.importorskip("numba", reason="numba is optional")
        problem = generic(509, 33, 129, 9, seed=1).to(torch.float32)
        codes = []
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            codes.append(matching_pursuit(problem.x_BD, problem.atoms_MD, problem.k, backend=backend))
        gap = np.abs(dense(codes[0], 129) - dense(codes[1], 129)).max(axis=1)
        scale = np.linalg.norm(problem.x_BD.double().numpy(), axis=1)
        assert (gap <= tolerances.CHUNKING[torch.float32] * scale).mean() >= tolerances.SUPPORT_AGREEMENT_FLOAT32

    def test_auto_says_what_it_takes(self) -> None:
        cpu = torch.device("cpu")
        assert coder_backend(cpu, dtype=torch.float64) == "torch"
        assert coder_backend(torch.device("cuda"), dtype=torch.float64) == "torch"
        assert coder_backend(cpu, "torch") == "torch"
        assert coder_backend(cpu) == ("numba" if find_spec("numba") else "torch")

    def test_without_numba(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends, "find_spec", lambda name: None)
        assert coder_backend(torch.device("cpu")) == "torch"
        with pytest.raises(ShapeError, match="numba is not installed"):
            coder_backend(torch.device("cpu"), "numba")

    def test_forced_where_it_cannot_run(self) -> None:
        pytest.importorskip("numba", reason="numba is optional")
        with pytest.raises(ShapeError, match=r"(?s)float32, not torch\.float64.*cure"):
            matching_pursuit(X.double(), ATOMS.double(), 2, backend="numba")
        with pytest.raises(ShapeError, match="not on cuda"):
            coder_backend(torch.device("cuda"), "numba")

    def test_unknown(self) -> None:
        with pytest.raises(ShapeError, match=r"(?s)'jax'.*auto, torch, numba"):
            matching_pursuit(X, ATOMS, 2, backend="jax")  # type: ignore[arg-type]


class TestNonNegative:
    @pytest.mark.parametrize("coder", [coder for coder in GREEDY if coder.endswith("+")])
    @given(problem=problems("generic", "zero rows", "coherent"), dtype=dtypes)
    def test_no_coefficient_is_negative(self, coder: str, problem: Problem, dtype: torch.dtype) -> None:
        assert bool((run(coder, problem.to(dtype)).values_BK >= 0).all())

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_signed_mp_is_non_negative_mp_over_both_signs(self, dtype: torch.dtype) -> None:
        """With one step an atom (max_steps = k), D and [D; −D] give the same reconstructions."""
        problem = generic(53, 17, 31, 6, seed=8).to(dtype)
        both = Problem(problem.x_BD, torch.cat([problem.atoms_MD, -problem.atoms_MD]), problem.k)
        signed = residual(problem, run("mp", problem, max_steps=problem.k))
        split = residual(both, run("mp+", both, max_steps=problem.k))
        scale = np.linalg.norm(problem.x_BD.double().numpy(), axis=1)
        same = np.linalg.norm(signed - split, axis=1) <= tolerances.CODE_ERROR[dtype] * scale
        assert same.mean() >= tolerances.SUPPORT_AGREEMENT_FLOAT32

    def test_a_picked_atom_leaves_again(self) -> None:
        """The sum of two atoms is the closest single atom's neighbour: once both are in, the first is not needed."""
        atoms_MD = torch.nn.functional.normalize(torch.tensor([[1.0, 1.0, 0.1], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
        problem = Problem(torch.tensor([[1.0, 1.0, 0.0]]), atoms_MD, 3)
        for coder in ("omp+", "omp_torch+"):
            code = dense(run(coder, problem), 3)
            assert np.abs(code - np.array([[0.0, 1.0, 1.0]])).max() <= tolerances.COEFFICIENT[torch.float32]

    def test_refit_is_nonnegative_least_squares(self) -> None:
        problem = generic(61, 9, 21, 5, seed=2)
        code = run("mp+", problem)
        again = refit_code(problem.x_BD, code, problem.atoms_MD, nonnegative=True)
        assert_agrees(problem, again, reference_codes(problem, "mp_refit+"), torch.float64)
        assert bool((errors(problem, again) <= errors(problem, code) + tolerances.RISE[torch.float64]).all())

    def test_choice_by_error_has_signs(self) -> None:
        with pytest.raises(ShapeError, match=r"(?s)'error' has no non-negative form.*cure"):
            encode(X, ATOMS, 2, coder="ormp", nonnegative=True)

    def test_projection_has_signs(self) -> None:
        with pytest.raises(ShapeError, match="a projection has signs"):
            encode(X, torch.eye(X.shape[1])[:2], 2, coder="projection", nonnegative=True)


class TestPrecision:
    def test_bfloat16_products_cost_little(self) -> None:
        problem = generic(301, 64, 128, 8, seed=4).to(torch.float32)
        full = errors(problem, run("mp", problem))
        low = errors(problem, run("mp", problem, precision="bfloat16"))
        assert np.sqrt((low**2).mean()) <= (1 + tolerances.BFLOAT16) * np.sqrt((full**2).mean()) + tolerances.BFLOAT16

    def test_small_picks_are_right_beside_a_direction_that_all_share(self) -> None:
        """ORMP divides what is left by what is new in an atom: rounding of what all share would drown it."""
        problem = generic(301, 64, 128, 8, seed=4).to(torch.float32)
        shared_D = normalize(torch.randn(64, generator=generator(0)), dim=0)
        atoms_MD = normalize(problem.atoms_MD + 2 * shared_D, dim=1)
        x_BD = problem.x_BD + 100 * torch.randn(301, 1, generator=generator(1)) * shared_D
        for coder in ("omp", "ormp"):
            full, low = (
                float((x_BD - encode(x_BD, atoms_MD, 8, coder=coder, precision=precision).reconstruct(atoms_MD)).norm())
                for precision in ("float32", "bfloat16")
            )
            assert low <= 1.005 * full  # 1.011 and 1.019 where all is rounded

    def test_refit_is_from_the_samples_themselves(self) -> None:
        """Rounded products may choose other atoms, but the coefficients are least squares all the same."""
        problem = generic(101, 64, 128, 8, seed=4).to(torch.float32)
        code = run("mp_refit", problem, precision="bfloat16")
        again = refit_code(problem.x_BD, code, problem.atoms_MD)
        gap = np.abs(errors(problem, code) - errors(problem, again))
        assert gap.max() <= tolerances.CODE_ERROR[torch.float32]

    @pytest.mark.parametrize(
        ("precision", "dtype", "words"),
        [
            ("bfloat16", torch.float64, "ask for float64"),
            ("int4", torch.float32, "no precision 'int4'"),
        ],
    )
    def test_refused(self, precision: Any, dtype: torch.dtype, words: str) -> None:
        with pytest.raises(ShapeError, match=f"(?s){words}.*cure"):
            matching_pursuit(X.to(dtype), ATOMS.to(dtype), 2, precision=precision)


class TestAgainstScikitLearn:
    @pytest.mark.parametrize("shape", [(31, 11, 23, 5), (13, 17, 7, 4), (7, 5, 19, 1)], ids=str)
    def test_omp_gram(self, shape: tuple[int, int, int, int]) -> None:
        problem = generic(*shape, seed=7)
        atoms = problem.atoms_MD.numpy()
        expected = orthogonal_mp_gram(
            atoms @ atoms.T, atoms @ problem.x_BD.numpy().T, n_nonzero_coefs=problem.k, copy_Gram=True, copy_Xy=True
        )
        code = orthogonal_matching_pursuit(problem.x_BD, problem.atoms_MD, problem.k)
        assert_agrees(problem, code, np.asarray(expected).reshape(len(atoms), -1).T, torch.float64)


class TestInvariants:
    @pytest.mark.parametrize("coder", GREEDY)
    @given(problem=problems(), dtype=dtypes)
    def test_support_is_small_distinct_and_in_range(self, coder: str, problem: Problem, dtype: torch.dtype) -> None:
        problem = problem.to(dtype)
        code = run(coder, problem)
        assert code.values_BK.isfinite().all()
        assert ((code.support_BK >= 0) & (code.support_BK < len(problem.atoms_MD))).all()
        for values, support in zip(code.values_BK, code.support_BK, strict=True):
            used = support[values != 0].tolist()
            assert len(used) == len(set(used)) <= problem.k

    @pytest.mark.parametrize("coder", GREEDY)
    @given(problem=problems(), dtype=dtypes)
    def test_error_is_at_most_the_sample(self, coder: str, problem: Problem, dtype: torch.dtype) -> None:
        problem = problem.to(dtype)
        code = run(coder, problem)
        assert (errors(problem, code) <= 1 + tolerances.RISE[dtype]).all()

    @pytest.mark.parametrize("coder", GREEDY)
    @given(problem=problems("generic", "zero rows", "coherent", "duplicates"))
    def test_error_never_rises_in_k(self, coder: str, problem: Problem) -> None:
        by_k = [errors(problem, run(coder, problem, k)) for k in range(1, problem.k + 1)]
        for fewer, more in pairwise(by_k):
            assert (more <= fewer + tolerances.RISE[torch.float64]).all()

    @given(problem=problems("generic", "zero rows", "coherent", "duplicates"), dtype=dtypes)
    def test_omp_residual_is_orthogonal_to_its_atoms(self, problem: Problem, dtype: torch.dtype) -> None:
        problem = problem.to(dtype)
        code = orthogonal_matching_pursuit(problem.x_BD, problem.atoms_MD, problem.k)
        products = residual(problem, code) @ problem.atoms_MD.double().numpy().T
        scale = np.linalg.norm(problem.x_BD.double().numpy(), axis=1, keepdims=True)
        used = dense(code, len(problem.atoms_MD)) != 0
        assert (np.abs(products)[used] <= (tolerances.ORTHOGONAL[dtype] * scale * np.ones_like(products))[used]).all()

    @given(problem=problems(), dtype=dtypes)
    def test_refit_never_raises_the_error(self, problem: Problem, dtype: torch.dtype) -> None:
        problem = problem.to(dtype)
        code = matching_pursuit(problem.x_BD, problem.atoms_MD, problem.k)
        refitted = refit_code(problem.x_BD, code, problem.atoms_MD)
        assert torch.equal(refitted.support_BK, code.support_BK)
        assert ((refitted.values_BK != 0) <= (code.values_BK != 0)).all(), "refit must not use an unused slot"
        assert (errors(problem, refitted) <= errors(problem, code) + tolerances.RISE[dtype]).all()

    @pytest.mark.parametrize("distance", [3e-5, 1e-4, 3e-4, 1e-3, 1e-2])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_refit_never_raises_the_error_of_nearly_equal_atoms(self, dtype: torch.dtype, distance: float) -> None:
        """In float32 the Gram entries of such a pair say nothing about the angle between them."""
        problem = with_near_duplicates(generic(201, 6, 6, 4, seed=11), distance).to(dtype)
        code = matching_pursuit(problem.x_BD, problem.atoms_MD, problem.k)
        refitted = refit_code(problem.x_BD, code, problem.atoms_MD)
        rise = errors(problem, refitted) - errors(problem, code)
        assert rise.max() <= tolerances.RISE[dtype]

    @pytest.mark.parametrize("distance", [3e-5, 1e-4, 3e-4, 1e-3, 1e-2])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_omp_keeps_its_error_with_nearly_equal_atoms(self, dtype: torch.dtype, distance: float) -> None:
        """OMP may leave out an atom that depends on the others; it may not be worse than with one atom fewer."""
        problem = with_near_duplicates(generic(201, 6, 6, 4, seed=11), distance).to(dtype)
        fewer = orthogonal_matching_pursuit(problem.x_BD, problem.atoms_MD, problem.k - 1)
        more = orthogonal_matching_pursuit(problem.x_BD, problem.atoms_MD, problem.k)
        assert (errors(problem, more) <= errors(problem, fewer) + tolerances.DEPENDENT_ATOM[dtype]).all()

    @pytest.mark.parametrize("coder", ["mp", "mp_torch"])
    @given(problem=problems(), dtype=dtypes, power=st.integers(-20, 20), rtol=st.sampled_from([0.0, 0.3]))
    def test_mp_is_homogeneous(self, coder: str, problem: Problem, dtype: torch.dtype, power: int, rtol: float) -> None:
        """Scaling by a power of two is exact in floating point, so it must be exact in the code."""
        problem = problem.to(dtype)
        scaled_problem = Problem(problem.x_BD * 2.0**power, problem.atoms_MD, problem.k)
        plain, scaled = run(coder, problem, rtol=rtol), run(coder, scaled_problem, rtol=rtol)
        assert torch.equal(scaled.support_BK, plain.support_BK)
        assert torch.equal(scaled.values_BK, plain.values_BK * 2.0**power)

    @pytest.mark.parametrize("coder", ["mp", "mp_torch", "omp", "ormp"])
    @pytest.mark.parametrize("scale", [1e-25, 1e25])
    def test_any_scale_that_float32_holds_is_coded(self, coder: str, scale: float) -> None:
        """Squares of these overflow or vanish in float32; a silent zero code would look like a dead sample."""
        problem = generic(5, 6, 10, 3).to(torch.float32)
        scaled = Problem(problem.x_BD * scale, problem.atoms_MD, 3)
        plain_errors = errors(problem, run(coder, problem))
        scaled_errors = errors(scaled, run(coder, scaled))
        assert np.abs(scaled_errors - plain_errors).max() <= tolerances.CODE_ERROR[torch.float32]

    @pytest.mark.parametrize("coder", GREEDY)
    @given(problem=problems("generic", "zero rows", "coherent"), seed=st.integers(0, 2**31))
    def test_permuting_and_flipping_atoms(self, coder: str, problem: Problem, seed: int) -> None:
        """Flipping only for signed codes."""
        n_atoms = len(problem.atoms_MD)
        assume(problem.x_BD.shape[1] > 1)  # in one dimension all atoms tie
        # By error all new atoms tie at the last pick of k = d.
        assume(not (coder.startswith("ormp") and problem.k == problem.x_BD.shape[1]))
        draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(n_atoms, generator=draw)
        signs_M = torch.randint(0, 2, (n_atoms,), generator=draw).double() * 2 - 1
        if coder.endswith("+"):
            signs_M = torch.ones_like(signs_M)
        moved_MD = signs_M[:, None] * problem.atoms_MD[order]
        plain = dense(run(coder, problem), n_atoms)
        moved = dense(run(coder, Problem(problem.x_BD, moved_MD, problem.k)), n_atoms)
        scale = np.linalg.norm(problem.x_BD.numpy(), axis=1, keepdims=True)
        gap = np.abs(moved - plain[:, order.numpy()] * signs_M.numpy())
        limit = (
            tolerances.EQUIVARIANCE
            if coder.rstrip("+") in ("mp", "mp_torch")
            else tolerances.COEFFICIENT[torch.float64]
        )
        assert (gap <= limit * scale).all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("coder", ["mp", "mp_torch", "omp", "omp_torch", "omp_torch+", "ormp", "ormp_torch"])
    @pytest.mark.parametrize("memory_bytes", [1, 5_000, 50_000])
    def test_chunk_size_does_not_matter(self, memory_bytes: int, coder: str, dtype: torch.dtype) -> None:
        problem = generic(67, 11, 29, 5, seed=9).to(dtype)
        whole, chunked = run(coder, problem), run(coder, problem, memory_bytes=memory_bytes)
        gap = np.abs(dense(whole, 29) - dense(chunked, 29)).max(axis=1)
        assert (gap <= tolerances.CHUNKING[dtype] * np.linalg.norm(problem.x_BD.double().numpy(), axis=1)).all()

    @pytest.mark.parametrize("coder", GREEDY)
    def test_samples_are_coded_independently(self, coder: str) -> None:
        """Samples that finish at different steps share a chunk: none may see another's steps."""
        problem = generic(66, 9, 22, 6, seed=13)
        problem.x_BD[::3] = problem.atoms_MD  # these finish after one step
        together = residual(problem, run(coder, problem))
        for row, x_D in enumerate(problem.x_BD):
            one = Problem(x_D[None], problem.atoms_MD, 6)
            assert np.abs(together[row] - residual(one, run(coder, one))[0]).max() <= tolerances.COEFFICIENT[x_D.dtype]


class TestProject:
    @given(problem=problems("generic"), dtype=dtypes)
    def test_is_least_squares(self, problem: Problem, dtype: torch.dtype) -> None:
        assume(len(problem.atoms_MD) <= problem.x_BD.shape[1])
        rows_MD = torch.linalg.qr(problem.atoms_MD.T).Q.T.contiguous()
        problem = Problem(problem.x_BD, rows_MD, problem.k).to(dtype)
        code = project(problem.x_BD, problem.atoms_MD)
        solved = np.linalg.lstsq(problem.atoms_MD.double().numpy().T, problem.x_BD.double().numpy().T, rcond=None)[0]
        assert_agrees(problem, code, solved.T, dtype)

    def test_encode_by_name_is_project(self) -> None:
        x_BD = generic(5, 4, 3, 1).x_BD
        code = encode(x_BD, torch.eye(4, dtype=torch.float64)[:3], 3, coder="projection")
        assert torch.equal(code.values_BK, x_BD[:, :3])

    def test_refuses_atoms_that_are_not_orthonormal(self) -> None:
        with pytest.raises(DictionaryError, match="not orthonormal"):
            project(torch.ones(2, 4), unit_atoms(3, 4, dtype=torch.float32))


class TestCode:
    CODE = Code(
        torch.tensor([[2.0, -1.0], [3.0, 0.0], [0.0, 0.0]]), torch.tensor([[1, 0], [2, 0], [0, 0]], dtype=torch.int32)
    )

    def test_l0_usage_dense_and_length(self) -> None:
        assert len(self.CODE) == 3
        assert self.CODE.l0().tolist() == [2, 1, 0]
        assert self.CODE.usage(4).tolist() == [1, 1, 1, 0]
        assert self.CODE.to_dense(4).tolist() == [[-1, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 0]]

    @given(problem=problems(), dtype=dtypes)
    def test_reconstruct_is_the_dense_product(self, problem: Problem, dtype: torch.dtype) -> None:
        problem = problem.to(dtype)
        code = matching_pursuit(problem.x_BD, problem.atoms_MD, problem.k)
        wanted = dense(code, len(problem.atoms_MD)) @ problem.atoms_MD.double().numpy()
        gap = np.abs(code.reconstruct(problem.atoms_MD).double().numpy() - wanted)
        scale = np.linalg.norm(problem.x_BD.double().numpy(), axis=1, keepdims=True)
        assert (gap <= tolerances.CODE_ERROR[dtype] * scale).all()

    @pytest.mark.parametrize("coder", CODERS)
    def test_no_samples(self, coder: Coder) -> None:
        atoms_MD = torch.eye(4)[:3]
        code = encode(torch.empty(0, 4), atoms_MD, 3, coder=coder)
        assert len(code) == 0
        assert code.reconstruct(atoms_MD).shape == (0, 4)
        assert code.to_dense(3).shape == (0, 3)
        assert code.usage(3).tolist() == [0, 0, 0]
        assert code.l0().shape == (0,)


X, ATOMS = generic(5, 4, 6, 2).x_BD.float(), unit_atoms(6, 4, dtype=torch.float32)


def spoilt(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[2, 1] = value
    return tensor


# name: (samples, atoms, k, error, words that its message must hold)
BAD_INPUTS: dict[str, tuple[Tensor, Tensor, int, type[KsvdSaeError], tuple[str, ...]]] = {
    "NaN sample": (spoilt(X, float("nan")), ATOMS, 2, ActivationError, ("1 of 5 samples", "row 2", "cause", "cure")),
    "infinite sample": (spoilt(X, float("inf")), ATOMS, 2, ActivationError, ("1 of 5", "row 2", "cause", "cure")),
    "atoms not unit": (X, ATOMS * 1.01, 2, DictionaryError, ("6 of 6 atoms", "norm 1.01", "limit", "cure")),
    "a zero atom": (X, ATOMS * torch.arange(6).clamp(max=1)[:, None], 2, DictionaryError, ("1 of 6", "atom 0", "cure")),
    "NaN atom": (X, spoilt(ATOMS, float("nan")), 2, DictionaryError, ("1 of 6", "atom 2", "cure")),
    "infinite atom": (X, spoilt(ATOMS, float("inf")), 2, DictionaryError, ("1 of 6", "atom 2", "cure")),
    "k above d": (X, ATOMS, 5, ShapeError, ("k = 5", "1 to 4", "(6, 4)")),
    "k above M": (X, ATOMS[:3], 4, ShapeError, ("k = 4", "1 to 3", "(3, 4)")),
    "k = 0": (X, ATOMS, 0, ShapeError, ("k = 0", "1 to 4")),
    "other width": (X[:, :3], ATOMS, 2, ShapeError, ("(5, 3)", "(6, 4)", "cause")),
    "one-dimensional samples": (X[0], ATOMS, 2, ShapeError, ("(4,)", "(B, D)")),
    "one-dimensional atoms": (X, ATOMS[0], 2, ShapeError, ("(4,)", "(M, D)")),
    "integer samples": (X.long(), ATOMS, 2, ShapeError, ("floating point", "int64")),
}


class TestBadInput:
    @pytest.mark.parametrize("coder", GREEDY)
    @pytest.mark.parametrize("case", BAD_INPUTS)
    def test_greedy_coders(self, case: str, coder: str) -> None:
        x_BD, atoms_MD, k, error, words = BAD_INPUTS[case]
        with pytest.raises(error) as caught:
            run(coder, Problem(x_BD, atoms_MD, k))
        operation = "orthogonal_matching_pursuit" if coder.startswith("o") else "matching_pursuit"
        message = str(caught.value)
        assert message.startswith(f"{operation}: ")
        assert [word for word in words if word not in message] == []

    def test_unknown_coder(self) -> None:
        with pytest.raises(KsvdSaeError, match=r"(?s)'lars'.*mp_refit"):
            encode(X, ATOMS, 2, coder="lars")  # type: ignore[arg-type]

    @pytest.mark.parametrize("coder", ["mp", "omp"])
    @pytest.mark.parametrize(
        "options",
        [
            {"rtol": -1.0},
            {"rtol": float("nan")},
            {"rtol": float("inf")},
            {"tau": -0.1},
            {"tau_absolute": float("nan")},
            {"memory_bytes": -5},
        ],
        ids=str,
    )
    def test_limits(self, coder: str, options: dict[str, Any]) -> None:
        with pytest.raises(ShapeError, match=f"(?s){next(iter(options))} must be.*got.*cure"):
            run(coder, Problem(X, ATOMS, 2), **options)

    def test_unknown_choice(self) -> None:
        with pytest.raises(ShapeError, match=r"(?s)'luck'.*product, error"):
            orthogonal_matching_pursuit(X, ATOMS, 2, choice="luck")  # type: ignore[arg-type]

    def test_no_steps(self) -> None:
        with pytest.raises(ShapeError, match="max_steps"):
            matching_pursuit(X, ATOMS, 2, max_steps=0)

    @pytest.mark.parametrize("shape", [(7, 7), (6, 1), (6, 5)], ids=str)
    @pytest.mark.parametrize("coder", GREEDY)
    def test_gram_of_other_atoms(self, coder: str, shape: tuple[int, int]) -> None:
        """A (M, 1) Gram matrix broadcasts: without a check it gives a wrong code and no error."""
        with pytest.raises(ShapeError, match="gram"):
            run(coder, Problem(X, ATOMS, 2), gram_MM=torch.ones(shape))

    def test_refit_of_another_batch(self) -> None:
        with pytest.raises(ShapeError, match="refit"):
            refit_code(X, matching_pursuit(X[:2], ATOMS, 2), ATOMS)


class TestRefitFromLeft:
    """What a refit on CUDA solves, from the products that the pursuit left; here on the CPU."""

    @pytest.mark.parametrize("nonnegative", [False, True])
    @pytest.mark.parametrize("gram_bytes", [1 << 30, 8 * 16 * 7], ids=["at once", "seven at a time"])
    def test_is_the_refit_from_the_samples(
        self, nonnegative: bool, gram_bytes: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(least_squares, "_GRAM_BYTES", gram_bytes)
        problem = generic(50, 20, 33, 4, seed=5)
        gram_MM = problem.atoms_MD @ problem.atoms_MD.T
        options: dict[str, Any] = {"gram_MM": gram_MM, "nonnegative": nonnegative}
        code, left_BK = sparse_coding.pursued(problem.x_BD, problem.atoms_MD, 4, **options)
        # A slot that is not used.
        code.values_BK[3, -1] = 0
        left_BK[3] = (problem.x_BD[3] - code.reconstruct(problem.atoms_MD)[3]) @ problem.atoms_MD[
            code.support_BK[3].long()
        ].T
        wanted = least_squares.refit_code(
            problem.x_BD, code, problem.atoms_MD, gram_MM, nonnegative=nonnegative
        ).values_BK
        pivots_B = least_squares.refit_from_left(gram_MM, code, left_BK, nonnegative)
        assert (code.values_BK - wanted).abs().max() <= tolerances.COEFFICIENT[torch.float64]
        assert code.values_BK[3, -1] == 0
        assert (pivots_B > least_squares.DEPENDENT).all()

    def test_supports_that_nearly_depend_are_told(self) -> None:
        atoms_MD = torch.eye(4, dtype=torch.float64)[:3].clone()
        atoms_MD[1] = torch.tensor([1, 1e-3, 0, 0], dtype=torch.float64) / (1 + 1e-6) ** 0.5
        code = Code(torch.ones(1, 2, dtype=torch.float64), torch.tensor([[0, 1]], dtype=torch.int32))
        left_BK = torch.zeros(1, 2, dtype=torch.float64)
        assert least_squares.refit_from_left(atoms_MD @ atoms_MD.T, code, left_BK, False)[0] < least_squares.DEPENDENT
