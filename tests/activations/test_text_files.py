"""Files as people have them: line ends inside strings, byte order marks, compression, litter beside text."""

import gzip
import io
import json
import logging
import unicodedata
from pathlib import Path
from typing import Any

import pandas
import pytest
import zstandard
from pydantic import ValidationError

from ksvd_sae.activations.text import TextConfig, documents
from ksvd_sae.errors import TextError

BOM = b"\xef\xbb\xbf"
COMPRESS = {"": lambda content: content, ".gz": gzip.compress, ".zst": zstandard.compress}


def config_of(place: Path, **keys: Any) -> TextConfig:
    return TextConfig(source="folder", dataset=str(place), **keys)


def read(place: Path, **keys: Any) -> list[Any]:
    return list(documents(config_of(place, **keys), seed=0))


def lines(*rows: Any) -> bytes:
    """JSONL with other characters than ASCII as they are."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


# ---------------------------------------------------------------- lines


@pytest.mark.parametrize(
    "separator",
    ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r\n", "\n"],
    ids=lambda character: unicodedata.name(character[0], character.encode().hex()),
)
def test_a_line_ends_at_newline_alone(tmp_path: Path, separator: str) -> None:
    """JSON escapes control characters in strings; those from U+0080 on stand there as they are."""
    text = f"one{separator}record"
    (tmp_path / "a.jsonl").write_bytes(lines({"text": text}, {"text": "two"}))
    assert read(tmp_path) == [text, "two"]


@pytest.mark.parametrize("ending", ["\r\n", "\n\n", " \n", "\n \t\n"])
def test_line_ends_and_empty_lines(tmp_path: Path, ending: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(f'{{"text": "one"}}{ending}{{"text": "two"}}'.encode())
    assert read(tmp_path) == ["one", "two"]


def test_byte_order_marks_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(BOM + lines({"text": "\ufefftwo"}))
    (tmp_path / "b.txt").write_bytes(BOM + "three \u2028".encode())
    (tmp_path / "c.txt").write_bytes("four \u00e9".encode("utf-16"))
    # Only at a file's beginning is it none of the text's characters.
    assert read(tmp_path) == ["\ufefftwo", "three \u2028", "four \u00e9"]


def test_line_ends_of_plain_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert read(tmp_path) == ["one\ntwo\nthree\n"]


def test_plain_text_of_another_encoding_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_bytes("caf\u00e9".encode("latin-1"))
    assert read(tmp_path) == ["caf\ufffd"]
    assert "a.txt: not utf-8" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "cut of', r"line 2: Unterminated.*\n  got: '\{\"text\": \"cut of'\n.*truncated"),
        (b"[1, 2]\n", r"line 2: a line is not a JSON object\n  got: list"),
        (b'{"text": "caf\xe9"}\n', r"line 2: 'utf-8' codec.*\n.*another encoding"),
        (b'{"text": "a"}\r{"text": "b"}\r', r"line 2: Extra data.*\n.*\n.*\\r alone"),
        (b"\0\0\0\0", r"line 2: "),
    ],
    ids=["truncated", "no object", "latin-1", "old Mac", "zeros"],
)
@pytest.mark.parametrize("ending", COMPRESS)
def test_errors_name_file_and_line(tmp_path: Path, ending: str, content: bytes, message: str) -> None:
    (tmp_path / f"b.jsonl{ending}").write_bytes(COMPRESS[ending](lines({"text": "good"}) + content))
    with pytest.raises(TextError, match=rf"b\.jsonl{ending}, {message}"):
        read(tmp_path)


def test_utf_16_lines_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "one"}\n'.encode("utf-16"))
    with pytest.raises(TextError, match=r"a\.jsonl, line 1: .*\n.*another encoding than UTF-8\n.*as UTF-8"):
        read(tmp_path)


# ---------------------------------------------------------------- compression


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_files(tmp_path: Path, ending: str) -> None:
    compress = COMPRESS[ending]
    (tmp_path / f"a.jsonl{ending}").write_bytes(
        compress(BOM + lines({"text": "one\u2028"})) + compress(lines({"text": "2"}))
    )
    (tmp_path / f"b.txt{ending}").write_bytes(compress(b"three\r\n"))
    (tmp_path / f"c.md{ending}").write_bytes(compress(b"four"))
    assert read(tmp_path) == ["one\u2028", "2", "three\n"]
    assert read(tmp_path, endings=[".md"])[-1] == "four"
    assert read(tmp_path / f"b.txt{ending}") == ["three\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_damaged_compressed_files(tmp_path: Path, ending: str, name: str) -> None:
    whole = COMPRESS[ending](b"".join(lines({"text": f"document {i} {i**7}"}) for i in range(5000)))
    for content in (whole[: len(whole) // 2], b"no such format " * 20):
        (tmp_path / (name + ending)).write_bytes(content)
        with pytest.raises(TextError, match=rf"{name}{ending}: .*\n.*truncated or misnamed"):
            read(tmp_path)


def test_a_zst_of_several_frames_and_a_small_window(tmp_path: Path) -> None:
    """As the Pile's files are: written in a stream, of unknown size."""
    buffer = io.BytesIO()
    for part in range(3):
        with zstandard.ZstdCompressor().stream_writer(buffer, closefd=False) as writer:
            for i in range(1000):
                writer.write(lines({"text": f"{part}-{i}"}))
    (tmp_path / "a.jsonl.zst").write_bytes(buffer.getvalue())
    assert read(tmp_path) == [f"{part}-{i}" for part in range(3) for i in range(1000)]


