"""How a test that runs a library's own code says that what is replaced there need not be replaced any more."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ksvd_sae.replaced import TABLE


def mended(*targets: str) -> str:
    """The message of a check that such a defect is still there."""
    assert set(targets) <= set(TABLE)
    return f"upstream has mended this: remove the replacement of {', '.join(targets)} (ksvd_sae/replaced.py)"


@contextmanager
def still_raises(error: type[Exception], match: str, *targets: str) -> Iterator[None]:
    """The block fails in the way for which the targets are replaced."""
    message = mended(*targets)
    try:
        yield
    except error as raised:
        if not re.search(match, str(raised)):
            raise
    else:
        pytest.fail(message)
