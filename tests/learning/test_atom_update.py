"""The atom updates: the exact one against the reference, and what both promise about the error."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from ksvd_sae.learning import atom_update, reference
from ksvd_sae.learning.atom_update import (
    AtomUpdate,
    sweep,
    sweep_sums,
    update_atoms_exact,
    update_atoms_sweep,
    update_atoms_two_sweeps,
)
from ksvd_sae.learning.code import Code
from ksvd_sae.learning.sparse_coding import matching_pursuit
from tests import tolerances
from tests.strategies import (
    DTYPES,
    KINDS,
    OVERSHOOTING,
    Problem,
    dtypes,
    generator,
    generic,
    overshooting,
    planted,
    problems,
    unit_atoms,
)

Update = Callable[[Tensor, Code, Tensor], AtomUpdate]


def exact(atom_batch: int) -> Update:
    return lambda x_BD, code, atoms_MD: update_atoms_exact(x_BD, code, atoms_MD, atom_batch=atom_batch)


UPDATES: dict[str, Update] = {
    "sweep": update_atoms_sweep,
    "two sweeps": update_atoms_two_sweeps,
    "sweep, nothing held": partial(update_atoms_sweep, held=0),
    "exact, one atom": exact(1),
    "exact, 3 atoms": exact(3),
    "exact, all atoms": exact(1000),
}
each_update = pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES.keys())


def error(x_BD: Tensor, code: Code, atoms_MD: Tensor) -> float:
    """Σ‖x − x̂‖² in float64, not by Code.reconstruct."""
    x_hat_BD = torch.zeros_like(x_BD, dtype=torch.float64)
    for slot in range(code.values_BK.shape[1]):
        x_hat_BD += code.values_BK[:, slot, None].double() * atoms_MD.double()[code.support_BK[:, slot].long()]
    return float((x_BD.double() - x_hat_BD).pow(2).sum())


def energy(x_BD: Tensor) -> float:
    return float(x_BD.double().pow(2).sum())


def coded(problem: Problem) -> Code:
    return matching_pursuit(problem.x_BD, problem.atoms_MD, problem.k)


class TestAgainstReference:
    @given(problem=problems("generic", "zero rows", "coherent"))
    def test_one_atom_at_a_time_is_k_svd(self, problem: Problem) -> None:
        """Rank-1 products atom·coefficient are unique, the factors only up to sign: both fix ⟨new, old⟩ ≥ 0."""
        code = coded(problem)
        got = update_atoms_exact(problem.x_BD, code, problem.atoms_MD, atom_batch=1)
        n_atoms = len(problem.atoms_MD)
        dense = code.to_dense(n_atoms).numpy()
        atoms, codes = reference.update_atoms(problem.x_BD.numpy(), dense, problem.atoms_MD.numpy())
        scale = np.sqrt(energy(problem.x_BD))
        product_gap = got.code.to_dense(n_atoms).numpy() @ got.atoms_MD.numpy() - codes @ atoms
        assert np.abs(product_gap).max() <= tolerances.EXACT_UPDATE_FLOAT64 * scale
        wanted = float(((problem.x_BD.numpy() - codes @ atoms) ** 2).sum())
        assert abs(got.error_after - wanted) <= tolerances.UPDATE_ERROR[torch.float64] * scale**2

    def test_atoms_and_coefficients_at_a_realistic_shape(self) -> None:
        """Every atom has many users, so its leading direction is well separated: factors can be compared too."""
        problem = generic(400, 13, 29, 4, seed=2)
        code = coded(problem)
        got = update_atoms_exact(problem.x_BD, code, problem.atoms_MD, atom_batch=1)
        atoms, codes = reference.update_atoms(problem.x_BD.numpy(), code.to_dense(29).numpy(), problem.atoms_MD.numpy())
        assert np.abs(got.atoms_MD.numpy() - atoms).max() <= tolerances.EXACT_UPDATE_FLOAT64
        assert (
            np.abs(got.code.to_dense(29).numpy() - codes).max() <= tolerances.EXACT_UPDATE_FLOAT64 * np.abs(codes).max()
        )

    def test_the_generator_gives_the_order(self) -> None:
        problem = generic(200, 9, 17, 4, seed=3)
        code = coded(problem)
        order = torch.randperm(17, generator=generator(5)).tolist()
        assert code.usage(17).min() > 0, "the order below is that of the used atoms"
        got = update_atoms_exact(problem.x_BD, code, problem.atoms_MD, atom_batch=1, generator=generator(5))
        atoms, _ = reference.update_atoms(
            problem.x_BD.numpy(), code.to_dense(17).numpy(), problem.atoms_MD.numpy(), order
        )
        assert np.abs(got.atoms_MD.numpy() - atoms).max() <= tolerances.EXACT_UPDATE_FLOAT64

    def test_a_sweep_of_one_atom_is_a_power_step(self) -> None:
        problem = generic(50, 7, 1, 1, seed=4)
        x, old = problem.x_BD.numpy(), problem.atoms_MD.numpy()
        got = update_atoms_sweep(problem.x_BD, coded(problem), problem.atoms_MD, held=0)
        power_step = (x @ old[0]) @ x
        gap = got.atoms_MD[0].numpy() - power_step / np.linalg.norm(power_step)
        assert np.abs(gap).max() <= tolerances.FIXED_POINT[torch.float64]


class TestSweep:
    @given(problem=problems("generic", "zero rows", "coherent"), rows=st.integers(1, 60), held=st.sampled_from([0, 6]))
    def test_is_one_atom_after_the_other(self, problem: Problem, rows: int, held: float) -> None:
        """Whatever part of the products of atoms is held at a time."""
        code, n_atoms = coded(problem), len(problem.atoms_MD)
        dense = code.to_dense(n_atoms).numpy()
        atoms, codes = reference.sweep_atoms(problem.x_BD.numpy(), dense, problem.atoms_MD.numpy(), held)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(atom_update, "_COUPLINGS", rows)
            got = update_atoms_sweep(problem.x_BD, code, problem.atoms_MD, held=held)
        scale = np.sqrt(energy(problem.x_BD))
        product_gap = got.code.to_dense(n_atoms).numpy() @ got.atoms_MD.numpy() - codes @ atoms
        assert np.abs(product_gap).max() <= tolerances.EXACT_UPDATE_FLOAT64 * scale

    @given(problem=problems(), dtype=dtypes, first=st.floats(0, 1), last=st.floats(0, 1))
    def test_sums_with_and_without_gathering(
        self, problem: Problem, dtype: torch.dtype, first: float, last: float
    ) -> None:
        """Those of the CPU and those of CUDA, which run here too."""
        problem = problem.to(dtype)
        code, n_atoms = coded(problem), len(problem.atoms_MD)
        begin, end = sorted((round(first * (n_atoms - 1)), round(last * (n_atoms - 1))))
        dense_BM = code.to_dense(n_atoms).double()
        left_BD = problem.x_BD.double() - dense_BM @ problem.atoms_MD.double()
        own_BN = dense_BM[:, begin : end + 1]
        # Atoms before the block have moved.
        step_MD = torch.zeros_like(problem.atoms_MD)
        step_MD[:begin] = 0.1 * torch.randn(begin, step_MD.shape[1], generator=generator(1)).to(dtype)
        gradient_ND = own_BN.T @ (left_BD - dense_BM @ step_MD.double())
        limit = tolerances.UPDATE_ERROR[dtype] * (1 + energy(code.values_BK) + energy(problem.x_BD))
        kinds = [sweep_sums(problem.x_BD, code, problem.atoms_MD)[1]]
        for many in (1e9, 0):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(atom_update, "_MANY_ATOMS", many)
                kinds.append(atom_update._multiplied_sums(problem.x_BD, code, problem.atoms_MD, dtype)[1])
        for sums in kinds:
            got_ND, own_NN = sums.block(begin, end + 1, step_MD)
            assert (got_ND - gradient_ND).abs().max() <= limit
            assert (own_NN.tril() - (own_BN.T @ own_BN).tril()).abs().max() <= limit
            assert (sums.energy_M - dense_BM.square().sum(dim=0)).abs().max() <= limit
            assert sums.usage_M.tolist() == code.usage(n_atoms).tolist()
            assert abs(float(sums.error) - energy(left_BD)) <= limit

    @given(problem=problems(), cut=st.floats(0, 1))
    def test_sums_of_two_parts_add_up(self, problem: Problem, cut: float) -> None:
        """Two processes that sum over a part each take the step of one that has all samples."""
        code, n_first = coded(problem), round(cut * len(problem.x_BD))
        whole, *parts = (
            sweep_sums(problem.x_BD[rows], Code(code.values_BK[rows], code.support_BK[rows]), problem.atoms_MD)[1]
            for rows in (slice(None), slice(n_first), slice(n_first, None))
        )
        one, two = sweep(problem.atoms_MD, whole), sweep(problem.atoms_MD, parts[0] + parts[1])
        assert (one.atoms_MD - two.atoms_MD).abs().max() <= tolerances.SAMPLE_ORDER[torch.float64]
        assert abs(float(one.error) - float(two.error)) <= tolerances.SAMPLE_ORDER[torch.float64] * energy(problem.x_BD)

    @pytest.mark.parametrize("many", [1e9, 0], ids=["products of codes", "from the residual"])
    def test_in_bfloat16_as_on_cuda(self, many: float, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is rounded averages out: of what the update takes off the error, next to nothing is lost."""
        monkeypatch.setattr(atom_update, "_MANY_ATOMS", many)
        monkeypatch.setattr(atom_update, "_SOLVED_ROWS", {"cpu": 7})
        problem = planted(4000, 32, 48, 4, noise=0.1)
        atoms_MD = normalize(problem.x_BD[:48], dim=1)
        code = matching_pursuit(problem.x_BD, atoms_MD, 4)
        exact, rounded = (
            sweep(atoms_MD, atom_update._multiplied_sums(problem.x_BD, code, atoms_MD, dtype)[1])
            for dtype in (torch.float32, torch.bfloat16)
        )
        before = error(problem.x_BD, code, atoms_MD)
        scaled = [Code(code.values_BK * by.scale_M[code.support_BK.long()], code.support_BK) for by in (exact, rounded)]
        fallen = [
            before - error(problem.x_BD, its, by.atoms_MD) for its, by in zip(scaled, (exact, rounded), strict=True)
        ]
        assert fallen[1] > (1 - tolerances.ROUNDED_SUMS) * fallen[0]
        assert not torch.equal(exact.atoms_MD, rounded.atoms_MD)

    def test_after_many_the_error_is_the_least_that_any_atoms_have(self) -> None:
        problem = generic(200, 9, 17, 4, seed=3)
        code, atoms_MD = coded(problem), problem.atoms_MD
        dense = code.to_dense(17).numpy()
        least = energy(
            problem.x_BD - torch.from_numpy(dense @ np.linalg.lstsq(dense, problem.x_BD.numpy(), rcond=None)[0])
        )
        for _ in range(500):
            got = update_atoms_sweep(problem.x_BD, code, atoms_MD)
            code, atoms_MD = got.code, got.atoms_MD
        assert got.error_after == pytest.approx(least, rel=1e-9)


