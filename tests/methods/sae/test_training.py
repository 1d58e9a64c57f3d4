"""SAELens' SAEs trained on our shards, in raw or other coordinates, and saved as SAEs of raw activations."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.topk_sae import TopKSAE
from safetensors.torch import load_file

from ksvd_sae.activations.gradients import GradientMoments
from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.errors import ConfigError, ManifestError, ShapeError
from ksvd_sae.evals.heldout.metrics import heldout_metrics
from ksvd_sae.learning.weighting import Weighting, weighting_by_fisher, weighting_by_std
from ksvd_sae.methods.base import Facts, TrainingSetting, load_sae
from ksvd_sae.methods.sae import (
    BatchTopKSAEMethod,
    JumpReLUSAEMethod,
    MatryoshkaBatchTopKSAEMethod,
    SAEMethod,
    TopKSAEMethod,
)
from ksvd_sae.methods.sae import training as baselines
from ksvd_sae.methods.sae.raw_units import WeightedTopKSAE
from ksvd_sae.methods.sae.training import train_sae
from tests.strategies import generator
from tests.tiny_shards import raw_activations, write_harvest
from tests.tolerances import FOLDED_SAE, SPARSE_TRAINING, UNIT_NORM

HOOK = "blocks.0.hook_resid_post"
CONFIG = TopKSAEMethod(n_atoms=96, k=6, passes=10, batch_samples=128, lr=5e-3)
SHORT = TopKSAEMethod(n_atoms=20, k=2, passes=1, batch_samples=128)
_SIZES: dict[str, Any] = {"n_atoms": 48, "k": 4, "passes": 10, "batch_samples": 128, "lr": 5e-3}
CONFIGS: dict[str, SAEMethod] = {
    "topk": TopKSAEMethod(**_SIZES),
    "batchtopk": BatchTopKSAEMethod(**_SIZES),
    "matryoshka": MatryoshkaBatchTopKSAEMethod(groups=[8, 16, 24], **_SIZES),
    # Thresholds move by a learning rate a step: they need the way.
    "jumprelu": JumpReLUSAEMethod(**{**_SIZES, "passes": 20, "lr": 1e-2}),
}


def train(
    config: SAEMethod,
    shards: ActivationShards,
    folder: Path,
    seed: int = 0,
    weighting: Weighting | None = None,
    log_steps: int = 20,
    hook: str = HOOK,
) -> Facts:
    setting = TrainingSetting(
        model_name="tiny",
        hook=hook,
        context_tokens=12,
        seed=seed,
        device=torch.device("cpu"),
        harvest_hash="",
        shards=shards,
        gradient_moments=no_gradients,
    )
    return train_sae(config, setting, folder, weighting, log_steps)


def no_gradients() -> GradientMoments:
    raise AssertionError("no metric here follows from gradients")


@pytest.mark.parametrize("weighted", [False, True])
def test_at_hook_z_heads_are_apart_on_disk_and_flat_for_evals(
    weighted: bool, shards: ActivationShards, tmp_path: Path
) -> None:
    weighting = weighting_by_std(torch.linspace(1, 9, 16)) if weighted else None
    train(SHORT, shards, tmp_path, weighting=weighting, hook="blocks.0.attn.hook_z")
    heads_BHD = raw_activations(6).reshape(6, 2, 8)
    sae, for_evals = SAE.load_from_disk(tmp_path), load_sae(tmp_path, torch.device("cpu"))
    assert sae(heads_BHD).shape == heads_BHD.shape
    assert torch.equal(sae(heads_BHD).flatten(1), for_evals(heads_BHD.flatten(1)))


def log_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


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
    assert facts.samples_seen == seen == passes * 2000 // batch_samples * batch_samples
    assert 0 <= facts.more["dead_at_end"] <= SHORT.n_atoms
    assert facts.seconds is not None
    assert facts.seconds >= 0


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
    config = TopKSAEMethod(n_atoms=n_atoms, k=k)
    with pytest.raises(ShapeError, match=rf"(?s)k too large.*got: {k}.*limit: {limit}"):
        train(config, shards, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(120)
def test_fewer_samples_than_a_batch(tmp_path: Path) -> None:
    """4,096 a batch by default, and small harvests exist: an error or smaller batches, but an end."""
    x_ND = raw_activations(120)
    few = write_harvest(tmp_path / "harvest", {}, x_ND[:100], x_ND[100:])
    facts = None
    with contextlib.suppress(ShapeError):
        facts = train(SHORT.model_copy(update={"passes": 4}), few, tmp_path / "sae")
    assert facts is None or facts.samples_seen >= 100


def test_nothing_is_pickled(trained: Path) -> None:
    names = sorted(path.name for path in trained.rglob("*") if path.is_file())
    assert names == ["cfg.json", "sae_weights.safetensors", "train_log.jsonl"]
    json.loads((trained / "cfg.json").read_text())


def test_no_sae_there(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no cfg\.json"):
        load_sae(tmp_path, torch.device("cpu"))


# ---------------------------------------------------------------- every kind


@pytest.fixture(scope="module")
def kinds(shards: ActivationShards, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each kind, trained."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, config in CONFIGS.items():
        train(config, shards, folder / name)
    return {name: folder / name for name in CONFIGS}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_kind_works_in_raw_units(kinds: dict[str, Path], shards: ActivationShards, name: str) -> None:
    sae = load_sae(kinds[name], torch.device("cpu"))
    assert type(sae) is (TopKSAE if name == "topk" else JumpReLUSAE)
    norms_M = torch.linalg.vector_norm(sae.W_dec, dim=1)
    assert float((norms_M - 1).abs().max().detach()) < UNIT_NORM[torch.float32]
    scores = heldout_metrics(sae, ActivationShards.open(shards.folder, "heldout").batches(100)).scores
    assert scores["fvu"] < 0.35
    # Only TopK keeps to k; the others aim at it.
    assert 0.5 * _SIZES["k"] < scores["l0"] < (1 if name == "topk" else 1.5) * _SIZES["k"] + 1e-9


def test_the_prefixes_of_a_matryoshka_sae_do_more_than_those_of_another(
    kinds: dict[str, Path], shards: ActivationShards
) -> None:
    x_BD = ActivationShards.open(shards.folder, "heldout").tensor()

    def error_of_prefix(name: str) -> float:
        sae = load_sae(kinds[name], torch.device("cpu"))
        code_BM = sae.encode(x_BD)
        code_BM[:, 24:] = 0
        return float((sae.decode(code_BM) - x_BD).square().sum().detach())

    assert error_of_prefix("matryoshka") < 0.8 * error_of_prefix("batchtopk")


def test_matryoshka_groups(shards: ActivationShards, tmp_path: Path) -> None:
    config = MatryoshkaBatchTopKSAEMethod(n_atoms=30, k=2, groups=[10, 10])
    with pytest.raises(ShapeError, match=r"(?s)do not add up.*sum 20.*limit: 30"):
        train(config, shards, tmp_path)
    assert MatryoshkaBatchTopKSAEMethod(n_atoms=1024, k=2).nested == (256, 256, 512)


# ---------------------------------------------------------------- the log and snapshots


@pytest.mark.parametrize("name", CONFIGS)
def test_log(shards: ActivationShards, tmp_path: Path, name: str) -> None:
    config = CONFIGS[name].model_copy(update={"passes": 2})
    facts, lines = train(config, shards, tmp_path, log_steps=10), log_lines(tmp_path)
    assert [line["samples_seen"] // 128 for line in lines] == [1, 10, 20, 30, 31]
    assert all(set(line) == {"samples_seen", "fvu", "l0", "dead"} for line in lines)
    assert lines[0]["fvu"] > 1.2 * lines[-1]["fvu"] > 0
    assert (facts.more["dead_at_end"], facts.more["l0_at_end"]) == (lines[-1]["dead"], round(lines[-1]["l0"], 2))
    if name != "jumprelu":
        assert lines[-1]["l0"] <= _SIZES["k"]


def test_logged_fvu_is_that_of_the_trained_coordinates(shards: ActivationShards, tmp_path: Path) -> None:
    """In raw ones the loudest dimension would say all; the centre and one scale change nothing."""
    still = SHORT.model_copy(update={"lr": 1e-12, "batch_samples": 2000})
    train(still, shards, tmp_path / "raw")
    raw = load_sae(tmp_path / "raw", torch.device("cpu"))
    x_BD = shards.tensor()
    error = float((raw(x_BD) - x_BD).double().square().sum().detach())
    variance = float((x_BD - x_BD.mean(dim=0)).double().square().sum())
    assert log_lines(tmp_path / "raw")[-1]["fvu"] == pytest.approx(error / variance, rel=1e-4)


def test_snapshots(shards: ActivationShards, tmp_path: Path) -> None:
    config = SHORT.model_copy(update={"passes": 2, "snapshots": [3968, 1000, 1000]})
    assert train(config, shards, tmp_path).samples_seen == 3968
    assert sorted(path.name for path in tmp_path.glob("snapshot-*")) == ["snapshot-1000", "snapshot-3968"]
    final = load_file(tmp_path / "sae_weights.safetensors")
    at_end = load_file(tmp_path / "snapshot-3968" / "sae_weights.safetensors")
    assert all(torch.equal(final[name], at_end[name]) for name in final)
    # Taking them changes nothing.
    train(config.model_copy(update={"snapshots": []}), shards, tmp_path / "without")
    without = load_file(tmp_path / "without" / "sae_weights.safetensors")
    assert all(torch.equal(final[name], without[name]) for name in final)
    assert heldout_fvu(tmp_path, shards) < heldout_fvu(tmp_path / "snapshot-1000", shards)


def test_a_snapshot_after_the_end(shards: ActivationShards, tmp_path: Path) -> None:
    config = SHORT.model_copy(update={"snapshots": [1000, 1921]})
    with pytest.raises(ConfigError, match=r"(?s)after the last sample.*got: 1921.*limit: 1920"):
        train(config, shards, tmp_path)


# ---------------------------------------------------------------- other coordinates


def weightings(d_in: int) -> dict[str, Weighting]:
    spread_D = torch.logspace(-2, 2, d_in)[torch.randperm(d_in, generator=generator(1))]
    factor_DD = torch.randn(d_in, d_in, generator=generator(2)) * spread_D.sqrt()
    return {
        "diagonal": weighting_by_std(spread_D, power=1.0),
        "full": weighting_by_fisher(factor_DD @ factor_DD.T, ridge=0.01),
    }


@pytest.mark.parametrize("shape", ["diagonal", "full"])
@pytest.mark.parametrize("name", CONFIGS)
def test_weighted_training_comes_back_to_raw_space(
    shards: ActivationShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, shape: str
) -> None:
    """The SAE of raw activations and the trainer's own, of the activations that it saw: same latents, same sums."""
    weighting, kept = weightings(shards.d_in)[shape], []
    save = baselines._save
    monkeypatch.setattr(baselines, "_save", lambda *given: (kept.append(given), save(*given)))
    train(CONFIGS[name].model_copy(update={"passes": 3}), shards, tmp_path / "raw", weighting=weighting)
    trainers, space, *_ = kept[0]
    trainers.save_inference_model(tmp_path / "weighted")
    raw, theirs = (SAE.load_from_disk(tmp_path / folder).to(torch.float64) for folder in ("raw", "weighted"))
    norms_M = torch.linalg.vector_norm(raw.W_dec, dim=1)
    assert float((norms_M - 1).abs().max().detach()) < UNIT_NORM[torch.float32]
    assert isinstance(raw, WeightedTopKSAE) == (name == "topk")
    x_BD = shards.tensor()[:300].double()
    z_BD = space.apply(x_BD)
    assert float(z_BD.square().mean()) == pytest.approx(1, rel=0.2)
    with torch.no_grad():
        ours_BM, theirs_BM = raw.encode(x_BD), theirs.encode(z_BD)
        rebuilt_BD = weighting.undo(theirs.decode(theirs_BM) / space.scale) + space.centre_D
        error = torch.linalg.vector_norm(raw.decode(ours_BM) - rebuilt_BD, dim=1)
    assert torch.equal(ours_BM != 0, theirs_BM != 0)
    assert 0 < int((ours_BM != 0).sum()) < ours_BM.numel() / 2
    spread = torch.linalg.vector_norm(x_BD - space.centre_D, dim=1)
    assert float((error / spread).max()) < FOLDED_SAE
    # One factor a latent: codes are the trainer's times n_j / s.
    used_M = (ours_BM != 0).any(dim=0)
    factors_BM = ours_BM[:, used_M] / theirs_BM[:, used_M]
    highest_M, lowest_M = factors_BM.nan_to_num(-1).max(dim=0).values, factors_BM.nan_to_num(1e9).min(dim=0).values
    assert float((highest_M / lowest_M - 1).abs().max()) < FOLDED_SAE


