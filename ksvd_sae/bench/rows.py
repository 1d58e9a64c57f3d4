"""A row of results: what ran, on what, how long it took and the error it reached. One JSON object a line.

Fields of every row (what does not apply is null; NaN is no JSON):

=================  ================================================================================================
suite, case        which benchmark, on which problem
impl, config       whose code, and which of its methods ('mp', 'omp', 'sweep', 'aksvd', …)
backend, dtype     what it computes with, and in what
device, cpu        'cpu' or the GPU's name; the processor's name
threads            most threads that it was allowed
n, d, m, k         samples of one timed call, dimensions, atoms, most atoms a sample
case_n             samples of the case; more than n where a slow implementation was timed on fewer
scaled_from        n if it is below case_n: samples_per_s, and seconds a table shows for the case, are scaled from n
data, dictionary   where the samples and the atoms come from
median_s           seconds of one call: median over ``repeats``, with 20 % and 80 % quantiles in q20_s and q80_s
samples_per_s      n / median_s
fvu                Σ‖y − ŷ‖² / Σ‖y − ȳ‖² in float64, on the n samples (held-out ones in suite 'train')
peak_mib           memory that a call needs on top of what was there, see memory.py
floor_s            the least time for n samples at the rates measured in the same run, see ceilings.py
seed, warmups,     of the data; calls before the first timed one; timed calls
repeats
tf32               whether float32 products may use TF32 (CUDA only)
note               what a reader must know to compare the row
commit, versions,  of this package; of what the row ran on; when
written
=================  ================================================================================================

Suites add fields of their own. Needs no more than learning/ does, as gpu.py.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ksvd_sae.device import cpu_name
from ksvd_sae.errors import ManifestError
from ksvd_sae.store import commit, versions

OURS = "ksvd_sae"
_COMPUTED_WITH = ("numba", "scipy", "triton")


@dataclass(frozen=True)
class Who:
    """Whose code a row is about.

    Attributes:
        impl: 'ksvd_sae' or the peer's name.
        config: which of its methods.
        backend: 'numba', 'torch', 'C++', 'numpy', …
        dtype: what it computes in.
        device: where it runs.
        packages: distributions whose versions belong in the row.
        note: what a reader must know to compare it.
    """

    impl: str
    config: str
    backend: str
    dtype: str = "float32"
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    packages: tuple[str, ...] = ()
    note: str | None = None

    def __str__(self) -> str:
        return f"{self.impl} {self.config} ({self.backend}, {self.dtype})"


def row(
    suite: str,
    case: str,
    who: Who,
    *,
    n: int,
    d: int,
    m: int,
    k: int,
    seconds: Sequence[float],
    warmups: int,
    seed: int,
    fvu: float | None,
    peak_mib: float | None,
    floor_s: float | None,
    **facts: Any,
) -> dict[str, Any]:
    """A whole row; ``facts`` are the fields that only some suites have, and win over the defaults."""
    cuda = who.device.type == "cuda"
    median_s = float(np.median(seconds))
    fields = {
        "suite": suite,
        "case": case,
        "impl": who.impl,
        "config": who.config,
        "backend": who.backend,
        "dtype": who.dtype,
        "device": torch.cuda.get_device_name(who.device) if cuda else "cpu",
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "n": n,
        "d": d,
        "m": m,
        "k": k,
        "case_n": n,
        "scaled_from": None,
        "data": "planted",
        "dictionary": None,
        "median_s": median_s,
        "q20_s": float(np.quantile(seconds, 0.2)),
        "q80_s": float(np.quantile(seconds, 0.8)),
        "samples_per_s": n / median_s,
        "fvu": fvu,
        "peak_mib": peak_mib,
        "floor_s": floor_s,
        "seed": seed,
        "warmups": warmups,
        "repeats": len(seconds),
        "tf32": torch.get_float32_matmul_precision() != "highest" if cuda else None,
        "note": who.note,
        "commit": commit(),
        "versions": versions() | _versions_of((*_COMPUTED_WITH, *who.packages)),
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **facts,
    }
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in fields.items()
    }


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to the end of a JSONL file, whose folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(fields, allow_nan=False) + "\n" for fields in rows)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file.

    Raises: ManifestError if a line is no JSON object.
    """
    found = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ManifestError(
                f"reading {path}, line {number}: not JSON ({error})",
                cause="the file was altered, or a run was killed while it wrote",
                cure="delete that line",
            ) from error
        if not isinstance(fields, dict):
            raise ManifestError(f"reading {path}, line {number}: not a row", got=line[:80], cure="delete that line")
        found.append(fields)
    return found


@lru_cache
def _versions_of(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
