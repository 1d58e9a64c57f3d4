"""The evals that a run can have, in the order in which tables list them: from the cheapest to know to the dearest.

A new eval is a folder beside these with a subclass of ``Eval`` (base.py), and its line here; see docs/add-an-eval.md.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, JsonValue, create_model, model_validator

from ksvd_sae.evals.absorption import AbsorptionEval
from ksvd_sae.evals.autointerp import AutoInterpEval
from ksvd_sae.evals.base import Eval, Reads
from ksvd_sae.evals.core import CoreEval
from ksvd_sae.evals.heldout import HeldoutEval
from ksvd_sae.evals.loss import LossEval
from ksvd_sae.evals.ravel import RavelEval
from ksvd_sae.evals.sae_probes import SaeProbesEval
from ksvd_sae.evals.scr import ScrEval
from ksvd_sae.evals.sparse_probing import SparseProbingEval
from ksvd_sae.evals.stability import StabilityEval
from ksvd_sae.evals.tpp import TppEval
from ksvd_sae.evals.truth import TruthEval
from ksvd_sae.evals.vision import (
    ImageProbingEval,
    MonosemanticityEval,
    ProbePreservationEval,
    SpatialEval,
    TransferEval,
)
from ksvd_sae.strict import Strict

EVALS: tuple[type[Eval], ...] = (
    HeldoutEval,
    LossEval,
    CoreEval,
    SparseProbingEval,
    SaeProbesEval,
    ScrEval,
    TppEval,
    AbsorptionEval,
    RavelEval,
    AutoInterpEval,
    ProbePreservationEval,
    ImageProbingEval,
    SpatialEval,
    MonosemanticityEval,
    TransferEval,
    StabilityEval,
    TruthEval,
)


def _option(kind: type[Eval]) -> Any:
    """The eval's field of a config: its section, or null."""
    return (kind | None, Field(default_factory=kind) if kind.on_by_default else None)


def _sections(data: Reads) -> type[Strict]:
    """A model with a field for every eval that can be had on such data."""
    kinds = {kind.name: _option(kind) for kind in EVALS if kind.reads in ("activations", data)}
    return create_model("_Sections", __base__=Strict, **kinds)


class Evaluation(Strict):
    """The evals to run, a section each; null leaves one out, and the table says so."""

    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=list,
        description="run each eval that draws once for each, for error bars; empty: with its own seed",
    )
    processes: int = Field(
        1,
        ge=1,
        description="evals at a time, each in a process with its own copy of the model; scores stay the same",
    )

    @model_validator(mode="after")
    def _each_seed_once(self) -> "Evaluation":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"evaluation.seeds: {self.seeds} names a seed twice")
        return self

    def evals(self) -> Iterator[Eval]:
        """Those asked for, in the order in which they run: what loads a model of its own comes last."""
        sections = dict(self)
        asked = [section for kind in EVALS if isinstance(section := sections.get(kind.name), Eval)]
        yield from sorted(asked, key=lambda section: section.loads_own_model)

    def seeded(self) -> Iterator[Eval]:
        """Each of ``evals`` with each seed that it is to run with."""
        for section in self.evals():
            if section.own_seed is None or not self.seeds:
                yield section
            else:
                yield from (section.with_seed(seed) for seed in self.seeds)

    def key(self) -> dict[str, JsonValue]:
        """What scores follow from."""
        options: dict[str, JsonValue] = self.model_dump(mode="json", exclude={"processes"})
        sources: dict[str, JsonValue] = {s.name: known for s in self.evals() if (known := s.source_hash()) is not None}
        return {**options, "sources": sources} if sources else options

    def left_out(self) -> list[str]:
        """Evals that run by default and are not to run."""
        asked = {section.name for section in self.evals()}
        fields = type(self).model_fields
        return [kind.name for kind in EVALS if kind.on_by_default and kind.name in fields and kind.name not in asked]


if TYPE_CHECKING:

    class _OfText(Strict): ...

    class _OfImages(Strict): ...
else:
    _OfText, _OfImages = _sections("text"), _sections("images")


class EvaluationConfig(Evaluation, _OfText):
    """The evals to run where a language model reads text; null leaves one out, and the table says so."""

    llm_cache_gb: float = Field(
        10.0,
        ge=0,
        allow_inf_nan=False,
        description="disk for what the language model gave, as each process counts; 0 keeps nothing",
    )
    llm_memory_gb: float = Field(
        2.5, ge=0, allow_inf_nan=False, description="memory for the untouched model's probabilities (core)"
    )


class ImageEvaluationConfig(Evaluation, _OfImages):
    """The evals to run where a vision model reads images; null leaves one out, and the table says so."""

    @model_validator(mode="before")
    @classmethod
    def _of_images(cls, raw: Any) -> Any:
        """Evals that read text are no misspelt keys."""
        given = raw if isinstance(raw, dict) else {}
        if asked := [kind.name for kind in EVALS if kind.reads == "text" and kind.name in given]:
            able = ", ".join(kind.name for kind in EVALS if kind.name in cls.model_fields)
            raise ValueError(f"{', '.join(asked)} cannot be had on images; leave out (to be had there: {able})")
        return raw
