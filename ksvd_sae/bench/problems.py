"""What is coded and learned in a benchmark: planted samples, or activations of a finished harvest.

Imports what learning/ does: what reads a harvest is imported when one is asked for.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ksvd_sae.errors import ManifestError, ShapeError
from ksvd_sae.learning.code import Code
from ksvd_sae.learning.coding import Coding
from ksvd_sae.learning.dbksvd import DictionaryLearner, LearnerOptions

if TYPE_CHECKING:
    from ksvd_sae.activations.shards import ActivationShards
    from ksvd_sae.run.pipeline import Run
    from ksvd_sae.run.trained import TrainedDictionary

PLANTED, ACTIVATIONS, IMPORTED = "planted", "activations", "imported"
_NOISE = 0.05
# Enough to learn a dictionary from, where the config's own does not fit the shape asked for.
_LEARN_SAMPLES, _LEARN_BATCH = 32_768, 8192


@dataclass(frozen=True)
class Shape:
    """A case's name and sizes: n samples of d dimensions, m atoms, k of them a sample."""

    case: str
    n: int
    d: int
    m: int
    k: int

    @property
    def sizes(self) -> dict[str, int]:
        """n, d, m and k, as a row has them."""
        return {"n": self.n, "d": self.d, "m": self.m, "k": self.k}


@dataclass(frozen=True)
class Problem:
    """Samples and the atoms to code them with.

    Attributes:
        shape: sizes; its case is 'planted', 'activations' or 'imported'.
        x_ND: centred samples, float32.
        heldout_ND: others of the same kind, centred alike.
        atoms_MD: unit rows.
        centre_D: what was subtracted.
        data, dictionary: where they come from, for the rows.
        topk_folder: a SAE that SAELens trained on these activations with the same d_sae and k, if there is one.
    """

    shape: Shape
    x_ND: Tensor
    heldout_ND: Tensor
    atoms_MD: Tensor
    centre_D: Tensor
    data: str
    dictionary: str
    topk_folder: Path | None = None