class TestPromises:
    @each_update
    @given(problem=problems(), dtype=dtypes)
    def test_errors_are_the_true_ones(self, update: Update, problem: Problem, dtype: torch.dtype) -> None:
        problem = problem.to(dtype)
        code = coded(problem)
        got = update(problem.x_BD, code, problem.atoms_MD)
        limit = tolerances.UPDATE_ERROR[dtype] * energy(problem.x_BD)
        assert abs(got.error_before - error(problem.x_BD, code, problem.atoms_MD)) <= limit
        assert abs(got.error_after - error(problem.x_BD, got.code, got.atoms_MD)) <= limit

    @each_update
    @given(problem=problems(), dtype=dtypes)
    def test_error_never_rises(self, update: Update, problem: Problem, dtype: torch.dtype) -> None:
        problem = problem.to(dtype)
        code = coded(problem)
        got = update(problem.x_BD, code, problem.atoms_MD)
        before = error(problem.x_BD, code, problem.atoms_MD)
        after = error(problem.x_BD, got.code, got.atoms_MD)
        assert after <= before + tolerances.RISE[dtype] * energy(problem.x_BD)

    @each_update
    @given(seed=st.integers(0, 2**31), kind=st.sampled_from(sorted(KINDS)), dtype=dtypes)
    def test_error_never_rises_when_atoms_occur_together(
        self, update: Update, seed: int, kind: str, dtype: torch.dtype
    ) -> None:
        """k / M large, random start: every atom shares its samples with every other."""
        problem = KINDS[kind](overshooting(12, 9, seed)).to(dtype)
        code = coded(problem)
        got = update(problem.x_BD, code, problem.atoms_MD)
        before = error(problem.x_BD, code, problem.atoms_MD)
        after = error(problem.x_BD, got.code, got.atoms_MD)
        assert after <= before + tolerances.RISE[dtype] * energy(problem.x_BD)

    @each_update
    @given(seed=st.integers(0, 2**31), dtype=dtypes)
    def test_error_never_rises_whatever_the_code(self, update: Update, seed: int, dtype: torch.dtype) -> None:
        """A code that no coder gave: random supports and values of very different sizes, as after divergence."""
        problem = generic(40, 7, 11, 4, seed).to(dtype)
        draw = generator(seed)
        support_BK = torch.rand(40, 11, generator=draw).argsort(dim=1)[:, :4].int()
        sizes_BK = 10 ** (4 * torch.rand(40, 4, generator=draw, dtype=torch.float64) - 2)
        values_BK = torch.randn(40, 4, generator=draw, dtype=torch.float64) * sizes_BK
        code = Code(values_BK.to(dtype), support_BK)
        before = error(problem.x_BD, code, problem.atoms_MD)
        got = update(problem.x_BD, code, problem.atoms_MD)
        # Rounding is relative to what is summed: here the code is far larger than the samples.
        summed = float((code.values_BK.double() ** 2).sum())
        assert error(problem.x_BD, got.code, got.atoms_MD) <= before + tolerances.RISE[dtype] * summed

    @each_update
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", OVERSHOOTING, ids=str)
    def test_where_the_naive_parallel_update_blows_up(
        self, case: tuple[int, int, int, int], dtype: torch.dtype, update: Update
    ) -> None:
        d_in, k, _, seed = case
        problem = overshooting(d_in, k, seed).to(dtype)
        code = coded(problem)
        got = update(problem.x_BD, code, problem.atoms_MD)
        before = error(problem.x_BD, code, problem.atoms_MD)
        assert error(problem.x_BD, got.code, got.atoms_MD) < before

    @pytest.mark.parametrize("case", OVERSHOOTING, ids=str)
    def test_the_naive_parallel_update_blows_up(self, case: tuple[int, int, int, int]) -> None:
        """Atoms and coefficients of a batch replaced together, without a look at the error: why ours looks."""
        d_in, k, atom_batch, seed = case
        problem = overshooting(d_in, k, seed)
        code = coded(problem)
        codes, atoms = code.to_dense(d_in).numpy().copy(), problem.atoms_MD.numpy().copy()
        x = problem.x_BD.numpy()
        before = ((x - codes @ atoms) ** 2).sum()
        for start in range(0, d_in, atom_batch):
            residual, old_codes, old_atoms = x - codes @ atoms, codes.copy(), atoms.copy()
            for j in range(start, min(start + atom_batch, d_in)):
                users = np.flatnonzero(old_codes[:, j])
                own = residual[users] + np.outer(old_codes[users, j], old_atoms[j])
                left, sizes, right = np.linalg.svd(own, full_matrices=False)
                atoms[j], codes[users, j] = right[0], sizes[0] * left[:, 0]
        assert ((x - codes @ atoms) ** 2).sum() > tolerances.BLOW_UP * before
        ours = update_atoms_exact(problem.x_BD, code, problem.atoms_MD, atom_batch=atom_batch)
        assert ours.redone_batches > 0
        assert ours.error_after < before

    @each_update
    @given(problem=problems(), dtype=dtypes)
    def test_unit_atoms_and_the_same_support(self, update: Update, problem: Problem, dtype: torch.dtype) -> None:
        problem = problem.to(dtype)
        code = coded(problem)
        got = update(problem.x_BD, code, problem.atoms_MD)
        assert got.atoms_MD.shape == problem.atoms_MD.shape
        assert got.atoms_MD.dtype == got.code.values_BK.dtype == dtype
        norms_M = torch.linalg.vector_norm(got.atoms_MD.double(), dim=1)
        assert (norms_M - 1).abs().max() <= tolerances.UNIT_NORM[dtype]
        assert torch.equal(got.code.support_BK, code.support_BK)
        assert ((got.code.values_BK != 0) <= (code.values_BK != 0)).all()

    @each_update
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_unused_atoms_keep_their_bits(self, update: Update, dtype: torch.dtype) -> None:
        problem = generic(20, 16, 301, 2, seed=8).to(dtype)
        code = coded(problem)
        unused_M = code.usage(301) == 0
        got = update(problem.x_BD, code, problem.atoms_MD)
        assert torch.equal(got.usage_M, code.usage(301))
        assert 200 < int(unused_M.sum()) < 301
        assert torch.equal(got.atoms_MD[unused_M], problem.atoms_MD[unused_M])

    @each_update
    def test_inputs_are_left_alone(self, update: Update) -> None:
        problem = generic(30, 7, 11, 4, seed=9)
        code = coded(problem)
        kept = [tensor.clone() for tensor in (problem.x_BD, problem.atoms_MD, code.values_BK, code.support_BK)]
        update(problem.x_BD, code, problem.atoms_MD)
        now = (problem.x_BD, problem.atoms_MD, code.values_BK, code.support_BK)
        assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))

    @each_update
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_nothing_used(self, update: Update, dtype: torch.dtype) -> None:
        atoms_MD = unit_atoms(5, 4, dtype=dtype)
        code = Code(torch.zeros(3, 2, dtype=dtype), torch.zeros(3, 2, dtype=torch.int32))
        got = update(torch.ones(3, 4, dtype=dtype), code, atoms_MD)
        assert torch.equal(got.atoms_MD, atoms_MD)
        assert got.usage_M.tolist() == [0] * 5
        assert got.error_before == got.error_after == pytest.approx(12, rel=tolerances.UPDATE_ERROR[dtype])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_a_vanishing_direction_keeps_the_old_atom_and_drops_its_coefficients(self, dtype: torch.dtype) -> None:
        """Samples that cancel: the least-squares step of the atom leads to the zero vector, error 4 to error 2."""
        atoms_MD = torch.eye(3, dtype=dtype)[:1]
        code = Code(torch.tensor([[1.0], [1.0]], dtype=dtype), torch.zeros(2, 1, dtype=torch.int32))
        got = update_atoms_sweep(torch.tensor([[0.0, 1, 0], [0, -1, 0]], dtype=dtype), code, atoms_MD, held=0)
        assert torch.equal(got.atoms_MD, atoms_MD)
        assert not got.code.values_BK.any()
        assert got.error_before == pytest.approx(4, rel=tolerances.UPDATE_ERROR[dtype])
        assert got.error_after == pytest.approx(2, rel=tolerances.UPDATE_ERROR[dtype])

    @each_update
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_a_vanishing_direction_among_others(self, update: Update, dtype: torch.dtype) -> None:
        """The step takes atom 0 to the zero vector and atom 1 to atom 1 + atom 0, which only fit together."""
        atoms_MD = torch.eye(3, dtype=dtype)[:2]
        both, none = [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]
        x_BD = torch.tensor([both] * 10 + [none, both], dtype=dtype)
        values_BK = torch.tensor([[1.0, 1.0]] * 10 + [[1.0, 0.0], [0.0, 1.0]], dtype=dtype)
        code = Code(values_BK, torch.tensor([[0, 1]] * 12, dtype=torch.int32))
        before = error(x_BD, code, atoms_MD)
        got = update(x_BD, code, atoms_MD)
        assert error(x_BD, got.code, got.atoms_MD) <= before + tolerances.RISE[dtype] * energy(x_BD)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_an_atom_whose_samples_are_explained_without_it(self, dtype: torch.dtype) -> None:
        """The residual of the atom is the zero matrix: any direction will do, NaN will not."""
        atoms_MD = torch.eye(3, dtype=dtype)[:2]
        code = Code(torch.tensor([[1.0, 1.0]], dtype=dtype), torch.tensor([[0, 1]], dtype=torch.int32))
        x_BD = torch.tensor([[1.0, 0, 0]], dtype=dtype)
        got = update_atoms_exact(x_BD, code, atoms_MD)
        assert got.atoms_MD.isfinite().all()
        assert torch.linalg.vector_norm(got.atoms_MD, dim=1).sub(1).abs().max() <= tolerances.UNIT_NORM[dtype]
        assert error(x_BD, got.code, got.atoms_MD) <= tolerances.UPDATE_ERROR[dtype]


