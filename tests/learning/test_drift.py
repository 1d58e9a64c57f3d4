"""Batch by batch the centre is that of the first batch: samples that move away from it are refused, others not."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ksvd_sae.errors import ActivationError
from ksvd_sae.learning.dbksvd import DictionaryLearner
from tests.learners import learner
from tests.strategies import generator, planted

X_ND = planted(600, 12, 20, 3, noise=0.1).x_BD + 0.5


def small(**options: Any) -> DictionaryLearner:
    return learner(20, 3, **options)


def partially(ksvd: DictionaryLearner, *batches: Tensor) -> DictionaryLearner:
    for batch_BD in batches:
        ksvd.partial_fit(batch_BD)
    return ksvd


DRIFTED = r"(?s)drifted away from the centre.*got: a mean over \d+ samples .* from it.*limit.*cause.*cure.*is kept"


class TestRefused:
    def test_a_drift_of_twenty_leaves_the_learner_as_it_was(self) -> None:
        ksvd = partially(small(), X_ND[:300])
        atoms_MD = ksvd.atoms_MD.clone()
        with pytest.raises(ActivationError, match=DRIFTED):
            ksvd.partial_fit(X_ND[300:] + 20)
        assert torch.equal(ksvd.atoms_MD, atoms_MD)
        assert (ksvd.samples_seen, len(ksvd.log)) == (300, 1)
        # The batch is left out, and training goes on as if it had not been.
        ksvd.partial_fit(X_ND[300:])
        assert torch.equal(ksvd.atoms_MD, partially(small(), X_ND[:300], X_ND[300:]).atoms_MD)

    def test_a_drift_little_by_little(self) -> None:
        ksvd = partially(small(), X_ND[:100])
        steps = [X_ND[100 * (step % 6) :][:100] + 0.3 * step for step in range(1, 100)]
        with pytest.raises(ActivationError, match=DRIFTED):
            partially(ksvd, *steps)
        assert len(ksvd.log) > 2, "the first steps are within what samples lie apart"

    def test_in_a_stream(self) -> None:
        with pytest.raises(ActivationError, match=DRIFTED):
            small().fit([X_ND[:300], X_ND[300:] + 20])

    def test_after_fit(self) -> None:
        ksvd = small(passes=3).fit(X_ND)
        with pytest.raises(ActivationError, match=DRIFTED):
            ksvd.partial_fit(X_ND + 20)

    @pytest.mark.parametrize("scale", [1e-15, 1e15])
    def test_at_any_scale(self, scale: float) -> None:
        ksvd = partially(small(), X_ND[:300] * scale)
        with pytest.raises(ActivationError, match=DRIFTED):
            ksvd.partial_fit((X_ND[300:] + 20) * scale)
        ksvd.partial_fit(X_ND[300:] * scale)

    def test_samples_that_move_apart_from_another_centre(self) -> None:
        """By many small batches after a large one."""
        ksvd = partially(small(), X_ND[:300])
        with pytest.raises(ActivationError, match=DRIFTED):
            partially(ksvd, *(X_ND[300:] + 20).split(20))


class TestTaken:
    def test_samples_that_stay(self) -> None:
        """In batches of any size: the first one's mean is off by its own noise."""
        sizes = [20, 2, 3, 75, 2, 2, 196, 300]
        ksvd = partially(small(), *X_ND.split(sizes))
        assert ksvd.samples_seen == 600
        assert torch.equal(ksvd.centre_D, X_ND[:20].double().mean(dim=0).float())

    def test_without_a_centre_there_is_none_to_leave(self) -> None:
        assert len(partially(small(centre=False), X_ND[:300], X_ND[300:] + 20).log) == 2

    def test_all_samples_at_once(self) -> None:
        """fit knows the mean of all of them."""
        moved_ND = torch.cat([X_ND[:300], X_ND[300:] + 20])
        assert small(batch_samples=100).fit(moved_ND).samples_seen == 600

    def test_what_stays_after_fit(self) -> None:
        ksvd = partially(small(passes=2).fit(X_ND), X_ND[:100], X_ND[100:])
        assert ksvd.samples_seen == 1800

    def test_a_score_as_good_as_fits(self) -> None:
        """Why it is refused: learned about a centre that is far off, a dictionary is no good."""
        moved_ND = X_ND + 20
        far = small(centre=False)
        for _ in range(3):
            partially(far, *moved_ND.split(200))
        near = small(passes=3, batch_samples=200).fit(moved_ND)
        errors = [float((ksvd.decode(ksvd.encode(moved_ND)) - moved_ND).square().sum()) for ksvd in (far, near)]
        assert errors[1] < errors[0]


def test_random_batches_are_never_refused() -> None:
    x_ND = torch.randn(4000, 3, generator=generator(5)) * torch.tensor([100.0, 1.0, 0.01])
    ksvd = learner(4, 2, init="random")
    for batch_BD in x_ND.split(4):
        ksvd.partial_fit(batch_BD)
    assert ksvd.samples_seen == 4000
