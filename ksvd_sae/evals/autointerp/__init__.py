"""SAEBench's automated interpretability, judged by whom the config says."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, JsonValue, model_validator
from typing_extensions import Self

from ksvd_sae.errors import ConfigError
from ksvd_sae.evals.base import IN_A_BLOCK, Column, EvalResults, EvalSetting, Panelist, SeededEval, Work
from ksvd_sae.evals.items import Item, of_values
from ksvd_sae.strict import Strict

# Seconds of a latent's texts and their lexical judge.
_LEXICAL_S = 0.03


class EndpointConfig(Strict):
    """An OpenAI-compatible endpoint. Its key is read from the environment; one in the config is refused, unshown."""

    model: str = "gpt-4o-mini"
    base_url: str | None = Field(None, description="null: OpenAI's")
    key_variable: str = Field("OPENAI_API_KEY", description="name of the environment variable that holds the key")
    requests_per_minute: int | None = Field(None, ge=1)
    max_retries: int = Field(5, ge=0)
    timeout_s: float = Field(60.0, gt=0)
    input_price: float | None = Field(None, ge=0, description="of a million prompt tokens, in any currency")
    output_price: float | None = Field(None, ge=0, description="of a million answered tokens")

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, raw: Any) -> Any:
        if isinstance(raw, dict):
            _refuse_secrets(raw, cls)
            if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", str(raw.get("key_variable", "KEY"))):
                raise _secret("key_variable", "names a variable in capitals, and this is no such name")
            try:
                url = urlsplit(str(raw.get("base_url") or ""))
            except ValueError:
                raise _secret("base_url", "is no URL") from None
            if url.username or url.password or url.query:
                raise _secret("base_url", "carries a name, a password or a query")
        return raw

    @model_validator(mode="after")
    def _both_prices(self) -> Self:
        if (self.input_price is None) != (self.output_price is None):
            raise ValueError("input_price and output_price belong together")
        return self


def _refuse_secrets(raw: dict[str, Any], model: type[BaseModel]) -> None:
    for name, value in raw.items():
        plain = re.sub(r"[^a-z]", "", str(name).lower())
        secret = plain.endswith(("key", "token", "secret", "password", "bearer", "authorization"))
        if secret and isinstance(value, str) and name not in model.model_fields:
            raise _secret(str(name), "a key does not belong in a config, which is copied beside the results")


def _secret(field: str, why: str) -> ConfigError:
    # Raised past pydantic, whose errors show what they were given.
    return ConfigError(
        f"evaluation.autointerp: {field}: {why}",
        cure="export the key as an environment variable and name that in endpoint.key_variable "
        "(default OPENAI_API_KEY); if the file was shared, replace the key",
    )


class AutoInterpEval(SeededEval):
    """SAEBench's automated interpretability: a judge explains latents by texts and predicts by the explanation.

    It looks at positive activations: of a signed code, the negative half is neither explained nor predicted. A latent
    that fires at fewer places than the texts asked for is shown with texts where it does not fire.
    SAEBench's `scoring: false` (explanations only) is not offered: it gives no score.
    """

    judge: Literal["lexical", "endpoint"] = Field("lexical", description="lexical needs no language model")
    endpoint: EndpointConfig | None = None
    dataset: str = Field("monology/pile-uncopyrighted", description="a Hub data set; heldout: the held-out documents")
    n_latents: int = Field(1000, ge=2)
    min_latents: int | None = Field(None, ge=2, description="fewer judged are an error; null: a tenth of n_latents")
    # The judge's texts are drawn by torch.multinomial, which takes no more than 2²⁴ positions.
    total_tokens: int = Field(2_000_000, ge=1, le=2**24)
    context_tokens: int = Field(128, ge=4)
    llm_batch_contexts: int = Field(32, ge=1)
    dead_latent_threshold: float = Field(15, ge=0, description="a latent that fires no more often is not judged")
    buffer: int = Field(10, ge=1, description="tokens shown on either side")
    no_overlap: bool = True
    act_threshold_frac: float = Field(0.01, ge=0, lt=1)
    max_tokens_in_explanation: int = Field(30, ge=1)
    use_demos_in_explanation: bool = True
    n_top_ex_for_generation: int = Field(10, ge=1)
    n_iw_sampled_ex_for_generation: int = Field(5, ge=1)
    n_top_ex_for_scoring: int = Field(2, ge=1)
    n_random_ex_for_scoring: int = Field(10, ge=1)
    n_iw_sampled_ex_for_scoring: int = Field(2, ge=1)

    name: ClassVar[str] = "autointerp"
    hooks: ClassVar[str] = IN_A_BLOCK
    one_process: ClassVar[bool] = True
    cost: ClassVar[str] = "the language model up to the hook once for a panel; a judge's answers for each latent"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "autointerp",
            "autointerp",
            "autointerp_score",
            "score",
            "how often a judge that explained a latent in words predicts from them whether it fires in a text "
            "(fraction of texts, mean over latents)",
            "higher",
            matters=0.02,
            optional=True,
        ),
    )
    reads_signs: ClassVar[bool] = True
    items_are: ClassVar[str] = "latents"
    own_items: ClassVar[bool] = True
    published: ClassVar = {
        "judge": "gpt-4o-mini",
        "dataset": "monology/pile-uncopyrighted",
        "n_latents": 1000,
        "total_tokens": 2_000_000,
        "context_tokens": 128,
        "n_top_ex_for_generation": 10,
        "n_iw_sampled_ex_for_generation": 5,
        "n_top_ex_for_scoring": 2,
        "n_iw_sampled_ex_for_scoring": 2,
        "n_random_ex_for_scoring": 10,
        "dead_latent_threshold": 15,
        "seed": 42,
    }

    @property
    def least_latents(self) -> int:
        return self.min_latents or max(2, self.n_latents // 10)

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, raw: Any) -> Any:
        if isinstance(raw, dict):
            _refuse_secrets(raw, cls)
        return raw

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.judge == "endpoint" and self.endpoint is None:
            raise ValueError("judge: endpoint needs an `endpoint` (its model, and its base_url if it is not OpenAI's)")
        if self.least_latents > self.n_latents:
            raise ValueError("min_latents is more than n_latents")
        if 2 * self.buffer >= self.context_tokens:
            raise ValueError("buffer: no token has that many on both sides within context_tokens")
        # At least one text a context can be drawn, whichever overlap.
        least = (self.n_top_ex_for_generation + self.n_top_ex_for_scoring) * self.context_tokens
        if self.total_tokens < least:
            raise ValueError(f"total_tokens: the top examples alone need {least}")
        return self

    @property
    def judge_name(self) -> str:
        return self.endpoint.model if self.judge == "endpoint" and self.endpoint is not None else self.judge

    def run(self, panel: list[Panelist], setting: EvalSetting, output: Path) -> EvalResults:
        from ksvd_sae.evals.autointerp.run import run_autointerp

        return run_autointerp(panel, self, setting, output)

    def work(self, heldout_tokens: int, trainings: int) -> Work:
        judged_s = _LEXICAL_S * self.n_latents if self.judge == "lexical" else 0.0
        tokens = self.total_tokens
        return Work(read=tokens, cached=tokens, coded_each=tokens, other_each_s=judged_s)

    @classmethod
    def items(cls, result: Mapping[str, Any]) -> Iterator[Item]:
        latents = result.get("eval_result_unstructured", {})
        yield from of_values("autointerp_score", ((latent, one.get("score")) for latent, one in latents.items()))

    def as_published(self) -> dict[str, JsonValue]:
        return {**super().as_published(), "judge": self.judge_name}

    def notes(self) -> list[str]:
        n_active = self.n_top_ex_for_scoring + self.n_iw_sampled_ex_for_scoring
        never = self.n_random_ex_for_scoring / (n_active + self.n_random_ex_for_scoring)
        note = (
            f"Autointerp: a judge that always says 'not active' scores {never:.2f}. It looks at positive activations "
            "only: of signed codes, half is not judged, in their split view both halves. "
        )
        if self.judge == "lexical":
            return [
                note + "The lexical judge explains a latent by its tokens and cannot see meaning: compare its scores "
                "with each other, not with those of a language model."
            ]
        return [note + "Scores of other judges are not comparable."]
