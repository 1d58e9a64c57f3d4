"""Files of a repository on the Hugging Face Hub, all of one commit; every failure says what to do about it."""

from dataclasses import dataclass
from pathlib import Path

from ksvd_sae.activations.hub import hub_errors
from ksvd_sae.errors import HubError
from ksvd_sae.store import file_sha256


@dataclass(frozen=True)
class HubFiles:
    """Downloaded files of one folder.

    folder: where they lie, in the Hub's cache. commit: of the repository. sha256: name -> hash.
    """

    repo_id: str
    path: str
    commit: str
    folder: Path
    sha256: dict[str, str]


def hub_files(
    repo_id: str, path: str, names: tuple[str, ...], *, revision: str | None = None, endpoint: str | None = None
) -> HubFiles:
    """Download ``names`` from the folder ``path`` of a repository, or take them from the Hub's cache.

    Args:
        path: '' is the repository's top.
        revision: a commit, branch or tag; None is main.
        endpoint: of the Hub; None takes huggingface_hub's own (HF_ENDPOINT).
    Raises: HubError (no such repository, revision or file; gated; not reachable and not in the cache).
    """
    commit, folder = revision, None
    for name in names:
        local = _download(repo_id, f"{path}/{name}" if path else name, commit, endpoint)
        if folder is None:
            # Hub caches have snapshots/<commit>/<path>/<name>: the other files come from the same commit.
            commit, folder = local.parts[-2 - len([part for part in path.split("/") if part])], local.parent
    if folder is None or commit is None:
        raise HubError(f"reading {path or 'the top'} of {repo_id}: no files were asked for")
    return HubFiles(repo_id, path, commit, folder, {name: file_sha256(folder / name) for name in names})


def _download(repo_id: str, file: str, revision: str | None, endpoint: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    with hub_errors(repo_id, file, revision):
        return Path(hf_hub_download(repo_id, file, revision=revision, endpoint=endpoint))
