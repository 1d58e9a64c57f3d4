"""SAELens' TopK SAE trained on our shards."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.topk_sae import TopKSAE
from safetensors.torch import load_file

from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.config import TopKSAEConfig
from ksvd_sae.errors import ManifestError, ShapeError
from ksvd_sae.evaluation.baselines import load_sae, train_topk_sae
from ksvd_sae.evaluation.metrics import heldout_metrics
from tests.tiny_shards import raw_activations, write_harvest
from tests.tolerances import UNIT_NORM

HOOK = "blocks.0.hook_resid_post"
CONFIG = TopKSAEConfig(n_atoms=96, k=6, passes=10, batch_samples=128, lr=5e-3)
SHORT = TopKSAEConfig(n_atoms=20, k=2, passes=1, batch_samples=128)


def train(config: TopKSAEConfig, shards: ActivationShards, folder: Path, seed: int = 0) -> dict[str, Any]:
    return train_topk_sae(
        config,
        shards,
        folder,
        model_name="tiny",
        hook_name=HOOK,
        context_size=12,
        seed=seed,
        device=torch.device("cpu"),
    )


@pytest.fixture(scope="module")
def trained(shards: ActivationShards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("topk")
    train(CONFIG, shards, folder)
    return folder


def heldout_fvu(folder: Path, shards: ActivationShards) -> float:
    part = ActivationShards.open(shards.folder, "heldout")
    return heldout_metrics(SAE.load_from_disk(folder), part.batches(100)).scores["fvu"]


def test_saelens_loads_it(trained: Path) -> None:
    sae = SAE.load_from_disk(trained)
    assert isinstance(sae, TopKSAE)
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.k) == (16, 96, 6)
    found = sae.cfg.metadata
    assert (found.model_name, found.hook_name, found.context_size, found.prepend_bos) == ("tiny", HOOK, 12, True)
    ours = load_sae(trained, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), ours.parameters(), strict=True))


def test_decoder_rows_have_unit_norm(trained: Path) -> None:
    norms_M = torch.linalg.vector_norm(SAE.load_from_disk(trained).W_dec, dim=1)
    assert float((norms_M - 1).abs().max().detach()) < UNIT_NORM[torch.float32]


def test_it_works_in_raw_units(trained: Path, shards: ActivationShards) -> None:
    """Trained on centred and scaled activations, it takes and gives raw ones: a mean of 300, a spread of 50.

    An SAE left in scaled units would rebuild them with an error hundreds of times their variance.
    """
    fvu = heldout_fvu(trained, shards)
    assert fvu < 0.5
    sae = SAE.load_from_disk(trained)
    x_BD = shards.tensor()[:50]
    mean_D = shards.centre_D.float()
    rebuilt_BD = sae(x_BD).detach()
    # By tokens too: nearer to each sample than the mean is, nearly always.
    closer = (rebuilt_BD - x_BD).norm(dim=1) < (mean_D - x_BD).norm(dim=1)
    assert float(closer.float().mean()) > 0.9
    assert int((sae.encode(x_BD) != 0).sum(dim=1).max()) <= CONFIG.k


def test_training_is_what_lowers_the_error(shards: ActivationShards, trained: Path, tmp_path: Path) -> None:
    train(CONFIG.model_copy(update={"passes": 1}), shards, tmp_path)
    assert heldout_fvu(trained, shards) < 0.8 * heldout_fvu(tmp_path, shards)


@pytest.mark.parametrize(
    ("passes", "batch_samples", "seen"), [(1, 128, 1920), (3, 96, 5952), (2, 2000, 4000), (1, 2000, 2000)]
)
def test_samples_seen(shards: ActivationShards, tmp_path: Path, passes: int, batch_samples: int, seen: int) -> None:
    """passes · n, rounded down to whole batches."""
    config = SHORT.model_copy(update={"passes": passes, "batch_samples": batch_samples})
    facts = train(config, shards, tmp_path)
    assert facts["samples_seen"] == seen == passes * 2000 // batch_samples * batch_samples
    assert 0 <= facts["dead_at_end"] <= SHORT.n_atoms
    assert facts["seconds"] >= 0


def test_same_seed_same_bits(shards: ActivationShards, tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(SHORT, shards, tmp_path / name, seed)
        weights.append(load_file(tmp_path / name / "sae_weights.safetensors"))
    first, again, other = weights
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["W_dec"], other["W_dec"])


@pytest.mark.parametrize(("n_atoms", "k", "limit"), [(12, 13, "12"), (40, 17, "16")])
def test_k_too_large(shards: ActivationShards, tmp_path: Path, n_atoms: int, k: int, limit: str) -> None:
    config = TopKSAEConfig(n_atoms=n_atoms, k=k)
    with pytest.raises(ShapeError, match=rf"(?s)k too large.*got: {k}.*limit: {limit}"):
        train(config, shards, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(20)
def test_fewer_samples_than_a_batch(tmp_path: Path) -> None:
    """4,096 a batch by default, and small harvests exist: an error or smaller batches, but an end."""
    x_ND = raw_activations(120)
    few = write_harvest(tmp_path / "harvest", {}, x_ND[:100], x_ND[100:])
    facts = None
    with contextlib.suppress(ShapeError):
        facts = train(SHORT.model_copy(update={"passes": 4}), few, tmp_path / "sae")
    assert facts is None or facts["samples_seen"] >= 100


def test_nothing_is_pickled(trained: Path) -> None:
    names = sorted(path.name for path in trained.rglob("*") if path.is_file())
    assert names == ["cfg.json", "sae_weights.safetensors"]
    json.loads((trained / "cfg.json").read_text())


def test_no_sae_there(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no cfg\.json"):
        load_sae(tmp_path, torch.device("cpu"))
