"""How many samples a dictionary needs: held-out error against samples seen, for every kind on the same shards.

A training without a schedule is measured on its way: what it is after n samples is what training on n samples gives.
Where a learning rate is warmed up and decayed, each point is a training of its own, the decay done: what a user with
that many samples would get.
"""

import logging
from collections.abc import Iterator
from typing import Any

from ksvd_sae.evals.heldout.metrics import heldout_metrics
from ksvd_sae.methods.base import Method
from ksvd_sae.run.pipeline import Run
from ksvd_sae.run.replicas import Replica
from ksvd_sae.run.rows import Rows
from ksvd_sae.store import content_hash

logger = logging.getLogger(__name__)
_BATCH = 16_384
# Between the points on the way of a training.
_SPACING = 2**0.5


def measure_efficiency(run: Run, passes: list[int], rows: Rows) -> list[dict[str, Any]]:
    """Rows (dictionary, samples_seen, seconds, fvu) of every dictionary of the run that learns in passes.

    Args:
        passes: over the shards, a training for each where a schedule asks for that.
        rows: what has rows there is not measured again; rows of trainings that are not asked for stay there and are not
            returned.
    seconds: of training alone.
    """
    wanted = set()
    for name, method in run.config.dictionaries.items():
        if "passes" not in method.may_vary:
            continue
        variants = [method] if method.has_waypoints else [method.varied(passes=n) for n in passes]
        for variant in variants:
            training = run.content(Replica(name, variant, None, name))
            wanted.add(training)
            if any(row["training"] == training for row in rows.all().values()):
                continue
            # All of them first: a training with rows is not measured again.
            for samples_seen, seconds, fvu in list(_points(run, name, variant)):
                row = {"dictionary": name, "samples_seen": samples_seen, "seconds": round(seconds, 2), "fvu": fvu}
                rows.append(content_hash([training, samples_seen]), {"training": training, **row})
    return [row for row in rows.all().values() if row["training"] in wanted]


def _points(run: Run, name: str, method: Method) -> Iterator[tuple[int, float, float]]:
    """(samples seen, seconds of training, held-out FVU) of one training."""
    setting, heldout = run.setting(method), run.shards("heldout")
    waypoints = method.waypoints(setting, _SPACING)
    if waypoints is None:
        trained = run.train_one(name, method)
        fvu = heldout_metrics(run.load_sae(trained), heldout.batches(_BATCH)).scores["fvu"]
        yield trained.manifest["samples_seen"], trained.manifest["seconds"], fvu
        return
    for point in waypoints:
        fvu = heldout_metrics(setting.wrap(point.dictionary), heldout.batches(_BATCH)).scores["fvu"]
        yield point.samples_seen, point.seconds, fvu
