"""Evals of a vision model's dictionaries, as ViSAEBench 0.1 has them (package ``visaebench``), on held-out images.

As there, activations are centred and divided by one number before probes see them: √ of their mean variance, here of
the training part. Codes are divided by it too. A signed code is scored by its positive part where the largest over an
image's patches is taken; in the split view each sign has a latent of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, JsonValue

from ksvd_sae.activations.vision.images import ImagesConfig
from ksvd_sae.activations.vision.model import VisionModelConfig
from ksvd_sae.errors import ActivationError, EvaluationError, HubError, ImageError, TextError
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

# Over dense codes: to put them in place, and to look at them.
_PLACED, _LARGEST, _NEIGHBOURS = 3, 1, 16


class ImageEval(MeasuredHere, SeededEval):
    """An eval on held-out images. Class attribute: version: goes up when the same input comes to give other scores."""

    version: ClassVar[int] = 1
    reads: ClassVar[Reads] = "images"
    counts: ClassVar[str] = "n_images"
    # Passes over the dense codes of all held-out patches.
    passes: ClassVar[int] = 0

    def work(self, heldout_tokens: int, trainings: int) -> Work:
        """Without probes: their time goes with the number of classes, which nobody knows before."""
        return Work(coded_each=heldout_tokens, passes_each=self.passes * heldout_tokens)

    def follows_from(self, heldout: Heldout) -> dict[str, JsonValue]:
        return {**super().follows_from(heldout), "version": self.version}


class ProbePreservationEval(ImageEval):
    """Whether a linear probe of the images' classes still works: fitted on the mean activation of an image's patches,
    tested on that and on the mean of their reconstructions."""

    test_fraction: float = Field(0.2, gt=0, lt=1, description="of the images: the probe is tested on them")

    name: ClassVar[str] = "probe_preservation"
    passes: ClassVar[int] = _PLACED
    on_by_default: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    cost: ClassVar[str] = "coding the held-out images; a logistic regression"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "probe kept",
            "probe_preservation",
            "preservation",
            "score",
            "accuracy of a linear probe of the images' classes on reconstructions, as a part of its accuracy on the "
            "activations that it was fitted on (no unit; from 0 to 2)",
            "higher",
            matters=0.02,
            optional=True,
        ),
    )

    def measure(self, panelist: Panelist, setting: EvalSetting, heldout: Heldout) -> Measured:
        from ksvd_sae.evals.vision.probes import preservation

        return preservation(self, panelist.load(), heldout)


class ImageProbingEval(ImageEval):
    """What few latents say of an image's class: logistic regressions on the k latents whose largest codes over an
    image's patches differ most between classes (ANOVA's F over all images, tested ones too, as ViSAEBench has it)."""

    k_values: list[Annotated[int, Field(ge=1)]] = Field([1, 5, 10, 20], min_length=1)
    test_fraction: float = Field(0.2, gt=0, lt=1, description="of the images: the probes are tested on them")

    name: ClassVar[str] = "image_probing"
    passes: ClassVar[int] = _PLACED + _LARGEST
    on_by_default: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    reads_signs: ClassVar[bool] = True
    cost: ClassVar[str] = "coding the held-out images; a logistic regression for each k"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "image probing",
            "image_probing",
            "auc",
            "score",
            "area under the accuracy of probes of the images' classes on the k best latents, over k, as a part of the "
            "range of k (no unit)",
            "higher",
            matters=0.02,
            optional=True,
        ),
    )

    def measure(self, panelist: Panelist, setting: EvalSetting, heldout: Heldout) -> Measured:
        from ksvd_sae.evals.vision.probes import sparse_probing

        return sparse_probing(self, panelist.load(), heldout)


class SpatialEval(ImageEval):
    """Whether the patches that a latent fires on lie together: Moran's I of its code over the grid of patches, with the
    eight around each as neighbours."""

    min_active_patches: int = Field(5, ge=1, description="images on which a latent fires on fewer say nothing of it")
    max_active_fraction: float = Field(0.9, gt=0, le=1, description="nor do those on which it fires on more")
    min_images: int = Field(50, ge=1, description="latents with fewer images are left out")
    max_images: int = Field(200, ge=1, description="the first so many images of a latent count")
    max_latents: int = Field(500, ge=1, description="drawn, where there are more")

    name: ClassVar[str] = "spatial"
    passes: ClassVar[int] = _PLACED + _NEIGHBOURS
    on_by_default: ClassVar[bool] = True
    counts: ClassVar[str] = "n_latents"
    cost: ClassVar[str] = "coding the held-out images"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "spatial",
            "spatial",
            "morans_i",
            "score",
            "how much the patches that a latent fires on lie together (Moran's I, mean over images, then latents; "
            "1 is one patch of ground, 0 is chance)",
            "higher",
            matters=0.02,
            optional=True,
        ),
    )

    def measure(self, panelist: Panelist, setting: EvalSetting, heldout: Heldout) -> Measured:
        from ksvd_sae.evals.vision.spatial import localization

        return localization(self, panelist.load(), heldout)


class MonosemanticityEval(ImageEval):
    """Whether the images that a latent fires on most are alike to another model: the mean cosine of pairs of them,
    weighted by their codes. That model sees, through its own preprocessing, what the run's model saw of an image."""

    backbone: VisionModelConfig = Field(description="the other model; its patches' mean stands for an image")
    top_images: int = Field(16, ge=2, description="of a latent")
    max_latents: int = Field(1000, ge=1, description="drawn, where there are more that fire")

    name: ClassVar[str] = "monosemanticity"
    passes: ClassVar[int] = _PLACED + _LARGEST
    reads_signs: ClassVar[bool] = True
    counts: ClassVar[str] = "n_latents"
    cost: ClassVar[str] = "the other model over the held-out images once; coding them"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "monosemanticity",
            "monosemanticity",
            "similarity",
            "score",
            "how alike the images that a latent fires on most are to another model (cosine of pairs, weighted by their "
            "codes, mean over latents)",
            "higher",
            matters=0.02,
            optional=True,
        ),
    )

    def measure(self, panelist: Panelist, setting: EvalSetting, heldout: Heldout) -> Measured:
        from ksvd_sae.evals.vision.monosemanticity import monosemanticity

        return monosemanticity(self, panelist.load(), setting, heldout)

    def follows_from(self, heldout: Heldout) -> dict[str, JsonValue]:
        return {**super().follows_from(heldout), "backbone": self.backbone.content_hash()}


