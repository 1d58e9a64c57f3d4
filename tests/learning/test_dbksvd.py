"""DB-KSVD as a whole: what it finds, that it repeats itself, what it logs, what it refuses."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from ksvd_sae.bench.problems import Shape
from ksvd_sae.bench.problems import planted as synthetic
from ksvd_sae.errors import ActivationError, ConfigError, ConstantSamplesError, NotFittedError, ShapeError
from ksvd_sae.learning import reference
from ksvd_sae.learning.coding import Coding
from ksvd_sae.learning.dbksvd import BatchLog, DictionaryLearner, LearnerOptions
from ksvd_sae.learning.sparse_coding import Code, Coder, matching_pursuit
from ksvd_sae.learning.weighting import weighting_by_fisher, weighting_by_std
from tests import tolerances
from tests.learners import learner
from tests.strategies import generator, planted, shown

Update = Literal["sweep", "two_sweeps", "exact"]
UPDATES: tuple[Update, ...] = ("sweep", "two_sweeps", "exact")


def started(ksvd: DictionaryLearner, atoms_MD: Tensor, centre_D: Tensor | None = None) -> DictionaryLearner:
    """The learner as if its first batch had given these atoms and this centre (0 unless given)."""
    ksvd.state = ksvd._started(torch.zeros(atoms_MD.shape[1]) if centre_D is None else centre_D, atoms_MD.clone())
    return ksvd


def normal(n_samples: int, d_in: int, seed: int = 0) -> Tensor:
    return torch.randn(n_samples, d_in, generator=generator(seed))


def share_found(learned_MD: Tensor, planted_MD: Tensor) -> float:
    """Share of planted atoms whose partner in the best one-to-one matching is close, either sign."""
    cosines = (learned_MD.double() @ planted_MD.double().T).abs().numpy()
    rows, columns = linear_sum_assignment(-cosines)
    return float((cosines[rows, columns] >= tolerances.FOUND_COSINE).mean())


def share_of_synthetic_atoms(seed: int) -> float:
    """Found of the 1,024 atoms of KSVD.jl's synthetic problem: d = 256, k = 20, 2^14 samples, noise 0.05; 60 passes."""
    x_ND, atoms_MD = synthetic(Shape("", 2**14, 256, 1024, 20), seed)
    return share_found(learner(1024, 20, passes=60, seed=seed).fit(x_ND).atoms_MD, atoms_MD)


class TestPlanted:
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_finds_the_atoms(self, seed: int) -> None:
        """Small batches now and then leave a superfluous atom unused, and it is redrawn: so nearly all are found."""
        problem = planted(20_000, 64, 128, 3, noise=0.01, seed=seed)
        ksvd = learner(128, 3, passes=8, batch_samples=512, seed=seed).fit(problem.x_BD)
        assert share_found(ksvd.atoms_MD, problem.atoms_MD) >= tolerances.FOUND_SHARE
        assert ksvd.log[-1].fvu < tolerances.FOUND_FVU

    def test_finds_the_atoms_with_default_batches(self) -> None:
        shares = []
        for seed in range(5):
            problem = planted(20_000, 64, 128, 3, noise=0.01, seed=seed)
            ksvd = learner(128, 3, passes=4, seed=seed).fit(problem.x_BD)
            shares.append(share_found(ksvd.atoms_MD, problem.atoms_MD))
        assert sorted(shares)[1] >= tolerances.FOUND_SHARE, shares

    def test_finds_the_atoms_in_one_large_batch_a_pass(self) -> None:
        """Without noise between batches, pairs of atoms that share one planted direction never part, unless one of
        each is replaced."""
        options: dict[str, Any] = {"passes": 16, "batch_samples": 20_000}
        shares = []
        for seed in range(3):
            problem = planted(20_000, 64, 128, 3, noise=0.01, seed=seed)
            ksvd = learner(128, 3, seed=seed, **options).fit(problem.x_BD)
            shares.append(share_found(ksvd.atoms_MD, problem.atoms_MD))
        assert sorted(shares)[1] >= tolerances.FOUND_SHARE_LARGE_BATCH, shares
        stuck = learner(128, 3, seed=seed, duplicate_cosine=None, **options).fit(problem.x_BD)
        assert share_found(stuck.atoms_MD, problem.atoms_MD) < tolerances.FOUND_SHARE_LARGE_BATCH
        assert sum(line.redrawn for line in stuck.log) == 0

    def test_finds_the_atoms_of_the_papers_synthetic_problem(self) -> None:
        """320 uses of each atom: nothing is found for 30 passes and nearly all within the next 20."""
        assert share_of_synthetic_atoms(seed=0) >= tolerances.FOUND_SHARE_SYNTHETIC

    @pytest.mark.parametrize("atom_batch", [1, 8])
    def test_exact_update_finds_the_atoms(self, atom_batch: int) -> None:
        problem = planted(2_000, 20, 30, 2, noise=0.01, seed=2)
        ksvd = learner(30, 2, passes=5, batch_samples=128, update="exact", atom_batch=atom_batch, seed=2)
        assert share_found(ksvd.fit(problem.x_BD).atoms_MD, problem.atoms_MD) >= tolerances.FOUND_SHARE_SMALL

    def test_the_measure_itself(self) -> None:
        """Flipped and permuted atoms are found; a dictionary that never learned anything finds none."""
        problem = planted(1, 64, 128, 3)
        order = torch.randperm(128, generator=generator(0))
        assert share_found(-problem.atoms_MD[order], problem.atoms_MD) == 1.0
        assert share_found(normalize(normal(128, 64, 1), dim=1), problem.atoms_MD) == 0.0


