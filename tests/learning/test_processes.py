"""Kernels in processes of other kinds: forked ones, and those that have no place for compiled code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
START = """
import multiprocessing, sys
import torch
from ksvd_sae.learning.coding import Coding
from ksvd_sae.learning.dbksvd import DictionaryLearner, LearnerOptions
from ksvd_sae.learning.sparse_coding import encode

x_ND = torch.randn(400, 12, generator=torch.Generator().manual_seed(0))

def learned(seed=0):
    return DictionaryLearner(LearnerOptions(24, Coding(3), seed=seed), device="cpu").fit(x_ND)

def codes(atoms_MD):
    kinds = [("mp", False), ("mp_refit", False), ("omp", False), ("ormp", False), ("omp", True), ("mp_refit", True)]
    return [encode(x_ND[:50], atoms_MD, 3, coder=coder, nonnegative=sign).to_dense(24) for coder, sign in kinds]

"""
FORK = (
    START
    + """
learner = learned()
wanted = [learner.atoms_MD, *codes(learner.atoms_MD)]

def work(queue):
    torch.set_num_threads(1)
    mine = learned()
    queue.put([tensor.numpy() for tensor in (mine.atoms_MD, *codes(mine.atoms_MD))])

def in_child(context):
    queue = context.Queue()
    child = context.Process(target=work, args=(queue,))
    child.start()
    got = queue.get(timeout=200)
    child.join()
    assert child.exitcode == 0, child.exitcode
    return got

# Twice: a child of the parent that goes on, and another after that.
for _ in range(2):
    for a, b in zip(wanted, in_child(multiprocessing.get_context("fork")), strict=True):
        assert torch.allclose(a, torch.from_numpy(b), atol=1e-5)
    assert torch.equal(learned().atoms_MD, wanted[0])
print("same")
"""
)
LOADER = (
    START
    + """
from torch.utils.data import DataLoader, TensorDataset

learner = learned()
wanted = learner.encode(x_ND).to_dense(24)

def coded(rows):
    return learner.encode(torch.stack([row for (row,) in rows])).to_dense(24)

options = {"num_workers": 2, "multiprocessing_context": "fork"}
loader = DataLoader(TensorDataset(x_ND), batch_size=100, collate_fn=coded, **options)
assert torch.allclose(torch.cat(list(loader)), wanted, atol=1e-5)
print("same")
"""
)
NO_PLACE = (
    """
import numba.core.caching
numba.core.caching.CacheImpl._locator_classes = []
"""
    + START
    + """
learner = learned()
codes(learner.atoms_MD)
print("same")
"""
)


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("script", [FORK, LOADER], ids=["multiprocessing", "DataLoader"])
def test_a_forked_process_codes_and_learns(script: str) -> None:
    done = run(script)
    assert done.stdout.strip() == "same", done.stdout + done.stderr
    assert "GNU OpenMP" not in done.stderr


def test_no_place_for_compiled_code() -> None:
    """A package folder that cannot be written, and a home that is not there: numba finds no place at all."""
    done = run(NO_PLACE, HOME="/nonexistent")
    assert done.stdout.strip() == "same", done.stdout + done.stderr
    assert done.stderr.count("set NUMBA_CACHE_DIR") == 1
