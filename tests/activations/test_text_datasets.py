"""Data sets with configurations, revisions and files of their own, what save_to_disk wrote, and true causes.

Folders are read by ``datasets`` itself; the Hub is a server on the loopback, asked from a process of its own: the Hub
libraries read its address at their import.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from pydantic import ValidationError

from ksvd_sae.activations.text import TextConfig, documents
from ksvd_sae.errors import HubError, KsvdSaeError, TextError
from ksvd_sae.run.config import load_config
from ksvd_sae.store import content_hash
from tests.tiny_hub import GATED, commit_of, served_datasets

CARD = b"---\nconfigs:\n- config_name: one\n  data_files: one.jsonl\n- config_name: two\n  data_files: two.jsonl\n---\n"
FILES = {"README.md": CARD, "one.jsonl": b'{"text": "one"}\n', "two.jsonl": b'{"text": "two"}\n'}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that ``datasets`` reads as it reads a repository: two configurations."""
    (tmp_path / "data").mkdir()
    for name, content in FILES.items():
        (tmp_path / "data" / name).write_bytes(content)
    return tmp_path / "data"


def read(**keys: Any) -> list[Any]:
    return list(documents(TextConfig(**keys), seed=0))


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize("streaming", [True, False])
def test_a_configuration_of_several(folder: Path, streaming: bool) -> None:
    assert read(dataset=str(folder), config="two", streaming=streaming) == ["two"]
    assert read(dataset=str(folder), config="one", streaming=streaming) == ["one"]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("keys", "limit", "message"),
    [
        ({}, "'one', 'two'", r"Config name is missing.*\n.*\n.*several configurations\n.*text\.config to one"),
        ({"config": "three"}, "'one', 'two'", r"config 'three'\).*\n.*\n.*no such configuration"),
        ({"config": "one", "split": "test"}, "'train'", r"split 'test', config 'one'.*\n.*\n.*no such split"),
        ({"data_files": "none.jsonl"}, None, r"data_files 'none\.jsonl'.*\n.*no file of these names"),
    ],
    ids=["none named", "no such", "no such split", "no such file"],
)
def test_the_true_cause_is_named(
    folder: Path, streaming: bool, keys: dict[str, Any], limit: str | None, message: str
) -> None:
    with pytest.raises(HubError, match=message) as caught:
        read(dataset=str(folder), streaming=streaming, **keys)
    assert caught.value.limit == limit
    assert "network" not in str(caught.value)


def test_a_part_of_a_split(folder: Path) -> None:
    with pytest.raises(HubError, match=r"limit: 'train'\n.*part of a split.*\n.*streaming: false"):
        read(dataset=str(folder), config="one", split="train[:1]")
    assert read(dataset=str(folder), config="one", split="train[:1]", streaming=False) == ["one"]


@pytest.mark.parametrize("data_files", ["two.jsonl", ["one.jsonl", "two.jsonl"], "*.jsonl"])
def test_files_of_a_data_set(folder: Path, data_files: Any) -> None:
    assert read(dataset=str(folder), data_files=data_files)[-1] == "two"


# datasets leaves the file of a CSV open that it streams.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_files_by_their_format(tmp_path: Path) -> None:
    """Tables that a folder of text does not have."""
    (tmp_path / "a.csv").write_text("text,label\none,1\ntwo,2\n")
    assert read(dataset="csv", data_files=str(tmp_path / "*.csv")) == ["one", "two"]
    before = TextConfig(dataset="csv", data_files=str(tmp_path / "*.csv")).content_hash()
    (tmp_path / "a.csv").write_text("text,label\nthree,1\n")
    assert TextConfig(dataset="csv", data_files=[str(tmp_path / "a.csv")]).content_hash() not in (None, before)
    assert TextConfig(dataset="csv", data_files="https://example.org/a.csv").content_hash() is None
    with pytest.raises(HubError, match="no file of these names"):
        read(dataset="csv", data_files=str(tmp_path / "b.csv"))
    with pytest.raises(ValidationError, match=r"'csv' is a format of files and needs text\.data_files"):
        TextConfig(dataset="csv")


def test_a_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    with pytest.raises(HubError, match=r"nowhere.*\n.*a wrong path, or a folder without data\n.*text\.dataset"):
        read(dataset=str(tmp_path / "nowhere"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read(dataset="~/data", config="one") == ["one"]


def test_a_program_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(HubError, match=r"data set is a program.*\n.*refs/convert/parquet"):
        read(dataset=str(tmp_path / "data"))


def test_a_file_that_breaks_off_among_rows(folder: Path) -> None:
    (folder / "one.jsonl").write_bytes(b'{"text": "one"}\n{"text": "tw')
    with pytest.raises(HubError, match=r"(reading|loading) data set .*(\n.*)*files that datasets cannot read"):
        read(dataset=str(folder), config="one")


@pytest.mark.parametrize("keys", [{}, {"config": "one"}])
def test_an_unknown_failure_is_not_said_to_be_the_network(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of cheese")

    monkeypatch.setattr("datasets.load_dataset", broken)
    with pytest.raises(HubError, match="RuntimeError: out of cheese") as caught:
        read(dataset="owner/name", **keys)
    assert "network" not in str(caught.value)


def test_no_place_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "/nonexistent")

    monkeypatch.setattr("datasets.load_dataset", broken)
    with pytest.raises(HubError, match=r"'/nonexistent'\n.*without a home folder.*\n.*set HF_HOME"):
        read(dataset="owner/name")


def test_a_connection_that_breaks_off_among_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "one"}
        raise ConnectionError("reset")

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows())
    found = documents(TextConfig(dataset="owner/name"), 0)
    assert next(found) == "one"
    with pytest.raises(HubError, match=r"reading data set 'owner/name'.*\n.*no network.*\n.*run again"):
        next(found)


