"""A run's dictionaries as cells of a grid of sizes and budgets, and the part of them that ``--cells`` asks for."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from itertools import product
from typing import Annotated, Any

from pydantic import Field, field_validator

from ksvd_sae.errors import ConfigError
from ksvd_sae.methods import METHODS
from ksvd_sae.methods.base import Method
from ksvd_sae.strict import Strict

KINDS: dict[str, type[Method]] = {method.model_fields["kind"].default: method for method in METHODS}
# Axis of a grid -> the key of a dictionary that it gives values to.
_AXES = {"m": "n_atoms", "k": "k"}
_SUFFIX = re.compile(r"(-m\d+)?(-k\d+)?$")
_KEYS = ("dictionary", *_AXES)
_EXAMPLE = "--cells m=4096,k=20,k=40"


class Grid(Strict):
    """Sizes and budgets of dictionaries.

    A dictionary that leaves out ``n_atoms`` or ``k``, where its kind must have it, is there once for each value, as
    ``NAME-m4096-k20``, and so is what takes its atoms from it. An entry of ``dictionaries`` by such a name changes that
    cell alone; null leaves it out.
    """

    m: list[Annotated[int, Field(gt=0)]] = Field(default_factory=list, description="values of n_atoms")
    k: list[Annotated[int, Field(gt=0)]] = Field(default_factory=list, description="values of k")

    @field_validator("m", "k")
    @classmethod
    def _once(cls, values: list[int]) -> list[int]:
        if len(set(values)) < len(values):
            raise ValueError(f"{values} names a value twice")
        return values


def in_cells(raw: dict[str, Any]) -> dict[str, Any]:
    """A config with a dictionary for each cell of its grid, and without dictionaries that are null.

    What is malformed is left as it is, for whoever checks the config to name.
    """
    entries, grid = raw.get("dictionaries"), raw.get("grid")
    if not isinstance(entries, dict):
        return raw
    values = {axis: grid[axis] for axis in _AXES if isinstance(grid, dict) and isinstance(grid.get(axis), list)}
    made = {name: _cells(name, entry, entries, values) for name, entry in entries.items()}
    changes = {cell: entries[cell] for own in made.values() for cell in own if cell in entries}
    cells: dict[str, Any] = {}
    for name, entry in entries.items():
        if name not in changes:
            cells |= made[name] or {name: entry}
    for cell, change in changes.items():
        cells[cell] = {**cells[cell], **change} if isinstance(change, dict) else change
    return {**raw, "dictionaries": {name: entry for name, entry in cells.items() if entry is not None}}


def _cells(name: str, entry: Any, entries: dict[str, Any], values: dict[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """An entry's cells by name; none where it has no axis."""
    of = entry.get("of") if isinstance(entry, dict) else None
    source = entries.get(of) if isinstance(of, str) else None
    axes = [axis for axis in _open_axes(entry if source is None else source) if values.get(axis)]
    cells = {}
    for point in product(*(values[axis] for axis in axes)) if axes else ():
        suffix = "".join(f"-{axis}{value}" for axis, value in zip(axes, point, strict=True))
        own = {_AXES[axis]: value for axis, value in zip(axes, point, strict=True)}
        cells[name + suffix] = {**entry, **(own if source is None else {"of": f"{of}{suffix}"})}
    return cells


def _open_axes(entry: Any) -> list[str]:
    """Axes of a grid that an entry has no value of its own for and must have one."""
    kind = KINDS.get(str(entry.get("kind", ""))) if isinstance(entry, dict) else None
    if kind is None:
        return []
    required = {name for name, field in kind.model_fields.items() if field.is_required()}
    return [axis for axis, key in _AXES.items() if key in required and key not in entry]


def chosen(dictionaries: Mapping[str, Method], wanted: str) -> set[str]:
    """Names of the dictionaries that ``--cells`` asks for, and of those that they take their atoms from.

    Args: wanted: ``key=value`` by comma; keys are dictionary (the name without -m and -k), m and k. Of one key several
        values may be given. What has no m of its own, such as a PCA, is in the cells of every m.
    Raises: ConfigError: a key or value that no dictionary has, or values that none has together.
    """
    cells = {name: _cell(name, dictionaries) for name in dictionaries}
    where, asked = f"--cells {wanted!r}", dict[str, set[str]]()
    for part in wanted.split(","):
        key, equals, value = (text.strip() for text in part.partition("="))
        if not equals or key not in _KEYS:
            raise ConfigError(
                f"{where}: {part.strip()!r} is not one of its keys with a value",
                limit=f"keys: {', '.join(_KEYS)}",
                cure=f"e.g. {_EXAMPLE}",
            )
        known = list(dict.fromkeys(own for cell in cells.values() if (own := cell[key]) is not None))
        if value not in known:
            near = get_close_matches(value, known, n=1)
            raise ConfigError(
                f"{where}: no dictionary of this config has {key}={value}",
                limit=f"{key}: {', '.join(known) or 'none'}",
                cure=f"did you mean {key}={near[0]}?" if near else None,
            )
        asked.setdefault(key, set()).add(value)
    names = {
        name
        for name, cell in cells.items()
        if all(cell[key] is None or cell[key] in values for key, values in asked.items())
    }
    if not names:
        raise ConfigError(f"{where}: no dictionary of this config has all of them", limit=", ".join(cells))
    return names | {source for name in names if (source := dictionaries[name].source) is not None}


def _cell(name: str, dictionaries: Mapping[str, Method]) -> dict[str, str | None]:
    """A dictionary's place by the keys of ``--cells``."""
    method = dictionaries[name]
    n_atoms = getattr(method if method.source is None else dictionaries[method.source], "n_atoms", None)
    place = {"dictionary": _SUFFIX.sub("", name) or name, "m": n_atoms, "k": method.budget}
    return {key: None if value is None else str(value) for key, value in place.items()}
