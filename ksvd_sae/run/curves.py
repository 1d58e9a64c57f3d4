"""Curves of the eval ``truth``: each score of some dictionaries as one key of a run's config takes other values."""

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, JsonValue, ValidationError

from ksvd_sae.errors import ConfigError
from ksvd_sae.evals.base import EvalSetting
from ksvd_sae.evals.truth import VERSION, TruthEval
from ksvd_sae.run.config import DictionaryName, RunConfig, load_config
from ksvd_sae.run.find_config import find_config
from ksvd_sae.run.pipeline import Run
from ksvd_sae.run.read_yaml import read_yaml
from ksvd_sae.run.rows import Rows
from ksvd_sae.store import content_hash
from ksvd_sae.strict import Strict

logger = logging.getLogger(__name__)


class Curve(Strict):
    """One key and its values.

    set: as in ``--set``, without the value; of several, each gets it. overrides: as ``--set``, the same at every point.
    against: what the figure has on its axis.
    """

    set: list[str] = Field(min_length=1)
    values: list[JsonValue] = Field(min_length=1)
    overrides: list[str] = Field(default_factory=list)
    dictionaries: list[DictionaryName] = Field(min_length=1, description="of the base run")
    seeds: list[int] | None = Field(None, description="of worlds; null: the base run's evaluation.seeds")
    against: Literal["value", "l0"] = "value"
    logarithmic: bool = True


class CurvesConfig(Strict):
    """Curves from one run; the name is their folder under results/."""

    name: DictionaryName
    base: str = Field(description="the run to start from: a YAML, relative to this file, or a config's name")
    curves: dict[str, Curve] = Field(min_length=1, description="by the title of each in the figure")


Runs = dict[str, list[tuple[JsonValue, RunConfig]]]


def load_curves(path: str | Path) -> tuple[CurvesConfig, Runs]:
    """The curves, and for each the run of each of its values.

    Args: path: the YAML, or the name of one that comes with the package.
    Raises: ConfigError: missing file, bad YAML, unknown key or value, no such dictionary in the base run.
    """
    path = find_config(path)
    raw = read_yaml(path, "curves")
    try:
        config = CurvesConfig.model_validate({"name": path.stem, **raw})
    except ValidationError as error:
        raise ConfigError(f"reading curves {path}: {error}", cure="see eval_configs/truth-curves.yaml") from error
    base = find_config(config.base, path.parent).resolve()
    return config, {
        title: [(value, _run_config(base, curve, value)) for value in curve.values]
        for title, curve in config.curves.items()
    }


def _run_config(base: Path, curve: Curve, value: JsonValue) -> RunConfig:
    text = yaml.safe_dump(value, default_flow_style=True)
    run = load_config(base, [*curve.overrides, *(f"{key}={text}" for key in curve.set)])
    for name in curve.dictionaries:
        if name not in run.dictionaries or not run.dictionaries[name].learns_anywhere:
            able = [other for other, method in run.dictionaries.items() if method.learns_anywhere]
            raise ConfigError(
                f"curves: {base.name} has no dictionary {name!r} that can be learned in a world", limit=", ".join(able)
            )
    if not any(isinstance(section, TruthEval) for section in run.evaluation.evals()):
        raise ConfigError(f"curves: {base.name} has no evaluation.truth", cure="add that section")
    return run


def measure_curves(config: CurvesConfig, runs: Runs, rows: Rows, cache: Path | None = None) -> list[dict[str, Any]]:
    """Rows (curve, value, dictionary, seed of the world, scores) of every point; what has a row is not measured again.

    Raises: as the eval; rows so far are on disk.
    """
    from ksvd_sae.evals.truth.run import measure

    wanted, done = list[str](), rows.all()
    for title, points in runs.items():
        for value, run_config in points:
            run = Run(run_config, cache=cache)
            setting = EvalSetting(
                run_config.model.name, run_config.model.dtype, str(run.device), run.cache, "", run.cache / "artifacts"
            )
            for name, section in _cells(run_config, config.curves[title]):
                point = {"curve": title, "value": value, "dictionary": name, "seed": section.seed}
                key = content_hash(
                    {**point, **_options(run_config, name), "eval": section.model_dump(mode="json"), "version": VERSION}
                )
                wanted.append(key)
                if key not in done:
                    learned_on = partial(run.learned_on, run_config.dictionaries[name])
                    scores = measure(section, name, learned_on, setting).scores
                    logger.info("%s %s, world %d: %s F1 %.3f", title, value, section.seed, name, scores["f1"])
                    rows.append(key, {**point, **scores})
    done = rows.all()
    return [done[key] for key in wanted]


def _cells(run: RunConfig, curve: Curve) -> Iterator[tuple[str, TruthEval]]:
    """Whole worlds first, so that their samples are drawn once."""
    section = next(section for section in run.evaluation.evals() if isinstance(section, TruthEval))
    seeds = curve.seeds or run.evaluation.seeds or [section.seed]
    return ((name, section.with_seed(seed)) for seed in seeds for name in curve.dictionaries)


def _options(run: RunConfig, name: str) -> dict[str, JsonValue]:
    """All of a dictionary's options that its scores follow from."""
    method = run.dictionaries[name]
    source = run.source_of(method)
    return {
        "dictionary": method.key() | method.choices(),
        "of": None if source is None else source.key(),
        "training_seed": run.seed if method.own_seed is None else method.own_seed,
    }
