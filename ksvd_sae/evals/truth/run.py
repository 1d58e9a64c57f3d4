"""A kind of dictionary in a world: learned, coded, held against the features."""

import io
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import torch
from sae_lens.synthetic import mean_correlation_coefficient
from sae_lens.synthetic.evals import (
    ClassificationMetrics,
    ClassificationMetricsCalculator,
    DeadLatentsCalculator,
    L0Calculator,
    ShrinkageCalculator,
    feature_uniqueness,
)
from torch import Tensor

from ksvd_sae.activations.shards import STAGE, ActivationShards, write_harvest
from ksvd_sae.errors import EvaluationError, KsvdSaeError
from ksvd_sae.evals.base import EvalSetting, LearnedOn, Measured
from ksvd_sae.evals.stability import agreement, unit_rows
from ksvd_sae.evals.truth.worlds import World
from ksvd_sae.learning.fvu import FVU
from ksvd_sae.learning.noise import SizeHistogram
from ksvd_sae.progress import printed_to
from ksvd_sae.store import content_hash, is_finished, sole_writer

if TYPE_CHECKING:
    from sae_lens.saes.sae import SAE

    from ksvd_sae.evals.truth import TruthEval

NAME = "truth"
# Of the second training of a dictionary.
_OTHER_SEED = 1_009
# Samples to learn from, to choose a threshold on, and to score: three draws from a world.
_TRAIN, _VALIDATION, _TEST = 1, 2, 3
# Shares of a sample's norm below which a latent is dropped; 0 drops none.
THRESHOLDS = tuple(step / 50 for step in range(26))


def measure(config: "TruthEval", name: str, learned_on: LearnedOn, setting: EvalSetting) -> Measured:
    """Scores of a kind of dictionary in the config's world. Args: name: for errors. learned_on: see ``Panelist``."""
    place = _place(config, setting)

    def learned(seed: int | None) -> "SAE[Any]":
        with TemporaryDirectory() as folder:
            # Worlds are drawn on the CPU, so that their samples are the same everywhere; scored there, too.
            return learned_on(place.shards, place.hash, Path(folder), place.sizes, seed).to("cpu")

    try:
        sae, other = learned(None), learned(_OTHER_SEED) if config.twice else None
    except KsvdSaeError as error:
        raise EvaluationError(
            f"{NAME}: learning {name} in the world {config.world!r}: {error.what}",
            cause=f"options that do not fit {place.sizes['n_atoms']} atoms or k = {place.sizes['k']}",
            cure="change them, or evaluation.truth.n_atoms and k; Matryoshka groups: 'paper' fit any number",
        ) from error
    with torch.no_grad():
        measured = _scores(config, place.world, sae)
        if other is None:
            return measured
        return replace(measured, scores={**measured.scores, **agreement(unit_rows(sae), unit_rows(other))})


class _Place:
    """A world, samples of it as a harvest, and what every dictionary there is to have."""

    def __init__(self, config: "TruthEval", folder: Path, key: dict[str, Any]):
        # The features' orthogonalisation shows its progress.
        with printed_to(io.StringIO(), "stderr"):
            self.world = World(config.world, config.seed, config.noise)
        n_atoms = config.n_atoms or len(self.world.features_GD) // 2
        k = config.k or max(1, round(self.world.firing()))
        if k > min(n_atoms, self.world.features_GD.shape[1]):
            raise EvaluationError(
                f"{NAME}: k = {k} is too large for the world {config.world!r}",
                limit=f"{n_atoms} atoms in {self.world.features_GD.shape[1]} dimensions",
                cure="a smaller evaluation.truth.k, or null",
            )
        self.sizes = {"n_atoms": n_atoms, "k": k}
        self.hash = content_hash(key)
        train = (x_BD for x_BD, _ in self.world.samples(config.train_samples, _TRAIN))
        heldout = (x_BD for x_BD, _ in self.world.samples(config.test_samples, _TEST))
        if not is_finished(folder, STAGE, key):
            with sole_writer(folder, f"samples of world {config.world!r}"):
                if not is_finished(folder, STAGE, key):
                    write_harvest(folder, key, train, heldout)
        self.shards = ActivationShards.open(folder, key=key)


def _place(config: "TruthEval", setting: EvalSetting) -> _Place:
    """Made once for a panel."""
    key = config.model_dump(include={"world", "seed", "noise", "train_samples", "test_samples"})
    kept = setting.between_calls
    name = f"{config.name} {content_hash({**key, **config.model_dump(mode='json')})}"
    if name not in kept:
        folder = setting.artifacts / f"truth-{content_hash(key)}"
        kept[name] = _Place(config, folder, key)
    return cast(_Place, kept[name])


