"""Matryoshka DB-KSVD: the groups, their coder, and what the first of them are worth by themselves."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ksvd_sae.errors import ShapeError
from ksvd_sae.learning import reference
from ksvd_sae.learning.code import Code
from ksvd_sae.learning.dbksvd import DictionaryLearner
from ksvd_sae.learning.matryoshka import (
    check_groups,
    group_budgets,
    group_slices,
    matryoshka_encode,
    paper_groups,
)
from ksvd_sae.learning.sparse_coding import matching_pursuit
from tests import tolerances
from tests.learners import learner
from tests.strategies import KINDS, generator, generic, planted


def falling_spectrum(n_samples: int, d_in: int, seed: int = 0) -> Tensor:
    """Variance that falls off over random directions, as activations' does: some atoms are worth more than others."""
    draw = generator(seed)
    turn_DD = torch.linalg.qr(torch.randn(d_in, d_in, generator=draw)).Q
    sizes_D = torch.arange(1, d_in + 1) ** -0.5
    return (torch.randn(n_samples, d_in, generator=draw) * sizes_D) @ turn_DD


def fvu(x_BD: Tensor, x_hat_BD: Tensor) -> float:
    return float((x_BD - x_hat_BD).double().pow(2).sum() / (x_BD - x_BD.mean(dim=0)).double().pow(2).sum())


class TestGroups:
    @pytest.mark.parametrize(
        ("n_atoms", "groups"),
        [
            (1, (1,)),
            (100, (100,)),
            (256, (256,)),
            (257, (256, 1)),
            (512, (256, 256)),
            (600, (256, 256, 88)),
            (1500, (256, 256, 512, 476)),
            (4096, (256, 256, 512, 1024, 2048)),
            (16384, (256, 256, 512, 1024, 2048, 4096, 8192)),
        ],
    )
    def test_of_the_paper(self, n_atoms: int, groups: tuple[int, ...]) -> None:
        assert paper_groups(n_atoms) == groups
        assert sum(groups) == n_atoms

    @pytest.mark.parametrize(("k", "n", "each"), [(20, 5, 4), (20, 6, 4), (20, 7, 3), (1, 5, 1), (40, 7, 6)])
    def test_budgets_are_rounded_up(self, k: int, n: int, each: int) -> None:
        assert group_budgets(k, n) == (each,) * n
        assert k <= sum(group_budgets(k, n)) < k + n

    @pytest.mark.parametrize(("k", "n"), [(20, 5), (20, 6), (20, 7), (7, 7), (40, 7), (80, 7), (3, 1)])
    def test_exact_budgets_add_up(self, k: int, n: int) -> None:
        budgets = group_budgets(k, n, exact=True)
        assert sum(budgets) == k
        assert budgets == tuple(sorted(budgets, reverse=True))
        assert max(budgets) == group_budgets(k, n)[0]
        assert max(budgets) - min(budgets) <= 1

    def test_exact_budgets_of_fewer_than_the_groups(self) -> None:
        check_groups([4, 6], 10, 1)
        with pytest.raises(ShapeError, match=r"(?s)every group to have a share.*k = 1 in 2 groups"):
            check_groups([4, 6], 10, 1, exact=True)

    def test_slices(self) -> None:
        assert group_slices([2, 3, 1]) == [slice(0, 2), slice(2, 5), slice(5, 6)]

    @pytest.mark.parametrize(
        ("groups", "n_atoms", "k", "words"),
        [
            ([4, 5], 10, 2, r"(?s)do not add up.*\[4, 5\], sum 9.*n_atoms = 10.*cure: groups=\[10\]"),
            ([], 10, 2, "whole numbers above 0"),
            ([10, 0], 10, 2, "whole numbers above 0"),
            ([12, -2], 10, 2, "whole numbers above 0"),
            ([5.5, 4.5], 10, 2, "whole number"),
            ([2, 8], 10, 6, r"(?s)cannot spend.*k = 6 in 2 groups: 3 each.*limit: 2, for a group of 2 atoms"),
            ([10, 10], 20, 15, r"(?s)cannot spend.*8 each.*limit: 7, for a group of 10 atoms in 7 dimensions"),
        ],
    )
    def test_that_do_not_fit(self, groups: Sequence[Any], n_atoms: int, k: int, words: str) -> None:
        with pytest.raises(ShapeError, match=words):
            check_groups(groups, n_atoms, k, 7)
        if k > 7:  # refused before the groups are looked at
            return
        with pytest.raises(ShapeError, match=words):
            learner(n_atoms, k, groups=groups).fit(torch.randn(100, 7, generator=generator(0)))

    def test_the_coder_needs_groups(self) -> None:
        with pytest.raises(ShapeError, match="matryoshka"):
            learner(10, 2, coder="matryoshka").fit(torch.randn(100, 7, generator=generator(0)))


