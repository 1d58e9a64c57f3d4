"""The ``ksvd-sae`` command in a process of its own: the Hub libraries read where their cache is at their import."""

import os
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
EVAL_CONFIGS = REPOSITORY / "eval_configs"
# What would send the Hub libraries, or us, to another cache than the test's.
_PLACES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_DATASETS_CACHE", "HF_ASSETS_CACHE")


def environment(*, hf_home: Path, cache: Path | None, threads: int = 1) -> dict[str, str]:
    """Of this process, but offline, with the given caches (``cache`` None: the user's own, as for the demo).

    One thread: for matrices as small as here, threads that wait for each other take most of the time.
    """
    found = {name: value for name, value in os.environ.items() if name not in _PLACES}
    found |= {"HF_HOME": str(hf_home), "HF_HUB_OFFLINE": "1"}
    if cache is not None:
        found["KSVD_SAE_CACHE"] = str(cache)
    found |= dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
    # rich breaks lines at the terminal's width, which is 80 where there is none.
    return {**found, "COLUMNS": "1000"}


def ksvd_sae(
    *arguments: str, folder: Path, hf_home: Path, cache: Path | None, threads: int = 1
) -> subprocess.CompletedProcess[str]:
    """Run ``ksvd-sae`` in ``folder``; its exit code is the caller's to check."""
    return subprocess.run(
        [str(Path(sys.executable).with_name("ksvd-sae")), *arguments],
        cwd=folder,
        env=environment(hf_home=hf_home, cache=cache, threads=threads),
        capture_output=True,
        text=True,
        check=False,
    )


def set_options(values: dict[str, str]) -> list[str]:
    """``--set key=value`` for each."""
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])
