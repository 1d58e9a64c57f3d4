"""Run a study: train and measure what has no row yet, dictionary by dictionary."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksvd_sae.errors import EvaluationError, KsvdSaeError
from ksvd_sae.evals.loss import LossEval
from ksvd_sae.run.grid import Cell, LayerRun, StudyConfig
from ksvd_sae.run.pipeline import Run
from ksvd_sae.run.replicas import Replica, replicas
from ksvd_sae.run.rows import Rows
from ksvd_sae.store import content_hash

logger = logging.getLogger(__name__)


@dataclass
class Study:
    """A study and its rows on disk.

    Args: layers: the run of each layer.  results: folder that holds results/<name>.
    """

    config: StudyConfig
    layers: dict[int, LayerRun]
    results: Path = Path("results")
    cache: Path | None = None

    @property
    def folder(self) -> Path:
        return self.results / self.config.name

    @property
    def _rows(self) -> Rows:
        return Rows(self.folder / "rows.jsonl")

    def rows(self) -> list[dict[str, Any]]:
        """Rows measured so far, of any version of the study."""
        return list(self._rows.all().values())

    def missing(self, layer: int) -> list[Replica]:
        """Trainings of a layer that have no row yet."""
        run, done = self._run(layer), self._rows.all()
        return [replica for replica, _ in self._measured(layer) if self._key(run, replica) not in done]

    def run(self, minutes: float | None = None, layer: int | None = None) -> int:
        """Train and measure what is missing; returns how many rows came.

        Args: minutes: begin nothing new after this time.  layer: only this one, so that processes can share a study;
            None: all.
        Raises: EvaluationError that names what could not be trained or measured, after all else is done; anything that
            is not one of our errors at once. Rows so far are on disk.
        """
        started, n_rows, failures = time.monotonic(), 0, list[str]()
        for own in self.layers if layer is None else [layer]:
            # One layer's activations and model at a time.
            run, is_ready = self._run(own), False
            for replica in self.missing(own):
                if minutes is not None and time.monotonic() - started > 60 * minutes:
                    logger.info("study %s: %g minutes are over, %d rows this time", self.config.name, minutes, n_rows)
                    break
                if not is_ready:
                    run.prepare()
                    run.harvest()
                    is_ready = True
                try:
                    row = self._row(run, replica, self.layers[own].cells[replica.name])
                except KsvdSaeError as error:
                    logger.error("%s failed: %s", replica.label, error.what)
                    failures.append(f"layer {own}, {replica.label}: {error}")
                    continue
                self._rows.append(self._key(run, replica), row)
                n_rows += 1
        if failures:
            raise EvaluationError(
                f"study {self.config.name}: {len(failures)} dictionaries have no rows; the others are done",
                cause="\n".join(failures),
                cure="change these entries of the study and run it again",
            )
        return n_rows

    def _run(self, layer: int) -> Run:
        return Run(self.layers[layer].config, self.results, self.cache)

    def _measured(self, layer: int) -> Iterator[tuple[Replica, Cell]]:
        """Whole seeds first, so that a study that stops early has them."""
        grid = self.layers[layer]
        chosen = [replica for replica in replicas(grid.config) if replica.name in grid.cells]
        for replica in sorted(chosen, key=lambda replica: -1 if replica.seed is None else replica.seed):
            yield replica, grid.cells[replica.name]

    def _key(self, run: Run, replica: Replica) -> str:
        evals = {section.name: section.model_dump(mode="json") for section in run.config.evaluation.evals()}
        return content_hash({"dictionary": run.content(replica), "evals": evals})

    def _row(self, run: Run, replica: Replica, cell: Cell) -> dict[str, Any]:
        trained = run.train_replica(replica)
        results = run.at_once(trained)
        scores = {name: value for r in results for name, value in r.metrics[trained.panelist].items()}
        logger.info("%s: FVU %.4f, nats lost %.4f", replica.label, scores["fvu"], scores["nats_lost"])
        entered = run.config.dictionaries[cell.trained]
        learned = run.config.source_of(entered) or entered
        return {
            "entry": cell.entry,
            "kind": entered.kind,
            "sae": entered.is_sae,
            "weighting": entered.metric.kind,
            "layer": cell.layer,
            "k": cell.k,
            "seed": replica.seed,
            "coding": cell.coding,
            "coding_k": trained.manifest["k"],
            "n_atoms": learned.size or trained.manifest["d_sae"],
            **scores,
            "n_predictions": next(r.averaged_over(trained.panelist) for r in results if r.eval == LossEval.name),
            "samples_seen": trained.manifest["samples_seen"],
            "train_seconds": run.trained_seconds(replica),
        }