class TestAgainstReference:
    def test_error_of_every_sweep(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The whole loop with the exact update, from the same atoms, visiting them in the reference's order."""
        monkeypatch.setattr(torch, "randperm", lambda n, generator=None, device="cpu": torch.arange(n))
        problem = planted(200, 8, 12, 2, noise=0.1, seed=1)
        # Not from the data: a sample that is an atom leaves rounding as its residual, and picks by that.
        start_MD = normalize(normal(12, 8, 1), dim=1)
        sweeps = 6
        _, expected = reference.ksvd(problem.x_BD.double().numpy(), start_MD.double().numpy(), 2, sweeps)
        ksvd = started(learner(12, 2, update="exact", atom_batch=1, centre=False), start_MD)
        for _ in range(sweeps + 1):
            ksvd.partial_fit(problem.x_BD)
        assert [entry.dead for entry in ksvd.log] == [0] * (sweeps + 1), "redrawn atoms would part the two"
        x = problem.x_BD.double().numpy()
        variance_share = ((x - x.mean(axis=0)) ** 2).sum() / (x**2).sum()
        got = [float(np.sqrt(entry.fvu * variance_share)) for entry in ksvd.log]
        assert got == pytest.approx(expected, rel=tolerances.SWEEP_ERROR)
        assert got[-1] < 0.8 * got[0], "the case must have something to learn"

    @pytest.mark.parametrize("update", UPDATES)
    def test_learning_lowers_the_heldout_error(self, update: Update) -> None:
        problem = planted(1_200, 16, 24, 3, noise=0.1, seed=3)
        train_ND, heldout_ND = problem.x_BD[:1000], problem.x_BD[1000:]
        few = learner(24, 3, batch_samples=100, update=update, passes=1, seed=3).fit(train_ND)
        many = learner(24, 3, batch_samples=100, update=update, passes=12, seed=3).fit(train_ND)
        errors = [float((ksvd.decode(ksvd.encode(heldout_ND)) - heldout_ND).norm()) for ksvd in (few, many)]
        assert errors[1] < 0.8 * errors[0]


class TestRepeats:
    @pytest.mark.parametrize("init", ["data", "random"])
    @pytest.mark.parametrize("update", UPDATES)
    def test_same_seed_same_bits_other_seed_other_atoms(self, update: Update, init: str) -> None:
        x_ND = planted(600, 12, 20, 3, noise=0.1).x_BD
        options: dict[str, Any] = {"passes": 2, "batch_samples": 150, "update": update, "init": init, "atom_batch": 4}
        one, same, other = (learner(20, 3, seed=seed, **options).fit(x_ND) for seed in (5, 5, 6))
        assert torch.equal(one.atoms_MD, same.atoms_MD)
        untimed = [[{**asdict(entry), "seconds": 0} for entry in ksvd.log] for ksvd in (one, same)]
        assert untimed[0] == untimed[1]
        assert not torch.equal(one.atoms_MD, other.atoms_MD)

    @pytest.mark.parametrize("init", ["data", "random"])
    def test_the_seed_draws_the_first_atoms(self, init: Literal["data", "random"]) -> None:
        """One batch, so that the order of the samples plays no part."""
        x_ND = planted(300, 12, 20, 3, noise=0.1).x_BD
        one, other = (learner(20, 3, seed=seed, init=init).fit(x_ND) for seed in (5, 6))
        assert not torch.equal(one.atoms_MD, other.atoms_MD)

    def test_fit_starts_afresh(self) -> None:
        x_ND = planted(300, 12, 20, 3, noise=0.1).x_BD
        ksvd = learner(20, 3, batch_samples=100)
        first_MD = ksvd.fit(x_ND).atoms_MD.clone()
        assert torch.equal(ksvd.fit(x_ND).atoms_MD, first_MD)
        assert (ksvd.samples_seen, len(ksvd.log)) == (300, 3)

    @pytest.mark.parametrize("centre", [True, False])
    @pytest.mark.parametrize("update", UPDATES)
    def test_partial_fit_on_one_batch_is_fit(self, update: Update, centre: bool) -> None:
        x_ND = planted(300, 12, 20, 3, noise=0.1).x_BD + 1.5
        whole = learner(20, 3, update=update, centre=centre).fit(x_ND)
        part = learner(20, 3, update=update, centre=centre).partial_fit(x_ND)
        assert torch.equal(whole.atoms_MD, part.atoms_MD)
        assert torch.equal(whole.centre_D, part.centre_D)
        assert bool(whole.centre_D.any()) == centre

    def test_partial_fit_over_batches_is_one_pass_of_fit(self) -> None:
        x_ND = planted(300, 12, 20, 3, noise=0.1).x_BD
        whole = learner(20, 3, batch_samples=100, centre=False).fit(x_ND)
        part = learner(20, 3, centre=False)
        for start in (0, 100, 200):
            part.partial_fit(x_ND[start : start + 100])
        assert torch.equal(whole.atoms_MD, part.atoms_MD)

    def test_a_source_of_batches_is_as_good_as_a_tensor(self) -> None:
        x_ND = planted(300, 12, 20, 3, noise=0.1).x_BD + 1.5

        class Source:
            n_samples, d_in = x_ND.shape
            centre_D = x_ND.double().mean(dim=0)

            def __init__(self) -> None:
                self.seeds: list[int | None] = []

            def batches(self, batch_samples: int, *, seed: int | None = None) -> Iterator[Tensor]:
                self.seeds.append(seed)
                order = torch.arange(300) if seed is None else torch.randperm(300, generator=generator(seed))
                for start in range(0, 300, batch_samples):
                    yield x_ND[order[start : start + batch_samples]]

        source = Source()
        streamed = learner(20, 3, batch_samples=100, passes=3, seed=7).fit(source)
        assert torch.equal(streamed.atoms_MD, learner(20, 3, batch_samples=100, passes=3, seed=7).fit(x_ND).atoms_MD)
        assert len(set(source.seeds)) == 3, "every pass in another order"


class TestLog:
    def test_a_line_a_batch(self, tmp_path: Path) -> None:
        path = tmp_path / "logs" / "train.jsonl"
        seen: list[BatchLog] = []
        x_ND = planted(1_000, 12, 20, 3, noise=0.1).x_BD
        ksvd = learner(20, 3, passes=2, batch_samples=300, log_path=path, on_batch=seen.append).fit(x_ND)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [BatchLog(**line) for line in lines] == ksvd.log == seen
        assert all(entry.seconds > 0 for entry in seen)
        # 1,000 samples in batches of at most 300 are four of 250, not three of 300 and one of 100.
        counted = [(entry.pass_index, entry.batch, entry.samples_seen) for entry in seen]
        assert counted == [(batch // 4, batch, 250 * (batch + 1)) for batch in range(8)]
        assert ksvd.samples_seen == 2_000
        ksvd.fit(x_ND)
        assert len(path.read_text().splitlines()) == 8, "a new fit starts a new log"

    @pytest.mark.parametrize(("n_atoms", "sizes"), [(20, [1000] * 3), (500, [1500] * 2), (800, [3000])])
    def test_default_batches(self, n_atoms: int, sizes: list[int]) -> None:
        """4 samples an atom, at least 1,024, of nearly equal size."""
        seen: list[int] = [0]
        learner(n_atoms, 2, on_batch=lambda line: seen.append(line.samples_seen)).fit(normal(3_000, 8))
        assert [after - before for before, after in itertools.pairwise(seen)] == sizes

    @pytest.mark.parametrize("update", UPDATES)
    def test_values(self, update: Update) -> None:
        """Error before and after the update, L0, dead: each computed again from the atoms."""
        x_BD = planted(400, 12, 20, 3, noise=0.1).x_BD + 0.5
        start_MD = normalize(normal(20, 12, 1), dim=1)
        ksvd = started(learner(20, 3, update=update, atom_batch=1, rtol=0.4), start_MD, x_BD.double().mean(dim=0))
        ksvd.partial_fit(x_BD)
        centred_BD = x_BD - ksvd.centre_D
        code = matching_pursuit(centred_BD, start_MD, 3, rtol=0.4)
        variance = float(centred_BD.double().pow(2).sum())

        def fvu(code: Code, atoms_MD: Tensor) -> float:
            return float((centred_BD - code.to_dense(20) @ atoms_MD).double().pow(2).sum()) / variance

        (entry,) = ksvd.log
        assert entry.fvu == pytest.approx(fvu(code, start_MD), abs=tolerances.LOGGED_FVU)
        assert entry.l0 == pytest.approx(float((code.values_BK != 0).sum(dim=1).double().mean()))
        assert 1 < entry.l0 < 3, "rtol must stop some samples for the mean to mean something"
        assert (entry.dead, entry.redrawn) == (0, 0)
        # After the update the coefficients have changed too: no fit of coefficients to the same supports does
        # better, and the error has not risen.
        best = 0.0
        for x_D, values_K, support_K in zip(centred_BD, code.values_BK, code.support_BK, strict=True):
            used_KD = ksvd.atoms_MD[support_K[values_K != 0].long()].double().numpy()
            fitted = np.linalg.lstsq(used_KD.T, x_D.double().numpy(), rcond=None)[0]
            best += float(((x_D.double().numpy() - fitted @ used_KD) ** 2).sum()) / variance
        assert best - tolerances.LOGGED_FVU <= entry.fvu_after_update < entry.fvu

    def test_fvu_of_an_uncentred_batch_is_about_its_mean(self) -> None:
        """Σ‖x − x̄‖² below the line, also where nothing is subtracted before coding."""
        x_BD = normal(200, 6) + 3
        start_MD = torch.eye(6)
        ksvd = started(learner(6, 2, centre=False), start_MD).partial_fit(x_BD)
        rest = x_BD.pow(2).sort(dim=1).values[:, :4].double().sum()  # one-hot atoms: the two largest go
        variance = (x_BD - x_BD.mean(dim=0)).double().pow(2).sum()
        assert ksvd.log[0].fvu == pytest.approx(float(rest / variance), abs=tolerances.LOGGED_FVU)


class TestDeadAtoms:
    """Samples in the first four of eight dimensions; the last two of six atoms are orthogonal to them all."""

    ATOMS = torch.eye(8)[[0, 1, 2, 3, 6, 7]]

    @staticmethod
    def samples(n: int) -> Tensor:
        return torch.cat([normal(n, 4), torch.zeros(n, 4)], dim=1)

    @pytest.mark.parametrize("update", UPDATES)
    def test_counted_and_redrawn_from_the_data(self, update: Update) -> None:
        x_BD = self.samples(100)
        ksvd = started(learner(6, 2, update=update, redraw="data"), self.ATOMS).partial_fit(x_BD)
        assert (ksvd.log[0].dead, ksvd.log[0].redrawn) == (2, 2)
        cosines = normalize(x_BD, dim=1) @ ksvd.atoms_MD[4:].T
        assert cosines.max(dim=0).values == pytest.approx([1.0, 1.0], abs=tolerances.UNIT_NORM[torch.float32])
        assert not torch.equal(ksvd.atoms_MD[4], ksvd.atoms_MD[5])
        ksvd.partial_fit(x_BD)
        assert ksvd.log[1].dead == 0

    def test_redrawn_at_random(self) -> None:
        ksvd = started(learner(6, 2, redraw="random"), self.ATOMS).partial_fit(self.samples(100))
        assert (ksvd.log[0].dead, ksvd.log[0].redrawn) == (2, 2)
        assert ksvd.atoms_MD[4:, 4:].abs().min() > 0, "not from the data: those are zero there"
        norms = ksvd.atoms_MD[4:].norm(dim=1)
        assert norms == pytest.approx([1.0, 1.0], abs=tolerances.UNIT_NORM[torch.float32])

    @pytest.mark.parametrize("update", UPDATES)
    def test_a_batch_smaller_than_the_dictionary_redraws_nothing(self, update: Update) -> None:
        ksvd = started(learner(6, 2, update=update), self.ATOMS).partial_fit(self.samples(5))
        assert ksvd.log[0].dead >= 2
        assert ksvd.log[0].redrawn == 0
        assert torch.equal(ksvd.atoms_MD[4:], self.ATOMS[4:])


class TestEncodeAndDecode:
    def test_round_trip_is_in_raw_units(self) -> None:
        """Samples that are exactly sparse around a centre far from 0."""
        problem = planted(300, 8, 8, 1)
        centre_D = 100 * torch.arange(8).float()
        ksvd = started(learner(8, 1), problem.atoms_MD, centre_D)
        x_BD = problem.x_BD + centre_D
        gap_BD = ksvd.decode(ksvd.encode(x_BD)) - x_BD
        assert gap_BD.abs().max() <= tolerances.CODE_ERROR[torch.float32] * x_BD.norm(dim=1).max()

    def test_coder_is_the_one_asked_for(self) -> None:
        x_BD = normal(50, 8)
        atoms_MD = normalize(normal(12, 8, 1), dim=1)
        errors = {}
        for coder in ("mp", "mp_refit", "omp", "ormp"):
            ksvd = started(learner(12, 4, coder=coder), atoms_MD)
            errors[coder] = float((ksvd.decode(ksvd.encode(x_BD)) - x_BD).norm())
        assert errors["mp"] > errors["mp_refit"] > errors["omp"] > errors["ormp"]

    def test_every_coder_learns_the_same(self) -> None:
        """The coder is for later: training codes by plain MP."""
        x_ND = planted(300, 12, 20, 3, noise=0.1).x_BD
        one, other = (learner(20, 3, coder=coder).fit(x_ND) for coder in ("mp", "omp"))
        assert torch.equal(one.atoms_MD, other.atoms_MD)


class TestWeighting:
    @pytest.mark.parametrize("kind", ["std", "fisher"])
    def test_learns_and_codes_in_the_weighted_space(self, kind: str) -> None:
        """As without a weighting on samples that were weighted before; only the mean is taken off first."""
        x_ND = planted(300, 12, 20, 3, noise=0.1).x_BD * torch.linspace(0.1, 10, 12) + 1.5
        gradients_ND = normal(500, 12, 3) @ normal(12, 12, 4)
        weighting = {
            "std": weighting_by_std(x_ND.var(dim=0), power=1.0),
            "fisher": weighting_by_fisher(gradients_ND.T @ gradients_ND / 500),
        }[kind]
        y_ND = weighting.apply(x_ND - x_ND.double().mean(dim=0).float())
        ours = learner(20, 3, weighting=weighting, passes=2).fit(x_ND)
        plain = learner(20, 3, centre=False, passes=2).fit(y_ND)
        assert torch.equal(ours.atoms_MD, plain.atoms_MD)
        assert [line.fvu for line in ours.log] == [line.fvu for line in plain.log]
        code, same = ours.encode(x_ND), plain.encode(y_ND)
        assert torch.equal(code.values_BK, same.values_BK)
        assert torch.equal(ours.decode(code), weighting.undo(plain.decode(same)) + ours.centre_D)
        norms = ours.atoms_MD.norm(dim=1)
        assert norms == pytest.approx([1.0] * 20, abs=tolerances.UNIT_NORM[torch.float32])

    def test_lowers_the_error_it_is_made_for(self) -> None:
        """Loud dimensions matter less than quiet ones: the error counted so falls, the plain one rises."""
        loudness_D = torch.linspace(0.1, 3, 16)
        x_ND = normal(2_000, 16) * loudness_D
        weighted = learner(32, 4, weighting=weighting_by_std(loudness_D**2, power=2.0), passes=3).fit(x_ND)
        plain = learner(32, 4, passes=3).fit(x_ND)
        gaps = [ksvd.decode(ksvd.encode(x_ND)) - x_ND for ksvd in (weighted, plain)]
        counted = [float((gap_ND / loudness_D**2).norm()) for gap_ND in gaps]
        assert counted[0] < 0.9 * counted[1]
        assert gaps[0].norm() > gaps[1].norm()

    def test_of_another_width(self) -> None:
        with pytest.raises(ShapeError, match=r"(?s)weighting is of another width.*d_in = 11.*limit: 12"):
            learner(20, 3, weighting=weighting_by_std(torch.ones(11))).fit(normal(100, 12))


class TestNonnegative:
    @pytest.mark.parametrize("update", UPDATES)
    @pytest.mark.parametrize("coder", ["mp", "mp_refit", "omp"])
    def test_codes_and_learning(self, coder: Coder, update: Update) -> None:
        x_ND = normal(600, 8).abs() @ normal(8, 12, 1)
        ksvd = learner(20, 3, nonnegative=True, coder=coder, update=update, passes=3, batch_samples=200)
        few, many = ksvd.fit(x_ND).log[0].fvu, ksvd.log[-1].fvu
        assert ksvd.encode(x_ND).values_BK.min() >= 0
        assert many < 0.8 * few
        signed = learner(20, 3, coder=coder, update=update, passes=3, batch_samples=200).fit(x_ND)
        assert signed.encode(x_ND).values_BK.min() < 0


class TestTrainK:
    @pytest.mark.parametrize("groups", [None, (8, 12)])
    def test_learns_as_with_fewer_and_codes_with_all(self, groups: tuple[int, ...] | None) -> None:
        x_ND = planted(600, 12, 20, 3, noise=0.1).x_BD
        options: dict[str, Any] = {"passes": 2, "batch_samples": 200, "groups": groups}
        ksvd, fewer = learner(20, 4, train_k=2, **options).fit(x_ND), learner(20, 2, **options).fit(x_ND)
        assert torch.equal(ksvd.atoms_MD, fewer.atoms_MD)
        assert ksvd.log[-1].l0 <= 2
        assert ksvd.encode(x_ND).l0().double().mean() > 3.9

    def test_more_than_codes_have(self) -> None:
        with pytest.raises(ShapeError, match=r"(?s)train_k must be between 1 and k.*train_k = 5, k = 3"):
            learner(20, 3, train_k=5).fit(normal(100, 12))


class TestPrecision:
    @pytest.mark.parametrize("groups", [None, (8, 12)])
    def test_bfloat16_products_learn_nearly_as_well(self, groups: tuple[int, ...] | None) -> None:
        """Atoms are chosen from rounded products; the update sees the samples themselves.

        A pick that rounding changed leads elsewhere, to an error above or below: so the mean of several trainings.
        """
        x_ND = planted(600, 12, 20, 3, noise=0.1).x_BD
        errors = {}
        for precision in ("float32", "bfloat16"):
            options: dict[str, Any] = {"passes": 6, "batch_samples": 200, "groups": groups, "precision": precision}
            errors[precision] = [learner(20, 4, seed=seed, **options).fit(x_ND).log[-1].fvu for seed in range(20)]
        assert errors["float32"] != errors["bfloat16"]
        full, rounded = (sum(values) / 20 for values in errors.values())
        assert rounded <= full * (1 + tolerances.BFLOAT16) + tolerances.BFLOAT16**2

    def test_unknown(self) -> None:
        with pytest.raises(ShapeError, match=r"(?s)precision='int8'.*float32, bfloat16"):
            learner(20, 3, precision="int8").fit(normal(100, 12))


class TestAverage:
    def test_is_the_weighted_mean_of_the_atoms_after_each_batch(self) -> None:
        x_ND = planted(600, 12, 20, 3, noise=0.1).x_BD
        options: dict[str, Any] = {"passes": 2, "batch_samples": 150, "redraw": "none"}
        ksvd = learner(20, 3, average=False, **options)
        seen: list[Tensor] = []
        ksvd.on_batch = lambda line: seen.append(ksvd.atoms_MD.double().clone())
        ksvd.fit(x_ND)
        mean_MD = seen[0]
        for age, atoms_MD in enumerate(seen[1:], start=2):
            mean_MD = mean_MD + 4 / (age + 3) * (atoms_MD - mean_MD)
        averaged = learner(20, 3, **options).fit(x_ND)
        gap_MD = averaged.atoms_MD.double() - normalize(mean_MD, dim=1)
        assert gap_MD.abs().max() <= tolerances.UNIT_NORM[torch.float32]
        assert [line.fvu for line in averaged.log] == [line.fvu for line in ksvd.log], "training does not see it"

    def test_lowers_the_heldout_error_of_small_batches(self) -> None:
        x_ND = normal(4_000, 32) * torch.arange(1, 33) ** -0.5
        train_ND, heldout_ND = x_ND.split([3_000, 1_000])
        options: dict[str, Any] = {"passes": 4, "batch_samples": 128}
        averaged, last = (learner(64, 4, average=average, **options).fit(train_ND) for average in (True, False))
        errors = [float((ksvd.decode(ksvd.encode(heldout_ND)) - heldout_ND).norm()) for ksvd in (averaged, last)]
        assert errors[0] ** 2 < 0.97 * errors[1] ** 2


class TestBatchesThatTellNothing:
    """One row, or the same row again and again: there is nothing to learn from, and nothing wrong with the others."""

    X_ND = planted(601, 12, 20, 3, noise=0.1).x_BD + 0.5
    PADDING = X_ND[:1].repeat(100, 1)

    @pytest.mark.parametrize(
        ("batches", "told"),
        [
            (X_ND.split(100), X_ND[:600].split(100)),
            ([X_ND[:300], PADDING, X_ND[300:600]], [X_ND[:300], X_ND[300:600]]),
            ([PADDING, X_ND[:1], X_ND[:300], X_ND[300:600]], [X_ND[:300], X_ND[300:600]]),
            ([X_ND[:300], torch.zeros(50, 12), X_ND[:300], X_ND[:0]], [X_ND[:300], X_ND[:300]]),
        ],
        ids=["a short last batch", "padding", "padding and a row first", "zeros"],
    )
    @pytest.mark.parametrize("passes", [1, 2])
    def test_in_a_stream(
        self, batches: list[Tensor], told: list[Tensor], passes: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        ksvd = learner(20, 3, passes=passes).fit(lambda: iter(batches))
        wanted = learner(20, 3, passes=passes).fit(lambda: iter(told))
        assert torch.equal(ksvd.atoms_MD, wanted.atoms_MD)
        assert torch.equal(ksvd.centre_D, wanted.centre_D)
        assert (ksvd.samples_seen, len(ksvd.log)) == (wanted.samples_seen, len(wanted.log))
        n_skipped = sum(len(batch_BD) > 0 for batch_BD in batches) - len(told)
        assert (ksvd.batches_passed_over, wanted.batches_passed_over) == (passes * n_skipped, 0)
        lines = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
        assert len(lines) == passes
        assert f"in pass {passes - 1}, {n_skipped} batches with" in lines[-1]

    def test_in_samples_that_are_all_there(self) -> None:
        """In the first pass, which is in their order."""
        x_ND = torch.cat([self.X_ND[:100], self.PADDING, self.X_ND[100:200]])
        ksvd = learner(20, 3, batch_samples=100).fit(x_ND)
        assert (ksvd.batches_passed_over, ksvd.samples_seen) == (1, 200)

    @pytest.mark.parametrize("bad", [PADDING, X_ND[:1], torch.zeros(5, 12)], ids=["padding", "a row", "zeros"])
    def test_partial_fit(self, bad: Tensor, caplog: pytest.LogCaptureFixture) -> None:
        seen: list[BatchLog] = []
        ksvd = learner(20, 3, on_batch=seen.append).partial_fit(self.X_ND[:300])
        assert ksvd.partial_fit(bad) is ksvd
        assert (ksvd.batches_passed_over, len(ksvd.log), len(seen)) == (1, 1, 1)
        assert "all the same, is passed over" in caplog.text
        ksvd.partial_fit(self.X_ND[300:])
        wanted = learner(20, 3).partial_fit(self.X_ND[:300]).partial_fit(self.X_ND[300:])
        assert torch.equal(ksvd.atoms_MD, wanted.atoms_MD)

    def test_partial_fit_with_nothing_before_it(self) -> None:
        ksvd = learner(20, 3)
        with pytest.raises(ConstantSamplesError, match=r"(?s)all samples.*the same.*1 samples.*cause.*cure"):
            ksvd.partial_fit(self.X_ND[:1])
        assert ksvd.state is None
        assert ksvd.batches_passed_over == 0

    def test_two_rows_that_differ_are_learned_from(self) -> None:
        ksvd = learner(20, 3).fit([self.X_ND[:300], self.X_ND[300:302]])
        assert (ksvd.samples_seen, ksvd.batches_passed_over) == (302, 0)

    def test_a_fit_that_saw_nothing_else(self) -> None:
        with pytest.raises(ConstantSamplesError, match=r"(?s)all samples of each batch.*3 batches, 201 samples.*cure"):
            learner(20, 3).fit([self.PADDING, self.X_ND[:1], self.PADDING])
        with pytest.raises(ConstantSamplesError, match=r"(?s)5 batches, 5 samples.*batches of a single sample"):
            learner(20, 3).fit(iter(self.X_ND[:5].split(1)))

    def test_what_is_wrong_is_still_said(self) -> None:
        with pytest.raises(ActivationError, match="hold NaN"):
            learner(20, 3).fit([self.X_ND[:300], torch.full((1, 12), float("nan"))])
        with pytest.raises(ShapeError, match=r"(?s)do not fit.*\(1, 11\)"):
            learner(20, 3).fit([self.X_ND[:300], self.X_ND[:1, :11]])


class TestArgumentsChanged:
    """Between two calls of partial_fit: some would be ignored, some change what is learned midway."""

    X_ND = planted(300, 12, 20, 3, noise=0.1).x_BD

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"n_atoms": 30}, "n_atoms: 20, now 30"),
            ({"coding": Coding(4)}, "k: 3, now 4"),
            ({"coding": Coding(3, nonnegative=True)}, "nonnegative: False, now True"),
            ({"seed": 5}, "seed: 0, now 5"),
            ({"centre": False}, "centre: True, now False"),
            ({"weighting": weighting_by_std(torch.ones(12))}, r"weighting: None, now a Weighting of \(12,\)"),
            ({"update": "exact", "n_atoms": 21}, "n_atoms: 20, now 21; update: 'sweep', now 'exact'"),
        ],
        ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
    )
    @pytest.mark.parametrize("began_with", ["fit", "partial_fit"])
    def test_refused(self, options: dict[str, Any], words: str, began_with: str) -> None:
        ksvd = getattr(learner(20, 3), began_with)(self.X_ND)
        atoms_MD, before = ksvd.atoms_MD.clone(), ksvd.options
        ksvd.options = replace(before, **options)
        with pytest.raises(ShapeError, match=rf"(?s)not what they were.*{words}.*cause.*cure"):
            ksvd.partial_fit(self.X_ND)
        ksvd.options = before
        assert torch.equal(ksvd.atoms_MD, atoms_MD)
        ksvd.partial_fit(self.X_ND)

    def test_what_may_change(self) -> None:
        """What is for afterwards, or for fit; and other objects that say the same."""
        weighting = weighting_by_std(self.X_ND.var(dim=0))
        ksvd = learner(20, 3, weighting=weighting).partial_fit(self.X_ND)
        same = weighting_by_std(self.X_ND.var(dim=0))
        options = {"coding": Coding(3, "omp"), "passes": 7, "batch_samples": 50, "weighting": same}
        ksvd.options = replace(ksvd.options, **options)  # type: ignore[arg-type]
        assert len(ksvd.partial_fit(self.X_ND).log) == 2

    def test_fit_begins_again(self) -> None:
        ksvd = learner(20, 3).partial_fit(self.X_ND)
        ksvd.options = replace(ksvd.options, n_atoms=30)
        assert ksvd.fit(self.X_ND).atoms_MD.shape == (30, 12)


