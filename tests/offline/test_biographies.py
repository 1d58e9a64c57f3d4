"""Biographies: each attribute is in its own words, and nothing of one attribute tells of the other."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig
from sae_bench.sae_bench_utils import dataset_info

from ksvd_sae.errors import TextError
from ksvd_sae.offline.biographies import GENDERS, NAME, PROFESSIONS, biographies, write_dataset

HE, SHE = {"he", "his", "him"}, {"she", "her", "hers"}


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("gender", GENDERS)
@pytest.mark.parametrize("profession", PROFESSIONS)
def test_texts_say_the_gender_and_never_the_profession(profession: str, gender: str) -> None:
    texts = biographies(profession, gender, 300, seed=1)
    assert len(set(texts)) == 300
    mine, other = (HE, SHE) if gender == "male" else (SHE, HE)
    for text in texts:
        assert "{" not in text
        assert words(text) & mine, text
        assert not words(text) & other, text
        # As in bias_in_bios' "hard_text".
        assert not words(text) & {profession, f"{profession}s"}, text


def test_the_same_seed_gives_the_same_texts() -> None:
    assert biographies("nurse", "male", 50, seed=3) == biographies("nurse", "male", 50, seed=3)
    assert biographies("nurse", "male", 50, seed=3) != biographies("nurse", "male", 50, seed=4)


def test_professions_have_words_of_their_own() -> None:
    """Work sentences of one profession share few words with another's, whoever does the work."""
    common = {
        profession: {
            word
            for word, n in Counter(w for text in biographies(profession, "female", 400, 0) for w in words(text)).items()
            if n >= 40
        }
        for profession in PROFESSIONS
    }
    for one in PROFESSIONS:
        others = set().union(*(common[other] for other in PROFESSIONS if other != one))
        assert len(common[one] - others) >= 4, one


def test_data_set_is_balanced_and_split(tmp_path: Path) -> None:
    write_dataset(tmp_path, n_train=30, n_test=12)
    train, test = rows_of(tmp_path / "train.jsonl"), rows_of(tmp_path / "test.jsonl")
    for rows, n in ((train, 30), (test, 12)):
        cells = Counter((row["profession"], row["gender"]) for row in rows)
        assert set(cells.values()) == {n}
        assert len(cells) == len(PROFESSIONS) * len(GENDERS)
    assert not {row["hard_text"] for row in train} & {row["hard_text"] for row in test}


def test_numbers_and_pairs_are_those_of_saebench() -> None:
    assert {name: dataset_info.profession_dict[name] for name in PROFESSIONS} == PROFESSIONS
    assert dataset_info.gender_dict == GENDERS
    assert "bias_in_bios" in NAME, "SAEBench asserts it"
    pairs = ScrAndTppEvalConfig().column1_vals_lookup["LabHC/bias_in_bios_class_set1"]
    assert {name for pair in pairs for name in pair} == set(PROFESSIONS)


@pytest.mark.parametrize(("profession", "gender", "n"), [("pilot", "male", 3), ("nurse", "other", 3)])
def test_no_templates(profession: str, gender: str, n: int) -> None:
    with pytest.raises(TextError, match="no templates"):
        biographies(profession, gender, n, 0)
