"""A training step in sparse arithmetic has the losses, gradients and codes of SAELens' own."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from safetensors.torch import load_file

from ksvd_sae.methods.sae import sparse_steps
from ksvd_sae.methods.sae.sparse_bfloat16_numba import Products
from ksvd_sae.methods.sae.sparse_choice_numba import (
    SAMPLE_STRIDE,
    Chosen,
    largest_by_row,
    largest_of_all,
)
from ksvd_sae.methods.sae.sparse_steps import (
    SparseBatchTopKTrainingSAE,
    SparseMatryoshkaTrainingSAE,
    SparseTopKTrainingSAE,
    sparse_steps_pay,
)
from tests.strategies import generator
from tests.tolerances import SPARSE_PARAMETERS, SPARSE_STEP

N_SAMPLES, D_IN, D_SAE = 83, 17, 67
KINDS: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "topk": (TopKTrainingSAE, SparseTopKTrainingSAE, TopKTrainingSAEConfig, {}),
    "batchtopk": (BatchTopKTrainingSAE, SparseBatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {}),
    "matryoshka": (
        MatryoshkaBatchTopKTrainingSAE,
        SparseMatryoshkaTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        {"matryoshka_widths": [8, 24, 67]},
    ),
}
# d_in // 2 = 8 dead latents at most are helped at a time.
DEAD = {"none": 0, "a few": 5, "too many": 30}


def pair(kind: str, k: int, shift: float = 0.0) -> tuple[Any, Any]:
    """SAELens' SAE and ours with the same weights, rows of different norms, biases that are not zero."""
    theirs_class, ours_class, config_class, options = KINDS[kind]
    config = config_class(d_in=D_IN, d_sae=D_SAE, k=k, aux_loss_coefficient=0.5, **options)
    torch.manual_seed(0)
    theirs, ours = theirs_class(config), ours_class(copy.deepcopy(config))
    with torch.no_grad():
        theirs.W_dec.mul_(torch.logspace(-1, 1, D_SAE)[:, None])
        theirs.W_enc.add_(0.3 * torch.randn(D_IN, D_SAE, generator=generator(1)))
        theirs.b_dec.copy_(torch.randn(D_IN, generator=generator(2)))
        theirs.b_enc.copy_(0.5 * torch.randn(D_SAE, generator=generator(3)) + shift)
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


@pytest.fixture(params=["float32", "bfloat16"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By which products a step chooses its latents, whatever this processor is good at."""
    monkeypatch.setattr(sparse_steps, "bfloat16_pays", lambda device: request.param == "bfloat16")
    return str(request.param)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize(("k", "shift"), [(1, 0.0), (5, 0.0), (16, -4.0), (64, 0.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_step(kind: str, k: int, shift: float, dead: str, threads: int) -> None:
    """Also for samples that no latent, or fewer than k, have a pre-activation above 0 for (shift)."""
    theirs, ours = pair(kind, k, shift)
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
    assert torch.get_num_threads() == threads


def test_some_samples_choose_nothing() -> None:
    """What the shift of ``test_step`` is for."""
    acts_BM = step(pair("topk", 16, -4.0)[0], 0).feature_acts
    per_sample = (acts_BM > 0).sum(dim=1)
    assert int(per_sample.min()) == 0
    assert int(per_sample.max()) > 1


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("kind", KINDS)
def test_a_short_training(kind: str) -> None:
    """Adam, its states and gradients in the layout of W_enc; as SAELens', the weights that it ends with."""
    ends = []
    for sae in pair(kind, 5):
        start = [parameter.detach().clone() for parameter in sae.parameters()]
        adam = torch.optim.Adam(sae.parameters(), lr=1e-2, fused=True)
        for index in range(10):
            step(sae, 20 if index > 5 else 0)
            adam.step()
            adam.zero_grad()
        ends.append((start, [parameter.detach() for parameter in sae.parameters()]))
    for start, true, mine in zip(ends[0][0], ends[0][1], ends[1][1], strict=True):
        assert float((mine - true).norm()) < SPARSE_PARAMETERS * float((true - start).norm())


def test_saved_in_the_usual_layout(tmp_path: Path) -> None:
    theirs, ours = pair("topk", 5)
    ours.save_inference_model(tmp_path / "ours")
    theirs.save_inference_model(tmp_path / "theirs")
    for name, tensor in load_file(tmp_path / "theirs" / "sae_weights.safetensors").items():
        assert torch.equal(load_file(tmp_path / "ours" / "sae_weights.safetensors")[name], tensor)


@pytest.mark.parametrize("offset", [-1.0, 0.0, 3.0])
@pytest.mark.parametrize(
    ("n_samples", "d", "m", "k"), [(1, 3, 1, 1), (83, 17, 67, 64), (83, 65, 261, 1), (40, 64, 999, 9)]
)
def test_products_in_bfloat16_choose_the_same(n_samples: int, d: int, m: int, k: int, offset: float) -> None:
    """Each row's k largest, and the k a row largest of all, are those of the product in float32."""
    # Latents of all sizes: what rounding may hide differs by latent. Half the samples look alike: near ties.
    folded_MD = torch.randn(m, d, generator=generator(7)) * torch.logspace(-1, 1, m)[:, None]
    x_BD = torch.randn(n_samples, d, generator=generator(8))
    x_BD[::2] = x_BD[0] + 1e-4 * x_BD[::2]
    offset_M = offset * torch.rand(m, generator=generator(9))
    room_BM = torch.empty(n_samples, m, dtype=torch.bfloat16)
    products = Products(x_BD, folded_MD, offset_M.numpy(), room_BM)
    ranks_BM = (x_BD @ folded_MD.T + offset_M).relu()
    by_row, of_all = products.largest_by_row(k), products.largest_of_all(k * n_samples)
    for (starts_B, columns_Z, found_Z), wanted in (
        (by_row, ranks_BM.topk(k).values.flatten()),
        (of_all, ranks_BM.flatten().topk(k * n_samples).values),
    ):
        rows_Z = torch.arange(n_samples).repeat_interleave(torch.from_numpy(starts_B).diff())
        found = torch.from_numpy(found_Z)
        close = {"rtol": SPARSE_STEP, "atol": SPARSE_STEP}
        torch.testing.assert_close(found, ranks_BM[rows_Z, torch.from_numpy(columns_Z).long()], **close)
        padded = torch.cat([found, torch.zeros(len(wanted) - len(found))])
        torch.testing.assert_close(padded.sort().values, wanted.sort().values, **close)


@pytest.mark.parametrize(
    "case",
    ["normal", "few positive", "none positive", "sorted", "ties", "hidden from the sample", "in the sample alone"],
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
        sampled_N = torch.arange(len(ranks_N)) % SAMPLE_STRIDE == 0
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
