"""Options that several kinds of dictionary share, as typed values; part of config.py's run."""

from typing import Any, Literal

from pydantic import Field, model_validator

from ksvd_sae.evals.config import Strict

# How a signed code is given to evals; see ksvd_sae/sae.py.
View = Literal["signed", "split"]


class WeightingConfig(Strict):
    """The metric that a dictionary is learned in; see ksvd_sae/learning/weighting.py. A bare name is short for kind."""

    kind: Literal["none", "std", "fisher_diag", "fisher"] = "none"
    power: float = Field(0.5, gt=0, le=2, description="of 'std': 1 makes all dimensions equally loud")
    ridge: float | None = Field(None, ge=0, description="fraction of the mean moment; null takes the kind's default")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value


class Viewed(Strict):
    """Codes that have signs."""

    view: Literal["signed", "split", "both"] = Field(
        "signed",
        description="what evals see of signed codes; signed: codes as they come; split: an atom's positive and "
        "negative part as two latents; both: each in a row of its own",
    )


class SAETraining(Strict):
    """How SAELens' trainer goes over the shards."""

    passes: int = Field(10, ge=1)
    batch_samples: int = Field(1024, ge=1)
    lr: float = Field(1e-3, gt=0)
    lr_decay_fraction: float = Field(0.2, ge=0, le=1)
