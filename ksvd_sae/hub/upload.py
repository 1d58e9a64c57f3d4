"""A published folder to a repository on the Hub, in one commit: it is there whole or not at all.

huggingface_hub's client does the talking, with the token of its own login, which nothing here sees. Large files go up
first, each by its hash; the commit that names them all comes last. So an upload that broke off has changed nothing that
anybody sees, and the next one sends only what has not arrived.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from ksvd_sae import __version__
from ksvd_sae.activations.hub import client_errors
from ksvd_sae.errors import HubError, KsvdSaeError, ManifestError
from ksvd_sae.hub.layout import Manifest, check_repository, place
from ksvd_sae.methods.published.hub_files import hub_files
from ksvd_sae.store import MANIFEST, file_sha256

# The client itself waits for ever.
STALL_S = 60.0
_AGAIN = "run the same command again: what has arrived is not sent again"


def upload(
    folder: Path,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool = False,
    force: bool = False,
) -> str:
    """Bring a published folder to the Hub; the commit's address.

    Args:
        revision: the branch to commit to, made if it is not there; None is main.
        private: make the repository private, if it is made now; one that is there and public is refused.
        force: replace what an earlier upload put there, though it is something else.
    Raises: ManifestError (files that are not those of the manifest), HubError (not logged in, not allowed, changed
        meanwhile, other dictionaries there, no answer, ...).
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    what = f"uploading {folder} to {repo_id}"
    check_repository(repo_id, what)
    manifest = Manifest.read(place(folder, MANIFEST, what), what)
    for name in manifest.files:
        manifest.check(name, file_sha256(place(folder, name, what)), what, "publish again")
    api = HfApi(library_name="ksvd-sae", library_version=__version__)
    with _client_errors(what), _stalls_end():
        api.whoami()
        head, names = _repository(api, repo_id, revision, private, what)
        there = None
        if MANIFEST in names:
            top = hub_files(repo_id, "", (MANIFEST,), revision=head)
            # What nobody can read is nobody's to delete.
            with suppress(ManifestError) if force else nullcontext():
                there = Manifest.read(top.folder / MANIFEST, what)
        if not force:
            _check_there(there, names, manifest, what)
        gone = sorted((set(there.files) if there else set()) & names - manifest.files.keys())
        operations: list[Any] = [CommitOperationDelete(path_in_repo=name) for name in gone]
        operations += [CommitOperationAdd(name, folder / name) for name in (*manifest.files, MANIFEST)]
        message = f"ksvd-sae {__version__}: {', '.join(manifest.saes)}"
        done = api.create_commit(repo_id, operations, commit_message=message, revision=revision, parent_commit=head)
        return str(done.commit_url)


def _repository(api: Any, repo_id: str, revision: str | None, private: bool, what: str) -> tuple[str, set[str]]:
    """The commit to build on, and the names of its files; repository and branch are made if they are not there."""
    from huggingface_hub import errors

    try:
        info = api.repo_info(repo_id, revision=revision)
    except errors.RevisionNotFoundError:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.repo_info(repo_id, revision=revision)
    except errors.RepositoryNotFoundError:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.repo_info(repo_id, revision=revision)
    if private and not info.private:
        raise HubError(
            f"{what}: the repository is public, and --private was asked for",
            cure="make it private in its settings on the Hub, or leave --private out",
        )
    return str(info.sha), {sibling.rfilename for sibling in info.siblings or ()}


def _check_there(there: Manifest | None, names: set[str], manifest: Manifest, what: str) -> None:
    """Raise HubError where other dictionaries, or files of somebody else's, would be replaced."""
    cure = "publish into another repository, or replace it with --force (what was there stays in its history)"
    known = {} if there is None else there.saes
    if other := [f"{one} ({held})" for one, held in known.items() if manifest.saes.get(one) != held]:
        raise HubError(
            f"{what}: other dictionaries are there, which would be replaced",
            got=", ".join(other),
            limit=", ".join(f"{one} ({held})" for one, held in manifest.saes.items()),
            cause="another training, view or selection of dictionaries was published under this name",
            cure=cure,
        )
    if foreign := sorted(names & manifest.files.keys() - (there.files.keys() if there else set())):
        raise HubError(f"{what}: files are there that ksvd-sae did not write", got=", ".join(foreign[:8]), cure=cure)


