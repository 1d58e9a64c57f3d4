"""Codes without a whole Gram matrix: above a share of the memory, and as they are with one."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ksvd_sae import device
from ksvd_sae.errors import ShapeError
from ksvd_sae.learning import gram, reference
from ksvd_sae.learning import products as products_module
from ksvd_sae.learning.backends import coder_backend
from ksvd_sae.learning.gram import GramRows, fits, gram_of
from ksvd_sae.learning.sparse_coding import Coder, encode
from tests import tolerances
from tests.learners import learner
from tests.strategies import generic

CPU = torch.device("cpu")
ORACLES: dict[tuple[Coder, bool], Callable[..., reference.Array]] = {
    ("mp", False): reference.matching_pursuit,
    ("mp", True): lambda *args: reference.matching_pursuit(*args, nonnegative=True),
    ("omp", False): reference.orthogonal_matching_pursuit,
    ("omp", True): reference.nonnegative_orthogonal_matching_pursuit,
    ("ormp", False): reference.order_recursive_matching_pursuit,
}


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine on which no Gram matrix of more than 15 atoms is held; how many rows each product had."""
    rows: list[int] = []
    whole = gram.products

    def products(rows_ND: Tensor, others_MD: Tensor) -> Tensor:
        rows.append(len(rows_ND))
        return whole(rows_ND, others_MD)

    monkeypatch.setattr(gram, "memory_bytes", lambda device: 4 * 4 * 15**2)
    for module in (gram, products_module):
        monkeypatch.setattr(module, "products", products)
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("coder", "nonnegative"), ORACLES)
def test_codes_are_the_references(
    coder: Coder, nonnegative: bool, dtype: torch.dtype, little_memory: list[int]
) -> None:
    problem = generic(7, 10, 40, 5).to(dtype)
    code = encode(problem.x_BD, problem.atoms_MD, 5, coder=coder, nonnegative=nonnegative)
    assert 0 < max(little_memory) <= 7, "no more rows at a time than there are samples"
    oracle = ORACLES[coder, nonnegative]
    pairs = zip(problem.x_BD.double().numpy(), code.to_dense(40).double().numpy(), strict=True)
    for x_D, z_M in pairs:
        wanted_M = oracle(x_D, problem.atoms_MD.double().numpy(), 5)
        assert np.array_equal(z_M != 0, wanted_M != 0)
        assert np.linalg.norm(z_M - wanted_M) <= tolerances.COEFFICIENT[dtype] * np.linalg.norm(x_D)


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("coder", ["mp", "mp_refit", "omp", "ormp"])
def test_codes_are_those_of_the_whole_matrix(coder: Coder, nonnegative: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if coder == "ormp" and nonnegative:
        return
    problem = generic(300, 24, 96, 8).to(torch.float32)
    whole = encode(problem.x_BD, problem.atoms_MD, 8, coder=coder, nonnegative=nonnegative).to_dense(96)
    monkeypatch.setattr(gram, "memory_bytes", lambda device: 1000)
    rows = encode(problem.x_BD, problem.atoms_MD, 8, coder=coder, nonnegative=nonnegative).to_dense(96)
    same_B = ((whole != 0) == (rows != 0)).all(dim=1)
    assert float(same_B.float().mean()) >= tolerances.SUPPORT_AGREEMENT_FLOAT32
    gap_B = (whole - rows).norm(dim=1) / problem.x_BD.norm(dim=1)
    assert float(gap_B[same_B].max()) < tolerances.COEFFICIENT[torch.float32]


def test_the_limit_is_a_quarter_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "memory_bytes", lambda device: 64 << 30)
    assert fits(65_536, CPU), "16 GiB of 64"
    assert not fits(65_537, CPU)
    assert not fits(65_536, CPU, torch.float64)
    assert coder_backend(CPU, n_atoms=65_536) == "numba"
    assert coder_backend(CPU, n_atoms=65_537) == "torch"
    with pytest.raises(ShapeError, match=r"'numba' cannot run: the Gram matrix of 65537 atoms is too large"):
        coder_backend(CPU, "numba", n_atoms=65_537)


def test_rows_are_the_matrix(little_memory: list[int]) -> None:
    atoms_MD = generic(1, 10, 40, 5).atoms_MD
    rows, whole_MM = gram_of(atoms_MD), atoms_MD @ atoms_MD.T
    assert isinstance(rows, GramRows)
    assert isinstance(gram_of(atoms_MD[:10]), Tensor), "10 atoms fit"
    picked_C, support_CK = torch.tensor([3, 39, 3, 0]), torch.tensor([[1, 5], [0, 39]])
    values_CK = torch.tensor([[2.0, -1.0], [0.0, 3.0]], dtype=torch.float64)
    assert torch.allclose(rows[picked_C], whole_MM[picked_C])
    assert little_memory[-1] == 3, "what several samples picked is made once"
    assert torch.allclose(rows.diagonal(), whole_MM.diagonal())
    assert torch.allclose(rows.among(support_CK), whole_MM[support_CK[:, :, None], support_CK[:, None, :]])
    wanted_CM = torch.einsum("ck,ckm->cm", values_CK, whole_MM[support_CK])
    assert torch.allclose(rows.combined(values_CK, support_CK), wanted_CM)


@pytest.mark.usefixtures("little_memory")
def test_learning_goes_on_without_it() -> None:
    problem = generic(600, 10, 40, 3).to(torch.float32)
    learned = learner(n_atoms=40, k=3, batch_samples=100, passes=2)
    learned.fit(problem.x_BD)
    code, y_BD = learned.encode(problem.x_BD), problem.x_BD - learned.centre_D
    assert float((y_BD - code.reconstruct(learned.atoms_MD)).norm() / y_BD.norm()) < 0.6


def test_memory_of_a_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "_GROUP_LIMIT", tmp_path / "none")
    of = device.memory_bytes.__wrapped__
    machine = of(CPU)
    assert machine > 1 << 28
    for text, wanted in (("max\n", machine), ("1000000\n", 1_000_000), (f"{2 * machine}\n", machine)):
        (tmp_path / "limit").write_text(text)
        monkeypatch.setattr(device, "_GROUP_LIMIT", tmp_path / "limit")
        assert of(CPU) == wanted
