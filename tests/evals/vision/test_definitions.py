"""Each eval on images against its definition written out slowly, image by image and latent by latent, in float64."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ksvd_sae.activations.vision.heldout import HeldoutImages
from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals import ImageEvaluationConfig
from ksvd_sae.evals.base import EvalSetting, Heldout, Panelist
from ksvd_sae.evals.vision import (
    ImageProbingEval,
    MonosemanticityEval,
    ProbePreservationEval,
    SpatialEval,
    TransferEval,
)
from ksvd_sae.evals.vision.monosemanticity import similarity
from ksvd_sae.evals.vision.spatial import morans_i
from tests import tolerances
from tests.evals.vision.conftest import COLUMNS, N_IMAGES, ROWS, elsewhere_of, heldout_of, planted, planted_elsewhere

Array = NDArray[Any]
P = ROWS * COLUMNS


@pytest.fixture
def panelist(sae: Any) -> Panelist:
    return Panelist("ours", "0123456789ab", lambda: sae)


@pytest.fixture
def code_IPF(sae: Any) -> Array:
    return np.asarray(sae.encode(planted()[0].flatten(0, 1)).detach().double()).reshape(N_IMAGES, P, -1)


# ---------------------------------------------------------------- spatial


def slow_morans_i(value_RC: Array) -> float:
    """(P / S) Σ_pq w_pq c_p c_q / Σ c_p², with queen's neighbours."""
    centred = value_RC - value_RC.mean()
    over, n_pairs = 0.0, 0
    for r in range(ROWS):
        for c in range(COLUMNS):
            for r2 in range(ROWS):
                for c2 in range(COLUMNS):
                    if max(abs(r - r2), abs(c - c2)) == 1:
                        over += centred[r, c] * centred[r2, c2]
                        n_pairs += 1
    return float(value_RC.size / n_pairs * over / (centred**2).sum())


@pytest.mark.parametrize("max_images", [4, 200])
def test_spatial(panelist: Panelist, code_IPF: Array, setting: EvalSetting, heldout: Heldout, max_images: int) -> None:
    config = SpatialEval(min_active_patches=2, max_active_fraction=0.5, min_images=3, max_images=max_images)
    of_latents = {}
    for f in range(code_IPF.shape[2]):
        found = []
        for i in range(N_IMAGES):
            value_P = code_IPF[i, :, f]
            if 2 <= (value_P != 0).sum() <= int(0.5 * P) and len(found) < max_images:
                found.append(slow_morans_i(value_P.reshape(ROWS, COLUMNS)))
        if len(found) >= 3:
            of_latents[f] = np.mean(found)
    measured = config.measure(panelist, setting, heldout)
    assert measured.n == len(of_latents) > 10
    assert measured.scores["morans_i"] == pytest.approx(np.mean(list(of_latents.values())), **tolerances.FLOAT32_SCORE)
    scattered = np.mean([i < 0.1 for i in of_latents.values()])
    assert measured.scores["scattered_fraction"] == pytest.approx(scattered)
    assert measured.scores["scored_fraction"] == pytest.approx(len(of_latents) / code_IPF.shape[2])
    assert dict(measured.more["morans_i_of_latents"]) == pytest.approx(of_latents, abs=1e-5)


def test_what_lies_together_and_what_does_not() -> None:
    block_RC, pieces_RC, same_RC = torch.zeros(6, 6), torch.zeros(6, 6), torch.ones(6, 6)
    block_RC[1:4, 1:4] = 1
    pieces_RC[::3, ::3] = 1
    code_IPF = torch.stack([block_RC, pieces_RC, same_RC]).flatten(1).T[None]
    i_IF, varies_IF = morans_i(code_IPF, 6, 6)
    assert i_IF[0, 0] > 0.4
    assert i_IF[0, 1] < 0
    assert varies_IF.tolist() == [[True, True, False]]


