"""How any of SAEBench's evals is run on a panel of SAEs; every missing score is an error.

Results stay in SAEBench's JSON format, and SAEBench's own plots find what belongs together: a dictionary's files have
the same name in all evals, its own and the hash of what it is. The folder is the hash of all else that a result follows
from (the eval's settings, the data, the versions of what computes it), and the file says all of it under
``follows_from``: a result is reused only when it is the same, and whatever name the dictionary has now.
"""

import io
import json
import logging
import math
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ksvd_sae.activations.transformers_5 import loadable
from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.base import EvalResults, EvalSetting, Panelist, scoring_versions
from ksvd_sae.progress import printed_to
from ksvd_sae.store import content_hash, named_otherwise, write_json

logger = logging.getLogger(__name__)
# What SAEBench puts behind a name.
_SUFFIX = "_custom_sae_eval_results.json"
# Key of a result's ``eval_result_unstructured``: where there is null because the value was no finite number.
_NULLED = "null because the value was"
# Key of a result that SAEBench does not write.
_FOLLOWS_FROM = "follows_from"


def made_by(setting: EvalSetting) -> dict[str, Any]:
    """What all that SAEBench makes follows from, besides an eval's settings and the data."""
    return {"model": setting.model, "dtype": setting.dtype, "versions": scoring_versions()}


def run_eval(
    eval_name: str,
    panel: list[Panelist],
    key: dict[str, Any],
    setting: EvalSetting,
    output: Path,
    evaluate: Callable[[list[tuple[str, Any]], Path, list[str]], None],
) -> dict[str, Path]:
    """Evaluate the panelists that have no result yet; one that fails takes no other with it.

    Args:
        key: what scores follow from, besides what is in ``setting``.
        output: folder that holds a folder of results for each eval.
        evaluate: scores SAEs, given by name, and writes results into a folder; may say what went wrong.
    """
    key = {**key, "eval": eval_name, "data": setting.data_hash, **made_by(setting)}
    folder = output / eval_name / content_hash(key)
    folder.mkdir(parents=True, exist_ok=True)
    keys = {p.name: {**key, "dictionary": p.content} for p in panel}
    files = {p.name: result_file(folder, f"{p.name}-{p.content}") for p in panel}
    stems = {name: path.name.removesuffix(_SUFFIX) for name, path in files.items()}
    missing = [
        p
        for p in panel
        if not _is_result(files[p.name], keys[p.name])
        and not _of_another_name(files[p.name], stems[p.name], keys[p.name])
    ]
    for name in sorted({p.name for p in panel} - {p.name for p in missing}):
        logger.info("%s of %s: reusing %s", eval_name, name, files[name].name)
    reasons: list[str] = []
    failures: dict[str, list[str]] = {}
    loaded: dict[str, Any] = {}
    for panelist in missing:
        try:
            loaded[panelist.name] = panelist.load()
        except Exception as error:
            reasons.append(f"loading {panelist.name}: {type(error).__name__}: {error}")
    waiting = [(stems[name], sae) for name, sae in loaded.items()]
    if waiting:
        logger.info("%s of %s", eval_name, ", ".join(p.name for p in missing))
    while waiting:
        try:
            # SAEBench switches gradients on and off as it goes, for the whole process.
            with _chatter(), torch.set_grad_enabled(torch.is_grad_enabled()), loadable():
                evaluate(waiting, folder.resolve(), reasons)
            break
        # Whatever an eval throws is reported with what it was doing. SAEs are scored in order, so the first one
        # without a result is the one that failed: the rest are tried again without it.
        except Exception as error:
            logger.debug("%s failed", eval_name, exc_info=True)
            undone = [(stem, sae) for stem, sae in waiting if not result_file(folder, stem).exists()]
            failed = undone[0][0] if undone else "after the last score"
            failures.setdefault(f"{type(error).__name__}: {error}", []).append(failed)
            waiting = undone[1:]
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae

    # Also what a process that was killed had finished.
    for panelist in panel:
        path = files[panelist.name]
        if path.exists() and _FOLLOWS_FROM not in (result := json.loads(path.read_text())):
            sae = loaded[panelist.name] if panelist.name in loaded else panelist.load()
            # SAEBench puts more into the config: what a killed process had scored is to say the same.
            load_and_format_sae(panelist.name, sae, setting.device)
            write_json(path, {**_completed(result, sae), _FOLLOWS_FROM: keys[panelist.name]})
    # What is wrong with the model or the data is said once, not for every SAE.
    reasons += [f"{', '.join(names)}: {what}" for what, names in failures.items()]
    lost = [p.name for p in panel if not files[p.name].exists()]
    if lost or reasons:
        raise EvaluationError(
            f"{eval_name}: no score for {', '.join(lost) or 'some'}",
            cause="; ".join(reasons) or "SAEBench wrote no result and gave no reason",
            cure="results that were finished are kept; run again after mending the cause (-v shows the traceback)",
        )
    return files


