"""What counts as the same input: a stage may reuse only what was made from the same."""

from pathlib import Path

import pytest

from ksvd_sae.run.config import RunConfig, load_config
from ksvd_sae.run.pipeline import Run
from tests.command_line import EVAL_CONFIGS
from tests.path.conftest import CONFIG, SHRUNK


def config(text: Path, **changes: str) -> RunConfig:
    values = {**SHRUNK, "text.dataset": str(text), **changes}
    return load_config(EVAL_CONFIGS / f"{CONFIG}.yaml", [f"{key}={value}" for key, value in values.items()])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("first text")
    return folder


def folder(text: Path, **changes: str) -> Path:
    return Run(config(text, **changes), cache=text.parent).harvest_folder


@pytest.mark.parametrize(
    "change",
    [
        {"seed": "1"},
        {"model.hook": "blocks.7.hook_resid_post"},
        {"model.dtype": "bfloat16"},
        {"harvest.train_tokens": "6001"},
        {"harvest.outlier_factor": "5"},
        {"text.column": "body"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_harvest_has_another_folder(text: Path, change: dict[str, str]) -> None:
    assert folder(text, **change) != folder(text)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"dictionaries.pca.k": "5"},
        {"evaluation.core": "null"},
        {"harvest.gradient_tokens": "100"},
        {"harvest.gradient_batch_contexts": "2"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_a_harvest_does_not_depend_on(text: Path, change: dict[str, str]) -> None:
    assert folder(text, **change) == folder(text)


def test_a_changed_text_is_another_harvest(text: Path) -> None:
    before = folder(text)
    (text / "a.txt").write_text("other text")
    assert folder(text) != before