class TestFixedPointAndOrder:
    @each_update
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_exactly_sparse_samples_leave_the_atoms(self, update: Update, dtype: torch.dtype) -> None:
        problem = planted(500, 16, 24, 3, dtype=dtype, seed=6)
        got = update(problem.x_BD, problem.code, problem.atoms_MD)
        assert (got.atoms_MD - problem.atoms_MD).abs().max() <= tolerances.FIXED_POINT[dtype]
        assert got.error_after <= tolerances.FIXED_POINT[dtype] * energy(problem.x_BD)

    @each_update
    @given(seed=st.integers(0, 2**31), dtype=dtypes)
    def test_order_of_the_samples(self, update: Update, seed: int, dtype: torch.dtype) -> None:
        problem = planted(120, 9, 12, 3, noise=0.1, seed=seed, dtype=dtype)
        start_MD = normalize(problem.atoms_MD + 0.2 * unit_atoms(12, 9, seed, dtype), dim=1)
        order = torch.randperm(120, generator=generator(seed))
        shuffled = Code(problem.code.values_BK[order], problem.code.support_BK[order])
        plain = update(problem.x_BD, problem.code, start_MD)
        moved = update(problem.x_BD[order], shuffled, start_MD)
        assert (plain.atoms_MD - moved.atoms_MD).abs().max() <= tolerances.SAMPLE_ORDER[dtype]
        gap_BK = plain.code.values_BK[order] - moved.code.values_BK
        assert gap_BK.abs().max() <= tolerances.SAMPLE_ORDER[dtype] * plain.code.values_BK.abs().max()


