"""Matryoshka DB-KSVD (arXiv 2505.18441): disjoint groups of atoms, each for what the groups before it leave.

Notation: group g has m_g atoms, the rows of ``atoms_MD`` after those of the groups before it; it codes the residual
that they leave, r_{g−1}, with its share of k (at most ⌈k / groups⌉ of its atoms), and r_g = r_{g−1} − z_g·atoms_g. In
training every group is a K-SVD of its own with r_{g−1} as its samples, so the rows up to the end of any group are a
dictionary by themselves, as good as that many rows with that many nonzeros can be: the first are the general ones.

The paper learns so and codes by plain matching pursuit over the whole dictionary when it evaluates. Both are here:
coders 'mp' and 'matryoshka' of a ``Coding`` with groups.

All groups are updated from the residuals of the batch as coded. KSVD.jl lets every group see what the groups before it
leave after their update, for which it codes them again: more work, and the held-out FVU of all groups is 0.151 instead
of 0.149 ("What the options of DB-KSVD are worth" in the docs, section Matryoshka groups).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ksvd_sae.errors import ShapeError
from ksvd_sae.learning.atom_update import residual_of
from ksvd_sae.learning.code import Code
from ksvd_sae.learning.products import Precision
from ksvd_sae.learning.sparse_coding import at_any_scale, matching_pursuit, pursued
from ksvd_sae.ranks import ALONE, Ranks

SMALLEST_GROUP = 256
NamedGroups = Literal["paper", "eighth"]


def paper_groups(n_atoms: int) -> tuple[int, ...]:
    """2⁸, 2⁸, 2⁹, 2¹⁰, … until all atoms have a group; the last takes what is left (KSVD.jl's MatryoshkaLoop).

    >>> paper_groups(4096)
    (256, 256, 512, 1024, 2048)
    >>> paper_groups(600), paper_groups(100)
    ((256, 256, 88), (100,))
    """
    ends = []
    end = SMALLEST_GROUP
    while end < n_atoms:
        ends.append(end)
        end *= 2
    ends.append(n_atoms)
    return tuple(end - start for start, end in zip([0, *ends[:-1]], ends, strict=True))


def group_sizes(groups: NamedGroups | Sequence[int], n_atoms: int) -> tuple[int, ...]:
    """Sizes of groups that may be given by name: 'paper' as ``paper_groups``, 'eighth' an eighth of the atoms and the
    rest.

    >>> group_sizes("eighth", 1024)
    (128, 896)
    """
    if groups == "paper":
        return paper_groups(n_atoms)
    if groups == "eighth":
        first = max(1, n_atoms // 8)
        return (first, n_atoms - first)
    return tuple(groups)


def group_budgets(k: int, n_groups: int, exact: bool = False) -> tuple[int, ...]:
    """Most atoms a sample of each group: ⌈k / n_groups⌉ each, as in the paper.

    Rounded up, so that the sum may exceed k, by at most n_groups − 1. Exact, it is k: the first groups have one more.

    >>> group_budgets(20, 7), group_budgets(20, 7, exact=True)
    ((3, 3, 3, 3, 3, 3, 3), (3, 3, 3, 3, 3, 3, 2))
    """
    if exact:
        return tuple(k // n_groups + (index < k % n_groups) for index in range(n_groups))
    return (-(-k // n_groups),) * n_groups


def check_groups(groups: Sequence[int], n_atoms: int, k: int, d_in: int | None = None, exact: bool = False) -> None:
    """Raise ShapeError unless the groups share out the atoms and each can spend its budget."""
    where = "Matryoshka groups"
    if not groups or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in groups):
        raise ShapeError(f"{where}: sizes must be whole numbers above 0", got=list(groups))
    if sum(groups) != n_atoms:
        raise ShapeError(
            f"{where}: sizes do not add up to n_atoms",
            got=f"{list(groups)}, sum {sum(groups)}",
            limit=f"n_atoms = {n_atoms}",
            cure=f"groups={list(paper_groups(n_atoms))} (paper_groups)",
        )
    for size, budget in zip(groups, group_budgets(k, len(groups), exact), strict=True):
        if budget < 1:
            raise ShapeError(
                f"{where}: k is too small for every group to have a share of it",
                got=f"k = {k} in {len(groups)} groups",
                cure="fewer groups, a larger k, or exact_budgets=False",
            )
        limit = size if d_in is None else min(size, d_in)
        if budget > limit:
            raise ShapeError(
                f"{where}: a group cannot spend its share of k",
                got=f"k = {k} in {len(groups)} groups: {budget} each",
                limit=f"{limit}, for a group of {size} atoms" + (f" in {d_in} dimensions" if d_in is not None else ""),
                cure="larger groups, fewer groups or a smaller k",
            )


def group_slices(groups: Sequence[int]) -> list[slice]:
    """The rows of each group."""
    slices, start = [], 0
    for size in groups:
        slices.append(slice(start, start + size))
        start += size
    return slices


@dataclass(frozen=True)
class Stage:
    """One group's part of the coding.

    Attributes:
        rows: the group's rows in the whole dictionary.
        target_BD: what it codes, the residual of the groups before it.
        code: its code, support counted within the group.
    """

    rows: slice
    target_BD: Tensor
    code: Code


def stages(
    x_BD: Tensor,
    atoms_MD: Tensor,
    groups: Sequence[int],
    k: int,
    *,
    exact_budgets: bool = False,
    max_steps: int | None = None,
    rtol: float = 0.0,
    tau: float = 0.0,
    tau_absolute: float | Tensor = 0.0,
    nonnegative: bool = False,
    precision: Precision = "float32",
    checked: bool = False,
    ranks: Ranks = ALONE,
) -> Iterator[Stage]:
    """Code group by group; arguments as ``matryoshka_encode`` and ``matching_pursuit``.

    Args: checked: samples and atoms are known to be right, see ``pursued``; ranks: then, as there.
    """
    check_groups(groups, len(atoms_MD), k, x_BD.shape[1], exact_budgets)
    target_BD = x_BD
    # What is noise in a sample is noise in what a group leaves of it.
    noise_B = torch.linalg.vector_norm(x_BD, dim=1).mul_(tau).clamp_(min=tau_absolute)
    for rows, budget in zip(group_slices(groups), group_budgets(k, len(groups), exact_budgets), strict=True):
        options: dict[str, Any] = {
            "max_steps": max_steps,
            "rtol": rtol,
            "tau_absolute": noise_B,
            "nonnegative": nonnegative,
            "precision": precision,
        }
        if checked:
            code, _ = pursued(target_BD, atoms_MD[rows], budget, ranks=ranks, **options)
        else:
            code = matching_pursuit(target_BD, atoms_MD[rows], budget, **options)
        yield Stage(rows, target_BD, code)
        if rows.stop < len(atoms_MD):
            target_BD = residual_of(target_BD, code, atoms_MD[rows])


def joined(parts: Sequence[Stage]) -> Code:
    """One code over the whole dictionary; unused slots hold atom 0, as in every Code."""
    supports = []
    for part in parts:
        shifted_BK = part.code.support_BK + part.rows.start
        supports.append(torch.where(part.code.values_BK != 0, shifted_BK, 0))
    return Code(torch.cat([part.code.values_BK for part in parts], dim=1), torch.cat(supports, dim=1))


@at_any_scale
@torch.no_grad()
def matryoshka_encode(
    x_BD: Tensor,
    atoms_MD: Tensor,
    groups: Sequence[int],
    k: int,
    *,
    exact_budgets: bool = False,
    max_steps: int | None = None,
    rtol: float = 0.0,
    tau: float = 0.0,
    tau_absolute: float | Tensor = 0.0,
    nonnegative: bool = False,
) -> Code:
    """Code each row group by group with at most Σ ``group_budgets`` atoms (k, or up to n_groups − 1 more).

    Args:
        x_BD, atoms_MD, nonnegative: as ``matching_pursuit``.
        groups: sizes, summing to M.
        exact_budgets: the groups share k out exactly, see ``group_budgets``.
        max_steps: most steps a sample and group; default 4 × the group's budget.
        rtol: a group stops once ‖r‖ ≤ rtol·‖what the groups before it left‖.
        tau, tau_absolute: as ``matching_pursuit``, of the whole sample.
    Returns: Code over all M atoms; columns in the order of the groups, so a prefix of the columns is the code of a
        prefix of the dictionary.
    Raises: ShapeError (groups that do not fit); else as ``matching_pursuit``.
    Cost: as ``matching_pursuit``, less: every step sees one group's products only.
    """
    options: dict[str, Any] = {"max_steps": max_steps, "rtol": rtol, "tau": tau, "tau_absolute": tau_absolute}
    options |= {"exact_budgets": exact_budgets, "nonnegative": nonnegative}
    return joined(list(stages(x_BD, atoms_MD, groups, k, **options)))
