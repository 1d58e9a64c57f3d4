"""Whether atoms are true: every kind of dictionary learned once more where the features are known."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, JsonValue

from ksvd_sae.evals.base import (
    Column,
    EvalResults,
    EvalSetting,
    Heldout,
    Measured,
    MeasuredHere,
    Panelist,
    Reads,
    SeededEval,
    Work,
)

# Goes up when the same options come to give other scores.
VERSION = 3
# Worlds by features and dimensions, the tiny one being 1, and its seconds of 20,000 samples on a core.
_SIZES = {"tiny": 1, "small": 32, "small-flat": 32, "synthsaebench-16k": 1536}
_TINY_S = 1.0


class TruthEval(MeasuredHere, SeededEval):
    """Each dictionary's kind, learned again with its own options in a synthetic world, against whose features it is
    scored by SAELens' metrics (SynthSAEBench, arXiv 2602.14687)."""

    world: Literal["tiny", "small", "small-flat", "synthsaebench-16k"] = Field(
        "small",
        description="tiny: 256 features in 32 dimensions, seconds; small: 2,048 in 128, minutes; small-flat: the same "
        "without hierarchy and correlation; synthsaebench-16k: the published shape, 16,384 in 768, for a GPU",
    )
    n_atoms: int | None = Field(None, gt=0, description="of every dictionary there; null: half of the features")
    k: int | None = Field(
        None, gt=0, description="budget of every dictionary there; null: as many as features fire on average"
    )
    noise: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="length of Gaussian noise on samples, as a part of theirs"
    )
    train_samples: int = Field(100_000, gt=0, description="different ones; a dictionary goes over them as it says")
    test_samples: int = Field(8_192, gt=0)

    twice: bool = Field(False, description="learn each once more with another seed, for its stability there")

    name: ClassVar[str] = "truth"
    reads: ClassVar[Reads] = "activations"
    counts: ClassVar[str] = "n_samples"
    cost: ClassVar[str] = "a training in the world for each; no language model"
    demo_seconds: ClassVar[float] = 60
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "true F1",
            "truth",
            "f1_thresholded",
            "score",
            "how well a latent's firing tells its nearest true feature's, learned again in a synthetic world, latents "
            "below the best threshold dropped, which other samples chose (F1, mean over latents)",
            "higher",
            matters=0.02,
            optional=True,
        ),
        Column(
            "true F1 as coded",
            "truth",
            "f1",
            "score",
            "the same for codes as they come (F1, mean over latents)",
            "higher",
            matters=0.02,
            optional=True,
        ),
        Column(
            "MCC",
            "truth",
            "mcc",
            "score",
            "mean |cos| of latents and true features, each matched to another (no unit)",
            "higher",
            matters=0.02,
            optional=True,
        ),
    )

    def notes(self) -> list[str]:
        return [
            f"Truth: every kind of dictionary was learned again with its own options in the synthetic world "
            f"{self.world!r}; what needs gradients of a language model, published SAEs and split views are not scored."
        ]

    def run(self, panel: list[Panelist], setting: EvalSetting, output: Path) -> EvalResults:
        results = super().run([one for one in panel if one.learned_on is not None], setting, output)
        return EvalResults(self.name, f"world {self.world}", results.n, results.files, results.metrics, self.own_seed)

    def work(self, heldout_tokens: int, trainings: int) -> Work:
        # Trainings there: as in the tiny world, by features, dimensions and samples.
        size = _SIZES[self.world] * self.train_samples / 20_000
        return Work(other_s=_TINY_S * size, other_each_s=_TINY_S * size * (1 + self.twice))

    def follows_from(self, heldout: Heldout) -> dict[str, JsonValue]:
        return {"config": self.model_dump(mode="json"), "version": VERSION}

    def measure(self, panelist: Panelist, setting: EvalSetting, heldout: Heldout) -> Measured:
        from ksvd_sae.evals.truth.run import measure

        assert panelist.learned_on is not None
        return measure(self, panelist.name, panelist.learned_on, setting)
