"""How many samples a dictionary needs: held-out error against samples seen, for DB-KSVD and SAEs on the same shards.

A DB-KSVD dictionary is measured on its way: it has no schedule, so what it is after n samples is what training on n
samples gives. A SAE's learning rate is warmed up and decayed over its training, so each of its points is a training of
its own, the decay done: what a user with that many samples would get.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator
from torch import Tensor

from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.dictionary import Dictionary
from ksvd_sae.evals.heldout import heldout_metrics
from ksvd_sae.learning.dbksvd import BatchLog, DoubleBatchKSVD
from ksvd_sae.methods.trainers import estimator
from ksvd_sae.report import style
from ksvd_sae.run.config import DBKSVDConfig, SAEConfig
from ksvd_sae.run.pipeline import Run
from ksvd_sae.store import atomic_path, commit

logger = logging.getLogger(__name__)
_HELDOUT_BATCH = 16_384
# Marks on the way of a DB-KSVD training: a factor of √2 apart.
_STEP = 2**0.5
_FVU_TICKS = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)


def measure_efficiency(run: Run, passes: list[int], path: Path) -> list[dict[str, Any]]:
    """Rows (dictionary, samples_seen, seconds, fvu) of every DB-KSVD and SAE of the run, appended to ``path``.

    Args:
        passes: over the shards, one SAE training for each.
    seconds: of training alone. What the file has rows of (by a hash of the training) is not measured again; rows of
        trainings that are not asked for stay in the file and are not returned.
    """
    train, heldout = run.shards("train"), run.shards("heldout")
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)

    def add(name: str, key: str, samples: int, seconds: float, fvu: float) -> None:
        row = {
            "key": key,
            "dictionary": name,
            "samples_seen": samples,
            "seconds": round(seconds, 2),
            "fvu": fvu,
            "commit": commit(),
        }
        rows.append(row)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    done = {row["key"] for row in rows}
    wanted = set()
    for name, config in run.config.dictionaries.items():
        if isinstance(config, DBKSVDConfig):
            key = run.training_key(config)
            wanted.add(key)
            if key not in done:
                for samples, seconds, fvu in _trace(run, config, train, heldout):
                    add(name, key, samples, seconds, fvu)
        elif isinstance(config, SAEConfig):
            for n_passes in passes:
                own = config.model_copy(update={"passes": n_passes})
                key = run.training_key(own)
                wanted.add(key)
                if key in done:
                    continue
                trained = run.train_one(f"{name}-{n_passes}-passes", own, train)
                fvu = heldout_metrics(run.load_sae(trained), heldout.batches(_HELDOUT_BATCH)).scores["fvu"]
                add(name, key, trained.manifest["samples_seen"], trained.manifest["seconds"], fvu)
    return [row for row in rows if row["key"] in wanted]


def _trace(
    run: Run, config: DBKSVDConfig, train: ActivationShards, heldout: ActivationShards
) -> list[tuple[int, float, float]]:
    """(samples seen, seconds of training, held-out FVU) on the way of one training."""
    points: list[tuple[int, float, float]] = []
    started, measuring = time.perf_counter(), 0.0

    def on_batch(entry: BatchLog) -> None:
        nonlocal measuring
        last = entry.samples_seen >= config.passes * train.n_samples
        if points and entry.samples_seen < _STEP * points[-1][0] and not last:
            return
        now = time.perf_counter()
        fvu = _heldout_fvu(ksvd, config, heldout.batches(_HELDOUT_BATCH))
        points.append((entry.samples_seen, now - started - measuring, fvu))
        measuring += time.perf_counter() - now

    ksvd = estimator(config, train, run.setting(config), on_batch=on_batch)
    ksvd.fit(train)
    return points


def _heldout_fvu(ksvd: DoubleBatchKSVD, config: DBKSVDConfig, batches: Iterator[Tensor]) -> float:
    dictionary = replace(Dictionary.from_estimator(ksvd), coder=config.coder)
    error, variance = 0.0, 0.0
    for x_BD in batches:
        error += float((dictionary.decode(dictionary.encode(x_BD)) - x_BD).double().square().sum())
        variance += float((x_BD - x_BD.mean(dim=0)).double().square().sum())
    return error / variance


def efficiency_plot(rows: list[dict[str, Any]], path: Path) -> Path:
    """Held-out FVU against samples seen and against seconds of training, both on log axes."""
    frame = pd.DataFrame(rows).sort_values("samples_seen")
    colours = style.palette(dict.fromkeys(frame["dictionary"]))
    with style.figure(path, 10.0, 4.4) as drawn:
        panels: list[tuple[str, str]] = [("samples_seen", "samples seen"), ("seconds", "seconds of training")]
        for axes, (column, label) in zip(drawn.subplots(1, 2, sharey=True), panels, strict=True):
            for index, (name, group) in enumerate(frame.groupby("dictionary", sort=False)):
                marker = style.MARKERS[index % len(style.MARKERS)]
                axes.plot(
                    group[column], group["fvu"], marker=marker, markersize=4, color=colours[str(name)], label=str(name)
                )
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=_FVU_TICKS))
            axes.yaxis.set_minor_locator(NullLocator())
            # Matplotlib's own labels of log axes are formulas, which the style leaves as text.
            for which in ("x", "y"):
                style.count_axis(axes, which)
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel(label)
        drawn.axes[0].set_ylabel("held-out FVU")
        drawn.axes[0].set_title("Error against data")
        drawn.axes[1].set_title("Error against time")
        handles, labels = drawn.axes[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    return path


def write_efficiency(run: Run, passes: list[int], folder: Path, say: Callable[[str], None]) -> Path:
    """Measure, then rows.jsonl, table.md and efficiency.png in ``folder``; returns the plot's path."""
    rows = measure_efficiency(run, passes, folder / "rows.jsonl")
    lines = ["| dictionary | samples seen | seconds | held-out FVU |", "|---|---:|---:|---:|"]
    for row in sorted(rows, key=lambda r: (r["dictionary"], r["samples_seen"])):
        lines.append(f"| {row['dictionary']} | {row['samples_seen']:,} | {row['seconds']:.1f} | {row['fvu']:.4f} |")
    with atomic_path(folder / "table.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    say(f"{len(rows)} points in {folder}")
    return efficiency_plot(rows, folder / "efficiency.png")
