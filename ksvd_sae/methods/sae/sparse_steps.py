"""SAELens' TopK-like training SAEs with the zeros left out of every product but one: the same steps, sooner.

Of the six dense products of a training step only the pre-activations need all latents, and those may be in bfloat16
where that is quick (``sparse_bfloat16_numba``). The decoder and all gradients touch the chosen ones alone, k of d_sae a
sample. SAELens has an option for that, ``use_sparse_activations``, but its backward pass fails on a CPU (torch 2.15),
and it leaves the encoder's gradient dense.

A step's reconstruction, losses and gradients are computed at once, in the forward pass (``sparse_steps_numba``).

Notation: B samples, M latents, D dimensions, G groups, Z = chosen (sample, latent) pairs, sample by sample.
"""

from typing import Any

import numpy as np
import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE
from torch import Tensor, nn
from typing_extensions import override

from ksvd_sae.methods.sae.sparse_bfloat16_numba import Products, bfloat16_pays
from ksvd_sae.methods.sae.sparse_choice_numba import Chosen, largest_by_row, largest_of_all
from ksvd_sae.methods.sae.sparse_steps_numba import fold_norms, reconstruct


def sparse_steps_pay(device: torch.device) -> bool:
    """Whether these classes are for this device: a CPU with MKL. A GPU does the dense products faster."""
    return device.type == "cpu" and bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]


