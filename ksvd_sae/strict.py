"""The base of every typed section of a config."""

from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator


class Strict(BaseModel):
    """Unknown keys are errors, values do not change, true and false are no numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _no_booleans_as_numbers(cls, raw: Any) -> Any:
        """pydantic takes true for 1, and in YAML yes and on are true."""
        if isinstance(raw, dict):
            for name in raw.keys() & cls.model_fields.keys():
                takes = cls.model_fields[name].annotation
                if _is_boolean(raw[name]) and _takes(takes, int, float) and not _takes(takes, bool):
                    raise ValueError(f"{name}: {raw[name]} is no number (yes, no, on and off are read as booleans)")
        return raw


def _is_boolean(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list) and any(map(_is_boolean, value)))


def _takes(annotation: Any, *types: type) -> bool:
    """Whether one of the types is what a value, or an entry of a list, may be."""
    if get_origin(annotation) in (Union, UnionType, Annotated, list, tuple):
        return any(_takes(part, *types) for part in get_args(annotation))
    return annotation in types
