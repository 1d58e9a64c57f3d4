"""The package's docstrings as mkdocstrings reads them: sections by themselves, a row for each name.

The code writes "Raises: ShapeError, DictionaryError." in one line, and "rtol, max_steps: see ..." for two parameters;
Google's format, which is parsed into tables, knows neither.
"""

import re
from typing import Any

import griffe

_LABEL = "Args|Attributes|Returns|Raises|Source|Numerics|Cost"
# "Args:", "Returns: a Code", "Returns, Raises: as ...", "Attributes after fitting: ..."
_SECTION = re.compile(rf"((?:{_LABEL})(?:, (?:{_LABEL}))*(?: [a-z ]+)?):(?:\s+(\S.*))?")
_ENTRY = re.compile(r" {4}(\w[\w, ]*):(?:\s+(.*))?")


class Sections(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)


def rewritten(text: str) -> str:
    """A section that begins in its label's line becomes a paragraph, one that is a block of names a table."""
    lines, out = text.splitlines(), []
    while lines:
        line = lines.pop(0)
        section = _SECTION.fullmatch(line)
        if line.startswith(">>> "):
            out += ["```python", *_statements([line, *_taken(lines, (">>> ", "... "))]), "```"]
        elif section is None:
            # "::" announces a literal block, which Markdown knows by its indentation.
            out.append("" if line == "::" else line)
        elif section[2]:
            out += ["", f"**{section[1]}:** {section[2]}"]
        else:
            out += ["", *_table(section[1], _taken(lines, ("    ",))), ""]
    return "\n".join(out)


def _taken(lines: list[str], starts: tuple[str, ...]) -> list[str]:
    """The first lines that start so, taken away from ``lines``."""
    taken = []
    while lines and lines[0].startswith(starts):
        taken.append(lines.pop(0))
    return taken


def _statements(lines: list[str]) -> list[str]:
    return [re.sub(r"\s*# doctest:.*", "", line[4:]) for line in lines]


def _table(label: str, block: list[str]) -> list[str]:
    """A row for each name; what names nothing ("All else, Returns: as ...") is a paragraph after them."""
    entries: list[tuple[str, list[str]]] = []
    for line in block:
        entry = _ENTRY.fullmatch(line)
        if entry is not None:
            entries.append((entry[1], [entry[2] or ""]))
        elif entries:
            entries[-1][1].append(line)
    rows, after = [f"{label}:"], [""]
    for names, (first, *rest) in entries:
        split = names.split(", ")
        if all(name.isidentifier() for name in split):
            rows += [line for name in split for line in (f"    {name}: {first}", *rest)]
        else:
            after += [f"**{names}:** {first}", *(line.strip() for line in rest)]
    return [*rows, *after]
