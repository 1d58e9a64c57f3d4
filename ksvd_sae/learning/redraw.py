"""Atoms that are of no use, and what takes their place.

Two kinds are of no use: those that no sample has picked for long, and the weaker of two that point the same way.
K-SVD cannot get rid of the second kind by itself. Both atoms of such a pair are used and share what one would do, while
another atom lies between two directions of the data and does the work of two: a local minimum, and the larger the
batch, the less noise there is to leave it by. Aharon, Elad & Bruckstein (2006) clear their dictionary of pairs with
|cos| > 0.99 and fill in the worst coded sample; so does this, with what is left of badly coded samples.

From one large batch a pass, 0.98 of planted atoms are learned so, and 0.84 if pairs stay. In activations nothing
depends on it, as samples are good atoms to start from; there atoms of little energy are left alone, as many atoms are
rightly rare ("What the options of DB-KSVD are worth" in the docs, section Atoms of no use).
"""

from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ksvd_sae.errors import ShapeError
from ksvd_sae.learning import backends
from ksvd_sae.learning.products import products
from ksvd_sae.ranks import ALONE, Ranks

Redraw = Literal["residual", "data", "random", "none"]
REDRAWS: tuple[Redraw, ...] = ("residual", "data", "random", "none")
# An atom is taken for unused once an average one has been used so often since it last was: a batch that holds few uses
# of each atom says little about the rare ones. (With another value trainings are others: raise the kind's version.)
ENOUGH_IDLE = 20.0
# Rows of the Gram matrix that the search for pairs holds at a time.
_PAIR_ROWS = 1024
# Dimensions in which pairs are looked for first, and the cosine from which on that tells them apart.
_SKETCH, _SKETCHED_COSINE = 64, 0.98
# A residual below this share of its sample's norm is rounding: no direction to start an atom from.
_CODED = 1e-5
# A batch's largest number is above 1e-6 (``checked_batch``). A row of this norm or less is nothing beside it, and
# ``normalize`` would make no unit row of it.
_NOTHING = 1e-12
# Whatever torch's defaults are set to.
_HOST: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


def near_duplicates(
    atoms_MD: Tensor, energy_M: Tensor, cosine: float, ranks: Ranks = ALONE, *, signed: bool = True
) -> Tensor:
    """Which atoms have |cos| > ``cosine`` with one of more energy (ties: of lower index), (M,) bool.

    Args:
        energy_M: Σ of each atom's squared coefficients.
        ranks: of the processes that have the same atoms: on GPUs each looks at its part of the rows.
        signed: opposite atoms are duplicates too; not so for non-negative codes.
    Cost: half of the Gram matrix, ``_PAIR_ROWS`` rows at a time; on the CPU, for a cosine near 1, of that of atoms in
        ``_SKETCH`` dimensions, and no more if no pair is close there.
    """
    sketched = not backends.on_gpu(atoms_MD.device) and cosine >= _SKETCHED_COSINE
    if sketched and not _may_be_close(atoms_MD, cosine):
        return torch.zeros(len(atoms_MD), dtype=torch.bool, device="cpu")
    if sketched:
        # Whether there is more to look at is not for others to wait for: another machine may round it otherwise.
        ranks = ALONE
    order_M = torch.argsort(energy_M, descending=True, stable=True)
    sorted_MD = atoms_MD[order_M]
    weaker_M = torch.zeros(len(atoms_MD), dtype=torch.bool, device=atoms_MD.device)
    for start in range(ranks.rank * _PAIR_ROWS, len(atoms_MD), ranks.size * _PAIR_ROWS):
        cosines = products(sorted_MD[start : start + _PAIR_ROWS], sorted_MD[start:])
        close = (cosines.abs_() if signed else cosines) > cosine
        weaker_M[start:] |= torch.triu(close, diagonal=1).any(dim=0)
    weaker_M = ranks.largest(weaker_M.byte()).bool()
    # Back from the order of energies to that of the atoms.
    return torch.empty_like(weaker_M).index_copy_(0, order_M, weaker_M)


def _may_be_close(atoms_MD: Tensor, cosine: float) -> bool:
    """False only if no two atoms have |cos| > ``cosine``.

    After a random projection onto r dimensions a pair's cosine is off by (1 − cos²) / √r, one standard deviation: ten
    of them are allowed for.
    """
    sketch_Mr = normalize(atoms_MD @ _directions(atoms_MD.shape[1]).to(atoms_MD.dtype), dim=1)
    least = cosine - 10 * (1 - cosine**2) / _SKETCH**0.5
    for start in range(0, len(atoms_MD), _PAIR_ROWS):
        cosines = (sketch_Mr[start : start + _PAIR_ROWS] @ sketch_Mr[start:].T).abs_()
        cosines.diagonal().zero_()
        if float(cosines.max()) > least:
            return True
    return False


@lru_cache
def _directions(d_in: int) -> Tensor:
    return torch.randn(d_in, _SKETCH, generator=torch.Generator().manual_seed(0), **_HOST)


