"""Kills the stages of a run at random moments, and looks whether going on ends as if nothing had been.

``python -m tests.survival.kills FOLDER KILLS SEED``: KILLS times a stage is killed (SIGKILL, with all that it started);
four such, each going on where the one before was killed, then an undisturbed one; then all that the stage wrote is
compared with what an undisturbed run of it wrote. A process of its own: each stage runs in a fork of it, which has
imported everything and computed nothing. Prints {stage: [kills, those after which all was the same]}.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

FOLDER, KILLS, SEED = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
# Read as the Hub libraries are imported.
os.environ |= {"HF_HOME": str(FOLDER / "hf-home"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_XET": "1"}
os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "KSVD_SAE_CACHE": "cache"}

import torch  # noqa: E402
from huggingface_hub import constants  # noqa: E402

from ksvd_sae.activations import harvest as _harvest  # noqa: E402, F401
from ksvd_sae.evals import panel as _panel  # noqa: E402, F401
from ksvd_sae.hub.source import open_source  # noqa: E402
from ksvd_sae.hub.upload import upload  # noqa: E402
from ksvd_sae.hub.write import write_folder  # noqa: E402
from ksvd_sae.report.compare import compare  # noqa: E402
from ksvd_sae.run.config import load_config  # noqa: E402
from ksvd_sae.run.pipeline import Run  # noqa: E402
from tests import tiny_models  # noqa: E402
from tests.command_line import EVAL_CONFIGS  # noqa: E402
from tests.hub.server import OWNER, TOKEN, Hub, served  # noqa: E402
from tests.path.conftest import CONFIG, SHRUNK  # noqa: E402

IN_A_ROW = 4
REPO = f"{OWNER}/dictionaries"
# What is not a result: when, and how long it took.
_NOT_RESULTS = {
    "seconds",
    "written",
    "commit",
    "checksum",
    "datetime_epoch_millis",
    "eval_id",
    "eval_result_unstructured",
}
CHANGES = {
    **SHRUNK,
    "harvest.train_tokens": "12000",
    "dictionaries.db-ksvd.passes": "6",
    "evaluation.processes": "1",
    "evaluation.sparse_probing_sae_probes": "null",
    "evaluation.scr": "null",
}


def run() -> Run:
    """In the working directory."""
    overrides = [f"{key}={value}" for key, value in CHANGES.items()]
    return Run(load_config(EVAL_CONFIGS / f"{CONFIG}.yaml", overrides), Path("results"))


def evaluate() -> None:
    compare_of = run()
    compare_of.evaluate()
    compare(compare_of)


def publish() -> None:
    # Of this process alone: models come from the cache.
    constants.ENDPOINT, constants.HF_HUB_OFFLINE = hub.endpoint, False
    constants.HUGGINGFACE_CO_URL_TEMPLATE = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE, os.environ["HF_TOKEN"] = str(FOLDER / "hub-cache"), TOKEN
    folder = Path("published")
    write_folder(open_source(Path("results") / CONFIG, [], "both"), REPO, folder, "mit")
    upload(folder, REPO)


STAGES: dict[str, Callable[[], Any]] = {
    "harvest": lambda: run().harvest(),
    "train": lambda: run().train(),
    "evaluate": evaluate,
    "publish": publish,
}


def begun(stage: str, place: Path) -> int:
    """A process, in a session of its own, that runs a stage."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        os.chdir(place)
        with open(place / "said", "a") as said:
            os.dup2(said.fileno(), 2)
            os.dup2(said.fileno(), 1)
        torch.set_num_threads(1)
        STAGES[stage]()
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def ended(child: int, place: Path) -> None:
    _, status = os.waitpid(child, 0)
    assert status == 0, (place / "said").read_text()[-6000:]


def killed(stage: str, place: Path, after_s: float) -> None:
    child = begun(stage, place)
    time.sleep(after_s)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)


def results(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: results(held) for key, held in value.items() if key not in _NOT_RESULTS}
    return [results(held) for held in value] if isinstance(value, list) else value


def content(place: Path, hub: Hub) -> dict[str, Any]:
    """All that is a result, by name: bytes, or values without times."""
    found: dict[str, Any] = {}
    tops = [place / "cache" / name for name in ("activations", "dictionaries", "evaluations")]
    for path in sorted(file for top in (*tops, place / "published") for file in top.rglob("*") if file.is_file()):
        # What a killed process had not finished writing has a name of its own, which nobody reads.
        if path.name.startswith("."):
            continue
        name = str(path.relative_to(place))
        if path.suffix == ".json":
            found[name] = results(json.loads(path.read_text()))
        elif path.suffix == ".jsonl" and path.parent.parent.name == "dictionaries":
            found[name] = [results(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name != "README.md":  # says how long the training took
            found[name] = path.read_bytes()
    table = place / "results" / CONFIG / "comparison.csv"
    if table.exists():
        found["comparison.csv"] = [line for line in table.read_text().splitlines() if ",training,seconds," not in line]
    if REPO in hub.repositories:
        sent = hub.files(REPO)
        found["on the Hub"] = {name: sent[name] for name in sent if name.endswith(".safetensors")}
    return found


def trials(stage: str, kills: int, before: Path, whole: Path, hub: Hub, seconds: float, draw: random.Random) -> int:
    """Kills after which all was as in ``whole``."""
    kept, survived = dict(hub.repositories), 0
    wanted = content(whole, hub)
    for first in range(0, kills, IN_A_ROW):
        place = FOLDER / "trial"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(before, place, symlinks=True)
        if stage == "publish":
            hub.repositories.clear()
            hub.large.clear()
        in_a_row = min(IN_A_ROW, kills - first)
        for _ in range(in_a_row):
            killed(stage, place, draw.uniform(0, seconds))
            if stage == "publish" and hub.repositories:
                there = hub.files(REPO)
                assert not there or set(there) == set(_sent(kept)), "half of an upload is there"
        ended(begun(stage, place), place)
        found = content(place, hub)
        different = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        if different:
            print(stage, "differs in", different, file=sys.stderr)
        survived += 0 if different else in_a_row
    hub.repositories.update(kept)
    return survived


def _sent(repositories: dict[str, Any]) -> list[str]:
    repository = repositories[REPO]
    files = repository.commits[repository.at("main") or ""]
    return [name for name in files if name != ".gitattributes"]


def main(hub: Hub) -> None:
    place, draw, counts = FOLDER / "undisturbed", random.Random(SEED), {}
    tiny_models.pythia_160m(FOLDER / "hf-home")
    tiny_models.write_text_folder(place / "text", 300)
    for number, stage in enumerate(STAGES):
        before = FOLDER / f"before-{stage}"
        shutil.copytree(place, before, symlinks=True)
        started = time.perf_counter()
        ended(begun(stage, place), place)
        seconds = time.perf_counter() - started
        kills = KILLS // len(STAGES) + (number < KILLS % len(STAGES))
        counts[stage] = [kills, trials(stage, kills, before, place, hub, seconds, draw)]
        print(f"{stage}: {seconds:.1f} s undisturbed; {counts[stage]}", file=sys.stderr)
    print(json.dumps(counts))


if __name__ == "__main__":
    with served() as hub:
        main(hub)
