"""A published SAE or dictionary, from a folder or the Hub, checked before it is used.

Nothing is unpickled and no code of the repository runs: files are JSON and safetensors, the classes are SAELens' and
ours. Hashes are the manifest's; architecture, names, shapes and types of tensors are what the config implies; all
numbers are finite.
"""

import difflib
import os
from pathlib import Path
from typing import Any

import torch
from sae_lens.registry import SAE_CLASS_REGISTRY, get_sae_class
from sae_lens.saes.sae import SAE
from safetensors import SafetensorError, safe_open

from ksvd_sae.arguments import shown
from ksvd_sae.device import named_device
from ksvd_sae.dictionary import Dictionary
from ksvd_sae.errors import ConfigError, DictionaryError, InputTypeError, KsvdSaeError
from ksvd_sae.hub.layout import DICTIONARY_FILES, SAE_FILES, Manifest, check_name, check_repository, place, read_json
from ksvd_sae.methods.published.hub_files import hub_files
from ksvd_sae.sae import ARCHITECTURE
from ksvd_sae.store import MANIFEST, file_sha256

_DTYPES = {"F64", "F32", "F16", "BF16"}


def load(
    repo_or_folder: str | os.PathLike[str],
    sae_id: str,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
) -> SAE[Any]:
    """A SAELens SAE that `ksvd-sae publish` wrote.

    Args:
        repo_or_folder: a folder, or owner/name on the Hub; a folder of that name comes first.
        sae_id: one of those that README.md names, e.g. 'blocks.9.hook_resid_post/db-ksvd/split'.
        revision: a commit, branch or tag of the repository; None is main.
    Raises: ConfigError (no such sae_id, or one that leads elsewhere), HubError, ManifestError (files that are not those
        that were published), DictionaryError (files that are no SAE).
    """
    what = f"loading {sae_id} of {repo_or_folder}"
    folder = _fetched(repo_or_folder, sae_id, SAE_FILES, revision, what)
    config = read_json(folder / SAE_FILES[0], what)
    try:
        _check_weights(folder / SAE_FILES[1], config, what)
        return SAE.load_from_disk(folder, device=str(named_device(device)))
    # What SAELens makes of a config with wrong types.
    except (SafetensorError, RuntimeError, TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        if isinstance(error, KsvdSaeError):
            raise
        raise _no_sae(what, f"{type(error).__name__}: {str(error)[:300]}") from error


def load_dictionary(
    repo_or_folder: str | os.PathLike[str],
    sae_id: str,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
) -> Dictionary:
    """The dictionary that a published SAE was made from, bit for bit.

    Args: as for ``load``.
    Raises: as ``load``; ConfigError for an SAE that was not made from a dictionary.
    """
    what = f"loading the dictionary of {sae_id} of {repo_or_folder}"
    folder = _fetched(repo_or_folder, sae_id, DICTIONARY_FILES, revision, what)
    read_json(folder / DICTIONARY_FILES[0], what)
    dictionary = Dictionary.load(folder, device)
    if not bool(torch.isfinite(dictionary.centre_D).all()):
        raise DictionaryError(f"{what}: the centre holds NaN or infinity", cause="a file that was made by hand")
    return dictionary


def _fetched(
    repo_or_folder: str | os.PathLike[str],
    sae_id: str,
    names: tuple[str, ...],
    revision: str | None,
    what: str,
) -> Path:
    """The folder with files of one SAE, each as the manifest has it."""
    for value in (repo_or_folder, sae_id):
        if not isinstance(value, str | os.PathLike):
            raise InputTypeError(f"{what}: no text", got=shown(value), limit="a folder or owner/name, and an sae_id")
    check_name(sae_id, what)
    folder, repo_id = Path(repo_or_folder), str(repo_or_folder)
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(f"{what}: a folder has no revisions", got=f"revision {revision!r}", cure="leave it out")
        manifest = Manifest.read(place(folder, MANIFEST, what), what)
        wanted = _names(manifest, sae_id, names, what)
        for name in wanted:
            manifest.check(name, file_sha256(place(folder, name, what)), what, "copy or publish the folder again")
        return folder / sae_id
    check_repository(repo_id, f"{what}: no such folder")
    top = hub_files(repo_id, "", (MANIFEST,), revision=revision)
    manifest = Manifest.read(top.folder / MANIFEST, what)
    wanted = _names(manifest, sae_id, names, what)
    # Of the commit that the manifest is of.
    files = hub_files(repo_id, sae_id, names, revision=top.commit)
    for name, full in zip(names, wanted, strict=True):
        held = (files.folder / name).resolve()
        manifest.check(full, files.sha256[name], what, f"delete {held} and load again: it is fetched anew")
    return files.folder


def _names(manifest: Manifest, sae_id: str, names: tuple[str, ...], what: str) -> list[str]:
    """The files' names in the manifest."""
    if sae_id not in manifest.saes:
        near = difflib.get_close_matches(sae_id, manifest.saes, n=1, cutoff=0.3)
        raise ConfigError(
            f"{what}: no such sae_id",
            limit=", ".join(manifest.saes),
            cure=f"did you mean {near[0]!r}?" if near else None,
        )
    wanted = [f"{sae_id}/{name}" for name in names]
    if not all(name in manifest.files for name in wanted):
        raise ConfigError(
            f"{what}: it was published without {' and '.join(names)}",
            cause="an SAE for SAELens alone, which stands beside a dictionary",
            cure="take the dictionary's own sae_id",
        )
    return wanted


def _check_weights(path: Path, config: dict[str, Any], what: str) -> None:
    """Raise DictionaryError unless the tensors are those that a class that SAELens knows has by this config."""
    architecture = config.get("architecture")
    if not isinstance(architecture, str) or architecture not in SAE_CLASS_REGISTRY:
        known = ", ".join(sorted(name for name in SAE_CLASS_REGISTRY if name.isidentifier()))
        raise _no_sae(what, f"architecture {architecture!r}", known)
    sae_class, config_class = get_sae_class(architecture)
    # Tensors of the meta device have shapes and no memory.
    blank = sae_class(config_class.from_dict({**config, "device": "meta"}))
    expected = {name: list(tensor.shape) for name, tensor in blank.state_dict().items()}
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        found = {name: part.get_shape() for name, part in slices.items()}
        if found != expected:
            wrong = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
            raise _no_sae(
                what,
                "; ".join(f"{name}: {found.get(name, 'missing')}" for name in wrong),
                "; ".join(f"{name}: {expected.get(name, 'no such tensor')}" for name in wrong),
            )
        if kinds := {name: part.get_dtype() for name, part in slices.items() if part.get_dtype() not in _DTYPES}:
            raise _no_sae(what, kinds, ", ".join(sorted(_DTYPES)))
        for name in found:
            tensor = file.get_tensor(name)
            if not bool(torch.isfinite(tensor).all()):
                raise _no_sae(what, f"{name} holds NaN or infinity")
            if name == "W_dec" and architecture == ARCHITECTURE and not bool(tensor.any(dim=1).all()):
                raise _no_sae(what, "a row of W_dec is zero")


def _no_sae(what: str, got: Any, limit: Any = None) -> DictionaryError:
    return DictionaryError(
        f"{what}: its files are no SAE that can be loaded",
        got=got,
        limit=limit,
        cause="made by another program or a newer ksvd-sae, or altered together with the manifest",
        cure="publish it again; upgrade ksvd-sae",
    )
