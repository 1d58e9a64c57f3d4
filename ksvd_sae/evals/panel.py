"""One panel of dictionaries through every eval that a run asks for: what fails takes nothing else with it."""

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.base import Eval, EvalResults, EvalSetting, Panelist
from ksvd_sae.evals.saebench.loaded_model import LoadedModel

logger = logging.getLogger(__name__)


def run_evals(
    panel: list[Panelist], evals: Iterable[Eval], setting: EvalSetting, output: Path
) -> Iterable[EvalResults]:
    """Results of each eval as it ends.

    Raises: EvaluationError after the last, if any score is missing; finished results stay.
    """
    failures: list[EvaluationError] = []
    with LoadedModel().in_use() as model:
        for section in evals:
            if section.loads_own_model:
                model.release()
            try:
                results = section.run(panel, setting, output)
            except EvaluationError as error:
                logger.error("%s failed: %s", section.name, error.what)
                failures.append(error)
                continue
            yield results
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise EvaluationError(
            f"{len(failures)} evals failed; the others are done and kept",
            cause="\n".join(str(failure) for failure in failures),
            cure="mend what they say and run again",
        )


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
            "n": results.averaged_over(name),
            "source": results.files[name].name,
        }
        for name, metrics in results.metrics.items()
        for metric, value in metrics.items()
    ]


def result_files(results: list[EvalResults]) -> dict[str, dict[str, str]]:
    """Eval -> panelist -> file name; where an eval ran with several seeds, the panelist's name says which."""
    seeds = Counter(name for name, _ in {(result.eval, result.seed) for result in results})
    files: dict[str, dict[str, str]] = {}
    for result in results:
        suffix = f", seed {result.seed}" if seeds[result.eval] > 1 else ""
        files.setdefault(result.eval, {}).update({n + suffix: path.name for n, path in result.files.items()})
    return files
