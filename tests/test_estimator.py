"""DoubleBatchKSVD as a scikit-learn transformer, and with every kind of input that is not a good tensor."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator
from torch import Tensor

from ksvd_sae.errors import ActivationError, InputTypeError, NotFittedError, ShapeError
from ksvd_sae.estimator import DoubleBatchKSVD
from ksvd_sae.learning import sources
from ksvd_sae.learning.coding import Coding
from ksvd_sae.learning.dbksvd import BatchLog, DictionaryLearner, LearnerOptions
from ksvd_sae.learning.weighting import weighting_by_std
from tests import tolerances
from tests.strategies import generator, planted, shown

X_ND = planted(300, 12, 20, 3, noise=0.1).x_BD + 1.5


def estimator(n_atoms: int = 20, k: int = 3, **options: Any) -> DoubleBatchKSVD:
    return DoubleBatchKSVD(n_atoms, k, **{"device": "cpu", **options})


def normal(n_samples: int, d_in: int, seed: int = 0) -> Tensor:
    return torch.randn(n_samples, d_in, generator=generator(seed))


def scikit_learn_checks() -> list[Any]:
    """(estimator, check) of scikit-learn's ``check_estimator``, for three ways to learn and code."""
    kinds = {
        "plain": estimator(8, 2),
        "matryoshka": estimator(8, 2, groups=(4, 4), coder="matryoshka", nonnegative=True),
        "exact": estimator(8, 2, update="exact", average=False, redraw="none", coder="omp"),
    }
    return [
        pytest.param(ksvd, check, id=f"{kind}, {getattr(check, 'func', check).__name__}")
        for kind, each in kinds.items()
        for ksvd, check in estimator_checks_generator(each, mark="xfail")
    ]


CHECKS = scikit_learn_checks()


class TestScikitLearn:
    @pytest.mark.parametrize(("ksvd", "check"), CHECKS)
    def test_its_own_checks(self, ksvd: Any, check: Any) -> None:
        """All of them apply and pass; it skips its array-API check itself where SCIPY_ARRAY_API is not set."""
        check(ksvd)

    def test_clone_keeps_every_argument(self, tmp_path: Path) -> None:
        weighting = weighting_by_std(X_ND.var(dim=0))
        ksvd = estimator(weighting=weighting, groups=[8, 12], passes=2, log_path=tmp_path / "log", seed=7).fit(X_ND)
        copy = clone(ksvd)
        assert copy.get_params().keys() == ksvd.get_params().keys()
        assert torch.equal(copy.weighting.matrix, weighting.matrix)
        assert {**copy.get_params(), "weighting": None} == {**ksvd.get_params(), "weighting": None}
        assert not hasattr(copy, "atoms_MD")
        assert torch.equal(copy.fit(X_ND).atoms_MD, ksvd.atoms_MD)

    def test_arguments_are_set_by_name_and_checked_by_fit(self) -> None:
        ksvd = estimator().set_params(k=5, n_atoms=16)
        assert (ksvd.k, ksvd.n_atoms) == (5, 16)
        with pytest.raises(ShapeError, match=r"(?s)Invalid parameter 'n_atom'.*limit: n_atoms, k"):
            ksvd.set_params(n_atom=3)
        with pytest.raises(ShapeError, match="k = 17, n_atoms = 16"):
            ksvd.set_params(k=17).fit(X_ND)

    def test_shown_by_what_is_not_default(self) -> None:
        assert repr(estimator(passes=2)) == "DoubleBatchKSVD(device='cpu', k=3, n_atoms=20, passes=2)"

    def test_in_a_pipeline_and_a_grid_search(self) -> None:
        pipeline = make_pipeline(StandardScaler(), estimator())
        search = GridSearchCV(pipeline, {"doublebatchksvd__k": [1, 4]}, cv=2).fit(X_ND.numpy())
        assert search.best_params_ == {"doublebatchksvd__k": 4}, "more atoms a sample, less error"


