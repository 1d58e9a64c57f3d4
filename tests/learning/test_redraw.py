"""Atoms of no use: which they are, and what takes their place."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from ksvd_sae.errors import ShapeError
from ksvd_sae.learning import redraw
from ksvd_sae.learning.redraw import draw_atoms, near_duplicates, redrawn
from tests import tolerances
from tests.learners import learner
from tests.strategies import generator, planted, unit_atoms


def normal(n_samples: int, d_in: int, seed: int = 0) -> Tensor:
    return torch.randn(n_samples, d_in, generator=generator(seed))


def turned(atoms_MD: Tensor, cosine: float) -> Tensor:
    """Unit rows at this cosine with the rows given."""
    other_MD = normal(*atoms_MD.shape, seed=77)
    other_MD = normalize(other_MD - (other_MD * atoms_MD).sum(dim=1, keepdim=True) * atoms_MD, dim=1)
    return cosine * atoms_MD + (1 - cosine**2) ** 0.5 * other_MD


class TestNearDuplicates:
    ATOMS = unit_atoms(5, 16, dtype=torch.float32)

    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize(("cosine", "close"), [(0.995, True), (0.985, False)])
    def test_the_weaker_of_a_pair(self, cosine: float, close: bool, sign: int) -> None:
        atoms_MD = torch.cat([self.ATOMS, sign * turned(self.ATOMS[1:2], cosine)])
        energy_M = torch.tensor([1.0, 2, 1, 1, 1, 5])
        assert near_duplicates(atoms_MD, energy_M, 0.99).tolist() == [False, close, False, False, False, False]
        assert near_duplicates(atoms_MD, 6 - energy_M, 0.99).tolist() == [False] * 5 + [close]
        wanted = close and sign > 0
        assert near_duplicates(atoms_MD, energy_M, 0.99, signed=False).any() == wanted

    def test_equal_energies_keep_the_first(self) -> None:
        atoms_MD = self.ATOMS[[0, 1, 0, 1, 1]]
        assert near_duplicates(atoms_MD, torch.ones(5), 0.99).tolist() == [False, False, True, True, True]

    @given(seed=st.integers(0, 2**31), n_atoms=st.sampled_from([1, 2, 7, 23]))
    def test_against_all_pairs(self, seed: int, n_atoms: int) -> None:
        """In blocks of a few rows as in one."""
        atoms_MD = unit_atoms(n_atoms, 3, seed)
        energy_M = torch.randint(0, 4, (n_atoms,), generator=generator(seed)).double()
        wanted = [
            any(
                abs(float(atoms_MD[i] @ atoms_MD[j])) > 0.8
                and (energy_M[j] > energy_M[i] or (energy_M[j] == energy_M[i] and j < i))
                for j in range(n_atoms)
                if j != i
            )
            for i in range(n_atoms)
        ]
        with pytest.MonkeyPatch.context() as patch:
            for rows in (3, 1024):
                patch.setattr(redraw, "_PAIR_ROWS", rows)
                assert near_duplicates(atoms_MD, energy_M, 0.8).tolist() == wanted


def drawn(*arguments: Any) -> Tensor:
    """Only those that are any."""
    rows_ND, are_any_N = draw_atoms(*arguments)
    return rows_ND[are_any_N]


class TestRedrawn:
    X, ATOMS = normal(40, 6), unit_atoms(10, 6, dtype=torch.float32)
    USELESS = torch.tensor([False, True, False, True, True, False, True, False, False, True])

    def test_useless_atoms_are_replaced_and_no_others(self) -> None:
        got_MD, fresh_M = redrawn(self.ATOMS, self.USELESS, "residual", self.X, self.X, generator(0))
        assert torch.equal(fresh_M, self.USELESS)
        assert torch.equal(got_MD[~fresh_M], self.ATOMS[~fresh_M])
        source_M = (got_MD[fresh_M] @ normalize(self.X, dim=1).T).max(dim=1)
        assert source_M.values == pytest.approx([1.0] * 5, abs=tolerances.UNIT_NORM[torch.float32])
        assert len(set(source_M.indices.tolist())) == 5

    def test_as_many_as_there_are(self) -> None:
        residual_BD = torch.where(torch.arange(40)[:, None] < 3, self.X, 0)
        got_MD, fresh_M = redrawn(self.ATOMS, self.USELESS, "residual", self.X, residual_BD, generator(0))
        assert fresh_M.tolist() == [False, True, False, True, True] + [False] * 5
        assert torch.equal(got_MD[~fresh_M], self.ATOMS[~fresh_M])

    def test_fewer_samples_than_useless_atoms(self) -> None:
        _, fresh_M = redrawn(self.ATOMS, self.USELESS, "data", self.X[:2], self.X[:2], generator(0))
        assert fresh_M.tolist() == [False, True, False, True] + [False] * 6


class TestSketched:
    """Whether there are pairs at all is looked up in fewer dimensions: without a miss."""

    @pytest.mark.parametrize("cosine", [0.98, 0.99, 0.999])
    def test_a_pair_at_the_bound_is_never_missed(self, cosine: float) -> None:
        for seed in range(40):
            atoms_MD = unit_atoms(300, 640, seed, dtype=torch.float32)
            atoms_MD[7] = turned(atoms_MD[5:6], cosine + 1e-4)[0] * (-1) ** seed
            assert redraw._may_be_close(atoms_MD, cosine)
            assert near_duplicates(atoms_MD, torch.ones(300), cosine).nonzero().flatten().tolist() == [7]

    def test_atoms_of_activations_are_not_taken_for_pairs(self) -> None:
        """As coherent as atoms are there: |cos| with the nearest of 0.5 on average, of 0.9 at the most."""
        atoms_MD = unit_atoms(2000, 640, dtype=torch.float32)
        atoms_MD[1000:] = turned(atoms_MD[:1000], 0.5)
        atoms_MD[1990:] = turned(atoms_MD[:10], 0.9)
        assert not redraw._may_be_close(atoms_MD, 0.99)
        assert not near_duplicates(atoms_MD, torch.ones(2000), 0.99).any()


class TestDrawn:
    X = normal(40, 6)
    RESIDUAL = torch.where(torch.arange(40)[:, None] < 5, normal(40, 6, 1), 0)

    def test_residuals_of_distinct_badly_coded_samples(self) -> None:
        got = drawn(5, "residual", self.X, self.RESIDUAL, generator(0))
        cosines = got @ normalize(self.RESIDUAL[:5], dim=1).T
        assert sorted(cosines.argmax(dim=1).tolist()) == [0, 1, 2, 3, 4]
        assert cosines.max(dim=1).values == pytest.approx([1.0] * 5, abs=tolerances.UNIT_NORM[torch.float32])

    def test_the_worse_coded_the_more_often(self) -> None:
        """Three samples with errors in the ratio 1 : 2 : 4, that is squares of 1 : 4 : 16, drawn one at a time."""
        residual = torch.eye(3) * torch.tensor([1.0, 2.0, 4.0])
        picks = [int(drawn(1, "residual", torch.ones(3, 3), residual, generator(i)).argmax()) for i in range(600)]
        counts = torch.bincount(torch.tensor(picks), minlength=3)
        # Standard deviations of the counts are at most 11.
        assert counts.tolist() == pytest.approx([600 / 21, 4 * 600 / 21, 16 * 600 / 21], abs=45)

    def test_no_more_than_there_are_badly_coded_samples(self) -> None:
        assert drawn(9, "residual", self.X, self.RESIDUAL, generator(0)).shape == (5, 6)
        rounding = 1e-7 * self.X
        assert drawn(9, "residual", self.X, rounding, generator(0)).shape == (0, 6)

    def test_samples(self) -> None:
        x_BD = torch.where(torch.arange(40)[:, None] < 8, self.X, 0)
        got = drawn(20, "data", x_BD, self.RESIDUAL, generator(0))
        assert sorted((got @ normalize(x_BD[:8], dim=1).T).argmax(dim=1).tolist()) == list(range(8))

    def test_random_and_none(self) -> None:
        got = drawn(20, "random", self.X, self.RESIDUAL, generator(0))
        assert got.norm(dim=1) == pytest.approx([1.0] * 20, abs=tolerances.UNIT_NORM[torch.float32])
        useless_M = torch.ones(20, dtype=torch.bool)
        kept_MD, fresh_M = redrawn(got, useless_M, "none", self.X, self.RESIDUAL, generator(0))
        assert torch.equal(kept_MD, got)
        assert not fresh_M.any()


class TestInTraining:
    @pytest.mark.parametrize("kind", ["residual", "data", "random"])
    @pytest.mark.parametrize("update", ["sweep", "two_sweeps", "exact"])
    def test_a_repeated_atom_is_replaced(self, update: str, kind: str) -> None:
        problem = planted(400, 12, 20, 3, noise=0.1)
        start_MD = problem.atoms_MD.clone()
        start_MD[7] = turned(start_MD[3:4], 0.9999)[0]
        ksvd = learner(20, 3, update=update, atom_batch=1, redraw=kind, duplicate_cosine=0.95, centre=False)
        ksvd.state = ksvd._started(torch.zeros(12), start_MD)
        ksvd.partial_fit(problem.x_BD)
        assert (ksvd.log[0].duplicates, ksvd.log[0].redrawn) == (1, 1)
        cosines = (ksvd.atoms_MD @ ksvd.atoms_MD.T).abs().fill_diagonal_(0)
        assert cosines.max() < 0.95

    @pytest.mark.parametrize("options", [{"redraw": "none"}, {"duplicate_cosine": None}], ids=str)
    def test_or_not(self, options: dict[str, Any]) -> None:
        problem = planted(400, 12, 20, 3, noise=0.1)
        start_MD = problem.atoms_MD.clone()
        start_MD[7] = turned(start_MD[3:4], 0.9999)[0]
        ksvd = learner(20, 3, centre=False, **{"duplicate_cosine": 0.95, **options})
        ksvd.state = ksvd._started(torch.zeros(12), start_MD)
        ksvd.partial_fit(problem.x_BD)
        assert (ksvd.log[0].duplicates, ksvd.log[0].redrawn) == (int("redraw" in options), 0)

    def test_opposite_atoms_of_a_nonnegative_dictionary_stay(self) -> None:
        x_BD = normal(200, 4)
        start_MD = torch.cat([torch.eye(4), -torch.eye(4)])
        for nonnegative in (True, False):
            ksvd = learner(8, 2, nonnegative=nonnegative, centre=False, duplicate_cosine=0.9)
            ksvd.state = ksvd._started(torch.zeros(4), start_MD)
            ksvd.partial_fit(x_BD)
            # With signs the second of each pair is never used.
            assert (ksvd.log[0].redrawn == 0) == nonnegative

    @pytest.mark.parametrize("cosine", [0.0, -0.5, 1.5])
    def test_thresholds_that_mean_nothing(self, cosine: float) -> None:
        with pytest.raises(ShapeError, match="duplicate_cosine"):
            learner(8, 2, duplicate_cosine=cosine).fit(normal(100, 8))

    def test_an_average_starts_anew_with_a_fresh_atom(self) -> None:
        """What was averaged is another atom: nothing of it may be left."""
        x_BD = torch.cat([normal(100, 4), torch.zeros(100, 4)], dim=1)
        ksvd = learner(6, 2, redraw="data", centre=False)
        ksvd.state = ksvd._started(torch.zeros(8), torch.eye(8)[[0, 1, 2, 3, 6, 7]])
        for _ in range(3):
            ksvd.partial_fit(x_BD)
        assert ksvd.log[0].redrawn == 2
        assert ksvd.atoms_MD[:, 4:].abs().max() == 0

    def test_an_atom_is_redrawn_once_others_have_been_used_often_enough(self) -> None:
        """Batches of 18 samples with 2 of 6 atoms each: an average one is used 6 times a batch, 24 in four."""
        x_BD = torch.cat([normal(18, 4), torch.zeros(18, 4)], dim=1)
        ksvd = learner(6, 2, centre=False)
        ksvd.state = ksvd._started(torch.zeros(8), torch.eye(8)[[0, 1, 2, 3, 6, 7]])
        for _ in range(5):
            ksvd.partial_fit(x_BD)
        assert [line.dead for line in ksvd.log[:3]] == [2, 2, 2]
        assert [line.redrawn for line in ksvd.log] == [0, 0, 0, 2, 0], (
            "a hair below 20 after three, above it after four"
        )

    def test_an_atom_that_is_used_now_and_then_stays(self) -> None:
        """Samples near one atom each, so that there are residuals to draw from; two batches of three lack atom 0's."""
        sizes_BD, off_BD = normal(40, 1).abs() + 1, 0.05 * normal(40, 8)
        some_BD, all_BD = (sizes_BD * torch.eye(8)[torch.arange(40) % n + 8 - n] + off_BD for n in (7, 8))
        ksvd = learner(8, 1, centre=False)
        ksvd.state = ksvd._started(torch.zeros(8), torch.eye(8))
        for batch_BD in [some_BD, some_BD, all_BD] * 4:
            ksvd.partial_fit(batch_BD)
        assert [line.dead for line in ksvd.log] == [1, 1, 0] * 4
        assert sum(line.redrawn for line in ksvd.log) == 0