def test_topk_must_choose_in_the_trained_coordinates(shards: ActivationShards, tmp_path: Path) -> None:
    """Otherwise SAELens' own class would do."""
    train(CONFIG, shards, tmp_path, weighting=weightings(shards.d_in)["diagonal"])
    sae, x_BD = load_sae(tmp_path, torch.device("cpu")), shards.tensor()[:300]
    assert float(sae.selection_scale.max() / sae.selection_scale.min()) > 1.2
    chosen_BM = sae.encode(x_BD) != 0
    sae.selection_scale.fill_(1.0)
    assert not torch.equal(chosen_BM, sae.encode(x_BD) != 0)
    assert torch.equal(sae.encode(x_BD), TopKSAE.encode(sae, x_BD))


def test_weighting_changes_what_is_learned(shards: ActivationShards, tmp_path: Path) -> None:
    """The loud dimensions of the weighted space are rebuilt better than without."""
    loud_D = torch.ones(shards.d_in)
    loud_D[:4] = 30.0
    train(CONFIG, shards, tmp_path / "weighted", weighting=Weighting(loud_D, 1 / loud_D))
    train(CONFIG, shards, tmp_path / "plain")
    x_BD = ActivationShards.open(shards.folder, "heldout").tensor()
    errors = {
        name: (load_sae(tmp_path / name, torch.device("cpu"))(x_BD) - x_BD).detach()[:, :4].square().mean()
        for name in ("weighted", "plain")
    }
    assert float(errors["weighted"]) < 0.5 * float(errors["plain"])


