"""What learns, and benchmarks of GPUs and processes, need torch, numpy, numba, triton and safetensors alone."""

import subprocess
import sys

# Imported in a fresh interpreter whose import system refuses all else; THEIRS is what the five ask for themselves.
ALONE = """
import importlib, importlib.abc, pkgutil, sys

ALLOWED = {"torch", "numpy", "numba", "triton", "safetensors", "ksvd_sae"}
THEIRS = {
    "cuda", "filelock", "fsspec", "jinja2", "llvmlite", "markupsafe", "mpmath", "networkx", "setuptools", "sympy",
    "torchgen", "typing_extensions", "_distutils_hack",
}


class RefusedError(ModuleNotFoundError): ...


class Refusing(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        top = fullname.partition(".")[0]
        # _sysconfigdata_…: of the standard library, under a name of the platform.
        if top in ALLOWED | THEIRS | sys.stdlib_module_names or top.startswith("_sysconfigdata_"):
            return None
        raise RefusedError(f"{fullname} is not there", name=fullname)


sys.meta_path.insert(0, Refusing())

import ksvd_sae.learning

names = [each.name for each in pkgutil.walk_packages(ksvd_sae.learning.__path__, "ksvd_sae.learning.")]
for name in [*names, "ksvd_sae.bench.gpu", "ksvd_sae.bench.processes"]:
    importlib.import_module(name)

import torch
from ksvd_sae.learning.coding import Coding
from ksvd_sae.learning.dbksvd import DictionaryLearner, LearnerOptions

x_ND = torch.randn(100, 6)
for coder in ("mp_refit", "ormp"):
    learner = DictionaryLearner(LearnerOptions(8, Coding(2, coder), passes=2), device="cpu").fit(x_ND)
    assert learner.decode(learner.encode(x_ND)).shape == (100, 6)

for name in ("scipy", "sklearn", "pandas"):
    try:
        importlib.import_module(name)
    except RefusedError:
        continue
    raise SystemExit(f"{name} was imported: the refusal does not work")
loaded = {name.partition(".")[0] for name, module in sys.modules.items() if getattr(module, "__file__", None)}
print(sorted(loaded & {"scipy", "sklearn", "pandas", "sae_lens", "transformers", "pydantic"}), len(names))
"""


def test_learning_and_the_gpu_benchmark_need_five_packages() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    loaded, n_modules = done.stdout.rsplit(maxsplit=1)
    assert loaded == "[]"
    assert int(n_modules) > 20, "modules of learning/ and its kernels"