class TestArrays:
    @pytest.mark.parametrize("weighted", [False, True])
    def test_transform_and_back(self, weighted: bool) -> None:
        weighting = weighting_by_std(X_ND.var(dim=0), power=1.0) if weighted else None
        ksvd = estimator(weighting=weighting).fit(X_ND.numpy())
        codes = ksvd.transform(X_ND.numpy())
        assert (codes.shape, codes.dtype) == ((300, 20), np.float32)
        assert ((codes != 0).sum(axis=1) <= 3).all()
        assert np.array_equal(codes, ksvd.encode(X_ND).to_dense(20).numpy())
        rebuilt = ksvd.inverse_transform(codes)
        wanted = ksvd.decode(ksvd.encode(X_ND)).numpy()
        assert np.abs(rebuilt - wanted).max() <= tolerances.CODE_ERROR[torch.float32] * np.abs(wanted).max()
        assert np.array_equal(rebuilt, codes @ ksvd.components_ + ksvd.mean_)
        norms = np.linalg.norm(ksvd.components_, axis=1)
        assert (np.abs(norms - 1).max() <= tolerances.UNIT_NORM[torch.float32]) == (not weighted)

    def test_score_is_minus_the_fvu(self) -> None:
        ksvd = estimator().fit(X_ND)
        rebuilt_ND = ksvd.decode(ksvd.encode(X_ND))
        fvu = (X_ND - rebuilt_ND).square().sum() / (X_ND - X_ND.mean(dim=0)).square().sum()
        assert ksvd.score(X_ND.numpy()) == pytest.approx(-float(fvu), rel=1e-5)
        assert ksvd.score(X_ND) > estimator(k=1).fit(X_ND).score(X_ND)

    @pytest.mark.parametrize(
        "samples",
        [X_ND.numpy(), X_ND.numpy().tolist(), pd.DataFrame(X_ND.numpy()), np.asfortranarray(X_ND.numpy())],
        ids=["array", "rows", "frame", "columns first"],
    )
    def test_arrays_are_as_good_as_tensors(self, samples: Any) -> None:
        assert torch.equal(estimator().fit(samples).atoms_MD, estimator().fit(X_ND).atoms_MD)
        assert torch.equal(estimator().partial_fit(samples).atoms_MD, estimator().fit(X_ND).atoms_MD)
        ksvd = estimator().fit(X_ND)
        assert np.array_equal(ksvd.transform(samples), ksvd.transform(X_ND))
        assert np.array_equal(estimator().fit_transform(samples), ksvd.transform(X_ND))

    def test_a_view_that_may_not_be_written_to(self) -> None:
        array = X_ND.numpy().copy()
        array.flags.writeable = False
        assert torch.equal(estimator().fit(array).atoms_MD, estimator().fit(X_ND).atoms_MD)

    def test_sparse_samples(self) -> None:
        with pytest.raises(ShapeError, match=r"(?s)sparse samples are not supported.*cure: samples\.toarray\(\)"):
            estimator().fit(sparse.csr_matrix(X_ND.numpy()))

    def test_codes_of_another_dictionary(self) -> None:
        ksvd = estimator().fit(X_ND)
        with pytest.raises(ShapeError, match=r"(?s)codes do not fit.*\(5, 19\).*\(N, 20\)"):
            ksvd.inverse_transform(np.zeros((5, 19)))

    @pytest.mark.parametrize("name", ["components_", "mean_", "n_features_in_", "atoms_MD", "centre_D"])
    def test_nothing_is_there_before_fit(self, name: str) -> None:
        ksvd = estimator()
        assert not hasattr(ksvd, name)
        with pytest.raises(NotFittedError):
            getattr(ksvd, name)
        assert hasattr(ksvd.fit(X_ND), name)

    @pytest.mark.parametrize("method", ["transform", "score", "inverse_transform"])
    def test_methods_before_fit(self, method: str) -> None:
        with pytest.raises(NotFittedError, match="call fit or partial_fit first"):
            getattr(estimator(), method)(np.zeros((5, 20), dtype=np.float32))


FRAME = pd.DataFrame(X_ND.numpy(), columns=list("abcdefghijkl"))
TURNED = FRAME[FRAME.columns[::-1]]


