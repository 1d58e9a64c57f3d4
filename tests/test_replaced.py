"""All that is replaced upstream is in one table, done by one function, and put back."""

import ast
import sys
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import ksvd_sae
from ksvd_sae.errors import UpstreamError
from ksvd_sae.replaced import TABLE, Replacement, page, replaced, resolve
from tests.changes_of_upstream import UPSTREAM, changes_in, module_trees, upstream_names

PACKAGE = Path(ksvd_sae.__path__[0])
TESTS = Path(__file__).parent
DATA_SETS = "sae_bench.sae_bench_utils.dataset_info.chosen_classes_per_dataset"
CORE_LOSS = "sae_bench.evals.core.main.get_recons_loss"
LOADER = "transformer_lens.HookedTransformer.from_pretrained_no_processing"


class BoomError(Exception):
    pass


def lying(target: str) -> Any:
    """What lies under a target: as in the class, and a copy of a dict, in its order."""
    owner, name = resolve(target)
    value = vars(owner).get(name, "nothing")
    return list(deepcopy(value).items()) if isinstance(value, dict) else value


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("target", TABLE)
def test_every_target_is_there(target: str) -> None:
    owner, name = resolve(target)
    assert hasattr(owner, name) != TABLE[target].added


@pytest.mark.parametrize("target", TABLE)
def test_every_entry_says_what_why_where_and_who_notices(target: str, request: pytest.FixtureRequest) -> None:
    entry = TABLE[target]
    assert all((entry.used_by, entry.instead, entry.why, entry.seen_in, entry.noticed_by))
    assert entry.why.endswith(".")
    for test in entry.noticed_by:
        file, _, name = test.partition("::")
        collected = pytest.Module.from_parent(request.session, path=TESTS.parent / file).collect()
        assert name in {node.name.partition("[")[0] for node in collected}, f"{test} is not collected"
        assert target.rpartition(".")[2] in (TESTS.parent / file).read_text(), f"{file} does not name the target"


def test_the_page_is_the_table() -> None:
    written = (TESTS.parent / "docs" / "replacements.md").read_text()
    assert written == page(), "python -m ksvd_sae.replaced > docs/replacements.md"
    for target, entry in TABLE.items():
        assert f"`{target.rpartition('.')[2]}`" in written
        assert entry.why in written


# ---------------------------------------------------------------- put there, and put back


@pytest.mark.parametrize("leave", ["normally", "by exception"])
@pytest.mark.parametrize("target", TABLE)
def test_every_target_is_put_back(target: str, leave: str) -> None:
    before = lying(target)
    stands_in = {"ours": 1} if isinstance(before, list) else object()
    left: AbstractContextManager[Any] = nullcontext() if leave == "normally" else pytest.raises(BoomError)
    with left, replaced({target: stands_in}):
        if isinstance(stands_in, dict):
            assert lying(target) == [*before, ("ours", 1)]
        else:
            assert lying(target) is stands_in
        if leave == "by exception":
            raise BoomError
    after = lying(target)
    assert after == before if isinstance(before, list) else after is before


def test_an_entry_of_saebenchs_own_comes_back_in_its_place() -> None:
    before = lying(DATA_SETS)
    with replaced({DATA_SETS: {"fancyzhx/ag_news": ["0"]}}):
        assert dict(lying(DATA_SETS))["fancyzhx/ag_news"] == ["0"]
    assert lying(DATA_SETS) == before


def test_nested() -> None:
    before = lying(CORE_LOSS), lying(DATA_SETS)
    with replaced({CORE_LOSS: 1}, {DATA_SETS: {"a": ["0"]}}):
        with replaced({CORE_LOSS: 2, DATA_SETS: {"a": ["1"], "b": ["2"]}}):
            assert (lying(CORE_LOSS), lying(DATA_SETS)[-2:]) == (2, [("a", ["1"]), ("b", ["2"])])
        assert (lying(CORE_LOSS), lying(DATA_SETS)[-1]) == (1, ("a", ["0"]))
    assert (lying(CORE_LOSS), lying(DATA_SETS)) == before


def test_a_classmethod_stays_one() -> None:
    """What getattr gives is bound to the class; put back, it would be the loader of all subclasses."""
    before = lying(LOADER)
    assert isinstance(before, classmethod)
    with replaced({LOADER: staticmethod(lambda name: name)}):
        owner, name = resolve(LOADER)
        assert getattr(owner, name)("tiny") == "tiny"
    assert lying(LOADER) is before


