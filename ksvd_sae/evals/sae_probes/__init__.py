"""SAEBench's sparse probing on the data sets of sae-probes, which the package brings along: no Hub is needed."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from ksvd_sae.evals.base import IN_A_BLOCK, Column, EvalResults, EvalSetting, Panelist, SeededEval, Work
from ksvd_sae.evals.items import Item, of_details

# Numbers of latents that SAEBench's format of sae-probes' results has a place for.
ProbeSize = Literal[1, 2, 5, 10, 20, 50, 100]

# A batch's longest text beside its mean; tokens at which texts are cut.
_PADDED, _LONGEST = 1.5, 1024
# Seconds of a data set's probes: on the activations, and on a dictionary's latents.
_PROBE_S, _PROBES_S = 10.0, 3.5


class SaeProbesEval(SeededEval):
    """SAEBench's sparse probing on sae-probes' 113 data sets, which its package brings along."""

    datasets: list[str] | None = Field(
        None, min_length=1, description="null: all 113; names such as 5_hist_fig_ismale choose some"
    )
    reg_type: Literal["l1", "l2"] = Field("l1", description="regularization of the probes, its strength by validation")
    k_values: list[ProbeSize] = Field([1, 2, 5], min_length=1)
    binarize: bool = Field(False, description="probe on whether a latent fires, not on how much")

    name: ClassVar[str] = "sparse_probing_sae_probes"
    # sae-probes could do without; SAEBench wants an SAE's layer, and reads results under names with "blocks." in them.
    hooks: ClassVar[str] = IN_A_BLOCK
    cost: ClassVar[str] = "the language model up to the hook over all texts once for a panel; probes for each"
    demo_seconds: ClassVar[float] = 250
    items_are: ClassVar[str] = "data sets"
    columns: ClassVar[tuple[Column, ...]] = tuple(
        Column(
            f"sae-probes top-{k}",
            "sparse_probing_sae_probes",
            f"sae_top_{k}_test_accuracy",
            "score",
            f"test accuracy of a linear probe on the {latents} at a text's last token "
            "(fraction of texts, mean over data sets)",
            "higher",
            matters=0.02,
            reference="llm_test_accuracy",
            reference_is="a probe on the whole activation",
            optional=True,
        )
        for k, latents in ((1, "single best latent"), (5, "five best latents"))
    )

    @classmethod
    def items(cls, result: Mapping[str, Any]) -> Iterator[Item]:
        yield from of_details(result, "dataset_name", {column.metric: column.metric for column in cls.columns})

    def work(self, heldout_tokens: int, trainings: int) -> Work:
        from sae_probes import DATASETS
        from sae_probes.utils_data import read_numbered_dataset_df

        texts = [read_numbered_dataset_df(name)["prompt"].str.len() for name in self.datasets or DATASETS]
        # Four letters a token; a batch is as long as its longest text.
        tokens = sum(float((lengths * _PADDED / 4 + 2).clip(upper=_LONGEST).sum()) for lengths in texts)
        return Work(
            read=tokens,
            coded_each=sum(map(len, texts)),
            other_s=_PROBE_S * len(texts),
            other_each_s=_PROBES_S * len(texts),
        )

    def run(self, panel: list[Panelist], setting: EvalSetting, output: Path) -> EvalResults:
        from ksvd_sae.evals.sae_probes.run import run_sae_probes

        return run_sae_probes(panel, self, setting, output)
