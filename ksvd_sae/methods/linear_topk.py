"""A linear encoder with TopK for a dictionary that stays as it is: what a SAE's way of coding makes of given atoms.

The trainer sees z = ((x − centre)·W)·s as for any SAE, with the dictionary's own centre and metric W. There its atoms
are unit rows; they are the decoder, whose bias is 0, and neither moves: W_enc and b_enc alone are trained.

The start is W_enc = c·W_decᵀ. With c = 1 each latent would rebuild its sample alone, and k of them overshoot: where
atoms share a direction, as on language models' residual streams, by k times, and the error is hundreds of times the
variance. So c is the one scale that fits the first samples best.
"""

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from ksvd_sae.dictionary import Dictionary
from ksvd_sae.errors import ConfigError, ShapeError
from ksvd_sae.methods.base import Derived, Facts, KeptAsSAE, Method, Source, TrainingSetting
from ksvd_sae.methods.sae import SAETraining

if TYPE_CHECKING:
    from ksvd_sae.methods.sae.raw_units import TrainedSpace

_SCALE_SAMPLES = 4096


class LinearTopKMethod(Derived, SAETraining, KeptAsSAE):
    """A linear encoder with TopK fitted to the atoms of another dictionary, which stay as they are.

    With signs, the decoder is [D; −D], two latents an atom, of which each has an encoder of its own. The other way to
    have signs, the k largest in size of m signed latents (SAELens' abstopk), is what this gives when an atom's two
    encoders are opposites: so this can do no worse, and its codes are not negative, which evals read right.
    """

    kind: Literal["linear_topk"] = "linear_topk"
    signed: bool | None = Field(None, description="whether atoms count with both signs; null: as in the other's codes")
    aux_loss_coefficient: float = Field(1 / 32, ge=0)

    @property
    def coder_label(self) -> str:
        return "linear TopK"

    @property
    def uses_both_signs(self) -> bool:
        return bool(self.signed)

    def like(self, other: Method) -> Self:
        if other.size is not None and other.size == other.budget:
            raise ValueError(
                f"of: {self.of!r} has as many atoms as it uses: TopK has nothing to choose; "
                "take a dictionary with more atoms than k"
            )
        return self.model_copy(update={"signed": other.has_signs if self.signed is None else self.signed})

    def train(self, setting: TrainingSetting, folder: Path, source: Source | None) -> Facts:
        assert source is not None
        dictionary = self.atoms_of(source, setting)
        trained = self.fit(dictionary, setting, folder)
        seen = trained.samples_seen
        return replace(
            trained,
            samples_seen=None if source.samples_seen is None or seen is None else source.samples_seen + seen,
            more={**trained.more, "encoder_samples": seen},
        )

    def dictionary(self, setting: TrainingSetting, folder: Path) -> Dictionary:
        raise ConfigError(
            f"taking atoms: they are those of another dictionary, {self.of!r}", cure="take them from that one"
        )

    def fit(self, dictionary: Dictionary, setting: TrainingSetting, folder: Path, log_steps: int = 20) -> Facts:
        """Fit the encoder and save a TopK SAE in raw units: unit decoder rows along the atoms, b_dec the centre.

        With ``signed`` the decoder is [D; −D], twice the latents, the atoms first. Logged as SAEs are; the class
        is SAELens' TopKSAE, or WeightedTopKSAE for a dictionary with a metric.

        Args: dictionary: of which atoms, centre and metric are taken.
        Returns: facts of the encoder's training alone.
        Raises: ShapeError (k too large, a dictionary of another width).
        """
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

        from ksvd_sae.methods.sae.sparse_steps import SparseTopKTrainingSAE, sparse_steps_pay
        from ksvd_sae.methods.sae.training import at_the_hook, fit_sae, trained_space

        shards, device = setting.shards, setting.device
        if self.k is None or self.k > min(dictionary.n_atoms, shards.d_in) or dictionary.d_in != shards.d_in:
            raise ShapeError(
                "linear_topk: the dictionary does not fit k or the activations",
                got=f"k = {self.k}, atoms {tuple(dictionary.atoms_MD.shape)}",
                limit=f"k at most {min(dictionary.n_atoms, shards.d_in)}, atoms of {shards.d_in} dimensions",
            )
        torch.manual_seed(setting.seed)
        rows_FD = self._rows(dictionary.atoms_MD)
        training_config = TopKTrainingSAEConfig(
            d_in=shards.d_in,
            d_sae=len(rows_FD),
            k=self.k,
            aux_loss_coefficient=self.aux_loss_coefficient,
            device=str(device),
            **at_the_hook(setting),
        )
        sae = (SparseTopKTrainingSAE if sparse_steps_pay(device) else TopKTrainingSAE)(training_config)
        with torch.no_grad():
            sae.W_dec.copy_(rows_FD)
            sae.W_enc.copy_(rows_FD.T)
            sae.b_enc.zero_()
            sae.b_dec.zero_()
        # Without gradients, Adam leaves them alone.
        sae.W_dec.requires_grad_(False)
        sae.b_dec.requires_grad_(False)
        space = trained_space(shards, dictionary.weighting, dictionary.centre_D).to(device)
        first_BD = next(shards.batches(min(_SCALE_SAMPLES, shards.n_samples)))
        _scale_(sae, space.apply(first_BD.to(device)))
        save = partial(_save, sae, space, self._rows(dictionary.unit_raw_atoms()))
        return fit_sae(self, sae, space, setting, folder, save, self.k, log_steps)

    def _rows(self, atoms_MD: Tensor) -> Tensor:
        return torch.cat([atoms_MD, -atoms_MD]) if self.signed else atoms_MD


@torch.no_grad()
def _scale_(sae: Any, z_BD: Tensor) -> None:
    """Multiply the encoder by the c that makes ‖z − c·ẑ‖² least."""
    rebuilt_BD = sae.decode(sae.encode(z_BD)).double()
    squares = float(rebuilt_BD.square().sum())
    if squares > 0:
        sae.W_enc.mul_(float((z_BD.double() * rebuilt_BD).sum()) / squares)


def _save(sae: Any, space: "TrainedSpace", rows_FD: Tensor, folder: Path) -> None:
    """The SAE in raw units, with the rows and the centre as they are, not as they come back through two maps."""
    from sae_lens.saes.sae import SAE

    from ksvd_sae.methods.sae.raw_units import to_raw_units

    with tempfile.TemporaryDirectory() as trained:
        sae.save_inference_model(trained)
        raw = to_raw_units(SAE.load_from_disk(trained), space)
    with torch.no_grad():
        raw.W_dec.copy_(rows_FD)
        raw.b_dec.copy_(space.centre_D)
    raw.save_model(folder)
