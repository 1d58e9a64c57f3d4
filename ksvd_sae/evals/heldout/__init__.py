"""Own metrics on held-out activations: error, atoms used, dead latents, coherence."""

from typing import ClassVar

from pydantic import JsonValue

from ksvd_sae.evals.base import Column, EvalSetting, Heldout, Measured, MeasuredHere, Panelist, Reads, Work

_BATCH = 16_384
# Goes up when there are more scores, or others.
_VERSION = 2


class HeldoutEval(MeasuredHere):
    """What a dictionary does on activations that no dictionary has learned from, the same code for every SAE."""

    name: ClassVar[str] = "heldout"
    of_layers: ClassVar[bool] = True
    reads: ClassVar[Reads] = "activations"
    on_by_default: ClassVar[bool] = True
    at_once: ClassVar[bool] = True
    cost: ClassVar[str] = "coding the held-out activations; no language model"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "FVU",
            "heldout",
            "fvu",
            "score",
            "fraction of variance unexplained: squared error over the variance of the activations "
            "(no unit; 0 is perfect, 1 is no better than the mean)",
            "lower",
        ),
        Column(
            "dead",
            "heldout",
            "dead_fraction",
            "percent",
            "latents that no token uses (% of d_sae; in the split view each sign of an atom counts by itself)",
            "lower",
            last=True,
        ),
    )

    def follows_from(self, heldout: Heldout) -> dict[str, JsonValue]:
        return {"harvest": heldout.harvest_hash, "version": _VERSION}

    def work(self, heldout_tokens: int, trainings: int) -> Work:
        return Work(coded_each=heldout_tokens)

    def measure(self, panelist: Panelist, setting: EvalSetting, heldout: Heldout) -> Measured:
        from ksvd_sae.evals.heldout.metrics import heldout_metrics

        measured = heldout_metrics(panelist.load(), heldout.shards.batches(_BATCH))
        density = [round(d, 6) for d in measured.density_F.tolist()]
        return Measured(measured.scores, measured.n_tokens, {"density": density})
