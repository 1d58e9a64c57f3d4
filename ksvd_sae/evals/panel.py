"""One panel of dictionaries through every eval: results cached by content, an index of what was scored."""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.absorption.run import run_absorption, words_scored
from ksvd_sae.evals.autointerp.run import judged_latents, run_autointerp
from ksvd_sae.evals.config import (
    AbsorptionConfig,
    AutoInterpConfig,
    CoreConfig,
    EvaluationConfig,
    RavelConfig,
    SaeProbesConfig,
    ScrConfig,
    SparseProbingConfig,
)
from ksvd_sae.evals.core.run import run_core
from ksvd_sae.evals.heldout import heldout_metrics
from ksvd_sae.evals.ravel.run import HUB_DATASET, run_ravel, scored_pairs
from ksvd_sae.evals.sae_probes.run import data_sets_probed, run_sae_probes
from ksvd_sae.evals.saebench.loaded_model import LoadedModel
from ksvd_sae.evals.saebench.runner import EvalSetting, Panelist, read_metrics
from ksvd_sae.evals.scr.run import run_scr
from ksvd_sae.evals.sparse_probing.run import run_sparse_probing
from ksvd_sae.offline import bbc_news, biographies
from ksvd_sae.store import content_hash, copy_of_other_name, write_json

logger = logging.getLogger(__name__)
_HELDOUT_BATCH = 16_384


@dataclass(frozen=True)
class EvalResults:
    """What one eval gave for the panel.

    eval: 'heldout' or a SAEBench eval's name. data: the data's true name, with the judge where one judges.
    n: what a score is averaged over; by panelist where that differs.
    files: panelist -> result file. metrics: panelist -> metric -> value (None: not finite). seed: that the eval drew
    with; None if it draws nothing.
    """

    eval: str
    data: str
    n: int | dict[str, int]
    files: dict[str, Path]
    metrics: dict[str, dict[str, float | None]]
    seed: int | None = None


def evaluate_heldout(panel: list[Panelist], shards: ActivationShards, harvest_hash: str, output: Path) -> EvalResults:
    """Own metrics of each panelist on the held-out part."""
    files, metrics = {}, {}
    for panelist in panel:
        key = {"dictionary": panelist.content, "harvest": harvest_hash, "eval": "heldout"}
        path = output / f"{panelist.name}-{content_hash(key)}.json"
        if not path.exists() and not copy_of_other_name(path):
            logger.info("heldout of %s", panelist.name)
            found = heldout_metrics(panelist.load(), shards.batches(_HELDOUT_BATCH))
            density = [round(d, 6) for d in found.density_F.tolist()]
            scores = {name: value if math.isfinite(value) else None for name, value in found.scores.items()}
            write_json(path, {"scores": scores, "n_tokens": found.n_tokens, "density": density})
        files[panelist.name] = path
        metrics[panelist.name] = json.loads(path.read_text())["scores"]
    return EvalResults("heldout", "", shards.n_samples, files, metrics)


@dataclass(frozen=True)
class _Place:
    """What every eval is given besides its own section of the config.

    heldout: the local data set that ``dataset: heldout`` stands for. output: a folder for each eval is made in it.
    """

    panel: list[Panelist]
    setting: EvalSetting
    heldout: str
    output: Path

    def data(self, name: str) -> str:
        return self.heldout if name == "heldout" else name


def evaluate_saebench(
    panel: list[Panelist], config: EvaluationConfig, setting: EvalSetting, heldout_name: str, output: Path
) -> list[EvalResults]:
    """SAEBench's evals that the config asks for.

    Args: heldout_name: the local data set that ``dataset: heldout`` stands for.
    Raises: EvaluationError if any score is missing; finished results stay.
    """
    place = _Place(panel, setting, heldout_name, output)
    results, failures = [], []
    with LoadedModel().in_use() as model:
        for name, evaluate in _EVALS.items():
            for seed, section in _seeded(config, name):
                if name in _WITH_OWN_MODEL:
                    model.release()
                try:
                    found = evaluate(section, place)
                # One eval that fails takes no other with it: what they give is kept, and need not be computed again.
                except EvaluationError as error:
                    logger.error("%s failed: %s", name, error.what)
                    failures.append(error)
                    continue
                results.append(replace(found, seed=seed))
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise EvaluationError(
            f"{len(failures)} evals failed; the others are done and kept",
            cause="\n".join(str(failure) for failure in failures),
            cure="mend what they say and run again",
        )
    return results


