"""The package stands alone: the wheel, installed where there is no checkout, has all that ``ksvd-sae`` needs."""

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.command_line import EVAL_CONFIGS, REPOSITORY

PACKAGE = REPOSITORY / "ksvd_sae"

CHECK = """
import pkgutil, sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
import ksvd_sae
from ksvd_sae.run.config import load_config
from ksvd_sae.run.find_config import shipped_configs
from ksvd_sae.run.curves import load_curves
from ksvd_sae.run.grid import load_study

prefix = Path(sys.prefix).resolve()
assert Path(ksvd_sae.__file__).resolve().is_relative_to(prefix), ksvd_sae.__file__
assert version("ksvd-sae") == ksvd_sae.__version__
for name, path in shipped_configs().items():
    assert path.resolve().is_relative_to(prefix), path
    if "\\nbase: " in path.read_text():
        study, runs = (load_curves if "\\ncurves:" in path.read_text() else load_study)(name)
        assert study.name == name and runs
    else:
        assert load_config(name).name == name
print("configs", *shipped_configs())
modules = [module.name for module in pkgutil.walk_packages(ksvd_sae.__path__, "ksvd_sae.")]
for name in modules:
    try:
        import_module(name)
    except ModuleNotFoundError as error:
        # Whom the benchmarks compare with comes with an extra.
        if not name.startswith("ksvd_sae.bench.peers.") or error.name.startswith("ksvd_sae"):
            raise
print("modules", *modules)
"""


@dataclass(frozen=True)
class Installed:
    """The wheel; a Python that has it, and the dependencies of this one; an empty folder to work in."""

    wheel: Path
    python: Path
    folder: Path

    def run(self, *command: str | Path) -> str:
        """What a command prints; it must succeed, and it sees no checkout and no home of this user."""
        env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        env |= {"HOME": str(self.folder), "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    place = tmp_path_factory.mktemp("wheel")
    # A copy: setuptools leaves files beside pyproject.toml.
    source, dist, venv = place / "source", place / "dist", place / "venv"
    for folder in (PACKAGE, EVAL_CONFIGS):
        shutil.copytree(folder, source / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copyfile(REPOSITORY / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    _succeed([*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", dist, source])
    (wheel,) = dist.glob("*.whl")
    _succeed([sys.executable, "-m", "venv", "--without-pip", venv])
    python = venv / "bin" / "python"
    _succeed([*pip, "--python", python, "install", *offline, wheel])
    (packages,) = venv.glob("lib/python*/site-packages")
    # After the venv's own, and without their .pth files: an editable install of the checkout is none here.
    dependencies = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text("\n".join(dependencies))
    (place / "empty").mkdir()
    return Installed(wheel, python, place / "empty")


def _succeed(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_holds_the_package_and_the_configs_and_nothing_else(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    expected = {str(path.relative_to(REPOSITORY)) for path in files}
    assert {"ksvd_sae/report/report.html.j2", "ksvd_sae/report/published/saebench_reproduced.csv"} < expected
    assert held == expected | {f"ksvd_sae/eval_configs/{path.name}" for path in EVAL_CONFIGS.glob("*.yaml")}


def test_the_command_is_there(installed: Installed) -> None:
    assert "Learn DB-KSVD dictionaries" in installed.run(installed.python.with_name("ksvd-sae"), "--help")


def test_every_config_loads_by_name_and_every_module_imports(installed: Installed) -> None:
    configs, modules = (
        line.split()[1:] for line in installed.run(installed.python, "-W", "ignore", "-c", CHECK).splitlines()[-2:]
    )
    assert configs == sorted(path.stem for path in EVAL_CONFIGS.glob("*.yaml"))
    files = [path.relative_to(REPOSITORY).with_suffix("") for path in PACKAGE.rglob("*.py")]
    names = {".".join(part for part in path.parts if part != "__init__") for path in files}
    assert set(modules) == names - {"ksvd_sae"}