class Base:
    @staticmethod
    def inherited() -> str:
        return "base"


class Derived(Base):
    @staticmethod
    def static() -> str:
        return "static"


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A library of ours with a table of its own."""
    made = ModuleType("tiny_library")
    made.Derived = Derived  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tiny_library", made)
    about = {"used_by": "a test", "instead": "x", "why": "x.", "seen_in": "tiny 1.0", "noticed_by": ("x",)}
    for name, added in (("inherited", False), ("static", False), ("new", True), ("gone", False)):
        monkeypatch.setitem(TABLE, f"tiny_library.Derived.{name}", Replacement(**about, added=added))  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize("name", ["inherited", "static", "new"])
def test_a_class_has_of_its_own_what_it_had(name: str, library: ModuleType) -> None:
    before = dict(vars(Derived))
    with replaced({f"tiny_library.Derived.{name}": staticmethod(lambda: "other")}):
        assert getattr(Derived, name)() == getattr(Derived(), name)() == "other"
        assert Base.inherited() == "base"
    assert dict(vars(Derived)) == before


# ---------------------------------------------------------------- refused


def test_what_is_not_in_the_table_is_refused() -> None:
    import sae_bench.evals.core.main as core

    before = core.run_evals
    unknown = {"sae_bench.evals.core.main.run_evals": None}
    with pytest.raises(UpstreamError, match=r"(?s)run_evals is not in the table.*reason and a test"), replaced(unknown):
        raise AssertionError("nothing is replaced")
    assert core.run_evals is before


def test_one_target_twice_is_refused() -> None:
    before = lying(CORE_LOSS)
    with pytest.raises(UpstreamError, match="loss is given twice"), replaced({CORE_LOSS: 1}, {CORE_LOSS: 2}):
        pass
    assert lying(CORE_LOSS) is before


@pytest.mark.parametrize(
    ("missing", "problem"),
    [
        ("tiny_library.Derived.gone", "tiny_library.Derived has no gone; installed: no tiny-library"),
        ("sae_bench.evals.core.gone.anything", "No module named 'sae_bench.evals.core.gone'; installed: sae-bench "),
        ("no_such_library.anything", "No module named 'no_such_library'; installed: no no-such-library"),
    ],
)
@pytest.mark.usefixtures("library")
def test_what_is_not_there_is_named_with_its_versions(
    missing: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was replaced before it is put back."""
    before = lying(CORE_LOSS)
    monkeypatch.setitem(TABLE, missing, TABLE["tiny_library.Derived.gone"])
    with pytest.raises(UpstreamError) as caught, replaced({CORE_LOSS: 1, missing: 2}):
        pass
    message = str(caught.value)
    assert f"{missing} is not there" in message
    assert problem in message
    assert "written for tiny 1.0" in message
    assert "constraints.txt" in message
    assert lying(CORE_LOSS) is before


# ---------------------------------------------------------------- nothing else is changed anywhere


def test_nothing_but_the_table_is_changed() -> None:
    trees = module_trees(PACKAGE)
    elsewhere = {name: upstream_names(tree) for name, tree in trees.items()}
    assert "core" in elsewhere["ksvd_sae.evals.core.shared"], "the walk must see what modules import"
    changes = {name: changes_in(tree, elsewhere) for name, tree in trees.items()}
    own = changes.pop("ksvd_sae.replaced")
    assert any("setattr" in change for change in own), "the walk must find the one place"
    # Of our own names in SAELens' registry, which has no way to tell of a class anew.
    registering = changes.pop("ksvd_sae._registration")
    assert [line.split(": ")[1] for line in registering] == ["registry.SAE_CLASS_REGISTRY.pop(architecture, None)"]
    assert {name: lines for name, lines in changes.items() if lines} == {}


def test_every_library_of_the_table_is_watched() -> None:
    assert {target.split(".")[0] for target in TABLE} <= UPSTREAM


