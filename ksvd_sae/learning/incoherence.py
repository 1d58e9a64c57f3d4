"""Atoms that are kept apart.

Pursuit loves atoms that are close together: with two that share a feature it fits a sample and its noise better than
with one. So features are split, and what is fitted is not what is there. A bound on the cosines of atoms, enforced
after every update, takes that way out.

Notation: G = atoms·atomsᵀ; E its excess over the bound µ, E_ij = G_ij − clip(G_ij, −µ, µ), 0 on the diagonal. Half of
‖E‖²_F has gradient 2·E·atoms.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ksvd_sae.learning import backends
from ksvd_sae.learning.products import products

# Of a step along the gradient: a whole one would take a lone pair to the bound, and turns others past it.
_STEP = 0.5
_STEPS = 5


def pushed_apart(atoms_MD: Tensor, bound: float, *, signed: bool = True) -> Tensor:
    """Unit atoms moved away from those that they have |cos| > ``bound`` with, by a few gradient steps.

    A step is divided by the largest row sum of |E|, if that is above 1, which bounds its norm: where many atoms crowd
    into few directions, each is pushed by all others, and a whole step would throw them about.

    Args: signed: opposite atoms are close, too; not so for non-negative codes.
    Cost: 2·M²·D multiply-adds and M² floats a step.
    """
    for _ in range(_STEPS):
        excess_MM = products(atoms_MD, atoms_MD)
        excess_MM.fill_diagonal_(0)
        # Opposite atoms have an excess below 0: none, where codes have no signs.
        excess_MM -= excess_MM.clamp(-bound if signed else -1, bound)
        largest = excess_MM.abs().sum(dim=1).max()
        # On a GPU five steps that change nothing cost less than to wait for it.
        if not backends.on_gpu(atoms_MD.device) and float(largest) == 0:
            break
        step_MD = _STEP / largest.clamp(min=1) * products(excess_MM, atoms_MD.T)
        atoms_MD = torch.where(largest > 0, normalize(atoms_MD - step_MD, dim=1), atoms_MD)
    return atoms_MD
