"""Own metrics against the definitions, written out in float64 numpy."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from ksvd_sae.dictionary import Dictionary
from ksvd_sae.errors import KsvdSaeError, ShapeError
from ksvd_sae.evals.heldout import metrics
from ksvd_sae.evals.heldout.metrics import coherence, heldout_metrics
from ksvd_sae.learning.coding import Coding
from ksvd_sae.learning.noise import SizeHistogram
from ksvd_sae.sae import sae_from_dictionary
from tests.strategies import generator, unit_atoms
from tests.tiny_saes import D_MODEL, identity_sae, tiny_db_ksvd_sae, tiny_topk_sae
from tests.tolerances import HELDOUT_METRIC, PERFECT_FVU


def samples(n: int = 500, seed: int = 3) -> Tensor:
    """The mean is five times the spread, so an FVU that forgets it is far off."""
    return torch.randn(n, D_MODEL, generator=generator(seed)) + 5 * torch.linspace(-1, 1, D_MODEL)


def by_definition(sae: torch.nn.Module, x_BD: Tensor) -> dict[str, float]:
    x = x_BD.double().numpy()
    codes = sae.encode(x_BD).detach().double().numpy()
    atoms = sae.W_dec.detach().double().numpy()
    rebuilt = codes @ atoms + sae.b_dec.detach().double().numpy()
    density = (codes != 0).mean(axis=0)
    unit = atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
    nearest = [max(abs(float(unit[i] @ unit[j])) for j in range(len(unit)) if j != i) for i in range(len(unit))]
    histogram = SizeHistogram()
    lengths = np.linalg.norm(x - sae.b_dec.detach().double().numpy(), axis=1, keepdims=True)
    histogram.add(torch.from_numpy(np.abs(codes) * np.linalg.norm(atoms, axis=1) / lengths))
    gap = histogram.gap()
    return {
        "noise_gap": np.nan if gap is None else gap,
        "fvu": ((x - rebuilt) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum(),
        "l0": (codes != 0).sum(axis=1).mean(),
        "dead_fraction": (density == 0).mean(),
        "density_over_1_percent": (density > 0.01).mean(),
        "density_over_10_percent": (density > 0.1).mean(),
        "coherence_max": max(nearest),
        "coherence_mean_max": float(np.mean(nearest)),
    }


CUTS = {"one batch": (500,), "some one by one": (*(1,) * 30, 470), "uneven": (7, 1, 199, 0, 293), "halves": (250, 250)}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("inside", [64 << 20, 4 * 24 * 11], ids=["whole", "elevens"])
@pytest.mark.parametrize("make", [tiny_db_ksvd_sae, tiny_topk_sae])
def test_scores_are_the_definitions(
    monkeypatch: pytest.MonkeyPatch, make: type, inside: int, cut: tuple[int, ...]
) -> None:
    """However the stream is cut, and however a batch is cut again to bound the memory."""
    monkeypatch.setattr(metrics, "_BATCH_BYTES", inside)
    sae, x_BD = make(), samples()
    found = heldout_metrics(sae, iter(x_BD.split(list(cut))))
    assert found.n_tokens == 500
    assert found.scores == pytest.approx(by_definition(sae, x_BD), rel=HELDOUT_METRIC, nan_ok=True)
    density_F = (sae.encode(x_BD) != 0).double().mean(dim=0)
    assert torch.allclose(found.density_F, density_F)


def test_density_counts_both_signs() -> None:
    sae, x_BD = tiny_db_ksvd_sae(), samples()
    codes_BF = sae.encode(x_BD)
    found = heldout_metrics(sae, iter([x_BD]))
    assert bool((codes_BF < 0).any())
    positive_only = float((codes_BF > 0).sum(dim=1).double().mean())
    assert found.scores["l0"] == 4.0
    assert positive_only < 3.8


def test_split_view() -> None:
    """Each sign of an atom is a latent, which may be dead by itself; coherence is of the atoms: no sign is another."""
    signed, split, x_BD = tiny_db_ksvd_sae(), tiny_db_ksvd_sae(view="split"), samples()
    one, two = heldout_metrics(signed, iter([x_BD])), heldout_metrics(split, iter([x_BD]))
    for name in ("fvu", "l0", "coherence_max", "coherence_mean_max"):
        assert two.scores[name] == pytest.approx(one.scores[name], rel=HELDOUT_METRIC), name
    assert one.scores["coherence_max"] < 0.99
    codes_BM = signed.encode(x_BD)
    density_2M = torch.cat([(codes_BM > 0).double().mean(dim=0), (codes_BM < 0).double().mean(dim=0)])
    assert torch.allclose(two.density_F, density_2M)
    assert two.scores["dead_fraction"] == float((density_2M == 0).double().mean())
    assert two.scores["dead_fraction"] > one.scores["dead_fraction"]


def test_dead_latents() -> None:
    """Samples that vary in 10 dimensions never use the atoms along the other 6."""
    x_BD = samples()
    x_BD[:, 10:] = 0
    dictionary = Dictionary(torch.eye(D_MODEL), torch.zeros(D_MODEL), Coding(3))
    sae = sae_from_dictionary(dictionary, model_name="tiny", hook_name="blocks.0.hook_resid_post")
    found = heldout_metrics(sae, iter([x_BD]))
    assert found.scores["dead_fraction"] >= 6 / 16
    assert found.scores["dead_fraction"] == by_definition(sae, x_BD)["dead_fraction"]
    assert bool((found.density_F[10:] == 0).all())


def test_perfect_reconstruction_has_no_error() -> None:
    found = heldout_metrics(identity_sae(), iter([samples()]))
    assert 0 <= found.scores["fvu"] < PERFECT_FVU


@dataclass
class MeanOnly:
    """Codes nothing and rebuilds every sample as the mean."""

    mean_D: Tensor
    W_dec: Tensor

    @property
    def b_dec(self) -> Tensor:
        return self.mean_D

    def encode(self, x_BD: Tensor) -> Tensor:
        return x_BD.new_zeros(len(x_BD), len(self.W_dec))

    def decode(self, code_BF: Tensor) -> Tensor:
        return self.mean_D.expand(len(code_BF), -1)


def test_predicting_the_mean_explains_nothing() -> None:
    x_BD = samples()
    found = heldout_metrics(MeanOnly(x_BD.mean(dim=0), unit_atoms(24, D_MODEL, dtype=torch.float32)), iter([x_BD]))
    assert found.scores["fvu"] == pytest.approx(1, rel=HELDOUT_METRIC)
    assert (found.scores["l0"], found.scores["dead_fraction"]) == (0, 1)
    # Without the mean in the denominator this would be far below 1.
    assert float(((x_BD - x_BD.mean(dim=0)) ** 2).sum() / (x_BD**2).sum()) < 0.2


def test_mean_of_a_far_offset_is_not_lost_to_rounding() -> None:
    """Σx² − n·x̄² of a mean 10⁴ times the spread."""
    x_BD = samples().double() + 1e4
    found = heldout_metrics(MeanOnly(x_BD.mean(dim=0), unit_atoms(24, D_MODEL)), iter(x_BD.split(100)))
    assert found.scores["fvu"] == pytest.approx(1, rel=HELDOUT_METRIC)


def test_other_width() -> None:
    with pytest.raises(ShapeError, match=r"(?s)does not fit.*d_in = 16.*activations of 12 dimensions"):
        heldout_metrics(tiny_db_ksvd_sae(), iter([torch.zeros(3, 12)]))


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, D_MODEL)]], ids=["no batch", "empty batch"])
def test_no_tokens(batches: list[Tensor]) -> None:
    stream: Iterator[Tensor] = iter(batches)
    with pytest.raises(ShapeError, match="no tokens"):
        heldout_metrics(tiny_db_ksvd_sae(), stream)


@pytest.mark.parametrize("n", [1, 5])
def test_activations_without_variance(n: int) -> None:
    """FVU is not defined then: an error of ours, not a division by zero."""
    x_BD = torch.ones(n, D_MODEL)
    with pytest.raises(KsvdSaeError):
        heldout_metrics(tiny_db_ksvd_sae(), iter([x_BD]))


def test_coherence_finds_a_flipped_duplicate() -> None:
    atoms_MD = unit_atoms(10, D_MODEL, dtype=torch.float32)
    atoms_MD[7] = -3 * atoms_MD[2]
    found = coherence(atoms_MD)
    assert found["coherence_max"] == pytest.approx(1, abs=1e-6)


def test_coherence_over_several_blocks() -> None:
    """More atoms than a block of rows holds, the nearest pair across two blocks."""
    atoms_MD = unit_atoms(2100, 8, dtype=torch.float32)
    atoms_MD[2050] = atoms_MD[3]
    cosines = (atoms_MD.double() @ atoms_MD.double().T).abs().fill_diagonal_(-1).max(dim=1).values
    found = coherence(atoms_MD)
    assert found["coherence_max"] == pytest.approx(1, abs=1e-6)
    assert found["coherence_mean_max"] == pytest.approx(float(cosines.mean()), rel=HELDOUT_METRIC)


def test_coherence_of_one_atom_is_zero() -> None:
    assert coherence(torch.ones(1, 5)) == {"coherence_max": 0.0, "coherence_mean_max": 0.0}
