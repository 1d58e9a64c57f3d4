"""Where a result came from: content hashes, versions, manifests, and writes that are whole or not there.

Every stage reads folders and writes one folder with a ``manifest.json``. A folder's name ends in
the hash of what went into it, so a stage that finds a finished folder under its own hash can
reuse it, and a folder that does not match is refused rather than overwritten.
"""

import errno
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ksvd_sae.errors import DiskSpaceError, ManifestError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# What a manifest records: the packages that numbers depend on.
TRACKED_PACKAGES = (
    "ksvd-sae",
    "torch",
    "numpy",
    "numba",
    "scipy",
    "transformers",
    "transformer-lens",
    "sae-lens",
    "sae-bench",
    "datasets",
    "scikit-learn",
)


def cache_dir() -> Path:
    """The project's own cache: $KSVD_SAE_CACHE, else ~/.cache/ksvd_sae (never the user's HF_HOME)."""
    return Path(os.environ.get("KSVD_SAE_CACHE") or Path.home() / ".cache" / "ksvd_sae")


def checksum(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, by which a file tells that it was altered."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def content_hash(value: Any) -> str:
    """First 12 hex digits of the SHA-256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def named_otherwise(path: Path) -> list[Path]:
    """Files beside ``path``, NAME-HASH.json or NAME-HASH_ENDING, with its hash and ending but another name.

    What they hold follows from the same things: a training has its seed in its name only where a run has several.
    """
    _, _, ending = path.name.rpartition("-")
    return sorted(other for other in path.parent.glob(f"*-{ending}") if other != path)


def copy_of_other_name(path: Path) -> bool:
    """Make ``path`` from a file that differs in the name alone; False if there is none."""
    for other in named_otherwise(path)[:1]:
        with atomic_path(path) as temporary:
            shutil.copyfile(other, temporary)
        return True
    return False


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Installed versions of everything that a number depends on; absent packages are left out."""
    installed = {"python": platform.python_version()}
    for package in TRACKED_PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


@lru_cache(maxsize=1)
def commit() -> str:
    """Commit of this package's checkout ('+' if it has uncommitted changes), 'unknown' outside one."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return "unknown"
    try:
        head, dirty = (
            subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--", "."])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if dirty else "")


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary file beside ``target`` that takes its place only if the block ends well.

    It is on disk before it takes the place, and the place is before this returns: what follows from it may count on it,
    whatever dies.

    Raises: DiskSpaceError if there is no room for it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        with _room_in(target.parent, f"writing {target.name}"):
            yield temporary
        temporary.chmod(0o644)  # mkstemp makes files that only their owner can read
        # Some file systems find only now that there is no room.
        with _room_in(target.parent, f"writing {target.name}"):
            _on_disk(temporary)
        os.replace(temporary, target)
        _on_disk(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


# No room, no more room for this user, and a file larger than is allowed.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def _room_in(folder: Path, what: str) -> Iterator[None]:
    """A full disk under ``folder`` is a DiskSpaceError."""
    try:
        yield
    except DiskSpaceError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        # As safetensors, which is written in Rust, says it.
        if said := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(said[1])
        if number not in _FULL:
            raise
        free_bytes = shutil.disk_usage(_there(folder)).free
        raise DiskSpaceError(
            f"{what}: no room in {folder}: {os.strerror(number)}",
            got=f"{free_bytes / 2**30:.2f} GiB free",
            cause="a limit on the size of files (ulimit -f)" if number == errno.EFBIG else "other data on this disk",
            cure="make room, or set KSVD_SAE_CACHE to a folder on a larger disk; then run again: what is finished is "
            "kept",
        ) from error


def _on_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's names, have left the system's memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def sole_writer(folder: Path, what: str) -> Iterator[None]:
    """Keep other processes from writing ``folder`` meanwhile; wait for one that does, and say so.

    What the other has finished is there afterwards: look again. The lock is the system's, of a file in the cache's
    folder ``locks``: it ends with its process, however that ends.

    Args: what: is done, for the message.
    Raises: ManifestError if no lock can be taken there, DiskSpaceError if there is no room for what is written inside.
    """
    # Here: learning/ and bench/ run without it.
    from filelock import FileLock, Timeout

    path = _lock_path(folder)
    lock, owner, who = FileLock(path), path.with_suffix(".owner"), "another process"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            # It may have ended meanwhile.
            with suppress(FileNotFoundError):
                who = owner.read_text() or who
            logger.info("%s: %s is at it; waiting for its result", what, who)
            lock.acquire()
        # Under names of their own, which nobody reads; nobody else writes here now.
        for left in [path for path in folder.rglob(".*") if path.is_file()]:
            logger.info("%s: removing %s, which a killed process had not finished", what, left.name)
            left.unlink()
        owner.write_text(f"process {os.getpid()} on {platform.node()}")
    except (OSError, NotImplementedError) as error:
        lock.release()
        raise ManifestError(
            f"{what}: no lock can be taken in {path.parent}: {error}",
            cause="a cache that cannot be written, a full disk, or a file system without locks",
            cure="set KSVD_SAE_CACHE to a folder on a local disk",
        ) from error
    try:
        with _room_in(folder, what):
            yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def is_being_written(folder: Path) -> bool:
    """Whether somebody is its ``sole_writer`` now."""
    from filelock import FileLock, Timeout

    path = _lock_path(folder)
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def _lock_path(folder: Path) -> Path:
    return folder.parents[1] / "locks" / f"{folder.parent.name}-{folder.name}.lock"


def write_json(target: Path, value: Any) -> None:
    with atomic_path(target) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_manifest(folder: Path, stage: str, key: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """Write ``folder/manifest.json`` last, as the mark that the folder is complete.

    Args:
        folder: the stage's folder.
        stage: the stage's name.
        key: everything the folder's content follows from (config and hashes of inputs).
        facts: what came out (counts, checksums, seconds).
    """
    # Imports torch, which keys and files do without.
    from ksvd_sae.device import machine

    manifest = {
        "stage": stage,
        "hash": content_hash(key),
        "key": json.loads(json.dumps(key, default=str)),
        "versions": versions(),
        "commit": commit(),
        "machine": machine(),
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **facts,
    }
    manifest = json.loads(json.dumps(manifest))
    write_json(folder / MANIFEST, {**manifest, "checksum": checksum(manifest)})
    return manifest


def read_manifest(folder: Path, stage: str, key: dict[str, Any] | None = None) -> dict[str, Any]:
    """The manifest of a finished stage.

    Args:
        key: what the caller expects to have gone in; None accepts any.
    Raises:
        ManifestError: no manifest, not JSON, of another stage, or made from another key.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise ManifestError(
            f"reading {stage} from {folder}: no {MANIFEST} there",
            cause=f"the {stage} stage has not run, or was stopped before its end",
            cure=f"run `ksvd-sae {stage} CONFIG.yaml`; it goes on where it stopped",
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ManifestError(
            f"reading {path}: not JSON ({error})", cause="the file was altered", cure=f"delete {folder} and run again"
        ) from error
    if not isinstance(manifest, dict):
        raise ManifestError(
            f"reading {path}: not a manifest", cause="the file was altered", cure=f"delete {folder} and run again"
        )
    known = manifest.pop("checksum", None)
    if known is not None and known != checksum(manifest):
        raise ManifestError(
            f"reading {path}: its checksum is not that of what it says",
            cause="the file was altered, or a disk or copy damaged it",
            cure="move the folder away and run again",
        )
    if manifest.get("stage") != stage:
        raise ManifestError(
            f"reading {stage} from {folder}: the folder holds another stage's output",
            got=manifest.get("stage"),
            limit=stage,
            cure="give the folder that the stage wrote",
        )
    if manifest.get("hash") != content_hash(manifest.get("key")):
        raise ManifestError(
            f"reading {stage} from {folder}: its manifest was altered: key and hash do not belong together",
            cure="move the folder away and run again",
        )
    if key is not None and manifest.get("hash") != content_hash(key):
        raise ManifestError(
            f"reading {stage} from {folder}: its manifest is from another config",
            got="; ".join(_differences(manifest.get("key", {}), key)) or manifest.get("hash"),
            cause="the folder was made, moved or edited under another config",
            cure="move the folder away and run again, or use the config that made it",
        )
    return manifest


def _differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    """Up to four places where two keys differ, as 'a.b: found 1, wanted 2'."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        rows: list[str] = []
        for name in sorted({*found, *wanted}):
            rows += _differences(found.get(name), wanted.get(name), f"{path}.{name}" if path else name)
        return rows[:4]
    # The manifest has been through JSON: compare as JSON does.
    same = json.dumps(found, sort_keys=True, default=str) == json.dumps(wanted, sort_keys=True, default=str)
    return [] if same else [f"{path}: found {found!r}, wanted {wanted!r}"]


def is_finished(folder: Path, stage: str, key: dict[str, Any]) -> bool:
    """Whether ``folder`` holds this stage's finished output for ``key``; another key's is an error."""
    if not (folder / MANIFEST).exists():
        return False
    read_manifest(folder, stage, key)
    return True


def require_disk_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise DiskSpaceError now rather than fail halfway through a long write."""
    folder.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise DiskSpaceError(
            f"{what}: too little disk space under {folder}",
            got=f"{free_bytes / 2**30:.2f} GiB free",
            limit=f"{needed_bytes / 2**30:.2f} GiB needed",
            cure="free some space, ask for fewer tokens, or set KSVD_SAE_CACHE to a folder on a larger disk",
        )


def _there(folder: Path) -> Path:
    """The folder, or the one above it that there is."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def require_writable(folder: Path, what: str) -> None:
    """Raise ManifestError now rather than when there is something to write; the folder need not be there yet."""
    there = _there(folder)
    effective = os.access in os.supports_effective_ids
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK, effective_ids=effective):
        raise ManifestError(
            f"{what}: {folder} cannot be written",
            cause=f"{there} is another user's, on a read-only disk, or no folder",
            cure="--results with a folder of your own",
        )
