"""Another dictionary after some steps down the divergence that its reconstructions cause (arXiv 2503.17272).

SAEs and DB-KSVD learn to rebuild activations, and are judged by what the model predicts from what they rebuild. So, on
a few training tokens, the reconstructions x̂ are spliced into the model, and

    ½ (mse + a·kl),   mse = mean ‖(x − x̂)·W‖²,   kl = mean KL(as it is ‖ spliced),   a = mse / kl, held fixed

is lowered by Adam: both halves weigh the same whatever their units (the balance as others implement the paper's). As in
the paper all weights of an SAE are trained. Of a dictionary that codes by pursuit these are the atoms and the centre,
with gradients of the coefficients, not of the choice of atoms. Ours: decoder rows keep their norms, what an encoder
compares with (thresholds) stays, and the rate falls to 0 in a line.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from ksvd_sae.activations.collecting import CollectingConfig
from ksvd_sae.activations.divergence import SplicedDivergence
from ksvd_sae.activations.gradients import GradientConfig
from ksvd_sae.dictionary import Dictionary
from ksvd_sae.errors import ActivationError, ConfigError, TextError
from ksvd_sae.learning.fvu import fvu
from ksvd_sae.methods.base import (
    CODER_LABELS,
    TRAIN_LOG,
    Coder,
    Derived,
    Facts,
    KeptAsSAE,
    Method,
    Source,
    TrainingSetting,
    View,
    Viewed,
    for_flat_heads,
    load_sae,
    unit_rows,
)
from ksvd_sae.progress import progress

if TYPE_CHECKING:
    from sae_lens.saes.sae import SAE


class FinetunedMethod(Derived, Viewed):
    """An SAE or a DB-KSVD dictionary, fine-tuned on the model's predictions and on its own error; it codes as before.

    k, weighting, coder and nonnegative are the other's.
    """

    kind: Literal["finetuned"] = "finetuned"
    coder: Coder | None = Field(None, description="as the other codes; null is its own encoder")
    nonnegative: bool | None = Field(None, description="as the other's codes")
    tokens: int = Field(32_768, ge=1, description="to fine-tune on, of the beginning of the training text")
    batch_contexts: int = Field(1, ge=1, description="contexts a step")
    lr: float = Field(1e-4, gt=0, description="in units in which activations have variance 1; it falls to 0")

    runs_model: ClassVar[bool] = True

    @property
    def has_signs(self) -> bool:
        return not self.nonnegative

    @property
    def is_sae(self) -> bool:
        return self.coder is None

    @property
    def coder_label(self) -> str:
        return ("own encoder" if self.coder is None else CODER_LABELS[self.coder]) + ", fine-tuned"

    def is_drawn(self, source: Method | None) -> bool:
        """Nothing is drawn here; the other may be."""
        return source is not None and source.is_drawn(None)

    def check(self, harvest: CollectingConfig) -> None:
        if not isinstance(harvest, GradientConfig):
            raise ValueError("kind 'finetuned' needs a language model: a model of images predicts no next token")
        super().check(harvest)
        if self.tokens > harvest.train_tokens:
            raise ValueError(f"tokens = {self.tokens} is above harvest.train_tokens = {harvest.train_tokens}")

    def like(self, other: Method) -> Self:
        coder = None if other.coding is None else other.coding.coder
        if coder is None and not isinstance(other, KeptAsSAE):
            raise ValueError(f"of: {self.of!r} has no encoder and codes by no pursuit: there is nothing to fine-tune")
        theirs = {"coder": coder, "nonnegative": not other.has_signs, "k": other.budget, "weighting": other.metric}
        for name, value in theirs.items():
            if getattr(self, name) not in (None, value):
                raise ValueError(f"{name}: it is fine-tuned as {self.of!r} codes; leave {name} out, or change it there")
        if not other.has_signs and self.view != "signed":
            raise ValueError(f"view {self.view!r} needs signs to split; leave view out")
        return self.model_copy(update={"coder": coder, "nonnegative": not other.has_signs})

    # ------------------------------------------------------------ made, and loaded

    def train(self, setting: TrainingSetting, folder: Path, source: Source | None) -> Facts:
        assert source is not None
        if setting.training_text is None:
            raise ConfigError("fine-tuning: there is no language model here", cure="take a run on text")
        sae = source.method.load(setting, source.folder)
        reader, stream = setting.training_text()
        divergence = SplicedDivergence(reader, setting.shards.manifest["statistics"]["outlier_limit"])
        folder.mkdir(parents=True, exist_ok=True)
        last = self._tune(sae, divergence, setting, self._batches(stream, setting.context_tokens), folder)
        if self.coder is None:
            sae.save_model(folder)
        else:
            before = source.method.dictionary(setting, source.folder)
            atoms_MD, centre_D = (weights.detach().cpu() for weights in (sae.W_dec, sae.b_dec))
            atoms_MD = unit_rows(atoms_MD, before.weighting)
            setting.save(replace(before, atoms_MD=atoms_MD, centre_D=centre_D), folder)
        seen = source.samples_seen
        return Facts(
            d_sae=sae.cfg.d_sae,
            k=self.k,
            signed=self.has_signs,
            samples_seen=None if seen is None else seen + last["samples_seen"],
            more={"finetuned_samples": last["samples_seen"], "kl_at_end": last["kl"], "l0_at_end": last["l0"]},
        )

    def load(self, setting: TrainingSetting, folder: Path, view: View = "signed") -> "SAE[Any]":
        if self.coder is None:
            return load_sae(folder, setting.device)
        return for_flat_heads(setting.wrap(self.dictionary(setting, folder), view))

    def dictionary(self, setting: TrainingSetting, folder: Path) -> Dictionary:
        if self.coder is None:
            raise ConfigError(f"taking atoms: {self.of!r} was fine-tuned as an SAE", cure="take them from that one")
        return Dictionary.load(folder)

    # ------------------------------------------------------------ steps

    def _batches(self, stream: Iterator[Tensor], context_tokens: int) -> list[Tensor]:
        wanted = math.ceil(self.tokens / context_tokens)
        some = list(islice(stream, wanted))
        if len(some) < wanted:
            raise TextError(
                f"fine-tuning: the training text ended before {self.tokens:,} tokens",
                got=f"{len(some)} contexts of {context_tokens}",
                cure="ask for fewer tokens",
            )
        return [torch.stack(some[i : i + self.batch_contexts]) for i in range(0, wanted, self.batch_contexts)]

    def _tune(
        self,
        sae: "SAE[Any]",
        divergence: SplicedDivergence,
        setting: TrainingSetting,
        batches: list[Tensor],
        folder: Path,
    ) -> dict[str, Any]:
        """Train ``sae`` in place, a step a batch; the last line of the log, which has the state before each step."""
        weighting, adam = setting.weighting(self.metric), _optimizer(sae, self.lr, setting.shards.statistics.scale)
        norms_M = torch.linalg.vector_norm(sae.W_dec.detach(), dim=1, keepdim=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / len(batches))
        line, seen = dict[str, Any](), 0
        with (folder / TRAIN_LOG).open("w") as log, progress("fine-tune", self.tokens, "tokens") as advance:
            for tokens_BL in batches:
                clean = divergence.clean(tokens_BL)
                with torch.enable_grad():
                    acts_NM = sae.encode(clean.x_ND)
                    rebuilt_ND = sae.decode(acts_NM)
                    kl, pull_ND = divergence.gradient(clean, rebuilt_ND)
                    error_ND = rebuilt_ND - clean.x_ND
                    squares_ND = (error_ND if weighting is None else weighting.apply(error_ND)).square()
                    mse = squares_ND.sum(dim=1).mean()
                    if not math.isfinite(kl) or not bool(torch.isfinite(pull_ND).all()):
                        raise ActivationError(
                            "fine-tuning: the divergence or its gradient is not finite",
                            got=f"KL {kl} after {seen:,} tokens",
                            cause="a rate so large that the reconstructions grew without end",
                            cure="a smaller lr",
                        )
                    balance = float(mse.detach()) / (kl + 1e-8)
                    adam.zero_grad()
                    (0.5 * (mse + balance * (rebuilt_ND * pull_ND).sum())).backward()
                adam.step()
                schedule.step()
                with torch.no_grad():
                    sae.W_dec.copy_(norms_M * torch.nn.functional.normalize(sae.W_dec, dim=1))
                seen += len(clean.x_ND)
                line = {
                    "samples_seen": seen,
                    "kl": kl,
                    "fvu": fvu(clean.x_ND, rebuilt_ND.detach(), "fine-tuning"),
                    "l0": float((acts_NM.detach() != 0).sum()) / len(acts_NM),
                }
                log.write(json.dumps(line) + "\n")
                advance(tokens_BL.numel(), f"KL {kl:.4f} FVU {line['fvu']:.4f}")
        return line


def _optimizer(sae: "SAE[Any]", lr: float, scale: float) -> torch.optim.Optimizer:
    """Adam of all weights but a metric's; see below.

    Dividing activations by a number divides biases and thresholds by it and leaves matrices as they are. So a rate of
    lr·scale for what has units is what lr is for activations of variance 1.
    """
    trained = {name: weights for name, weights in sae.named_parameters() if name != "weighting"}
    for name, weights in sae.named_parameters():
        weights.requires_grad_(name in trained)
    groups = [
        {"params": [weights for weights in trained.values() if (weights.ndim == 1) == has_units], "lr": rate}
        for has_units, rate in ((False, lr), (True, lr * scale))
    ]
    return torch.optim.Adam(groups)
