"""`import ksvd_sae` is quick and pulls in nothing heavy, yet SAELens will know our architecture."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tolerances

HEAVY = ("torch", "numpy", "pandas", "sae_lens", "sae_bench", "transformers", "transformer_lens", "datasets")

IMPORT = f"""
import json, sys, time
started = time.perf_counter()
import ksvd_sae
seconds = time.perf_counter() - started
loaded = [name for name in {HEAVY!r} if name in sys.modules]
print(json.dumps({{"seconds": seconds, "loaded": loaded, "names": dir(ksvd_sae), "file": ksvd_sae.__file__}}))
"""


def run(code: str, *paths: Path) -> str:
    """Standard output of a fresh interpreter."""
    before = f"import sys; sys.path[:0] = {[str(path) for path in paths]!r}\n"
    done = subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_quick_and_light() -> None:
    runs = [json.loads(run(IMPORT)) for _ in range(3)]
    assert all(each["loaded"] == [] for each in runs)
    assert min(each["seconds"] for each in runs) < tolerances.IMPORT_SECONDS
    assert {"Dictionary", "DoubleBatchKSVD", "load_config", "__version__"} <= set(runs[0]["names"])


def test_names_load_on_first_use() -> None:
    code = """
import sys, ksvd_sae
from ksvd_sae import DoubleBatchKSVD, matching_pursuit
from ksvd_sae.estimator import DoubleBatchKSVD as same
assert DoubleBatchKSVD is same
heavy = [name for name in ("sae_lens", "transformers", "transformer_lens", "datasets") if name in sys.modules]
assert heavy == [], heavy
try:
    ksvd_sae.DoubleBatchKSDV
except AttributeError as error:
    print(error)
"""
    assert "DoubleBatchKSDV" in run(code)


REGISTERING = ["ksvd_sae.sae", "ksvd_sae.methods.sae.raw_units"]
# A stand-in for sae_lens and a recorder for what the hook imports: the real one takes seconds to import.
REGISTRATION = """
import sys
import ksvd_sae, ksvd_sae._registration as registration
calls = []
registration.import_module = calls.append
"""


@pytest.fixture
def fake_sae_lens(tmp_path: Path) -> Path:
    (tmp_path / "sae_lens").mkdir()
    (tmp_path / "sae_lens" / "__init__.py").write_text("class SAE: ...\n")
    return tmp_path


@pytest.mark.parametrize(
    "before",
    [
        "",
        # transformers, SAEBench and others ask whether a package is there before they import it.
        "import importlib.util; assert importlib.util.find_spec('sae_lens') is not None",
        "import importlib; importlib.reload(ksvd_sae)",
    ],
    ids=["import", "looked up first", "ksvd_sae reloaded"],
)
def test_the_architecture_is_registered_once_sae_lens_is_imported(fake_sae_lens: Path, before: str) -> None:
    code = f"{REGISTRATION}\n{before}\nassert calls == []\nimport sae_lens\nsae_lens.SAE\nprint(calls)"
    assert run(code, fake_sae_lens) == f"{REGISTERING}\n"


def test_the_architecture_is_registered_if_sae_lens_came_first(fake_sae_lens: Path) -> None:
    code = """
import importlib, sae_lens
calls = []
real = importlib.import_module
importlib.import_module = lambda name: calls.append(name) if name.startswith("ksvd_sae.") else real(name)
import ksvd_sae
print(calls)
"""
    assert run(code, fake_sae_lens) == f"{REGISTERING}\n"


def test_sae_lens_is_not_needed(tmp_path: Path) -> None:
    """A missing sae_lens stays an ordinary ModuleNotFoundError that names sae_lens."""
    (tmp_path / "sae_lens.py").write_text("raise ModuleNotFoundError(\"No module named 'sae_lens'\", name='sae_lens')")
    code = (
        f"{REGISTRATION}\ntry:\n    import sae_lens\nexcept ModuleNotFoundError as error:\n    print(error.name, calls)"
    )
    assert run(code, tmp_path) == "sae_lens []\n"
