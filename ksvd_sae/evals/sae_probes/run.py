"""SAEBench's sparse probing on the data sets of sae-probes, which the package brings along: no Hub is needed.

The probe reads the last token of each text. sae-probes ranks latents by the size of their difference between the
classes, each divided by its mean size: it makes no assumption about signs, and signed codes are probed as they are.
"""

import json
import logging
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.base import EvalResults, EvalSetting, Panelist
from ksvd_sae.evals.sae_probes import SaeProbesEval
from ksvd_sae.evals.saebench.runner import drop_half_written, made_by, results, run_eval
from ksvd_sae.replaced import replaced
from ksvd_sae.store import content_hash

logger = logging.getLogger(__name__)
NAME = "sparse_probing_sae_probes"


def run_sae_probes(panel: list[Panelist], config: SaeProbesEval, setting: EvalSetting, output: Path) -> EvalResults:
    """SAEBench's ``sparse_probing_sae_probes``, in sae-probes' balanced ('normal') setting.

    The model reads each text once for a panel, in float32 whatever the run's dtype: sae-probes knows no other. Its 113
    data sets are in the package; texts longer than 1,024 tokens keep their end.

    Returns, Raises: as ``Eval.run``; EvaluationError for a data set that sae-probes has not, and if SAEBench's
        mean is over fewer data sets than were asked for.
    """
    from sae_bench.evals.sparse_probing_sae_probes import main as probing
    from sae_bench.evals.sparse_probing_sae_probes.eval_config import SparseProbingSaeProbesEvalConfig

    from ksvd_sae.evals.sae_probes.adapters import texts_read_once
    from ksvd_sae.evals.saebench.adapters import heads_flattened, working_directory

    names = _known(config.datasets)
    of = {"sae_probes": version("sae-probes")}
    # sae-probes reuses activations by the names of model, data set and hook alone: the folder carries the rest. And
    # SAEBench takes the mean of the model's own probes over all that lie in their folder.
    kept = setting.artifacts.resolve() / f"sae_probes-{content_hash({**of, **made_by(setting)})}"
    probes = f"probes-{content_hash(config.model_dump())}"
    eval_config = SparseProbingSaeProbesEvalConfig(
        model_name=setting.model_name,
        random_seed=config.seed,
        dataset_names=names,
        reg_type=config.reg_type,
        ks=[int(k) for k in config.k_values],
        binarize=config.binarize,
        # Below the working directory: results carry no path of this machine.
        results_path=probes,
        model_cache_path="activations",
    )

    def evaluate(saes: list[tuple[str, Any]], folder: Path, reasons: list[str]) -> None:
        kept.mkdir(parents=True, exist_ok=True)
        drop_half_written(kept / "activations")
        _drop_unfinished_probes(kept / probes)
        with working_directory(kept), replaced(heads_flattened(), texts_read_once()):
            probing.run_eval(eval_config, saes, setting.device, str(folder))

    files = run_eval(NAME, panel, {"config": config.model_dump(), **of}, setting, output, evaluate)
    for name, path in files.items():
        _all_there(name, path, names, eval_config.ks)
    chosen = "all" if config.datasets is None else f"{len(names)} of the"
    return results(NAME, f"{chosen} data sets of sae-probes", len(names), files, config.seed)


def _known(asked: list[str] | None) -> list[str]:
    """The data sets asked for; all of sae-probes' for None."""
    from sae_probes import DATASETS

    unknown = [name for name in asked or () if name not in DATASETS]
    if unknown:
        close = get_close_matches(unknown[0], DATASETS, n=3, cutoff=0.4)
        raise EvaluationError(
            f"{NAME}: sae-probes has no data set {unknown[0]!r}",
            limit=f"{len(DATASETS)} names, such as {', '.join(close or DATASETS[:3])}",
            cure="change evaluation.sparse_probing_sae_probes.datasets (null: all of them)",
        )
    return list(DATASETS if asked is None else asked)


def _drop_unfinished_probes(folder: Path) -> None:
    """Remove probe results that an interrupted run left half written: sae-probes would take them as done."""
    for path in folder.rglob("*.json") if folder.exists() else ():
        try:
            json.loads(path.read_text())
        except ValueError:
            logger.warning("%s was left half written; making it again", path)
            path.unlink()


def _all_there(who: str, path: Path, names: list[str], ks: list[int]) -> None:
    """SAEBench passes over what it cannot read and takes the mean of the rest."""
    details = json.loads(path.read_text())["eval_result_details"]
    scored = {
        one["dataset_name"] for one in details if all(one.get(f"sae_top_{k}_test_accuracy") is not None for k in ks)
    }
    if scored != set(names):
        path.unlink()
        raise EvaluationError(
            f"{NAME} of {who}: the mean is over {len(scored)} data sets",
            limit=f"{len(names)} were asked for",
            cause=f"no score for {', '.join(sorted(set(names) - scored))}",
            cure="run again; if it stays, run with -v and see what sae-probes says about them",
        )
