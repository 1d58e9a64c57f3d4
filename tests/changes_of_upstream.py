"""Finds where a syntax tree changes modules, classes or collections of the libraries that SAEBench consists of.

An expression comes from upstream if it is a name that was imported from there, or an alias of one, or is reached from
one by attributes and items, also by ``vars``, ``getattr``, ``sys.modules`` or ``import_module``. What upstream's
functions return (models, SAEs, results) is the caller's own, and is no concern here.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

UPSTREAM = {"sae_bench", "sae_lens", "sae_probes", "transformer_lens", "transformers", "datasets", "gguf"}
_IN_PLACE = {
    "update",
    "setdefault",
    "pop",
    "popitem",
    "clear",
    "append",
    "extend",
    "insert",
    "remove",
    "sort",
    "reverse",
}
_IN_PLACE |= {"add", "discard", "__setitem__", "__delitem__", "__setattr__", "__delattr__", "__ior__", "__iadd__"}
# What gives its argument's own names or contents, or the argument itself.
_THROUGH = {"vars", "getattr", "cast", "list", "tuple", "zip", "iter", "next", "enumerate", "reversed"}
_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_Scope = _Function | ast.ClassDef | ast.Module


def changes_in(tree: ast.Module, elsewhere: Mapping[str, set[str]] | None = None) -> list[str]:
    """'line: code' of every change, in the order of lines.

    Args: elsewhere: other modules of ours -> names in them that come from upstream; see ``upstream_names``.
    """
    return sorted(_Walk(elsewhere or {}).changes(tree, set()), key=lambda change: int(change.split(":")[0]))


def upstream_names(tree: ast.Module) -> set[str]:
    """The module's own names that come from upstream."""
    return _Walk({}).names(tree, set())


def module_trees(package: Path) -> dict[str, ast.Module]:
    """Dotted name -> tree of every module of a package."""
    return {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
            path.read_text()
        )
        for path in sorted(package.rglob("*.py"))
    }