class TestCoder:
    @given(seed=st.integers(0, 2**31), kind=st.sampled_from(sorted(KINDS)))
    def test_against_the_reference_group_by_group(self, seed: int, kind: str) -> None:
        problem = KINDS[kind](generic(7, 9, 12, 5, seed))
        groups = (3, 4, 5)
        code = matryoshka_encode(problem.x_BD, problem.atoms_MD, groups, 5).to_dense(12).numpy()
        for x, got in zip(problem.x_BD.numpy(), code, strict=True):
            left = x.copy()
            for rows in group_slices(groups):
                atoms = problem.atoms_MD[rows].numpy()
                wanted = left - reference.matching_pursuit(left, atoms, 2) @ atoms
                left = left - got[rows] @ atoms
                # Errors, not codes: duplicates make ties.
                gap = abs(np.linalg.norm(left) - np.linalg.norm(wanted))
                assert gap <= tolerances.CODE_ERROR[torch.float64] * (1 + np.linalg.norm(x))

    @given(seed=st.integers(0, 2**31))
    def test_one_group_is_plain_matching_pursuit(self, seed: int) -> None:
        problem = generic(11, 7, 13, 4, seed)
        one = matryoshka_encode(problem.x_BD, problem.atoms_MD, [13], 4, max_steps=6, rtol=0.1)
        plain = matching_pursuit(problem.x_BD, problem.atoms_MD, 4, max_steps=6, rtol=0.1)
        assert torch.equal(one.values_BK, plain.values_BK)
        assert torch.equal(one.support_BK, plain.support_BK)

    def test_every_group_keeps_to_its_atoms_and_its_budget(self) -> None:
        problem = generic(50, 9, 20, 6)
        code = matryoshka_encode(problem.x_BD, problem.atoms_MD, (4, 6, 10), 5)
        assert code.values_BK.shape == (50, 6), "three groups with ⌈5/3⌉ = 2 each"
        for group, rows in enumerate(group_slices((4, 6, 10))):
            columns = slice(2 * group, 2 * group + 2)
            used = code.support_BK[:, columns][code.values_BK[:, columns] != 0]
            assert used.min() >= rows.start
            assert used.max() < rows.stop
        assert not code.support_BK[code.values_BK == 0].any()

    def test_exact_budgets(self) -> None:
        """As if each group had been given its own share."""
        problem = generic(50, 9, 20, 6)
        groups, shares = (4, 6, 10), (2, 2, 1)
        code = matryoshka_encode(problem.x_BD, problem.atoms_MD, groups, 5, exact_budgets=True)
        assert code.values_BK.shape == (50, 5)
        left_BD = problem.x_BD
        for rows, share in zip(group_slices(groups), shares, strict=True):
            own = matching_pursuit(left_BD, problem.atoms_MD[rows], share)
            left_BD = left_BD - own.reconstruct(problem.atoms_MD[rows])
        torch.testing.assert_close(problem.x_BD - code.reconstruct(problem.atoms_MD), left_BD)

    def test_nonnegative(self) -> None:
        problem = generic(50, 9, 20, 6)
        code = matryoshka_encode(problem.x_BD, problem.atoms_MD, (8, 12), 6, nonnegative=True)
        assert code.values_BK.min() >= 0
        assert (code.values_BK > 0).any(dim=1).all()

    def test_no_samples(self) -> None:
        code = matryoshka_encode(torch.empty(0, 9), generic(1, 9, 20, 6).atoms_MD.float(), (8, 12), 6)
        assert code.values_BK.shape == (0, 6)


