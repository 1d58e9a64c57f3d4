"""Documents of files on disk: .txt, .jsonl and .parquet, plain or compressed, one of them or a folder of them.

Which files are text is said by their names, and of plain text by their first bytes, too: a folder has other things
in it. What is left out is counted.
"""

import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ksvd_sae.activations.documents import Document, document
from ksvd_sae.errors import TextError
from ksvd_sae.store import file_sha256

logger = logging.getLogger(__name__)
_TEXT, _ROWS = (".txt",), (".jsonl", ".parquet")
_COMPRESSED = (".gz", ".zst")
# A zero byte within the first so many says that a file is no text, as it does to git.
_LOOKED_AT_BYTES = 8000
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class TextFiles:
    """Files that are read, in the order of their names.

    place: the folder, or the one file. left_out: why -> how many files.
    """

    place: Path
    files: list[Path]
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def name_of(self) -> Path:
        """What names of files are relative to."""
        return self.place if self.place.is_dir() else self.place.parent

    def content_hash(self) -> str:
        """Hash of the files' names and contents, for manifests."""
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(f"{path.relative_to(self.name_of)}\0{file_sha256(path)}\n".encode())
        return digest.hexdigest()[:12]

    def documents(self, column: str) -> Iterator[Document]:
        """Texts of the files in turn; rows whose text is null or missing are no documents."""
        counted = ", ".join(f"{n} {why}" for why, n in sorted(self.left_out.items()))
        logger.info("text %s: %d files%s", self.place, len(self.files), f"; left out: {counted}" if counted else "")
        for path in self.files:
            kind = _ending(path)[0]
            with _named(path):
                if kind == ".parquet":
                    yield from _parquet_documents(path, column)
                elif kind == ".jsonl":
                    yield from _json_documents(path, column)
                else:
                    yield _plain_text(path)


def text_files(place: Path, endings: tuple[str, ...] = ()) -> TextFiles:
    """The text files of a folder, or one file.

    Args: endings: of files that are read as text, beside .txt.
    Raises: TextError if there are none.
    """
    known = (*_TEXT, *_ROWS, *(ending.lower() for ending in endings))
    if place.is_file():
        left_out = _left_out(place, Path(place.name.lstrip(".")), known)
        if left_out is not None:
            raise TextError(
                f"text file {place}: {left_out}",
                limit=f"{_listed(known)}, also as {_listed(_COMPRESSED)}",
                cause="no text, or text under another ending",
                cure=f"if it is text, set text.endings to [{place.suffix or '.md'}]; for tables (.csv and others) use "
                "text.source: hub with text.dataset: csv and text.data_files",
            )
        return TextFiles(place, [place])
    files: list[Path] = []
    counted: Counter[str] = Counter()
    for path in sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else ():
        left_out = _left_out(path, path.relative_to(place), known)
        if left_out is None:
            files.append(path)
        else:
            counted[left_out] += 1
    if not files:
        raise TextError(
            f"text folder {place}: no {_listed(known)} file there",
            got=", ".join(f"{n} {why}" for why, n in sorted(counted.items())) or None,
            cause="a wrong path"
            if not place.is_dir()
            else "text under other endings"
            if counted
            else "an empty folder",
            cure="set text.endings to the endings of its text files, e.g. [.md]"
            if counted
            else "set text.dataset to a folder with text files",
        )
    return TextFiles(place, files, counted)


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _ending(path: Path) -> tuple[str, bool]:
    """A file's ending without that of a compression, and whether there is one."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in _COMPRESSED:
        return (suffixes[0] if len(suffixes) > 1 else "", True)
    return (suffixes[-1] if suffixes else "", False)


def _left_out(path: Path, name: Path, known: tuple[str, ...]) -> str | None:
    """Why a file is no text; None if it is. Args: name: within the folder."""
    if any(part.startswith(".") for part in name.parts):
        return "hidden"
    ending, compressed = _ending(path)
    # Parquet compresses by itself.
    if ending not in known or (compressed and ending == ".parquet"):
        return (
            f"with the ending {''.join(path.suffixes[-2:]) if compressed else path.suffix}"
            if ending
            else "without ending"
        )
    return "binary" if ending not in _ROWS and _is_binary(path) else None


def _is_binary(path: Path) -> bool:
    with _named(path), _opened(path) as file:
        head = file.read(_LOOKED_AT_BYTES)
    return b"\0" in head and not head.startswith(_UTF_16)


# ---------------------------------------------------------------- one file


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of reading a file say which."""
    try:
        yield
    except TextError:
        raise
    except (ValueError, OSError) as error:
        raise TextError(
            f"text file {path}: {error}", cause="a truncated or misnamed file", cure="fetch it again, or take it away"
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, without compression. Raises: OSError (truncated or damaged)."""
    if not _ending(path)[1]:
        with path.open("rb") as file:
            yield file
        return
    import pyarrow

    # It notices a file that ends too early, and reads several streams in one file.
    with pyarrow.input_stream(str(path), compression="detect") as stream, io.BufferedReader(stream) as buffered:
        yield buffered


def _plain_text(path: Path) -> str:
    """A file as one document, without a byte order mark; line ends are \\n."""
    with _opened(path) as file:
        content = file.read()
    encoding = "utf-16" if content.startswith(_UTF_16) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        logger.warning("text file %s: not %s (%s); such bytes are read as U+FFFD", path, encoding, error)
        text = content.decode(encoding, errors="replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json_documents(path: Path, column: str) -> Iterator[Document]:
    """A document a line. Lines end at \\n alone: JSON's strings may hold U+2028, U+2029 and U+0085 as they are."""
    first: dict[str, Any] | None = None
    found = False
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            row = _json_row(line, f"text file {path}, line {number}")
            first = first or row
            found = found or column in row
            if row.get(column) is not None:
                yield document(row[column], column, f"text file {path}, line {number}")
    if first is not None and not found:
        raise _no_column(path, column, first)


def _json_row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise TextError(
            f"{where}: {error}", cause="another encoding than UTF-8", cure="write the file again as UTF-8"
        ) from error
    except ValueError as error:
        mac = b"\r" in line.strip()
        raise TextError(
            f"{where}: {error}",
            got=repr(line[:80].decode(errors="replace")),
            cause="lines that end in \\r alone" if mac else "a truncated file, or one that is no JSONL",
            cure="write a JSON object a line, with \\n after each",
        ) from error
    if not isinstance(row, dict):
        raise TextError(
            f"{where}: a line is not a JSON object",
            got=type(row).__name__,
            cause="a truncated or misnamed file",
            cure='write each line as {"text": ...}',
        )
    return row


def _parquet_documents(path: Path, column: str) -> Iterator[Document]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if column not in names:
            if file.metadata.num_rows:
                raise _no_column(path, column, dict.fromkeys(names))
            return
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            for value in batch.column(0).to_pylist():
                number += 1
                if value is not None:
                    yield document(value, column, f"text file {path}, row {number}")


def _no_column(path: Path, column: str, row: dict[str, Any]) -> TextError:
    return TextError(
        f"text file {path}: no column {column!r}",
        got=", ".join(map(str, row)),
        cause="the text has another name there",
        cure="set text.column to one of them",
    )
