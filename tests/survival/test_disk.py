"""Disks that fill and folders that cannot be written: our own errors, and what is finished is kept."""

import json
import os
import random
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ksvd_sae.errors import DiskSpaceError, KsvdSaeError, ManifestError
from ksvd_sae.methods.base import TRAIN_LOG
from ksvd_sae.run.pipeline import Run
from ksvd_sae.store import MANIFEST, require_writable, sole_writer, write_json
from tests.activations.test_harvest import Reader
from tests.activations.test_harvest import run as run_harvest
from tests.run.test_pipeline import only
from tests.survival.conftest import Tally
from tests.tiny_saes import one_thread
from tests.tiny_shards import raw_activations, write_harvest

NOBODY = 65534


def harvest(folder: Path) -> None:
    run_harvest(folder / "activations" / "harvest", Reader())


def train(folder: Path) -> None:
    config = only("db-ksvd", "topk-sae")
    data = config.harvested.folder(folder)
    if not (data / MANIFEST).exists():
        x_ND = raw_activations(2500)
        write_harvest(data, config.harvested.key, x_ND[:2000], x_ND[2000:])
    with one_thread():
        Run(config, folder / "results", folder).train()


STAGES = {"harvest": harvest, "train": train}


def content(folder: Path) -> dict[str, Any]:
    """All files, but for what they say of the clock."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        if not path.is_file() or path.parent.name == "locks" or path.name == TRAIN_LOG:
            continue
        value: Any = path.read_bytes()
        if path.name == MANIFEST:
            value = {
                key: held for key, held in json.loads(value).items() if key not in ("written", "seconds", "checksum")
            }
        found[str(path.relative_to(folder))] = value
    return found


@contextmanager
def size_limit(n_bytes: int) -> Iterator[None]:
    """On the size of each file: as a full disk, but that it can be had everywhere."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def said_that_it_is_full(run: Callable[[], None], folder: Path) -> bool:
    """Whether it was; nothing but our own errors may come of it."""
    said = None
    try:
        run()
    except (DiskSpaceError, ManifestError) as error:
        said = error
    if said is not None:
        assert str(folder) in said.what
        # There may be no room for the lock.
        assert "free" in str(said.got) or "no lock can be taken" in said.what
    return said is not None


@pytest.mark.parametrize("stage", STAGES)
def test_files_that_may_not_grow(stage: str, tmp_path: Path, tally: Tally) -> None:
    run, whole, draw, full = STAGES[stage], tmp_path / "whole", random.Random(stage), 0
    run(whole)
    largest = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    for number in range(6):
        folder = tmp_path / str(number)
        for _ in range(2):
            with size_limit(draw.randrange(200, largest)):
                full += said_that_it_is_full(lambda folder=folder: run(folder), folder)
        run(folder)
        same = content(folder) == content(whole)
        tally.count(f"files limited in size during {stage}", survived=same)
        assert same, number
    assert full >= 6, "else this tests nothing"


def mount(folder: Path, options: str) -> None:
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk(stage: str, tmp_path: Path, tally: Tally) -> None:
    """Only where file systems can be mounted; ``test_files_that_may_not_grow`` goes everywhere."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts file systems")
    run, whole, disk, draw, full = STAGES[stage], tmp_path / "whole", tmp_path / "disk", random.Random(stage), 0
    run(whole)
    needed = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    disk.mkdir()
    for number in range(6):
        mount(disk, f"size={draw.randrange(16_384, needed)}")
        try:
            full += said_that_it_is_full(lambda: run(disk), disk)
            # Now there is room.
            mount(disk, f"remount,size={10 * needed}")
            run(disk)
            same = content(disk) == content(whole)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        tally.count(f"full disk during {stage}", survived=same)
        assert same, number
    assert full >= 3, "else this tests nothing"


# ---------------------------------------------------------------- folders that cannot be written


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """For whoever runs the tests, and for root as for nobody, whom permissions bind."""
    user = os.geteuid()
    folder.chmod(0o555)
    if user == 0:
        # Nobody may not enter the tests' own folders either.
        for parent in (folder, *folder.parents):
            if parent.stat().st_mode & 0o001 == 0:
                parent.chmod(parent.stat().st_mode | 0o011)
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


def test_results_that_cannot_be_written(tmp_path: Path) -> None:
    with read_only(tmp_path), pytest.raises(ManifestError, match=r"cannot be written") as caught:
        require_writable(tmp_path / "results" / "demo", "results of demo")
    assert str(tmp_path) in str(caught.value)
    require_writable(tmp_path / "results" / "demo", "results of demo")
    (tmp_path / "file").touch()
    with pytest.raises(ManifestError, match=r"cannot be written"):
        require_writable(tmp_path / "file" / "demo", "results of demo")


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    """Said before anything is computed."""
    begun = False
    with sole_writer(tmp_path / "other" / "a" / "b", "warm"):  # imports what nobody may not read
        pass
    cache = tmp_path / "cache"
    cache.mkdir()
    with read_only(cache), pytest.raises(ManifestError, match="no lock can be taken"):  # noqa: SIM117
        with sole_writer(cache / "activations" / "some", "harvest"):
            begun = True
    assert not begun


def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), sole_writer(tmp_path / "a" / "b", "harvest"):
        (tmp_path / "not there").read_text()
    with size_limit(500), pytest.raises(KsvdSaeError, match=r"writing some\.json: no room in") as caught:
        write_json(tmp_path / "some.json", "x" * 1000)
    assert "ulimit" in str(caught.value)
    assert list(tmp_path.glob("*.json")) == list(tmp_path.glob(".*.json*")) == []
