"""SAEs trained beside the dictionaries, by SAELens' own trainer, only sooner."""

from abc import abstractmethod
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from ksvd_sae.errors import ShapeError
from ksvd_sae.learning.matryoshka import NamedGroups, group_sizes
from ksvd_sae.methods.base import Facts, KeptAsSAE, Seeded, Source, TrainingSetting, WeightingConfig
from ksvd_sae.strict import Strict

if TYPE_CHECKING:
    from sae_lens.saes.sae import TrainingSAE


class SAETraining(Strict):
    """How SAELens' trainer goes over the shards."""

    passes: int = Field(10, ge=1)
    batch_samples: int = Field(1024, ge=1)
    lr: float = Field(1e-3, gt=0)
    lr_decay_fraction: float = Field(0.2, ge=0, le=1)


class SAEMethod(SAETraining, Seeded, KeptAsSAE):
    """An SAE trained by SAELens on the same shards: what all kinds share."""

    n_atoms: int = Field(gt=0)
    k: int = Field(gt=0)
    weighting: WeightingConfig = Field(default_factory=WeightingConfig)
    frozen_decoder: bool = Field(
        False, description="a control: the decoder stays as it was drawn and the rest is trained (arXiv 2602.14111)"
    )
    snapshots: list[Annotated[int, Field(gt=0)]] = Field(
        default_factory=list, description="samples seen at which to save the SAE as it is then, in snapshot-<samples>"
    )

    may_vary: ClassVar[frozenset[str]] = frozenset({"k", "seed", "passes"})
    newer: ClassVar[frozenset[str]] = frozenset({"frozen_decoder"})

    @property
    def is_sae(self) -> bool:
        return not self.frozen_decoder

    @property
    def is_control(self) -> bool:
        return self.frozen_decoder

    @property
    def budget(self) -> int:
        return self.k

    @property
    def size(self) -> int:
        return self.n_atoms

    @property
    def metric(self) -> WeightingConfig:
        return self.weighting

    @abstractmethod
    def training_sae(self, steps: int, sparse: bool, **common: Any) -> "TrainingSAE[Any]":
        """SAELens' training SAE of this kind.

        Args: steps: of the training. sparse: the class that computes its steps in sparse arithmetic, if there is one.
            common: d_in, d_sae, device, metadata.
        """

    def check_sizes(self, d_in: int) -> None:
        """Raise ShapeError unless such an SAE can be trained on activations of d_in dimensions."""
        if self.k > min(self.n_atoms, d_in):
            raise ShapeError("train_sae: k too large", got=self.k, limit=min(self.n_atoms, d_in))

    def train(self, setting: TrainingSetting, folder: Path, source: Source | None) -> Facts:
        from ksvd_sae.methods.sae.training import train_sae

        return train_sae(self, setting, folder, setting.weighting(self.weighting))


class TopKSAEMethod(SAEMethod):
    """A TopK SAE."""

    kind: Literal["topk_sae"] = "topk_sae"
    aux_loss_coefficient: float = Field(1 / 32, ge=0)

    def training_sae(self, steps: int, sparse: bool, **common: Any) -> "TrainingSAE[Any]":
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

        from ksvd_sae.methods.sae.sparse_steps import SparseTopKTrainingSAE

        config = TopKTrainingSAEConfig(k=self.k, aux_loss_coefficient=self.aux_loss_coefficient, **common)
        return (SparseTopKTrainingSAE if sparse else TopKTrainingSAE)(config)


class BatchTopKSAEMethod(SAEMethod):
    """A BatchTopK SAE: k latents a sample on average over a batch; at inference one threshold (JumpReLU)."""

    kind: Literal["batchtopk_sae"] = "batchtopk_sae"
    aux_loss_coefficient: float = Field(1 / 32, ge=0)

    def training_sae(self, steps: int, sparse: bool, **common: Any) -> "TrainingSAE[Any]":
        from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

        from ksvd_sae.methods.sae.sparse_steps import SparseBatchTopKTrainingSAE

        config = BatchTopKTrainingSAEConfig(k=self.k, aux_loss_coefficient=self.aux_loss_coefficient, **common)
        return (SparseBatchTopKTrainingSAE if sparse else BatchTopKTrainingSAE)(config)


