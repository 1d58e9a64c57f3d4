"""SAEBench's RAVEL: an attribute of an entity changed, its others kept."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator
from typing_extensions import Self

from ksvd_sae.evals.base import LAYER_OUTPUT, Column, EvalResults, EvalSetting, Panelist, SeededEval, Work
from ksvd_sae.evals.items import Item, of_groups
from ksvd_sae.offline import ravel as own_prompts

# Of SAEBench's own data set, of each kind; tokens of a prompt.
_ALL_PROMPTS, _PROMPT_TOKENS = 50_000, 18


class RavelEval(SeededEval):
    """SAEBench's RAVEL: how well an attribute of an entity is changed without changing its others.

    Left out of SAEBench's own: ``top_n_templates``, which its version 0.6.0 does not read, and ``train_mdas``, which
    trains a rotation in place of the dictionary.
    """

    dataset: str | None = Field(None, description="null: adamkarvonen/ravel_prompts; own-ravel: our small set")
    attributes: dict[str, list[str]] = Field(
        default_factory=lambda: {
            "city": ["Country", "Continent", "Language"],
            "nobel_prize_winner": ["Country of Birth", "Field", "Gender"],
        },
        min_length=1,
        description="kind of entity -> its attributes, two or more",
    )
    top_n_entities: int = Field(500, ge=2, description="those that most prompts are answered right for")
    downsample: int | None = Field(None, ge=2, description="prompts asked of each kind; null: all")
    pairs_per_attribute: int = Field(5000, ge=2)
    train_fraction: float = Field(0.7, gt=0, lt=1)
    learning_rate: float = Field(1e-3, gt=0)
    epochs: int = Field(2, ge=1)
    n_generated_tokens: int = Field(6, ge=1)
    # As SAEBench's command line has it for Gemma-2-2B; the 2048 of its config's default fits no GPU.
    llm_batch_prompts: int = Field(8, ge=1)

    name: ClassVar[str] = "ravel"
    hooks: ClassVar[str] = LAYER_OUTPUT
    cost: ClassVar[str] = "the whole language model: answers once for a panel, masks with gradients for each"
    demo_seconds: ClassVar[float] = 200
    loads_own_model: ClassVar[bool] = True
    items_are: ClassVar[str] = "attributes"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "RAVEL",
            "ravel",
            "disentanglement_score",
            "score",
            "mean of cause and isolation: an attribute of an entity changed, its others kept (fraction of pairs)",
            "higher",
            matters=0.02,
            optional=True,
        ),
        Column(
            "RAVEL cause",
            "ravel",
            "cause_score",
            "score",
            "how often swapping an attribute's latents brings the other entity's answer (fraction of pairs)",
            "higher",
            matters=0.02,
            optional=True,
        ),
        Column(
            "RAVEL isolation",
            "ravel",
            "isolation_score",
            "score",
            "how often the answers to other attributes stay as they were (fraction of pairs)",
            "higher",
            matters=0.02,
            optional=True,
        ),
    )
    published: ClassVar = {
        "dataset": None,
        "attributes": {
            "city": ["Country", "Continent", "Language"],
            "nobel_prize_winner": ["Country of Birth", "Field", "Gender"],
        },
        "top_n_entities": 500,
        "downsample": None,
        "pairs_per_attribute": 5000,
        "train_fraction": 0.7,
        "learning_rate": 1e-3,
        "epochs": 2,
        "n_generated_tokens": 6,
        "seed": 42,
    }

    @property
    def right_prompts_needed(self) -> int:
        """Prompts of an attribute that must be answered right: SAEBench makes a pair of each and as many for isolation,
        splits them, and leaves out what does not fill a batch."""
        n = self.llm_batch_prompts
        while min(int(2 * n * self.train_fraction), 2 * n - int(2 * n * self.train_fraction)) < self.llm_batch_prompts:
            n += 1
        return n

    @model_validator(mode="after")
    def _something_to_isolate_from_and_to_train_on(self) -> Self:
        for kind, attributes in self.attributes.items():
            if len(set(attributes)) < 2 or len(set(attributes)) < len(attributes):
                raise ValueError(f"ravel.attributes: {kind} needs two or more different attributes, has {attributes}")
        if self.pairs_per_attribute < self.right_prompts_needed:
            raise ValueError(
                f"ravel.pairs_per_attribute = {self.pairs_per_attribute} fills no batch of llm_batch_prompts = "
                f"{self.llm_batch_prompts} in both parts of the split; at least {self.right_prompts_needed}"
            )
        return self

    def work(self, heldout_tokens: int, trainings: int) -> Work:
        asked = len(self.attributes) * (self.downsample or _ALL_PROMPTS)
        # As many pairs to isolate as to cause; what is put in is kept. Those to train on go there and back.
        prompts = 2 * self.pairs_per_attribute * sum(map(len, self.attributes.values()))
        trained, tested = self.epochs * self.train_fraction * prompts, (1 - self.train_fraction) * prompts
        return Work(
            read=asked * (_PROMPT_TOKENS + self.n_generated_tokens),
            rest=asked * (_PROMPT_TOKENS + self.n_generated_tokens),
            predicted=asked * self.n_generated_tokens,
            read_each=trained * _PROMPT_TOKENS + tested * (_PROMPT_TOKENS + self.n_generated_tokens),
            rest_each=3 * trained * _PROMPT_TOKENS + tested * (_PROMPT_TOKENS + self.n_generated_tokens),
            predicted_each=trained + tested * self.n_generated_tokens,
        )

    @classmethod
    def items(cls, result: Mapping[str, Any]) -> Iterator[Item]:
        fields = {
            "disentanglement_score": "disentangle_score",
            "cause_score": "cause_score",
            "isolation_score": "isolation_score",
        }
        for metric, field in fields.items():
            kinds = result.get("eval_result_unstructured", {}).items()
            yield from of_groups(metric, {kind: {name: s[field] for name, s in of.items()} for kind, of in kinds})

    def run(self, panel: list[Panelist], setting: EvalSetting, output: Path) -> EvalResults:
        from ksvd_sae.evals.ravel.run import run_ravel

        return run_ravel(panel, self, setting, output)

    def write_data(self, folder: Path) -> None:
        if self.dataset == own_prompts.NAME:
            own_prompts.write_files(folder / own_prompts.NAME)
