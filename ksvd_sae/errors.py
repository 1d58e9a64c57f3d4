"""Every error this package raises on purpose.

::

    KsvdSaeError
    ├── ConfigError            a YAML file or a --set value
    ├── ShapeError             sizes that do not fit each other (also a ValueError)
    │   └── InputTypeError     a value of a type that is not taken (also a TypeError)
    ├── DictionaryError        atoms that are no dictionary (not unit norm, NaN), or lack a view (also a ValueError)
    ├── WeightingError         second moments that give no invertible map (also a ValueError)
    ├── NotFittedError         encode before fit (also a ValueError, and an AttributeError as in scikit-learn)
    ├── TextError              text that is missing, empty or too short
    ├── ImageError             images that are missing, broken or too few
    ├── HookError              a hook name that the model lacks
    ├── ActivationError        NaN, infinite or drifting activations
    │   └── ConstantSamplesError   samples that are all the same
    ├── ShardError             a shard that is missing, truncated or altered
    ├── ManifestError          a folder made by another config, or no folder of ours
    ├── ResultsError           a run's raw.zip that is missing, damaged or not ours, or has no place to go
    ├── DiskSpaceError         too little room for what is about to be written
    ├── MemorySpaceError       too little memory for what is planned
    ├── HubError               the Hub cannot be reached, or lacks what was asked for
    ├── ProcessError           several processes of one run, of which one is gone
    ├── MissingExtraError      an optional dependency that is not installed (also an ImportError)
    ├── UpstreamError          a library that is not what this package replaces parts of
    └── EvaluationError        an eval that gave no score

Each message names the operation and what went wrong in its first line, and, where they are
known, the value received, the limit, the likely cause and the cure in the lines below it.
"""

from functools import partial
from typing import Any


class KsvdSaeError(Exception):
    """Base of all errors of this package.

    Args:
        what: the operation and what went wrong, in one line.
        got: the value received (with its shape, if it has one).
        limit: what was allowed.
        cause: the likely cause.
        cure: what to do.
    """

    def __init__(
        self,
        what: str,
        *,
        got: Any = None,
        limit: Any = None,
        cause: str | None = None,
        cure: str | None = None,
    ):
        self.what, self.got, self.limit, self.cause, self.cure = what, got, limit, cause, cure
        rows = [("got", got), ("limit", limit), ("likely cause", cause), ("cure", cure)]
        super().__init__("\n".join([what, *(f"  {name}: {value}" for name, value in rows if value is not None)]))

    def __reduce__(self) -> Any:
        """Errors of other processes arrive whole."""
        return partial(type(self), self.what, got=self.got, limit=self.limit, cause=self.cause, cure=self.cure), ()


class ConfigError(KsvdSaeError): ...


class ShapeError(KsvdSaeError, ValueError): ...


class InputTypeError(ShapeError, TypeError): ...


class DictionaryError(KsvdSaeError, ValueError): ...


class WeightingError(KsvdSaeError, ValueError): ...


class NotFittedError(KsvdSaeError, ValueError, AttributeError): ...


class TextError(KsvdSaeError): ...


class ImageError(KsvdSaeError): ...


class HookError(KsvdSaeError): ...


class ActivationError(KsvdSaeError, ValueError): ...


class ConstantSamplesError(ActivationError): ...


class ShardError(KsvdSaeError): ...


class ManifestError(KsvdSaeError): ...


class ResultsError(KsvdSaeError): ...


class DiskSpaceError(KsvdSaeError): ...


class MemorySpaceError(KsvdSaeError): ...


class HubError(KsvdSaeError): ...


class ProcessError(KsvdSaeError): ...


class MissingExtraError(KsvdSaeError, ImportError): ...


class UpstreamError(KsvdSaeError): ...


class EvaluationError(KsvdSaeError): ...