class MatryoshkaBatchTopKSAEMethod(SAEMethod):
    """A BatchTopK SAE whose first latents, up to the end of each group, must do by themselves as well."""

    kind: Literal["matryoshka_batchtopk_sae"] = "matryoshka_batchtopk_sae"
    aux_loss_coefficient: float = Field(1 / 32, ge=0)
    groups: NamedGroups | list[Annotated[int, Field(gt=0)]] = Field(
        "paper", description="as a DB-KSVD dictionary's: 'paper', 'eighth', or sizes that add up to n_atoms"
    )

    @property
    def nested(self) -> tuple[int, ...]:
        """Sizes of the groups."""
        return group_sizes(self.groups, self.n_atoms)

    def check_sizes(self, d_in: int) -> None:
        super().check_sizes(d_in)
        if sum(self.nested) != self.n_atoms:
            raise ShapeError(
                "train_sae: groups do not add up to n_atoms",
                got=f"{list(self.nested)}, sum {sum(self.nested)}",
                limit=self.n_atoms,
                cure="groups: paper",
            )

    def training_sae(self, steps: int, sparse: bool, **common: Any) -> "TrainingSAE[Any]":
        from sae_lens.saes.matryoshka_batchtopk_sae import (
            MatryoshkaBatchTopKTrainingSAE,
            MatryoshkaBatchTopKTrainingSAEConfig,
        )

        from ksvd_sae.methods.sae.sparse_steps import SparseMatryoshkaTrainingSAE

        config = MatryoshkaBatchTopKTrainingSAEConfig(
            k=self.k,
            aux_loss_coefficient=self.aux_loss_coefficient,
            matryoshka_widths=list(accumulate(self.nested)),
            **common,
        )
        return (SparseMatryoshkaTrainingSAE if sparse else MatryoshkaBatchTopKTrainingSAE)(config)


class JumpReLUSAEMethod(SAEMethod):
    """A JumpReLU SAE: a learned threshold for each latent. k is a target of the loss, not a limit.

    Thresholds start low and move by about a learning rate a step: a short training ends with an L0 far from k (32 for
    k = 20 after 385 steps on Gemma-3-270M with coefficient 1; 21 after 1,286 with the coefficient below).
    """

    kind: Literal["jumprelu_sae"] = "jumprelu_sae"
    sparsity_loss: Literal["quadratic", "step", "tanh"] = Field(
        "quadratic", description="quadratic aims at L0 = k (Gemma Scope 2); step and tanh know only l0_coefficient"
    )
    l0_coefficient: float = Field(3.0, gt=0, description="quadratic: the larger, the nearer L0 ends to k")
    l0_warm_up_fraction: float = Field(0.1, ge=0, le=1, description="of the steps: l0_coefficient grows from 0")
    initial_threshold: float = Field(0.01, ge=0, description="of activations scaled to variance 1, like bandwidth")
    bandwidth: float = Field(0.05, gt=0)
    threshold_gradient_to_all: bool = Field(
        False, description="whether the sparsity loss moves the encoder too (Anthropic) or thresholds alone (DeepMind)"
    )
    pre_act_loss_coefficient: float | None = Field(None, gt=0, description="against dead latents; null leaves it out")

    def training_sae(self, steps: int, sparse: bool, **common: Any) -> "TrainingSAE[Any]":
        from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

        config = JumpReLUTrainingSAEConfig(
            jumprelu_init_threshold=self.initial_threshold,
            jumprelu_bandwidth=self.bandwidth,
            jumprelu_sparsity_loss_mode=self.sparsity_loss,
            l0_coefficient=self.l0_coefficient,
            l0_warm_up_steps=round(self.l0_warm_up_fraction * steps),
            jumprelu_ste_to_input=self.threshold_gradient_to_all,
            pre_act_loss_coefficient=self.pre_act_loss_coefficient,
            target_l0=self.k if self.sparsity_loss == "quadratic" else None,
            **common,
        )
        return JumpReLUTrainingSAE(config)