@contextmanager
def _chatter() -> Iterator[None]:
    """SAEBench prints to stdout as it goes; that belongs to the log, where -v shows it."""
    if logger.isEnabledFor(logging.DEBUG):
        with printed_to(sys.stderr, "stdout"):
            yield
    else:
        with printed_to(io.StringIO(), "stdout", "stderr"):
            yield


def result_file(folder: Path, stem: str) -> Path:
    """Where SAEBench puts the result of an SAE of that name."""
    return folder / f"{stem}{_SUFFIX}"


def _is_result(path: Path, key: dict[str, Any]) -> bool:
    """Whether the file is a whole result of ``key``; one that is not is removed, or SAEBench would skip it as done."""
    try:
        result = json.loads(path.read_text())
        if isinstance(result, dict) and isinstance(result.get("eval_result_metrics"), dict):
            if content_hash(result.get(_FOLLOWS_FROM, key)) == content_hash(key):
                return True
            logger.warning("%s follows from something else than its place says; scored again", path)
    except (OSError, ValueError):
        pass
    path.unlink(missing_ok=True)
    return False


def _of_another_name(path: Path, stem: str, key: dict[str, Any]) -> bool:
    """Whether the same dictionary was scored under another name: then its result is this one's too, under this name."""
    for other in named_otherwise(path):
        if _is_result(other, key):
            write_json(path, {**json.loads(other.read_text()), "sae_lens_release_id": stem})
            return True
    return False


def drop_half_written(artifacts: Path) -> None:
    """Remove activation files that an interrupted run left unfinished: SAEBench would stumble over them."""
    for path in artifacts.rglob("*.pt") if artifacts.exists() else ():
        if not zipfile.is_zipfile(path):
            logger.warning("%s was left half written; making it again", path)
            path.unlink()


def _completed(result: dict[str, Any], sae: Any) -> dict[str, Any]:
    """A result as SAEBench wrote it, with what its plots want to know of the SAE, and in valid JSON.

    Of the SAE, one eval forgets the architecture and all of them how long it was trained. NaN and Infinity are no JSON:
    they become null, and the result says which was what.
    """
    were: Counter[tuple[str, str]] = Counter()
    result = _nulled(result, "", were)
    if were:
        reasons: dict[str, dict[str, int]] = {}
        for (place, what), n in were.items():
            reasons.setdefault(place, {})[what] = n
        result["eval_result_unstructured"] = {**(result.get("eval_result_unstructured") or {}), _NULLED: reasons}
    trained = sae.cfg.metadata.training_tokens
    known = {} if trained is None else {"training_tokens": trained}
    # Written as SAEBench writes it.
    result["sae_cfg_dict"] = json.loads(json.dumps({**sae.cfg.to_dict(), **known}, default=str))
    return result


def _nulled(value: Any, place: str, were: "Counter[tuple[str, str]]") -> Any:
    """The value with null for what is not finite; counted in ``were`` by place ('*' for all of a list) and name."""
    if isinstance(value, dict):
        return {key: _nulled(inner, f"{place}/{key}".lstrip("/"), were) for key, inner in value.items()}
    if isinstance(value, list):
        return [_nulled(inner, f"{place}/*", were) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        were[place, json.dumps(value)] += 1
        return None
    return value


def read_metrics(path: Path) -> dict[str, float | None]:
    """The metrics of a result file by name, groups flattened; None where the value was not finite.

    Fields of SAEBench's format that this eval did not compute (null as written by SAEBench) are left out:
    only core writes values that are not finite, and it writes all of its fields.
    """
    result = json.loads(path.read_text())
    keep_null = result.get("eval_type_id") == "core"
    return {
        metric: value
        for group in result["eval_result_metrics"].values()
        for metric, value in group.items()
        if isinstance(value, int | float) or (value is None and keep_null)
    }


def results(name: str, data: str, n: int | dict[str, int], files: dict[str, Path], seed: int | None) -> EvalResults:
    """What an eval gave, from its result files; arguments as ``EvalResults``."""
    return EvalResults(name, data, n, files, {who: read_metrics(path) for who, path in files.items()}, seed)
