"""``ksvd-sae bench evals``: SAEBench's evals of a panel, ours beside SAEBench's own run of the same panel.

Ours shares what the language model gives among the panel's dictionaries (``EvalSetting.cache``). 'sae_bench' is
SAEBench's own code given the whole panel in one call, on the same data and with the same seeds: without a cache nothing
of it is replaced but where it reads and writes. Both start with nothing on disk and go through the same dictionaries,
coders included. ``largest_difference`` is the largest |a − b| / max(1, |b|) among all numbers of the result files,
details included. ``further_s`` is what another dictionary takes once the model has been asked: the time between the
first result and the last, by SAEBench's own stamps, over the number of those after the first. SAEBench loads the model
in each eval; ours, as in a run of several evals, in the first one. Where the config has ``evaluation.processes``, all
evals of ours are measured that way, too: beside what SAEBench's take, one after the other.

In these rows n is the number of dictionaries, m that of the largest one's atoms, k the most of a token.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, Any

import torch

from ksvd_sae.bench.measure import Job, Measured, limited_threads, measure
from ksvd_sae.bench.problems import ACTIVATIONS
from ksvd_sae.bench.rows import OURS, Who, row
from ksvd_sae.bench.settings import Outcome, Settings
from ksvd_sae.errors import ConfigError, EvaluationError

if TYPE_CHECKING:
    from ksvd_sae.evals.base import Eval, EvalSetting, Panelist
    from ksvd_sae.evals.saebench.loaded_model import LoadedModel

logger = logging.getLogger(__name__)
SAE_BENCH = "sae_bench"
EVALS = ("core", "sparse_probing", "absorption")
TOGETHER = " + ".join(EVALS)
_PANEL = 6
# Enough to load and compile what the first use of a coder loads and compiles.
_WARM_ROWS = 64
Numbers = dict[str, float | None]


@dataclass(frozen=True)
class Panel:
    """What is evaluated.

    Attributes:
        panelists: the dictionaries. sizes: n, d, m and k of the rows.
        evals: those of EVALS that the config has, by name.
        setting: of our runs; its cache and artifacts are replaced by empty ones.
        data: for the rows.
        processes: evals at a time that the config asks for.
    """

    panelists: "list[Panelist]"
    sizes: dict[str, int]
    evals: "dict[str, Eval]"
    setting: "EvalSetting"
    data: str
    processes: int = 1


def run(settings: Settings) -> Outcome:
    """Rows of both for each eval, and for all of them together, on the first six dictionaries of the config, once each.

    Raises: ManifestError if one of these has not been trained; ConfigError for options that have no meaning here, and
        if the config has none of the evals.
    """
    _refuse(settings)
    panel = _panel(settings)
    outcome = Outcome()
    with limited_threads(settings.threads), TemporaryDirectory(prefix="bench-evals-") as folder:
        for panelist in panel.panelists:
            sae = panelist.load()
            sae.decode(sae.encode(torch.randn(_WARM_ROWS, sae.cfg.d_in, device=sae.device, dtype=sae.dtype)))
        outcome.rows = compare(panel, settings, Path(folder), outcome.failures)
    return outcome


def compare(panel: Panel, settings: Settings, folder: Path, failures: list[str]) -> list[dict[str, Any]]:
    """Rows of each eval that the panel's config has, and of all of them together.

    Args: folder: empty; what the evals write goes there.
    """
    from ksvd_sae.evals.saebench.loaded_model import LoadedModel

    rows: list[dict[str, Any]] = []
    impls = (OURS,) if settings.peers == "none" else (SAE_BENCH, OURS)
    evals = list(panel.evals)
    model = LoadedModel(panel.setting.weights, panel.setting.prepend_bos)
    theirs: Numbers = {}
    for name in evals:
        # SAEBench first: neither is to gain by files that the other one has read, and ours reads fewer.
        whose = [_who(impl, settings.device) for impl in impls]
        jobs = [_job(panel, [name], who, folder, model, loads=name == evals[0]) for who in whose]
        found = measure(jobs, settings.repeats or 1, failures, time_first=True)
        rows += _rows(name, found, panel, settings)
        theirs |= next((one.scores["numbers"] for one in found if one.job.who.impl == SAE_BENCH), {})
    if len(rows) == len(EVALS) * len(impls):
        rows += _together(rows, panel, settings)
        if panel.processes > 1:
            job = _job(panel, evals, _who(OURS, settings.device), folder, model, loads=True)
            (measured,) = measure([job], settings.repeats or 1, failures, time_first=True)
            rows += _side_by_side(measured, theirs, rows[-len(impls) :], panel, settings)
    return rows


def _refuse(settings: Settings) -> None:
    meaningless = [name for name in ("samples", "atoms", "k", "dim") if getattr(settings, name) is not None]
    meaningless += ["small"] * settings.small + [f"data {settings.data}"] * (settings.data != ACTIVATIONS)
    if meaningless:
        raise ConfigError(
            f"bench evals: --{meaningless[0]} has no meaning here",
            cause="the panel is the first dictionaries of --config, as trained, on the data that its evals read",
            cure="leave it out, or change the config",
        )


def _panel(settings: Settings) -> Panel:
    from ksvd_sae.run.config import load_config
    from ksvd_sae.run.pipeline import Run

    config = load_config(settings.config)
    names = list(config.dictionaries)[:_PANEL]
    sources = {source for name in names if (source := config.dictionaries[name].source) is not None}
    first = config.only({*names, *sources})
    once = {"training_seeds": config.training_seeds[:1], "device": settings.device.type}
    run = Run(first.model_copy(update=once))
    run.prepare()
    panelists = run.panel()[:_PANEL]
    if len(panelists) < _PANEL:
        raise ConfigError(f"bench evals: {settings.config} has too few dictionaries", got=len(panelists), limit=_PANEL)
    evals = {section.name: section for section in run.config.evaluation.evals() if section.name in EVALS}
    if not evals:
        raise ConfigError(f"bench evals: {settings.config} has none of the evals", limit=", ".join(EVALS))
    facts = [t.facts(None) for t in run.trained()]
    sizes = {
        "n": len(panelists),
        "d": run.shards().d_in,
        "m": max(fact["d_sae"] for fact in facts),
        "k": max(fact["k"] for fact in facts),
    }
    model = run.config.model
    data = f"{model.name} {model.hook}, evals of {settings.config.stem}"
    evals = {name: evals[name] for name in EVALS if name in evals}
    return Panel(panelists, sizes, evals, run.eval_setting, data, run.config.evaluation.processes)


def _who(impl: str, device: torch.device) -> Who:
    return Who(impl, "panel", "torch", device=device, packages=("sae-bench", "sae-lens", "transformer-lens"))


def _job(panel: Panel, names: list[str], who: Who, folder: Path, model: "LoadedModel", *, loads: bool) -> Job:
    """One eval, or several side by side. ``model``: what the evals before have left, for ours; ``loads``: it is the
    first and loads it."""

    def empty_folder() -> Path:
        if loads:
            model.release()
        return Path(mkdtemp(prefix=f"{names[0]}-", dir=folder))

    def scores(place: Path) -> dict[str, Any]:
        with model.in_use() if who.impl == OURS and len(names) == 1 else nullcontext():
            return _scores(panel, names, who.impl, place)

    return Job(who, len(panel.panelists), scores, _score, empty_folder)


def _scores(panel: Panel, names: list[str], impl: str, place: Path) -> dict[str, Any]:
    """Result files by eval and panelist, read."""
    from ksvd_sae.evals.llm_cache import TensorCache
    from ksvd_sae.evals.panel import run_evals

    of_the_panel = panel.setting.cache
    limit_bytes = of_the_panel.limit_bytes if of_the_panel is not None else 0
    cache = TensorCache(place / "llm", limit_bytes) if impl == OURS else None
    setting = replace(panel.setting, artifacts=place / "artifacts", cache=cache)
    evals = [panel.evals[name] for name in names]
    return {
        f"{results.eval}/{who}": json.loads(path.read_text())
        for results in run_evals(panel.panelists, evals, setting, place, panel.processes if len(names) > 1 else 1)
        for who, path in results.files.items()
    }


def _score(results: dict[str, Any]) -> dict[str, Any]:
    stamps = sorted(found["datetime_epoch_millis"] for found in results.values())
    return {
        "numbers": {f"{who}/{name}": value for who, found in results.items() for name, value in _numbers(found)},
        "further_s": (stamps[-1] - stamps[0]) / 1000 / (len(stamps) - 1),
    }


def _numbers(result: Any) -> Iterator[tuple[str, float | None]]:
    """Every number of a result's scores, by its place."""
    for part in ("eval_result_metrics", "eval_result_details", "eval_result_unstructured"):
        yield from _within(result.get(part), part)