class TestSums:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_in_pieces(self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
        """An atom that all samples use, one that some use, one that none uses; in pieces of 3, of 256 and in one."""
        draw = generator(3)
        rows_BD = torch.randn(1000, 5, generator=draw, dtype=dtype)
        values_BK = torch.randn(1000, 2, generator=draw, dtype=dtype)
        values_BK[::3, 1] = 0
        code = Code(values_BK, torch.tensor([[2, 0]], dtype=torch.int32).repeat(1000, 1))
        dense_BM = code.to_dense(4).double()
        for piece in (3, 256, 10_000):
            monkeypatch.setattr(atom_update, "_PIECE", piece)
            _, sums = sweep_sums(rows_BD, code, torch.zeros(4, 5, dtype=dtype))
            gradient_MD, _ = sums.block(0, 4, torch.zeros(4, 5, dtype=dtype))
            assert sums.usage_M.tolist() == [666, 0, 1000, 0]
            gap_MD = gradient_MD.double() - dense_BM.T @ rows_BD.double()
            assert gap_MD.abs().max() <= tolerances.UPDATE_ERROR[dtype] * 1000
            gap_M = sums.energy_M - dense_BM.square().sum(dim=0)
            assert gap_M.abs().max() <= tolerances.UPDATE_ERROR[torch.float64] * 1000

    def test_no_samples(self) -> None:
        code = Code(torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.int32))
        got = update_atoms_sweep(torch.zeros(0, 5), code, unit_atoms(4, 5))
        assert got.usage_M.tolist() == [0] * 4
        assert torch.equal(got.atoms_MD, unit_atoms(4, 5))


