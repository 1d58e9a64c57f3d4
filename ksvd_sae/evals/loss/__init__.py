"""What a dictionary's error does to the model's loss: its reconstructions spliced in, context by context."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from pydantic import Field, JsonValue
from torch import Tensor

from ksvd_sae.errors import TextError
from ksvd_sae.evals.base import Column, EvalSetting, Heldout, Measured, MeasuredHere, Panelist, Work
from ksvd_sae.evals.items import Item

if TYPE_CHECKING:
    from ksvd_sae.evals.loss.splice import Reconstruct, SpliceEvaluator, SpliceScores

# Held-out activations that the anatomy of the error is taken from.
_ANATOMY_SAMPLES = 4096
# Counts up when the same input gives other scores.
_VERSION = 1


class LossEval(MeasuredHere):
    """The next-token loss with reconstructions in the activations' place, on the same held-out contexts for all.

    Beside SAEBench's core: special tokens and outliers, which no dictionary has learned, are left alone; a prediction
    counts by its target; KL is exact; and every context's own loss is in the result, for intervals over contexts.
    """

    contexts: int = Field(16, ge=2, description="held-out contexts to splice into")
    context_tokens: int = Field(97, ge=2, description="their length, with BOS")

    name: ClassVar[str] = "loss"
    of_layers: ClassVar[bool] = True
    at_once: ClassVar[bool] = True
    counts: ClassVar[str] = "n_predictions"
    items_are: ClassVar[str] = "contexts"
    cost: ClassVar[str] = "the language model over the contexts once; its layers after the hook for each dictionary"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "nats lost, spliced",
            "loss",
            "nats_lost",
            "score",
            "cross-entropy with the reconstruction of ordinary tokens minus that of the untouched model "
            "(nats a token, on held-out contexts)",
            "lower",
            matters=0.02,
            optional=True,
        ),
        Column(
            "loss recovered, spliced",
            "loss",
            "loss_recovered",
            "score",
            "how much of the cross-entropy between the model with zeros and the untouched one it wins back (no unit)",
            "higher",
            matters=0.002,
            optional=True,
        ),
        Column(
            "KL, spliced",
            "loss",
            "kl",
            "score",
            "KL divergence of the untouched model's next-token distribution from the spliced one's (nats a token)",
            "lower",
            matters=0.02,
            optional=True,
        ),
        Column(
            "Fisher error",
            "loss",
            "fisher_error",
            "score",
            "mean eᵀFe of the error e, F the mean outer product of the loss's gradient: the rise of the loss to second "
            "order if F were its Hessian, times two (nats)",
            "lower",
            matters=0.04,
            optional=True,
        ),
    )

    def follows_from(self, heldout: Heldout) -> dict[str, JsonValue]:
        return {
            "config": {**self.model_dump(mode="json"), "version": _VERSION},
            "harvest": heldout.harvest_hash,
            "gradients": heldout.gradients_hash,
        }

    def work(self, heldout_tokens: int, trainings: int) -> Work:
        tokens = self.contexts * self.context_tokens
        # Once for the panel as it is, and with zeros.
        return Work(
            read=tokens,
            rest=2 * tokens,
            predicted=2 * tokens,
            held=tokens,
            rest_each=tokens,
            predicted_each=tokens,
            coded_each=tokens + _ANATOMY_SAMPLES,
        )

    def measure(self, panelist: Panelist, setting: EvalSetting, heldout: Heldout) -> Measured:
        sae = panelist.load()

        def reconstruct(x_ND: Tensor) -> Tensor:
            rebuilt_ND: Tensor = sae.decode(sae.encode(x_ND)).detach()
            return rebuilt_ND

        spliced = self._evaluator(setting, heldout).score(reconstruct, panelist.name)
        scores = {
            "loss_recovered": spliced.loss_recovered,
            "nats_lost": spliced.nats_lost,
            "nats_lost_error": spliced.nats_lost_error,
            "kl": spliced.kl,
            "ce_clean": spliced.ce_clean,
            "ce_ablated": spliced.ce_ablated,
            **_error_anatomy(reconstruct, heldout),
        }
        return Measured(scores, spliced.n_tokens, of_contexts(spliced))

    @classmethod
    def items(cls, result: Mapping[str, Any]) -> Iterator[Item]:
        lost = result.get("nats_lost_of_contexts", [])
        # Results from before they were kept: contexts of a length have about as many predictions.
        n = result.get("predictions_of_contexts", [1] * len(lost))
        yield from _means("nats_lost", lost, n)
        if "kl_of_contexts" in result:
            to_lose = result["nats_to_lose_of_contexts"]
            yield from _means("kl", result["kl_of_contexts"], n)
            recovered = [1 - nats / gap for nats, gap in zip(lost, to_lose, strict=True)]
            yield from _means("loss_recovered", recovered, [p * gap for p, gap in zip(n, to_lose, strict=True)])

    def _evaluator(self, setting: EvalSetting, heldout: Heldout) -> "SpliceEvaluator":
        """Made once: it runs the untouched model over the contexts."""
        kept = setting.between_calls
        if self.name not in kept:
            from ksvd_sae.activations.documents import read_documents
            from ksvd_sae.activations.text import contexts
            from ksvd_sae.evals.loss.splice import SpliceEvaluator

            reader = heldout.loaded_reader()
            texts = read_documents(heldout.documents)
            stream = contexts(
                texts, reader.model.tokenizer, self.context_tokens, prepend_bos=heldout.shards.prepend_bos
            )
            tokens = list(islice(stream, self.contexts))
            if len(tokens) < self.contexts:
                raise TextError(
                    f"loss: the held-out documents have {len(tokens)} contexts of {self.context_tokens} tokens",
                    limit=f"contexts: {self.contexts}",
                    cure="hold out more tokens (harvest.heldout_tokens), or ask for fewer contexts",
                )
            # Every token zeroed, as SAEBench's core does: else loss recovered is of another scale than in its tables.
            kept[self.name] = SpliceEvaluator(
                reader.model,
                reader.hook,
                torch.stack(tokens),
                norm_limit=heldout.outlier_limit,
                ablation="all",
            )
        return cast("SpliceEvaluator", kept[self.name])


def _means(metric: str, of_contexts: list[float], weights: list[float]) -> Iterator[Item]:
    for place, (value, weight) in enumerate(zip(of_contexts, weights, strict=True)):
        yield Item(metric, str(place), value, weight)


def of_contexts(spliced: "SpliceScores") -> dict[str, JsonValue]:
    """What the scores are means of, context by context."""
    of_each = {"nats_lost": spliced.nats_lost_C, "kl": spliced.kl_C, "nats_to_lose": spliced.nats_to_lose_C}
    kept: dict[str, JsonValue] = {
        f"{name}_of_contexts": [round(float(value), 6) for value in values] for name, values in of_each.items()
    }
    return {**kept, "predictions_of_contexts": [int(n) for n in spliced.n_C]}


def _error_anatomy(reconstruct: "Reconstruct", heldout: Heldout) -> dict[str, float]:
    """Where the error lies, on held-out tokens.

    fisher_error: mean eᵀFe, the error as the loss sees it to second order (twice the nats, were F the Hessian).
    shrinkage: Σ⟨x̂, x⟩ / Σ‖x‖², centred: below 1 if reconstructions are too short.
    bias: ‖mean error‖² / mean ‖error‖².
    """
    x_BD = next(heldout.shards.batches(_ANATOMY_SAMPLES))
    error_BD = (reconstruct(x_BD) - x_BD).double()
    x_BD = (x_BD - heldout.shards.centre_D.float()).double()
    anatomy = {
        "shrinkage": 1 + float((error_BD * x_BD).sum() / x_BD.square().sum()),
        "bias": float(error_BD.mean(dim=0).square().sum() / error_BD.square().sum(dim=1).mean()),
    }
    if heldout.gradient_moments is not None:
        fisher_DD = heldout.gradient_moments().outer_DD
        anatomy["fisher_error"] = float(((error_BD @ fisher_DD) * error_BD).sum(dim=1).mean())
    return anatomy
