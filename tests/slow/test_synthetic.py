"""The paper's synthetic problem, several seeds: at least 90 % of the atoms in 4 of 5."""

import pytest

from tests import tolerances
from tests.learning.test_dbksvd import share_of_synthetic_atoms

pytestmark = pytest.mark.slow


def test_four_of_five_seeds() -> None:
    shares = [share_of_synthetic_atoms(seed) for seed in range(5)]
    assert sorted(shares)[1] >= tolerances.FOUND_SHARE_SYNTHETIC, shares