IMPORTS = """
import sys
import sae_bench.evals.core.main
import sae_lens.saes.sae as sae
import transformers
from importlib import import_module
from typing import Any, cast
from sae_bench.evals.ravel import main as ravel
from transformer_lens import HookedTransformer
from ksvd_sae.other import known, own
from ksvd_sae import other
"""
CHANGES = {
    "attribute": "ravel.AutoTokenizer = None",
    "of a package": "sae_bench.evals.core.main.get_recons_loss = None",
    "of a class": "HookedTransformer.run_with_cache = None",
    "two at once": "a, ravel.AutoTokenizer = 1, 2",
    "annotated": "ravel.AutoTokenizer: Any = None",
    "added to": "ravel.LLM_NAME_MAP |= {}",
    "item": "ravel.LLM_NAME_MAP['a'] = 'b'",
    "deleted": "del ravel.LLM_NAME_MAP['a']",
    "deleted attribute": "del ravel.AutoTokenizer",
    "update": "ravel.LLM_NAME_MAP.update(a='b')",
    "clear": "ravel.LLM_NAME_MAP.clear()",
    "of a list": "ravel.some.append(1)",
    "setattr": "setattr(ravel, 'a', 1)",
    "setattr of anything": "def put(owner, name, value):\n    setattr(owner, name, value)",
    "delattr": "delattr(ravel, 'a')",
    "comprehension": "[1 for ravel.a in range(3)]",
    "past setattr": "type.__setattr__(HookedTransformer, 'a', 1)",
    "its own setattr": "ravel.__setattr__('a', 1)",
    "vars": "vars(ravel)['a'] = 1",
    "dict": "ravel.__dict__.update(a=1)",
    "globals": "ravel.run_eval.__globals__['a'] = 1",
    "getattr": "getattr(ravel, 'a').b = 1",
    "alias": "known_names = ravel.LLM_NAME_MAP\nknown_names['a'] = 'b'",
    "alias of an alias": "b = c = ravel\nd = b\nd.a = 1",
    "unpacked alias": "a, b = 1, ravel\nb.c = 1",
    "walrus": "if (a := ravel.LLM_NAME_MAP):\n    a.clear()",
    "cast": "cast(Any, ravel).a = 1",
    "either": "(ravel if a else transformers).a = 1",
    "loop": "for one in (ravel, transformers):\n    one.a = 1",
    "loop over pairs": "for one, name in zip((ravel, sae), 'ab'):\n    one.a = 1",
    "loop target": "for ravel.a in range(3):\n    pass",
    "with": "with open('x') as ravel.a:\n    pass",
    "in a function": "def f():\n    ravel.a = 1",
    "imported in a function": "def f():\n    from sae_bench.evals.scr_and_tpp import main as scr\n    scr.a = 1",
    "in a closure": "def f():\n    import datasets\n    def g():\n        datasets.a = 1\n    return g",
    "in a lambda": "f = lambda: ravel.LLM_NAME_MAP.pop('a')",
    "in a method": "class A:\n    def f(self):\n        ravel.a = 1",
    "sys.modules": "sys.modules['sae_bench.evals.core.main'].a = 1",
    "import_module": "import_module('sae_bench.evals.core.main').a = 1",
    "alias of import_module": "m = import_module('transformers')\nm.a = 1",
    "through a module of ours": "known.a = 1",
    "in a module of ours": "other.known.a = 1",
    "mock": "from unittest.mock import patch",
}
NO_CHANGES = {
    "a call": "ravel.run_eval(1)",
    "read": "a = ravel.LLM_NAME_MAP['a']",
    "own copy": "a = dict(ravel.LLM_NAME_MAP)\na['b'] = 1",
    "what is returned": "model = HookedTransformer.from_pretrained('a')\nmodel.cfg.a = 1",
    "setattr of self": "def f(self):\n    setattr(self, 'a', 1)",
    "subclass": "class Ours(HookedTransformer):\n    def f(self):\n        self.a = 1",
    "shadowed by a parameter": "def f(ravel):\n    ravel.a = 1",
    "shadowed by a variable": "def f():\n    ravel = object()\n    ravel.a = 1",
    "own name": "own.a = 1\nother.own.a = 1",
    "name bound anew": "ravel = None",
    "keyword": "f(a=ravel)",
}


def in_place(code: str) -> list[str]:
    return changes_in(ast.parse(IMPORTS + code), {"ksvd_sae.other": {"known"}})


@pytest.mark.parametrize("code", CHANGES.values(), ids=CHANGES)
def test_changes_that_are_found(code: str) -> None:
    assert len(in_place(code)) == 1


@pytest.mark.parametrize("code", NO_CHANGES.values(), ids=NO_CHANGES)
def test_what_is_no_change(code: str) -> None:
    assert in_place(code) == []