class TestSweepAgainstExact:
    def test_one_atom_at_a_time_they_agree(self) -> None:
        """Sweeps of one atom alone, coefficients refitted between them, converge to its SVD."""
        problem = generic(80, 6, 1, 1, seed=4)
        code, atoms_MD = coded(problem), problem.atoms_MD
        wanted = update_atoms_exact(problem.x_BD, code, atoms_MD)
        for _ in range(200):
            atoms_MD = update_atoms_sweep(problem.x_BD, code, atoms_MD, held=0).atoms_MD
            code = Code(problem.x_BD @ atoms_MD.T, code.support_BK)
        cosine = float((atoms_MD * wanted.atoms_MD).sum())
        assert abs(cosine) >= 1 - tolerances.EXACT_UPDATE_FLOAT64

    def test_trained_they_reach_the_same_error(self) -> None:
        """On samples that neither trained on."""
        problem = planted(3_000, 16, 32, 3, noise=0.1, seed=3)
        train_ND, heldout_ND = problem.x_BD[:2000], problem.x_BD[2000:]
        errors = {}
        for name, step in (("sweep", update_atoms_sweep), ("two", update_atoms_two_sweeps), ("exact", exact(1))):
            atoms_MD = normalize(torch.randn(32, 16, generator=generator(5)), dim=1)
            for _ in range(10):
                atoms_MD = step(train_ND, matching_pursuit(train_ND, atoms_MD, 3), atoms_MD).atoms_MD
            code = matching_pursuit(heldout_ND, atoms_MD, 3)
            errors[name] = error(heldout_ND, code, atoms_MD) / energy(heldout_ND)
        for name in ("sweep", "two"):
            assert errors[name] == pytest.approx(errors["exact"], rel=tolerances.SWEEP_AGAINST_EXACT)


