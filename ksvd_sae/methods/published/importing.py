"""SAEs that others trained, as dictionaries that code by pursuit.

Whatever its encoder is, an SAE rebuilds b_dec + f·W_dec. With n_j = ‖W_dec_j‖ that is centre + z·atoms, of atoms
W_dec_j / n_j and coefficients z_j = n_j·f_j. A pursuit finds other coefficients, which are not the SAE's latents.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from sae_lens.loading.pretrained_sae_loaders import get_conversion_loader_name
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.saes.sae import SAE
from torch import Tensor

from ksvd_sae.arguments import shown
from ksvd_sae.dictionary import Dictionary
from ksvd_sae.errors import DictionaryError, HubError, InputTypeError, ShapeError
from ksvd_sae.learning.coding import AnyCoder, Coding
from ksvd_sae.learning.redraw import near_duplicates
from ksvd_sae.methods.base import unit_rows
from ksvd_sae.methods.published import WEIGHTS
from ksvd_sae.methods.published.saes import CONVERSIONS, SIGNED, Source, fetch_from, fetch_listed, load
from ksvd_sae.sae import DBKSVDSAE, decoder
from ksvd_sae.store import file_sha256

logger = logging.getLogger(__name__)
# Rows that are shorter have no direction to tell.
_SHORTEST = 1e-12
_PURSUITS = ("mp", "mp_refit", "omp", "ormp")
# As what training calls duplicates.
_DUPLICATE_COSINE = 0.99
# Makes torch.load unpickle anything, in SAELens' own loaders too.
_UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@dataclass(frozen=True)
class _Taken:
    """An SAE, its name for messages, its own k, and where it came from, for the provenance."""

    name: str
    sae: Any
    k: int | None
    origin: Mapping[str, JsonValue]


def import_sae(
    source: SAE[Any] | Path | str,
    sae_id: str | None = None,
    *,
    k: int | None = None,
    coder: AnyCoder = "omp",
    nonnegative: bool | None = None,
) -> Dictionary:
    """An SAE's decoder as a dictionary that codes by pursuit: unit rows of W_dec as atoms, b_dec as the centre.

    Atom j is latent j, but for rows of norm 0, which are left out. The provenance has the model, the hook and, as
    ``sae``, where it came from, its metadata, which rows were left out and how many atoms are near duplicates
    (cosine above 0.99 with one before; with signs |cosine|). Files are read as tensors only: no pickle is run.

    Args:
        source: a SAELens SAE; a folder that SAELens (cfg.json, sae_weights.safetensors) or dictionary_learning
            (config.json; ae.pt or ae.safetensors) wrote; or, with ``sae_id``, a release of SAELens' directory, or
            owner/name on the Hub.
        sae_id: the SAE of that release, or its folder in the repository; of dictionary_learning, the path of its ae.pt.
        k: most atoms a sample; None takes the SAE's own: TopK SAEs have one, and BatchTopK ones of dictionary_learning.
        coder: 'mp', 'mp_refit', 'omp' or 'ormp'.
        nonnegative: None takes the signs that the SAE's latents have: none, but in AbsTopK SAEs.
    Raises: DictionaryError (no SAE, or none whose decoder is a dictionary), ConfigError (no such release), HubError,
        ShapeError (k, coder).
    Cost: the weights in float32 and in float64; half of the Gram matrix, if any atoms may be near duplicates.
    """
    if not isinstance(source, SAE | str | Path):
        limit = "a SAELens SAE, a folder, or a release with sae_id"
        raise InputTypeError("import_sae: no SAE and no place of one", got=shown(source), limit=limit)
    if coder not in _PURSUITS:
        raise ShapeError("import_sae: no pursuit of that name", got=coder, limit=", ".join(_PURSUITS))
    taken = _Taken("the SAE", source, _k(source), {}) if isinstance(source, SAE) else _taken(source, sae_id)
    where, sae, k = f"importing {taken.name}", taken.sae, taken.k if k is None else k
    if isinstance(sae, DBKSVDSAE):
        raise DictionaryError(
            f"{where}: it codes by pursuit as it is", got="db_ksvd", cure="set its cfg.k, cfg.coder and cfg.nonnegative"
        )
    rows_MD, centre_D = decoder(sae, where)
    if k is None:
        raise DictionaryError(
            f"{where}: how many atoms a sample may use is not known",
            cause="an SAE without a k of its own",
            cure="give k: as many as latents are active on a token (its L0)",
        )
    if nonnegative is None:
        nonnegative = sae.cfg.architecture() not in SIGNED
    if nonnegative and coder == "ormp":
        raise ShapeError(
            f"{where}: coder 'ormp' has signs, and the codes are to have none",
            cause="the SAE's latents have none",
            cure="nonnegative=False (--signed), or coder 'omp'",
        )
    atoms_MD, left_out = _atoms(rows_MD.cpu(), where)
    repeated_M = near_duplicates(atoms_MD, torch.ones(len(atoms_MD)), _DUPLICATE_COSINE, signed=not nonnegative)
    metadata = sae.cfg.metadata.to_dict()
    facts = {"architecture": sae.cfg.architecture(), **taken.origin, "metadata": metadata}
    facts |= {"rows_left_out": left_out, "near_duplicates": int(repeated_M.sum())}
    provenance = {"model": metadata.get("model_name"), "hook": metadata.get("hook_name"), "sae": facts}
    coding = Coding(k, coder, nonnegative=nonnegative)
    logger.info(
        "%s: %d atoms of %d dimensions; %d rows of norm 0 left out; %d near duplicates",
        where,
        *atoms_MD.shape,
        len(left_out),
        facts["near_duplicates"],
    )
    return Dictionary(atoms_MD, centre_D.cpu(), coding, provenance=provenance)


def _atoms(rows_MD: Tensor, where: str) -> tuple[Tensor, list[int]]:
    """Unit rows, and which are left out."""
    is_atom_M = torch.linalg.vector_norm(rows_MD, dim=1, dtype=torch.float64) > _SHORTEST
    if not bool(is_atom_M.any()):
        raise DictionaryError(f"{where}: all rows of its decoder have norm 0", cause="an SAE that was never trained")
    left_out: list[int] = (~is_atom_M).nonzero().flatten().tolist()
    return unit_rows(rows_MD[is_atom_M] if left_out else rows_MD, None), left_out


def _taken(place: str | Path, sae_id: str | None) -> _Taken:
    if sae_id is None:
        source = _in_folder(Path(place))
    elif str(place) in get_pretrained_saes_directory() or "/" not in str(place):
        conversion = get_conversion_loader_name(str(place))
        if conversion not in CONVERSIONS:
            return _by_saelens(str(place), sae_id, conversion)
        source = fetch_listed(str(place), sae_id)
    else:
        source = _in_repository(str(place), sae_id)
    sae, _, k = load(source)
    return _Taken(source.name, sae, k, source.origin)


def _in_folder(folder: Path) -> Source:
    """As published SAEs are named, a folder on this machine."""
    for format_, (config, weights) in WEIGHTS.items():
        for name in (weights, Path(weights).with_suffix(".safetensors").name):
            files = folder / config, folder / name
            if all(file.is_file() for file in files):
                hashes: JsonValue = {file.name: file_sha256(file) for file in files}
                origin = {"format": format_, "folder": str(folder), "sha256": hashes}
                return Source(str(folder), format_, *files, origin)
    raise DictionaryError(
        f"importing {folder}: no SAE there",
        got=", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else "no such folder",
        limit="; ".join(" and ".join(names) for names in WEIGHTS.values()),
        cure="give the folder that holds these files; of an SAE on the Hub, give its release or owner/name, and its id",
    )


def _in_repository(repo_id: str, path: str) -> Source:
    folder, _, name = path.strip("/").rpartition("/")
    for format_, names in WEIGHTS.items():
        if name in names:
            return fetch_from(repo_id, folder, format_)
    return fetch_from(repo_id, "" if path == "." else path.strip("/"), "saelens")


def _by_saelens(release: str, sae_id: str, conversion: str) -> _Taken:
    """Of SAELens' directory, in a format that SAELens alone can read."""
    name = f"{release}, {sae_id}"
    if os.environ.get(_UNSAFE):
        raise DictionaryError(
            f"importing {name}: its file would be unpickled, which runs what is in it",
            got=f"{_UNSAFE}={os.environ[_UNSAFE]}",
            cure=f"unset {_UNSAFE}",
        )
    try:
        sae = SAE.from_pretrained(release, sae_id)
    # Whatever the Hub's libraries and SAELens' loaders raise.
    except Exception as error:
        raise HubError(
            f"importing {name}: SAELens cannot load it ({type(error).__name__}: {error})",
            cause="an sae_id that the release has not, no connection, or a gated repository",
            cure="try SAE.from_pretrained with the same names; `ksvd-sae doctor` says whether the Hub answers",
        ) from error
    return _Taken(name, sae, _k(sae), {"format": conversion, "release": release, "sae_id": sae_id})


def _k(sae: SAE[Any]) -> int | None:
    return getattr(sae.cfg, "k", None)
