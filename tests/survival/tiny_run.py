"""A run of seconds through every stage: a model of random weights, a text folder, two dictionaries, three evals."""

from pathlib import Path
from typing import Any

import yaml

from tests import tiny_models

NAME = "tiny"
# Small parts and batches: many places at which a stage may be stopped, and checkpoints (every 64 batches).
RAW: dict[str, Any] = {
    "name": NAME,
    "device": "cpu",
    "model": {"name": tiny_models.PYTHIA, "hook": "blocks.2.hook_resid_post"},
    # Relative: results name what the config names.
    "text": {"source": "folder", "dataset": "text"},
    "harvest": {
        "train_tokens": 6000,
        "heldout_tokens": 1000,
        "context_tokens": 32,
        "batch_contexts": 8,
        "shard_tokens": 1024,
        "gradient_tokens": 256,
    },
    "dictionaries": {
        "db-ksvd": {
            "kind": "db_ksvd",
            "n_atoms": 64,
            "k": 4,
            "passes": 8,
            "batch_samples": 96,
            "weighting": "fisher_diag",
        },
        "topk-sae": {"kind": "topk_sae", "n_atoms": 64, "k": 4, "passes": 4, "batch_samples": 256},
    },
    "evaluation": {
        "loss": {"contexts": 4, "context_tokens": 32},
        "core": {
            "dataset": "heldout",
            "context_tokens": 32,
            "batch_contexts": 4,
            "reconstruction_batches": 2,
            "sparsity_batches": 2,
        },
        "sparse_probing": {
            "datasets": ["bbc-news"],
            "train_set_size": 20,
            "test_set_size": 20,
            "context_tokens": 16,
        },
    },
    "report": {"atoms": 2},
}


def write_place(folder: Path) -> Path:
    """The text and the config (which it gives), in a folder that a run can begin in."""
    tiny_models.write_text_folder(folder / "text", 300)
    path = folder / f"{NAME}.yaml"
    path.write_text(yaml.safe_dump(RAW, sort_keys=False))
    return path
