"""Run a study: train each cell, measure it, append a row; what has a row is not done again."""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksvd_sae.activations.harvest import HELDOUT_DOCUMENTS
from ksvd_sae.errors import EvaluationError, KsvdSaeError, ManifestError, TextError
from ksvd_sae.evals.heldout import heldout_metrics
from ksvd_sae.evals.loss import SpliceEvaluator
from ksvd_sae.methods.recoding import as_dictionary
from ksvd_sae.methods.trainers import ALGORITHM, training_fields
from ksvd_sae.run.config import RunConfig
from ksvd_sae.run.grid import Cell, CodingVariant, StudyConfig, cells
from ksvd_sae.run.pipeline import Run
from ksvd_sae.run.trained import TrainedDictionary
from ksvd_sae.store import commit, content_hash

logger = logging.getLogger(__name__)
ROWS = "rows.jsonl"
OWN_ENCODER = "own"
_HELDOUT_BATCH = 16_384


@dataclass
class Study:
    """A study and its rows on disk.

    Args: runs: the base run at each layer.  results: folder that holds results/<name>.
    """

    config: StudyConfig
    runs: dict[int, RunConfig]
    results: Path = Path("results")
    cache: Path | None = None

    @property
    def folder(self) -> Path:
        return self.results / self.config.name

    def rows(self) -> list[dict[str, Any]]:
        """Rows measured so far, of any version of the study; the last of the same key counts."""
        path = self.folder / ROWS
        if not path.exists():
            return []
        found: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ManifestError(
                    f"reading {path}: line {number} is no row",
                    cause="a write that was cut off",
                    cure="delete that line",
                ) from error
            found[row["key"]] = row
        return list(found.values())

    def missing(self) -> Iterator[tuple[Cell, dict[str, CodingVariant | None]]]:
        """Cells with the codings that have no row yet."""
        done = {row["key"] for row in self.rows()}
        for cell in cells(self.config):
            codings = cell.codings or {OWN_ENCODER: None}
            left = {name: variant for name, variant in codings.items() if self._key(cell, variant) not in done}
            if left:
                yield cell, left

    def run(self, minutes: float | None = None, layer: int | None = None) -> int:
        """Train and measure what is missing; returns how many rows came.

        Args: minutes: begin no new cell after this time.  layer: only this one, so that processes can share a study;
            None: all.
        Raises: EvaluationError that names the cells that could not be trained or measured, after all others are done;
            anything that is not one of our errors at once. Rows so far are on disk.
        """
        started, n_rows = time.monotonic(), 0
        failures: list[str] = []
        benches: dict[int, _Bench] = {}
        for cell, codings in list(self.missing()):
            if layer not in (None, cell.layer):
                continue
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                logger.info("study %s: %g minutes are over, %d rows this time", self.config.name, minutes, n_rows)
                break
            if cell.layer not in benches:
                # One layer's activations, logits and model at a time.
                benches.clear()
                benches[cell.layer] = _Bench(self.config, self.runs[cell.layer], self.cache)
            try:
                for row in self._rows_of(cell, codings, benches[cell.layer]):
                    self._append(row)
                    n_rows += 1
            except KsvdSaeError as error:
                logger.error("%s failed: %s", cell.name, error.what)
                failures.append(f"{cell.name}: {error}")
        if failures:
            raise EvaluationError(
                f"study {self.config.name}: {len(failures)} dictionaries have no rows, or not all; the others are done",
                cause="\n".join(failures),
                cure="change these entries of the study and run it again",
            )
        return n_rows

    def _rows_of(
        self, cell: Cell, codings: dict[str, CodingVariant | None], bench: "_Bench"
    ) -> Iterator[dict[str, Any]]:
        trained = bench.run.train_one(cell.name, cell.dictionary, bench.train, cell.of)
        for name, variant in codings.items():
            row = {"key": self._key(cell, variant), **_identity(cell, name, variant)}
            row |= bench.measure(trained, variant) | _training(trained)
            logger.info("%s, %s: FVU %.4f, nats lost %.4f", cell.name, name, row["fvu"], row["nats_lost"])
            yield {**row, "commit": commit()}

    def _key(self, cell: Cell, variant: CodingVariant | None) -> str:
        """What a row's numbers follow from."""
        run = self.runs[cell.layer]
        coding = None if variant is None else variant.model_dump(mode="json")
        # Left out where there is none: rows from before an entry could take another's atoms stay valid.
        of = {} if cell.of is None else {"of": [training_fields(cell.of, seed=True), ALGORITHM.get(cell.of.kind)]}
        return content_hash(
            {
                **of,
                "model": run.model.model_dump(mode="json"),
                "text": run.text.model_dump(mode="json"),
                "harvest": run.harvest.model_dump(mode="json"),
                "dictionary": training_fields(cell.dictionary, seed=True),
                "algorithm": ALGORITHM.get(cell.dictionary.kind),
                "coding": coding,
                "contexts": [self.config.contexts, self.config.context_tokens],
            }
        )

    def _append(self, row: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        clean = {k: None if isinstance(v, float) and v != v else v for k, v in row.items()}
        with (self.folder / ROWS).open("a") as file:
            file.write(json.dumps(clean) + "\n")


def _identity(cell: Cell, name: str, variant: CodingVariant | None) -> dict[str, Any]:
    config = cell.dictionary
    weighting = getattr(config, "weighting", None)
    return {
        "entry": cell.entry,
        "kind": config.kind,
        "weighting": weighting.kind if weighting is not None else "none",
        "layer": cell.layer,
        "k": cell.k,
        "seed": cell.seed,
        "coding": name,
        "coding_k": cell.k if variant is None else variant.k_of(cell.k),
        "n_atoms": getattr(config if cell.of is None else cell.of, "n_atoms", cell.k),
    }


def _training(trained: TrainedDictionary) -> dict[str, Any]:
    return {"samples_seen": trained.manifest["samples_seen"], "train_seconds": trained.manifest["seconds"]}


class _Bench:
    """One layer's run, model, held-out activations and contexts."""

    def __init__(self, study: StudyConfig, config: RunConfig, cache: Path | None):
        self.run = Run(config, cache=cache)
        self.run.prepare()
        self._study = study
        self.run.harvest()
        self.train, self._heldout = self.run.shards("train"), self.run.shards("heldout")

    @cached_property
    def _splice(self) -> SpliceEvaluator:
        from ksvd_sae.activations.language import load_model
        from ksvd_sae.activations.text import contexts

        model = load_model(self.run.config.model, self.run.device)
        path = self.run.harvest_folder / HELDOUT_DOCUMENTS
        texts = (json.loads(line)["text"] for line in path.read_text().splitlines())
        wanted = self._study.contexts
        tokens = list(islice(contexts(texts, model.tokenizer, self._study.context_tokens), wanted))
        if len(tokens) < wanted:
            raise TextError(
                f"study: the held-out documents have {len(tokens)} contexts of {self._study.context_tokens} tokens",
                limit=f"contexts: {wanted}",
                cure="hold out more tokens (harvest.heldout_tokens), or ask for fewer contexts",
            )
        limit = self._heldout.manifest["statistics"]["outlier_limit"]
        # Every token zeroed, as SAEBench's core does: else loss recovered is of another scale than in its tables.
        hook = self.run.config.model.hook
        return SpliceEvaluator(model, hook, torch.stack(tokens), norm_limit=limit, ablation="all")

    @cached_property
    def _fisher_DD(self) -> Tensor | None:
        """Mean g gᵀ of the loss's gradient, raw units, if the harvest has it."""
        if not self.run.config.harvest.gradient_tokens:
            return None
        return self.run.gradient_moments().outer_DD

    def measure(self, trained: TrainedDictionary, variant: CodingVariant | None) -> dict[str, float]:
        """Error and behaviour of one dictionary under one coding, on held-out tokens and contexts."""
        sae = self.run.load_sae(trained)
        if variant is not None:
            dictionary = as_dictionary(trained.config, trained.folder, self.train, self.run.setting())
            changes: dict[str, Any] = {"coder": variant.coder, "rtol": variant.rtol, "k": variant.k_of(dictionary.k)}
            if variant.nonnegative is not None:
                changes["nonnegative"] = variant.nonnegative
            if changes["k"] != dictionary.k:
                changes["max_steps"] = None
            if variant.coder != "matryoshka":
                changes["groups"] = None
            sae = self.run.wrap(replace(dictionary, **changes))
        held = heldout_metrics(sae, self._heldout.batches(_HELDOUT_BATCH))

        def reconstruct(x_ND: Tensor) -> Tensor:
            rebuilt_ND: Tensor = sae.decode(sae.encode(x_ND)).detach()
            return rebuilt_ND

        scores = self._splice.score(reconstruct, trained.name)
        return {
            **{name: held.scores[name] for name in ("fvu", "l0", "dead_fraction")},
            **self._error_anatomy(reconstruct),
            "loss_recovered": scores.loss_recovered,
            "nats_lost": scores.nats_lost,
            "nats_lost_error": scores.nats_lost_error,
            "kl": scores.kl,
            "ce_clean": scores.ce_clean,
            "ce_ablated": scores.ce_ablated,
            "n_predictions": scores.n_tokens,
        }

    def _error_anatomy(self, reconstruct: Any) -> dict[str, float]:
        """Where the error lies, on held-out tokens.

        fisher_error: mean eᵀFe, the error as the loss sees it to second order (twice the nats, were F the Hessian).
        shrinkage: Σ⟨x̂, x⟩ / Σ‖x‖², centred: below 1 if reconstructions are too short.
        bias: ‖mean error‖² / mean ‖error‖².
        """
        centre_D = self._heldout.centre_D.float()
        x_BD = next(self._heldout.batches(4096))
        error_BD = (reconstruct(x_BD) - x_BD).double()
        x_BD = (x_BD - centre_D).double()
        anatomy = {
            "shrinkage": 1 + float((error_BD * x_BD).sum() / x_BD.square().sum()),
            "bias": float(error_BD.mean(dim=0).square().sum() / error_BD.square().sum(dim=1).mean()),
        }
        if self._fisher_DD is not None:
            anatomy["fisher_error"] = float(((error_BD @ self._fisher_DD) * error_BD).sum(dim=1).mean())
        return anatomy