@dataclass
class _Walk:
    elsewhere: Mapping[str, set[str]]
    # Names of our modules, as they were imported -> dotted name.
    _ours: dict[str, str] = field(default_factory=dict)

    def changes(self, scope: _Scope, outer: set[str]) -> Iterator[str]:
        names = self.names(scope, outer)
        for node in _own_nodes(scope):
            if self._is_change(node, names):
                # Some nodes have no line of their own.
                line = next(part.lineno for part in ast.walk(node) if hasattr(part, "lineno"))
                yield f"{line}: {ast.unparse(node).splitlines()[0]}"
            if isinstance(node, _Scope):
                yield from self.changes(node, names)

    def names(self, scope: _Scope, outer: set[str]) -> set[str]:
        """What comes from upstream among the names that are seen in a scope."""
        names = set(outer)
        if isinstance(scope, _Function):
            arguments = scope.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            names -= {argument.arg for argument in every if argument is not None}
        nodes = list(_own_nodes(scope))
        names -= {target.id for node in nodes for target, _ in _bindings(node) if isinstance(target, ast.Name)}
        before: set[str] | None = None
        while names != before:
            before = set(names)
            for node in nodes:
                names |= self._imported(node)
                names |= {
                    target.id
                    for target, value in _bindings(node)
                    if isinstance(target, ast.Name) and value is not None and self._comes_from(value, names)
                }
        return names

    def _imported(self, node: ast.AST) -> set[str]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in self.elsewhere and alias.asname:
                    self._ours[alias.asname] = alias.name
            return {alias.asname or _root(alias.name) for alias in node.names if _root(alias.name) in UPSTREAM}
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            return set()
        if _root(node.module) in UPSTREAM:
            return {alias.asname or alias.name for alias in node.names}
        for alias in node.names:
            if (module := f"{node.module}.{alias.name}") in self.elsewhere:
                self._ours[alias.asname or alias.name] = module
        known = self.elsewhere.get(node.module, set())
        return {alias.asname or alias.name for alias in node.names if alias.name in known}

    def _comes_from(self, value: ast.expr, names: set[str]) -> bool:
        match value:
            case ast.Name(id=name):
                return name in names
            case ast.Attribute(value=ast.Name(id=module), attr=name) if module in self._ours:
                return name in self.elsewhere[self._ours[module]]
            case ast.Subscript(value=ast.Attribute(attr="modules"), slice=ast.Constant(value=str(name))):
                return _root(name) in UPSTREAM
            case ast.Attribute(value=inner) | ast.Subscript(value=inner) | ast.Starred(value=inner):
                return self._comes_from(inner, names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                return _root(module) in UPSTREAM
            case ast.Call(func=ast.Name(id=name), args=arguments) if name in _THROUGH:
                return any(self._comes_from(argument, names) for argument in arguments)
            case ast.Call(func=ast.Attribute(value=inner, attr="values" | "items" | "get")):
                return self._comes_from(inner, names)
            case ast.Tuple(elts=values) | ast.List(elts=values) | ast.BoolOp(values=values):
                return any(self._comes_from(inner, names) for inner in values)
            case ast.IfExp(body=one, orelse=other):
                return self._comes_from(one, names) or self._comes_from(other, names)
            case ast.NamedExpr(value=inner):
                return self._comes_from(inner, names)
        return False

    def _is_change(self, node: ast.AST, names: set[str]) -> bool:
        match node:
            case ast.Import() | ast.ImportFrom():
                modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                return any(name in ("mock", "unittest.mock", "pytest") for name in modules)
            case ast.Call(func=ast.Name(id="setattr" | "delattr"), args=[inner, *_]):
                # Whatever it is given but self: in a helper that does this, an object would get out of sight.
                return not (isinstance(inner, ast.Name) and inner.id == "self")
            case ast.Call(func=ast.Attribute(value=ast.Name(id="object" | "type"), attr=name), args=[inner, *_]):
                return name in _IN_PLACE and self._comes_from(inner, names)
            case ast.Call(func=ast.Attribute(value=inner, attr=name)) if name in _IN_PLACE:
                return self._comes_from(inner, names)
            case ast.Delete(targets=targets):
                return any(self._is_part(target, names) for target in targets)
        return any(self._is_part(target, names) for target, _ in _bindings(node))

    def _is_part(self, target: ast.expr, names: set[str]) -> bool:
        return isinstance(target, ast.Attribute | ast.Subscript) and self._comes_from(target.value, names)


def _root(name: str) -> str:
    return name.split(".")[0]


def _own_nodes(scope: _Scope) -> Iterator[ast.AST]:
    """All nodes of a scope; scopes within it are among them, what is in those is not."""
    waiting = list(ast.iter_child_nodes(scope))
    while waiting:
        node = waiting.pop(0)
        yield node
        if not isinstance(node, _Scope):
            waiting += ast.iter_child_nodes(node)


def _bindings(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    """What a node assigns to, and what: each target by itself; the value is of all where it cannot be told apart."""
    match node:
        case ast.Assign(targets=targets, value=value):
            for target in targets:
                yield from _pairs(target, value)
        case ast.AugAssign(target=target, value=value) | ast.AnnAssign(target=target, value=value):
            yield from _pairs(target, value)
        case ast.NamedExpr(target=target, value=value):
            yield target, value
        case ast.For(target=target, iter=value) | ast.AsyncFor(target=target, iter=value):
            yield from _pairs(target, value)
        case ast.comprehension(target=target, iter=value):
            yield from _pairs(target, value)
        case ast.withitem(context_expr=value, optional_vars=target) if target is not None:
            yield from _pairs(target, value)


def _pairs(target: ast.expr, value: ast.expr | None) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    if not isinstance(target, ast.Tuple | ast.List):
        yield target, value
        return
    together = isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts)
    values = value.elts if together else [value] * len(target.elts)  # type: ignore[union-attr]
    for inner, part in zip(target.elts, values, strict=True):
        yield from _pairs(inner, part)
