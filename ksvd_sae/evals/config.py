"""Which evals a run has and what its report shows, as typed values; part of config.py's run."""

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ksvd_sae.errors import ConfigError


class Strict(BaseModel):
    """Unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class CoreConfig(Strict):
    """SAEBench's core eval."""

    dataset: str = Field("Skylion007/openwebtext", description="a Hub data set; heldout: the held-out documents")
    context_tokens: int = Field(128, ge=2)
    batch_contexts: int = Field(16, ge=1)
    reconstruction_batches: int = Field(200, ge=1)
    sparsity_batches: int = Field(2000, ge=1)


class SparseProbingConfig(Strict):
    """SAEBench's sparse probing."""

    datasets: list[str] | None = Field(None, description="null: SAEBench's eight; bbc-news: the five BBC classes")
    train_set_size: int = Field(4000, ge=4)
    test_set_size: int = Field(1000, ge=4)
    context_tokens: int = Field(128, ge=2)
    llm_batch_contexts: int = Field(32, ge=1)
    k_values: list[int] = Field(default_factory=lambda: [1, 2, 5])
    seed: int = 42


# Numbers of latents that SAEBench's format of sae-probes' results has a place for.
ProbeSize = Literal[1, 2, 5, 10, 20, 50, 100]


class SaeProbesConfig(Strict):
    """SAEBench's sparse probing on sae-probes' 113 data sets, which its package brings along."""

    datasets: list[str] | None = Field(
        None, min_length=1, description="null: all 113; names such as 5_hist_fig_ismale choose some"
    )
    reg_type: Literal["l1", "l2"] = Field("l1", description="regularization of the probes, its strength by validation")
    k_values: list[ProbeSize] = Field([1, 2, 5], min_length=1)
    binarize: bool = Field(False, description="probe on whether a latent fires, not on how much")
    seed: int = 42


class ScrConfig(Strict):
    """SAEBench's spurious correlation removal (SCR)."""

    datasets: list[str] | None = Field(
        None, description="null: SAEBench's two; templated-bias_in_bios: short biographies from templates"
    )
    pairs: dict[str, list[tuple[str, str]]] | None = Field(
        None, description="data set -> pairs of professions; null: SAEBench's"
    )
    train_set_size: int = Field(4000, ge=8)
    test_set_size: int = Field(1000, ge=8)
    context_tokens: int = Field(
        128, ge=2, description="no more than the texts have: SAEBench ablates latents in padding too"
    )
    llm_batch_contexts: int = Field(32, ge=1)
    sae_batch_texts: int = Field(125, ge=1)
    probe_epochs: int = Field(20, ge=1)
    n_values: list[Annotated[int, Field(gt=0)]] = Field(default_factory=lambda: [2, 5, 10, 20, 50, 100, 500])
    seed: int = 42

    @model_validator(mode="after")
    def _every_data_set_has_pairs(self) -> "ScrConfig":
        missing = set(self.datasets or ()) - set(self.pairs or ())
        if self.datasets is not None and missing:
            raise ValueError(f"scr.pairs has no professions for {', '.join(sorted(missing))}")
        return self


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
    def _both_prices(self) -> "EndpointConfig":
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


class AutoInterpConfig(Strict):
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
    seed: int = 42

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
    def _fits(self) -> "AutoInterpConfig":
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


class RavelConfig(Strict):
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
    seed: int = 42

    @property
    def right_prompts_needed(self) -> int:
        """Prompts of an attribute that must be answered right: SAEBench makes a pair of each and as many for isolation,
        splits them, and leaves out what does not fill a batch."""
        n = self.llm_batch_prompts
        while min(int(2 * n * self.train_fraction), 2 * n - int(2 * n * self.train_fraction)) < self.llm_batch_prompts:
            n += 1
        return n

    @model_validator(mode="after")
    def _something_to_isolate_from_and_to_train_on(self) -> "RavelConfig":
        for kind, attributes in self.attributes.items():
            if len(set(attributes)) < 2 or len(set(attributes)) < len(attributes):
                raise ValueError(f"ravel.attributes: {kind} needs two or more different attributes, has {attributes}")
        if self.pairs_per_attribute < self.right_prompts_needed:
            raise ValueError(
                f"ravel.pairs_per_attribute = {self.pairs_per_attribute} fills no batch of llm_batch_prompts = "
                f"{self.llm_batch_prompts} in both parts of the split; at least {self.right_prompts_needed}"
            )
        return self


class AbsorptionConfig(Strict):
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
    seed: int = 42


class EvaluationConfig(Strict):
    """The evals to run; null leaves one out, and the table says so."""

    core: CoreConfig | None = Field(default_factory=lambda: CoreConfig())
    sparse_probing: SparseProbingConfig | None = Field(default_factory=lambda: SparseProbingConfig())
    sparse_probing_sae_probes: SaeProbesConfig | None = None
    scr: ScrConfig | None = None
    autointerp: AutoInterpConfig | None = None
    ravel: RavelConfig | None = None
    absorption: AbsorptionConfig | None = None
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=list,
        description="run each eval that draws (not core) once for each, for error bars; empty: with its own seed",
    )
    llm_cache_gb: float = Field(
        10.0,
        ge=0,
        allow_inf_nan=False,
        description="disk for what the language model gave, shared by all dictionaries; 0 keeps nothing",
    )
    llm_memory_gb: float = Field(
        2.5, ge=0, allow_inf_nan=False, description="memory for the untouched model's probabilities (core)"
    )

    @model_validator(mode="after")
    def _each_seed_once(self) -> "EvaluationConfig":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"evaluation.seeds: {self.seeds} names a seed twice")
        return self


class ReportConfig(Strict):
    """What the report shows beside scores."""

    atoms: int = Field(24, ge=0, description="atoms of each dictionary to show in context; 0 shows none")
    examples: int = Field(8, ge=1, description="of each atom and sign, each from another document")
    tokens: int = Field(16_384, ge=1, description="of held-out text to look for examples in, at most")
