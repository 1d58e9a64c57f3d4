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


def run(code: str, *paths: Path, timeout: float = 60) -> str:
    """Standard output of a fresh interpreter."""
    before = f"import sys; sys.path[:0] = {[str(path) for path in paths]!r}\n"
    done = subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True, timeout=timeout)
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


@pytest.mark.parametrize("order", ["ksvd_sae first", "sae_lens first"])
def test_an_error_of_ours_breaks_no_import(fake_sae_lens: Path, order: str) -> None:
    """Another version of SAELens, say, of which ours cannot be a subclass; the stand-in lacks nearly all of it."""
    first, second = ("ksvd_sae", "sae_lens") if order == "ksvd_sae first" else ("sae_lens", "ksvd_sae")
    code = f"""
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
import {first}, {second}
print(sae_lens.SAE.__name__, ksvd_sae.__version__)
"""
    said = run(code, fake_sae_lens)
    for module in REGISTERING:
        assert f"WARNING ksvd_sae: {module} cannot be imported, so that SAELens does not know its SAEs (" in said
    assert "No module named 'sae_lens.saes'" in said
    assert said.endswith("SAE 0.1.0\n")


RELOADING = """
import importlib, importlib.util, pkgutil, sys, tempfile, warnings
warnings.simplefilter("ignore")
import ksvd_sae, sae_lens

names = [each.name for each in pkgutil.walk_packages(ksvd_sae.__path__, "ksvd_sae.")]
names = ["ksvd_sae", *(name for name in names if not name.endswith("__main__"))]
if importlib.util.find_spec("orthogonal_matching_pursuit_gpu") is None:  # the one peer that needs a compiler
    names.remove("ksvd_sae.bench.peers.omp_gpu_peer")
before = ksvd_sae.DBKSVDSAE
for _ in range(2):
    for name in names:
        importlib.reload(importlib.import_module(name))
assert ksvd_sae.DBKSVDSAE is sys.modules["ksvd_sae.sae"].DBKSVDSAE is not before
with tempfile.TemporaryDirectory() as folder:
    sae = ksvd_sae.DBKSVDSAE(ksvd_sae.DBKSVDSAEConfig(d_in=4, d_sae=8, k=2))
    sae.save_model(folder)
    loaded = sae_lens.SAE.load_from_disk(folder)
import torch
assert type(loaded) is ksvd_sae.DBKSVDSAE
assert torch.equal(loaded.encode(torch.ones(3, 4)), sae.encode(torch.ones(3, 4)))
print(len(names), [type(finder).__name__ for finder in sys.meta_path if "ksvd_sae" in type(finder).__module__])
"""


def test_every_module_can_be_reloaded() -> None:
    n_modules, finders = run(RELOADING, timeout=300).split(maxsplit=1)
    assert int(n_modules) > 100
    assert finders == "[]\n"


def test_importing_sets_nothing_of_the_process() -> None:
    code = """
import os, signal, sys
before = dict(os.environ), os.getcwd(), sys.stdout, sys.stderr, signal.getsignal(signal.SIGTERM)
import ksvd_sae.cli, ksvd_sae.sae, ksvd_sae.run.pipeline
after = dict(os.environ), os.getcwd(), sys.stdout, sys.stderr, signal.getsignal(signal.SIGTERM)
changed = {name for name in before[0].keys() | after[0].keys() if before[0].get(name) != after[0].get(name)}
print(sorted(name for name in changed if not name.startswith(OTHERS)), before[1:] == after[1:])
"""
    # Of libraries: tokenizers, matplotlib, OpenMP and CUDA by torch.
    assert (
        run(f"OTHERS = ('KMP_', 'TORCH', 'PYTORCH', 'CUDA', 'TOKENIZERS', 'MPL')\n{code}", timeout=120) == "[] True\n"
    )


def test_sae_lens_is_not_needed(tmp_path: Path) -> None:
    """A missing sae_lens stays an ordinary ModuleNotFoundError that names sae_lens."""
    (tmp_path / "sae_lens.py").write_text("raise ModuleNotFoundError(\"No module named 'sae_lens'\", name='sae_lens')")
    code = (
        f"{REGISTRATION}\ntry:\n    import sae_lens\nexcept ModuleNotFoundError as error:\n    print(error.name, calls)"
    )
    assert run(code, tmp_path) == "sae_lens []\n"