def _scores(config: "TruthEval", world: World, sae: "SAE[Any]") -> Measured:
    decoder_FD, truth_GD = sae.W_dec.detach(), world.features_GD
    threshold, gap = _thresholds(config, world, sae)
    as_coded, thresholded, at_gap = (_Scored(sae, truth_GD, share) for share in (0.0, threshold, gap or 0.0))
    n_true = n_samples = 0
    for x_BD, loud_BG in world.samples(config.test_samples, _TEST):
        codes_BF = sae.encode(x_BD)
        as_coded.add(x_BD, codes_BF, loud_BG)
        thresholded.add(x_BD, codes_BF, loud_BG)
        at_gap.add(x_BD, codes_BF, loud_BG)
        n_true, n_samples = n_true + int((loud_BG > 0).sum()), n_samples + len(x_BD)
    return Measured(
        {
            "mcc": mean_correlation_coefficient(decoder_FD, truth_GD),
            "uniqueness": feature_uniqueness(decoder_FD, truth_GD),
            **as_coded.scores(),
            **{f"{name}_thresholded": value for name, value in thresholded.scores().items()},
            "threshold": threshold,
            # By a rule that needs no truth; as coded where sizes have no gap.
            "gap": float("nan") if gap is None else gap,
            "f1_gap": at_gap.scores()["f1"],
            "true_l0": n_true / n_samples,
        },
        n_samples,
    )


class _Scored:
    """Codes held against the truth, latents below a share of the sample's norm dropped.

    The norm is that of the sample about the decoder's bias, a latent's size that of its part of the reconstruction.
    """

    def __init__(self, sae: "SAE[Any]", truth_GD: Tensor, share: float):
        self.sae, self.share = sae, share
        self.sizes_F = torch.linalg.vector_norm(sae.W_dec.detach(), dim=1)
        self.firing = ClassificationMetricsCalculator(sae.W_dec.detach(), truth_GD)
        self.l0, self.dead = L0Calculator(), DeadLatentsCalculator(len(self.sizes_F))
        self.shrinkage, self.fvu = ShrinkageCalculator(), FVU()

    def kept(self, x_BD: Tensor, codes_BF: Tensor) -> Tensor:
        if not self.share:
            return codes_BF
        bound_B1 = self.share * torch.linalg.vector_norm(x_BD - self.sae.b_dec, dim=1, keepdim=True)
        return torch.where(codes_BF.abs() * self.sizes_F > bound_B1, codes_BF, 0)

    def add(self, x_BD: Tensor, codes_BF: Tensor, loud_BG: Tensor) -> None:
        kept_BF = self.kept(x_BD, codes_BF)
        rebuilt_BD = self.sae.decode(kept_BF)
        self.firing.add_batch(kept_BF, loud_BG)
        self.l0.add_batch(kept_BF)
        self.dead.add_batch(kept_BF)
        self.shrinkage.add_batch(rebuilt_BD, x_BD)
        self.fvu.add(x_BD, rebuilt_BD)

    def scores(self) -> dict[str, float]:
        firing = self.firing.compute()
        return {
            **_named(firing),
            "r2": 1 - self.fvu.value(NAME),
            "l0": self.l0.compute(),
            "dead_fraction": self.dead.compute() / len(self.sizes_F),
            "shrinkage": self.shrinkage.compute(),
        }


def _named(firing: ClassificationMetrics) -> dict[str, float]:
    return {"f1": firing.f1_score, "precision": firing.precision, "recall": firing.recall}


def _thresholds(config: "TruthEval", world: World, sae: "SAE[Any]") -> tuple[float, float | None]:
    """On samples of their own, the threshold with the best F1, of equals the lowest; and the gap in latents' sizes.

    All thresholds at once: each latent of a sample is counted under how many of them it passes.
    """
    decoder_FD, n_bins = sae.W_dec.detach(), len(THRESHOLDS) + 1
    sizes_F = torch.linalg.vector_norm(decoder_FD, dim=1)
    nearest_F = ClassificationMetricsCalculator(decoder_FD, world.features_GD).best_matches
    right, wrong = (torch.zeros(len(sizes_F) * n_bins, dtype=torch.int64) for _ in range(2))
    fired_F = torch.zeros(len(sizes_F), dtype=torch.int64)
    bounds, histogram = torch.tensor(THRESHOLDS), SizeHistogram()
    for x_BD, loud_BG in world.samples(config.test_samples, _VALIDATION):
        codes_BF, fires_BG = sae.encode(x_BD), loud_BG > 0
        rows, latents = codes_BF.nonzero(as_tuple=True)
        sizes = codes_BF[rows, latents].abs() * sizes_F[latents]
        shares = sizes / torch.linalg.vector_norm(x_BD - sae.b_dec, dim=1)[rows]
        histogram.add(shares)
        passed = torch.bucketize(shares, bounds)
        is_right = fires_BG[rows, nearest_F[latents]]
        bins = latents * n_bins + passed
        right += torch.bincount(bins[is_right], minlength=len(right))
        wrong += torch.bincount(bins[~is_right], minlength=len(wrong))
        fired_F += fires_BG.sum(dim=0)[nearest_F]
    # Kept by a threshold is what passes it and all below.
    hits_FT, errors_FT = (n.view(-1, n_bins).flip(1).cumsum(1).flip(1)[:, 1:].double() for n in (right, wrong))
    f1_T = (2 * hits_FT / (hits_FT + errors_FT + fired_F[:, None]).clamp(min=1)).mean(dim=0)
    return THRESHOLDS[int(f1_T.argmax())], histogram.gap()