def planted(
    shape: Shape, seed: int = 0, device: torch.device | str = "cpu", atoms_MD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Samples made of k atoms each with coefficients 1 + U(0, 1) and noise 0.05 (KSVD.jl's synthetic problem).

    Args: atoms_MD: None draws them.
    Returns: x_BD (n, d) and the atoms_MD (m, d) that they are made of, on the device.
    """
    how: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
    if atoms_MD is None:
        atoms_MD = torch.nn.functional.normalize(torch.randn(shape.m, shape.d, **how), dim=1)
    support_BK = torch.rand(shape.n, shape.m, **how).topk(shape.k, dim=1).indices.int()
    values_BK = 1 + torch.rand(shape.n, shape.k, **how)
    noise_BD = _NOISE * torch.randn(shape.n, shape.d, **how)
    return Code(values_BK, support_BK).reconstruct(atoms_MD) + noise_BD, atoms_MD


def planted_problem(shape: Shape, n_heldout: int, seed: int) -> Problem:
    """Planted samples and the atoms that they were made of."""
    both = Shape(PLANTED, shape.n + n_heldout, shape.d, shape.m, shape.k)
    x_ND, atoms_MD = planted(both, seed)
    centre_D = x_ND[: shape.n].mean(dim=0)
    x_ND = x_ND - centre_D
    data = f"planted, noise {_NOISE}, seed {seed}"
    shape = Shape(PLANTED, shape.n, shape.d, shape.m, shape.k)
    return Problem(shape, x_ND[: shape.n], x_ND[shape.n :], atoms_MD, centre_D, data, "the planted atoms")


def activation_problem(
    config: Path, n: int, m: int, k: int, n_heldout: int, *, learn: bool, imported: bool = False
) -> Problem:
    """Activations of the finished harvest of ``config``, and its trained DB-KSVD dictionary.

    Args:
        learn: where the config has no trained dictionary of m atoms and k: learn one here (untimed). False where the
            benchmark needs none: the atoms are then normalised samples.
        imported: take the decoder of the config's trained TopK SAE instead, so that its own encoder and the pursuits
            have the same atoms.
    Raises: ManifestError if the harvest, or the SAE, is not in the cache, ShapeError if there are too few samples.
    """
    from ksvd_sae.run.config import load_config
    from ksvd_sae.run.pipeline import Run

    run = Run(load_config(config))
    shards, heldout = (_opened(run, part, config) for part in ("train", "heldout"))
    for part, wanted in ((shards, n), (heldout, n_heldout)):
        if part.n_samples < wanted:
            raise ShapeError(
                f"bench: the {part.part} part of the harvest of {config} has too few samples",
                got=f"{wanted} asked for",
                limit=part.n_samples,
                cure="ask for fewer with --samples, or harvest more tokens",
            )
    x_ND, heldout_ND = next(shards.batches(n)), next(heldout.batches(max(1, n_heldout)))[:n_heldout]
    centre_D = shards.centre_D.float()
    trained = _trained(run, m, k)
    if imported:
        from ksvd_sae.methods.published.importing import import_sae

        if "topk_sae" not in trained:
            raise ManifestError(
                f"bench --data imported: no trained TopK SAE of {m} latents and k = {k} in {config}",
                cause="it is not trained yet, or has other sizes",
                cure=f"run `ksvd-sae train {config}`, or give --atoms and --k as the config has them",
            )
        of_sae = import_sae(trained["topk_sae"].folder)
        atoms_MD, centre_D, dictionary = of_sae.atoms_MD, of_sae.centre_D, f"{config.stem}'s topk-sae"
    elif "db_ksvd" in trained:
        from ksvd_sae.dictionary import Dictionary

        atoms_MD, dictionary = Dictionary.load(trained["db_ksvd"].folder).atoms_MD, f"{config.stem}'s db-ksvd"
    elif learn:
        n_learn = min(shards.n_samples, max(_LEARN_SAMPLES, 4 * m))
        options = LearnerOptions(m, Coding(k), batch_samples=_LEARN_BATCH)
        learner = DictionaryLearner(options, device="cpu").fit(next(shards.batches(n_learn)))
        atoms_MD, dictionary = learner.atoms_MD, f"db-ksvd, one pass over {n_learn:,} samples"
    else:
        atoms_MD, dictionary = initial_atoms(x_ND - centre_D, m, seed=0), "samples"
    model, text = run.config.model, getattr(run.config, "text", None)
    return Problem(
        Shape(IMPORTED if imported else ACTIVATIONS, n, shards.d_in, m, k),
        x_ND - centre_D,
        heldout_ND - centre_D,
        atoms_MD,
        centre_D,
        f"{model.name} {model.hook}, {run.config.data_name if text is None else text.dataset or text.source}",
        dictionary,
        trained["topk_sae"].folder if "topk_sae" in trained else None,
    )


def initial_atoms(x_ND: Tensor, m: int, seed: int) -> Tensor:
    """m random samples of nonzero norm as unit rows: the start that every learner is given."""
    nonzero = (torch.linalg.vector_norm(x_ND, dim=1) > 0).nonzero().flatten()
    if len(nonzero) < m:
        raise ShapeError("bench: fewer nonzero samples than atoms", got=f"{len(nonzero)} samples, {m} atoms")
    picks = torch.randperm(len(nonzero), generator=torch.Generator().manual_seed(seed))[:m]
    return torch.nn.functional.normalize(x_ND[nonzero[picks]], dim=1)


def _opened(run: "Run", part: str, config: Path) -> "ActivationShards":
    try:
        return run.shards(part)
    except ManifestError as error:
        raise ManifestError(
            f"bench: the activations of {config} are not in the cache",
            got=error.what,
            cause="the harvest has not run here, or was made from another config",
            cure=f"run `ksvd-sae harvest {config}`, or give --data planted",
        ) from error


def _trained(run: "Run", m: int, k: int) -> "dict[str, TrainedDictionary]":
    """The config's plain trained dictionaries of that size by kind; none if one of the config is not trained yet."""
    try:
        trained = run.trained()
    except ManifestError:
        return {}
    first_of_kind: dict[str, TrainedDictionary] = {}
    for entry in trained:
        method = entry.method
        same = method.size == m and method.budget == k
        plain = method.group_sizes is None and (method.is_sae or method.has_signs)
        weighted = method.metric.kind != "none"
        if same and plain and not weighted:
            first_of_kind.setdefault(entry.method.kind, entry)
    return first_of_kind