class TransferEval(ImageEval):
    """Whether a dictionary holds on images of another source, which the run's model reads as it read its own: what is
    left of them, whether the latents that fire on held-out images fire there too, and a probe of their classes on few
    latents."""

    images: ImagesConfig = Field(description="the other images, in the form of the run's own")
    n_images: int = Field(
        10_000, ge=2, description="the first so many, as the run's seed shuffles them; all, where there are fewer"
    )
    k: int = Field(10, ge=1, description="latents that the probe reads")
    test_fraction: float = Field(0.2, gt=0, lt=1, description="of these images: the probe is tested on them")

    name: ClassVar[str] = "transfer"
    passes: ClassVar[int] = _PLACED + _LARGEST
    reads_signs: ClassVar[bool] = True
    cost: ClassVar[str] = "the run's model over the other images once; coding them and the held-out ones; a probe"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "transfer",
            "transfer",
            "composite",
            "score",
            "how a dictionary holds on images of another source: mean of the variance explained there, the part of the "
            "latents active at home that are active there, the overlap of these sets (Jaccard), and the accuracy of a "
            "probe of their classes on few latents (no unit, 0 to 1)",
            "higher",
            matters=0.02,
            optional=True,
        ),
    )

    def work(self, heldout_tokens: int, trainings: int) -> Work:
        return replace(super().work(heldout_tokens, trainings), images=self.n_images)

    def source_hash(self) -> str | None:
        return self._content

    @cached_property
    def _content(self) -> str | None:
        """Each dictionary's result asks for it, and a folder may hold a million images."""
        with self.named():
            return self.images.content_hash()

    def follows_from(self, heldout: Heldout) -> dict[str, JsonValue]:
        return {**super().follows_from(heldout), "content": self.source_hash()}

    def run(self, panel: list[Panelist], setting: EvalSetting, output: Path) -> EvalResults:
        return replace(super().run(panel, setting, output), data=self.images.name)

    def measure(self, panelist: Panelist, setting: EvalSetting, heldout: Heldout) -> Measured:
        from ksvd_sae.evals.vision.transfer import transfer

        with self.named():
            return transfer(self, panelist.load(), setting, heldout)

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors of images say whose these are, and leave the run's other evals be."""
        try:
            yield
        except (ActivationError, HubError, ImageError, TextError) as error:
            raise EvaluationError(
                f"{self.name}: {error.what}",
                got=error.got,
                limit=error.limit,
                cause=error.cause,
                cure=error.cure and error.cure.replace("images.", f"evaluation.{self.name}.images."),
            ) from error
