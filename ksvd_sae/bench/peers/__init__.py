"""The implementations that ours is measured against, one package a file.

They come with ``pip install 'ksvd-sae[bench]'`` and are imported here alone, when a benchmark asks for them: the
library itself never imports one. SPAMS is under the GPL (version 3 or later), the others under permissive licences.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ksvd_sae.bench.rows import Who
from ksvd_sae.errors import ConfigError, MissingExtraError
from ksvd_sae.learning.sparse_coding import Code


@dataclass(frozen=True)
class Coder:
    """Codes samples with given atoms.

    Attributes:
        who: whose code.
        prepare: from x_ND (n, d) and atoms_MD (m, d), in the layout that the implementation likes best, which is not
            timed, the call that is.
        rebuild: from the result of the call and atoms_MD, the rebuilt samples (n, d).
        greedy: whether it picks atoms one by one, which is what the floor is of.
    """

    who: Who
    prepare: Callable[[Tensor, Tensor], Callable[[], Any]]
    rebuild: Callable[[Any, Tensor], Tensor]
    greedy: bool = True


@dataclass(frozen=True)
class Updater:
    """Updates all atoms once from a coded batch.

    Attributes:
        who: whose code.
        prepare: from x_ND, its code and atoms_MD: a setup that gives fresh input, and the call that is timed.
        rebuild: from the result, the samples rebuilt with the new atoms and coefficients; None if there are none.
    """

    who: Who
    prepare: Callable[[Tensor, Code, Tensor], tuple[Callable[[], Any], Callable[[Any], Any]]]
    rebuild: Callable[[Any], Tensor] | None


@dataclass(frozen=True)
class Trainer:
    """Learns a dictionary.

    Attributes:
        who: whose code.
        passes: times that it sees every sample.
        prepare: from x_ND and the initial atoms_MD (unit rows), the call that is timed.
        atoms: from its result, the atoms (m, d), of any norm.
    """

    who: Who
    passes: int
    prepare: Callable[[Tensor, Tensor], Callable[[], Any]]
    atoms: Callable[[Any], Tensor]


@dataclass(frozen=True)
class Peer:
    """Where a peer is found: its file here, the module it imports, the package that has it, and what it does."""

    file: str
    module: str
    package: str
    suites: frozenset[str]


PEERS = {
    "spams": Peer("spams_peer", "spams", "spams-bin", frozenset({"coding", "train"})),
    "dictlearn": Peer("dictlearn_peer", "dictlearn", "dictlearn", frozenset({"coding", "update", "train"})),
    "scikit-learn": Peer("sklearn_peer", "sklearn", "scikit-learn", frozenset({"coding", "train"})),
    "omp-gpu": Peer(
        "omp_gpu_peer", "orthogonal_matching_pursuit_gpu", "orthogonal-matching-pursuit-gpu", frozenset({"coding"})
    ),
    "sae-lens": Peer("sae_lens_peer", "sae_lens", "sae-lens", frozenset({"coding", "update", "train"})),
}


def chosen(text: str, suites: frozenset[str]) -> tuple[str, ...]:
    """The peers that ``--peers`` names: 'all' that have one of the suites, 'none', or names with commas.

    Raises: ConfigError for an unknown name, or a peer that has none of the suites.
    """
    able = tuple(name for name, peer in PEERS.items() if peer.suites & suites)
    if text in ("all", "none"):
        return able if text == "all" else ()
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in able:
            what = "has nothing to measure there" if name in PEERS else "is not known"
            raise ConfigError(
                f"bench --peers: {name!r} {what}", limit=", ".join(["all", "none", *able]), cure="name others"
            )
    return names


def require(names: tuple[str, ...]) -> None:
    """Raise MissingExtraError, before anything is measured, if one of the peers is not installed."""
    missing = [name for name in names if find_spec(PEERS[name].module) is None]
    if missing:
        raise MissingExtraError(
            f"bench: peers that are not installed: {', '.join(missing)}",
            got=", ".join(f"no package {PEERS[name].package}" for name in missing),
            cause="the peers are an extra (omp-gpu is built from source and needs a C compiler; SPAMS has wheels for "
            "Linux on x86-64 and recent macOS on ARM)",
            cure="pip install 'ksvd-sae[bench]', or leave them out: --peers none, or --peers with names",
        )


def load(name: str) -> Any:
    """The file of a peer in this package; it has ``coders``, ``updaters`` or ``trainers`` for its suites."""
    require((name,))
    return import_module(f"{__name__}.{PEERS[name].file}")


def numpy_atoms(atoms: Any) -> Tensor:
    """Atoms that a peer gave as an array (m, d), as a float32 tensor."""
    return torch.as_tensor(atoms).float().contiguous()