def test_spatial_draws_latents(panelist: Panelist, setting: EvalSetting, heldout: Heldout) -> None:
    few = SpatialEval(min_active_patches=2, min_images=3, max_latents=5)
    measured = few.measure(panelist, setting, heldout)
    assert measured.n == 5
    other = few.with_seed(1).measure(panelist, setting, heldout)
    assert other.more != measured.more
    assert few.measure(panelist, setting, heldout) == measured


def test_no_latent_with_enough_images_gives_no_score(panelist: Panelist, setting: EvalSetting, tmp_path: Path) -> None:
    results = SpatialEval(min_images=10_000).run([panelist], setting, tmp_path)
    assert results.metrics["ours"]["morans_i"] is None
    assert results.n == {"ours": 0}


# ---------------------------------------------------------------- probes


def split(labels: list[str], fraction: float, seed: int) -> tuple[Array, Array, Array]:
    from sklearn.model_selection import train_test_split

    label_I = np.array([sorted(set(labels)).index(label) for label in labels])
    train, test = train_test_split(np.arange(len(labels)), test_size=fraction, stratify=label_I, random_state=seed)
    return label_I, train, test


def fitted(x_ND: Array, label_N: Array, seed: int, steps: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LogisticRegression(max_iter=steps, random_state=seed).fit(x_ND, label_N)


def test_probe_preservation(panelist: Panelist, sae: Any, setting: EvalSetting, heldout: Heldout) -> None:
    x_IPD, _, labels = planted()
    flat_ND = x_IPD.flatten(0, 1).double()
    scale = float(flat_ND.var(dim=0, unbiased=False).mean().sqrt())
    rebuilt_IPD = sae.decode(sae.encode(x_IPD.flatten(0, 1))).detach().double().view_as(x_IPD)
    own_ID, rebuilt_ID = (
        np.asarray((x.double().mean(dim=1) - flat_ND.mean(dim=0)) / scale) for x in (x_IPD, rebuilt_IPD)
    )
    label_I, train, test = split(labels, 0.3, 5)
    probe = fitted(own_ID[train], label_I[train], 5, 1000)
    raw, rebuilt = probe.score(own_ID[test], label_I[test]), probe.score(rebuilt_ID[test], label_I[test])
    measured = ProbePreservationEval(test_fraction=0.3, seed=5).measure(panelist, setting, heldout)
    assert measured.n == len(test) == 18
    assert measured.scores == pytest.approx(
        {"preservation": rebuilt / raw, "accuracy_raw": raw, "accuracy_rebuilt": rebuilt}
    )
    assert 0.5 < raw <= 1


def test_a_dictionary_that_keeps_nothing_keeps_no_class(setting: EvalSetting, heldout: Heldout) -> None:
    """Reconstructions that are all the mean have one class."""
    mean_D = planted()[0].flatten(0, 1).mean(dim=0)

    def mean(code_NF: Tensor) -> Tensor:
        return mean_D.expand(len(code_NF), -1)

    sae = SimpleNamespace(W_dec=torch.eye(len(mean_D)), encode=torch.zeros_like, decode=mean)
    panelist = Panelist("nothing", "0", lambda: sae)
    measured = ProbePreservationEval().measure(panelist, setting, heldout)
    assert measured.scores["accuracy_rebuilt"] == pytest.approx(1 / 3, abs=0.1)


def test_image_probing(panelist: Panelist, code_IPF: Array, setting: EvalSetting, heldout: Heldout) -> None:
    """F statistics of each latent by hand: variance between classes over that within."""
    _, _, labels = planted()
    x_ND = planted()[0].flatten(0, 1).double()
    largest_IF = code_IPF.max(axis=1) / float(x_ND.var(dim=0, unbiased=False).mean().sqrt())
    label_I, train, test = split(labels, 0.2, 42)
    f_F = []
    for f in range(largest_IF.shape[1]):
        groups = [largest_IF[label_I == label, f] for label in range(3)]
        between = sum(len(g) * (g.mean() - largest_IF[:, f].mean()) ** 2 for g in groups) / 2
        within = sum(((g - g.mean()) ** 2).sum() for g in groups) / (N_IMAGES - 3)
        f_F.append(between / within if within else -np.inf)
    accuracies = {}
    for k in (1, 5, 10):
        best = np.argsort(f_F)[::-1][:k]
        probe = fitted(largest_IF[train][:, best], label_I[train], 42, 500)
        accuracies[k] = probe.score(largest_IF[test][:, best], label_I[test])
    area = ((accuracies[1] + accuracies[5]) / 2 * 4 + (accuracies[5] + accuracies[10]) / 2 * 5) / 9
    measured = ImageProbingEval(k_values=[10, 1, 5, 10_000]).measure(panelist, setting, heldout)
    assert measured.scores == pytest.approx({"auc": area, **{f"top_{k}_accuracy": a for k, a in accuracies.items()}})
    # The planted classes are told by a few latents.
    assert accuracies[5] > accuracies[1]


def test_one_k_is_its_accuracy(panelist: Panelist, setting: EvalSetting, heldout: Heldout) -> None:
    scores = ImageProbingEval(k_values=[5]).measure(panelist, setting, heldout).scores
    assert scores["auc"] == scores["top_5_accuracy"]
    with pytest.raises(EvaluationError, match="latents"):
        ImageProbingEval(k_values=[10_000]).measure(panelist, setting, heldout)


@pytest.mark.parametrize("labels", [[None] * N_IMAGES, ["a"] * N_IMAGES, ["a", None] * (N_IMAGES // 2)])
@pytest.mark.parametrize("section", [ProbePreservationEval(), ImageProbingEval()])
def test_no_classes(
    sae: Any, setting: EvalSetting, tmp_path: Path, labels: list[str | None], section: ProbePreservationEval
) -> None:
    heldout = heldout_of(tmp_path / "unlabelled", planted()[0], labels)
    with pytest.raises(EvaluationError, match="no classes to tell apart") as caught:
        section.measure(Panelist("ours", "0", lambda: sae), setting, heldout)
    assert f"evaluation.{section.name}: null" in str(caught.value.cure)


def test_more_classes_than_the_test_part_has_images(sae: Any, setting: EvalSetting, tmp_path: Path) -> None:
    heldout = heldout_of(tmp_path / "many", planted()[0], [f"class {i // 2}" for i in range(N_IMAGES)])
    with pytest.raises(EvaluationError, match="should be greater"):
        ProbePreservationEval().measure(Panelist("ours", "0", lambda: sae), setting, heldout)


# ---------------------------------------------------------------- monosemanticity


def test_monosemanticity(
    panelist: Panelist, code_IPF: Array, setting: EvalSetting, heldout: Heldout, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ksvd_sae.evals.vision import monosemanticity as room

    embedding_IE = torch.nn.functional.normalize(
        torch.randn(N_IMAGES, 4, generator=torch.Generator().manual_seed(3)), dim=1
    )
    monkeypatch.setattr(room, "_embeddings", lambda *_: embedding_IE)
    e = embedding_IE.double().numpy()
    scores = []
    for f in range(code_IPF.shape[2]):
        value_I = code_IPF[:, :, f].max(axis=1)
        if value_I.max() <= 0:
            continue
        top = np.argsort(-value_I, kind="stable")[:6]
        weight = (value_I - value_I.min()) / (value_I.max() - value_I.min())
        pairs = [(weight[a] * weight[b], e[a] @ e[b]) for n, a in enumerate(top) for b in top[:n]]
        total = sum(w for w, _ in pairs)
        if total > 0:
            scores.append(sum(w * cos for w, cos in pairs) / total)
    config = MonosemanticityEval(backbone={"name": "other/model", "layer": 1}, top_images=6)
    measured = config.measure(panelist, setting, heldout)
    assert measured.n == len(scores)
    assert measured.scores["similarity"] == pytest.approx(np.mean(scores), **tolerances.FLOAT32_SCORE)


def test_a_latent_of_one_image_has_no_score() -> None:
    code_I = torch.tensor([0.0, 3.0, 0.0])
    assert similarity(code_I, torch.eye(3), 3) is None
    assert similarity(torch.tensor([0.0, 3.0, 3.0]), torch.ones(3, 1), 3) == pytest.approx(1)


# ---------------------------------------------------------------- transfer

OTHERS = {"source": "offline", "dataset": "digits"}


@pytest.fixture
def others(heldout: Heldout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HeldoutImages:
    """What the run's model read of others."""
    from ksvd_sae.evals.vision import transfer as room

    elsewhere = elsewhere_of(tmp_path / "elsewhere", heldout)
    monkeypatch.setattr(room, "_elsewhere", lambda *_: elsewhere)
    return elsewhere


def slow_fvu(sae: Any, x_IPD: Tensor) -> float:
    x_ND = x_IPD.flatten(0, 1)
    left_ND = x_ND.double() - sae.decode(sae.encode(x_ND)).detach().double()
    return float(left_ND.square().sum() / (x_ND.double() - x_ND.double().mean(dim=0)).square().sum())


def test_fvu_elsewhere_is_what_it_is_everywhere(
    panelist: Panelist, sae: Any, setting: EvalSetting, heldout: Heldout, others: HeldoutImages, tmp_path: Path
) -> None:
    results = TransferEval(images=OTHERS, k=4).run([panelist], setting, tmp_path)
    scores = results.metrics["ours"]
    assert results.data == "digits"
    assert scores["fvu"] == pytest.approx(slow_fvu(sae, planted_elsewhere()[0]), **tolerances.FLOAT32_SCORE)
    assert scores["home_fvu"] == pytest.approx(slow_fvu(sae, planted()[0]), **tolerances.FLOAT32_SCORE)


def test_at_home_everything_is_as_at_home(
    panelist: Panelist, setting: EvalSetting, heldout: Heldout, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ksvd_sae.evals.vision import transfer as room

    monkeypatch.setattr(room, "_elsewhere", lambda *_: heldout.images)
    scores = TransferEval(images=OTHERS).measure(panelist, setting, heldout).scores
    assert scores["fvu"] == scores["home_fvu"]
    assert (scores["coverage"], scores["jaccard"]) == (1, 1)


def test_without_classes_there_is_no_composite(
    panelist: Panelist, setting: EvalSetting, others: HeldoutImages, tmp_path: Path
) -> None:
    config = TransferEval(images={**OTHERS, "label_column": None})
    scores = config.run([panelist], setting, tmp_path).metrics["ours"]
    assert {name for name, value in scores.items() if value is None} == {"composite", "probe_accuracy"}


def test_one_class_is_none(
    panelist: Panelist, setting: EvalSetting, heldout: Heldout, others: HeldoutImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vars(others), "labels", ["a"] * others.n_images)
    with pytest.raises(EvaluationError, match="transfer: the other images have no classes to tell apart"):
        TransferEval(images=OTHERS).measure(panelist, setting, heldout)


def test_other_images_are_part_of_what_scores_follow_from(heldout: Heldout, tmp_path: Path) -> None:
    """None at all are an error of this eval that names its keys."""
    section = {"images": {"source": "folder", "dataset": str(tmp_path)}}
    with pytest.raises(EvaluationError, match=r"transfer: image folder .* no images there") as caught:
        TransferEval(**section).source_hash()
    assert "set evaluation.transfer.images.dataset" in str(caught.value.cure)
    keys, followed = [], []
    for name in ("one.png", "another.png"):
        (tmp_path / name).write_bytes(b"no image, but a file")
        keys.append(ImageEvaluationConfig(transfer=section).key())
        followed.append(TransferEval(**section).follows_from(heldout))
    assert keys[0] != keys[1]
    assert followed[0] != followed[1]
    assert "sources" not in ImageEvaluationConfig().key()
