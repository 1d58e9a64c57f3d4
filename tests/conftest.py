"""What every test needs before it starts."""

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from ksvd_sae.activations.shards import ActivationShards
from tests.tiny_shards import raw_activations, write_harvest

# Without a home that can be written, libraries have no place for what they keep: numba, where the package cannot be
# written either, would compile in each process of each test. Before they are imported.
if not os.access(os.path.expanduser("~"), os.W_OK):
    _HOME = tempfile.TemporaryDirectory(prefix="home-")
    os.environ["HOME"] = _HOME.name

# derandomize: the same examples on every run, so a red test stays red until the code changes.
settings.register_profile("ksvd_sae", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("ksvd_sae")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", action="store_true", help="write the counts to results/reliability.json")


@pytest.fixture(autouse=True)
def gradients_stay_on() -> Iterator[None]:
    """SAEBench switches gradients off for the whole process; a test that lets it would fail others."""
    yield
    left = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert left, "gradients are off after this test"


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ActivationShards:
    """2,000 training and 500 held-out samples of one planted dictionary; read only."""
    x_ND = raw_activations(2500)
    return write_harvest(tmp_path_factory.mktemp("harvest"), {"made": "by hand"}, x_ND[:2000], x_ND[2000:])