def test_a_folder_has_no_revisions(folder: Path) -> None:
    with pytest.raises(TextError, match=r"no revisions\n  got: text\.revision: v1\n  cure: leave"):
        read(dataset=str(folder), config="one", revision="v1")


@pytest.mark.parametrize("key", ["config", "revision", "data_files"])
def test_keys_of_the_hub_elsewhere(key: str) -> None:
    with pytest.raises(ValidationError, match=rf"text\.{key} goes with text\.source 'hub', not 'folder'"):
        TextConfig(source="folder", dataset="x", **{key: "y"})


# ---------------------------------------------------------------- keys and names


def test_what_was_made_before_is_found_again() -> None:
    """Configs that name none of the later keys have the keys from before there were any."""
    old = {"source": "hub", "dataset": "owner/name", "split": "train", "column": "text", "streaming": True}
    assert TextConfig(dataset="owner/name").model_dump(mode="json") == old
    assert content_hash(load_config("demo").harvested.key["text"]) == "0ac0a9f0b3a2"
    for name in ("pythia-160m", "gemma-2-2b"):
        assert content_hash(load_config(name).harvested.key["text"]) == "eb462425e485"


@pytest.mark.parametrize(
    "keys", [{"config": "two"}, {"revision": "v1"}, {"data_files": "a.jsonl"}, {"data_files": ["a.jsonl"]}]
)
def test_later_keys_are_in_the_key(keys: dict[str, Any]) -> None:
    config = TextConfig(dataset="owner/name", **keys)
    assert config.model_dump(mode="json").items() >= keys.items()
    assert TextConfig.model_validate(config.model_dump(mode="json")) == config


def test_the_name_has_the_configuration() -> None:
    assert TextConfig(dataset="Salesforce/wikitext", config="wikitext-2-v1").name == "wikitext-wikitext-2-v1"
    assert TextConfig(dataset="Salesforce/wikitext").name == "wikitext"


# ---------------------------------------------------------------- save_to_disk


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    data = datasets.Dataset.from_dict({"text": ["one", None, "two\u2028"], "label": [1, 2, 3]})
    data.save_to_disk(tmp_path / "saved", num_shards=2)
    return tmp_path / "saved"


@pytest.fixture
def saved_splits(tmp_path: Path) -> Path:
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    return tmp_path / "splits"


@pytest.mark.parametrize("source", ["folder", "hub"])
def test_what_save_to_disk_wrote(saved: Path, saved_splits: Path, source: str) -> None:
    assert read(source=source, dataset=str(saved)) == ["one", "two\u2028"]
    assert read(source=source, dataset=str(saved_splits)) == ["train"]
    assert read(source=source, dataset=str(saved_splits), split="test") == ["test"]


def test_its_content_is_in_the_key(saved: Path, saved_splits: Path, tmp_path: Path) -> None:
    hashes = [
        TextConfig(dataset=str(place), split=split).content_hash()
        for place, split in ((saved, "train"), (saved_splits, "train"), (saved_splits, "test"))
    ]
    assert None not in hashes
    assert len(set(hashes)) == 3
    datasets.Dataset.from_dict({"text": ["train"]}).save_to_disk(tmp_path / "again")
    assert TextConfig(source="folder", dataset=str(tmp_path / "again")).content_hash() == hashes[1]


def test_a_saved_format_does_not_change_the_rows(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"text": [[1, 2], [3]], "picture": [b"", b""]}).with_format("numpy")
    assert data.format["type"] == "numpy"
    data.save_to_disk(tmp_path / "saved")
    assert [d.ids for d in read(source="folder", dataset=str(tmp_path / "saved"))] == [[1, 2], [3]]