class TestFrames:
    def test_names_of_columns(self) -> None:
        ksvd = estimator().fit(FRAME)
        assert list(ksvd.feature_names_in_) == list(FRAME.columns)
        assert list(ksvd.get_feature_names_out()) == [f"doublebatchksvd{atom}" for atom in range(20)]
        assert not hasattr(ksvd.fit(X_ND), "feature_names_in_")
        with pytest.raises(NotFittedError):
            estimator().get_feature_names_out()

    @pytest.mark.parametrize("output", ["pandas", "default"])
    def test_set_output(self, output: str) -> None:
        codes = estimator().set_output(transform=output).fit_transform(FRAME)
        wanted = estimator().fit_transform(X_ND)
        assert isinstance(codes, pd.DataFrame) == (output == "pandas")
        assert np.array_equal(np.asarray(codes), wanted)
        if isinstance(codes, pd.DataFrame):
            assert list(codes.columns) == [f"doublebatchksvd{atom}" for atom in range(20)]
            assert np.array_equal(
                estimator().fit(FRAME).inverse_transform(codes), estimator().fit(FRAME).inverse_transform(wanted)
            )

    def test_in_a_column_transformer(self) -> None:
        frame = FRAME.assign(kind="text")
        columns = ColumnTransformer([("codes", estimator(8, 2), list("abcdef")), ("as it is", "passthrough", ["kind"])])
        codes = columns.set_output(transform="pandas").fit_transform(frame)
        assert list(codes.columns) == [f"codes__doublebatchksvd{atom}" for atom in range(8)] + ["as it is__kind"]

    @pytest.mark.parametrize("method", ["transform", "encode", "score", "partial_fit"])
    @pytest.mark.parametrize("began_with", ["fit", "partial_fit"])
    def test_columns_in_another_order(self, method: str, began_with: str) -> None:
        ksvd = getattr(estimator(), began_with)(FRAME)
        with pytest.raises(ShapeError, match=r"(?s)must be in the same order.*cure: samples\[list"):
            getattr(ksvd, method)(TURNED)
        with pytest.raises(ShapeError, match=r"(?s)now missing:.*- c.*cure"):
            getattr(ksvd, method)(FRAME.drop(columns="c"))
        getattr(ksvd, method)(TURNED[list(ksvd.feature_names_in_)])

    def test_an_array_after_a_frame_is_taken_at_its_word(self) -> None:
        ksvd = estimator().fit(FRAME)
        with pytest.warns(UserWarning, match="does not have valid feature names"):
            codes = ksvd.transform(X_ND.numpy())
        assert np.array_equal(codes, ksvd.transform(FRAME))
        assert np.array_equal(codes, ksvd.transform(X_ND)), "a tensor never has names"

    def test_a_refused_fit_keeps_the_names(self) -> None:
        ksvd = estimator().fit(FRAME)
        with pytest.raises(ShapeError, match="k = 3, n_atoms = 2"):
            ksvd.set_params(n_atoms=2).fit(TURNED)
        assert list(ksvd.feature_names_in_) == list(FRAME.columns)
        assert np.array_equal(ksvd.set_params(n_atoms=20).transform(FRAME), estimator().fit(FRAME).transform(FRAME))

    def test_names_of_two_kinds(self) -> None:
        frame = FRAME.rename(columns={"a": 1})
        with pytest.raises(InputTypeError, match=r"(?s)string names.*cure: samples\.columns"):
            estimator().fit(frame)

    @pytest.mark.parametrize(
        ("column", "words"),
        [
            ("words", r"(?s)not numbers.*'words' \(str\) in row 0, column 'c'.*cure"),
            (pd.Timestamp("2020-01-01"), r"(?s)not numbers.*Timestamp.*in row 0, column 'c'"),
            (pd.Categorical(["u"] * 300), r"(?s)not numbers.*'u'.*column 'c'"),
            ([[1, 2]] * 300, r"(?s)not numbers.*\[1, 2\] \(list\).*column 'c'"),
        ],
        ids=["text", "times", "categories", "lists"],
    )
    @pytest.mark.parametrize("method", ["fit", "partial_fit", "transform", "encode", "score"])
    def test_columns_that_are_no_numbers(self, column: Any, words: str, method: str) -> None:
        ksvd = estimator() if "fit" in method else estimator().fit(FRAME)
        with pytest.raises(InputTypeError, match=words):
            getattr(ksvd, method)(FRAME.assign(c=column))

    @pytest.mark.parametrize("method", ["fit", "partial_fit", "transform", "encode", "score"])
    @pytest.mark.parametrize("kind", ["nullable", "None", "float"])
    def test_missing_numbers(self, kind: str, method: str) -> None:
        frame = {"nullable": FRAME.convert_dtypes(), "None": FRAME.astype(object), "float": FRAME.copy()}[kind]
        assert torch.equal(estimator().fit(frame).atoms_MD, estimator().fit(X_ND).atoms_MD)
        ksvd = estimator() if "fit" in method else estimator().fit(FRAME)
        frame.iloc[4, 2] = pd.NA if kind == "nullable" else None
        with pytest.raises(ActivationError, match=r"(?s)1 of 300 samples hold NaN.*row 4.*missing numbers.*cure"):
            getattr(ksvd, method)(frame)