def _seeded(config: EvaluationConfig, name: str) -> Iterator[tuple[int | None, Any]]:
    """An eval's section with each seed that it is to run with; None for an eval that draws nothing."""
    section = getattr(config, name)
    if section is None:
        return
    if "seed" not in type(section).model_fields:
        yield None, section
        return
    for seed in config.seeds or [section.seed]:
        yield seed, section.model_copy(update={"seed": seed})


def _core(config: CoreConfig, place: _Place) -> EvalResults:
    dataset = place.data(config.dataset)
    files = run_core(place.panel, config, dataset, place.setting, place.output / "core")
    n = config.reconstruction_batches * config.batch_contexts * (config.context_tokens - 1)
    return _results("core", dataset, n, files)


def _sparse_probing(config: SparseProbingConfig, place: _Place) -> EvalResults:
    classes = {bbc_news.NAME: [str(i) for i in range(len(bbc_news.CLASSES))]}
    files = run_sparse_probing(place.panel, config, classes, place.setting, place.output / "sparse_probing")
    data = "SAEBench's eight data sets" if config.datasets is None else ", ".join(config.datasets)
    return _results("sparse_probing", data, config.test_set_size, files)


def _sae_probes(config: SaeProbesConfig, place: _Place) -> EvalResults:
    files = run_sae_probes(place.panel, config, place.setting, place.output / "sparse_probing_sae_probes")
    n = data_sets_probed(next(iter(files.values())))
    chosen = "all" if config.datasets is None else f"{n} of the"
    return _results("sparse_probing_sae_probes", f"{chosen} data sets of sae-probes", n, files)


def _scr(config: ScrConfig, place: _Place) -> EvalResults:
    files = run_scr(place.panel, config, {biographies.NAME: biographies.PROFESSIONS}, place.setting, place.output)
    data = "SAEBench's two data sets" if config.datasets is None else ", ".join(config.datasets)
    return _results("scr", data, config.test_set_size, files)


def _absorption(config: AbsorptionConfig, place: _Place) -> EvalResults:
    files = run_absorption(place.panel, config, place.setting, place.output / "absorption")
    sample = config.vocabulary_sample
    data = "vocabulary" if sample is None else f"vocabulary sample of {sample}"
    return _results("absorption", data, words_scored(next(iter(files.values()))), files)


def _ravel(config: RavelConfig, place: _Place) -> EvalResults:
    files = run_ravel(place.panel, config, place.setting, place.output / "ravel")
    return _results("ravel", config.dataset or HUB_DATASET, {name: scored_pairs(p) for name, p in files.items()}, files)


def _autointerp(config: AutoInterpConfig, place: _Place) -> EvalResults:
    dataset = place.data(config.dataset)
    files = run_autointerp(place.panel, config, dataset, place.setting, place.output / "autointerp")
    judge = config.endpoint.model if config.judge == "endpoint" and config.endpoint else "lexical"
    n = {name: judged_latents(path) for name, path in files.items()}
    return _results("autointerp", f"{dataset}, judge: {judge}", n, files)


# By their names in the config, in the order in which they run.
_EVALS: dict[str, Callable[[Any, _Place], EvalResults]] = {
    "core": _core,
    "sparse_probing": _sparse_probing,
    "sparse_probing_sae_probes": _sae_probes,
    "scr": _scr,
    "absorption": _absorption,
    "autointerp": _autointerp,
    "ravel": _ravel,
}
# These load the model in another form than TransformerLens'; two would take twice the memory.
_WITH_OWN_MODEL = {"ravel"}


def _results(eval_name: str, data: str, n: int | dict[str, int], files: dict[str, Path]) -> EvalResults:
    return EvalResults(eval_name, data, n, files, {name: read_metrics(path) for name, path in files.items()})


def tidy_rows(results: EvalResults, facts: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the comparison: one a score.

    Args: facts: panelist -> dictionary (of which it is one training in one view), view, d_sae, k, l0, seed.
    """
    return [
        {
            **facts[name],
            "eval": results.eval,
            "data": results.data,
            "metric": metric,
            "value": float("nan") if value is None else float(value),
            "eval_seed": results.seed,
            "n": results.n[name] if isinstance(results.n, dict) else results.n,
            "source": results.files[name].name,
        }
        for name, metrics in results.metrics.items()
        for metric, value in metrics.items()
    ]


def result_files(results: list[EvalResults]) -> dict[str, dict[str, str]]:
    """Eval -> panelist -> file name; where an eval ran with several seeds, the panelist's name says which."""
    runs = Counter(result.eval for result in results)
    files: dict[str, dict[str, str]] = {}
    for result in results:
        suffix = f", seed {result.seed}" if runs[result.eval] > 1 else ""
        files.setdefault(result.eval, {}).update({n + suffix: path.name for n, path in result.files.items()})
    return files
