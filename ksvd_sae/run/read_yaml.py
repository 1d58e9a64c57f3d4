"""YAML as people write it: what they would not notice is an error, and numbers are numbers.

PyYAML takes the last of two equal keys in silence, reads 2e6 as text, and turns keys such as no and on into booleans.
"""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from ksvd_sae.errors import ConfigError

# YAML 1.2's floats: an exponent needs neither a dot nor a sign.
_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without its surprises.

    Args: where: said in errors.
    """

    def __init__(self, text: str, where: str):
        super().__init__(text)
        self.where = where

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, yaml.Mark] = {}
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise ConfigError(
                    f"{self.where}: line {line}: the key {key_node.value} is read as {key!r}, not as text",
                    cause="yes, no, on, off and numbers are no text",
                    cure="put it into quotes",
                )
            if key in seen:
                raise ConfigError(
                    f"{self.where}: the key {key!r} is there twice",
                    got=f"lines {seen[key].line + 1} and {line}",
                    cause="the second would replace the first without a word",
                    cure="take one of them out",
                )
            seen[key] = key_node.start_mark
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """One YAML document, of plain values only.

    Raises: yaml.YAMLError; ConfigError for a key that is there twice or is no text.
    """
    loader = _Loader(text, where)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """A file that maps keys to values.

    Args: what: is read, for the errors: 'config', 'study', 'curves'.
    Raises: ConfigError: no YAML, or no mapping.
    """
    where = f"reading {what} {path}"
    try:
        raw = parse_yaml(path.read_text(), where)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: not YAML ({error})", cure="eval_configs/ has examples") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: not a mapping of keys to values", got=type(raw).__name__)
    return raw
