"""What a published folder looks like, on disk and on the Hub, and the manifest that every file is checked against.

::

    README.md                          the model card
    manifest.json                      SHA-256 of every other file
    HOOK/NAME/VIEW/                    an SAE; this path is its sae_id
        cfg.json, sae_weights.safetensors      as SAELens has them
        dictionary.json, atoms.safetensors     the dictionary that it was made from, bit for bit
        neuronpedia/batch-0.json               atoms in context, as Neuronpedia takes them
    results/RUN/                       scores, plots, SAEBench's results

The manifest tells damaged and mixed-up files, not forged ones: whoever can write a file can write the manifest. What
comes from a repository is therefore data only, read as JSON and safetensors and checked before it is used.
"""

import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ksvd_sae.dictionary import ATOMS_FILE, CONFIG_FILE
from ksvd_sae.errors import ConfigError, ManifestError
from ksvd_sae.store import MANIFEST, content_hash, file_sha256, write_json
from ksvd_sae.strict import Strict

CARD = "README.md"
RESULTS = "results"
SAE_FILES = ("cfg.json", "sae_weights.safetensors")
DICTIONARY_FILES = (CONFIG_FILE, ATOMS_FILE)
# Far above what publishing writes.
_MAX_JSON_BYTES = 16 << 20
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


class Manifest(Strict):
    """What a published folder holds.

    saes: sae_id -> hash of what it is, whatever version wrote it: of its dictionary, else of its weights.
    files: path -> SHA-256, of all but the manifest itself.
    """

    format: Literal[1] = 1
    saes: dict[str, str]
    files: dict[str, str]

    @classmethod
    def of(cls, folder: Path, sae_ids: list[str]) -> "Manifest":
        """Of the files that lie in a folder."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): file_sha256(path) for path in paths}
        files.pop(MANIFEST, None)
        saes = {}
        for one in sae_ids:
            held = [files.get(f"{one}/{name}") for name in DICTIONARY_FILES]
            saes[one] = content_hash(held if all(held) else files[f"{one}/{SAE_FILES[1]}"])
        return cls(saes=saes, files=files)

    @classmethod
    def read(cls, path: Path, what: str) -> "Manifest":
        """Raises: ManifestError: no such file, or none that this version has written."""
        raw = read_json(path, what)
        try:
            manifest = cls.model_validate(raw)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            raise ManifestError(
                f"{what}: {path.name} is none that `ksvd-sae publish` wrote",
                got=f"{'.'.join(map(str, problem['loc'])) or 'the file'}: {problem['msg']}",
                cause="another program's file, or a newer ksvd-sae's",
                cure="look at the folder's README.md; upgrade ksvd-sae",
            ) from error
        for name in manifest.files:
            check_name(name, what)
        return manifest

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST, self.model_dump())

    def check(self, name: str, sha256: str, what: str, cure: str) -> None:
        """Raise ManifestError unless the file of that name has that hash."""
        if self.files.get(name) != sha256:
            raise ManifestError(
                f"{what}: {name} is not the file that was published",
                got=f"SHA-256 {sha256}",
                limit=f"{self.files.get(name, 'none')} ({MANIFEST})",
                cause="a broken download or copy, or a file that was changed after it was published",
                cure=cure,
            )


def check_name(name: str, what: str) -> None:
    """Raise ConfigError for an sae_id or a file's name that is no plain path below a folder."""
    if not all(_PART.fullmatch(part) for part in name.split("/")):
        raise ConfigError(
            f"{what}: {name!r} is no name in a published folder",
            limit="parts of letters, digits, '.', '_' and '-', parted by '/', none beginning with a '.'",
            cause="a path that would lead elsewhere" if ".." in name or name.startswith(("/", "~")) else None,
            cure="take one of README.md's names",
        )


def check_repository(repo_id: str, what: str) -> None:
    """Raise ConfigError unless this is owner/name."""
    if not _REPOSITORY.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id:
        raise ConfigError(f"{what}: {repo_id!r} is no name of a repository on the Hub", limit="owner/name")


def place(folder: Path, name: str, what: str) -> Path:
    """Where a file lies in a local folder.

    Raises: ConfigError (see ``check_name``), ManifestError (missing; a link that leads out of the folder).
    """
    check_name(name, what)
    path = folder / name
    if not path.is_file():
        raise ManifestError(
            f"{what}: no {name} in {folder}",
            cause="not a folder that `ksvd-sae publish` wrote, or one that was not copied whole",
            cure="publish again, or copy the whole folder",
        )
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ManifestError(
            f"{what}: {name} is a link that leads out of {folder}", got=path.resolve(), cure="copy the file itself"
        )
    return path


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file of modest size, without NaN.

    Raises: ManifestError.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ManifestError(
                f"{what}: {path.name} is too large", got=f"{path.stat().st_size:,} bytes", limit=f"{_MAX_JSON_BYTES:,}"
            )
        value = json.loads(path.read_bytes(), parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{what}: reading {path}: {type(error).__name__}: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise ManifestError(f"{what}: {path.name} holds no JSON object", got=type(value).__name__)
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
