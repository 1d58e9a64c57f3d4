"""raw.zip: equal results give equal bytes, every byte that is read is the one that was written, and nothing else is."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ksvd_sae.cli import app
from ksvd_sae.errors import ResultsError
from ksvd_sae.report.raw import RAW, RawResults, result_name, unpack, write_raw

CONTENT = {
    "saebench/core/a-0_custom_sae_eval_results.json": b'{"x": 1}\n',
    "saebench/scr/0/a-1_custom_sae_eval_results.json": b"",
    "heldout/a-2.json": bytes(range(256)) * 40,
    "training/a.s0.jsonl": "ε\n".encode(),
}


def pack(folder: Path, content: dict[str, bytes] | None = None) -> Path:
    """An archive in ``folder``, of files that lie elsewhere."""
    files = {}
    for i, (name, data) in enumerate((CONTENT if content is None else content).items()):
        files[name] = folder / "elsewhere" / str(i)
        files[name].parent.mkdir(parents=True, exist_ok=True)
        files[name].write_bytes(data)
    return write_raw(folder / "run" / RAW, files)


def foreign(path: Path, *names: str, comment: bytes | None = None) -> Path:
    """A zip that our code did not write, but with our mark unless ``comment`` says otherwise."""
    with zipfile.ZipFile(pack(path.parent / "ours", dict.fromkeys(map(str, range(len(names))), b""))) as ours:
        mark = ours.comment
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = mark if comment is None else comment
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), b"content")
    return path


def test_members_are_what_went_in(tmp_path: Path) -> None:
    pack(tmp_path)
    for path in (tmp_path / "run", tmp_path / "run" / RAW):
        with RawResults(path) as raw:
            assert dict(raw) == CONTENT
            assert list(raw) == sorted(CONTENT)
            assert "heldout/a-2.json" in raw
            assert "heldout/a-3.json" not in raw
            with pytest.raises(KeyError):
                raw["heldout/a-3.json"]
    assert result_name("heldout", "a-2.json") in CONTENT
    assert result_name("scr", "0/a-1_custom_sae_eval_results.json") in CONTENT


def test_equal_results_give_equal_bytes(tmp_path: Path) -> None:
    """Whatever their order and their files' times and modes."""
    one = pack(tmp_path / "one")
    other = pack(tmp_path / "other", dict(reversed(CONTENT.items())))
    for path in (tmp_path / "other" / "elsewhere").iterdir():
        path.chmod(0o600)
    assert one.read_bytes() == other.read_bytes()
    more = pack(tmp_path / "more", {**CONTENT, "heldout/b.json": b"{}"})
    assert more.read_bytes() != one.read_bytes()


def test_other_programs_read_it(tmp_path: Path) -> None:
    path = pack(tmp_path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == CONTENT
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_BZIP2}
    done = subprocess.run(
        [sys.executable, "-m", "zipfile", "-e", str(path), str(tmp_path / "out")], capture_output=True, check=False
    )
    assert done.returncode == 0
    assert (tmp_path / "out" / "training" / "a.s0.jsonl").read_bytes() == CONTENT["training/a.s0.jsonl"]


def test_what_is_truncated_is_refused(tmp_path: Path) -> None:
    path = pack(tmp_path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ResultsError, match=r"raw\.zip"), RawResults(path) as raw:
            dict(raw)


def test_no_altered_byte_is_taken_for_a_result(tmp_path: Path) -> None:
    """Any flipped byte is seen, or lies where no result is: times, modes, versions."""
    path = pack(tmp_path)
    whole = bytearray(path.read_bytes())
    seen = 0
    for i in range(len(whole)):
        whole[i] ^= 0x41
        path.write_bytes(whole)
        whole[i] ^= 0x41
        try:
            with RawResults(path) as raw:
                content = dict(raw)
        except ResultsError:
            seen += 1
        else:
            # A name that is altered in the directory alone is refused: the member's own header has it too.
            assert content == CONTENT, i
    assert seen > len(whole) / 2


def test_a_file_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(ResultsError, match="not a zip"):
        RawResults(tmp_path / "text.zip")
    with pytest.raises(ResultsError, match="no archive of this package"):
        RawResults(foreign(tmp_path / "other.zip", "a.json", comment=b"another's"))
    with pytest.raises(ResultsError, match=r"(?s)No such file.*give a run's folder"):
        RawResults(tmp_path)
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = foreign(tmp_path / "twice.zip", "a.json", "a.json")
    with pytest.raises(ResultsError, match="no archive of this package"):
        RawResults(twice)


def test_a_file_that_went_missing_leaves_no_archive(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="moved or deleted"):
        write_raw(tmp_path / RAW, {"heldout/a.json": tmp_path / "gone.json"})
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- unpacking


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_unpacked(tmp_path: Path) -> None:
    pack(tmp_path)
    assert unpack(tmp_path / "run", tmp_path / "out") == len(CONTENT)
    assert files(tmp_path / "out") == CONTENT
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.json")}
    assert unpack(tmp_path / "run", tmp_path / "out") == len(CONTENT)
    assert {path: path.stat().st_mtime_ns for path in times} == times, "what is there is left alone"


def test_other_content_is_not_overwritten(tmp_path: Path) -> None:
    pack(tmp_path)
    mine = tmp_path / "out" / "heldout" / "a-2.json"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(ResultsError, match=r"(?s)a-2\.json is there, and is something else.*--to"):
        unpack(tmp_path / "run", tmp_path / "out")
    assert files(tmp_path / "out") == {"heldout/a-2.json": b"mine"}, "nothing else was written"
    mine.unlink()
    mine.mkdir()
    with pytest.raises(ResultsError, match="something else"):
        unpack(tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["../a.json", "heldout/../../a.json", "/tmp/a.json", "a//b.json", "./a.json", "folder/"]
)
def test_members_that_would_leave_the_folder(tmp_path: Path, name: str) -> None:
    archive = foreign(tmp_path / "foreign.zip", "heldout/good.json", name)
    with pytest.raises(ResultsError, match="is no name for a member"):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "a.json").exists()
    with pytest.raises(ResultsError, match="is no name for a member"):
        write_raw(tmp_path / RAW, {name: archive})


def test_links_that_lead_out_of_the_folder(tmp_path: Path) -> None:
    pack(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "out" / "heldout").symlink_to(tmp_path / "secret")
    with pytest.raises(ResultsError, match="would lie outside of"):
        unpack(tmp_path / "run", tmp_path / "out")
    assert files(tmp_path / "secret") == {}


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    pack(tmp_path)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ResultsError, match="unpacking"):
        unpack(tmp_path / "run", tmp_path / "out")


def test_the_command(tmp_path: Path) -> None:
    pack(tmp_path)
    done = CliRunner().invoke(app, ["unpack", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert f"{len(CONTENT)} files in" in done.output
    assert (tmp_path / "run" / "heldout" / "a-2.json").read_bytes() == CONTENT["heldout/a-2.json"]
    done = CliRunner().invoke(app, ["unpack", str(tmp_path / "run" / RAW), "--to", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert files(tmp_path / "out") == CONTENT
    assert json.loads((tmp_path / "out" / "saebench/core/a-0_custom_sae_eval_results.json").read_text()) == {"x": 1}
    done = CliRunner().invoke(app, ["unpack", str(tmp_path)])
    assert done.exit_code == 1
    assert "ResultsError" in done.output
