"""Stops the stages of a run at random moments, and looks whether going on ends as if nothing had been.

``python -m tests.survival.kills FOLDER WAY TIMES STAGE ...``: each of the stages is stopped TIMES times, by SIGKILL of
all that it started, by SIGINT to all of it, as a terminal sends it, or by SIGTERM; up to four times in a row, each time
going on where it was stopped before, then it is left to end; then all that the stage wrote is compared with what an
undisturbed run of it wrote. What ended before it was stopped does not count, nor what was stopped before the command
began. With TWICE for WAY nothing is stopped: two processes run the stage at once. With SO_FAR a harvest is killed, or
stands still with its lock in hand, while what it has is trained on; then it goes on to its end and is trained on: all
must be as if each had been run by itself.

A process of its own: each stage is the command, in a fork of it, which has imported everything and computed nothing.
Prints {stage: [times, those after which all was the same]}.
"""

import gc
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

FOLDER, TIMES, STOPPED = Path(sys.argv[1]), int(sys.argv[3]), sys.argv[4:]
SO_FAR = sys.argv[2] == "SO_FAR"
WAY = None if SO_FAR or sys.argv[2] == "TWICE" else signal.Signals[sys.argv[2]]
# Read as the Hub libraries are imported.
os.environ |= {"HF_HOME": str(FOLDER / "hf-home"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_XET": "1"}
os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "KSVD_SAE_CACHE": "cache"}

import sae_bench.evals.core.main  # noqa: E402
import sae_bench.evals.sparse_probing.main  # noqa: E402, F401
import torch  # noqa: E402
from huggingface_hub import constants  # noqa: E402
from tqdm import tqdm  # noqa: E402

from ksvd_sae import cli  # noqa: E402
from ksvd_sae.activations import harvest as _harvest  # noqa: E402, F401
from ksvd_sae.evals import panel as _panel  # noqa: E402, F401
from ksvd_sae.hub import source as _source  # noqa: E402, F401
from ksvd_sae.learning.kernels import pursuit_numba as _pursuit_numba  # noqa: E402, F401
from ksvd_sae.methods.sae import sparse_steps_numba as _sparse_steps_numba  # noqa: E402, F401
from ksvd_sae.report import compare as _compare  # noqa: E402, F401
from ksvd_sae.run import pipeline as _pipeline  # noqa: E402, F401
from tests import tiny_models  # noqa: E402
from tests.hub.server import OWNER, TOKEN, Hub, served  # noqa: E402
from tests.survival.tiny_run import NAME, write_place  # noqa: E402

IN_A_ROW = 4
# On a machine that has other things to do.
SOON_S = 30
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


def on_our_hub() -> None:
    # Of this process alone: models come from the cache.
    constants.ENDPOINT, constants.HF_HUB_OFFLINE = hub.endpoint, False
    constants.HUGGINGFACE_CO_URL_TEMPLATE = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE, os.environ["HF_TOKEN"] = str(FOLDER / "hub-cache"), TOKEN


STAGES = {stage: [stage, f"{NAME}.yaml"] for stage in ("harvest", "train", "evaluate", "compare")}
_PUBLISH = ["publish", f"results/{NAME}", REPO, "--view", "both", "--license", "mit", "--folder", "published"]
STAGES["publish"] = [*_PUBLISH, "--upload"]


def begun(stage: str, place: Path, *options: str) -> int:
    """A process, in a session of its own, that runs a stage."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        # A job in the background of a shell ignores it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(place)
        with open(place / "said", "a") as said:
            os.dup2(said.fileno(), 2)
            os.dup2(said.fileno(), 1)
        torch.set_num_threads(1)
        if stage == "publish":
            on_our_hub()
        cli.app([*STAGES[stage], *options])
    except SystemExit as ended:
        code = int(ended.code or 0)
    except KeyboardInterrupt:
        # Before the command's own.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int, place: Path) -> None:
    _, status = os.waitpid(child, 0)
    assert status == 0, (place / "said").read_text()[-6000:]


def twice(stage: str, place: Path) -> None:
    for child in [begun(stage, place) for _ in range(2)]:
        ended(child, place)


def stopped(stage: str, place: Path, after_s: float) -> bool:
    """Whether the signal came between the command's beginning and its end."""
    assert WAY is not None
    child = begun(stage, place)
    time.sleep(after_s)
    with suppress(ProcessLookupError):
        os.kill(child, WAY) if WAY == signal.SIGTERM else os.killpg(child, WAY)
    sent = time.perf_counter()
    _, status = os.waitpid(child, 0)
    took_s, said = time.perf_counter() - sent, (place / "said").read_text()
    if os.WIFSIGNALED(status):
        return WAY == signal.SIGKILL
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 128 + WAY), said[-6000:]
    assert took_s < SOON_S, f"{took_s:.0f} s: {said[-6000:]}"
    assert code == 0 or "run the same command again" in said[said.rindex("stopped") :], said[-6000:]
    return code != 0


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
    table = place / "results" / NAME / "comparison.csv"
    if table.exists():
        found["comparison.csv"] = [line for line in table.read_text().splitlines() if ",training,seconds," not in line]
    if REPO in hub.repositories:
        sent = hub.files(REPO)
        found["on the Hub"] = {name: sent[name] for name in sent if name.endswith(".safetensors")}
    return found


