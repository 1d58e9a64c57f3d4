"""Hashes, manifests, and files that are whole or not there."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ksvd_sae import store as provenance
from ksvd_sae.device import cpu_name
from ksvd_sae.errors import DiskSpaceError, ManifestError
from ksvd_sae.store import (
    MANIFEST,
    atomic_path,
    cache_dir,
    content_hash,
    file_sha256,
    is_being_written,
    is_finished,
    read_manifest,
    require_disk_space,
    sole_writer,
    versions,
    write_json,
    write_manifest,
)

KEY = {"model": {"name": "m", "hook": "h"}, "tokens": 100, "centre": True}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


class TestAtomicPath:
    def test_replaces_the_target(self, tmp_path: Path) -> None:
        target = tmp_path / "new" / "file.txt"
        for text in ("one", "two"):
            with atomic_path(target) as temporary:
                assert temporary.parent == target.parent, "a rename across file systems is not atomic"
                temporary.write_text(text)
            assert target.read_text() == text
        assert list(target.parent.iterdir()) == [target]

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_failure_leaves_the_old_file_and_no_litter(self, tmp_path: Path, error: type[BaseException]) -> None:
        target = tmp_path / "file.txt"
        target.write_text("old")

        def write() -> None:
            with atomic_path(target) as temporary:
                temporary.write_text("half")
                raise error

        with pytest.raises(error):
            write()
        assert target.read_text() == "old"
        assert list(tmp_path.iterdir()) == [target]

    def test_failure_without_an_old_file_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="stop"), atomic_path(tmp_path / "file.txt"):
            raise ValueError("stop")
        assert list(tmp_path.iterdir()) == []

    def test_two_writers_do_not_share_a_temporary_file(self, tmp_path: Path) -> None:
        target = tmp_path / "file.txt"
        with atomic_path(target) as one, atomic_path(target) as two:
            assert one != two
            one.write_text("one")
            two.write_text("two")
        assert target.read_text() == "one", "the outer block ends last"
        assert list(tmp_path.iterdir()) == [target]

    @pytest.mark.parametrize("value", [float("nan"), {1, 2}])
    def test_json_that_is_none(self, tmp_path: Path, value: Any) -> None:
        write_json(tmp_path / "a.json", {"fine": 1})
        with pytest.raises((TypeError, ValueError)):
            write_json(tmp_path / "a.json", {"bad": value})
        assert json.loads((tmp_path / "a.json").read_text()) == {"fine": 1}
        assert len(list(tmp_path.iterdir())) == 1


class TestContentHash:
    @given(value=st.dictionaries(st.text(max_size=5), json_values, max_size=5), order=st.randoms(use_true_random=False))
    def test_order_of_keys_does_not_matter(self, value: dict[str, Any], order: Random) -> None:
        items = list(value.items())
        order.shuffle(items)
        assert content_hash(dict(items)) == content_hash(value)
        assert content_hash({"outer": dict(items)}) == content_hash({"outer": value})

    @given(value=json_values)
    def test_survives_json(self, value: Any) -> None:
        assert content_hash(json.loads(json.dumps(value))) == content_hash(value)

    @pytest.mark.parametrize(
        ("one", "other"),
        [({"a": 1}, {"a": 2}), ({"a": 1}, {"b": 1}), ([1, 2], [2, 1]), (1, "1"), (None, {}), ({"a": None}, {})],
    )
    def test_different_values(self, one: Any, other: Any) -> None:
        assert content_hash(one) != content_hash(other)

    def test_is_twelve_hex_digits_that_stay(self) -> None:
        """Folder names hold it: a change here orphans every cached folder."""
        canonical = b'{"a":[1,null],"b":"x"}'
        assert content_hash({"b": "x", "a": [1, None]}) == hashlib.sha256(canonical).hexdigest()[:12]

    @pytest.mark.parametrize("size", [0, 1, (1 << 20) + 3])
    def test_file_digest_with_and_without_the_library(self, tmp_path: Path, size: int) -> None:
        path = tmp_path / "blob"
        path.write_bytes(bytes(range(251)) * (size // 251) + b"x" * (size % 251))
        wanted = hashlib.sha256(path.read_bytes()).hexdigest()
        assert file_sha256(path) == wanted
        with path.open("rb") as file:
            assert provenance._digest(file) == wanted, "the way of Python 3.10"


class TestManifest:
    def test_round_trip(self, tmp_path: Path) -> None:
        written = write_manifest(tmp_path, "harvest", KEY, tokens=100, files={"a": "b"})
        read = read_manifest(tmp_path, "harvest", KEY)
        assert read == written == read_manifest(tmp_path, "harvest")
        assert (read["stage"], read["key"], read["hash"]) == ("harvest", KEY, content_hash(KEY))
        assert (read["tokens"], read["files"]) == (100, {"a": "b"})
        assert read["versions"] == versions()
        assert {"python", "torch", "numpy", "numba", "ksvd-sae"} <= set(read["versions"])
        assert read["machine"] == {"cpu": cpu_name(), "threads": torch.get_num_threads()}

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(
            ManifestError, match=r"(?s)reading harvest from .*no manifest.json.*cause.*ksvd-sae harvest"
        ):
            read_manifest(tmp_path, "harvest", KEY)

    @pytest.mark.parametrize("content", [b"", b'{"stage": "harv', b"\xff\xfe\x80"])
    def test_not_json(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / MANIFEST).write_bytes(content)
        with pytest.raises(ManifestError, match=r"(?s)not JSON.*altered.*cure: delete"):
            read_manifest(tmp_path, "harvest", KEY)

    @pytest.mark.parametrize("text", ["[]", "null", "3", '"text"'])
    def test_json_that_is_no_manifest(self, tmp_path: Path, text: str) -> None:
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(ManifestError, match=r"(?s)reading .*cure"):
            read_manifest(tmp_path, "harvest", KEY)

    def test_an_altered_fact(self, tmp_path: Path) -> None:
        """Manifests of before there were checksums are read."""
        write_manifest(tmp_path, "harvest", KEY, tokens=100)
        changed = {**json.loads((tmp_path / MANIFEST).read_text()), "tokens": 101}
        (tmp_path / MANIFEST).write_text(json.dumps(changed))
        with pytest.raises(ManifestError, match=r"(?s)checksum is not that of what it says.*cure"):
            read_manifest(tmp_path, "harvest", KEY)
        del changed["checksum"]
        (tmp_path / MANIFEST).write_text(json.dumps(changed))
        assert read_manifest(tmp_path, "harvest", KEY)["tokens"] == 101

    def test_another_stage(self, tmp_path: Path) -> None:
        write_manifest(tmp_path, "train", KEY)
        with pytest.raises(ManifestError, match=r"(?s)another stage.*got: train.*limit: harvest.*cure"):
            read_manifest(tmp_path, "harvest", KEY)

    @pytest.mark.parametrize(
        ("other", "named"),
        [
            ({**KEY, "tokens": 200}, "tokens: found 100, wanted 200"),
            ({**KEY, "model": {"name": "m", "hook": "g"}}, "model.hook: found 'h', wanted 'g'"),
            ({**KEY, "extra": 1}, "extra: found None, wanted 1"),
            ({name: KEY[name] for name in ("model", "tokens")}, "centre: found True, wanted None"),
        ],
    )
    def test_another_key_names_what_differs(self, tmp_path: Path, other: dict[str, Any], named: str) -> None:
        write_manifest(tmp_path, "harvest", KEY)
        with pytest.raises(ManifestError) as caught:
            read_manifest(tmp_path, "harvest", other)
        assert f"got: {named}\n" in str(caught.value), "this difference and no other"
        assert "cure: move the folder away" in str(caught.value)

    def test_only_the_first_differences_are_named(self, tmp_path: Path) -> None:
        write_manifest(tmp_path, "harvest", {f"key{i}": i for i in range(9)})
        with pytest.raises(ManifestError) as caught:
            read_manifest(tmp_path, "harvest", {f"key{i}": i + 1 for i in range(9)})
        assert str(caught.value).count("wanted") == 4

    def test_tuples_and_lists_are_one_key(self, tmp_path: Path) -> None:
        """A key comes back from JSON with lists: that is no other config."""
        write_manifest(tmp_path, "harvest", {"sizes": (1, 2)})
        assert is_finished(tmp_path, "harvest", {"sizes": [1, 2]})

    def test_is_finished(self, tmp_path: Path) -> None:
        assert not is_finished(tmp_path, "harvest", KEY)
        assert not is_finished(tmp_path / "nowhere", "harvest", KEY)
        write_manifest(tmp_path, "harvest", KEY)
        assert is_finished(tmp_path, "harvest", dict(reversed(KEY.items())))
        with pytest.raises(ManifestError, match="tokens"):
            is_finished(tmp_path, "harvest", {**KEY, "tokens": 1})
        with pytest.raises(ManifestError, match="another stage"):
            is_finished(tmp_path, "train", KEY)


Usage = namedtuple("Usage", "total used free")


class TestDiskSpace:
    def test_too_little(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(2**40, 2**40 - 2**30, 2**30))
        with pytest.raises(
            DiskSpaceError, match=r"(?s)writing shards: .*got: 1.00 GiB free.*limit: 1.50 GiB.*KSVD_SAE_CACHE"
        ):
            require_disk_space(tmp_path / "new", 3 * 2**29, "writing shards")

    def test_enough(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(2**40, 2**40 - 2**30, 2**30))
        require_disk_space(tmp_path / "new", 2**30, "writing shards")


class TestCacheDir:
    def test_from_the_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KSVD_SAE_CACHE", str(tmp_path))
        assert cache_dir() == tmp_path

    @pytest.mark.parametrize("value", [None, ""])
    def test_default_is_our_own(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str | None) -> None:
        monkeypatch.delenv("KSVD_SAE_CACHE", raising=False)
        if value is not None:
            monkeypatch.setenv("KSVD_SAE_CACHE", value)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        assert cache_dir() == tmp_path / ".cache" / "ksvd_sae"


def test_tests_have_a_home() -> None:
    """Where the user has none that can be written; libraries keep what they compile and download there."""
    script = "import os, tests.conftest; print(os.access(os.path.expanduser('~'), os.W_OK))"
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "HOME": "/nonexistent", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


HOLDER = """
import sys, time
from pathlib import Path
from ksvd_sae.store import sole_writer
with sole_writer(Path(sys.argv[1]), "test"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And it says who has it while it is held."""
    caplog.set_level("INFO", "ksvd_sae")
    folder = tmp_path / "cache" / "dictionaries" / "one"
    with subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert is_being_written(folder)
        threading.Timer(0.5, holder.kill).start()
        with sole_writer(folder, "train x"):
            pass
        assert not is_being_written(folder)
        assert f"train x: process {holder.pid} on" in caplog.text
        assert not is_being_written(folder.with_name("another"))
    with sole_writer(folder.with_name("another"), "train y"), sole_writer(folder, "train x"):
        pass
    assert caplog.text.count("waiting") == 1


@pytest.mark.parametrize("host", [platform.node(), "another-host"])
def test_what_a_killed_process_says_of_itself_keeps_nobody(
    host: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ksvd_sae")
    owner = tmp_path / "locks" / "dictionaries-one.owner"
    owner.parent.mkdir()
    owner.write_text(f"process 1 on {host}")
    with sole_writer(tmp_path / "dictionaries" / "one", "train x"):
        assert owner.read_text() == f"process {os.getpid()} on {platform.node()}"
    assert not owner.exists()
    assert "waiting" not in caplog.text


def test_what_a_killed_process_had_not_finished_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "activations" / "some"
    (folder / "train").mkdir(parents=True)
    for name in ("train/shard-0.safetensors", "train/.shard-1.safetensors.abcd1234", ".manifest.json.abcd1234"):
        (folder / name).write_bytes(b"half")
    with sole_writer(folder, "harvest"):
        assert [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()] == ["train/shard-0.safetensors"]


def test_where_no_lock_can_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locks").write_text("a file in the place of the folder")
    refused = pytest.raises(ManifestError, match=r"(?s)train x: no lock can be taken in .*locks.*KSVD_SAE_CACHE")
    with refused, sole_writer(tmp_path / "dictionaries" / "one", "train x"):
        raise AssertionError("it went on")

    def unsupported(*_: object, **__: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.FileLock.acquire", unsupported)
    refused = pytest.raises(ManifestError, match=r"(?s)support flock.*file system without locks")
    with refused, sole_writer(tmp_path / "else" / "dictionaries" / "one", "train x"):
        raise AssertionError("it went on")


def test_what_fails_under_the_lock_is_not_renamed(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="of the work itself"), sole_writer(tmp_path / "a" / "b", "train x"):
        raise OSError("of the work itself")
    with sole_writer(tmp_path / "a" / "b", "train x"):
        pass