def redrawn(
    atoms_MD: Tensor,
    useless_M: Tensor,
    how: Redraw,
    x_BD: Tensor,
    residual_BD: Tensor,
    generator: torch.Generator,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor]:
    """The atoms with fresh ones in the place of useless ones, as far as there are any, and which are fresh, (M,) bool.

    Args: ranks: of the processes whose parts of one batch these are. Others as ``draw_atoms``.
    On a GPU nobody waits for it to tell how many are useless: as many are drawn as there are atoms, and few are taken.
    """
    n = len(atoms_MD) if backends.on_gpu(x_BD.device) else int(useless_M.sum())
    if how == "none" or n == 0:
        return atoms_MD, torch.zeros_like(useless_M)
    drawn_ND, is_drawn_N = draw_atoms(n, how, x_BD, residual_BD, generator, ranks)
    # The first useless atom takes the first drawn, and so on.
    place_M = torch.cumsum(useless_M, dim=0) - 1
    fresh_M = useless_M & (place_M < len(drawn_ND))
    place_M = place_M.clamp(0, len(drawn_ND) - 1)
    fresh_M &= is_drawn_N[place_M]
    return torch.where(fresh_M[:, None], drawn_ND[place_M], atoms_MD), fresh_M


def draw_atoms(
    n: int, how: Redraw, x_BD: Tensor, residual_BD: Tensor, generator: torch.Generator, ranks: Ranks = ALONE
) -> tuple[Tensor, Tensor]:
    """Up to n unit atoms from distinct samples, and which of them are any: fewer samples may have something to give.

    'residual': residuals, drawn with probability ∝ ‖r‖².  'data': random samples.  'random': uniform(−½, ½) directions,
    normalised, as the paper's.
    """
    if how == "random":
        drawn_ND = uniform_atoms(n, x_BD.shape[1], generator).to(x_BD.device)
        return drawn_ND, torch.ones(n, dtype=torch.bool, device=x_BD.device)
    norms_B = torch.linalg.vector_norm(x_BD, dim=1)
    if how == "data":
        rows_BD, weights_B = x_BD, (norms_B > _NOTHING).double()
    else:
        left_B = torch.linalg.vector_norm(residual_BD, dim=1, dtype=x_BD.dtype)
        least_B = (_CODED * norms_B).clamp_(min=_NOTHING)
        rows_BD, weights_B = residual_BD, torch.where(left_B > least_B, left_B, 0).double() ** 2
    weights_B = ranks.joined(weights_B)
    picks = ranks.agreed(drawn_samples(weights_B, min(n, len(weights_B)), generator))
    return normalize(ranks.rows(rows_BD, picks).to(x_BD.dtype), dim=1), weights_B[picks] > 0


def drawn_samples(weights_B: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n distinct samples, each draw with probability ∝ weight among those left; those of no weight come last.

    A race: sample i arrives after a time of mean 1 / weight_i, exponentially distributed (torch.multinomial draws so
    too, but waits for the device). On a GPU the times are drawn there, from a seed that the generator gives.
    """
    if backends.on_gpu(weights_B.device):
        seed = int(torch.randint(2**62, (), generator=generator, device="cpu").numpy())
        generator = torch.Generator(weights_B.device).manual_seed(seed)
    times_B = torch.empty_like(weights_B).exponential_(generator=generator)
    return (weights_B / times_B).topk(n).indices


def first_atoms(n_atoms: int, init: str, x_BD: Tensor, generator: torch.Generator, ranks: Ranks = ALONE) -> Tensor:
    """The atoms that training starts from: 'data' or 'random', as in ``draw_atoms``.

    Raises: ShapeError where the batch has too few samples to start from.
    """
    if init == "random":
        return uniform_atoms(n_atoms, x_BD.shape[1], generator).to(x_BD.device)
    atoms_MD = random_samples(n_atoms, x_BD, generator, ranks)
    if len(atoms_MD) < n_atoms:
        raise ShapeError(
            "DB-KSVD: the first batch has fewer nonzero samples than atoms",
            got=f"{len(atoms_MD)} samples, n_atoms = {n_atoms}",
            cause="small batches; samples of zeros; or few samples so large that all others are nothing beside them",
            cure="use larger batches, fewer atoms, or init='random'",
        )
    return atoms_MD


def random_samples(n: int, x_BD: Tensor, generator: torch.Generator, ranks: Ranks = ALONE) -> Tensor:
    """Up to n distinct nonzero samples, normalised."""
    nonzero = (ranks.joined(torch.linalg.vector_norm(x_BD, dim=1)) > _NOTHING).nonzero().flatten()
    picks = torch.randperm(len(nonzero), generator=generator, device="cpu")[:n]
    return normalize(ranks.rows(x_BD, nonzero[picks.to(nonzero.device)]), dim=1)


def uniform_atoms(n: int, d_in: int, generator: torch.Generator) -> Tensor:
    return normalize(torch.rand(n, d_in, generator=generator, **_HOST) - 0.5, dim=1)
