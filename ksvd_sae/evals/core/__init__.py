"""SAEBench's core: loss recovered, KL, L0."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from ksvd_sae.evals.base import IN_A_BLOCK, Column, Eval, EvalResults, EvalSetting, Panelist, Work
from ksvd_sae.evals.items import Item, of_ratios

# Key of a result that SAEBench does not write: metric -> sums of losses by context, and over how many tokens.
CONTEXTS = "contexts"


class CoreEval(Eval):
    """SAEBench's core eval."""

    dataset: str = Field("Skylion007/openwebtext", description="a Hub data set; heldout: the held-out documents")
    context_tokens: int = Field(128, ge=2)
    batch_contexts: int = Field(16, ge=1)
    reconstruction_batches: int = Field(200, ge=1)
    sparsity_batches: int = Field(2000, ge=1)

    name: ClassVar[str] = "core"
    hooks: ClassVar[str] = IN_A_BLOCK
    on_by_default: ClassVar[bool] = True
    cost: ClassVar[str] = "the language model over all its text once for a panel; its layers after the hook for each"
    demo_seconds: ClassVar[float] = 70
    items_are: ClassVar[str] = "contexts"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "loss recovered",
            "core",
            "ce_loss_score",
            "score",
            "how much of the cross-entropy between the model with its activations zeroed and the untouched model "
            "the reconstruction wins back (no unit; 1 is the untouched model, 0 is no better than zeros)",
            "higher",
            matters=0.002,
        ),
        Column(
            "KL",
            "core",
            "kl_div_with_sae",
            "score",
            "KL divergence between the model's next-token distributions with and without the reconstruction "
            "(nats a token)",
            "lower",
            matters=0.02,
        ),
        Column(
            "nats lost",
            "core",
            "ce_loss_with_sae",
            "score",
            "cross-entropy with the reconstruction minus that of the untouched model (nats a token)",
            "lower",
            matters=0.02,
            minus="ce_loss_without_sae",
        ),
    )
    published: ClassVar = {
        "dataset": "Skylion007/openwebtext",
        "context_tokens": 128,
        "batch_contexts": 16,
        "reconstruction_batches": 200,
        "sparsity_batches": 2000,
    }

    def run(self, panel: list[Panelist], setting: EvalSetting, output: Path) -> EvalResults:
        from ksvd_sae.evals.core.run import run_core

        return run_core(panel, self, setting, output)

    @classmethod
    def items(cls, result: Mapping[str, Any]) -> Iterator[Item]:
        sums = result.get(CONTEXTS)
        # Results from before they were kept.
        if sums is None:
            return
        for metric in ("kl_div_with_sae", "ce_loss_with_sae", "ce_loss_without_sae"):
            yield from of_ratios(metric, *sums[metric])
        spliced, clean, zeroed = (sums[f"ce_loss_{which}"][0] for which in ("with_sae", "without_sae", "with_ablation"))
        won_back = [None if nats is None else zero - nats for zero, nats in zip(zeroed, spliced, strict=True)]
        to_win = [zero - nats for zero, nats in zip(zeroed, clean, strict=True)]
        yield from of_ratios("ce_loss_score", won_back, to_win)

    def work(self, heldout_tokens: int, trainings: int) -> Work:
        spliced, read = (
            n * self.batch_contexts * self.context_tokens for n in (self.reconstruction_batches, self.sparsity_batches)
        )
        # Once for the panel as it is, and with zeros: kept are where the second starts and what the first ends with.
        return Work(
            read=spliced + read,
            rest=2 * spliced,
            predicted=2 * spliced,
            held=spliced,
            cached=2 * spliced + read,
            rest_each=spliced,
            predicted_each=spliced,
            coded_each=spliced + read,
        )

    @property
    def n_predictions(self) -> int:
        return self.reconstruction_batches * self.batch_contexts * (self.context_tokens - 1)
