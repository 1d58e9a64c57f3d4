"""The dictionary on disk and off: bit for bit there and back, and an error that says what is wrong with a file."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from safetensors.torch import save_file
from sklearn.decomposition import PCA
from torch import Tensor

from ksvd_sae import dictionary as module
from ksvd_sae.dictionary import ATOMS_FILE, CONFIG_FILE, FORMAT, Dictionary, _checksum
from ksvd_sae.errors import ConfigError, DictionaryError, NotFittedError, ShapeError
from ksvd_sae.estimator import DoubleBatchKSVD
from ksvd_sae.learning.code import Code
from ksvd_sae.learning.coding import AnyCoder, Coding
from ksvd_sae.learning.sparse_coding import CODERS, Coder, encode
from ksvd_sae.learning.weighting import Weighting, weighting_by_fisher, weighting_by_std
from tests import tolerances
from tests.strategies import Problem, generator, generic, planted, problems, shown, unit_atoms

PROVENANCE = {"model": "some/model", "hook": "blocks.3.hook_resid_post", "seed": 3, "note": None, "scores": [0.1, 2]}


X_BD = 3 * torch.randn(20, 6, generator=generator(4))


def code_of(support: list[list[int]]) -> Code:
    return Code(torch.ones(1, 2), torch.tensor(support, dtype=torch.int32))


def example(coder: AnyCoder = "mp") -> Dictionary:
    groups = (4, 5) if coder == "matryoshka" else None
    atoms_MD = torch.eye(6)[:4] if coder == "projection" else unit_atoms(9, 6, dtype=torch.float32)
    return Dictionary(
        atoms_MD,
        10 * torch.arange(6).float() + 0.1,
        Coding(4, coder, rtol=0.1, max_steps=7, groups=groups),
        provenance=PROVENANCE,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    example().save(tmp_path / "saved")
    return tmp_path / "saved"


def rewrite(folder: Path, *without: str, **changes: Any) -> None:
    """Change the folder's config, and seal both files again."""
    config = {**json.loads((folder / CONFIG_FILE).read_text()), **changes}
    config = {key: value for key, value in config.items() if key not in (*without, "checksum")}
    if config["format"] >= 3:
        config["checksum"] = _checksum(config, folder)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


class TestWeighted:
    def test_codes_are_those_of_the_weighted_samples(self) -> None:
        weighting = weighting_by_std(torch.rand(6, generator=generator(1)) + 0.1)
        plain = replace(example(), centre_D=torch.zeros(6))
        weighted = replace(plain, weighting=weighting)
        x_BD = torch.randn(20, 6, generator=generator(2))
        code, wanted = weighted.encode(x_BD), plain.encode(weighting.apply(x_BD))
        assert torch.equal(code.values_BK, wanted.values_BK)
        assert torch.equal(code.support_BK, wanted.support_BK)
        gap_BD = weighted.decode(code) - weighting.undo(plain.decode(wanted))
        assert float(gap_BD.abs().max()) == 0

    def test_raw_atoms_rebuild_raw_samples(self) -> None:
        weighted = replace(example(), weighting=weighting_by_std(torch.rand(6, generator=generator(1)) + 0.1))
        x_BD = torch.randn(20, 6, generator=generator(2))
        code = weighted.encode(x_BD)
        rebuilt_BD = code.to_dense(weighted.n_atoms) @ weighted.raw_atoms() + weighted.centre_D
        assert float((rebuilt_BD - weighted.decode(code)).abs().max()) <= tolerances.MAP_AND_BACK * 60

    def test_map_of_another_width(self) -> None:
        with pytest.raises(ShapeError, match="atoms and weighting do not fit"):
            replace(example(), weighting=weighting_by_std(torch.ones(5)))

    def test_matryoshka_coder_without_groups(self) -> None:
        with pytest.raises(ShapeError, match="needs groups"):
            replace(example(), coding=Coding(4, "matryoshka"))