def test_another_weighting_of_another_width(shards: ActivationShards, tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match=r"(?s)another width.*got: 5.*limit: 16"):
        train(SHORT, shards, tmp_path, weighting=Weighting(torch.ones(5), torch.ones(5)))


def test_weighted_topk_survives_the_disk(shards: ActivationShards, tmp_path: Path) -> None:
    """Bit for bit, and in a process that has only imported ksvd_sae."""
    train(SHORT, shards, tmp_path / "a", weighting=weightings(shards.d_in)["full"])
    sae = SAE.load_from_disk(tmp_path / "a")
    sae.save_model(tmp_path / "b")
    again = SAE.load_from_disk(tmp_path / "b")
    assert isinstance(again, WeightedTopKSAE)
    first, second = sae.state_dict(), again.state_dict()
    assert set(first) == {"W_enc", "W_dec", "b_enc", "b_dec", "selection_scale"}
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again.cfg.to_dict() == sae.cfg.to_dict()
    code = f"""
import warnings; warnings.simplefilter("ignore")
import ksvd_sae
from sae_lens import SAE
print(type(SAE.load_from_disk({str(tmp_path / "a")!r})).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "WeightedTopKSAE\n", done.stderr


# ---------------------------------------------------------------- sparse products


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka"])
def test_sparse_products_train_the_same_sae(
    shards: ActivationShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # Enough passes for dead latents to be helped: the auxiliary loss is part of the step.
    config = CONFIGS[name].model_copy(update={"n_atoms": 200, "groups": [40, 160], "passes": 4})
    assert train(config, shards, tmp_path / "sparse").more["products"] == "sparse"
    monkeypatch.setattr(baselines, "sparse_steps_pay", lambda device: False)
    assert train(config, shards, tmp_path / "dense").more["products"] == "dense"
    for sparse, dense in zip(log_lines(tmp_path / "sparse"), log_lines(tmp_path / "dense"), strict=True):
        assert sparse["fvu"] == pytest.approx(dense["fvu"], rel=SPARSE_TRAINING)
        assert sparse["dead"] == pytest.approx(dense["dead"], abs=2)
    assert log_lines(tmp_path / "dense")[-1]["dead"] > 0


# ---------------------------------------------------------------- with a decoder that stays


@pytest.mark.parametrize("products", ["sparse", "dense"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_frozen_decoder_stays_and_the_rest_moves(
    shards: ActivationShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, products: str
) -> None:
    """Bit for bit in what is trained; the encoder learns to use the drawn directions."""
    seen: dict[str, torch.Tensor] = {}

    def watched(config: Any, sae: Any, *rest: Any) -> Facts:
        seen.update({key: value.detach().clone() for key, value in sae.named_parameters()})
        facts = fit_sae(config, sae, *rest)
        seen.update({f"{key} at end": value.detach().clone() for key, value in sae.named_parameters()})
        return facts

    fit_sae = baselines.fit_sae
    monkeypatch.setattr(baselines, "fit_sae", watched)
    if products == "dense":
        monkeypatch.setattr(baselines, "sparse_steps_pay", lambda device: False)
    frozen = CONFIGS[name].model_copy(update={"frozen_decoder": True, "passes": 4})
    facts = train(frozen, shards, tmp_path / "frozen")
    assert facts.more["products"] == ("dense" if name == "jumprelu" else products)
    assert torch.equal(seen["W_dec"], seen["W_dec at end"])
    assert float((torch.linalg.vector_norm(seen["W_dec"], dim=1) - 1).abs().max()) < UNIT_NORM[torch.float32]
    for moved in seen.keys() - {"W_dec", *(key for key in seen if key.endswith(" at end"))}:
        assert not torch.equal(seen[moved], seen[f"{moved} at end"]), moved
    # What is saved are those directions, and drawn ones rebuild less than learned ones.
    sae = load_sae(tmp_path / "frozen", torch.device("cpu"))
    torch.testing.assert_close(sae.W_dec.detach(), seen["W_dec"], rtol=0, atol=UNIT_NORM[torch.float32])
    lines = log_lines(tmp_path / "frozen")
    assert lines[-1]["fvu"] < 0.8 * lines[0]["fvu"]
    train(frozen.model_copy(update={"frozen_decoder": False}), shards, tmp_path / "learned")
    assert heldout_fvu(tmp_path / "learned", shards) < 0.9 * heldout_fvu(tmp_path / "frozen", shards)


def test_a_frozen_decoder_is_a_control_with_a_key_of_its_own() -> None:
    frozen = SHORT.model_copy(update={"frozen_decoder": True})
    assert (frozen.is_control, frozen.is_sae) == (True, False)
    assert (SHORT.is_control, SHORT.is_sae) == (False, True)
    assert frozen.key() == {**SHORT.key(), "frozen_decoder": True}
    assert "frozen_decoder" not in SHORT.key()


def test_fitting_an_encoder_to_a_frozen_decoder_follows_the_reference(
    shards: ActivationShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TopK by autograd in float64, dense, with torch's Adam and SAELens' clipping: the same steps."""
    started: list[dict[str, torch.Tensor]] = []
    batches: list[torch.Tensor] = []
    made = baselines._freeze_decoder_

    def recorded(sae: Any) -> None:
        made(sae)
        started.append({key: value.detach().double() for key, value in sae.named_parameters()})
        forward = sae.training_forward_pass

        def kept(step_input: Any) -> Any:
            batches.append(step_input.sae_in.detach().double())
            return forward(step_input)

        sae.training_forward_pass = kept

    monkeypatch.setattr(baselines, "_freeze_decoder_", recorded)
    config = SHORT.model_copy(update={"frozen_decoder": True, "batch_samples": 100, "lr_decay_fraction": 0.0})
    train(config, shards, tmp_path)
    w_dec_MD = started[0]["W_dec"]
    w_enc_DM, b_enc_M, b_dec_D = (started[0][key].requires_grad_() for key in ("W_enc", "b_enc", "b_dec"))
    adam = torch.optim.Adam([w_enc_DM, b_enc_M, b_dec_D], lr=config.lr, betas=(0.9, 0.999))
    for z_BD in batches:
        before_BM = (z_BD - b_dec_D) @ w_enc_DM + b_enc_M
        best = before_BM.topk(config.k, dim=1)
        acts_BM = torch.zeros_like(before_BM).scatter(1, best.indices, best.values.relu())
        loss = (acts_BM @ w_dec_MD + b_dec_D - z_BD).square().sum(dim=1).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([w_enc_DM, b_enc_M, b_dec_D], 1.0)
        adam.step()
    with torch.no_grad():
        saved, space = load_sae(tmp_path, torch.device("cpu")), baselines.trained_space(shards, None)
        x_BD = shards.tensor()[:200].double()
        z_BD = (x_BD - space.centre_D.double()) * space.scale
        before_BM = (z_BD - b_dec_D) @ w_enc_DM + b_enc_M
        best = before_BM.topk(config.k, dim=1)
        acts_BM = torch.zeros_like(before_BM).scatter(1, best.indices, best.values.relu())
        wanted_BD = (acts_BM @ w_dec_MD + b_dec_D) / space.scale + space.centre_D.double()
        off_B = (saved.to(torch.float64)(x_BD) - wanted_BD).norm(dim=1) / (x_BD - space.centre_D.double()).norm(dim=1)
    # One near tie in a hundred choices may fall the other way in float32.
    assert float((off_B < FOLDED_SAE).double().mean()) > 0.97
