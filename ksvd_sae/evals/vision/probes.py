"""Linear probes of the images' classes, on what a dictionary keeps and on what few of its latents say.

Source: ViSAEBench 0.1, DownstreamPreservation and SparseProbing. Differs: nothing is taken for a score where there is
none; latents that never fire make no warning.
"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue
from torch import Tensor

from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.base import Heldout, Measured
from ksvd_sae.evals.vision.codes import coded_images, largest_codes

if TYPE_CHECKING:
    from ksvd_sae.evals.vision import ImageProbingEval, ProbePreservationEval, TransferEval

Array = NDArray[Any]


def preservation(config: "ProbePreservationEval", sae: Any, heldout: Heldout) -> Measured:
    """See ``ProbePreservationEval``."""
    images, statistics = heldout.images, heldout.shards.statistics
    label_I, train, test = split(config, images.labels)
    own, rebuilt = list[Tensor](), list[Tensor]()
    for coded in coded_images(sae, images):
        # Where nothing is left of an image, its mean is that of all.
        n_I1 = coded.present_IP.sum(dim=1, keepdim=True).clamp(min=1)
        rebuilt_IPD = torch.zeros_like(coded.x_IPD)
        rebuilt_IPD[coded.present_IP] = sae.decode(coded.code_IPF[coded.present_IP]).detach()
        for means, x_IPD in ((own, coded.x_IPD), (rebuilt, rebuilt_IPD)):
            means.append((x_IPD.double().cpu().sum(dim=1) / n_I1.cpu() - statistics.centre_D) / statistics.scale)
    own_ID, rebuilt_ID = (torch.cat(means).float().numpy() for means in (own, rebuilt))
    probe = fitted_probe(own_ID[train], label_I[train], config.seed, 1000)
    accuracy = {
        name: float(probe.score(x_ID[test], label_I[test])) for name, x_ID in (("raw", own_ID), ("rebuilt", rebuilt_ID))
    }
    kept = min(2.0, accuracy["rebuilt"] / accuracy["raw"]) if accuracy["raw"] else float("nan")
    scores = {"preservation": kept, **{f"accuracy_{name}": value for name, value in accuracy.items()}}
    return Measured(scores, len(test))


def sparse_probing(config: "ImageProbingEval", sae: Any, heldout: Heldout) -> Measured:
    """See ``ImageProbingEval``."""
    from sklearn.metrics import auc

    label_I, train, test = split(config, heldout.images.labels)
    code_IF = largest_codes(sae, heldout.images).numpy()
    best_F = best_latents(code_IF, label_I)
    accuracies = {}
    for k in sorted({k for k in config.k_values if k <= len(best_F)}):
        few = best_F[:k]
        probe = fitted_probe(code_IF[train][:, few], label_I[train], config.seed, 500)
        accuracies[k] = float(probe.score(code_IF[test][:, few], label_I[test]))
    if not accuracies:
        raise EvaluationError(
            f"image_probing: the dictionary has {len(best_F)} latents",
            limit=f"{min(config.k_values)}, the smallest of evaluation.image_probing.k_values",
            cure="give smaller ones",
        )
    ks = list(accuracies)
    area = auc(ks, list(accuracies.values())) / (ks[-1] - ks[0]) if len(ks) > 1 else accuracies[ks[0]]
    named: dict[str, JsonValue] = {str(k): accuracy for k, accuracy in accuracies.items()}
    top = {f"top_{k}_accuracy": accuracy for k, accuracy in accuracies.items()}
    return Measured({"auc": float(area), **top}, len(test), {"k_accuracies": named})


def best_latents(code_IF: Array, label_I: Array) -> Array:
    """Latents by how much their codes differ between classes (ANOVA's F), those that differ most first."""
    from sklearn.feature_selection import f_classif

    with warnings.catch_warnings():
        # Latents that are the same everywhere have no F.
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        f_F = f_classif(code_IF, label_I)[0]
    return np.argsort(np.nan_to_num(f_F, nan=-np.inf))[::-1]


def fitted_probe(x_ND: Array, label_N: Array, seed: int, steps: int) -> Any:
    """A logistic regression."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(solver="lbfgs", max_iter=steps, C=1.0, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return probe.fit(x_ND, label_N)


def split(
    config: "ProbePreservationEval | ImageProbingEval | TransferEval",
    labels: Sequence[str | None],
    whose: str = "held-out",
    more: str = "hold out more tokens (harvest.heldout_tokens)",
) -> tuple[Array, Array, Array]:
    """Classes as numbers, and which images probes are fitted and tested on: the same part of each class, if it can be.

    Args: whose: the images, for errors. more: how there come to be more.
    Raises: EvaluationError if images have no classes, or there are too few of them.
    """
    from sklearn.model_selection import train_test_split

    n_classes = len({label for label in labels if label is not None})
    if None in labels or n_classes < 2:
        without = sum(label is None for label in labels)
        raise EvaluationError(
            f"{config.name}: the {whose} images have no classes to tell apart",
            got=f"{n_classes} classes, {without} of {len(labels)} images without one",
            limit="2 classes, and one for each image",
            cure=f"give images with classes (a folder for each; images.label_column), or set evaluation.{config.name}: "
            "null",
        )
    label_I = np.unique(np.array(labels), return_inverse=True)[1].astype(np.int64)
    stratify = label_I if np.bincount(label_I).min() >= 2 else None
    try:
        train, test = train_test_split(
            np.arange(len(label_I)), test_size=config.test_fraction, stratify=stratify, random_state=config.seed
        )
    except ValueError as error:
        raise EvaluationError(
            f"{config.name}: {error}",
            got=f"{len(label_I)} {whose} images of {n_classes} classes",
            cause="too few images for a test part that has every class",
            cure=f"{more}, or give images of fewer classes",
        ) from error
    return label_I, train, test
