"""SAEBench's sparse probing: what a few latents tell of a text's class."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from ksvd_sae.evals.base import IN_A_BLOCK, Column, EvalResults, EvalSetting, Panelist, SeededEval, Work
from ksvd_sae.evals.items import Item, of_groups
from ksvd_sae.offline import bbc_news


class SparseProbingEval(SeededEval):
    """SAEBench's sparse probing."""

    datasets: list[str] | None = Field(None, description="null: SAEBench's eight; bbc-news: the five BBC classes")
    train_set_size: int = Field(4000, ge=4)
    test_set_size: int = Field(1000, ge=4)
    context_tokens: int = Field(128, ge=2)
    llm_batch_contexts: int = Field(32, ge=1)
    k_values: list[int] = Field(default_factory=lambda: [1, 2, 5])

    name: ClassVar[str] = "sparse_probing"
    hooks: ClassVar[str] = IN_A_BLOCK
    on_by_default: ClassVar[bool] = True
    items_are: ClassVar[str] = "classes"
    cost: ClassVar[str] = "the language model up to the hook over all texts once for a panel; probes for each"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "probing top-1",
            "sparse_probing",
            "sae_top_1_test_accuracy",
            "score",
            "test accuracy of a linear probe on the single best latent (fraction of texts)",
            "higher",
            matters=0.02,
            reference="llm_top_1_test_accuracy",
        ),
        Column(
            "probing top-5",
            "sparse_probing",
            "sae_top_5_test_accuracy",
            "score",
            "test accuracy of a linear probe on the five best latents (fraction of texts)",
            "higher",
            matters=0.02,
            reference="llm_top_5_test_accuracy",
        ),
    )
    published: ClassVar = {
        "datasets": None,
        "train_set_size": 4000,
        "test_set_size": 1000,
        "context_tokens": 128,
        "seed": 42,
    }

    def run(self, panel: list[Panelist], setting: EvalSetting, output: Path) -> EvalResults:
        from ksvd_sae.evals.sparse_probing.run import run_sparse_probing

        return run_sparse_probing(panel, self, setting, output)

    def work(self, heldout_tokens: int, trainings: int) -> Work:
        from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
        from sae_bench.sae_bench_utils.dataset_info import chosen_classes_per_dataset

        own = {bbc_news.NAME: bbc_news.CLASSES}
        names = SparseProbingEvalConfig().dataset_names if self.datasets is None else self.datasets
        classes = sum(len(chosen_classes_per_dataset.get(name, own.get(name, ()))) for name in names)
        tokens = classes * (self.train_set_size // 2 + self.test_set_size // 2) * self.context_tokens
        return Work(read=tokens, kept=tokens, coded_each=tokens)

    def write_data(self, folder: Path) -> None:
        if bbc_news.NAME in (self.datasets or ()):
            bbc_news.write_probing_dataset(folder / bbc_news.NAME)

    @classmethod
    def items(cls, result: Mapping[str, Any]) -> Iterator[Item]:
        for column in cls.columns:
            metrics = result.get("eval_result_unstructured", {}).items()
            yield from of_groups(column.metric, {dataset: of.get(column.metric, {}) for dataset, of in metrics})

    def notes(self) -> list[str]:
        if self.datasets != [bbc_news.NAME]:
            return []
        return [
            "Sparse probing ran SAEBench's code on the five classes of BBC news, not on SAEBench's own eight data "
            "sets: compare these accuracies with each other, not with published ones."
        ]
