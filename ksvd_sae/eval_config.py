"""Which evals a run has, as typed values; part of config.py's run."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator


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
    context_tokens: int = Field(128, ge=2)
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


class EvaluationConfig(Strict):
    """The evals to run; null leaves one out, and the table says so."""

    core: CoreConfig | None = Field(default_factory=lambda: CoreConfig())
    sparse_probing: SparseProbingConfig | None = Field(default_factory=lambda: SparseProbingConfig())
    scr: ScrConfig | None = None
    seeds: list[int] = Field(
        default_factory=list,
        description="run each eval that draws (not core) once for each, for error bars; empty: with its own seed",
    )
    llm_cache_gb: float = Field(
        10.0, ge=0, description="disk for what the language model gave, shared by all dictionaries; 0 keeps nothing"
    )
    llm_memory_gb: float = Field(2.0, ge=0, description="memory for the untouched model's probabilities (core)")
