"""Arguments as Python users write them: what is plain is taken, the rest refused by its name before any work.

numpy's numbers, 4.0 for 4 and arrays of one number are the numbers that they say; Python's own types come out, so that
what is stored of them is JSON.
"""

import math
import operator
import os
from collections.abc import Mapping
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ksvd_sae.errors import ConfigError, InputTypeError, ShapeError

_SCALARS = (str, int, float, bool, type(None))


def shown(value: Any) -> str:
    """A value and its type, in a line; of arrays the shape alone."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        return f"{type(value).__name__} {tuple(value.shape)}, {value.dtype}"
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def whole(value: Any, name: str, where: str) -> int:
    """A whole number.

    Raises: InputTypeError (a boolean, text, 4.5, NaN).
    """
    plain = _of_one(value)
    if not isinstance(plain, bool | np.bool_):
        if isinstance(plain, float | np.floating) and plain.is_integer():
            return int(plain)
        with suppress(TypeError):
            return operator.index(plain)
    raise InputTypeError(f"{where}: {name} must be a whole number", got=shown(value), cure=f"{name}=int(...)")


def number(value: Any, name: str, where: str, *, finite: bool = True) -> float:
    """A number.

    Args: finite: False where the caller has limits of its own to name.
    Raises: InputTypeError (a boolean, text), ShapeError (NaN or infinity).
    """
    plain = _of_one(value)
    if isinstance(plain, bool | np.bool_) or not isinstance(plain, Real):
        raise InputTypeError(f"{where}: {name} must be a number", got=shown(value), cure=f"{name}=float(...)")
    if finite and not math.isfinite(plain):
        raise ShapeError(
            f"{where}: {name} must be a finite number", got=shown(value), cure="leave it out for the default"
        )
    return float(plain)


def flag(value: Any, name: str, where: str) -> bool:
    """True or False; 1 and 0 are taken for them.

    Raises: InputTypeError.
    """
    plain = _of_one(value)
    if isinstance(plain, bool | np.bool_) or (isinstance(plain, int | np.integer) and plain in (0, 1)):
        return bool(plain)
    raise InputTypeError(f"{where}: {name} must be True or False", got=shown(value))


def path(value: Any, name: str, where: str) -> Path:
    """A path, of text or of anything that os takes for one.

    Raises: InputTypeError (bytes, numbers, files that are open, the empty text).
    """
    if isinstance(value, str | os.PathLike) and isinstance(os.fspath(value), str) and os.fspath(value):
        return Path(value)
    raise InputTypeError(f"{where}: {name} must be a path", got=shown(value), limit="text or a pathlib.Path")


def _of_one(value: Any) -> Any:
    """The number of a tensor or array without dimensions."""
    return value.item() if isinstance(value, Tensor | np.ndarray) and value.ndim == 0 else value


def dtype_name(value: Any, where: str) -> str:
    """'float32' of 'float32', torch.float32 or numpy's float32.

    Raises: ConfigError (no floating-point type of these names).
    """
    allowed = ("float32", "float64", "bfloat16", "float16")
    name = str(value).removeprefix("torch.") if isinstance(value, str | torch.dtype) else ""
    if not name:
        with suppress(TypeError):
            name = np.dtype(value).name if value is not None else ""
    if name not in allowed:
        raise ConfigError(f"{where}: no dtype for a SAE", got=shown(value), limit=", ".join(allowed))
    return name


def json_value(value: Any, name: str, where: str) -> Any:
    """A value as JSON has it: numpy's and torch's numbers and arrays as Python's, paths as text.

    Raises: InputTypeError (what JSON has no form for), ShapeError (NaN and infinity, which JSON lacks).
    """
    if isinstance(value, float | np.floating) and not math.isfinite(value):
        raise ShapeError(
            f"{where}: {name} is {float(value)}, which JSON cannot hold", cure=f"None, or the text '{float(value)}'"
        )
    if isinstance(value, _SCALARS) and not isinstance(value, np.generic):
        return value
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return json_value((value.float() if value.dtype == torch.bfloat16 else value).numpy(), name, where)
    if isinstance(value, np.ndarray | np.generic):
        plain = value.tolist()
        # What has no form in Python comes back as it went in.
        return json_value(plain if type(plain) is not type(value) else object(), name, where)
    if isinstance(value, Mapping):
        return {_json_key(key, name, where): json_value(inner, f"{name}.{key}", where) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(inner, f"{name}[{index}]", where) for index, inner in enumerate(value)]
    if isinstance(value, os.PathLike | torch.dtype | torch.device):
        return str(value)
    raise InputTypeError(
        f"{where}: {name} cannot be stored as JSON", got=shown(value), limit="text, numbers, None, lists, dicts"
    )


def _json_key(key: Any, name: str, where: str) -> str:
    if isinstance(key, str):
        return str(key)
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        return str(int(key))
    raise InputTypeError(f"{where}: a key of {name} is not text", got=shown(key))
