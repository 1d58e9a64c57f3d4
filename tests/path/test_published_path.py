"""From the Hub to the report: a published SAE of the tiny model, through SAEBench's core, offline."""

import pandas as pd
import pytest
import torch
import yaml
from torch.nn.functional import normalize

from tests.command_line import EVAL_CONFIGS
from tests.path.conftest import CONFIG, Workplace
from tests.strategies import generator
from tests.tiny_hub import COMMIT, dictionary_learning_files, write_repository
from tests.tiny_models import D_MODEL, PYTHIA

REPOSITORY, FOLDER, D_SAE, K = "someone/saes", "BatchTopK/resid_post_layer_8/trainer_0", 256, 8
LEFT_OUT = yaml.safe_load((EVAL_CONFIGS / f"{CONFIG}.yaml").read_text())["dictionaries"]
CHANGES = {
    "dictionaries.published": f"{{kind: published_sae, repo_id: {REPOSITORY}, path: {FOLDER}, "
    "format: dictionary_learning}",
    **{f"evaluation.{name}": "null" for name in ("sparse_probing", "sparse_probing_sae_probes", "scr")},
}


@pytest.fixture(scope="module")
def published(workplace: Workplace) -> Workplace:
    """The tiny model's workplace, with a BatchTopK SAE of its layer 8 in the Hub's cache."""
    rows_MD = normalize(torch.randn(D_SAE, D_MODEL, generator=generator(0)), dim=1)
    tensors = {
        "encoder.weight": rows_MD,
        "decoder.weight": rows_MD.T.contiguous(),
        "encoder.bias": torch.zeros(D_SAE),
        "bias": torch.zeros(D_MODEL),
        "k": torch.tensor(K),
        "threshold": torch.tensor(8.0),
    }
    trainer = {"dict_class": "BatchTopKSAE", "lm_name": PYTHIA, "layer": 8, "k": K, "steps": 100}
    files = dictionary_learning_files(FOLDER, tensors, trainer, {"out_batch_size": 2048, "ctx_len": 1024})
    write_repository(workplace.hf_home / "hub", REPOSITORY, files)
    return workplace


def test_from_the_hub_to_the_report(published: Workplace) -> None:
    changes = {**CHANGES, **{f"dictionaries.{name}": "null" for name in LEFT_OUT}}
    done = published.ksvd_sae("run", changes=changes)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(published.results / "comparison.csv")
    scores = table.set_index(["eval", "metric"])["value"]
    assert set(table["dictionary"]) == {"published"}
    assert set(table["view"]) == {"non-negative"}
    assert scores["training", "samples_seen"] == 204_800
    assert 0 < scores["core", "l0"] < D_SAE
    assert scores["core", "ce_loss_score"] < 1
    # The tiny model goes by Pythia's name: published scores are of its hook, and of other widths.
    markdown = (published.results / "comparison.md").read_text()
    assert "published SAEs of this model and hook have 4,096, 16,384, 65,536 latents" in markdown
    assert "Published SAEs, scored here like every other: published." in markdown


def test_a_missing_sae_stops_the_run_before_the_model_is_loaded(published: Workplace) -> None:
    changes = {**CHANGES, "harvest.train_tokens": "6001"}
    changes["dictionaries.published"] = changes["dictionaries.published"].replace("trainer_0", "trainer_9")
    done = published.ksvd_sae("harvest", changes=changes)
    assert done.returncode == 1
    assert "trainer_9/config.json of someone/saes" in done.stderr
    assert "HF_HUB_OFFLINE" in done.stderr
    assert COMMIT not in done.stderr
    assert "Traceback" not in done.stderr
