"""The value that travels: atoms, centre, coder and where they came from; saved without pickle."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ksvd_sae.arguments import json_value, path, shown
from ksvd_sae.device import named_device, own_modes
from ksvd_sae.errors import DictionaryError, InputTypeError, KsvdSaeError, ShapeError
from ksvd_sae.learning.checks import check_atoms, check_code
from ksvd_sae.learning.code import Code
from ksvd_sae.learning.coding import Coding
from ksvd_sae.learning.sources import as_batch, reshaped
from ksvd_sae.learning.weighting import Weighting
from ksvd_sae.store import atomic_path, checksum, file_sha256, write_json

ATOMS_FILE = "atoms.safetensors"
CONFIG_FILE = "dictionary.json"
# 2: weighting, groups and non-negative codes; files of 1 have none of them.
FORMAT = 3


class Learned(Protocol):
    """What has learned a dictionary: ``DictionaryLearner`` and ``DoubleBatchKSVD``."""

    @property
    def atoms_MD(self) -> Tensor: ...

    @property
    def centre_D(self) -> Tensor: ...

    @property
    def coding(self) -> Coding: ...

    @property
    def weighting(self) -> Weighting | None: ...


@dataclass(frozen=True)
class Dictionary:
    """x ≈ centre + (Σ_j z_j·atom_j)·W⁻¹ with at most k nonzero z_j; W is the weighting's map, the identity without one.

    Attributes:
        atoms_MD: unit rows of the weighted space, float32.
        centre_D: subtracted before coding, added after decoding (raw units).
        coding: how it codes centred and weighted samples.
        weighting: the metric that it was learned in and codes in, None for the plain one.
        provenance: what it was learned from; JSON values, and numpy's, paths and tuples in their JSON form.
    Atoms and centre may be arrays.
    Raises: DictionaryError, ShapeError if the parts do not fit, or are not what JSON has a form for (NaN is not).
    """

    atoms_MD: Tensor
    centre_D: Tensor
    coding: Coding
    weighting: Weighting | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("atoms_MD", "centre_D"):
            tensor = _floating(getattr(self, name), name)
            object.__setattr__(self, name, tensor)
        for name, kind in (("coding", Coding), ("weighting", Weighting | None), ("provenance", dict)):
            if not isinstance(getattr(self, name), kind):
                raise InputTypeError(f"Dictionary: {name} is of another type", got=shown(getattr(self, name)))
        object.__setattr__(self, "provenance", json_value(self.provenance, "provenance", "Dictionary"))
        if self.atoms_MD.ndim != 2 or self.centre_D.shape != self.atoms_MD.shape[1:]:
            raise ShapeError(
                "Dictionary: atoms and centre do not fit",
                got=f"atoms {tuple(self.atoms_MD.shape)}, centre {tuple(self.centre_D.shape)}",
                limit="(M, D) and (D,)",
            )
        if self.weighting is not None and self.weighting.d_in != self.d_in:
            raise ShapeError(
                "Dictionary: atoms and weighting do not fit",
                got=f"a map of {self.weighting.d_in} dimensions",
                limit=f"d_in = {self.d_in}",
            )
        self.coding.check(self.n_atoms, self.d_in, "Dictionary")
        check_atoms(self.atoms_MD, "Dictionary")

    @property
    def n_atoms(self) -> int:
        return len(self.atoms_MD)

    @property
    def d_in(self) -> int:
        return self.atoms_MD.shape[1]

    @own_modes()
    def encode(self, x_BD: Any) -> Code:
        """Code raw samples, a tensor or array (B, d_in).

        Raises: ShapeError, ActivationError (NaN or infinity).
        """
        x_BD = as_batch(x_BD, "Dictionary.encode")
        if x_BD.ndim != 2 or x_BD.shape[1] != self.d_in:
            raise ShapeError(
                "Dictionary.encode: samples do not fit the dictionary",
                got=str(tuple(x_BD.shape)),
                limit=f"(B, {self.d_in})",
                cause="activations of another model or hook",
                cure=reshaped(tuple(x_BD.shape)) if x_BD.ndim != 2 else None,
            )
        if not x_BD.is_floating_point():
            raise ShapeError(
                "Dictionary.encode: samples are not floating point", got=x_BD.dtype, cure="samples.float()"
            )
        y_BD = x_BD.to(self.atoms_MD.device, self.atoms_MD.dtype) - self.centre_D
        if self.weighting is not None:
            y_BD = self.weighting.apply(y_BD)
        return self.coding.encode(y_BD, self.atoms_MD)

    @own_modes()
    def decode(self, code: Code) -> Tensor:
        """Rebuild raw samples, (B, d_in).

        Raises: ShapeError (dense codes, a code of another dictionary).
        """
        check_code(code, self.n_atoms, "Dictionary.decode")
        y_BD = code.reconstruct(self.atoms_MD)
        return (y_BD if self.weighting is None else self.weighting.undo(y_BD)) + self.centre_D

    def raw_atoms(self) -> Tensor:
        """What one unit of each coefficient adds to a raw sample, (M, d_in); unit rows if there is no weighting."""
        return self.atoms_MD if self.weighting is None else self.weighting.undo(self.atoms_MD)

    def unit_raw_atoms(self) -> Tensor:
        """``raw_atoms`` at unit norm, as decoder rows of a SAE are, (M, d_in)."""
        return self.atoms_MD if self.weighting is None else torch.nn.functional.normalize(self.raw_atoms(), dim=1)

    @classmethod
    def from_estimator(cls, ksvd: Learned, provenance: dict[str, Any] | None = None) -> "Dictionary":
        """The dictionary that a fitted estimator or learner has learned; learning on does not change it.

        Raises: NotFittedError, ShapeError (nothing that learns dictionaries).
        """
        if not all(hasattr(type(ksvd), name) for name in ("atoms_MD", "centre_D", "coding")):
            limit = "a DoubleBatchKSVD or a DictionaryLearner"
            raise InputTypeError("Dictionary.from_estimator: no learner", got=type(ksvd).__name__, limit=limit)
        return cls(
            ksvd.atoms_MD.detach().clone(),
            ksvd.centre_D.detach().clone(),
            ksvd.coding,
            weighting=ksvd.weighting,
            provenance=provenance or {},
        )

    def save(self, folder: Path | str) -> None:
        """Write ``atoms.safetensors`` and ``dictionary.json``."""
        folder = path(folder, "folder", "Dictionary.save")
        # Looked at again, as it is a dict that may have been written to; before anything is.
        provenance = json_value(self.provenance, "provenance", "Dictionary.save")
        tensors = {"atoms": self.atoms_MD.contiguous().cpu(), "centre": self.centre_D.contiguous().cpu()}
        if self.weighting is not None:
            tensors["weighting"] = self.weighting.matrix.contiguous().cpu()
            tensors["weighting_inverse"] = self.weighting.inverse.contiguous().cpu()
        with atomic_path(folder / ATOMS_FILE) as temporary:
            save_file(tensors, temporary)
        config = {"format": FORMAT, **self.coding.as_json(), "provenance": provenance}
        write_json(folder / CONFIG_FILE, {**config, "checksum": _checksum(config, folder)})

    @classmethod
    def load(cls, folder: Path | str, device: str | torch.device = "cpu") -> "Dictionary":
        """Read what ``save`` wrote, bit for bit.

        Raises: DictionaryError if a file is missing, truncated or of a newer format; ConfigError (no such device).
        """
        folder, device = path(folder, "folder", "Dictionary.load"), named_device(device)
        try:
            # NaN, which is no JSON, may be in provenance of before it was refused: as text.
            config = json.loads((folder / CONFIG_FILE).read_text(), parse_constant=str)
            tensors = load_file(folder / ATOMS_FILE, device=str(device))
            if config["format"] > FORMAT:
                raise DictionaryError(
                    f"loading dictionary {folder}: written by a newer ksvd_sae",
                    got=f"format {config['format']}",
                    limit=f"format {FORMAT}",
                    cure="upgrade ksvd-sae",
                )
            # Before format 3 there was none.
            known = config.pop("checksum", None)
            if (known is not None or config["format"] >= 3) and known != _checksum(config, folder):
                raise DictionaryError(
                    f"loading dictionary {folder}: {CONFIG_FILE} and {ATOMS_FILE} are not as they were saved together",
                    cause="a file that was altered or damaged, or that is of another dictionary",
                    cure="copy both again, or train again; Dictionary.load, dataclasses.replace and save make changes",
                )
            maps = [tensors[name].clone() for name in ("weighting", "weighting_inverse") if name in tensors]
            return cls(
                # Copies: a tensor mapped from a file is aligned as the file has it, and products of unaligned
                # memory differ in the last bit.
                atoms_MD=tensors["atoms"].clone(),
                centre_D=tensors["centre"].clone(),
                coding=Coding.from_json(config),
                weighting=Weighting(*maps) if maps else None,
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


def _checksum(config: dict[str, Any], folder: Path) -> str:
    """Of both files."""
    return checksum([config, file_sha256(folder / ATOMS_FILE)])


def _floating(rows: Any, name: str) -> Tensor:
    """A tensor of floating-point numbers, of a tensor, array or list."""
    if not isinstance(rows, Tensor):
        try:
            rows = torch.from_numpy(np.array(rows))
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputTypeError(f"Dictionary: {name} is no array", got=shown(rows), cause=str(error)) from error
    if not rows.is_floating_point():
        raise ShapeError(
            f"Dictionary: {name} is not floating point", got=f"{rows.dtype} {tuple(rows.shape)}", cure=".float()"
        )
    return rows