# ---------------------------------------------------------------- folders


@pytest.fixture
def littered(tmp_path: Path) -> Path:
    """Two texts among what lies in folders."""
    for name in (".DS_Store", ".git/HEAD.txt", "sub/._b.txt", "__MACOSX/._a.txt", ".cache/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("hidden")
    (tmp_path / "core.txt").write_bytes(b"ELF\0\0\x01")
    (tmp_path / "picture.txt.gz").write_bytes(gzip.compress(b"PNG\0\0\x01"))
    (tmp_path / "notes.md").write_text("# notes")
    (tmp_path / "Makefile").write_text("all:")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "sub" / "b.TXT").write_text("two")
    return tmp_path


def test_hidden_and_binary_files_are_left_out_and_counted(littered: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert read(littered) == ["one", "two"]
    assert "2 files; left out: 2 binary, 5 hidden, 1 with the ending .md, 1 without ending" in caplog.text


def test_a_folder_inside_a_hidden_one(tmp_path: Path) -> None:
    (tmp_path / ".data" / "texts").mkdir(parents=True)
    (tmp_path / ".data" / "texts" / "a.txt").write_text("one")
    assert read(tmp_path / ".data" / "texts") == ["one"]


def test_litter_does_not_change_the_key(littered: Path) -> None:
    before = config_of(littered).content_hash()
    (littered / ".new").write_text("hidden")
    (littered / "core.txt").write_bytes(b"ELF\0\0\x02")
    assert config_of(littered).content_hash() == before
    (littered / "a.txt").write_text("other")
    assert config_of(littered).content_hash() != before


@pytest.mark.parametrize("endings", [[".md"], [".MD"]])
def test_other_endings_by_option(littered: Path, endings: list[str]) -> None:
    assert read(littered, endings=endings) == ["one", "# notes", "two"]
    assert config_of(littered, endings=endings).content_hash() != config_of(littered).content_hash()


def test_only_litter(tmp_path: Path) -> None:
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "a.txt").write_bytes(b"\0")
    with pytest.raises(TextError, match=r"got: 1 binary, 1 hidden\n"):
        read(tmp_path)


# ---------------------------------------------------------------- one file


@pytest.mark.parametrize("name", ["book.txt", ".hidden.txt", "rows.jsonl", "rows.parquet", "book.txt.gz"])
def test_a_file_is_a_data_set_of_one_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".parquet":
        pandas.DataFrame({"text": ["one"]}).to_parquet(path)
    else:
        path.write_bytes(COMPRESS.get(path.suffix, COMPRESS[""])(lines({"text": "one"}) if "rows" in name else b"one"))
    (tmp_path / "other.txt").write_text("not this")
    assert read(path) == ["one"]
    assert config_of(path).name == name
    assert config_of(path).content_hash() != config_of(tmp_path / "other.txt").content_hash()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("book.md", b"# one", r"book\.md: with the ending \.md\n  limit: \.txt, .*\n.*\n  cure: .*\[\.md\]"),
        ("table.csv", b"text\none\n", r"table\.csv: with the ending \.csv\n(.*\n)*.*text\.dataset: csv"),
        ("book", b"one", "book: without ending"),
        ("book.txt", b"a\0b", r"book\.txt: binary"),
    ],
)
def test_a_file_that_is_no_text(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message):
        read(tmp_path / name)


def test_a_file_with_another_ending_by_option(tmp_path: Path) -> None:
    (tmp_path / "book.md").write_text("# one")
    assert read(tmp_path / "book.md", endings=[".md"]) == ["# one"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"source": "folder", "dataset": "x", "endings": ["md"]}, r"text\.endings: 'md' is no ending"),
        ({"source": "folder", "dataset": "x", "endings": [".gz"]}, r"text\.endings: '\.gz'"),
        ({"source": "hub", "dataset": "x", "endings": [".md"]}, r"text\.endings goes with text\.source 'folder'"),
        ({"source": "bbc-news", "endings": [".md"]}, r"text\.endings goes with text\.source 'folder'"),
    ],
)
def test_endings_that_are_none(text: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TextConfig(**text)
