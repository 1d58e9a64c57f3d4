"""What training on CUDA must do: the kernels that pass over a batch, and a whole batch of training with its waits.

Like pursuit_cases.py: on a GPU, and on the CPU in a process in which Triton interprets.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from ksvd_sae.errors import ActivationError
from ksvd_sae.learning import atom_update, backends, products
from ksvd_sae.learning.atom_update import sweep, sweep_sums
from ksvd_sae.learning.code import Code
from ksvd_sae.learning.coding import Coding
from ksvd_sae.learning.fvu import variance
from ksvd_sae.learning.kernels import batch_triton
from ksvd_sae.learning.sparse_coding import matching_pursuit
from ksvd_sae.learning.training import LearnerOptions, checked_batch, learn_batch
from tests import tolerances
from tests.strategies import generator, generic, planted

FLOAT32 = torch.float32
# What makes the host wait for the device: it asks for a number, or for as many rows as some condition holds for.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "bincount")


class WaitCounter(TorchDispatchMode):
    """Counts operations after which the host has waited for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> "WaitCounter":
        # On the CPU it reads memory without an operation that the mode could see.
        self._patch = pytest.MonkeyPatch()
        plain = Tensor.tolist
        self._patch.setattr(Tensor, "tolist", lambda tensor: self.counts.update(tolist=1) or plain(tensor))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._patch.undo()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        by_condition = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for index in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else [])
        )
        sizes_unknown = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if name.startswith(WAITS) or by_condition or sizes_unknown:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def as_on_cuda(device: torch.device) -> Iterator[None]:
    """On the CPU, the way that training takes on CUDA: Triton's kernels, products by bfloat16 ones, nothing looked at.

    ``device.type`` is all that it is chosen by, and a CPU tensor cannot say that it is another.
    """
    if device.type == "cuda":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "on_gpu", lambda _: True)
        patch.setattr(atom_update, "has_bfloat16", lambda _: True)
        patch.setattr(products, "has_bfloat16", lambda _: True)
        yield


