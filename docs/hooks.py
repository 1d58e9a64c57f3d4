"""What the site has beside the text of its pages: commands, keys of a config, and the files that pages link to.

A comment in a page marks where each goes. Links to files of the repository (``../results/...``) work where the
repository is read; the site gets a copy of each such file.
"""

import inspect
import os
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from html import escape
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ksvd_sae.run.config import ImageRunConfig, TextRunConfig

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"(?<=\]\()([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the repository's files that pages link to."""
    linked = {path for page in files.documentation_pages() for path in _outside(page)}
    for path in sorted(linked):
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Fill in what is made from the code; point links to the repository's files at their copies."""
    if page.file.src_uri.startswith("results/"):
        # Tables of numbers are no help in a search.
        page.meta["search"] = {"exclude": True}
        return markdown
    for mark, made in (("<!-- commands -->", commands), ("<!-- keys -->", config_keys)):
        if mark in markdown:
            markdown = markdown.replace(mark, made())

    def moved(link: re.Match[str]) -> str:
        path = _in_repository(page.file, link[0])
        return link[0] if path is None else os.path.relpath(path, os.path.dirname(page.file.src_uri) or ".")

    return _LINK.sub(moved, markdown)


def _outside(page: File) -> Iterator[str]:
    for link in _LINK.findall(page.content_string):
        path = _in_repository(page, link)
        if path is not None:
            yield path


def _in_repository(page: File, link: str) -> str | None:
    """The path from the repository's top if a page's link leads out of docs/ to a file that is there."""
    path = os.path.normpath(os.path.join("docs", os.path.dirname(page.src_uri), link))
    return path if not path.startswith(("docs/", "../")) and (ROOT / path).is_file() else None


def commands() -> str:
    """Every command of ksvd-sae with its options."""
    command = [sys.executable, "-m", "typer", "ksvd_sae.cli", "utils", "docs", "--name", "ksvd-sae"]
    text = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    # What stands before the first command lists them again, cut short.
    text = text[text.index("\n## ") :]
    return re.sub(r"^Example: (.*)$", r"Example: `\1`", text, flags=re.MULTILINE)


def config_keys() -> str:
    """Every key that a run's YAML may have, a table for each mapping in it."""
    out = []
    kinds_begun = False
    seen = set[type]()
    for path, model in [pair for run in (TextRunConfig, ImageRunConfig) for pair in _mappings(run, seen=seen)]:
        kind = _kind(model)
        if kind is not None and not kinds_begun:
            out += ["## `dictionaries`", "A mapping of names to dictionaries, each of one of these kinds."]
            kinds_begun = True
        whole = "A run on text" if model is TextRunConfig else "A run on images"
        title = f"`kind: {kind}`" if kind else f"`{path}`" if path else whole
        out += [f"{'###' if kind or '.' in path else '##'} {title} {{#{_anchor(model)}}}", inspect.getdoc(model) or ""]
        fields = {name: field for name, field in model.model_fields.items() if name != "kind" or kind is None}
        rows = [
            f"| `{name}` | {_type(f.annotation)} | {_default(f)} | {escape(f.description or '')} |"
            for name, f in fields.items()
        ]
        if rows:
            out.append("\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows]))
    return "\n\n".join(out) + "\n"


def _mappings(
    model: type[BaseModel], path: str = "", seen: set[type] | None = None
) -> Iterator[tuple[str, type[BaseModel]]]:
    """A model and those in its fields, each once, with the key that it stands at."""
    seen = set() if seen is None else seen
    if model in seen:
        return
    seen.add(model)
    yield path, model
    for name, field in model.model_fields.items():
        inside = f"{path}.{name}".lstrip(".") + (".NAME" if typing.get_origin(field.annotation) is dict else "")
        for part in _parts(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _mappings(part, inside, seen)


def _parts(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is put together from."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        yield from _parts(arguments[0])
    elif arguments and typing.get_origin(annotation) is not typing.Literal:
        for argument in arguments:
            yield from _parts(argument)
    else:
        yield annotation


def _kind(model: type[BaseModel]) -> str | None:
    """What ``kind`` must be for a mapping of this sort."""
    field = model.model_fields.get("kind")
    kinds = typing.get_args(field.annotation) if field is not None else ()
    return kinds[0] if len(kinds) == 1 else None


def _anchor(model: type[BaseModel]) -> str:
    return model.__name__.lower()


def _type(annotation: Any) -> str:
    arguments, origin = typing.get_args(annotation), typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, UnionType):
        models = [a for a in arguments if isinstance(a, type) and issubclass(a, BaseModel)]
        if len(models) > 2:
            return "a mapping with one of the kinds below"
        return " or ".join(_type(argument) for argument in arguments)
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"name: {_type(arguments[1])}"
    if annotation is NoneType:
        return "`null`"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[mapping](#{_anchor(annotation)})"
    return getattr(annotation, "__name__", str(annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "with its defaults"
    return "`" + yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip() + "`"
