"""SAEBench's first-letter absorption: how far latents for a word take the place of the latent for its first letter.

Lower is better. Two scores: the mean absorption fraction (how much of the letter's direction other latents carry) and
full absorption (the share of words on which the letter's latents are silent and another one stands in for them).

Signed codes: k-sparse probes take the latents of the largest weight, not of the largest in size; a latent's part in the
letter's direction counts only where code times cosine is positive, and a latent with a negative code counts as silent.
The scores of signed codes are left as SAEBench gives them.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from ksvd_sae.evals.base import LAYER_OUTPUT, Column, EvalResults, EvalSetting, Panelist, SeededEval, Work
from ksvd_sae.evals.items import Item, of_details

# Words of Gemma's vocabulary; tokens of a prompt with its examples; seconds of probes, of 800 words.
_WORDS, _PROMPT_TOKENS = 140_000, 85
_PROBES_S, _SPARSE_PROBES_S = 80.0, 5.5


class AbsorptionEval(SeededEval):
    """SAEBench's first-letter absorption. Names and defaults are SAEBench's where it has them."""

    vocabulary_sample: int | None = Field(
        None, ge=100, description="words of the model's vocabulary, drawn evenly over letters; null: all"
    )
    prompt_template: str = Field("{word} has the first letter:", pattern=r"\{word\}")
    prompt_token_pos: int = Field(-6, le=-1, description="where the word's token is, from the end of the prompt")
    llm_batch_contexts: int = Field(10, ge=1)
    max_k_value: int = Field(10, ge=1, description="k-sparse probes use 1 to this many latents")
    f1_jump_threshold: float = Field(0.03, description="F1 that another latent must add to count as a split feature")
    k_sparse_probe_l1_decay: float = Field(0.01, ge=0)
    k_sparse_probe_batch_size: int = Field(4096, ge=1)
    k_sparse_probe_num_epochs: int = Field(50, ge=1)
    eval_k_sparse_probe_batch_size: int = Field(24, ge=1)
    precalc_k_sparse_probe_sae_acts: bool = Field(
        False, description="code the words once and not 50 + 26·max_k_value times; needs words × d_sae floats of memory"
    )
    min_gt_probe_f1: float = Field(0.6, ge=0, lt=1, description="letters whose probe on the activations does better")
    # Scores come with their standard deviation over letters, which one letter has not.
    min_feats_for_eval: int = Field(20, ge=2, le=26, description="letters that there must be")
    llm_cache_bytes: int = Field(2**30, ge=0, description="activations kept so that the LLM runs once for the panel")

    name: ClassVar[str] = "absorption"
    hooks: ClassVar[str] = LAYER_OUTPUT
    cost: ClassVar[str] = "the language model over two prompts a word once for a panel; k-sparse probes for each"
    demo_seconds: ClassVar[float] = 200
    items_are: ClassVar[str] = "letters"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "absorption",
            "absorption",
            "mean_absorption_fraction_score",
            "score",
            "how much of a word's first letter other latents carry where the letter's own do not "
            "(fraction, mean over words, then letters)",
            "lower",
            matters=0.02,
            optional=True,
        ),
        Column(
            "full absorption",
            "absorption",
            "mean_full_absorption_score",
            "score",
            "words on which the letter's own latents are silent and another latent stands in for them "
            "(fraction of words, mean over letters)",
            "lower",
            matters=0.02,
            optional=True,
        ),
    )
    reads_signs: ClassVar[bool] = True
    published: ClassVar = {
        "vocabulary_sample": None,
        "prompt_template": "{word} has the first letter:",
        "prompt_token_pos": -6,
        "max_k_value": 10,
        "f1_jump_threshold": 0.03,
        "k_sparse_probe_l1_decay": 0.01,
        "k_sparse_probe_num_epochs": 50,
        "min_gt_probe_f1": 0.6,
        "min_feats_for_eval": 20,
    }
    redefined: ClassVar = {
        "mean_absorption_fraction_score": "the fraction was redefined between SAEBench 0.3.2 and 0.6.0 and became up "
        "to 10 times smaller"
    }

    @classmethod
    def items(cls, result: Mapping[str, Any]) -> Iterator[Item]:
        fields = {
            "mean_absorption_fraction_score": "mean_absorption_fraction",
            "mean_full_absorption_score": "full_absorption_rate",
        }
        yield from of_details(result, "first_letter", fields)

    def work(self, heldout_tokens: int, trainings: int) -> Work:
        words = self.vocabulary_sample or _WORDS
        tested = words / 5
        return Work(
            read=8 * words + _PROMPT_TOKENS * tested,
            coded_each=words + tested,
            other_s=_PROBES_S * words / 800,
            other_each_s=_SPARSE_PROBES_S * words / 800,
        )

    def run(self, panel: list[Panelist], setting: EvalSetting, output: Path) -> EvalResults:
        from ksvd_sae.evals.absorption.run import run_absorption

        return run_absorption(panel, self, setting, output)