def different(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


def trials(stage: str, before: Path, whole: Path, hub: Hub, seconds: float) -> int:
    """Times after which all was as in ``whole``."""
    kept, tried, survived, draw = dict(hub.repositories), 0, 0, random.Random(f"{WAY} {stage}")
    wanted = content(whole, hub)
    while tried < TIMES:
        place = FOLDER / "trial"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(before, place, symlinks=True)
        if stage == "publish":
            hub.repositories.clear()
            hub.large.clear()
        in_a_row = 0
        while WAY is not None and in_a_row < min(IN_A_ROW, TIMES - tried):
            after_s = draw.uniform(0, seconds)
            if not stopped(stage, place, after_s):
                # The undisturbed run took longer: it was the first, and compiled what is kept from then on.
                seconds = after_s if in_a_row == 0 else seconds
                break
            in_a_row += 1
            if stage == "publish" and hub.repositories:
                there = hub.files(REPO)
                assert not there or set(there) == set(_sent(kept)), "half of an upload is there"
        if WAY is None:
            twice(stage, place)
            in_a_row = 1
        else:
            ended(begun(stage, place), place)
        if differs := different(content(place, hub), wanted):
            print(stage, "differs in", differs, "of", place.rename(FOLDER / f"{stage}-{tried}"), file=sys.stderr)
        tried, survived = tried + in_a_row, survived + (0 if differs else in_a_row)
    hub.repositories.update(kept)
    return survived


def trials_so_far(before: Path, hub: Hub) -> int:
    """Times after which all was as by runs of their own: of what the harvest had, and of all that it was to have."""
    survived, draw = 0, random.Random("so far")
    for tried in range(TIMES):
        place, alone = (FOLDER / f"{name}-{tried}" for name in ("so-far", "alone"))
        for folder in (place, alone):
            shutil.copytree(before, folder, symlinks=True)
        killed, last = tried % 2 == 1, f"raw/train-{draw.randint(0, 3):05d}.json"
        child = begun("harvest", place)
        while not list((place / "cache").glob(f"activations/*/{last}")):
            assert os.waitpid(child, os.WNOHANG) == (0, 0), (place / "said").read_text()[-6000:]
            time.sleep(0.001)
        os.killpg(child, signal.SIGKILL if killed else signal.SIGSTOP)
        if killed:
            os.waitpid(child, 0)
        there = [json.loads(path.read_text()) for path in place.glob("cache/activations/*/raw/train-*.json")]
        ended(begun("train", place, "--so-far"), place)
        if killed:
            child = begun("harvest", place)
        else:
            os.killpg(child, signal.SIGCONT)
        ended(child, place)
        ended(begun("train", place), place)
        fewer = f"harvest.train_tokens={sum(entry['n_samples'] for entry in there)}"
        for options in ([], ["--set", fewer]):
            for stage in ("harvest", "train"):
                ended(begun(stage, alone, *options), alone)
        if differs := different(content(place, hub), content(alone, hub)):
            print(fewer, "differs in", differs, "of", place, file=sys.stderr)
        survived += not differs
    return survived


def _sent(repositories: dict[str, Any]) -> list[str]:
    repository = repositories[REPO]
    files = repository.commits[repository.at("main") or ""]
    return [name for name in files if name != ".gitattributes"]


def main(hub: Hub) -> None:
    place, counts = FOLDER / "undisturbed", {}
    # Its own lock is shared by all forks: who is stopped with it in hand leaves those after it waiting for ever.
    tqdm.set_lock(threading.RLock())
    # TransformerLens takes seconds to load ten blocks: its time goes with their number's square.
    tiny_models.pythia_160m(FOLDER / "hf-home", n_layers=4)
    write_place(place)
    # SAEBench collects garbage after every SAE: most of a second for all that is imported here.
    gc.freeze()
    for stage in STAGES:
        if len(counts) == len(STOPPED):
            break
        before = FOLDER / f"before-{stage}"
        shutil.copytree(place, before, symlinks=True)
        started = time.perf_counter()
        ended(begun(stage, place), place)
        seconds = time.perf_counter() - started
        if stage in STOPPED:
            survived = trials_so_far(before, hub) if SO_FAR else trials(stage, before, place, hub, seconds)
            counts[stage] = [TIMES, survived]
            print(f"{stage}: {seconds:.1f} s undisturbed; {counts[stage]}", file=sys.stderr)
    print(json.dumps(counts))


if __name__ == "__main__":
    with served() as hub:
        main(hub)
