"""How a dictionary codes: one value from the learner to the saved dictionary and the SAE."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Literal

from torch import Tensor

from ksvd_sae.arguments import flag, number, shown, whole
from ksvd_sae.errors import InputTypeError, ShapeError
from ksvd_sae.learning.code import Code
from ksvd_sae.learning.fixed_support import with_gradient
from ksvd_sae.learning.gram import Gram, gram_of
from ksvd_sae.learning.matryoshka import check_groups, group_budgets, matryoshka_encode
from ksvd_sae.learning.sparse_coding import CODERS, Coder, encode

AnyCoder = Coder | Literal["matryoshka"]
ANY_CODERS: tuple[AnyCoder, ...] = (*CODERS, "matryoshka")


@dataclass(frozen=True)
class Coding:
    """The coder and its settings.

    Attributes:
        k: most atoms a sample.
        coder: 'mp', 'mp_refit', 'omp', 'ormp', 'projection', or 'matryoshka' (group by group).
        rtol, max_steps, nonnegative, tau, tau_absolute: see ``matching_pursuit``.
        groups: sizes of the groups of a Matryoshka dictionary; the coder 'matryoshka' needs them, others ignore them.
        exact_budgets: their shares of k add up to it, rather than being rounded up.
    Numbers may be numpy's, groups any sequence; Python's own types are kept.
    Raises: InputTypeError (a ShapeError) for what is no number.
    """

    k: int
    coder: AnyCoder = "mp"
    rtol: float = 0.0
    max_steps: int | None = None
    nonnegative: bool = False
    groups: tuple[int, ...] | None = None
    tau: float = 0.0
    tau_absolute: float = 0.0
    exact_budgets: bool = False

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("k", whole(self.k, "k", "Coding"))
        if self.max_steps is not None:
            put("max_steps", whole(self.max_steps, "max_steps", "Coding"))
        for name in ("rtol", "tau", "tau_absolute"):
            put(name, number(getattr(self, name), name, "Coding"))
        for name in ("nonnegative", "exact_budgets"):
            put(name, flag(getattr(self, name), name, "Coding"))
        if self.groups is not None:
            put("groups", _sizes(self.groups))

    def check(self, n_atoms: int, d_in: int, where: str) -> None:
        """Raise ShapeError unless this can code in d_in dimensions with n_atoms atoms."""
        if not 1 <= self.k <= min(n_atoms, d_in):
            raise ShapeError(f"{where}: k out of range", got=self.k, limit=f"1 to {min(n_atoms, d_in)}")
        if self.coder not in ANY_CODERS:
            raise ShapeError(f"{where}: unknown coder", got=self.coder, limit=", ".join(ANY_CODERS))
        if self.coder == "matryoshka" and self.groups is None:
            raise ShapeError(
                f"{where}: coder 'matryoshka' needs groups", cure="give the sizes of the groups, or coder 'mp'"
            )
        if self.coder in ("projection", "ormp") and self.nonnegative:
            raise ShapeError(f"{where}: coder {self.coder!r} has signs", cure="use coder 'omp' for non-negative codes")
        if self.groups is not None:
            check_groups(self.groups, n_atoms, self.k, d_in, self.exact_budgets)

    def encode(self, y_BD: Tensor, atoms_MD: Tensor, gram_MM: Gram | None = None) -> Code:
        """Code centred (and weighted) samples; gram_MM as for ``matching_pursuit``."""
        options: dict[str, Any] = {
            "rtol": self.rtol,
            "tau": self.tau,
            "tau_absolute": self.tau_absolute,
            "max_steps": self.max_steps,
            "nonnegative": self.nonnegative,
        }
        if self.coder != "matryoshka":
            return encode(y_BD, atoms_MD, self.k, coder=self.coder, gram_MM=gram_MM, **options)
        assert self.groups is not None
        return matryoshka_encode(y_BD, atoms_MD, self.groups, self.k, exact_budgets=self.exact_budgets, **options)

    def gram(self, atoms_MD: Tensor) -> Gram | None:
        """What ``encode`` takes as gram_MM, to be made once for many samples; None for coders that read none."""
        return None if self.coder in ("projection", "matryoshka") else gram_of(atoms_MD)

    def with_gradient(self, code: Code, y_BD: Tensor, atoms_MD: Tensor) -> Code:
        """What ``encode`` gave for these, bit for bit, with gradients to samples and atoms; see fixed_support.py."""
        if self.coder == "projection":
            return Code(y_BD @ atoms_MD.T, code.support_BK)
        if self.coder not in ("mp", "matryoshka"):
            return with_gradient(code, y_BD, atoms_MD)
        n_groups = len(self.groups or ())
        budgets = (self.k,) if self.coder == "mp" else group_budgets(self.k, n_groups, self.exact_budgets)
        ends = accumulate(budgets)
        steps = tuple((slice(end - n, end), self.max_steps or 4 * n) for end, n in zip(ends, budgets, strict=True))
        return with_gradient(code, y_BD, atoms_MD, steps=steps, nonnegative=self.nonnegative)

    def as_json(self) -> dict[str, Any]:
        """The fields by their names, groups as a list; exact_budgets only if they are, as there were once none."""
        fields = {**asdict(self), "groups": None if self.groups is None else list(self.groups)}
        if not self.exact_budgets:
            del fields["exact_budgets"]
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Coding":
        """What ``as_json`` gave, among other keys if need be.

        nonnegative, groups, exact_budgets and the taus may be missing: files from before there were any lack them.
        Raises: KeyError.
        """
        groups = fields.get("groups")
        return cls(
            k=fields["k"],
            coder=fields["coder"],
            rtol=fields["rtol"],
            max_steps=fields["max_steps"],
            nonnegative=fields.get("nonnegative", False),
            groups=None if groups is None or not len(groups) else tuple(groups),
            tau=fields.get("tau", 0.0),
            tau_absolute=fields.get("tau_absolute", 0.0),
            exact_budgets=fields.get("exact_budgets", False),
        )


def _sizes(groups: Any) -> tuple[int, ...]:
    try:
        sizes = () if isinstance(groups, str) else tuple(groups)
    except TypeError:
        sizes = ()
    if not sizes:
        raise InputTypeError(
            "Coding: groups must be the sizes of the groups", got=shown(groups), limit="whole numbers above 0"
        )
    return tuple(whole(size, f"groups[{index}]", "Coding") for index, size in enumerate(sizes))
