"""A tiny GPT-NeoX with its tokenizer, made in this process: nothing is looked up by name, so no Hub cache is read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ksvd_sae.activations.documents import Document
from ksvd_sae.activations.harvest import Harvest
from ksvd_sae.activations.shards import (
    STAGE,
    STATISTICS_FILE,
    ActivationShards,
    shard_name,
    write_shard,
    write_statistics,
)
from ksvd_sae.activations.statistics import RunningStatistics
from ksvd_sae.activations.transformers_5 import loadable
from ksvd_sae.store import write_manifest
from tests import tiny_models

KEY = {"model": "none", "seed": 0}
StoreHarvest = Callable[..., ActivationShards]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def neox_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-neox"
    tiny_models.neox_model().save_pretrained(folder)
    tiny_models.byte_pair_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(neox_folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(neox_folder)


@pytest.fixture(scope="session")
def hf_model() -> Any:
    return tiny_models.neox_model()


@pytest.fixture
def model(neox_folder: Path, hf_model: Any, tokenizer: Any) -> Any:
    """The model as TransformerLens has it, anew for each test: tests leave hooks and NaN in it."""
    from transformer_lens import HookedTransformer
    from transformer_lens.loading_from_pretrained import get_pretrained_model_config
    from transformer_lens.pretrained.weight_conversions import convert_neox_weights

    config = get_pretrained_model_config(str(neox_folder), device="cpu", dtype=torch.float32)
    hooked = HookedTransformer(config, tokenizer=tokenizer)
    with loadable():
        weights = {name: weight.clone() for name, weight in convert_neox_weights(hf_model, config).items()}
    hooked.load_state_dict(weights, strict=False)
    return hooked.eval()


@pytest.fixture
def store_harvest(tmp_path: Path) -> StoreHarvest:
    """Writes tensors as the shards of a finished harvest, one shard each."""

    def store(*shards: Tensor, folder: Path = tmp_path / "harvest") -> ActivationShards:
        running = RunningStatistics(shards[0].shape[1])
        entries = []
        for index, shard_ND in enumerate(shards):
            running.add(shard_ND)
            entries.append(write_shard(folder / "train" / shard_name(index), shard_ND))
        statistics = running.result(1.0)
        write_statistics(folder / STATISTICS_FILE, statistics)
        write_manifest(
            folder,
            STAGE,
            KEY,
            d_in=shards[0].shape[1],
            parts={"train": {"n_samples": statistics.n_samples, "shards": entries}},
            statistics={"n_samples": statistics.n_samples, "mean_norm": statistics.mean_norm, "median_norm": 1.0},
        )
        return ActivationShards.open(folder, key=KEY)

    return store


@dataclass(frozen=True)
class GivenTexts(Harvest):
    """A harvest of these documents, whatever its text says; of None, opening the text is an error."""

    documents: tuple[Document, ...] | None = None

    def texts(self) -> Iterator[Document]:
        if self.documents is None:
            raise AssertionError("the text was opened")
        return iter(self.documents)
