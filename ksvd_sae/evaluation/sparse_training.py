"""SAELens' TopK-like training SAEs with the zeros left out of every product but one: the same steps, sooner.

Of the six dense products of a training step only the pre-activations need all latents. The decoder and all gradients
touch the chosen ones alone, k of d_sae a sample. SAELens has an option for that, ``use_sparse_activations``, but its
backward pass fails on a CPU (torch 2.15), and it leaves the encoder's gradient dense.

Notation: B samples, M latents, D dimensions, Z = chosen (sample, latent) pairs, sorted.
"""

import warnings
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE
from torch import Tensor
from typing_extensions import override

# A prime: no column of the pre-activations is in the sample more often than others.
_SAMPLE_STRIDE, _SAMPLE_MARGIN = 61, 1.3


def sparse_steps_pay(device: torch.device) -> bool:
    """Whether these classes are for this device: a CPU with MKL. A GPU does the dense products faster."""
    return device.type == "cpu" and bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]


class _Preactivations(torch.autograd.Function):
    """The Z chosen entries of x·W_enc + offset, which the caller has computed already."""

    @staticmethod
    def forward(
        ctx: Any, w_enc_DM: Tensor, offset_M: Tensor, x_BD: Tensor, rows_Z: Tensor, columns_Z: Tensor, values_Z: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_BD, rows_Z, columns_Z)
        ctx.n_latents = len(offset_M)
        return values_Z.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_Z,) = gradients
        x_BD, rows_Z, columns_Z = ctx.saved_tensors
        shape = (ctx.n_latents, len(x_BD))
        sparse_MB = torch.sparse_coo_tensor(torch.stack([columns_Z, rows_Z]), gradient_Z, shape, check_invariants=False)
        offset_M = torch.zeros(ctx.n_latents, dtype=gradient_Z.dtype).index_add_(0, columns_Z, gradient_Z)
        return torch.sparse.mm(sparse_MB, x_BD).T.contiguous(), offset_M, None, None, None, None


class _Decoded(torch.autograd.Function):
    """values·W_dec, (B, D), from the Z chosen values."""

    @staticmethod
    def forward(
        ctx: Any, values_Z: Tensor, w_dec_MD: Tensor, rows_Z: Tensor, columns_Z: Tensor, n_samples: int
    ) -> Tensor:
        ctx.save_for_backward(values_Z, w_dec_MD, rows_Z, columns_Z)
        ctx.n_samples = n_samples
        return _csr(values_Z, rows_Z, columns_Z, n_samples, len(w_dec_MD)) @ w_dec_MD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_BD,) = gradients
        values_Z, w_dec_MD, rows_Z, columns_Z = ctx.saved_tensors
        shape = (len(w_dec_MD), ctx.n_samples)
        sparse_MB = torch.sparse_coo_tensor(torch.stack([columns_Z, rows_Z]), values_Z, shape, check_invariants=False)
        where_BM = _csr(torch.zeros_like(values_Z), rows_Z, columns_Z, ctx.n_samples, len(w_dec_MD))
        by_value_BM = torch.sparse.sampled_addmm(where_BM, gradient_BD, w_dec_MD.T.contiguous())
        return by_value_BM.values(), torch.sparse.mm(sparse_MB, gradient_BD), None, None, None


def _csr(values_Z: Tensor, rows_Z: Tensor, columns_Z: Tensor, n_rows: int, n_columns: int) -> Tensor:
    starts = torch.zeros(n_rows + 1, dtype=torch.int64)
    starts[1:] = torch.bincount(rows_Z, minlength=n_rows).cumsum(0)
    # torch says once a process that CSR is in beta.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)
        return torch.sparse_csr_tensor(starts, columns_Z, values_Z, (n_rows, n_columns), check_invariants=False)