class TestArguments:
    X_ND = planted(300, 12, 20, 3, noise=0.1).x_BD

    def test_of_numpy_are_as_good(self, tmp_path: Path) -> None:
        """And come out as Python's own: a checkpoint's fingerprint is JSON."""
        options: dict[str, Any] = {
            "passes": np.int32(2),
            "batch_samples": 100.0,
            "seed": np.uint64(7),
            "rtol": np.float32(0.25),
            "duplicate_cosine": np.float64(0.75),
            "average": np.bool_(False),
            "groups": np.array([8, 12]),
            "train_k": np.array(2),
            "log_path": str(tmp_path / "log.jsonl"),
            "checkpoint_path": str(tmp_path / "checkpoint"),
            "checkpoint_every": 1.0,
            "device": torch.device("cpu"),
        }
        ksvd = learner(np.int64(20), np.int64(3), **options)  # type: ignore[arg-type]
        plain = learner(20, 3, passes=2, batch_samples=100, seed=7, rtol=0.25, duplicate_cosine=0.75, average=False,
                        groups=(8, 12), train_k=2)  # fmt: skip
        assert ksvd.options == plain.options
        assert json.dumps(ksvd.coding.as_json()) == json.dumps(plain.coding.as_json())
        assert torch.equal(ksvd.fit(self.X_ND, resume=True).atoms_MD, plain.fit(self.X_ND).atoms_MD)
        assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 6

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"n_atoms": "20"}, "n_atoms must be a whole number"),
            ({"k": 2.5}, "k must be a whole number"),
            ({"k": True}, "k must be a whole number"),
            ({"seed": None}, "seed must be a whole number"),
            ({"seed": 2**64}, "seed is out of range"),
            ({"passes": "2"}, "passes must be a whole number"),
            ({"rtol": "0.1"}, "rtol must be a number"),
            ({"tau": float("nan")}, "tau must be a finite number"),
            ({"average": "yes"}, "average must be True or False"),
            ({"centre": 2}, "centre must be True or False"),
            ({"weighting": "std"}, "weighting must be a Weighting"),
            ({"coherence": [0.5]}, "coherence must be a number"),
            ({"log_path": 3}, "log_path must be a path"),
            ({"checkpoint_path": b"here"}, "checkpoint_path must be a path"),
            ({"checkpoint_every": "often"}, "checkpoint_every must be a whole number"),
            ({"keep_on_device": "cuda"}, "keep_on_device must be True or False"),
            ({"on_batch": "print"}, "on_batch must be a function"),
        ],
        ids=str,
    )
    def test_refused_before_any_work(self, options: dict[str, Any], words: str) -> None:
        options = {"n_atoms": 20, "k": 3, **options}
        with pytest.raises(ShapeError, match=rf"(?s){words}.*got"):
            learner(options.pop("n_atoms"), options.pop("k"), **options).fit(self.X_ND)

    def test_that_are_no_options(self) -> None:
        with pytest.raises(ShapeError, match=r"(?s)options must be LearnerOptions.*got: 20.*cure"):
            DictionaryLearner(20)  # type: ignore[arg-type]
        with pytest.raises(ShapeError, match=r"(?s)coding must be a Coding.*got: 3.*cure"):
            LearnerOptions(20, 3)  # type: ignore[arg-type]

    @pytest.mark.parametrize("device", ["mps", 0, "gpu", None, torch.device("meta")], ids=shown)
    def test_devices(self, device: Any) -> None:
        with pytest.raises(ConfigError):
            learner(20, 3, device=device).fit(self.X_ND)

    def test_codes(self) -> None:
        ksvd = learner(20, 3).fit(self.X_ND)
        code = ksvd.encode(self.X_ND.numpy())
        assert torch.equal(code.values_BK, ksvd.encode(self.X_ND).values_BK)
        with pytest.raises(ShapeError, match=r"(?s)decode: not a Code.*Tensor \(300, 20\).*dense.*cure"):
            ksvd.decode(code.to_dense(20))  # type: ignore[arg-type]
        with pytest.raises(ShapeError, match=r"(?s)decode: the code names atoms.*0 to 20.*0 to 19.*another dictionary"):
            ksvd.decode(Code(torch.ones(1, 2), torch.tensor([[0, 20]], dtype=torch.int32)))
        with pytest.raises(ShapeError, match=r"(?s)values and support.*\(1, 2\), \(1, 3\)"):
            ksvd.decode(Code(torch.ones(1, 2), torch.zeros(1, 3, dtype=torch.int32)))