class TestNonnegative:
    @given(seed=st.integers(0, 2**31), kind=st.sampled_from(sorted(KINDS)), dtype=dtypes)
    @pytest.mark.parametrize("atom_batch", [1, 3, 1000])
    def test_coefficients_stay_so_and_the_error_never_rises(
        self, atom_batch: int, seed: int, kind: str, dtype: torch.dtype
    ) -> None:
        problem = KINDS[kind](overshooting(12, 9, seed)).to(dtype)
        code = matching_pursuit(problem.x_BD, problem.atoms_MD, problem.k, nonnegative=True)
        got = update_atoms_exact(problem.x_BD, code, problem.atoms_MD, atom_batch=atom_batch, nonnegative=True)
        assert got.code.values_BK.min() >= 0
        before = error(problem.x_BD, code, problem.atoms_MD)
        after = error(problem.x_BD, got.code, got.atoms_MD)
        assert after <= before + tolerances.RISE[dtype] * energy(problem.x_BD)
        norms_M = torch.linalg.vector_norm(got.atoms_MD.double(), dim=1)
        assert (norms_M - 1).abs().max() <= tolerances.UNIT_NORM[dtype]

    @given(seed=st.integers(0, 2**31))
    def test_sweeps_keep_them_too(self, seed: int) -> None:
        problem = overshooting(12, 9, seed)
        code = matching_pursuit(problem.x_BD, problem.atoms_MD, problem.k, nonnegative=True)
        for update in (update_atoms_sweep, partial(update_atoms_two_sweeps, nonnegative=True)):
            assert update(problem.x_BD, code, problem.atoms_MD).code.values_BK.min() >= 0