class TestMapped:
    @pytest.fixture
    def mapped(self, tmp_path: Path) -> Any:
        np.save(tmp_path / "x.npy", X_ND.numpy())
        return np.load(tmp_path / "x.npy", mmap_mode="r")

    def test_as_in_memory(self, mapped: Any) -> None:
        ksvd, same = estimator().fit(mapped), estimator().fit(X_ND)
        assert torch.equal(ksvd.atoms_MD, same.atoms_MD)
        assert np.array_equal(ksvd.transform(mapped), same.transform(X_ND))
        assert torch.equal(ksvd.encode(mapped).support_BK, same.encode(X_ND).support_BK)
        assert ksvd.score(mapped) == same.score(X_ND)
        assert torch.equal(estimator().partial_fit(mapped).atoms_MD, estimator().partial_fit(X_ND).atoms_MD)

    def test_coded_some_rows_at_a_time(self, mapped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        ksvd = estimator().fit(X_ND)
        monkeypatch.setattr(sources, "_CHUNK_ROWS", 77)
        seen: list[int] = []
        encode = DictionaryLearner.encode

        def count(self: DictionaryLearner, x_BD: Tensor) -> Any:
            seen.append(len(x_BD))
            return encode(self, x_BD)

        monkeypatch.setattr(DictionaryLearner, "encode", count)
        codes, score, code = ksvd.transform(mapped), ksvd.score(mapped), ksvd.encode(mapped)
        assert seen == [77, 77, 77, 69] * 3
        tolerance = tolerances.CHUNKING[torch.float32] * np.abs(codes).max()
        assert np.abs(codes - ksvd.transform(X_ND)).max() <= tolerance
        assert np.array_equal(code.to_dense(20).numpy(), codes)
        assert score == pytest.approx(ksvd.score(X_ND), rel=1e-5)

    def test_of_another_width(self, mapped: Any) -> None:
        with pytest.raises(ShapeError, match="X has 11 features, but DoubleBatchKSVD is expecting 12"):
            estimator().fit(X_ND).transform(mapped[:, :11])


class TestSeeds:
    @pytest.mark.parametrize("kind", ["RandomState", "Generator"])
    def test_a_source_of_numbers_gives_another_to_every_fit(self, kind: str) -> None:
        def source() -> Any:
            return np.random.RandomState(3) if kind == "RandomState" else np.random.default_rng(3)

        ksvd, same = estimator(seed=source()), estimator(seed=source())
        first, second = (ksvd.fit(X_ND).atoms_MD.clone() for _ in range(2))
        assert not torch.equal(first, second)
        assert torch.equal(same.fit(X_ND).atoms_MD, first)
        # To look at it draws nothing.
        ksvd.transform(X_ND)
        assert torch.equal(same.fit(X_ND).atoms_MD, second)

    def test_none_is_numpys_global_source(self) -> None:
        drawn = []
        for _ in range(2):
            np.random.seed(5)
            ksvd = estimator(seed=None)
            drawn += [ksvd.fit(X_ND).atoms_MD.clone(), ksvd.fit(X_ND).atoms_MD.clone()]
        assert torch.equal(drawn[0], drawn[2])
        assert not torch.equal(drawn[0], drawn[1])

    def test_partial_fit_goes_on_with_the_seed_that_it_began_with(self) -> None:
        ksvd = estimator(seed=np.random.RandomState(3))
        ksvd.partial_fit(X_ND[:150]).partial_fit(X_ND[150:])
        assert len(ksvd.log) == 2

    def test_before_fit(self) -> None:
        ksvd = estimator(seed=None)
        assert not hasattr(ksvd, "atoms_MD")
        assert (ksvd.log, ksvd.samples_seen, ksvd.batches_passed_over) == ([], 0, 0)
        assert clone(ksvd).seed is None

    def test_a_number_of_numpy(self) -> None:
        assert torch.equal(estimator(seed=np.int64(7)).fit(X_ND).atoms_MD, estimator(seed=7).fit(X_ND).atoms_MD)

    def test_none_cannot_be_resumed(self, tmp_path: Path) -> None:
        ksvd = estimator(seed=None, checkpoint_path=tmp_path / "checkpoint")
        with pytest.raises(ShapeError, match=r"(?s)seed None.*cure: a whole number"):
            ksvd.fit(X_ND, resume=True)

    @pytest.mark.parametrize("seed", ["0", 1.5, torch.Generator(), (1, 2)], ids=shown)
    def test_others(self, seed: Any) -> None:
        with pytest.raises(InputTypeError, match="seed must be a whole number"):
            estimator(seed=seed).fit(X_ND)


class TestArguments:
    def test_a_grid_of_numpys_numbers(self) -> None:
        """As np.arange and np.logspace give them to a search."""
        grid = {"k": np.arange(1, 4, 2), "tau": np.linspace(0, 0.1, 2), "coder": np.array(["mp", "omp"])}
        search = GridSearchCV(estimator(), grid, cv=2).fit(X_ND.numpy())
        assert int(search.best_params_["k"]) == 3
        json.dumps(search.best_estimator_.coding.as_json())

    def test_changed_between_calls_of_partial_fit(self) -> None:
        ksvd = estimator().partial_fit(X_ND)
        with pytest.raises(ShapeError, match=r"(?s)not what they were.*n_atoms: 20, now 30.*set_params.*cure"):
            ksvd.set_params(n_atoms=30).partial_fit(X_ND)
        assert len(ksvd.set_params(n_atoms=20, coder="omp").partial_fit(X_ND).log) == 2

    def test_drift_is_refused(self) -> None:
        ksvd = estimator().partial_fit(X_ND)
        with pytest.raises(ActivationError, match="drifted away"):
            ksvd.partial_fit(X_ND.numpy() + 20)

    @pytest.mark.parametrize("codes", ["text", [["a"] * 20], sparse.csr_matrix(np.eye(20)), None], ids=shown)
    def test_codes_that_are_none(self, codes: Any) -> None:
        with pytest.raises(InputTypeError):
            estimator().fit(X_ND).inverse_transform(codes)

    @pytest.mark.parametrize("dtype", [np.int64, np.float64, np.float16])
    def test_codes_of_other_dtypes(self, dtype: Any) -> None:
        ksvd = estimator().fit(X_ND)
        codes = np.eye(20, dtype=dtype)
        wanted = ksvd.components_ + ksvd.mean_
        assert np.array_equal(ksvd.inverse_transform(codes), wanted)
        assert np.array_equal(ksvd.inverse_transform(torch.from_numpy(codes)), wanted)

    def test_bad_arguments_do_not_hide_that_it_is_not_fitted(self) -> None:
        ksvd = estimator(k="three")  # type: ignore[arg-type]
        assert not hasattr(ksvd, "n_features_in_")
        assert "three" in repr(ksvd)
        with pytest.raises(InputTypeError, match=r"k must be a whole number"):
            ksvd.fit(X_ND)


# A value other than the default for every argument.
CHANGED: dict[str, Any] = {
    "n_atoms": 16,
    "k": 4,
    "train_k": 3,
    "passes": 2,
    "batch_samples": 100,
    "update": "exact",
    "atom_batch": 7,
    "init": "random",
    "redraw": "data",
    "duplicate_cosine": 0.9,
    "average": False,
    "centre": False,
    "weighting": weighting_by_std(X_ND.var(dim=0)),
    "groups": (8, 8),
    "nonnegative": True,
    "rtol": 0.1,
    "tau": 0.05,
    "coherence": 0.7,
    "max_steps": 9,
    "precision": "bfloat16",
    "coder": "matryoshka",
    "seed": 5,
    "device": "cpu",
    "keep_on_device": False,
    "log_path": Path("log"),
    "checkpoint_path": Path("checkpoint"),
    "checkpoint_every": 3,
    "on_batch": print,
}


class TestTheLearnerBeneath:
    def test_gets_every_argument(self) -> None:
        ksvd = DoubleBatchKSVD(**CHANGED)
        assert ksvd.get_params() == CHANGED
        learner = ksvd.learner
        flat = {**vars(learner), **vars(learner.options), **vars(learner.coding)}
        assert {name: flat[name] for name in CHANGED} == CHANGED
        default = DoubleBatchKSVD(8, 2).learner
        assert (default.options, default.coding) == (LearnerOptions(8, Coding(2)), Coding(2))

    @pytest.mark.parametrize("average", [True, False])
    def test_gives_the_same(self, average: bool) -> None:
        ksvd = estimator(passes=2, batch_samples=150, average=average, coder="omp").fit(X_ND)
        options = LearnerOptions(20, Coding(3, "omp"), passes=2, batch_samples=150, average=average)
        learner = DictionaryLearner(options, device="cpu").fit(X_ND)
        assert torch.equal(ksvd.atoms_MD, learner.atoms_MD)
        assert torch.equal(ksvd.encode(X_ND).values_BK, learner.encode(X_ND).values_BK)

    def test_shows_its_atoms_while_it_learns(self) -> None:
        seen: list[Tensor] = []
        ksvd = estimator(passes=3, batch_samples=100)
        ksvd.set_params(on_batch=lambda line: seen.append(ksvd.atoms_MD.clone())).fit(X_ND)
        assert len(seen) == len(ksvd.log) == 9
        assert not torch.equal(seen[0], seen[-1])
        assert torch.equal(seen[-1], ksvd.atoms_MD)

    def test_codes_with_the_arguments_as_they_are_now(self) -> None:
        ksvd = estimator().fit(X_ND)
        atoms_MD, plain = ksvd.atoms_MD, ksvd.transform(X_ND)
        refitted = ksvd.set_params(coder="omp").transform(X_ND)
        assert torch.equal(ksvd.atoms_MD, atoms_MD)
        assert not np.array_equal(refitted, plain)
        assert np.array_equal(refitted, estimator(coder="omp").fit(X_ND).transform(X_ND))

    def test_resumes(self, tmp_path: Path) -> None:
        class StopError(Exception): ...

        def stop(line: BatchLog) -> None:
            if line.batch == 3:
                raise StopError

        options: dict[str, Any] = {"passes": 3, "batch_samples": 150}
        kept = {"checkpoint_path": tmp_path / "training.safetensors", "checkpoint_every": 1}
        with pytest.raises(StopError):
            estimator(on_batch=stop, **options, **kept).fit(X_ND)
        resumed = estimator(**options, **kept).fit(X_ND, resume=True)
        assert torch.equal(resumed.atoms_MD, estimator(**options).fit(X_ND).atoms_MD)
        assert len(resumed.log) == 6


UPDATES = ("sweep", "two_sweeps", "exact")


def in_order(ksvd: DoubleBatchKSVD, x_ND: Tensor) -> float:
    """The FVU, after a look at what must hold for every dictionary."""
    norms_M = torch.linalg.vector_norm(ksvd.atoms_MD.double(), dim=1)
    assert (norms_M - 1).abs().max() <= tolerances.UNIT_NORM[torch.float32]
    code = ksvd.encode(x_ND)
    assert code.values_BK.isfinite().all()
    assert code.l0().max() <= ksvd.k
    assert all(np.isfinite([line.fvu, line.fvu_after_update]).all() for line in ksvd.log)
    error_ND = ksvd.decode(code) - x_ND
    return float(error_ND.double().square().sum() / (x_ND - x_ND.mean(dim=0)).double().square().sum())


@pytest.mark.parametrize("update", UPDATES)
class TestOddInputWorks:
    def test_zero_rows(self, update: str) -> None:
        x_ND = normal(200, 8)
        x_ND[::2] = 0
        ksvd = estimator(12, 3, centre=False, update=update, passes=2).fit(x_ND)
        assert in_order(ksvd, x_ND) < 0.5
        assert not ksvd.encode(x_ND[:1]).values_BK.any()

    def test_duplicate_samples(self, update: str) -> None:
        """Six different samples, 50 times each, for 12 atoms: six atoms are enough and the others stay unit rows."""
        x_ND = normal(6, 8).repeat(50, 1)
        # The average of the atoms still holds a little of what they were at first.
        ksvd = estimator(12, 1, centre=False, update=update, average=False, passes=3, batch_samples=100).fit(x_ND)
        assert in_order(ksvd, x_ND) < tolerances.PERFECT_FVU

    @pytest.mark.parametrize("k", [1, 8])
    def test_k_is_1_and_k_is_d(self, update: str, k: int) -> None:
        x_ND = normal(300, 8)
        ksvd = estimator(12, k, update=update, passes=3).fit(x_ND)
        assert in_order(ksvd, x_ND) < (0.65 if k == 1 else 0.02)

    def test_as_many_samples_as_atoms(self, update: str) -> None:
        x_ND = normal(12, 8)
        assert in_order(estimator(12, 1, centre=False, update=update).fit(x_ND), x_ND) < tolerances.PERFECT_FVU

    def test_one_atom_one_dimension(self, update: str) -> None:
        x_ND = normal(50, 1)
        assert in_order(estimator(1, 1, update=update).fit(x_ND), x_ND) < tolerances.PERFECT_FVU

    @pytest.mark.parametrize("scale", [1e-15, 1e-4, 1e4, 1e15])
    def test_scale(self, update: str, scale: float) -> None:
        """The dictionary of c·x is that of x; so tiny and huge samples learn as well as others."""
        x_ND = normal(300, 8)
        plain, scaled = (estimator(12, 3, update=update, passes=2).fit(x_ND * c) for c in (1.0, scale))
        fvus = [in_order(ksvd, x_ND * c) for ksvd, c in ((plain, 1.0), (scaled, scale))]
        assert fvus[1] == pytest.approx(fvus[0], rel=0.1)

    def test_more_atoms_than_the_data_has_directions(self, update: str) -> None:
        """Rank 2 in 8 dimensions: residuals vanish, so nothing is left to draw atoms from."""
        x_ND = normal(300, 2) @ normal(2, 8, 1)
        ksvd = estimator(12, 2, update=update, passes=4, batch_samples=100).fit(x_ND)
        assert in_order(ksvd, x_ND) < 0.05


class TestOddInputIsRefused:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("method", ["fit", "partial_fit"])
    def test_nan_in_every_precision(self, method: str, dtype: torch.dtype) -> None:
        x_ND = normal(50, 8).to(dtype)
        x_ND[3, 3] = float("nan")
        with pytest.raises(ActivationError, match="1 of 50 samples hold NaN"):
            getattr(estimator(12, 3), method)(x_ND)

    def test_nan_in_a_later_batch_leaves_the_estimator_as_it_was(self) -> None:
        ksvd = estimator().partial_fit(X_ND)
        atoms_MD, spoilt_ND = ksvd.atoms_MD.clone(), X_ND.clone()
        spoilt_ND[3, 3] = float("nan")
        with pytest.raises(ActivationError):
            ksvd.partial_fit(spoilt_ND)
        assert torch.equal(ksvd.atoms_MD, atoms_MD)
        assert (len(ksvd.log), ksvd.samples_seen) == (1, 300)

    @pytest.mark.parametrize("first", [True, False])
    def test_an_empty_batch(self, first: bool) -> None:
        ksvd = estimator() if first else estimator().partial_fit(X_ND)
        with pytest.raises(ShapeError, match="batch is empty"):
            ksvd.partial_fit(X_ND[:0])

    def test_no_samples(self) -> None:
        with pytest.raises(ShapeError, match=r"(?s)fewer samples than atoms.*0 samples"):
            estimator().fit(X_ND[:0])

    def test_no_dimensions(self) -> None:
        with pytest.raises(ShapeError, match=r"0 feature\(s\)"):
            estimator().fit(torch.empty(300, 0))

    def test_samples_too_large_for_float32(self) -> None:
        with pytest.raises(ActivationError, match="hold NaN or infinity"):
            estimator().fit(X_ND.double() * 1e300)
