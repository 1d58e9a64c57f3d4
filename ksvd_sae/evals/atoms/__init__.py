"""Atoms in context: what a run's report shows of each dictionary beside its scores."""

from pydantic import Field

from ksvd_sae.strict import Strict


class AtomsConfig(Strict):
    """What is shown of each dictionary's atoms."""

    atoms: int = Field(24, ge=0, description="atoms of each dictionary to show in context; 0 shows none")
    examples: int = Field(8, ge=1, description="of each atom and sign, each from another document")
    tokens: int = Field(16_384, ge=1, description="of held-out text to look for examples in, at most")


class ImageAtomsConfig(Strict):
    """What is shown of each dictionary's atoms where a vision model reads images."""

    atoms: int = Field(8, ge=0, description="atoms of each dictionary to show on images; 0 shows none")
    examples: int = Field(6, ge=1, description="images of each atom and sign")
    images: int = Field(1_000, ge=1, description="held-out images to look for examples in, at most")
    pixels: int = Field(96, ge=16, description="height of an image as it is shown")