class BatchCases:
    device = torch.device("cpu")

    @pytest.mark.parametrize("shape", [(1, 1), (5, 3), (33, 130), (16, 128), (70, 257)], ids=str)
    def test_statistics(self, shape: tuple[int, int]) -> None:
        x_BD = (torch.randn(shape, generator=generator(0)) * 3 + 40).to(self.device)
        energy_B, numbers = batch_triton.statistics(x_BD)
        largest, spread, energy = numbers.tolist()
        wide_BD = x_BD.double()
        assert torch.allclose(energy_B.double(), wide_BD.square().sum(dim=1), rtol=1e-6)
        assert largest == float(x_BD.abs().max())
        assert energy == pytest.approx(float(wide_BD.square().sum()), rel=1e-6)
        wanted = float((wide_BD - wide_BD.mean(dim=0)).square().sum())
        assert spread == pytest.approx(wanted, rel=tolerances.LOGGED_FVU, abs=1e-9)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_statistics_of_what_is_no_number(self, bad: float) -> None:
        x_BD = torch.ones(20, 9, device=self.device)
        x_BD[17, 4] = bad
        _, numbers = batch_triton.statistics(x_BD)
        assert not torch.isfinite(numbers[2])

    @pytest.mark.parametrize(("n", "d_in", "n_atoms", "k"), [(3, 300, 600, 5), (2, 256, 512, 8), (4, 7, 9, 1)])
    @pytest.mark.parametrize("dtype", [FLOAT32, torch.bfloat16], ids=str)
    def test_leave(self, n: int, d_in: int, n_atoms: int, k: int, dtype: torch.dtype) -> None:
        problem = generic(n, d_in, n_atoms, k, seed=3).to(FLOAT32)
        code = matching_pursuit(problem.x_BD, problem.atoms_MD, k)
        # A slot that is not used points at atom 0, which another slot may use.
        code.values_BK[0, -1], code.support_BK[0, -1] = 0, 0
        x_BD, atoms_MD = problem.x_BD.to(self.device), problem.atoms_MD.to(self.device)
        values_BK, support_BK = code.values_BK.to(self.device), code.support_BK.to(self.device)
        residual_BD = torch.full_like(x_BD, 7, dtype=dtype)
        dense_BM = torch.full((n, n_atoms), 7, dtype=dtype, device=self.device)
        energy_B = batch_triton.leave(x_BD, atoms_MD, values_BK, support_BK, residual_BD, dense_BM)
        wide_BM = code.to_dense(n_atoms).double()
        wanted_BD = problem.x_BD.double() - wide_BM @ problem.atoms_MD.double()
        limit = tolerances.UPDATE_ERROR[FLOAT32] if dtype == FLOAT32 else tolerances.BFLOAT16
        assert (residual_BD.cpu().double() - wanted_BD).abs().max() <= limit * problem.x_BD.norm(dim=1).max()
        assert (dense_BM.cpu().double() - wide_BM).abs().max() <= limit * code.values_BK.abs().max()
        assert ((dense_BM.cpu() != 0) == (wide_BM != 0)).all()
        assert torch.allclose(energy_B.cpu().double(), wanted_BD.square().sum(dim=1), rtol=1e-5)

    def test_a_sweep(self) -> None:
        """From products of codes that are written out in bfloat16, against float64 that gathers."""
        problem = planted(60, 20, 30, 3, noise=0.1)
        atoms_MD = normalize(problem.x_BD[:30], dim=1)
        code = matching_pursuit(problem.x_BD, atoms_MD, 3)
        wide = Code(code.values_BK.double(), code.support_BK)
        wanted = sweep(atoms_MD.double(), sweep_sums(problem.x_BD.double(), wide, atoms_MD.double())[1])
        there = Code(code.values_BK.to(self.device), code.support_BK.to(self.device))
        with as_on_cuda(self.device):
            _, sums = sweep_sums(problem.x_BD.to(self.device), there, atoms_MD.to(self.device))
            got = sweep(atoms_MD.to(self.device), sums)
        assert sums.usage_M.tolist() == code.usage(30).tolist()
        assert (got.atoms_MD.cpu() - wanted.atoms_MD).norm(dim=1).max() < tolerances.BFLOAT16
        assert float(got.error) == pytest.approx(float(wanted.error), rel=tolerances.BFLOAT16)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"redraw": "data"},
            {"redraw": "random"},
            {"redraw": "none", "coherence": 0.6},
            {"precision": "bfloat16"},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("groups", [None, (6, 10)], ids=["plain", "groups"])
    def test_a_batch_and_its_waits(self, options: dict[str, Any], groups: tuple[int, ...] | None) -> None:
        """One wait after the look at the samples, and one at the end, for the log."""
        problem = planted(40, 12, 16, 2, noise=0.1)
        # Near samples, but not samples: those would leave nothing but rounding to a second group.
        atoms_MD = normalize(problem.x_BD[:16] + 0.3 * torch.randn(16, 12, generator=generator(2)), dim=1)
        # Of no use: an atom that nearly repeats another, and those that nobody picks.
        atoms_MD[3] = normalize(atoms_MD[2] + 0.3 * atoms_MD[9], dim=0)
        chosen = LearnerOptions(16, Coding(2, groups=groups, coder="mp"), duplicate_cosine=0.75, **options)
        x_BD, idle_M = problem.x_BD.to(self.device), torch.zeros(16, dtype=torch.float64, device=self.device)
        first, counter = generator(0), WaitCounter()
        with as_on_cuda(self.device), counter:
            step = learn_batch(checked_batch(x_BD), atoms_MD.to(self.device), idle_M, chosen, first)
        assert counter.counts == {"tolist": 2}
        host = learn_batch(checked_batch(problem.x_BD), atoms_MD, torch.zeros(16).double(), chosen, generator(0))
        assert step.errors == pytest.approx(host.errors, rel=tolerances.BFLOAT16)
        assert step.error_after == pytest.approx(host.error_after, rel=tolerances.BFLOAT16)
        assert (step.dead, step.duplicates, step.redrawn) == (host.dead, host.duplicates, host.redrawn)
        assert groups or step.duplicates >= 1
        assert torch.equal(step.fresh_M.cpu(), host.fresh_M)
        kept_M = ~host.fresh_M
        assert (step.atoms_MD.cpu() - host.atoms_MD)[kept_M].norm(dim=1).max() < 2 * tolerances.BFLOAT16

    @pytest.mark.parametrize("scale", [1e-30, 1e-9, 1.0, 1e9, 1e16])
    def test_samples_of_any_scale(self, scale: float) -> None:
        x_BD = (torch.randn(20, 6, generator=generator(1)) * scale).to(self.device)
        with as_on_cuda(self.device):
            batch = checked_batch(x_BD)
        assert 1e-6 < float(batch.x_BD.abs().max()) < 1e6
        assert batch.variance == pytest.approx(variance(batch.x_BD, "test"), rel=tolerances.LOGGED_FVU)
        assert batch.energy_B is not None
        assert torch.allclose(batch.energy_B, batch.x_BD.square().sum(dim=1), rtol=1e-5)

    def test_samples_that_training_refuses(self) -> None:
        constant_BD, bad_BD = torch.full((30, 5), 3.7), torch.ones(30, 5)
        bad_BD[4, 2] = float("nan")
        with as_on_cuda(self.device):
            for x_BD, words in ((constant_BD, "all samples given are the same"), (bad_BD, "hold NaN or infinity")):
                with pytest.raises(ActivationError, match=words):
                    checked_batch(x_BD.to(self.device))


class TestInterpreted(BatchCases):
    @pytest.fixture(autouse=True)
    def interpreter(self) -> None:
        reason = batch_triton.why_not(self.device, FLOAT32)
        assert reason is None, f"set TRITON_INTERPRET=1 to run this file on its own: {reason}"


def test_the_counter_counts() -> None:
    x_BD = torch.rand(4, 3)
    with WaitCounter() as counter:
        _ = x_BD[x_BD[:, 0] > 2], float(x_BD.sum()), x_BD.sum().tolist(), (x_BD > 0).nonzero(), x_BD[[0, 1]], x_BD + 1
    assert counter.counts == {"index": 1, "_local_scalar_dense": 1, "tolist": 1, "nonzero": 1}