class _Reconstruction(torch.autograd.Function):
    """(Σ of the prefixes' losses, losses_G, out_BD); the first alone has gradients, and they are ready beforehand."""

    @staticmethod
    def forward(
        ctx: Any, w_enc_DM: Tensor, b_enc_M: Tensor, w_dec_MD: Tensor, b_dec_D: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_BD, starts_B, columns_Z, values_Z, ends_G, room_GBD = rest
        weights = (_latents_as_rows(w_enc_DM), w_dec_MD.numpy(), b_dec_D.numpy())
        out_BD, losses_G, gradients = reconstruct(
            x_BD.numpy(), starts_B, columns_Z, values_Z, *weights, ends_G, room_GBD.numpy()
        )
        by_w_enc_DM = torch.from_numpy(gradients.w_enc_MD).T
        ctx.gradients = [by_w_enc_DM, *(torch.from_numpy(gradient) for gradient in gradients[1:])]
        losses, out = torch.from_numpy(losses_G).to(x_BD.dtype), torch.from_numpy(out_BD)
        ctx.mark_non_differentiable(losses, out)
        return losses.sum(), losses, out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # Handed over, not kept: autograd makes them the parameters' gradients without a copy.
        own, ctx.gradients = ctx.gradients, None
        if float(gradients[0]) != 1.0:
            own = [gradient * gradients[0] for gradient in own]
        return (*own, None, None, None, None, None, None)


def _latents_as_rows(w_enc_DM: Tensor) -> Any:
    return np.ascontiguousarray(w_enc_DM.detach().T.numpy())


class SparseSteps:
    """What the three classes share.

    W_enc, (D, M), lies in memory latent by latent, as W_dec does: the gradients of a latent are then sums of rows.
    """

    W_enc: nn.Parameter
    _room: dict[str, Tensor]

    def initialize_weights(self) -> None:
        super().initialize_weights()  # type: ignore[misc]
        self.W_enc = nn.Parameter(self.W_enc.data.T.contiguous().T)
        self._room = {}

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)  # type: ignore[misc]
        # The format on disk knows one order of dimensions.
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()

    def room(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory that steps use again and again; what is in it is gone with the next step."""
        if name not in self._room or self._room[name].shape != shape:
            self._room[name] = torch.empty(shape, dtype=dtype)
        return self._room[name]


@torch.no_grad()
def _choose(sae: Any, x_BD: Tensor) -> tuple[Chosen, Any]:
    """The chosen by their ranks, pre-activations times norms of the decoder's rows; those norms."""
    (m, d), k = sae.W_dec.shape, sae.cfg.k
    folded_MD = sae.room("folded", m, d)
    weights = (sae.b_enc.numpy(), sae.W_dec.numpy(), sae.b_dec.numpy(), folded_MD.numpy())
    offset_M, norms_M = fold_norms(_latents_as_rows(sae.W_enc), *weights)
    n = int(k * len(x_BD)) if isinstance(sae, BatchTopKTrainingSAE) else None
    if bfloat16_pays(x_BD.device):
        products = Products(x_BD, folded_MD, offset_M, sae.room("products", len(x_BD), m, dtype=torch.bfloat16))
        return (products.largest_by_row(k) if n is None else products.largest_of_all(n)), norms_M
    ranks_BM = sae.room("ranks", len(x_BD), m)
    torch.addmm(torch.from_numpy(offset_M), x_BD, folded_MD.T, out=ranks_BM)
    return (largest_by_row(ranks_BM, k) if n is None else largest_of_all(ranks_BM, n)), norms_M


def _step(sae: Any, step_input: TrainStepInput, ends: list[int]) -> TrainStepOutput:
    """What ``training_forward_pass`` of SAELens' classes gives, feature_acts as a sparse tensor.

    Decoder norms multiply pre-activations before the choice and divide them after it: only the choice sees them.
    hidden_pre is feature_acts: not all of it is known. Of the losses only ``loss`` itself has gradients.

    Args: ends: of the groups of latents whose prefixes have a loss of their own, but for the last; [] for none.
    """
    x_BD = step_input.sae_in.to(sae.dtype).contiguous()
    (n, d), m = x_BD.shape, sae.cfg.d_sae
    (starts_B, columns_Z, ranks_Z), norms_M = _choose(sae, x_BD)
    ends = [*ends, m]
    loss, losses_G, out_BD = _Reconstruction.apply(
        *(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec),
        *(x_BD, starts_B, columns_Z, ranks_Z / norms_M[columns_Z]),
        *(np.array(ends), sae.room("gradients", len(ends), n, d)),
    )
    losses = {"mse_loss": losses_G[-1]}
    losses |= {f"inner_mse_loss_{end}": losses_G[g] for g, end in enumerate(ends[:-1])}
    auxiliary = _auxiliary_loss(sae, x_BD, out_BD, torch.from_numpy(norms_M), step_input.dead_neuron_mask)
    losses["auxiliary_reconstruction_loss"] = auxiliary
    rows_Z = np.repeat(np.arange(n), np.diff(starts_B))
    indices_2Z = torch.from_numpy(np.stack([rows_Z, columns_Z]))
    acts_BM = torch.sparse_coo_tensor(
        indices_2Z, torch.from_numpy(ranks_Z), (n, m), is_coalesced=True, check_invariants=False
    )
    return TrainStepOutput(x_BD, out_BD, acts_BM, acts_BM, loss + auxiliary, losses)


def _auxiliary_loss(sae: Any, x_BD: Tensor, out_BD: Tensor, norms_M: Tensor, dead_M: Tensor | None) -> Tensor:
    """SAELens' ``calculate_topk_aux_loss``: what the best dead latents make of the error. Dense in the dead ones."""
    dead_X = None if dead_M is None else dead_M.nonzero().flatten()
    if dead_X is None or len(dead_X) == 0:
        return out_BD.new_tensor(0.0)
    most = x_BD.shape[1] // 2
    w_enc_XD = sae.W_enc.T[dead_X]
    before_BX = x_BD @ w_enc_XD.T + (sae.b_enc[dead_X] - w_enc_XD @ sae.b_dec)
    if len(dead_X) > most:
        best = (before_BX.detach() * norms_M[dead_X]).topk(most, sorted=False).indices
        before_BX = before_BX * torch.zeros_like(before_BX).scatter_(1, best, 1.0)
    error_BD = before_BX @ sae.W_dec[dead_X] - (x_BD - out_BD)
    return sae.cfg.aux_loss_coefficient * min(len(dead_X) / most, 1.0) * error_BD.square().sum(dim=-1).mean()


class SparseTopKTrainingSAE(SparseSteps, TopKTrainingSAE):
    """``TopKTrainingSAE``; the step in sparse arithmetic."""

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        return _step(self, step_input, [])


class SparseBatchTopKTrainingSAE(SparseSteps, BatchTopKTrainingSAE):
    """``BatchTopKTrainingSAE``; the step in sparse arithmetic."""

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        output = _step(self, step_input, [])
        self.update_topk_threshold(output.feature_acts.values())
        return output


class SparseMatryoshkaTrainingSAE(SparseSteps, MatryoshkaBatchTopKTrainingSAE):
    """``MatryoshkaBatchTopKTrainingSAE`` without its own auxiliary loss; the step in sparse arithmetic."""

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        output = _step(self, step_input, self.cfg.matryoshka_widths[:-1])
        self.update_topk_threshold(output.feature_acts.values())
        return output
