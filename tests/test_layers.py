"""Imports go down the path of the data or sideways, never up; and each outside library has its place.

The rules are the tables below. A checker reads every module's syntax tree, so an import inside a function
or under TYPE_CHECKING counts like any other.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "ksvd_sae"
PACKAGE = "ksvd_sae"

# A module may import from its own row and the rows above it.
LAYERS = (
    ("errors", "provenance"),
    ("eval_config", "published_config"),
    ("dictionary_options",),
    ("derived_config",),
    ("config", "device"),
    ("replicas",),
    ("progress",),
    ("offline",),
    ("activations",),
    ("learning",),
    ("dictionary",),
    ("sae",),
    ("evaluation",),
    ("reporting",),
    ("hub", "trainers"),
    ("recoding", "trained"),
    ("pipeline",),
    ("bench", "doctor", "studies"),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Only lazy imports of the package's modules: `import ksvd_sae` must stay quick.
LAZY = ("__init__.py", "_registration.py")
# learning/ must run on a machine that has nothing but torch, numpy and safetensors.
FORBIDDEN_IN = {"learning": ("activations", "config", "offline")}
ONLY_IN_LEARNING = frozenset({"torch", "numpy", "safetensors", "numba", "triton"})
# Where a library may be imported: prefixes of paths inside the package.
PLACES = {
    "sae_lens": ("sae.py", "evaluation/", "bench/peers/"),
    "sae_bench": ("evaluation/",),
    "transformers": ("activations/", "evaluation/", "offline/"),
    "transformer_lens": ("activations/", "evaluation/", "offline/"),
    "triton": ("learning/kernels/",),
    # Peers are measured against, never used; SPAMS is under the GPL.
    "spams": ("bench/peers/",),
    "dictlearn": ("bench/peers/",),
    "orthogonal_matching_pursuit_gpu": ("bench/peers/",),
}
NOWHERE = frozenset({"pickle", "cPickle", "dill", "cloudpickle"})
MAY_PRINT = ("cli.py", "bench/")
MAX_LINES = 400

MODULES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py"))


def imports(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported: statements, and import_module / __import__ of a literal."""
    package = [PACKAGE, *Path(path).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{origin}.{alias.name}"
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            literal = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            if called in ("import_module", "__import__") and isinstance(literal, str):
                yield node.lineno, literal


def eager(tree: ast.Module) -> ast.Module:
    """What runs on import: no function bodies, and not what stands under `if TYPE_CHECKING`."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if ast.unparse(node.test).endswith("TYPE_CHECKING") else self.generic_visit(node)

    stripped = Strip().visit(tree)
    assert isinstance(stripped, ast.Module)
    return stripped


def problems(source: str, path: str) -> list[str]:
    """Everything in a module's source that breaks a rule, as 'line: what'."""
    tree = ast.parse(source)
    found = []
    if (n_lines := len(source.splitlines())) >= MAX_LINES:
        found.append(f"{n_lines}: the module has {n_lines} lines, the limit is {MAX_LINES}")
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "print"
            and not path.startswith(MAY_PRINT)
        ):
            found.append(f"{node.lineno}: print")
    for line, name in imports(tree, path):
        top, _, rest = name.partition(".")
        if top == PACKAGE:
            if path not in LAZY:
                found += [f"{line}: {why}" for why in [_inside(rest.split(".")[0], path)] if why]
        else:
            found += [f"{line}: {why}" for why in [_outside(top, path)] if why]
    if path in LAZY:
        for line, name in imports(eager(ast.parse(source)), path):
            if name.split(".")[0] not in (sys.stdlib_module_names | {PACKAGE}) or (
                name.split(".")[0] == PACKAGE and not name.startswith(f"{PACKAGE}._registration")
            ):
                found.append(f"{line}: {name} is imported eagerly")
    return sorted(found)


def _inside(name: str, path: str) -> str | None:
    own = Path(path).parts[0].removesuffix(".py")
    if own not in RANK:
        return f"{own} has no rank: give it a place in LAYERS"
    if name == "__version__":
        return None
    if name not in RANK:
        return f"{name or PACKAGE} is no module with a rank: import the module that defines it"
    if RANK[name] > RANK[own]:
        return f"{own} imports {name}, which comes later on the path"
    if name in FORBIDDEN_IN.get(own, ()):
        return f"{own} imports {name}, which it must run without"
    return None


def _outside(top: str, path: str) -> str | None:
    if top in NOWHERE:
        return f"{top} is used nowhere"
    if top in PLACES and not path.startswith(PLACES[top]):
        return f"{top} belongs in {', '.join(PLACES[top])}"
    if path.startswith("learning/") and top not in (sys.stdlib_module_names | ONLY_IN_LEARNING):
        return f"learning imports {top}, which it must run without"
    return None


@pytest.mark.parametrize("path", MODULES)
def test_module(path: str) -> None:
    assert problems((ROOT / path).read_text(), path) == []


def test_the_list_of_modules_is_not_empty() -> None:
    assert {"__init__.py", "errors.py", "learning/sparse_coding.py"} <= set(MODULES)


