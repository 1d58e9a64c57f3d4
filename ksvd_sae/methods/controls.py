"""Controls: dictionaries that nobody would choose, and that every method must beat."""

from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field

from ksvd_sae.dictionary import Dictionary
from ksvd_sae.learning.coding import Coding
from ksvd_sae.learning.pca import principal_components
from ksvd_sae.methods.base import (
    CODER_LABELS,
    Coded,
    Facts,
    KeptAsDictionary,
    Seeded,
    Source,
    TrainingSetting,
    WeightingConfig,
)

_BATCH = 16_384


class PCAMethod(KeptAsDictionary):
    """The first k principal components, coded by projection."""

    kind: Literal["pca"] = "pca"
    k: int = Field(gt=0)

    is_control: ClassVar[bool] = True
    may_vary: ClassVar[frozenset[str]] = frozenset({"k"})

    @property
    def budget(self) -> int:
        return self.k

    @property
    def size(self) -> int:
        return self.k

    @property
    def coder_label(self) -> str:
        return CODER_LABELS["projection"]

    def train(self, setting: TrainingSetting, folder: Path, source: Source | None) -> Facts:
        shards = setting.shards
        atoms_MD = principal_components(shards.batches(_BATCH), self.k, shards.centre_D)
        setting.save(Dictionary(atoms_MD, shards.centre_D.float(), Coding(self.k, "projection")), folder)
        return Facts(d_sae=self.k, k=self.k, signed=True, samples_seen=shards.n_samples)


class IdentityMethod(KeptAsDictionary):
    """The activation as it is, a latent a dimension, none left out: what an eval says without a dictionary."""

    kind: Literal["identity"] = "identity"

    is_control: ClassVar[bool] = True
    has_atoms: ClassVar[bool] = False

    @property
    def coder_label(self) -> str:
        return CODER_LABELS["projection"]

    def train(self, setting: TrainingSetting, folder: Path, source: Source | None) -> Facts:
        d_in = setting.shards.d_in
        setting.save(Dictionary(torch.eye(d_in), torch.zeros(d_in), Coding(d_in, "projection")), folder)
        return Facts(d_sae=d_in, k=d_in, signed=True, samples_seen=0)


class RandomMethod(Coded, Seeded, KeptAsDictionary):
    """Random unit atoms, no direction likelier than another in their metric, coded as DB-KSVD codes."""

    kind: Literal["random"] = "random"
    n_atoms: int = Field(gt=0)
    weighting: WeightingConfig = Field(default_factory=WeightingConfig)

    is_control: ClassVar[bool] = True
    may_vary: ClassVar[frozenset[str]] = frozenset({"k", "seed"})
    chosen_at_load: ClassVar[frozenset[str]] = frozenset()

    @property
    def size(self) -> int:
        return self.n_atoms

    @property
    def metric(self) -> WeightingConfig:
        return self.weighting

    def train(self, setting: TrainingSetting, folder: Path, source: Source | None) -> Facts:
        shards, generator = setting.shards, torch.Generator().manual_seed(setting.seed)
        atoms_MD = torch.nn.functional.normalize(torch.randn(self.n_atoms, shards.d_in, generator=generator), dim=1)
        weighting = setting.weighting(self.weighting)
        setting.save(Dictionary(atoms_MD, shards.centre_D.float(), self.coding, weighting), folder)
        return Facts(d_sae=self.n_atoms, k=self.k, signed=self.has_signs, samples_seen=0)
