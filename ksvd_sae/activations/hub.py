"""What went wrong on the Hugging Face Hub, said with what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager

from ksvd_sae.errors import HubError


def client_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub's client raises: its own errors and, from 1.0 on no OSErrors, those of its HTTP library."""
    from huggingface_hub import errors

    return OSError, errors.HfHubHTTPError.__mro__[1]


@contextmanager
def hub_errors(repo_id: str, file: str, revision: str | None) -> Iterator[None]:
    """Errors of huggingface_hub inside become HubErrors.

    Args: file: what is read of the repository; '' is all of it.
    """
    from huggingface_hub import errors

    of = f"{file} of {repo_id}" if file else repo_id
    what = f"reading {of}{f' at {revision}' if revision else ''} from the Hugging Face Hub"
    page = f"https://huggingface.co/{repo_id}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"{what}: the repository is gated", cure=f"accept its terms at {page}, then run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{what}: no such repository",
            cause="a misspelt name, or a private repository that this machine's token cannot see",
            cure=f"look at {page}",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{what}: no such revision", got=revision, cure=f"give a commit, branch or tag of {page}/commits/main"
        ) from error
    # Not in the cache and not to be asked for: a subclass of EntryNotFoundError.
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise HubError(
            f"{what}: not in the Hub's cache, and the Hub cannot be asked",
            cause="no connection, or HF_HUB_OFFLINE is set",
            cure=f"connect, unset HF_HUB_OFFLINE, or run `{' '.join(filter(None, ('hf download', repo_id, file)))}` "
            "where there is a connection and copy the cache",
        ) from error
    except errors.EntryNotFoundError as error:
        raise HubError(
            f"{what}: no such file", cure=f"look for its folder at {page}/tree/{revision or 'main'}"
        ) from error
    except errors.HFValidationError as error:
        raise HubError(f"{what}: no name of a repository ({error})", cure="owner/name") from error
    except client_errors() as error:
        raise HubError(f"{what}: {error}", cure="try again; `ksvd-sae doctor` says whether the Hub answers") from error