def spoilt(value: float) -> Tensor:
    x_ND = normal(100, 8)
    x_ND[17, 3] = value
    return x_ND


class TestBadInput:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("method", ["fit", "partial_fit", "encode"])
    def test_not_finite(self, method: str, value: float) -> None:
        ksvd = learner(10, 3)
        if method == "encode":
            ksvd.fit(normal(100, 8))
        with pytest.raises(ActivationError, match=r"(?s)1 of 100 samples.*row 17.*cause.*cure"):
            getattr(ksvd, method)(spoilt(value))

    @pytest.mark.parametrize("centre", [True, False])
    @pytest.mark.parametrize("method", ["fit", "partial_fit"])
    def test_constant(self, method: str, centre: bool) -> None:
        x_ND = normal(1, 8).repeat(1000, 1)
        with pytest.raises(ActivationError, match=r"(?s)all samples .* are the same.*cause.*cure"):
            getattr(learner(10, 3, centre=centre), method)(x_ND)

    def test_fewer_samples_than_atoms(self) -> None:
        with pytest.raises(ShapeError, match=r"(?s)fewer samples than atoms.*9 samples, n_atoms = 10.*cure"):
            learner(10, 3).fit(normal(9, 8))
        with pytest.raises(ShapeError, match=r"(?s)9 samples, n_atoms = 10.*cure"):
            learner(10, 3).partial_fit(normal(9, 8))
        learner(10, 3, init="random").partial_fit(normal(9, 8))  # needs no samples to start from

    def test_first_batch_smaller_than_the_dictionary(self) -> None:
        with pytest.raises(ShapeError, match=r"(?s)first batch.*8 samples, n_atoms = 10.*larger batches"):
            learner(10, 3, batch_samples=8).fit(normal(100, 8))

    def test_k_above_d_in(self) -> None:
        with pytest.raises(ShapeError, match=r"(?s)k = 9.*d_in = 8"):
            learner(10, 9).fit(normal(100, 8))

    @pytest.mark.parametrize("shape", [(100, 7), (100,), (100, 8, 1)], ids=str)
    @pytest.mark.parametrize("method", ["partial_fit", "encode"])
    def test_other_width_than_fitted(self, method: str, shape: tuple[int, ...]) -> None:
        ksvd = learner(10, 3).fit(normal(100, 8))
        with pytest.raises(ShapeError, match=r"(?s)got: \(100,.*limit: \(B, 8\).*cause"):
            getattr(ksvd, method)(torch.ones(shape))

    @pytest.mark.parametrize("method", ["fit", "partial_fit"])
    @pytest.mark.parametrize("samples", [torch.ones(100), torch.ones(100, 8, 1)], ids=["1-D", "3-D"])
    def test_not_a_matrix(self, method: str, samples: Tensor) -> None:
        with pytest.raises(ShapeError, match=r"\(100,"):
            getattr(learner(10, 3), method)(samples)

    @pytest.mark.parametrize("method", ["fit", "partial_fit"])
    def test_integers(self, method: str) -> None:
        with pytest.raises(ShapeError, match="int64"):
            getattr(learner(10, 3), method)(torch.arange(800).view(100, 8))

    def test_before_fit(self) -> None:
        ksvd = learner(10, 3)
        with pytest.raises(NotFittedError, match=r"(?s)not fitted.*call fit or partial_fit"):
            ksvd.encode(normal(5, 8))
        with pytest.raises(NotFittedError, match=r"(?s)not fitted.*call fit or partial_fit"):
            ksvd.decode(Code(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)))

    @pytest.mark.parametrize(
        "bad",
        [torch.empty(0, 8), spoilt(float("nan")), torch.ones(100, 8), normal(9, 8), normal(100, 2)],
        ids=["empty", "NaN", "constant", "fewer samples than atoms", "k above d_in"],
    )
    def test_a_refused_first_batch_leaves_no_trace(self, bad: Tensor) -> None:
        """A caller may skip the batch and go on: the centre must come from the first batch that was accepted."""
        good_BD = normal(100, 8, 3) + 2
        ksvd = learner(10, 3)
        with pytest.raises((ActivationError, ShapeError)):
            ksvd.partial_fit(bad)
        assert ksvd.samples_seen == 0
        ksvd.partial_fit(good_BD)
        assert torch.equal(ksvd.atoms_MD, learner(10, 3).partial_fit(good_BD).atoms_MD)

    @pytest.mark.parametrize(
        ("n_atoms", "k", "options", "words"),
        [
            (10, 11, {}, "k = 11, n_atoms = 10"),
            (10, 0, {}, "k = 0"),
            (10, 3, {"passes": 0}, "passes"),
            (10, 3, {"batch_samples": 0}, "batch_samples"),
            (10, 3, {"atom_batch": 0}, "atom_batch"),
            (10, 3, {"update": "svd"}, "update='svd'"),
            (10, 3, {"init": "zeros"}, "init='zeros'"),
        ],
    )
    def test_options(self, n_atoms: int, k: int, options: dict[str, Any], words: str) -> None:
        with pytest.raises(ShapeError, match=words):
            learner(n_atoms, k, **options).fit(normal(100, 16))
        with pytest.raises(ShapeError, match=words):
            learner(n_atoms, k, **options).partial_fit(normal(100, 16))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_a_device_that_is_not_there(self) -> None:
        with pytest.raises(ConfigError, match=r"(?s)'cuda'.*no GPU.*cause.*cure"):
            learner(10, 3, device="cuda").fit(normal(100, 8))
