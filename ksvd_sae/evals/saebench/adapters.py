"""Where SAEBench runs, its random states and errors, and activations with heads: what any of its evals needs around it.

All are context managers that put everything back, but for ``seed_all``, and ``heads_flattened``, which is for
``ksvd_sae.replaced``.
"""

import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from ksvd_sae.replaced import Changes


@contextmanager
def working_directory(folder: Path) -> Iterator[None]:
    """Run inside ``folder``.

    ``datasets.load_dataset("bbc-news")`` takes a local folder of that name under the working directory, so results
    carry the data's name rather than a path of this machine. And SAEBench stores the git commit of the working
    directory as its own version: outside any checkout it stores 'Unknown', which is true.
    """
    before, ceiling = Path.cwd(), os.environ.get("GIT_CEILING_DIRECTORIES")
    os.chdir(folder)
    # Where the cache lies inside a checkout, git would find that one.
    os.environ["GIT_CEILING_DIRECTORIES"] = str(folder.resolve().parent)
    try:
        yield
    finally:
        os.chdir(before)
        if ceiling is None:
            del os.environ["GIT_CEILING_DIRECTORIES"]
        else:
            os.environ["GIT_CEILING_DIRECTORIES"] = ceiling


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Put the random states of Python, numpy and torch back: an eval that is seeded must not seed what comes after."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def collected_errors(logger_name: str, messages: list[str]) -> Iterator[None]:
    """Append the error messages that a logger gets to ``messages``.

    SAEBench's core eval catches every exception and logs it: a failure would only be a missing file.
    """

    class _Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger(logger_name), _Keep(logging.ERROR)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def heads_flattened() -> Changes:
    """What is read at a hook, or put back there, is one row a token, also where the hook has heads."""
    add_hook = HookPoint.add_hook

    def add(self: HookPoint, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        def of_rows(activation: Tensor, hook: Any) -> Any:
            if activation.ndim <= 3:
                return function(activation, hook=hook)
            changed = function(activation.flatten(2), hook=hook)
            return None if changed is None else changed.reshape(activation.shape)

        add_hook(self, of_rows, *arguments, **options)

    return {"transformer_lens.hook_points.HookPoint.add_hook": add}
