"""Own metrics on held-out activations: error, atoms used, dead latents, coherence."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pydantic import JsonValue
from torch import Tensor

from ksvd_sae.activations.collecting import reading_order
from ksvd_sae.evals.base import Column, EvalSetting, Heldout, Measured, MeasuredHere, Panelist, Reads, Work
from ksvd_sae.evals.items import Item, neighbours, of_ratios

_BATCH = 16_384
# Goes up when there are more scores, or others.
_VERSION = 2


class HeldoutEval(MeasuredHere):
    """What a dictionary does on activations that no dictionary has learned from, the same code for every SAE."""

    name: ClassVar[str] = "heldout"
    reads: ClassVar[Reads] = "activations"
    on_by_default: ClassVar[bool] = True
    at_once: ClassVar[bool] = True
    items_are: ClassVar[str] = "contexts"
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
            matters=0.005,
        ),
        Column(
            "dead",
            "heldout",
            "dead_fraction",
            "percent",
            "latents that no token uses (% of d_sae; in the split view each sign of an atom counts by itself)",
            "lower",
            matters=0.02,
            last=True,
        ),
    )

    def follows_from(self, heldout: Heldout) -> dict[str, JsonValue]:
        return {"harvest": heldout.harvest_hash, "version": _VERSION}

    def work(self, heldout_tokens: int, trainings: int) -> Work:
        return Work(coded_each=heldout_tokens)

    def measure(self, panelist: Panelist, setting: EvalSetting, heldout: Heldout) -> Measured:
        from ksvd_sae.evals.heldout.metrics import heldout_metrics

        item_N = _contexts(heldout)
        measured = heldout_metrics(panelist.load(), heldout.shards.batches(_BATCH), item_N)
        more: dict[str, JsonValue] = {"density": [round(d, 6) for d in measured.density_F.tolist()]}
        if measured.error_I is not None and measured.variance_I is not None:
            for name, sums_I in (("error", measured.error_I), ("variance", measured.variance_I)):
                more[f"{name}_of_contexts"] = [float(f"{value:.7g}") for value in sums_I.tolist()]
        return Measured(measured.scores, measured.n_tokens, more)

    @classmethod
    def items(cls, result: Mapping[str, Any]) -> Iterator[Item]:
        yield from of_ratios("fvu", result.get("error_of_contexts", ()), result.get("variance_of_contexts", ()))


def _contexts(heldout: Heldout) -> Tensor | None:
    """Which stretch of the text, of a context or more, each token is of; None where that is not known, and for images.

    Special tokens and outliers are not among the tokens, so that a stretch is a context give or take some tokens.
    """
    context_tokens = heldout.shards.manifest["key"].get("harvest", {}).get("context_tokens")
    place_N = reading_order(heldout.shards)
    if place_N is None or context_tokens is None:
        return None
    return neighbours(place_N, len(place_N), context_tokens)