def _step(sae: Any, step_input: TrainStepInput, ends: list[int]) -> TrainStepOutput:
    """What ``training_forward_pass`` of SAELens' classes gives, feature_acts as a sparse tensor.

    Decoder norms multiply pre-activations before the choice and divide them after it: only the choice sees them.

    Args: ends: of the groups of latents whose prefixes have a loss of their own; [] for none.
    """
    x_BD, w_enc_DM = step_input.sae_in.to(sae.dtype), sae.W_enc
    n, m = len(x_BD), w_enc_DM.shape[1]
    # x − b_dec as x·W_enc − b_dec·W_enc: then b_dec's gradient is a vector times a matrix.
    offset_M = sae.b_enc - sae.b_dec @ w_enc_DM
    with torch.no_grad():
        hidden_BM = torch.addmm(offset_M, x_BD, w_enc_DM)
        norms_M = sae.W_dec.norm(dim=-1)
        ranks_BM = hidden_BM * norms_M
        chosen_Z = sae.chosen(ranks_BM).sort().values
        rows_Z, columns_Z = chosen_Z // m, chosen_Z % m
    before_Z = _Preactivations.apply(w_enc_DM, offset_M, x_BD, rows_Z, columns_Z, hidden_BM.flatten()[chosen_Z])
    values_Z = before_Z.relu()
    losses: dict[str, Tensor] = {}
    sae_out, start = sae.b_dec, 0
    for end in [*ends, m]:
        group_Z = ... if not ends else ((columns_Z >= start) & (columns_Z < end)).nonzero().flatten()
        sae_out = sae_out + _Decoded.apply(values_Z[group_Z], sae.W_dec, rows_Z[group_Z], columns_Z[group_Z], n)
        name = "mse_loss" if end == m else f"inner_mse_loss_{end}"
        losses[name] = (sae_out - x_BD).square().sum(dim=-1).mean()
        start = end
    losses["auxiliary_reconstruction_loss"] = _auxiliary_loss(
        sae, x_BD, sae_out.detach(), offset_M, ranks_BM, step_input.dead_neuron_mask
    )
    acts_Z = values_Z.detach() * norms_M[columns_Z]
    indices_2Z = torch.stack([rows_Z, columns_Z])
    acts_BM = torch.sparse_coo_tensor(indices_2Z, acts_Z, (n, m), is_coalesced=True, check_invariants=False)
    total = torch.stack(list(losses.values())).sum()
    return TrainStepOutput(x_BD, sae_out, acts_BM, ranks_BM, total, losses)


def _auxiliary_loss(
    sae: Any, x_BD: Tensor, out_BD: Tensor, offset_M: Tensor, ranks_BM: Tensor, dead_M: Tensor | None
) -> Tensor:
    """SAELens' ``calculate_topk_aux_loss``: what the best dead latents make of the error. Dense in the dead ones."""
    dead_X = None if dead_M is None else dead_M.nonzero().flatten()
    if dead_X is None or len(dead_X) == 0:
        return out_BD.new_tensor(0.0)
    most = x_BD.shape[1] // 2
    before_BX = x_BD @ sae.W_enc[:, dead_X] + offset_M[dead_X]
    if len(dead_X) > most:
        best = ranks_BM[:, dead_X].topk(most, sorted=False).indices
        before_BX = before_BX * torch.zeros_like(before_BX).scatter_(1, best, 1.0)
    error_BD = before_BX @ sae.W_dec[dead_X] - (x_BD - out_BD)
    return sae.cfg.aux_loss_coefficient * min(len(dead_X) / most, 1.0) * error_BD.square().sum(dim=-1).mean()


def largest(ranks_N: Tensor, n: int) -> Tensor:
    """Indices of the n largest, where none below 0 need be told apart.

    A sample of them gives a bound by which nearly all can be left out before topk looks;
    where it lets too few through, topk sees all.
    """
    sample_S = ranks_N[::_SAMPLE_STRIDE]
    bound = sample_S.topk(min(len(sample_S), 1 + int(_SAMPLE_MARGIN * n / _SAMPLE_STRIDE)), sorted=False).values.min()
    candidates_C = (ranks_N > bound.clamp(min=0)).nonzero().flatten()
    if len(candidates_C) < n:
        return ranks_N.relu().topk(n, sorted=False).indices
    return candidates_C[ranks_N[candidates_C].topk(n, sorted=False).indices]


class SparseTopKTrainingSAE(TopKTrainingSAE):
    """``TopKTrainingSAE``; the step in sparse arithmetic."""

    def chosen(self, ranks_BM: Tensor) -> Tensor:
        """Flat indices of each sample's k largest."""
        n, m = ranks_BM.shape
        return (ranks_BM.topk(self.cfg.k, dim=1, sorted=False).indices + m * torch.arange(n)[:, None]).flatten()

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        return _step(self, step_input, [])


class SparseBatchTopKTrainingSAE(BatchTopKTrainingSAE):
    """``BatchTopKTrainingSAE``; the step in sparse arithmetic."""

    def chosen(self, ranks_BM: Tensor) -> Tensor:
        """Flat indices of the k·B largest of the batch."""
        return largest(ranks_BM.flatten(), int(self.cfg.k * len(ranks_BM)))

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        output = _step(self, step_input, [])
        self.update_topk_threshold(output.feature_acts.values())
        return output


class SparseMatryoshkaTrainingSAE(MatryoshkaBatchTopKTrainingSAE):
    """``MatryoshkaBatchTopKTrainingSAE`` without its own auxiliary loss; the step in sparse arithmetic."""

    def chosen(self, ranks_BM: Tensor) -> Tensor:
        """Flat indices of the k·B largest of the batch."""
        return largest(ranks_BM.flatten(), int(self.cfg.k * len(ranks_BM)))

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        output = _step(self, step_input, self.cfg.matryoshka_widths[:-1])
        self.update_topk_threshold(output.feature_acts.values())
        return output