@contextmanager
def _client_errors(what: str) -> Iterator[None]:
    """The client's errors as ours."""
    # The last two: what uploads, and answers that the client cannot read, end in.
    expected: tuple[type[Exception], ...] = (*client_errors(), RuntimeError, ValueError)
    try:
        yield
    except expected as error:
        if isinstance(error, KsvdSaeError):
            raise
        raise _as_ours(what, error) from error


def _as_ours(what: str, error: BaseException) -> HubError:
    from huggingface_hub import errors

    # A large file's error comes wrapped in one that names the file.
    while type(error) is RuntimeError and error.__cause__ is not None:
        what, error = f"{what}: {error}", error.__cause__
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    said = getattr(error, "server_message", None)
    if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        return HubError(
            f"{what}: not logged in",
            got=None if status is None else f"HTTP {status}",
            cause="no token, or one that is wrong or has run out",
            cure="`hf auth login`, or set HF_TOKEN; the token needs the right to write",
        )
    if status == 403:
        return HubError(
            f"{what}: not allowed",
            got=said or "HTTP 403",
            cause="a token that may only read, or somebody else's namespace",
            cure="make a token with the right to write at https://huggingface.co/settings/tokens",
        )
    if status == 404:
        return HubError(f"{what}: no such repository or branch", got=said or "HTTP 404", cure="look at its page")
    if status in (409, 412):
        return HubError(
            f"{what}: the repository was changed meanwhile, and nothing of this upload is in it",
            got=said or f"HTTP {status}",
            cause="another upload to the same branch",
            cure=_AGAIN,
        )
    if status == 429:
        wait = (getattr(response, "headers", None) or {}).get("Retry-After")
        return HubError(
            f"{what}: the Hub asks for a pause",
            got="HTTP 429",
            limit=f"again in {wait} s" if wait else None,
            cause="too many requests",
            cure=f"wait, then {_AGAIN}",
        )
    if status is not None:
        return HubError(f"{what}: the Hub failed", got=f"HTTP {status}{f': {said}' if said else ''}", cure=_AGAIN)
    if "Timeout" in type(error).__name__ or "timed out" in str(error):
        cause = "a slow or broken connection"
        return HubError(f"{what}: no answer", limit=f"{STALL_S:.0f} s", cause=cause, cure=_AGAIN)
    # Addresses of large files hold what lets anybody write them for a while.
    text = re.sub(r"\?\S+", "?...", str(error).splitlines()[0][:300]) if str(error) else ""
    return HubError(
        f"{what}: {type(error).__name__}: {text}",
        cause="a broken connection; `ksvd-sae doctor` says whether the Hub answers",
        cure=_AGAIN,
    )


@contextmanager
def _stalls_end() -> Iterator[None]:
    """Give the client's requests an end where it gives them none."""
    import huggingface_hub
    from huggingface_hub.utils import _http

    newer = hasattr(huggingface_hub, "set_client_factory")
    before = getattr(_http, "_GLOBAL_CLIENT_FACTORY" if newer else "_GLOBAL_BACKEND_FACTORY")
    put = getattr(huggingface_hub, "set_client_factory" if newer else "configure_http_backend")

    def patient() -> Any:
        client = before()
        if newer:
            client.timeout = STALL_S
        else:
            for prefix, adapter in list(client.adapters.items()):
                client.mount(prefix, _patient(adapter))
        return client

    put(patient)
    try:
        yield
    finally:
        put(before)


def _patient(adapter: Any) -> Any:
    from requests.adapters import BaseAdapter

    class Patient(BaseAdapter):
        def send(self, request: Any, *args: Any, **options: Any) -> Any:
            if options.get("timeout") is None:
                options["timeout"] = STALL_S
            return adapter.send(request, *args, **options)

        def close(self) -> None:
            adapter.close()

    return Patient()
