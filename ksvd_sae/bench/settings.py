"""What the command line asks of a suite, and what a suite gives back."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ksvd_sae.bench import peers
from ksvd_sae.bench.problems import (
    ACTIVATIONS,
    IMPORTED,
    PLANTED,
    Problem,
    Shape,
    activation_problem,
    planted_problem,
)
from ksvd_sae.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """Options of a run; None leaves a suite its own default.

    Attributes:
        data: 'activations' (of ``config``'s harvest), 'imported' (the same, and its TopK SAE's atoms) or 'planted'.
        samples, atoms, k: n, m, k of the case.
        dim: d of planted samples; activations have their own.
        threads: most threads of every implementation.
        device: of ours and of the peers that can; the others stay on the CPU, and their rows say so.
        repeats: timed calls of each.
        budget_s: a call that would take longer is made on fewer samples.
        peers: names, see ``peers.chosen``.
        small: tiny planted shapes, for a smoke run.
    """

    data: str = ACTIVATIONS
    samples: int | None = None
    atoms: int | None = None
    k: int | None = None
    dim: int | None = None
    threads: int = 2
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    repeats: int | None = None
    budget_s: float = 20.0
    peers: str = "all"
    seed: int = 0
    config: Path = Path("demo")
    small: bool = False

    def __post_init__(self) -> None:
        known = (ACTIVATIONS, IMPORTED, PLANTED)
        if self.data not in known:
            raise ConfigError("bench --data: no such data", got=self.data, limit=", ".join(known))
        for name in ("samples", "atoms", "k", "dim", "threads", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"bench --{name}: must be at least 1", got=value)

    def shape(self, default: Shape, small: Shape) -> Shape:
        """The case's sizes: what was asked for, else the suite's."""
        base = small if self.small else default
        return Shape(self.data, self.samples or base.n, self.dim or base.d, self.atoms or base.m, self.k or base.k)

    def problem(self, shape: Shape, n_heldout: int = 0, *, learn: bool = True) -> Problem:
        """Samples and atoms of that shape; see ``activation_problem`` for ``learn``."""
        if self.small or self.data == PLANTED:
            return planted_problem(shape, n_heldout, self.seed)
        if self.dim is not None:
            raise ConfigError(
                "bench --dim: activations have the model's dimension",
                got=self.dim,
                cure="leave --dim out, or add --data planted",
            )
        imported = self.data == IMPORTED
        return activation_problem(self.config, shape.n, shape.m, shape.k, n_heldout, learn=learn, imported=imported)

    def peers_of(self, suite: str) -> tuple[str, ...]:
        """The peers asked for that have this suite, checked to be installed."""
        names = tuple(name for name in peers.chosen(self.peers, frozenset(ALL)) if suite in peers.PEERS[name].suites)
        peers.require(names)
        return names


# The suites in the order that `bench all` runs them.
ALL = ("coding", "update", "train", "scaling")
# And those that need a language model; evals a trained panel, too, and as long as the rest together.
SUITES = (*ALL, "harvest", "evals")


@dataclass
class Outcome:
    """Rows measured, and peers that failed on the way, as messages."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
