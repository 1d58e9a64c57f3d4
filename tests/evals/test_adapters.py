"""What stands around SAEBench is there inside, and is gone afterwards, also after an exception."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import datasets
import pytest
import torch
from sae_bench.sae_bench_utils import dataset_info, dataset_utils, get_sae_bench_version

from ksvd_sae.evals.autointerp.adapters import activations_kept
from ksvd_sae.evals.llm_cache import TensorCache
from ksvd_sae.evals.saebench.adapters import collected_errors, working_directory
from ksvd_sae.evals.sparse_probing.adapters import labelled_text_datasets
from ksvd_sae.replaced import replaced
from tests.evals.conftest import CLASSES, COMMIT
from tests.tiny_saes import COLOURS, HOOK, METALS, tiny_model

LABELS = {CLASSES: ["0", "1", "2"]}


class BoomError(Exception):
    pass


def fails(inside: AbstractContextManager[object]) -> None:
    with inside:
        raise BoomError


# ---------------------------------------------------------------- working_directory


def test_working_directory(tmp_path: Path) -> None:
    before = Path.cwd()
    with working_directory(tmp_path):
        assert Path.cwd() == tmp_path.resolve()
    assert Path.cwd() == before


def test_working_directory_after_an_exception(tmp_path: Path) -> None:
    before = Path.cwd()
    with pytest.raises(BoomError):
        fails(working_directory(tmp_path))
    assert Path.cwd() == before


@pytest.mark.parametrize("place", ["outside", "checkout/cache"])
def test_saebench_does_not_take_the_callers_commit_for_its_version(checkout: Path, place: str) -> None:
    """The cache may also lie inside the checkout."""
    data_folder = checkout.parent / place
    data_folder.mkdir()
    assert get_sae_bench_version() == COMMIT
    with working_directory(data_folder):
        assert get_sae_bench_version() != COMMIT
    assert get_sae_bench_version() == COMMIT


# ---------------------------------------------------------------- labelled_text_datasets


def test_labelled_texts_are_read(data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with working_directory(data_folder), replaced(labelled_text_datasets(LABELS)):
        assert dataset_info.chosen_classes_per_dataset[CLASSES] == ["0", "1", "2"]
        train, test = dataset_utils.get_multi_label_train_test_data(CLASSES, 40, 20, 0)
    assert {label: len(texts) for label, texts in train.items()} == {"0": 20, "1": 20, "2": 20}
    assert {label: len(texts) for label, texts in test.items()} == {"0": 10, "1": 10, "2": 10}
    assert {word for text in train["0"] for word in text.split()} <= set(COLOURS)
    assert {word for text in test["1"] for word in text.split()} <= set(METALS)
    assert not set(train["0"]) & set(test["0"])


def test_other_names_still_go_to_saebench(monkeypatch: pytest.MonkeyPatch) -> None:
    def original(name: str, train_set_size: int, test_set_size: int, random_seed: int) -> tuple[str, int, int, int]:
        return name, train_set_size, test_set_size, random_seed

    monkeypatch.setattr(dataset_utils, "get_multi_label_train_test_data", original)
    with replaced(labelled_text_datasets(LABELS)):
        assert dataset_utils.get_multi_label_train_test_data("fancyzhx/ag_news", 8, 4, 1) == (
            "fancyzhx/ag_news",
            8,
            4,
            1,
        )


# ---------------------------------------------------------------- collected_errors


def test_collected_errors() -> None:
    logger = logging.getLogger("tests.someone")
    messages: list[str] = []
    with collected_errors("tests.someone", messages):
        logger.warning("not this")
        logger.error("failed with %s", "this")
        logging.getLogger("tests.someone.below").critical("and below")
        logging.getLogger("tests.another").error("not that")
    assert messages == ["failed with this", "and below"]
    logger.error("too late")
    assert len(messages) == 2


@pytest.mark.parametrize("leave", [lambda m: None, fails], ids=["unused", "by exception"])
def test_no_handler_is_left(leave: Callable[[AbstractContextManager[object]], None]) -> None:
    handlers = list(logging.getLogger("tests.someone").handlers)
    manager = collected_errors("tests.someone", [])
    if leave is fails:
        with pytest.raises(BoomError):
            leave(manager)
    else:
        with manager:
            pass
    assert logging.getLogger("tests.someone").handlers == handlers


# ---------------------------------------------------------------- activations_kept


@pytest.mark.parametrize("form", ["another filter", "whole model", "text"])
def test_other_questions_go_to_the_model(form: str, tmp_path: Path) -> None:
    cache, model = TensorCache(tmp_path, 10**6), tiny_model()
    tokens, names = model.to_tokens("red iron oak"), HOOK
    with replaced(activations_kept(cache)):
        if form == "another filter":
            output, acts = model.run_with_cache(tokens, stop_at_layer=1, names_filter=lambda name: name == names)
        elif form == "whole model":
            output, acts = model.run_with_cache(tokens, names_filter=names)
        else:
            output, acts = model.run_with_cache("red iron oak", stop_at_layer=1, names_filter=names)
    assert output is not None
    assert acts[HOOK].shape[:2] == tokens.shape
    assert list(tmp_path.iterdir()) == []


def test_another_model_or_other_tokens_are_asked_for_anew(tmp_path: Path) -> None:
    cache, model = TensorCache(tmp_path, 10**6), tiny_model()
    tokens = model.to_tokens("red iron oak")
    plain = {"stop_at_layer": 1, "names_filter": HOOK}
    with replaced(activations_kept(cache)):
        first = model.run_with_cache(tokens, **plain)[1][HOOK]
        again = model.run_with_cache(tokens, **plain)
        assert again[0] is None, "from the cache"
        assert torch.equal(again[1][HOOK], first)
        assert not torch.equal(model.run_with_cache(model.to_tokens("elm elm elm"), **plain)[1][HOOK], first)
        other = tiny_model()
        other.embed.W_E.mul_(2)
        assert not torch.equal(other.run_with_cache(tokens, **plain)[1][HOOK], first)
