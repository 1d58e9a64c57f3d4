"""A process of test_ranks.py: learns every case with the others, and rank 0 or the last writes what it has learned."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from ksvd_sae.learning import gram
from ksvd_sae.learning.coding import Coding
from ksvd_sae.learning.dbksvd import DictionaryLearner, LearnerOptions
from ksvd_sae.learning.weighting import weighting_by_std
from ksvd_sae.ranks import Ranks
from tests.strategies import planted

CODING = Coding(3)
# In place of where to stop: each process has samples of its own, of another number or another mean.
OWN_SAMPLES, OWN_MEAN = 20_000, 20_001


def samples(n: int, zeros: int = 0) -> Tensor:
    x_ND = planted(n, 16, 24, 3, noise=0.05).x_BD
    x_ND[len(x_ND) - zeros :] = 0
    return x_ND


def options(n_atoms: int = 24, coding: Coding = CODING, **changes: Any) -> LearnerOptions:
    return LearnerOptions(n_atoms, coding, **{"batch_samples": 401, "passes": 3, **changes})


# Numbers of samples that neither 2 nor 3 divides; the last batch of "few" has rows for the first process alone.
CASES: dict[str, Callable[[], tuple[Tensor, LearnerOptions]]] = {
    "one batch": lambda: (samples(1201), options(batch_samples=1201, passes=1)),
    "plain": lambda: (samples(1201), options()),
    "paper": lambda: (
        samples(1201),
        options(
            update="two_sweeps", init="random", centre=False, average=False, redraw="random", duplicate_cosine=None
        ),
    ),
    "matryoshka": lambda: (samples(1201), options(coding=Coding(4, groups=(8, 16)))),
    "weighted": lambda: (samples(1201), options(weighting=weighting_by_std(torch.linspace(0.5, 2, 16)))),
    "nonnegative": lambda: (samples(1201), options(coding=Coding(3, nonnegative=True), update="two_sweeps")),
    "kept apart": lambda: (samples(1201), options(coherence=0.5)),
    # Random atoms, of which some are far from all samples.
    "redrawn": lambda: (samples(1201), options(100, Coding(1), init="random", passes=4, redraw="data")),
    "redrawn from residuals": lambda: (samples(1201), options(100, Coding(1), init="random", passes=4)),
    "parts of the Gram matrix": lambda: (samples(1201), options(batch_samples=1201, passes=2, duplicate_cosine=0.8)),
    "parts of groups' Gram matrices": lambda: (samples(1201), options(coding=Coding(4, groups=(8, 16)))),
    "a rank with no data": lambda: (samples(41), options(n_atoms=8, batch_samples=2, init="random", passes=1)),
    "a rank of zeros": lambda: (samples(1201, zeros=500), options(batch_samples=1201, passes=2)),
    "tiny numbers": lambda: (samples(1201) * 1e-9, options()),
}


def main(rank: int, size: int, folder: Path, stop_after: int | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=size)
    try:
        ranks = Ranks.of_process_group()
        assert ranks == Ranks(rank, size)
        if stop_after is None:
            _learn_all(ranks, folder)
        elif stop_after == OWN_SAMPLES:
            DictionaryLearner(options(), device="cpu", ranks=ranks).fit(samples(1201 + (rank == 1)))
        elif stop_after == OWN_MEAN:
            DictionaryLearner(options(), device="cpu", ranks=ranks).fit(samples(1201) + (rank == 1))
        else:
            _stopped(ranks, folder, stop_after)
    finally:
        # Its threads would end the process with an error of their own.
        dist.destroy_process_group()


def _learn_all(ranks: Ranks, folder: Path) -> None:
    rank, size = ranks.rank, ranks.size
    for name, case in CASES.items():
        x_ND, chosen = case()
        # As between GPUs.
        gram._SENT_BETWEEN = {"cpu"} if name.startswith("parts of") else {"cuda"}
        log = folder / f"{name}.{size}.jsonl"
        learner = DictionaryLearner(chosen, device="cpu", ranks=ranks, log_path=log).fit(x_ND)
        if rank in (0, size - 1):
            state = learner.state
            assert state is not None
            kept = {"atoms": learner.atoms_MD, "centre": learner.centre_D, "generator": state.generator.get_state()}
            save_file({key: value.contiguous() for key, value in kept.items()}, folder / f"{name}.{size}.{rank}")


def _stopped(ranks: Ranks, folder: Path, stop_after: int) -> None:
    """The case "plain" with a checkpoint after every batch; stops, or goes on if there is one."""
    x_ND, chosen = CASES["plain"]()

    def look(line: Any) -> None:
        if line.batch + 1 == stop_after:
            raise KeyboardInterrupt

    learner = DictionaryLearner(
        chosen,
        device="cpu",
        ranks=ranks,
        log_path=folder / "log.jsonl",
        checkpoint_path=folder / "checkpoint",
        checkpoint_every=1,
        on_batch=look,
    )
    try:
        learner.fit(x_ND, resume=True)
    except KeyboardInterrupt:
        return
    if ranks.rank == 0:
        save_file({"atoms": learner.atoms_MD.contiguous()}, folder / "atoms")
        (folder / "done").write_text(json.dumps(learner.samples_seen))


if __name__ == "__main__":
    rank, size, folder, stop_after = sys.argv[1:]
    main(int(rank), int(size), Path(folder), int(stop_after) if int(stop_after) >= 0 else None)
