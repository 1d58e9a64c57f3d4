"""Fine-tuning on the model's predictions: what it lowers, how each step goes, what it keeps, what cannot be."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.saes.topk_sae import TopKSAE
from torch import Tensor

from ksvd_sae.activations.divergence import SplicedDivergence
from ksvd_sae.activations.gradients import GradientMoments
from ksvd_sae.activations.language import ActivationReader
from ksvd_sae.activations.shards import write_harvest
from ksvd_sae.dictionary import Dictionary
from ksvd_sae.errors import ConfigError, TextError
from ksvd_sae.methods.base import TRAIN_LOG, Facts, Method, Source, TrainingSetting
from ksvd_sae.methods.controls import PCAMethod
from ksvd_sae.methods.db_ksvd import DBKSVDMethod
from ksvd_sae.methods.finetuned import FinetunedMethod
from ksvd_sae.methods.sae import BatchTopKSAEMethod, TopKSAEMethod
from ksvd_sae.report.pivot import places
from tests.activations.test_divergence import BOS, plain, tokens
from tests.methods.test_derived_config import run_with
from tests.tiny_saes import HOOK, one_thread, tiny_model
from tests.tolerances import SPARSE_TRAINING, UNIT_NORM

OF: dict[str, Method] = {
    "topk": TopKSAEMethod(n_atoms=24, k=2, passes=5, batch_samples=64, lr=5e-3),
    "topk-std": TopKSAEMethod(n_atoms=24, k=2, passes=5, batch_samples=64, lr=5e-3, weighting={"kind": "std"}),  # type: ignore[arg-type]
    "batchtopk": BatchTopKSAEMethod(n_atoms=24, k=2, passes=5, batch_samples=64, lr=5e-3),
    "ksvd": DBKSVDMethod(n_atoms=24, k=2),
    "ksvd-omp-std": DBKSVDMethod(n_atoms=24, k=2, coder="omp", nonnegative=True, weighting={"kind": "std"}),  # type: ignore[arg-type]
}


@dataclass(frozen=True)
class Place:
    """A tiny model, its harvest, and each of OF as it was trained there."""

    setting: TrainingSetting
    sources: dict[str, Source]

    def tune(self, name: str, folder: Path, **options: Any) -> tuple[FinetunedMethod, Facts]:
        method = FinetunedMethod.model_validate({"of": name, "tokens": 600, "batch_contexts": 4, "lr": 3e-3, **options})
        completed = method.completed("tuned", OF)
        assert isinstance(completed, FinetunedMethod)
        return completed, completed.train(self.setting, folder, self.sources[name])


def no_gradients() -> GradientMoments:
    raise AssertionError("no metric here follows from gradients")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("finetuned")
    with one_thread():
        reader = ActivationReader(tiny_model(), HOOK)
        text_BL = tokens(80, seed=3)
        x_ND = reader.read(text_BL)
        setting = TrainingSetting(
            model_name="tiny",
            hook=HOOK,
            context_tokens=text_BL.shape[1],
            seed=0,
            device=torch.device("cpu"),
            harvest_hash="",
            shards=write_harvest(folder / "harvest", {}, [x_ND[100:]], [x_ND[:100]]),
            gradient_moments=no_gradients,
            training_text=lambda: (reader, iter(text_BL)),
        )
        sources = {}
        for name, method in OF.items():
            facts = method.train(setting, folder / name, None)
            sources[name] = Source(method, folder / name, facts.samples_seen)
        yield Place(setting, sources)


def divergence_of(sae: Any, place: Place) -> float:
    """On contexts that nothing was learned from."""
    assert place.setting.training_text is not None
    spliced = SplicedDivergence(place.setting.training_text()[0], None)
    clean = spliced.clean(tokens(40, seed=99))
    return spliced.gradient(clean, sae.decode(sae.encode(clean.x_ND)).detach())[0]


@pytest.mark.parametrize("name", OF)
def test_lowers_the_divergence(place: Place, tmp_path: Path, name: str) -> None:
    """Of text that it did not see; and codes as before, by the same number of unit rows."""
    before = OF[name].load(place.setting, place.sources[name].folder)
    method, facts = place.tune(name, tmp_path)
    after = method.load(place.setting, tmp_path)
    assert divergence_of(after, place) < 0.95 * divergence_of(before, place)
    assert type(after) is type(before)
    assert after.W_dec.shape == before.W_dec.shape
    assert not torch.equal(after.W_dec, before.W_dec)
    assert not torch.equal(after.b_dec, before.b_dec)
    norms_M = torch.linalg.vector_norm(after.W_dec, dim=1)
    assert float((norms_M - 1).abs().max().detach()) < UNIT_NORM[torch.float32]
    x_BD = place.setting.shards.tensor()[:200]
    limit = 2 if name != "batchtopk" else 24
    assert 0 < int((after.encode(x_BD) != 0).sum(dim=1).max()) <= limit
    assert bool((after.encode(x_BD) < 0).any()) == method.has_signs
    lines = [json.loads(line) for line in (tmp_path / TRAIN_LOG).read_text().splitlines()]
    # 60 contexts of 10 tokens, 4 a step; of each all but BOS.
    assert len(lines) == 15
    seen = int((tokens(80, seed=3)[:60] != BOS).sum())
    assert facts.samples_seen == (place.sources[name].samples_seen or 0) + seen
    assert facts.more == {"finetuned_samples": seen, "kl_at_end": lines[-1]["kl"], "l0_at_end": lines[-1]["l0"]}
    assert (facts.k, facts.signed, facts.d_sae) == (2, OF[name].has_signs, 24)


def test_a_dictionary_keeps_its_metric_and_coder(place: Place, tmp_path: Path) -> None:
    method, _ = place.tune("ksvd-omp-std", tmp_path)
    before, after = Dictionary.load(place.sources["ksvd-omp-std"].folder), method.dictionary(place.setting, tmp_path)
    assert after.coding == replace(before.coding, coder="omp")
    assert before.weighting is not None
    assert after.weighting is not None
    assert torch.equal(before.weighting.matrix, after.weighting.matrix)
    with pytest.raises(ConfigError, match="fine-tuned as an SAE"):
        place.tune("topk", tmp_path / "sae")[0].dictionary(place.setting, tmp_path / "sae")


def test_the_same_again(place: Place, tmp_path: Path) -> None:
    """And what it started from is as it was."""
    untouched = OF["topk"].load(place.setting, place.sources["topk"].folder).state_dict()
    first, second = (place.tune("topk", tmp_path / name)[0].load(place.setting, tmp_path / name) for name in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    again = OF["topk"].load(place.setting, place.sources["topk"].folder).state_dict()
    assert all(torch.equal(untouched[name], again[name]) for name in untouched)


def test_topk_takes_the_steps_of_the_reference(place: Place, tmp_path: Path) -> None:
    """All in float64: whole runs of the model with their graph, TopK by its definition, Adam with a rate a group."""
    method, _ = place.tune("topk", tmp_path, tokens=50, batch_contexts=2)
    found = method.load(place.setting, tmp_path)
    start = OF["topk"].load(place.setting, place.sources["topk"].folder)
    assert type(start) is TopKSAE
    w_enc_DM, w_dec_MD, b_enc_M, b_dec_D = weights = [
        getattr(start, name).detach().double().requires_grad_() for name in ("W_enc", "W_dec", "b_enc", "b_dec")
    ]
    scale, n_steps = place.setting.shards.statistics.scale, 3
    adam = torch.optim.Adam(
        [{"params": weights[:2], "lr": 3e-3}, {"params": weights[2:], "lr": 3e-3 * scale}], betas=(0.9, 0.999)
    )
    model = tiny_model().double()
    model.cfg.dtype = torch.float64

    def rebuilt(x_ND: Tensor) -> Tensor:
        best = ((x_ND - b_dec_D) @ w_enc_DM + b_enc_M).topk(2, dim=1)
        acts_NM = torch.zeros(len(x_ND), 24, dtype=torch.float64).scatter(1, best.indices, best.values.relu())
        return acts_NM @ w_dec_MD + b_dec_D

    for step, tokens_BL in enumerate(tokens(80, seed=3)[:5].split(2)):
        for group, rate in zip(adam.param_groups, (3e-3, 3e-3 * scale), strict=True):
            group["lr"] = rate * (1 - step / n_steps)
        ordinary_BL = tokens_BL != BOS
        x_ND = model.run_with_cache(tokens_BL, names_filter=HOOK)[1][HOOK][ordinary_BL]
        out_ND = rebuilt(x_ND)
        kl, pull_ND = plain(model, HOOK, tokens_BL, ordinary_BL, out_ND.detach())
        mse = (out_ND - x_ND).square().sum(dim=1).mean()
        adam.zero_grad()
        (0.5 * (mse + mse.detach() / kl * (out_ND * pull_ND).sum())).backward()
        adam.step()
        with torch.no_grad():
            w_dec_MD /= torch.linalg.vector_norm(w_dec_MD, dim=1, keepdim=True)
    for mine, wanted, before in zip(
        (found.W_enc, found.W_dec, found.b_enc, found.b_dec),
        weights,
        (start.W_enc, start.W_dec, start.b_enc, start.b_dec),
        strict=True,
    ):
        moved = float((wanted - before).norm().detach())
        assert moved > 0
        assert float((mine - wanted).norm().detach()) < SPARSE_TRAINING * moved


def test_a_rate_that_is_too_large(place: Place, tmp_path: Path) -> None:
    from ksvd_sae.errors import ActivationError

    with pytest.raises(ActivationError, match=r"(?s)fine-tuning.*smaller lr"):
        place.tune("topk", tmp_path, lr=1e30)


def test_too_little_text(place: Place, tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"(?s)before 900 tokens.*80 contexts"):
        place.tune("topk", tmp_path, tokens=900)
    without = Place(replace(place.setting, training_text=None), place.sources)
    with pytest.raises(ConfigError, match="no language model"):
        without.tune("topk", tmp_path)


# ---------------------------------------------------------------- in a config


def finetuned(**fields: Any) -> FinetunedMethod:
    found = run_with(it={"kind": "finetuned", "tokens": 64, **fields}).dictionaries["it"]
    assert isinstance(found, FinetunedMethod)
    return found


def test_is_as_the_other() -> None:
    sae, ksvd, plus = (finetuned(of=name) for name in ("topk", "ksvd", "plus"))
    assert (sae.k, sae.coder, sae.has_signs, sae.is_sae, sae.coder_label) == (
        4,
        None,
        False,
        True,
        "own encoder, fine-tuned",
    )
    assert (ksvd.k, ksvd.coder, ksvd.has_signs, ksvd.is_sae, ksvd.coder_label) == (
        8,
        "mp",
        True,
        False,
        "MP, fine-tuned",
    )
    # In a table of dictionaries by coders it stands beside the other, not in its place.
    found = places(run_with(it={"kind": "finetuned", "of": "topk", "tokens": 64}))
    assert found == {"topk": ("topk", "own encoder"), "it": ("topk", "own encoder, fine-tuned")}
    assert (plus.has_signs, plus.metric.kind) == (False, "std")
    assert not sae.learns_anywhere
    # The other's key does not say how it codes, and that is fine-tuned.
    assert ksvd.key()["coder"] == "mp"
    assert FinetunedMethod.model_validate(ksvd.model_dump()) == ksvd


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"of": "pca"}, "nothing to fine-tune"),
        ({"of": "topk", "k": 3}, "k: it is fine-tuned as 'topk' codes"),
        ({"of": "ksvd", "coder": "omp"}, "coder: it is fine-tuned as 'ksvd' codes"),
        ({"of": "topk", "weighting": "std"}, "weighting: it is fine-tuned as 'topk' codes"),
        ({"of": "topk", "view": "split"}, "needs signs"),
        ({"of": "topk", "tokens": 1 << 30}, "above harvest.train_tokens"),
    ],
)
def test_what_cannot_be(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        finetuned(**fields)


def test_not_of_images() -> None:
    from ksvd_sae.run.config import parse_config
    from tests.run.test_image_config import RAW

    sae = {"kind": "topk_sae", "n_atoms": 24, "k": 3}
    raw = {**RAW, "dictionaries": {"sae": sae, "it": {"kind": "finetuned", "of": "sae"}}}
    with pytest.raises(ConfigError, match=r"dictionaries.it: kind 'finetuned' needs a language model"):
        parse_config(raw)


def test_pca_would_have_no_gradient_of_its_choice() -> None:
    method = FinetunedMethod(of="pca", tokens=10)
    with pytest.raises(ValueError, match="codes by no pursuit"):
        method.like(PCAMethod(k=2))