def test_what_learning_rests_on_needs_no_more_than_learning() -> None:
    """learning imports modules above it on the path: what those import must be there too."""
    queue = [path for path in MODULES if path.startswith("learning/")]
    seen: set[str] = set(queue)
    outside: dict[str, str] = {}
    while queue:
        path = queue.pop()
        for _, name in imports(eager(ast.parse((ROOT / path).read_text())), path):
            top, _, rest = name.partition(".")
            if top != PACKAGE:
                outside.setdefault(top, path)
                continue
            parts = rest.split(".")
            for depth in range(1, len(parts) + 1):
                for candidate in ("/".join(parts[:depth]) + ".py", "/".join(parts[:depth]) + "/__init__.py"):
                    if candidate in MODULES and candidate not in seen:
                        seen.add(candidate)
                        queue.append(candidate)
    assert "errors.py" in seen, "the walk must follow imports"
    foreign = {top: path for top, path in outside.items() if top not in sys.stdlib_module_names | ONLY_IN_LEARNING}
    assert foreign == {}


BAD = {
    "upwards": ("from ksvd_sae.dictionary import Dictionary", "learning/x.py", "learning imports dictionary"),
    "upwards, whole module": ("import ksvd_sae.cli", "pipeline.py", "pipeline imports cli"),
    "upwards, in a function": ("def f():\n    from ksvd_sae.sae import DBKSVDSAE", "dictionary.py", "2: dictionary"),
    "upwards, for types": (
        "if TYPE_CHECKING:\n    from ksvd_sae.hub import upload",
        "reporting/tables.py",
        "reporting imports hub",
    ),
    "upwards, relative": ("from ..sae import DBKSVDSAE", "activations/shards.py", "activations imports sae"),
    "upwards, relative package": ("from .. import sae", "activations/shards.py", "activations imports sae"),
    "upwards, by name": ('import_module("ksvd_sae.sae")', "dictionary.py", "dictionary imports sae"),
    "upwards, from the package": ("from ksvd_sae import cli", "bench/speed.py", "bench imports cli"),
    "by the lazy name": ("from ksvd_sae import Dictionary", "sae.py", "Dictionary is no module with a rank"),
    "the package itself": ("import ksvd_sae", "sae.py", "ksvd_sae is no module with a rank"),
    "no rank": ("from ksvd_sae.errors import KsvdSaeError", "helpers.py", "helpers has no rank"),
    "learning, config": ("from ksvd_sae.config import RunConfig", "learning/x.py", "learning imports config"),
    "learning, shards": ("import ksvd_sae.activations.shards", "learning/x.py", "learning imports activations"),
    "learning, offline": ("from ksvd_sae.offline import gemma", "learning/x.py", "learning imports offline"),
    "learning, scipy": ("import scipy.linalg", "learning/x.py", "learning imports scipy"),
    "learning, rich in a function": ("def f():\n    import rich", "learning/kernels/x.py", "learning imports rich"),
    "sae_lens": ("from sae_lens import SAE", "dictionary.py", "sae_lens belongs in sae.py"),
    "sae_lens for pipelines": ("import sae_lens", "pipeline.py", "sae_lens belongs in"),
    "sae_bench": ("import sae_bench.evals.core.main as core", "sae.py", "sae_bench belongs in evaluation/"),
    "transformers": ("def f():\n    import transformers", "hub.py", "transformers belongs in"),
    "transformer_lens": ("from transformer_lens import HookedTransformer", "sae.py", "transformer_lens belongs in"),
    "triton": ("import triton.language as tl", "learning/sparse_coding.py", "triton belongs in learning/kernels/"),
    "a peer": ("def f():\n    import spams", "bench/coding.py", "spams belongs in bench/peers/"),
    "pickle": ("import pickle", "activations/shards.py", "pickle is used nowhere"),
    "pickle by name": ('__import__("pickle")', "cli.py", "pickle is used nowhere"),
    "print": ("def f():\n    print('hello')", "pipeline.py", "2: print"),
    "too long": ("x = 1\n" * 400, "sae.py", "400 lines"),
    "eager torch": ("import torch", "__init__.py", "torch is imported eagerly"),
    "eager module": ("from ksvd_sae.sae import DBKSVDSAE", "_registration.py", "is imported eagerly"),
    "eager in try": ("try:\n    import yaml\nexcept ImportError:\n    pass", "__init__.py", "2: yaml is imported"),
}

GOOD = {
    "downwards": ("from ksvd_sae.learning.dbksvd import DoubleBatchKSVD", "dictionary.py"),
    "sideways": ("from ksvd_sae.learning import sparse_coding\nfrom . import pca", "learning/x.py"),
    "sideways in a row": ("from ksvd_sae.errors import KsvdSaeError", "provenance.py"),
    "learning's own libraries": (
        "import numpy as np, torch, json\nfrom safetensors.torch import load_file",
        "learning/x.py",
    ),
    "triton in a kernel": ("import triton", "learning/kernels/mp.py"),
    "sae_lens at the border": ("from sae_lens import SAE", "sae.py"),
    "print where it is meant": ("print('x')", "cli.py"),
    "a method called print": ("console.print('x')", "pipeline.py"),
    "lazily": (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from ksvd_sae.sae import DBKSVDSAE\n"
        "def f():\n    import torch",
        "__init__.py",
    ),
    "just short enough": ("x = 1\n" * 399, "sae.py"),
}


@pytest.mark.parametrize("case", BAD)
def test_the_checker_finds(case: str) -> None:
    source, path, words = BAD[case]
    found = problems(source, path)
    assert len(found) == 1
    assert words in found[0]


@pytest.mark.parametrize("case", GOOD)
def test_the_checker_accepts(case: str) -> None:
    source, path = GOOD[case]
    assert problems(source, path) == []
