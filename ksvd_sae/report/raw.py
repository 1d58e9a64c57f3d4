"""All raw results of a run in one file, raw.zip: what each eval wrote, atoms in context, training logs.

Members: ``saebench/<eval>/<settings>/*.json`` and ``heldout/*.json`` (as the column ``source`` of comparison.csv names
them, behind the eval), ``atoms/*.json``, ``training/*.jsonl``. A zip, because each member can be read by itself, by
Python's zipfile and by Info-ZIP's unzip. Compressed by bzip2, which is a third smaller than deflate where latents'
texts are most of it; LZMA is no smaller, and common unzips do not know it. Names are sorted and times fixed: equal
results give equal bytes. Nothing in it is ever unpickled.
"""

import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType

from ksvd_sae.errors import ResultsError
from ksvd_sae.evals import EVALS
from ksvd_sae.store import atomic_path

RAW = "raw.zip"
# Their results are not in SAEBench's format: a folder beside its own.
OWN_EVALS = tuple(kind.name for kind in EVALS if kind.ours)
# The archive's comment, which tells our files from other zips, and whether all members are there.
_MARK = "raw results of ksvd-sae, format 1, {} files"
# The first that a zip can hold.
_TIME = (1980, 1, 1, 0, 0, 0)
_UNIX, _PLAIN_FILE = 3, 0o100644 << 16
# What zipfile raises where bytes were altered, besides its own error.
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, ValueError)


def result_name(eval_name: str, file: str) -> str:
    """The member that holds an eval's result file, as the column ``source`` of comparison.csv names it."""
    return f"{eval_name}/{file}" if eval_name in OWN_EVALS else f"saebench/{eval_name}/{file}"


def write_raw(path: Path, files: Mapping[str, Path]) -> Path:
    """Write the archive, whole or not at all.

    Args: files: name in the archive -> file on disk.
    Raises: ResultsError: a file cannot be read, or a name would lead out of a folder.
    """
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.comment = _MARK.format(len(files)).encode()
        for name in sorted(files):
            _check_name(name, path)
            member = zipfile.ZipInfo(name, _TIME)
            member.create_system, member.external_attr = _UNIX, _PLAIN_FILE
            try:
                content = files[name].read_bytes()
            except OSError as error:
                raise ResultsError(
                    f"writing {path}: {error}", cause="a result that the manifest names was moved or deleted"
                ) from error
            archive.writestr(member, content, zipfile.ZIP_BZIP2, compresslevel=9)
    return path


class RawResults(Mapping[str, bytes]):
    """The members of a raw.zip by name, each read and checked when it is asked for. A context manager.

    Args: path: the archive, or a run's folder that holds one.
    Raises: ResultsError: missing, truncated or altered, or not one of ours. KeyError: no such member.
    """

    def __init__(self, path: Path):
        self.path = path / RAW if path.is_dir() else path
        try:
            self._archive = zipfile.ZipFile(self.path)
        except OSError as error:
            cure = f"give a run's folder, with {RAW} in it"
            raise ResultsError(f"reading raw results: {error}", cure=cure) from error
        except _DAMAGE as error:
            raise self._damaged(str(error)) from error
        names = self._archive.namelist()
        if self._archive.comment != _MARK.format(len(names)).encode() or len(set(names)) < len(names):
            self._archive.close()
            raise ResultsError(
                f"reading raw results from {self.path}: no archive of this package, or some of it is missing",
                got=self._archive.comment,
                limit=_MARK.format(len(names)),
            )

    def _damaged(self, what: str) -> ResultsError:
        return ResultsError(
            f"reading raw results from {self.path}: {what}",
            cause="the file was cut off or altered",
            cure="fetch it again, or write it again with `ksvd-sae compare`",
        )

    def __getitem__(self, name: str) -> bytes:
        try:
            return self._archive.read(name)
        except _DAMAGE as error:
            raise self._damaged(f"{name}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._archive.namelist())

    def __len__(self) -> int:
        return len(self._archive.namelist())

    def __enter__(self) -> "RawResults":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._archive.close()


def unpack(path: Path, folder: Path) -> int:
    """Write the members of a raw.zip as files below ``folder``; what is there already and equal stays as it is.

    Args: path: as for ``RawResults``.
    Returns: how many members it has.
    Raises: ResultsError, before anything is written: see ``RawResults``; a member that would lie outside of ``folder``,
        or in the place of other content.
    """
    with RawResults(path) as raw:
        places = {name: _place(folder, name, raw.path) for name in raw}
        for name, place in places.items():
            if place.exists() and not (place.is_file() and place.read_bytes() == raw[name]):
                raise ResultsError(
                    f"unpacking {raw.path}: {place} is there, and is something else",
                    cure="move it away, or give another folder with --to",
                )
        try:
            for name, place in places.items():
                if not place.exists():
                    with atomic_path(place) as temporary:
                        temporary.write_bytes(raw[name])
        except OSError as error:
            raise ResultsError(f"unpacking {raw.path} into {folder}: {error}") from error
        return len(places)


def _place(folder: Path, name: str, archive: Path) -> Path:
    """Where a member goes: below ``folder``, even if a link in it leads elsewhere."""
    _check_name(name, archive)
    place = (folder / name).resolve()
    if not place.is_relative_to(folder.resolve()):
        raise ResultsError(
            f"{archive}: {name} would lie outside of {folder}", cause="a link in that folder", cure="take the link away"
        )
    return place


def _check_name(name: str, archive: Path) -> None:
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or name != "/".join(parts):
        raise ResultsError(
            f"{archive}: {name!r} is no name for a member: it would lie outside of its folder, or has odd slashes",
            cause="the archive is not as ksvd-sae writes it",
        )
