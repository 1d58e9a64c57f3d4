"""Makes SAELens know our architectures, ``db_ksvd`` and ``topk_weighted``, without importing SAELens.

SAELens finds SAE classes in a registry that is filled by importing the class. Importing
sae_lens takes seconds, so ``import ksvd_sae`` must not; yet a user who writes
``import ksvd_sae; SAE.load_from_disk(...)`` expects it to work. So ``import ksvd_sae`` leaves a
hook that imports the modules that register them right after ``sae_lens`` has been imported, or does
so at once if sae_lens is already there. Should ours fail, sae_lens is imported all the same, and the log says why it
does not know our architectures.
"""

import importlib.abc
import importlib.machinery
import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)
_REGISTERING = ("ksvd_sae.sae", "ksvd_sae.methods.sae.raw_units")


class _AfterSaeLens(importlib.abc.MetaPathFinder):
    """Finds sae_lens as usual, and wraps its loader so that our classes are registered after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "sae_lens":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, self)
        return spec


class _RegisteringLoader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader, finder: _AfterSaeLens):
        self._inner, self._finder = inner, finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _register()

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)


def _register() -> None:
    for module in _REGISTERING:
        try:
            import_module(module)
        except Exception as error:
            # Whoever imports sae_lens may want nothing of ours.
            what = f"{module} cannot be imported, so that SAELens does not know its SAEs"
            logger.warning("ksvd_sae: %s (%s: %s)", what, type(error).__name__, error)


def register_sae(sae_class: type[Any], config_class: type[Any], *architectures: str) -> None:
    """Tell SAELens that SAEs of these names are of this class; told again, by a module that is reloaded, of the newest.

    SAELens refuses a name that it knows, and has no way to forget one.
    """
    from sae_lens import registry

    for architecture in architectures:
        registry.SAE_CLASS_REGISTRY.pop(architecture, None)
        registry.register_sae_class(architecture, sae_class, config_class)


def register_when_sae_lens_loads() -> None:
    """Register our architectures now if sae_lens is loaded, else as soon as it is."""
    if "sae_lens" in sys.modules:
        # sae_lens is still being imported when it lacks its last name: then our hook did it.
        if hasattr(sys.modules["sae_lens"], "SAE"):
            _register()
    elif not any(isinstance(finder, _AfterSaeLens) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterSaeLens())
