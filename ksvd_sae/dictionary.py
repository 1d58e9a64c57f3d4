"""The value that travels: atoms, centre, coder and where they came from; saved without pickle."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ksvd_sae.errors import DictionaryError, KsvdSaeError, ShapeError
from ksvd_sae.learning.checks import check_atoms
from ksvd_sae.learning.dbksvd import DoubleBatchKSVD
from ksvd_sae.learning.sparse_coding import CODERS, Code, Coder, encode
from ksvd_sae.provenance import atomic_path, write_json

ATOMS_FILE = "atoms.safetensors"
CONFIG_FILE = "dictionary.json"
FORMAT = 1


@dataclass(frozen=True)
class Dictionary:
    """x ≈ centre + Σ_j z_j·atom_j with at most k nonzero z_j.

    Attributes:
        atoms_MD: unit rows, float32.
        centre_D: subtracted before coding, added after decoding (raw units).
        k: most atoms a sample.
        coder: 'mp', 'mp_refit', 'omp' or 'projection'.
        rtol, max_steps: see ``matching_pursuit``.
        provenance: what it was learned from; JSON values.
    Raises: DictionaryError, ShapeError if the parts do not fit.
    """

    atoms_MD: Tensor
    centre_D: Tensor
    k: int
    coder: Coder = "mp"
    rtol: float = 0.0
    max_steps: int | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.atoms_MD.ndim != 2 or self.centre_D.shape != self.atoms_MD.shape[1:]:
            raise ShapeError(
                "Dictionary: atoms and centre do not fit",
                got=f"atoms {tuple(self.atoms_MD.shape)}, centre {tuple(self.centre_D.shape)}",
                limit="(M, D) and (D,)",
            )
        if not 1 <= self.k <= min(self.atoms_MD.shape):
            raise ShapeError("Dictionary: k out of range", got=self.k, limit=f"1 to {min(self.atoms_MD.shape)}")
        if self.coder not in CODERS:
            raise DictionaryError("Dictionary: unknown coder", got=self.coder, limit=", ".join(CODERS))
        check_atoms(self.atoms_MD, "Dictionary")

    @property
    def n_atoms(self) -> int:
        return len(self.atoms_MD)

    @property
    def d_in(self) -> int:
        return self.atoms_MD.shape[1]

    def encode(self, x_BD: Tensor) -> Code:
        """Code raw samples (B, d_in)."""
        if x_BD.ndim != 2 or x_BD.shape[1] != self.d_in:
            raise ShapeError(
                "Dictionary.encode: samples do not fit the dictionary",
                got=str(tuple(x_BD.shape)),
                limit=f"(B, {self.d_in})",
                cause="activations of another model or hook",
            )
        x_BD = x_BD.to(self.atoms_MD.device, self.atoms_MD.dtype) - self.centre_D
        return encode(x_BD, self.atoms_MD, self.k, coder=self.coder, rtol=self.rtol, max_steps=self.max_steps)

    def decode(self, code: Code) -> Tensor:
        """Rebuild raw samples, (B, d_in)."""
        return code.reconstruct(self.atoms_MD) + self.centre_D

    @classmethod
    def from_estimator(cls, ksvd: DoubleBatchKSVD, provenance: dict[str, Any] | None = None) -> "Dictionary":
        """The dictionary that a fitted estimator learned."""
        return cls(
            atoms_MD=ksvd.atoms_MD.detach().clone(),
            centre_D=ksvd.centre_D.detach().clone(),
            k=ksvd.k,
            coder=ksvd.coder,
            rtol=ksvd.rtol,
            max_steps=ksvd.max_steps,
            provenance=provenance or {},
        )

    def save(self, folder: Path) -> None:
        """Write ``atoms.safetensors`` and ``dictionary.json``."""
        tensors = {"atoms": self.atoms_MD.contiguous().cpu(), "centre": self.centre_D.contiguous().cpu()}
        with atomic_path(folder / ATOMS_FILE) as temporary:
            save_file(tensors, temporary)
        write_json(
            folder / CONFIG_FILE,
            {
                "format": FORMAT,
                "k": self.k,
                "coder": self.coder,
                "rtol": self.rtol,
                "max_steps": self.max_steps,
                "provenance": self.provenance,
            },
        )

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> "Dictionary":
        """Read what ``save`` wrote, bit for bit.

        Raises: DictionaryError if a file is missing, truncated or of a newer format.
        """
        try:
            config = json.loads((folder / CONFIG_FILE).read_text())
            tensors = load_file(folder / ATOMS_FILE, device=str(device))
            if config["format"] > FORMAT:
                raise DictionaryError(
                    f"loading dictionary {folder}: written by a newer ksvd_sae",
                    got=f"format {config['format']}",
                    limit=f"format {FORMAT}",
                    cure="upgrade ksvd-sae",
                )
            return cls(
                # Copies: a tensor mapped from a file is aligned as the file has it, and products of unaligned
                # memory differ in the last bit.
                atoms_MD=tensors["atoms"].clone(),
                centre_D=tensors["centre"].clone(),
                k=config["k"],
                coder=config["coder"],
                rtol=config["rtol"],
                max_steps=config["max_steps"],
                provenance=config["provenance"],
            )
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, KsvdSaeError):
                raise
            raise DictionaryError(
                f"loading dictionary {folder}: {type(error).__name__}: {error}",
                cause="not a dictionary's folder, or a truncated file",
                cure="give the folder that `ksvd-sae train` wrote, or train again",
            ) from error