def _within(value: Any, place: str) -> Iterator[tuple[str, float | None]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _within(inner, f"{place}/{name}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _within(inner, f"{place}/{i}")
    elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        yield place, value


def largest_difference(ours: Numbers, theirs: Numbers) -> float:
    """Largest |a − b| / max(1, |b|).

    Raises: EvaluationError if one has a number where the other has none.
    """
    odd = sorted(name for name in ours.keys() | theirs.keys() if _is_number(ours, name) != _is_number(theirs, name))
    if odd:
        raise EvaluationError(
            f"bench evals: {len(odd)} scores are numbers in one run only, such as {odd[0]}",
            got=f"{ours.get(odd[0])} here, {theirs.get(odd[0])} in SAEBench's own run",
            cause="the two do not compute the same thing: a bug",
        )
    pairs = [(value, theirs[name]) for name, value in ours.items() if value is not None]
    return max((abs(a - b) / max(1.0, abs(b)) for a, b in pairs if b is not None), default=0.0)


def _is_number(found: Numbers, name: str) -> bool:
    return found.get(name) is not None


def _rows(name: str, found: list[Measured], panel: Panel, settings: Settings) -> list[dict[str, Any]]:
    numbers = {measured.job.who.impl: measured.scores["numbers"] for measured in found}
    seconds = {measured.job.who.impl: measured.seconds for measured in found}
    difference = largest_difference(numbers[OURS], numbers[SAE_BENCH]) if SAE_BENCH in numbers else None
    logger.info("bench evals, %s: largest difference of a score %s", name, difference)
    return [
        _row(name, measured.job.who, seconds[measured.job.who.impl], measured.peak_mib, difference, panel, settings)
        | {"n_scores": len(numbers[OURS]), "further_s": measured.scores["further_s"]}
        for measured in found
    ]


def _together(rows: list[dict[str, Any]], panel: Panel, settings: Settings) -> list[dict[str, Any]]:
    """Each one's seconds of all evals as one row."""
    summed = []
    for impl in dict.fromkeys(one["impl"] for one in rows):
        of_impl = [one for one in rows if one["impl"] == impl]
        seconds = sum(one["median_s"] for one in of_impl)
        peaks = [one["peak_mib"] for one in of_impl if one["peak_mib"] is not None]
        worst = max((d for one in of_impl if (d := one["largest_difference"]) is not None), default=None)
        fields = _row(
            TOGETHER, _who(impl, settings.device), [seconds], max(peaks, default=None), worst, panel, settings
        )
        summed.append(fields | {name: sum(one[name] for one in of_impl) for name in ("n_scores", "further_s")})
    return summed


def _side_by_side(
    measured: Measured, theirs: Numbers, together: list[dict[str, Any]], panel: Panel, settings: Settings
) -> list[dict[str, Any]]:
    """Ours of all evals at once as a row, beside SAEBench's, one after the other. What a process needs in memory, the
    meter of this one does not see."""
    case, who = f"{TOGETHER}, {panel.processes} at a time", measured.job.who
    numbers = measured.scores["numbers"]
    difference = largest_difference(numbers, theirs) if theirs else None
    ours = _row(case, who, measured.seconds, None, difference, panel, settings) | {"n_scores": len(numbers)}
    return [
        one | {"case": case} if one["impl"] == SAE_BENCH else ours | {"further_s": one["further_s"]} for one in together
    ]


def _row(
    case: str,
    who: Who,
    seconds: list[float],
    peak_mib: float | None,
    difference: float | None,
    panel: Panel,
    settings: Settings,
) -> dict[str, Any]:
    return row(
        "evals",
        case,
        who,
        **panel.sizes,
        seconds=seconds,
        warmups=0,
        seed=settings.seed,
        fvu=None,
        peak_mib=peak_mib,
        floor_s=None,
        data=panel.data,
        dictionary=", ".join(panelist.name for panelist in panel.panelists),
        largest_difference=difference,
    )