def test_a_saved_split_under_another_name(tmp_path: Path) -> None:
    """A data set that is one split is read without asking which; another split that is asked for is not there."""
    data = datasets.Dataset.from_dict({"text": ["one"]}, split="validation")
    data.save_to_disk(tmp_path / "saved")
    assert read(dataset=str(tmp_path / "saved")) == ["one"]
    with pytest.raises(TextError, match="no split 'train'\n  limit: validation"):
        read(dataset=str(tmp_path / "saved"), split="train")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"split": "valid"}, r"no split 'valid'\n  limit: train, test"),
        ({"split": "train[:1]"}, r"no split 'train\[:1\]'\n.*\n.*part of a split"),
        ({"column": "body"}, r"no column 'body'\n  got: text\n"),
        ({"config": "one"}, r"save_to_disk wrote it, so it has no config\n  cure: leave text\.config out"),
    ],
)
def test_what_a_saved_data_set_lacks(saved_splits: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(TextError, match=message):
        read(dataset=str(saved_splits), **keys)


def test_a_column_of_numbers(saved: Path) -> None:
    with pytest.raises(TextError, match=r"saved, row 1: column 'label' holds no text\n  got: int: 1"):
        read(dataset=str(saved), column="label")


def test_a_damaged_one(saved: Path) -> None:
    shards = sorted(saved.glob("*.arrow"))
    shards[1].unlink()
    with pytest.raises(TextError, match=r"incomplete or damaged\n.*save_to_disk"):
        read(dataset=str(saved))
    with pytest.raises(TextError, match=r"00001-of-00002\.arrow is missing"):
        TextConfig(dataset=str(saved)).content_hash()


def test_an_empty_one(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "saved")
    with pytest.raises(TextError, match="empty"):
        read(dataset=str(tmp_path / "saved"))


# ---------------------------------------------------------------- the Hub

READ = """
import json, sys
from ksvd_sae.activations.text import TextConfig, documents
from ksvd_sae.activations.token_ids import tokenizer_name
from ksvd_sae.errors import KsvdSaeError

for line in sys.stdin:
    try:
        config = TextConfig(**json.loads(line))
        found = [d if isinstance(d, str) else [d.ids, tokenizer_name(config)] for d in documents(config, 0)]
    except KsvdSaeError as error:
        found = [type(error).__name__, str(error)]
    print(json.dumps(found), flush=True)
"""
OLD = {"one.jsonl": b'{"text": "an older one"}\n'}
IDS = {"a.jsonl": b'{"input_ids": [1, 2]}\n', "sae_lens.json": b'{"tokenizer_name": "owner/tokenizer"}'}
NAME = "owner/name"
CASES: dict[str, dict[str, Any]] = {
    # In this order: the first that is not streamed leaves a copy in the cache.
    "no configuration": {},
    "revision that is not there": {"revision": "older"},
    "files that are not there": {"data_files": "none.jsonl"},
    "configuration": {"config": "two"},
    "configuration, whole": {"config": "one", "streaming": False},
    "revision that is not there, and a copy of another": {"config": "one", "revision": "older"},
    "branch": {"revision": "old"},
    "commit": {"revision": commit_of("old")},
    "files": {"data_files": ["two.jsonl"]},
    "token ids": {"revision": "ids", "column": "input_ids", "data_files": "a.jsonl"},
    "no such data set": {"dataset": "owner/none"},
    "gated": {"dataset": GATED},
}


@pytest.fixture(scope="module")
def from_hub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What each case gives, or the error's type and message."""
    home = tmp_path_factory.mktemp("hub")
    lines = "".join(json.dumps({"dataset": NAME, **case}) + "\n" for case in CASES.values())
    with served_datasets({NAME: {"main": FILES, "old": OLD, "ids": IDS}}) as (endpoint, _):
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
        for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE"):
            environment.pop(name, None)
        done = subprocess.run(
            [sys.executable, "-c", READ], env=environment, input=lines, capture_output=True, text=True, check=True
        )
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize(
    ("case", "found"),
    [
        ("configuration", ["two"]),
        ("configuration, whole", ["one"]),
        ("branch", ["an older one"]),
        ("commit", ["an older one"]),
        ("files", ["two"]),
        ("token ids", [[[1, 2], "owner/tokenizer"]]),
    ],
)
def test_data_sets_of_the_hub(from_hub: dict[str, list[str]], case: str, found: list[Any]) -> None:
    assert from_hub[case] == found


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("no configuration", ("Config name is missing", "limit: 'one', 'two'", "set text.config to one of them")),
        ("revision that is not there", ("'older'", "no such revision", "text.revision", "/owner/name/commits/main")),
        ("revision that is not there, and a copy of another", ("no revision 'older'", commit_of("main"))),
        ("files that are not there", ("none.jsonl", "no file of these names", "text.data_files")),
        ("no such data set", ("'owner/none'", "a misspelt name, or a private data set")),
        ("gated", (GATED, "a gated data set", "accept its terms")),
    ],
)
def test_what_the_hub_refuses(from_hub: dict[str, list[str]], case: str, parts: tuple[str, ...]) -> None:
    kind, message = from_hub[case]
    assert kind == HubError.__name__
    assert issubclass(HubError, KsvdSaeError)
    assert all(part in message for part in parts), message


def test_no_network_and_no_copy(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    lines = json.dumps({"dataset": NAME, "config": "one"}) + "\n"
    done = subprocess.run(
        [sys.executable, "-c", READ], env=environment, input=lines, capture_output=True, text=True, check=True
    )
    assert "no network, or HF_HUB_OFFLINE=1, and no copy in the Hub's cache" in json.loads(done.stdout)[1]
