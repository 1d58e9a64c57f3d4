"""Documents of data sets: on the Hub, in a local folder that ``datasets`` reads, or written by ``save_to_disk``."""

import hashlib
import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from glob import glob
from itertools import chain
from pathlib import Path
from typing import Any

from ksvd_sae.activations.documents import Document, document
from ksvd_sae.errors import HubError, ImageError, TextError
from ksvd_sae.store import file_sha256

# Names that datasets takes for a format, of files that data_files names: without any, it reads what lies around.
FORMATS = ("arrow", "csv", "json", "parquet", "text", "xml")
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True)
class HubDataset:
    """A data set as ``datasets.load_dataset`` names it.

    options: config (as 'name'), revision and data_files, where they are given. section: of the config that names it.
    """

    name: str
    split: str
    streaming: bool
    options: dict[str, Any]
    section: str = "text"

    def documents(self, column: str) -> Iterator[Document]:
        """Texts of its rows, in its order; rows whose text is null or missing are no documents.

        Raises: as ``rows``.
        """
        return _documents(self.rows(column), column, f"data set {self.name!r}")

    def rows(self, column: str, prepared: Callable[[Any], Any] | None = None) -> Iterator[dict[str, Any]]:
        """Its rows, which have the column. Args: prepared: gives what is to be iterated over in the data set's place.

        Raises: HubError (not reachable, no such data set, configuration, split, revision or file), TextError or
            ImageError (no such column, no rows).
        """
        rows = iter(self._rows(prepared))
        first = self._next(rows)
        error = ImageError if self.section == "images" else TextError
        if first is None:
            raise error(f"data set {self.name!r}, split {self.split!r}: empty")
        if column not in first:
            raise error(
                f"data set {self.name!r}: no column {column!r}",
                got=", ".join(first),
                cause=f"the {self.section.removesuffix('s')} has another name there",
                cure=f"set {self.section}.column to one of them",
            )
        return chain([first], iter(lambda: self._next(rows), None))

    def content_hash(self) -> str | None:
        """Hash of files on this machine that are named by their format; None for what lies elsewhere."""
        if self.name not in FORMATS:
            return None
        named = self.options["data_files"]
        patterns = [named] if isinstance(named, str) else named
        files = sorted({path for pattern in patterns for path in glob(pattern, recursive=True)})
        digest = hashlib.sha256()
        for path in filter(os.path.isfile, files):
            digest.update(f"{os.path.basename(path)}\0{file_sha256(Path(path))}\n".encode())
        return digest.hexdigest()[:12] if files else None

    @property
    def _page(self) -> str:
        return f"huggingface.co/datasets/{self.name}"

    def _rows(self, prepared: Callable[[Any], Any] | None) -> Iterable[dict[str, Any]]:
        import datasets

        options = dict(self.options)
        # Versions that run a data set's script ask on the terminal whether they may.
        if "trust_remote_code" in inspect.signature(datasets.load_dataset).parameters:
            options["trust_remote_code"] = False
        if "revision" in options:
            self._require_revision(options)
        try:
            rows = datasets.load_dataset(self.name, split=self.split, streaming=self.streaming, **options)
            return rows if prepared is None else prepared(rows)
        # datasets raises many types for one cause, and one type for many.
        except Exception as error:
            raise self._error("loading", error) from error

    def _require_revision(self, options: dict[str, Any]) -> None:
        """Where the Hub has no such revision or cannot be asked, datasets takes whatever is in its cache."""
        import datasets

        wanted = options["revision"]
        if Path(self.name).is_dir() or self.name in FORMATS:
            raise TextError(
                f"data set {self.name!r}: files on this machine have no revisions",
                got=f"{self.section}.revision: {wanted}",
                cure=f"leave {self.section}.revision out",
            )
        try:
            builder = datasets.load_dataset_builder(self.name, **options)
        except Exception as error:
            raise self._error("loading", error) from error
        if ".cache." in type(builder).__module__ and builder.hash != wanted:
            raise HubError(
                f"loading data set {self.name!r}: no revision {wanted!r}",
                got=f"another in the cache: {builder.hash}",
                cause="a misspelt revision; or no network, and the cache has another",
                cure=f"set {self.section}.revision to a commit, branch or tag of {self._page}/commits/main",
            )

    def _next(self, rows: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
        try:
            return next(rows, None)
        except Exception as error:
            raise self._error("reading", error) from error

    def _error(self, doing: str, error: Exception) -> HubError:
        """What went wrong, by what the error says."""
        # What datasets wraps says more than the wrapping.
        innermost: BaseException = error
        while type(error).__name__.startswith("DatasetGeneration") and innermost.__cause__ is not None:
            innermost = innermost.__cause__
        said = (str(innermost).splitlines() or [""])[0][:300]
        given = "".join(f", {'config' if key == 'name' else key} {value!r}" for key, value in self.options.items())
        limit, cause, cure = self._explained(str(innermost), innermost)
        return HubError(
            f"{doing} data set {self.name!r} (split {self.split!r}{given}): {type(innermost).__name__}: {said}",
            limit=limit,
            cause=cause,
            cure=cure,
        )

    def _explained(self, said: str, error: BaseException) -> tuple[str | None, str | None, str]:
        """Limit, cause and cure."""
        lists = re.findall(r"\[([^\[\]]*)\]", said)
        there = lists[-1] if lists else None
        page, section = self._page, self.section
        if "Config name is missing" in said:
            return there, "the data set has several configurations", f"set {section}.config to one of them"
        if "BuilderConfig" in said and "not found" in said:
            return there, "the data set has no such configuration", f"set {section}.config to one that it has"
        if "Bad split" in said or "Unknown split" in said:
            if "[" in self.split and self.streaming:
                return there, "a part of a split, which streaming does not give", f"set {section}.streaming: false"
            return there, "the data set has no such split", f"set {section}.split to one that it has"
        if "custom code" in said or "trust_remote_code" in said or "scripts are no longer supported" in said:
            cure = f"try {section}.revision: refs/convert/parquet, the Hub's copy without code of many data sets"
            return None, "the data set is a program, and programs of data sets are never run", cure
        if "gated dataset" in said or "must be authenticated" in said:
            return None, "a gated data set", f"accept its terms at {page}, then run `hf auth login`"
        if "Revision" in said and "exist" in said:
            return None, "no such revision", f"set {section}.revision to a commit, branch or tag of {page}/commits/main"
        if "doesn't exist on the Hub" in said:
            cure = "look for it on huggingface.co/datasets; run `hf auth login` for a private one"
            return None, "a misspelt name, or a private data set", cure
        if isinstance(error, (ConnectionError, TimeoutError)) or _is_of_network(error):
            cause = "no network, or HF_HUB_OFFLINE=1, and no copy in the Hub's cache"
            cure = f"check with `ksvd-sae doctor`, and run again: what is there is kept; for local {section} use "
            return None, cause, cure + f"{section}.source: folder"
        if "Couldn't find cache" in said:
            cause = "no such configuration or file on the Hub; or no network, and the cache has no copy"
            cure = f"mend {section}.config or {section}.data_files, or check the network with `ksvd-sae doctor`"
            return None, cause, cure
        if "data file" in said or "Unable to find" in said or isinstance(error, FileNotFoundError):
            if "data_files" in self.options:
                return None, "no file of these names there", f"set {section}.data_files to files that are there"
            return None, "a wrong path, or a folder without data", f"set {section}.dataset to a folder with data files"
        if isinstance(error, PermissionError):
            cure = "set HF_HOME to a folder of your own, or let data be read"
            return None, "datasets has no place for its cache, as without a home folder; or data of others", cure
        if isinstance(error, ImportError):
            return None, "a package that this data set's format needs is not installed", "install it"
        cure = f"look at {page}; for local {section} use {section}.source: folder"
        return None, "files that datasets cannot read as this data set", cure


def _is_of_network(error: BaseException) -> bool:
    """Errors of the libraries that the Hub is asked with, by name: which ones these are changes."""
    if "NotFound" in type(error).__name__ and "Local" not in type(error).__name__:
        return False
    modules = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
    return bool(modules & {"requests", "urllib3", "httpx", "httpcore", "aiohttp", "huggingface_hub"})


def _documents(rows: Iterable[dict[str, Any]], column: str, where: str) -> Iterator[Document]:
    for number, row in enumerate(rows, start=1):
        if row.get(column) is not None:
            yield document(row[column], column, f"{where}, row {number}")


# ---------------------------------------------------------------- save_to_disk


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` of a data set, or of several splits, wrote the folder."""
    return (folder / _SAVED_SPLITS).is_file() or ((folder / _SAVED).is_file() and any(folder.glob("*.arrow")))


@dataclass(frozen=True)
class SavedDataset:
    """What ``save_to_disk`` wrote. split: None: whichever there is, where there is one."""

    folder: Path
    split: str | None

    @property
    def _place(self) -> Path:
        """The folder of the split."""
        if (self.folder / _SAVED_SPLITS).is_file():
            splits = self._json(self.folder / _SAVED_SPLITS, "splits")
        else:
            own = self._json(self.folder / _SAVED, "_split")
            if self.split is None or own is None or own == self.split:
                return self.folder
            splits = [own]
        wanted = "train" if self.split is None else self.split
        if (self.folder / _SAVED_SPLITS).is_file() and wanted in splits:
            return self.folder / wanted
        raise TextError(
            f"data set {self.folder}: no split {wanted!r}",
            limit=", ".join(splits),
            cause="a part of a split, which a saved data set does not give" if "[" in wanted else "a misspelt split",
            cure="set text.split to one that it has",
        )

    def _json(self, path: Path, key: str) -> Any:
        try:
            return json.loads(path.read_text(encoding="utf-8"))[key]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> TextError:
        return TextError(
            f"data set {self.folder}: {type(error).__name__}: {error}",
            cause="a folder of save_to_disk that is incomplete or damaged",
            cure="write it again with save_to_disk",
        )

    def content_hash(self) -> str:
        """Hash of the split's rows as they lie there."""
        place, digest = self._place, hashlib.sha256()
        for entry in self._json(place / _SAVED, "_data_files"):
            path = place / entry["filename"]
            if not path.is_file():
                raise self._unreadable(FileNotFoundError(f"{path} is missing"))
            digest.update(f"{path.name}\0{file_sha256(path)}\n".encode())
        return digest.hexdigest()[:12]

    def documents(self, column: str) -> Iterator[Document]:
        """Texts of the rows, in their order. Raises: TextError (no such split or column, damaged, empty)."""
        import datasets

        place = self._place
        try:
            rows = datasets.Dataset.load_from_disk(str(place))
        except Exception as error:
            raise self._unreadable(error) from error
        if not len(rows):
            raise TextError(f"data set {place}: empty")
        if column not in rows.column_names:
            raise TextError(
                f"data set {place}: no column {column!r}",
                got=", ".join(rows.column_names),
                cause="the text has another name there",
                cure="set text.column to one of them",
            )
        # The other columns may be images; a format that was saved with it would give arrays.
        return _documents(rows.select_columns([column]).with_format(None), column, f"data set {place}")
