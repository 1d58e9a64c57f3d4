"""SAEBench's spurious correlation removal (SCR), and what it has in common with targeted probe perturbation (TPP)."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator
from typing_extensions import Self

from ksvd_sae.evals.base import IN_A_BLOCK, EvalResults, EvalSetting, Panelist, SeededEval, Work
from ksvd_sae.evals.items import Item, of_details
from ksvd_sae.offline import biographies

_ITEMS_OF = "scr_metric_threshold_20"

# Seconds of a class' ablation, as the demo's texts take them, beside codes.
_ABLATED_S = 0.33


class AblationEval(SeededEval):
    """Settings of both evals: probes of classes are trained, the latents that carry one are zeroed."""

    datasets: list[str] | None = None
    train_set_size: int = Field(4000, ge=8)
    test_set_size: int = Field(1000, ge=8)
    context_tokens: int = Field(
        128, ge=2, description="no more than the texts have: SAEBench ablates latents in padding too"
    )
    llm_batch_contexts: int = Field(32, ge=1)
    sae_batch_texts: int = Field(125, ge=1)
    probe_epochs: int = Field(20, ge=1)
    n_values: list[Annotated[int, Field(gt=0)]] = Field(default_factory=lambda: [2, 5, 10, 20, 50, 100, 500])

    hooks: ClassVar[str] = IN_A_BLOCK
    cost: ClassVar[str] = "the language model up to the hook over all texts once for a panel; coding them for each"
    published: ClassVar = {
        "datasets": None,
        "train_set_size": 4000,
        "test_set_size": 1000,
        "context_tokens": 128,
        "probe_epochs": 20,
        "seed": 42,
    }

    def ablations(self, times: int, classes: int, ablated: int) -> Work:
        """Classes of texts, of which some are told by probes and ablated with each of ``n_values``."""
        train, test = (size // 2 * self.context_tokens for size in (self.train_set_size, self.test_set_size))
        texts = times * classes * (train + test)
        coded = times * ablated * (2 * train + len(self.n_values) * classes * test)
        other_s = _ABLATED_S * times * ablated * len(self.n_values)
        return Work(read=texts, kept=texts, coded_each=coded, other_each_s=other_s)


class ScrEval(AblationEval):
    """SAEBench's spurious correlation removal (SCR).

    It has no column of the headline table: at its usual settings it tells good dictionaries badly from others (arXiv
    2605.18229).
    """

    datasets: list[str] | None = Field(
        None, description="null: SAEBench's two; templated-bias_in_bios: short biographies from templates"
    )
    pairs: dict[str, list[tuple[str, str]]] | None = Field(
        None, description="data set -> pairs of professions; null: SAEBench's"
    )

    name: ClassVar[str] = "scr"
    items_are: ClassVar[str] = "pairs of classes"
    demo_seconds: ClassVar[float] = 70
    published: ClassVar = {**AblationEval.published, "pairs": None}

    @classmethod
    def items(cls, result: Mapping[str, Any]) -> Iterator[Item]:
        yield from of_details(result, "dataset_name", {_ITEMS_OF: _ITEMS_OF})

    def work(self, heldout_tokens: int, trainings: int) -> Work:
        from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig

        pairs = ScrAndTppEvalConfig().column1_vals_lookup if self.pairs is None else self.pairs
        n_pairs = sum(len(of) for name, of in pairs.items() if self.datasets is None or name in self.datasets)
        # Of each pair: professions and genders, each with its opposite, and both at once.
        return self.ablations(n_pairs, classes=6, ablated=3)

    @model_validator(mode="after")
    def _every_data_set_has_pairs(self) -> Self:
        missing = set(self.datasets or ()) - set(self.pairs or ())
        if self.datasets is not None and missing:
            raise ValueError(f"scr.pairs has no professions for {', '.join(sorted(missing))}")
        return self

    def run(self, panel: list[Panelist], setting: EvalSetting, output: Path) -> EvalResults:
        from ksvd_sae.evals.scr.run import run_scr

        return run_scr(panel, self, setting, output)

    def write_data(self, folder: Path) -> None:
        if biographies.NAME in (self.datasets or ()):
            # SAEBench takes a quarter of a set from each profession and gender, and twice that where they are biased.
            sizes = (size // 2 + 1 for size in (self.train_set_size, self.test_set_size))
            biographies.write_dataset(folder / biographies.NAME, *sizes)
