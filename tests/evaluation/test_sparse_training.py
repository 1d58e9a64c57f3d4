"""A training step in sparse arithmetic has the losses, gradients and codes of SAELens' own."""

import copy
from typing import Any

import pytest
import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

from ksvd_sae.evaluation.sparse_choice_numba import _SAMPLE_STRIDE, Chosen, largest_by_row, largest_of_all
from ksvd_sae.evaluation.sparse_training import (
    SparseBatchTopKTrainingSAE,
    SparseMatryoshkaTrainingSAE,
    SparseTopKTrainingSAE,
    sparse_steps_pay,
)
from tests.strategies import generator
from tests.tolerances import SPARSE_STEP

N_SAMPLES, D_IN, D_SAE = 96, 16, 64
KINDS: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "topk": (TopKTrainingSAE, SparseTopKTrainingSAE, TopKTrainingSAEConfig, {}),
    "batchtopk": (BatchTopKTrainingSAE, SparseBatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {}),
    "matryoshka": (
        MatryoshkaBatchTopKTrainingSAE,
        SparseMatryoshkaTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        {"matryoshka_widths": [8, 24, 64]},
    ),
}
# d_in / 2 = 8 dead latents at most are helped at a time.
DEAD = {"none": 0, "a few": 5, "too many": 30}


def pair(kind: str, k: int) -> tuple[Any, Any]:
    """SAELens' SAE and ours with the same weights, rows of different norms, biases that are not zero."""
    theirs_class, ours_class, config_class, options = KINDS[kind]
    config = config_class(d_in=D_IN, d_sae=D_SAE, k=k, aux_loss_coefficient=0.5, **options)
    torch.manual_seed(0)
    theirs, ours = theirs_class(config), ours_class(copy.deepcopy(config))
    with torch.no_grad():
        theirs.W_dec.mul_(torch.logspace(-1, 1, D_SAE)[:, None])
        theirs.W_enc.add_(0.3 * torch.randn(D_IN, D_SAE, generator=generator(1)))
        theirs.b_dec.copy_(torch.randn(D_IN, generator=generator(2)))
        theirs.b_enc.copy_(0.5 * torch.randn(D_SAE, generator=generator(3)))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def step(sae: Any, n_dead: int) -> TrainStepOutput:
    x_BD = 2 * torch.randn(N_SAMPLES, D_IN, generator=generator(4))
    dead_M = torch.zeros(D_SAE, dtype=torch.bool)
    dead_M[torch.randperm(D_SAE, generator=generator(5))[:n_dead]] = True
    output: TrainStepOutput = sae.training_forward_pass(
        TrainStepInput(sae_in=x_BD, coefficients={}, dead_neuron_mask=dead_M, n_training_steps=0, is_logging_step=False)
    )
    output.loss.backward()
    return output


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("k", [1, 5, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_step(kind: str, k: int, dead: str) -> None:
    theirs, ours = pair(kind, k)
    expected, found = step(theirs, DEAD[dead]), step(ours, DEAD[dead])
    assert set(found.losses) == set(expected.losses)
    for name, loss in expected.losses.items():
        assert float(found.losses[name].detach()) == pytest.approx(float(loss.detach()), rel=SPARSE_STEP), name
    assert (float(found.losses["auxiliary_reconstruction_loss"].detach()) > 0) == (DEAD[dead] > 0)
    assert float(found.loss.detach()) == pytest.approx(float(expected.loss.detach()), rel=SPARSE_STEP)
    torch.testing.assert_close(found.feature_acts.to_dense(), expected.feature_acts.detach())
    torch.testing.assert_close(found.sae_out.detach(), expected.sae_out.detach(), rtol=SPARSE_STEP, atol=SPARSE_STEP)
    for (name, mine), (_, true) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        scale = float(true.grad.abs().max())
        assert scale > 0, name
        assert float((mine.grad - true.grad).abs().max()) < SPARSE_STEP * scale, name
    for mine, true in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize(
    "case", ["normal", "few positive", "none positive", "sorted", "ties", "hidden from the sample", "in the sample alone"]
)
@pytest.mark.parametrize("n", [1, 400, 9000])
def test_largest_of_all_is_topk(case: str, n: int) -> None:
    """Also where the sample that bounds it tells nothing, or the wrong thing, about the rest."""
    ranks_N = torch.randn(77 * 261, generator=generator(6))
    if case == "few positive":
        ranks_N -= 2.5
    elif case == "none positive":
        ranks_N = -ranks_N.abs()
    elif case == "sorted":
        ranks_N = ranks_N.sort(descending=True).values
    elif case == "ties":
        ranks_N = (2 * ranks_N).round()
    elif "sample" in case:
        sampled_N = torch.arange(len(ranks_N)) % _SAMPLE_STRIDE == 0
        ranks_N += 5.0 * (sampled_N == (case == "in the sample alone"))
    ranks_BM = ranks_N.reshape(77, 261)
    wanted = ranks_N.relu().topk(n).values
    assert_chosen(ranks_BM, largest_of_all(ranks_BM, n), wanted[wanted > 0])


@pytest.mark.parametrize("case", ["normal", "none positive", "ties", "all the same"])
@pytest.mark.parametrize(("m", "k"), [(1, 1), (37, 36), (37, 37), (261, 1), (261, 5), (2048, 20)])
def test_largest_by_row_is_topk(case: str, m: int, k: int) -> None:
    ranks_BM = torch.randn(77, m, generator=generator(6))
    if case == "none positive":
        ranks_BM = -ranks_BM.abs()
        ranks_BM[5] *= -1
    elif case == "ties":
        ranks_BM = (2 * ranks_BM).round()
    elif case == "all the same":
        ranks_BM = torch.ones_like(ranks_BM)
    chosen = largest_by_row(ranks_BM, k)
    wanted_BK = ranks_BM.relu().topk(k).values
    assert torch.equal(torch.from_numpy(chosen[0]).diff(), (wanted_BK > 0).sum(dim=1))
    assert_chosen(ranks_BM, chosen, wanted_BK[wanted_BK > 0])


def assert_chosen(ranks_BM: torch.Tensor, chosen: Chosen, wanted: torch.Tensor) -> None:
    """Pairs that ascend, with their ranks, which are the wanted ones up to order."""
    starts_B, columns_Z, ranks_Z = (torch.from_numpy(part) for part in chosen)
    rows_Z = torch.arange(len(ranks_BM)).repeat_interleave(starts_B.diff())
    assert torch.equal(ranks_BM[rows_Z, columns_Z.long()], ranks_Z)
    assert bool(((rows_Z * ranks_BM.shape[1] + columns_Z).diff() > 0).all())
    assert torch.equal(ranks_Z.sort().values, wanted.sort().values)


def test_where_it_pays() -> None:
    assert sparse_steps_pay(torch.device("cpu")) == torch.backends.mkl.is_available()
    assert not sparse_steps_pay(torch.device("cuda"))
