"""Configs by name and by path, from whatever folder."""

from pathlib import Path

import pytest

from ksvd_sae.errors import ConfigError
from ksvd_sae.run.config import load_config
from ksvd_sae.run.find_config import find_config, shipped_configs
from tests.command_line import EVAL_CONFIGS


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_config_of_the_repository_is_found_by_its_name() -> None:
    names = {path.stem for path in EVAL_CONFIGS.glob("*.yaml")}
    assert "demo" in names
    assert {name: find_config(name).read_bytes() for name in names} == {
        path.stem: path.read_bytes() for path in EVAL_CONFIGS.glob("*.yaml")
    }
    assert set(shipped_configs()) == names
    assert load_config("demo").name == "demo"


def test_a_file_goes_before_a_name_and_a_name_before_a_folder(tmp_path: Path) -> None:
    shipped = find_config("demo")
    (tmp_path / "demo").mkdir()
    assert find_config("demo") == shipped
    (tmp_path / "demo-full").write_text("mine")
    assert find_config("demo-full").read_text() == "mine"


def test_paths_stay_paths(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.yaml").write_text("")
    assert find_config("sub/mine.yaml") == Path("sub/mine.yaml")
    assert find_config("mine.yaml", tmp_path / "sub") == tmp_path / "sub" / "mine.yaml"
    assert find_config(tmp_path / "sub" / "mine.yaml", Path("/")) == tmp_path / "sub" / "mine.yaml"
    assert find_config("sub") == Path("sub"), "a folder, which who reads it will refuse"


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("dmo", "did you mean demo"),
        ("study-engin", "did you mean study-engine"),
        ("eval_configs/demo.yaml", "did you mean demo"),
        ("mien.yaml", r"did you mean mine\.yaml\?"),
        ("qqq", "check the path, or give one of: data-efficiency, demo, "),
    ],
)
def test_unknown_names_get_the_nearest_ones(tmp_path: Path, given: str, near: str) -> None:
    (tmp_path / "mine.yaml").write_text("")
    with pytest.raises(ConfigError, match=f"(?s)reading config {given}: no such file.*{near}"):
        find_config(given)
