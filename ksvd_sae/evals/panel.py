"""One panel of dictionaries through every eval that a run asks for: what fails takes nothing else with it."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ksvd_sae.activations.weights import OwnWeights
from ksvd_sae.device import give_back_memory
from ksvd_sae.errors import EvaluationError, KsvdSaeError
from ksvd_sae.evals.base import Eval, EvalResults, EvalSetting, Panelist
from ksvd_sae.evals.processes import side_by_side
from ksvd_sae.evals.saebench.loaded_model import LoadedModel
from ksvd_sae.together import Task

logger = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def _model(weights: OwnWeights | None, prepend_bos: bool | None) -> LoadedModel:
    """The one model of a process of ``side_by_side``, as long as that lives."""
    return LoadedModel(weights, prepend_bos)


def run_evals(
    panel: list[Panelist], evals: Iterable[Eval], setting: EvalSetting, output: Path, processes: int = 1
) -> Iterator[EvalResults]:
    """Results of each eval as it ends.

    Args: processes: that many evals at a time; each holds a model.
    Raises: EvaluationError after the last, if any score is missing; finished results stay.
    """
    failures: list[EvaluationError] = []
    for outcome in _outcomes(panel, list(evals), setting, output, processes):
        if isinstance(outcome, EvaluationError):
            failures.append(outcome)
        else:
            yield outcome
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise EvaluationError(
            f"{len(failures)} evals failed; the others are done and kept",
            cause="\n".join(str(failure) for failure in failures),
            cure="mend what they say and run again",
        )


def _outcomes(
    panel: list[Panelist], evals: list[Eval], setting: EvalSetting, output: Path, processes: int
) -> Iterator[EvalResults | EvaluationError]:
    # The longest begin, so that none of them is left alone at the end.
    together = _longest_first(evals)
    if processes == 1 or len(together) < 2:
        with LoadedModel(setting.weights, setting.prepend_bos).in_use() as model:
            for section in evals:
                yield _outcome(section, panel, setting, output, model)
        return
    for outcomes in side_by_side([partial(_in_process, some, panel, setting, output) for some in together], processes):
        yield from outcomes


def shared_tasks(
    panel: list[Panelist], evals: Iterable[Eval], setting: EvalSetting, output: Path, model: LoadedModel
) -> list[Task]:
    """Tasks that leave all results where ``run_evals`` finds them; what fails leaves none.

    Of an eval, a dictionary each, with all seeds: the first makes what all need of the language model, and the others
    follow. The longest come first.
    """

    def score(sections: list[Eval], some: list[Panelist]) -> None:
        for section in sections:
            try:
                _outcome(section, some, setting, output, model)
            except KsvdSaeError as error:
                logger.error("%s failed: %s", section.name, error.what)

    first, then = list[Task](), list[Task]()
    for sections in _longest_first(evals):
        units = [panel] if sections[0].one_process else [[panelist] for panelist in panel]
        number = len(first)
        first += [Task(partial(score, sections, some)) for some in units[:1]]
        then += [Task(partial(score, sections, some), number) for some in units[1:]]
    return first + then


def _longest_first(evals: Iterable[Eval]) -> list[list[Eval]]:
    """Each eval's seeds together, as what it keeps for its next seed is not for two at a time."""
    by_name: dict[str, list[Eval]] = {}
    for section in evals:
        by_name.setdefault(section.name, []).append(section)
    return sorted(by_name.values(), key=lambda sections: -len(sections) * sections[0].demo_seconds)


def _in_process(
    evals: list[Eval], panel: list[Panelist], setting: EvalSetting, output: Path
) -> list[EvalResults | EvaluationError]:
    with _model(setting.weights, setting.prepend_bos).in_use() as model:
        outcomes = [_outcome(section, panel, setting, output, model) for section in evals]
    # Another process is beside this one, and may need it.
    give_back_memory()
    return outcomes


def _outcome(
    section: Eval, panel: list[Panelist], setting: EvalSetting, output: Path, model: LoadedModel
) -> EvalResults | EvaluationError:
    if section.loads_own_model:
        model.release()
    try:
        return section.run(panel, setting, output)
    except EvaluationError as error:
        logger.error("%s failed: %s", section.name, error.what)
        return error


def tidy_rows(results: EvalResults, facts: dict[str, dict[str, Any]], output: Path) -> list[dict[str, Any]]:
    """Rows of the comparison: one a score.

    Args: facts: panelist -> dictionary (of which it is one training in one view), view, d_sae, k, l0, seed.
        output: what the eval was given.
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
            "source": _in_eval_folder(results, name, output),
        }
        for name, metrics in results.metrics.items()
        for metric, value in metrics.items()
    ]


def result_files(results: list[EvalResults], output: Path) -> dict[str, dict[str, str]]:
    """Eval -> panelist -> file; where an eval ran with several seeds, the panelist's name says which.

    Args: output: what the evals were given; files are named from an eval's folder in it.
    """
    seeds = Counter(name for name, _ in {(result.eval, result.seed) for result in results})
    files: dict[str, dict[str, str]] = {}
    for result in results:
        suffix = f", seed {result.seed}" if seeds[result.eval] > 1 else ""
        files.setdefault(result.eval, {}).update(
            {name + suffix: _in_eval_folder(result, name, output) for name in result.files}
        )
    return files


def _in_eval_folder(results: EvalResults, panelist: str, output: Path) -> str:
    return results.files[panelist].relative_to(output / results.eval).as_posix()
