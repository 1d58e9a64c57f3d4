"""The Triton kernels three ways: interpreted on the CPU, compiled for an H100 without one, and run on a GPU."""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ksvd_sae.errors import ShapeError
from ksvd_sae.learning.kernels import batch_triton, pursuit_triton, pursuit_triton_jit
from ksvd_sae.learning.sparse_coding import Choice, Code, matching_pursuit, orthogonal_matching_pursuit
from tests import tolerances
from tests.learning import batch_cases, pursuit_cases
from tests.strategies import Problem, generic

ROOT = Path(__file__).resolve().parents[2]
# What one program may have on sm_90.
SHARED_BYTES = 227 << 10
REGISTERS = 65536


@pytest.mark.parametrize("cases", ["pursuit_cases.py", "batch_cases.py"])
def test_interpreted(cases: str) -> None:
    """All of them, in a process in which Triton interprets."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"tests/learning/{cases}"]
    child = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=500
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert re.search(r"^\d+ passed in", child.stdout, re.MULTILINE), child.stdout


class TestWhyNot:
    def test_no_gpu_and_no_interpreter(self) -> None:
        assert "not on cpu" in str(pursuit_triton.why_not(torch.device("cpu"), 100, 5))
        x = torch.zeros(2, 6)
        support = torch.zeros(2, 3, dtype=torch.int32)
        with pytest.raises(ShapeError, match="runs on CUDA devices, not on cpu"):
            pursuit_triton.pursue(x, x[:, 0], x[:, 0], torch.eye(6), 3, 12, 0.0, False, x[:, :3], support, x[:, :3])

    def test_sizes(self) -> None:
        cuda = torch.device("cuda")
        assert pursuit_triton.why_not(cuda, 100_000, 1000) is None
        assert pursuit_triton.why_not(cuda, 100_000, 128, orthogonal=True) is None
        assert "up to 128, not 129" in str(pursuit_triton.why_not(cuda, 100_000, 129, orthogonal=True))
        assert "numbers atoms" in str(pursuit_triton.why_not(cuda, 2**31, 5))

    def test_nonnegative_omp_says_why(self) -> None:
        x = torch.zeros(2, 6)
        with pytest.raises(ShapeError, match="take an atom out"):
            pursuit_triton.pursue_orthogonally(
                x, x[:, 0], x[:, 0], torch.eye(6), 3, 0.0, True, False, x[:, :3], torch.zeros(2, 3, dtype=torch.int32)
            )

    def test_without_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.delitem(sys.modules, pursuit_triton_jit.__name__)
        spec = importlib.util.spec_from_file_location("without_triton", pursuit_triton.__file__)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.why_not(torch.device("cuda"), 100, 5) == "triton is not installed"


class TestLaunches:
    """What bench/gpu.py found best on a device is taken there, and only there."""

    @pytest.fixture(autouse=True)
    def some_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        best = {"Some GPU": {"4096 float16": {"num_warps": 4, "maxnreg": 96}}}
        monkeypatch.setattr(pursuit_triton, "_launches", lambda: best)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")

    def test_where_it_was_tried(self) -> None:
        cuda = torch.device("cuda")
        taken = pursuit_triton.launch(4000, 20, device=cuda, gram_dtype=torch.float16)
        assert (taken["num_warps"], taken["maxnreg"], taken["BLOCK_M"]) == (4, 96, 4096)

    @pytest.mark.parametrize(
        ("n_atoms", "device", "dtype"),
        [(4096, "cuda", torch.float32), (2048, "cuda", torch.float16), (4096, "cpu", torch.float16)],
    )
    def test_elsewhere(self, n_atoms: int, device: str, dtype: torch.dtype) -> None:
        taken = pursuit_triton.launch(n_atoms, 20, device=torch.device(device), gram_dtype=dtype)
        assert "maxnreg" not in taken
        assert taken["num_warps"] == taken["BLOCK_M"] // 512

    def test_what_is_tried_wins(self) -> None:
        with pursuit_triton.launched_as({"num_warps": 2}):
            taken = pursuit_triton.launch(4096, 20, device=torch.device("cuda"), gram_dtype=torch.float16)
        assert taken["num_warps"] == 2
        assert "maxnreg" not in taken
        assert pursuit_triton.launch(4096, 20)["num_warps"] == 8

    def test_the_file_is_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        assert isinstance(pursuit_triton._launches(), dict)


@dataclass
class Compiled:
    """What the compiler made of a kernel."""

    cubin: bytes
    ptx: str
    shared_bytes: int
    threads: int
    registers: int
    local_bytes: int


INTEGERS = ("n_atoms", "k", "max_steps", "n", "d")
OPTIONS = ("num_warps", "enable_fp_fusion", "maxnreg")


def compiled(kernel: Any, sizes: dict[str, int], launch: dict[str, Any], folder: Path, **pointers: str) -> Compiled:
    """Compile for an H100 as a launch with these sizes would: 16-byte aligned pointers, sizes of 1 constant.

    Args: pointers: types of those that are not float32, as gram="fp16".
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: value for name, value in launch.items() if name in OPTIONS}
    constants = {name: value for name, value in launch.items() if name not in options}
    constants |= {name: 1 for name, size in sizes.items() if size == 1}
    types = {f"{name}_ptr": f"*{kind}" for name, kind in {"support": "i32", **pointers}.items()}
    types |= dict.fromkeys(INTEGERS, "i32")
    signature, aligned = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = types.get(name, "*fp32" if name.endswith("_ptr") else "fp32")
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr") or sizes.get(name, 1) % 16 == 0:
            aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    path = folder / "kernel.cubin"
    path.write_bytes(made.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    threads = 32 * options["num_warps"]
    return Compiled(made.asm["cubin"], made.asm["ptx"], made.metadata.shared, threads, registers, stack + local)


class TestCompiledForH100:
    """Without a GPU: it compiles, fits one SM, spills nothing (or next to nothing), and loads wide."""

    @pytest.fixture(autouse=True)
    def fresh_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))

    def assert_fits(self, made: Compiled, spilled_bytes: int = 0) -> None:
        assert made.cubin.startswith(b"\x7fELF")
        assert made.shared_bytes <= SHARED_BYTES
        # Registers are given out in eights.
        assert -(-made.registers // 8) * 8 * made.threads <= REGISTERS
        assert made.local_bytes <= spilled_bytes

    @pytest.mark.parametrize("gram", ["fp32", "fp16"])
    @pytest.mark.parametrize(("n_atoms", "k"), [(4096, 32), (16384, 80), (65536, 80)])
    def test_matching_pursuit(self, n_atoms: int, k: int, gram: str, tmp_path: Path) -> None:
        sizes, launch = {"n_atoms": n_atoms}, pursuit_triton.launch(n_atoms, k) | {"NONNEGATIVE": False}
        made = compiled(pursuit_triton_jit.pursue_sample, sizes, launch, tmp_path, gram=gram)
        # Above 8,192 atoms constants are read again in every step, but no product is put aside.
        self.assert_fits(made, spilled_bytes=200 if n_atoms == 16384 else 0)
        # So many programs an SM hide each other's waits.
        programs = {4096: 4, 16384: 2, 65536: 4}[n_atoms]
        assert programs * made.threads * -(-made.registers // 8) * 8 <= REGISTERS
        assert programs * made.shared_bytes <= SHARED_BYTES
        assert re.search(r"ld\.global\S*\.v4\.b32", made.ptx), "16 bytes a load"
        assert "fma.rn.f32" in made.ptx

    @pytest.mark.parametrize(
        ("n_atoms", "k", "gram", "spilled_bytes"),
        # What spills lies outside the loop over Gram rows: a few bytes a step.
        [(4096, 32, "fp32", 0), (4096, 32, "fp16", 32), (16384, 80, "fp32", 0), (16384, 80, "fp16", 32)],
    )
    @pytest.mark.parametrize("by_error", [False, True], ids=["omp", "ormp"])
    def test_orthogonal(
        self, n_atoms: int, k: int, gram: str, spilled_bytes: int, by_error: bool, tmp_path: Path
    ) -> None:
        sizes, launch = {"n_atoms": n_atoms}, pursuit_triton.launch_orthogonal(n_atoms, k) | {"BY_ERROR": by_error}
        made = compiled(pursuit_triton_jit.pursue_sample_orthogonally, sizes, launch, tmp_path, gram=gram)
        self.assert_fits(made, spilled_bytes)

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    @pytest.mark.parametrize(("n_atoms", "k"), [(4096, 20), (16384, 80)])
    def test_leave(self, n_atoms: int, k: int, dtype: str, tmp_path: Path) -> None:
        sizes = {"d": 2304, "n_atoms": n_atoms}
        launch = batch_triton.launch_leave(k) | {"DENSE": True}
        made = compiled(batch_triton.leave_row, sizes, launch, tmp_path, residual=dtype, dense=dtype)
        self.assert_fits(made)
        assert made.registers <= 40, "24 programs of two warps an SM"
        assert len(re.findall(r"ld\.global\S*\.v4\.b32", made.ptx)) >= 5, "a sample and four atoms, 16 bytes a load"

    def test_statistics(self, tmp_path: Path) -> None:
        launch = batch_triton.LAUNCH_STATISTICS
        made = compiled(batch_triton.sum_rows, {"n": 65536, "d": 2304}, launch, tmp_path)
        self.assert_fits(made)
        assert made.registers <= 128, "four programs an SM, each with 64 bytes a thread on their way"
        assert len(re.findall(r"ld\.global\S*\.v4\.b32", made.ptx)) >= 4

    @pytest.mark.parametrize("n_atoms", [1, 61])
    def test_odd_sizes(self, n_atoms: int, tmp_path: Path) -> None:
        sizes = {"n_atoms": n_atoms}
        for nonnegative in (False, True):
            launch = pursuit_triton.launch(n_atoms, 1) | {"NONNEGATIVE": nonnegative}
            self.assert_fits(compiled(pursuit_triton_jit.pursue_sample, sizes, launch, tmp_path))
        launch = pursuit_triton.launch(n_atoms, 1, registers_m=0) | {"NONNEGATIVE": True, "BLOCK_M": 32}
        self.assert_fits(compiled(pursuit_triton_jit.pursue_sample, sizes, launch, tmp_path))
        for by_error in (False, True):
            launch = pursuit_triton.launch_orthogonal(n_atoms, 1) | {"BY_ERROR": by_error}
            self.assert_fits(compiled(pursuit_triton_jit.pursue_sample_orthogonally, sizes, launch, tmp_path))


@pytest.mark.gpu
class TestOnGpu(pursuit_cases.PursuitCases):
    device = torch.device("cuda")

    @pytest.fixture(autouse=True)
    def gpu(self) -> None:
        assert torch.cuda.is_available(), "these tests were asked for (-m gpu) on a machine without a GPU"


@pytest.mark.gpu
class TestTrainingOnGpu(batch_cases.BatchCases):
    device = torch.device("cuda")

    @pytest.fixture(autouse=True)
    def gpu(self) -> None:
        assert torch.cuda.is_available(), "these tests were asked for (-m gpu) on a machine without a GPU"


@pytest.mark.gpu
class TestOnGpuAtSize:
    """Sizes that the interpreter is too slow for, against the torch coders on the same GPU."""

    @pytest.fixture(autouse=True)
    def gpu(self) -> None:
        assert torch.cuda.is_available(), "these tests were asked for (-m gpu) on a machine without a GPU"

    def assert_as_good(self, problem: Problem, kind: str) -> None:
        cuda = torch.device("cuda")
        mine = pursuit_cases.code(problem, cuda, kind).code
        x_BD, atoms_MD = problem.x_BD.to(cuda), problem.atoms_MD.to(cuda)
        if kind != "mp":
            choice: Choice = "error" if kind == "ormp" else "product"
            other = orthogonal_matching_pursuit(x_BD, atoms_MD, problem.k, choice=choice, backend="torch")
        else:
            other = matching_pursuit(x_BD, atoms_MD, problem.k, backend="torch")
        mine_there = Code(mine.values_BK.to(cuda), mine.support_BK.to(cuda))
        errors = [(x_BD.double() - code.reconstruct(atoms_MD.double())).norm(dim=1) for code in (mine_there, other)]
        same_B = (mine.support_BK.sort(dim=1)[0] == other.support_BK.cpu().sort(dim=1)[0]).all(dim=1)
        assert float(same_B.float().mean()) >= tolerances.SUPPORT_AGREEMENT_FLOAT32
        gap_B = ((errors[0] - errors[1]).abs() / x_BD.double().norm(dim=1)).cpu()
        assert (gap_B[same_B] <= tolerances.CODE_ERROR[torch.float32]).all()

    @pytest.mark.parametrize(("d_in", "n_atoms", "k"), [(512, 4096, 32), (768, 16384, 80), (512, 20_000, 20)])
    def test_matching_pursuit(self, d_in: int, n_atoms: int, k: int) -> None:
        self.assert_as_good(generic(2000, d_in, n_atoms, k, seed=1).to(torch.float32), "mp")

    @pytest.mark.parametrize(("d_in", "n_atoms", "k"), [(512, 4096, 32), (512, 5000, 100)])
    @pytest.mark.parametrize("kind", ["omp", "ormp"])
    def test_orthogonal(self, d_in: int, n_atoms: int, k: int, kind: str) -> None:
        self.assert_as_good(generic(500, d_in, n_atoms, k, seed=2).to(torch.float32), kind)

    @pytest.mark.parametrize("kind", ["mp", "omp", "ormp"])
    def test_offsets_above_32_bits(self, kind: str) -> None:
        # 8.1 GiB of products: the last sample starts past entry 2^31.
        few = generic(64, 16, 2048, 3, seed=3).to(torch.float32)
        repeats = 2**31 // (2048 * 64) + 1
        many = Problem(few.x_BD.repeat(repeats, 1), few.atoms_MD, 3)
        first = pursuit_cases.code(few, torch.device("cuda"), kind).code
        last = pursuit_cases.code(many, torch.device("cuda"), kind).code
        assert torch.equal(last.support_BK[-64:], first.support_BK)
        assert torch.allclose(last.values_BK[-64:], first.values_BK, rtol=1e-5, atol=1e-6)