class TestLearning:
    @pytest.mark.parametrize("update", ["sweep", "two_sweeps", "exact"])
    def test_one_group_is_the_plain_dictionary(self, update: str) -> None:
        x_ND = planted(400, 12, 20, 3, noise=0.1).x_BD
        options: dict[str, Any] = {"passes": 2, "batch_samples": 100, "update": update, "atom_batch": 4}
        plain = learner(20, 3, **options).fit(x_ND)
        one = learner(20, 3, groups=[20], **options).fit(x_ND)
        assert torch.equal(plain.atoms_MD, one.atoms_MD)
        untimed = [[{**asdict(line), "seconds": 0, "prefix_fvu": 0} for line in each.log] for each in (plain, one)]
        assert untimed[0] == untimed[1]
        assert [line.prefix_fvu for line in one.log] == [[line.fvu] for line in one.log]

    def test_the_first_group_is_worth_more_than_the_first_atoms_of_a_plain_dictionary(self) -> None:
        """Each coded by its own atoms alone, and as part of the whole code."""
        x_ND, heldout_ND = falling_spectrum(4_000, 32).split([3_000, 1_000])
        options: dict[str, Any] = {"passes": 4, "batch_samples": 1_000, "centre": False}
        groups, k = (16, 16, 32), 6
        nested = learner(64, k, groups=groups, coder="matryoshka", **options).fit(x_ND)
        plain = learner(64, k, **options).fit(x_ND)

        def alone(ksvd: DictionaryLearner) -> float:
            atoms_MD = ksvd.atoms_MD[:16]
            return fvu(heldout_ND, matching_pursuit(heldout_ND, atoms_MD, 2).reconstruct(atoms_MD))

        def part_of_the_code(ksvd: DictionaryLearner) -> float:
            code = ksvd.encode(heldout_ND)
            first_BK = torch.where(code.support_BK < 16, code.values_BK, 0)
            return fvu(heldout_ND, ksvd.decode(Code(first_BK, code.support_BK)))

        assert alone(nested) < 0.95 * alone(plain)
        assert part_of_the_code(nested) < 0.95 * part_of_the_code(plain)

    def test_exact_budgets_are_those_of_learning(self) -> None:
        x_ND = falling_spectrum(600, 32)
        options: dict[str, Any] = {"groups": (16, 16, 32), "coder": "matryoshka", "batch_samples": 300}
        for exact, most in ((False, 6), (True, 5)):
            ksvd = learner(64, 5, exact_budgets=exact, **options).fit(x_ND)
            assert max(line.l0 for line in ksvd.log) == most
            assert ksvd.encode(x_ND).values_BK.shape[1] == most

    def test_every_group_helps(self) -> None:
        x_ND = falling_spectrum(3_000, 32)
        ksvd = learner(64, 6, groups=(16, 16, 32), passes=2, batch_samples=1_000, centre=False)
        ksvd.fit(x_ND)
        for line in ksvd.log:
            assert line.prefix_fvu == sorted(line.prefix_fvu, reverse=True)
            assert line.prefix_fvu[-1] == line.fvu
            assert line.fvu_after_update <= line.fvu
        code = matryoshka_encode(x_ND, ksvd.atoms_MD, (16, 16, 32), 6)
        errors = [
            fvu(
                x_ND,
                Code(torch.where(code.support_BK < end, code.values_BK, 0), code.support_BK).reconstruct(ksvd.atoms_MD),
            )
            for end in (16, 32, 64)
        ]
        assert errors[0] > errors[1] > errors[2]

    def test_encode_and_decode_by_both_coders(self) -> None:
        x_ND = falling_spectrum(500, 12) + 3
        nested = learner(24, 4, groups=(8, 16), coder="matryoshka", passes=2).fit(x_ND)
        code = nested.encode(x_ND)
        wanted = matryoshka_encode(x_ND - nested.centre_D, nested.atoms_MD, (8, 16), 4)
        assert torch.equal(code.values_BK, wanted.values_BK)
        whole = learner(24, 4, groups=(8, 16), passes=2).fit(x_ND)
        assert torch.equal(whole.atoms_MD, nested.atoms_MD), "the coder is for later"
        plain = matching_pursuit(x_ND - whole.centre_D, whole.atoms_MD, 4)
        assert torch.equal(whole.encode(x_ND).values_BK, plain.values_BK)
        assert fvu(x_ND, whole.decode(whole.encode(x_ND))) < fvu(x_ND, nested.decode(code)) < 0.5