class TestRoundTrip:
    @pytest.mark.parametrize("coder", CODERS)
    def test_bit_for_bit(self, tmp_path: Path, coder: Coder) -> None:
        saved = example(coder)
        saved.save(tmp_path / "new" / "folder")
        loaded = Dictionary.load(tmp_path / "new" / "folder")
        assert torch.equal(loaded.atoms_MD, saved.atoms_MD)
        assert torch.equal(loaded.centre_D, saved.centre_D)
        assert loaded.atoms_MD.dtype == loaded.centre_D.dtype == torch.float32
        assert loaded.coding == Coding(4, coder, rtol=0.1, max_steps=7)
        assert loaded.provenance == PROVENANCE
        x_BD = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)) + saved.centre_D
        # Not bit for bit: a loaded tensor may lie at another alignment, and BLAS adds in another order there.
        gap_BD = saved.decode(saved.encode(x_BD)) - loaded.decode(loaded.encode(x_BD))
        assert gap_BD.abs().max() <= tolerances.CHUNKING[torch.float32] * x_BD.norm(dim=1).max()

    @pytest.mark.parametrize("kind", ["diagonal", "full"])
    def test_weighting_groups_and_signs(self, tmp_path: Path, kind: str) -> None:
        matrix = torch.rand(6, generator=generator(1)) + 0.5
        weighting = Weighting(matrix, 1 / matrix) if kind == "diagonal" else weighting_by_fisher(torch.diag(matrix))
        coding = Coding(4, "matryoshka", nonnegative=True, groups=(4, 5))
        saved = replace(example("matryoshka"), coding=coding, weighting=weighting)
        saved.save(tmp_path)
        loaded = Dictionary.load(tmp_path)
        assert loaded.coding == coding
        assert loaded.weighting is not None
        assert torch.equal(loaded.weighting.matrix, weighting.matrix)
        assert torch.equal(loaded.weighting.inverse, weighting.inverse)

    def test_exact_budgets(self, tmp_path: Path) -> None:
        for exact in (False, True):
            coding = Coding(3, "matryoshka", groups=(4, 5), exact_budgets=exact)
            replace(example("matryoshka"), coding=coding).save(tmp_path)
            assert Dictionary.load(tmp_path).coding == coding
            # Files of dictionaries without it are as they were before there was a choice.
            assert ("exact_budgets" in (tmp_path / CONFIG_FILE).read_text()) is exact

    @pytest.mark.parametrize(
        ("of_format", "coding"),
        [
            ('"format": 1', Coding(4, "omp", rtol=0.1, max_steps=7)),
            ('"format": 2, "groups": null, "nonnegative": true', Coding(4, "omp", 0.1, 7, nonnegative=True)),
            ('"format": 2, "groups": [4, 5], "nonnegative": false', Coding(4, "omp", 0.1, 7, groups=(4, 5))),
        ],
        ids=["1", "2", "2 with groups"],
    )
    def test_files_of_before_load(self, folder: Path, of_format: str, coding: Coding) -> None:
        """Written by hand as earlier versions wrote them."""
        (folder / CONFIG_FILE).write_text(
            f'{{{of_format}, "k": 4, "coder": "omp", "rtol": 0.1, "max_steps": 7, "provenance": {{"seed": 3}}}}'
        )
        loaded = Dictionary.load(folder)
        assert (loaded.coding, loaded.weighting, loaded.provenance) == (coding, None, {"seed": 3})
        assert torch.equal(loaded.atoms_MD, example().atoms_MD)

    @pytest.mark.parametrize("key", ["k", "coder", "rtol", "max_steps"])
    def test_nothing_that_was_always_there_is_made_up(self, folder: Path, key: str) -> None:
        rewrite(folder, key)
        with pytest.raises(DictionaryError, match=rf"(?s){key}.*cure"):
            Dictionary.load(folder)

    def test_atoms_that_are_a_view(self, tmp_path: Path) -> None:
        atoms_MD = unit_atoms(6, 9, dtype=torch.float32).T.contiguous().T
        assert not atoms_MD.is_contiguous()
        Dictionary(atoms_MD, torch.zeros(9), Coding(2)).save(tmp_path)
        assert torch.equal(Dictionary.load(tmp_path).atoms_MD, atoms_MD)

    def test_no_pickle_and_two_files_only(self, folder: Path) -> None:
        assert sorted(path.name for path in folder.iterdir()) == [ATOMS_FILE, CONFIG_FILE]

    def test_a_failed_save_leaves_the_old_dictionary(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full_disk(*_: object) -> None:
            raise OSError("No space left on device")

        monkeypatch.setattr(module, "save_file", full_disk)
        with pytest.raises(OSError, match="No space"):
            Dictionary(unit_atoms(3, 2, dtype=torch.float32), torch.zeros(2), Coding(1)).save(folder)
        assert torch.equal(Dictionary.load(folder).atoms_MD, example().atoms_MD)
        assert sorted(path.name for path in folder.iterdir()) == [ATOMS_FILE, CONFIG_FILE]

    def test_from_a_fitted_estimator(self) -> None:
        x_ND = planted(200, 8, 12, 2, noise=0.1).x_BD + 3
        ksvd = DoubleBatchKSVD(12, 2, coder="mp_refit", rtol=0.2, max_steps=5, device="cpu").fit(x_ND)
        taken = Dictionary.from_estimator(ksvd, {"seed": 0})
        assert taken.coding == Coding(2, "mp_refit", rtol=0.2, max_steps=5)
        assert taken.provenance == {"seed": 0}
        assert torch.equal(taken.decode(taken.encode(x_ND)), ksvd.decode(ksvd.encode(x_ND)))
        kept_MD = taken.atoms_MD.clone()
        ksvd.partial_fit(x_ND)
        assert torch.equal(taken.atoms_MD, kept_MD), "learning on must not change a dictionary that was taken out"


class TestLoadErrors:
    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
    def test_truncated_atoms(self, folder: Path, share: float) -> None:
        whole = (folder / ATOMS_FILE).read_bytes()
        (folder / ATOMS_FILE).write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(DictionaryError, match=r"(?s)saved.*truncated.*cure"):
            Dictionary.load(folder)

    @pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
    def test_truncated_config(self, folder: Path, share: float) -> None:
        whole = (folder / CONFIG_FILE).read_text()
        (folder / CONFIG_FILE).write_text(whole[: int(share * len(whole))])
        with pytest.raises(DictionaryError, match=r"(?s)saved.*truncated.*cure"):
            Dictionary.load(folder)

    def test_files_of_two_dictionaries(self, folder: Path, tmp_path: Path) -> None:
        replace(example(), centre_D=torch.ones(6)).save(tmp_path / "other")
        (tmp_path / "other" / ATOMS_FILE).replace(folder / ATOMS_FILE)
        with pytest.raises(DictionaryError, match=r"(?s)not as they were saved together.*cure"):
            Dictionary.load(folder)

    @pytest.mark.parametrize("name", [ATOMS_FILE, CONFIG_FILE])
    def test_missing_file(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        with pytest.raises(DictionaryError, match=rf"(?s){name}.*not a dictionary's folder.*cure"):
            Dictionary.load(folder)

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DictionaryError, match=r"(?s)nowhere.*not a dictionary's folder.*cure"):
            Dictionary.load(tmp_path / "nowhere")

    @pytest.mark.parametrize("text", ["[]", "null", '"text"', '{"format": "one"}', '{"format": 1}'])
    def test_config_of_another_form(self, folder: Path, text: str) -> None:
        (folder / CONFIG_FILE).write_text(text)
        with pytest.raises(DictionaryError, match=r"(?s)saved.*cure"):
            Dictionary.load(folder)

    def test_config_that_is_no_text(self, folder: Path) -> None:
        (folder / CONFIG_FILE).write_bytes(b"\xff\xfe\x00\x80")
        with pytest.raises(DictionaryError, match=r"(?s)saved.*cure"):
            Dictionary.load(folder)

    def test_newer_format(self, folder: Path) -> None:
        rewrite(folder, format=FORMAT + 1)
        with pytest.raises(DictionaryError, match=rf"(?s)newer.*format {FORMAT + 1}.*format {FORMAT}.*upgrade"):
            Dictionary.load(folder)

    @pytest.mark.parametrize(
        ("changes", "error", "words"),
        [
            ({"k": 7}, ShapeError, "k out of range"),
            ({"k": 0}, ShapeError, "k out of range"),
            ({"coder": "lars"}, ShapeError, "unknown coder"),
        ],
    )
    def test_values_that_do_not_fit(
        self, folder: Path, changes: dict[str, Any], error: type[Exception], words: str
    ) -> None:
        rewrite(folder, **changes)
        with pytest.raises(error, match=words):
            Dictionary.load(folder)

    @pytest.mark.parametrize(
        ("tensors", "error", "words"),
        [
            ({"atoms": torch.eye(6), "centre": torch.zeros(5)}, ShapeError, r"(?s)\(6, 6\).*\(5,\).*\(M, D\)"),
            ({"atoms": torch.eye(6)[0], "centre": torch.zeros(6)}, ShapeError, r"(?s)\(6,\).*\(M, D\)"),
            ({"atoms": 2 * torch.eye(6), "centre": torch.zeros(6)}, DictionaryError, r"(?s)6 of 6 atoms.*norm 2.*cure"),
            ({"atoms": torch.eye(6) / 0, "centre": torch.zeros(6)}, DictionaryError, "6 of 6 atoms"),
            ({"atoms": torch.eye(6)}, DictionaryError, "(?s)centre.*cure"),
        ],
        ids=["centre of another width", "1-D atoms", "not unit", "not finite", "no centre"],
    )
    def test_tensors_that_are_no_dictionary(
        self, folder: Path, tensors: dict[str, Tensor], error: type[Exception], words: str
    ) -> None:
        save_file(tensors, folder / ATOMS_FILE)
        rewrite(folder)
        with pytest.raises(error, match=words):
            Dictionary.load(folder)


class TestCoding:
    @given(problem=problems())
    def test_centre_is_subtracted_and_added(self, problem: Problem) -> None:
        centre_D = torch.arange(problem.x_BD.shape[1], dtype=torch.float64)
        dictionary = Dictionary(problem.atoms_MD, centre_D, Coding(problem.k))
        code = dictionary.encode(problem.x_BD + centre_D)
        wanted = encode(problem.x_BD + centre_D - centre_D, problem.atoms_MD, problem.k)
        assert torch.equal(code.values_BK, wanted.values_BK)
        gap_BD = dictionary.decode(code) - (wanted.reconstruct(problem.atoms_MD) + centre_D)
        assert gap_BD.abs().max() <= tolerances.CODE_ERROR[torch.float64]

    @pytest.mark.parametrize("coder", CODERS)
    def test_coder_and_its_options_are_used(self, coder: Coder) -> None:
        dictionary = example(coder)
        x_BD = generic(20, 6, 9, 4).x_BD.float()
        code = dictionary.encode(x_BD + dictionary.centre_D)
        wanted = encode(
            x_BD + dictionary.centre_D - dictionary.centre_D, dictionary.atoms_MD, 4, coder=coder, rtol=0.1, max_steps=7
        )
        assert torch.equal(code.values_BK, wanted.values_BK)
        assert torch.equal(code.support_BK, wanted.support_BK)

    @pytest.mark.parametrize("shape", [(3, 5), (6,), (3, 6, 1)], ids=str)
    def test_samples_of_another_width(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ShapeError, match=r"(?s)limit: \(B, 6\).*cause"):
            example().encode(torch.ones(shape))

    def test_sizes(self) -> None:
        assert (example().n_atoms, example().d_in) == (9, 6)

    @pytest.mark.parametrize(
        "samples",
        [X_BD.numpy(), X_BD.double().numpy().tolist(), pd.DataFrame(X_BD.numpy()), [X_BD], {"x": X_BD}, X_BD.double()],
        ids=["array", "rows", "frame", "list of one", "dict of one", "float64"],
    )
    def test_arrays_are_as_good_as_tensors(self, samples: Any) -> None:
        code, wanted = example().encode(samples), example().encode(X_BD)
        assert torch.equal(code.values_BK, wanted.values_BK)
        assert torch.equal(code.support_BK, wanted.support_BK)

    @pytest.mark.parametrize(
        ("samples", "words"),
        [
            (X_BD[0], r"(?s)do not fit the dictionary.*got: \(6,\).*cure: Reshape"),
            (X_BD.reshape(4, 5, 6), r"(?s)got: \(4, 5, 6\).*limit: \(B, 6\).*cure: x\.reshape\(-1, 6\)"),
            (torch.tensor(1.0), r"(?s)got: \(\).*limit: \(B, 6\)"),
            (torch.ones(3, 6, dtype=torch.int64), r"(?s)not floating point.*int64.*cure"),
            (X_BD.to_sparse(), "sparse samples"),
            (np.ones((3, 5), np.float32), r"(?s)got: \(3, 5\).*limit: \(B, 6\)"),
            ([["a"] * 6], "not numbers"),
            (None, "not samples"),
            (iter([X_BD]), "not an array of samples"),
        ],
        ids=["1-D", "3-D", "scalar", "whole numbers", "sparse", "array", "text", "None", "stream"],
    )
    def test_what_is_no_batch_of_samples(self, samples: Any, words: str) -> None:
        with pytest.raises(ShapeError, match=words):
            example().encode(samples)

    @pytest.mark.parametrize(
        ("code", "words"),
        [
            (torch.ones(2, 9), r"(?s)Dictionary\.decode: not a Code.*Tensor \(2, 9\).*dense codes.*cure"),
            (np.ones((2, 9)), r"(?s)not a Code.*ndarray"),
            (None, r"(?s)not a Code.*None"),
            (code_of([[0, 9]]), r"(?s)names atoms.*0 to 9.*limit: 0 to 8.*another dictionary"),
            (code_of([[-1, 2]]), r"(?s)names atoms.*-1 to 2"),
            (Code(torch.ones(2), torch.zeros(2, dtype=torch.int32)), r"(?s)values and support.*\(2,\)"),
        ],
        ids=["dense", "array", "None", "too many atoms", "fewer than none", "1-D"],
    )
    def test_what_is_no_code(self, code: Any, words: str) -> None:
        with pytest.raises(ShapeError, match=words):
            example().decode(code)

    def test_no_samples_at_all(self) -> None:
        code = example().encode(X_BD[:0])
        assert example().decode(code).shape == (0, 6)


class TestArguments:
    def test_arrays(self) -> None:
        made = example()
        same = Dictionary(made.atoms_MD.numpy(), made.centre_D.tolist(), made.coding)  # type: ignore[arg-type]
        assert torch.equal(same.atoms_MD, made.atoms_MD)
        assert same.encode(X_BD).values_BK.shape == (20, 4)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"atoms_MD": torch.eye(6).long()}, "atoms_MD is not floating point"),
            ({"atoms_MD": "atoms"}, "atoms_MD is not floating point|atoms_MD is no array"),
            ({"atoms_MD": [[1.0, 0.0], [0.0]]}, "atoms_MD is no array"),
            ({"coding": 4}, "coding is of another type"),
            ({"weighting": torch.ones(6)}, "weighting is of another type"),
            ({"provenance": ["model"]}, "provenance is of another type"),
            ({"provenance": {"loss": float("nan")}}, r"provenance\.loss is nan.*JSON"),
            ({"provenance": {"scores": np.array([0.5, np.inf])}}, r"provenance\.scores\[1\] is inf"),
            ({"provenance": {"model": object()}}, r"provenance\.model cannot be stored as JSON"),
        ],
        ids=shown,
    )
    def test_refused(self, changes: dict[str, Any], words: str) -> None:
        with pytest.raises(ShapeError, match=words):
            replace(example(), **changes)

    def test_of_numpy(self, tmp_path: Path) -> None:
        """What is stored of them is JSON."""
        provenance = {"seed": np.int64(3), "loss": np.float32(0.5), "layers": np.arange(2), "folder": tmp_path}
        coding = Coding(np.int64(4), "mp", rtol=np.float32(0.5), groups=np.array([4, 5]))  # type: ignore[arg-type]
        saved = replace(example(), coding=coding, provenance=provenance)
        saved.save(str(tmp_path / "saved"))
        loaded = Dictionary.load(str(tmp_path / "saved"), device=torch.device("cpu"))
        assert loaded.coding == Coding(4, "mp", rtol=0.5, groups=(4, 5))
        assert loaded.provenance == {"seed": 3, "loss": 0.5, "layers": [0, 1], "folder": str(tmp_path)}

    def test_provenance_that_was_written_to_is_looked_at_before_anything_is(self, tmp_path: Path) -> None:
        dictionary = example()
        dictionary.provenance["loss"] = float("nan")
        with pytest.raises(ShapeError, match=r"(?s)Dictionary\.save: provenance\.loss is nan.*cure"):
            dictionary.save(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
        dictionary.provenance["loss"] = np.float64(0.5)
        dictionary.save(tmp_path / "saved")
        assert Dictionary.load(tmp_path / "saved").provenance["loss"] == 0.5

    def test_nan_of_before_it_was_refused_loads(self, folder: Path) -> None:
        rewrite(folder, format=2, provenance={"loss": float("nan")})
        assert Dictionary.load(folder).provenance == {"loss": "NaN"}

    @pytest.mark.parametrize("place", [3, b"here", None, ""], ids=shown)
    def test_no_folder(self, place: Any) -> None:
        with pytest.raises(ShapeError, match=r"Dictionary\.save: folder must be a path"):
            example().save(place)
        with pytest.raises(ShapeError, match=r"Dictionary\.load: folder must be a path"):
            Dictionary.load(place)

    @pytest.mark.parametrize("device", ["gpu", 0, None], ids=shown)
    def test_no_device(self, folder: Path, device: Any) -> None:
        with pytest.raises(ConfigError, match="no device of this name"):
            Dictionary.load(folder, device=device)

    @pytest.mark.parametrize("learner", [PCA(), "ksvd", None, X_BD], ids=lambda value: type(value).__name__)
    def test_no_learner(self, learner: Any) -> None:
        with pytest.raises(ShapeError, match=r"(?s)from_estimator: no learner.*limit: a DoubleBatchKSVD"):
            Dictionary.from_estimator(learner)

    def test_a_learner_that_has_not_learned(self) -> None:
        with pytest.raises(NotFittedError):
            Dictionary.from_estimator(DoubleBatchKSVD(4, 2))
