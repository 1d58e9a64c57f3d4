"""SAEBench's targeted probe perturbation (TPP): whether latents of one class are of that class alone."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from ksvd_sae.evals.base import Column, EvalResults, EvalSetting, Panelist, Work
from ksvd_sae.evals.items import Item, of_groups
from ksvd_sae.evals.scr import AblationEval
from ksvd_sae.offline import bbc_news


class TppEval(AblationEval):
    """SAEBench's targeted probe perturbation (TPP)."""

    datasets: list[str] | None = Field(None, description="null: SAEBench's two; bbc-news: the five BBC classes")

    name: ClassVar[str] = "tpp"
    items_are: ClassVar[str] = "classes"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "TPP top-20",
            "tpp",
            "tpp_threshold_20_total_metric",
            "score",
            "how much further a class's own probe falls than those of other classes when the 20 latents that carry "
            "the class are zeroed (difference of test accuracies)",
            "higher",
            matters=0.02,
            optional=True,
        ),
    )
    reads_signs: ClassVar[bool] = True

    @classmethod
    def items(cls, result: Mapping[str, Any]) -> Iterator[Item]:
        for column in cls.columns:
            datasets = result.get("eval_result_unstructured", {}).items()
            yield from of_groups(
                column.metric, {name: {c: s[column.metric] for c, s in of.items()} for name, of in datasets}
            )

    def run(self, panel: list[Panelist], setting: EvalSetting, output: Path) -> EvalResults:
        from ksvd_sae.evals.tpp.run import run_tpp

        return run_tpp(panel, self, setting, output)

    def work(self, heldout_tokens: int, trainings: int) -> Work:
        from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig
        from sae_bench.sae_bench_utils.dataset_info import chosen_classes_per_dataset

        own = {bbc_news.NAME: bbc_news.CLASSES}
        names = ScrAndTppEvalConfig(perform_scr=False).dataset_names if self.datasets is None else self.datasets
        classes = [len(chosen_classes_per_dataset.get(name, own.get(name, ()))) for name in names]
        parts = [self.ablations(1, n, n) for n in classes]
        return Work(*(sum(getattr(part, name) for part in parts) for name in Work.__dataclass_fields__))

    def write_data(self, folder: Path) -> None:
        if bbc_news.NAME in (self.datasets or ()):
            bbc_news.write_probing_dataset(folder / bbc_news.NAME)

    def notes(self) -> list[str]:
        return ["TPP zeroes latents that are larger in a class than elsewhere: of a signed code, no negative ones."]
