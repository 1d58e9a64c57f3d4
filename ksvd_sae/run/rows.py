"""Rows of measurements on disk, one a line of JSON: what has a row is not measured again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ksvd_sae.errors import ManifestError
from ksvd_sae.store import commit


class Rows:
    """The rows of a file, by their ``key``: a hash of all that a row's numbers follow from.

    Of several rows of a key the last counts. A row says which commit measured it.
    """

    def __init__(self, path: Path):
        self.path = path

    def all(self) -> dict[str, dict[str, Any]]:
        """Key -> row, in the order in which they were measured.

        Raises: ManifestError for a line that is no row.
        """
        if not self.path.exists():
            return {}
        rows: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(self.path.read_text().splitlines(), start=1):
            try:
                row = json.loads(line)
                rows[row["key"]] = row
            except (ValueError, KeyError, TypeError) as error:
                raise ManifestError(
                    f"reading {self.path}: line {number} is no row",
                    cause="a write that was cut off",
                    cure="delete that line",
                ) from error
        return rows

    def append(self, key: str, row: Mapping[str, Any]) -> None:
        """Values that are no finite number become null."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        plain = {name: None if isinstance(v, float) and v - v != 0 else v for name, v in row.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key, **plain, "commit": commit()}) + "\n")
