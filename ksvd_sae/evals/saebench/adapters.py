"""What SAEBench needs changed around it to run on our data. Each adapter says why it exists.

All are context managers that put everything back. Those of one eval alone lie beside them (absorption_adapters.py).
"""

import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_bench.evals.autointerp import main as autointerp
from sae_bench.evals.core import main as core
from sae_bench.evals.scr_and_tpp import main as scr
from sae_bench.sae_bench_utils import dataset_info, dataset_utils
from torch import Tensor
from transformer_lens import HookedTransformer

from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.autointerp.judging import Judging, autointerp_class, client_class, output_class
from ksvd_sae.evals.llm_cache import TensorCache, model_fingerprint, tokens_hash
from ksvd_sae.store import content_hash


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


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` inside: how SAEBench, which has no hooks, is changed without touching its files."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


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
def nan_stays_nan() -> Iterator[None]:
    """Keep core from writing −1 for NaN: −1 is a loss recovered that can happen, null is not."""
    original = core.replace_nans_with_negative_one
    core.replace_nans_with_negative_one = lambda value: value
    try:
        yield
    finally:
        core.replace_nans_with_negative_one = original


@contextmanager
def labelled_text_datasets(classes: dict[str, list[str]]) -> Iterator[None]:
    """Let sparse probing read data sets of text and integer label besides its own eight.

    SAEBench has a closed list of data sets. ag_news is one of text and integer labels; ours are read by the same
    function under their own names.

    Args: classes: data set name -> its labels, as strings.
    """
    known, original = dataset_info.chosen_classes_per_dataset, dataset_utils.get_multi_label_train_test_data

    def read(
        dataset_name: str, train_set_size: int, test_set_size: int, random_seed: int
    ) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        if dataset_name not in classes:
            return original(dataset_name, train_set_size, test_set_size, random_seed)
        return dataset_utils.get_ag_news_dataset(
            dataset_name, classes[dataset_name], train_set_size, test_set_size, random_seed
        )

    before = dict(known)
    known.update(classes)
    dataset_utils.get_multi_label_train_test_data = read
    try:
        yield
    finally:
        dataset_utils.get_multi_label_train_test_data = original
        known.clear()
        known.update(before)


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


@contextmanager
def bias_in_bios_datasets(professions: dict[str, dict[str, int]]) -> Iterator[None]:
    """Let SCR read data sets that are laid out as LabHC/bias_in_bios under their own names.

    SAEBench knows columns and labels of its two data sets only, and takes spurious correlations from names that hold
    'bias_in_bios'.

    Args: professions: data set name -> profession -> its number.
    """
    layouts, genders = dataset_info.dataset_metadata, scr.COLUMN2_VALS_LOOKUP
    before = dict(layouts), dict(genders)
    for name, numbers in professions.items():
        layouts[name] = {**layouts["LabHC/bias_in_bios"], "column1_mapping": numbers}
        genders[name] = genders["LabHC/bias_in_bios_class_set1"]
    try:
        yield
    finally:
        for known, was in zip((layouts, genders), before, strict=True):
            known.clear()
            known.update(was)


@contextmanager
def autointerp_judge(judging: Judging, seed: int) -> Iterator[None]:
    """Let ``judging`` answer what SAEBench would ask OpenAI, and count what it answers.

    SAEBench's autointerp asks gpt-4o-mini and nothing else, each question once: one rate limit, timeout or empty reply
    ends the eval with all answers lost, and a prediction that is no list of numbers drops its latent unseen. Its
    example of an answer differs from run to run, and its result does not say who judged.
    """
    replaced = {
        "OpenAI": client_class(judging),
        "AutoInterp": autointerp_class(judging, seed),
        "AutoInterpEvalOutput": output_class(judging),
    }
    before = {name: getattr(autointerp, name) for name in replaced}
    for name, value in replaced.items():
        setattr(autointerp, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(autointerp, name, value)


@contextmanager
def enough_text() -> Iterator[None]:
    """Say which data set is too short, and by how much: SAEBench's bare assertion names neither."""
    original = dataset_utils.load_and_tokenize_dataset

    def load(dataset_name: str, ctx_len: int, num_tokens: int, tokenizer: Any, *args: Any, **options: Any) -> Any:
        try:
            return original(dataset_name, ctx_len, num_tokens, tokenizer, *args, **options)
        except AssertionError as error:
            raise EvaluationError(
                f"autointerp: data set {dataset_name} has too little text",
                limit=f"total_tokens: {num_tokens:,}",
                cause="documents of 100 characters and less are left out",
                cure="lower evaluation.autointerp.total_tokens, or give more text",
            ) from error

    dataset_utils.load_and_tokenize_dataset = load
    try:
        yield
    finally:
        dataset_utils.load_and_tokenize_dataset = original


@contextmanager
def activations_kept(cache: TensorCache | None) -> Iterator[None]:
    """Answer SAEBench's ``run_with_cache(tokens, stop_at_layer=…, names_filter=hook)`` from ``cache``.

    Autointerp runs the model over the same tokens twice for every SAE, to count what fires and to collect examples. It
    reads the activations and not the model's output; calls of any other form go to the model.
    """
    original, fingerprints = HookedTransformer.run_with_cache, dict[int, str]()

    def run_with_cache(self: HookedTransformer, *args: Any, **options: Any) -> Any:
        hook = options.get("names_filter")
        plain = len(args) == 1 and set(options) == {"stop_at_layer", "names_filter"}
        if cache is None or not (plain and isinstance(args[0], Tensor) and isinstance(hook, str)):
            return original(self, *args, **options)
        tokens_BL = args[0]
        if id(self) not in fingerprints:
            # One model at a time: SAEBench has dropped the one before.
            fingerprints.clear()
            fingerprints[id(self)] = model_fingerprint(self)
        asked = {"hook": hook, "asked": "run_with_cache", "tokens": tokens_hash(tokens_BL)}
        key = content_hash({"model": fingerprints[id(self)], **asked})
        if (kept := cache.get(key, tokens_BL.device)) is not None:
            return None, kept
        output, activations = original(self, *args, **options)
        cache.put(key, {hook: activations[hook]})
        return output, activations

    HookedTransformer.run_with_cache = run_with_cache
    try:
        yield
    finally:
        HookedTransformer.run_with_cache = original
