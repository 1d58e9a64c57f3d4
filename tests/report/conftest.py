"""A table of scores such as a small run gives: three methods, two controls, every eval, made-up numbers."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from ksvd_sae.report.scores import COLUMNS

HELDOUT, PROBING = "bbc-news heldout", "bbc-news five classes"

# name: d_sae, k, l0, samples seen, fvu, dead, loss recovered, KL, nats lost, top-1, top-5
METHODS: dict[str, tuple[float, ...]] = {
    "db-ksvd": (4096, 20, 20.0, 1_048_576, 0.115, 0.0, 0.93, 0.231, 0.214, 0.712, 0.861),
    "db-ksvd-refit": (4096, 20, 20.0, 1_048_576, 0.108, 0.0, 0.934, 0.222, 0.205, 0.705, 0.858),
    "topk-sae": (4096, 20, 19.97, 5_242_880, 0.131, 0.0371, 0.94, 0.197, 0.183, 0.741, 0.872),
    "pca": (20, 20, 20.0, 262_144, 0.34, 0.0, 0.725, 1.02, 0.84, 0.601, 0.794),
    "random": (4096, 20, 20.0, 0, 0.6, 0.0002, 0.31, 3.4, 2.1, 0.552, 0.683),
}
CLEAN_LOSS = 3.062


def _scores(name: str, sizes: tuple[float, ...], seed: int = 0) -> list[dict[str, Any]]:
    """The rows of one dictionary."""
    d_sae, k, l0, seen, fvu, dead, recovered, kl, lost, top_1, top_5 = sizes
    values: dict[tuple[str, str], dict[str, float | None]] = {
        ("training", "bbc-news"): {"samples_seen": seen, "seconds": 12.5},
        ("heldout", HELDOUT): {
            "fvu": fvu,
            "l0": l0,
            "dead_fraction": dead,
            "density_over_1_percent": 0.12,
            "density_over_10_percent": 0.01,
            "coherence_max": 0.83,
            "coherence_mean_max": 0.41,
        },
        ("core", HELDOUT): {
            "ce_loss_score": recovered,
            "ce_loss_with_sae": CLEAN_LOSS + lost,
            "ce_loss_without_sae": CLEAN_LOSS,
            "ce_loss_with_ablation": CLEAN_LOSS + lost / (1 - recovered),
            "kl_div_with_sae": kl,
            "kl_div_score": 1 - kl / 9,
            "l0": l0,
            "frac_alive": 1 - dead,
            "l2_ratio": None,
        },
        ("sparse_probing", PROBING): {
            "sae_top_1_test_accuracy": top_1,
            "sae_top_2_test_accuracy": (top_1 + top_5) / 2,
            "sae_top_5_test_accuracy": top_5,
            "sae_test_accuracy": 0.93,
            "llm_test_accuracy": 0.951,
            "llm_top_1_test_accuracy": 0.632,
            "llm_top_5_test_accuracy": 0.811,
        },
    }
    counts = {"training": None, "heldout": 65_536, "core": 25_600, "sparse_probing": 1000}
    return [
        {
            "dictionary": name,
            "view": "non-negative" if name == "topk-sae" else "signed",
            "d_sae": int(d_sae),
            "k": int(k),
            "l0": l0,
            "eval": eval_name,
            "data": data,
            "metric": metric,
            "value": value,
            "seed": seed,
            "eval_seed": 42 if eval_name == "sparse_probing" else None,
            "n": counts[eval_name],
            "source": f"{name}-0123456789ab.json",
        }
        for (eval_name, data), found in values.items()
        for metric, value in found.items()
    ]


def _table(methods: Mapping[str, tuple[float, ...]], seed: int = 0) -> pd.DataFrame:
    rows = [row for name, sizes in methods.items() for row in _scores(name, sizes, seed)]
    return pd.DataFrame(rows, columns=COLUMNS)


@pytest.fixture
def methods() -> dict[str, tuple[float, ...]]:
    return dict(METHODS)


@pytest.fixture
def table_of() -> Callable[..., pd.DataFrame]:
    """Makes a frame from what ``methods`` holds."""
    return _table


@pytest.fixture
def frame() -> pd.DataFrame:
    return _table(METHODS)


@pytest.fixture
def logs() -> dict[str, list[dict[str, Any]]]:
    """Training logs of two dictionaries: 16 batches of 65,536."""
    made = {}
    for name, floor in (("db-ksvd", 0.11), ("db-ksvd-exact", 0.105)):
        made[name] = [
            {
                "pass_index": batch // 8,
                "batch": batch % 8,
                "samples_seen": 65_536 * (batch + 1),
                "fvu": floor + 0.5 * 0.6**batch + 0.004,
                "fvu_after_update": floor + 0.42 * 0.58**batch,
                "l0": 20.0,
                "dead": max(0, 130 - 22 * batch),
                "redrawn": max(0, 60 - 15 * batch),
                "seconds": 0.8,
            }
            for batch in range(16)
        ]
    return made


@pytest.fixture
def densities() -> dict[str, np.ndarray[Any, Any]]:
    """Firing densities with a tail, some dead atoms, and PCA, whose few atoms always fire."""
    rng = np.random.default_rng(0)
    ksvd = np.minimum(10 ** rng.normal(-2.6, 0.4, 4096), 1)
    topk = np.minimum(10 ** rng.normal(-2.9, 0.7, 4096), 1)
    topk[:152] = 0
    return {"db-ksvd": ksvd, "topk-sae": topk, "pca": np.ones(20), "random": 10 ** rng.normal(-2.3, 0.08, 4096)}


WORDS = ["", "the", "of", "and", "a", "model", "said", "that", "in", "for", "gold", "iron", "red"]


def _examples(signed: bool = True, n_atoms: int = 24, n_examples: int = 8, seed: int = 0) -> dict[str, Any]:
    """Atoms in context as the evaluate stage stores them: 25 tokens an example, two of them coded."""
    draw = random.Random(seed)

    def example(sign: int, strength: float) -> dict[str, Any]:
        activations = [0.0] * 25
        activations[12], activations[draw.randrange(12)] = sign * strength, sign * strength * draw.uniform(0.01, 0.9)
        tokens = [f" {draw.choice(WORDS)}" for _ in range(25)]
        return {"document": draw.randrange(50), "peak": 12, "tokens": tokens, "activations": activations}

    strata = ("strongest", "frequent", "middle", "rare")
    atoms = [
        {
            "atom": 7 * i,
            "stratum": strata[4 * i // n_atoms],
            "density": 0.02 / (i + 1),
            "strongest": 900.0 - i,
            "nearest": {"atom": i, "cosine": -0.51},
            "logit_lens": {"raised": [" gold", "iron"] * 3, "lowered": [" red"] * 6},
            "positive": [example(1, 900.0 - i - 10 * rank) for rank in range(n_examples)],
            **({"negative": [example(-1, 90.0 - rank) for rank in range(n_examples)]} if signed else {}),
        }
        for i in range(n_atoms)
    ]
    facts = {"format": 1, "n_tokens": 16_331, "n_documents": 36, "n_atoms": 4096, "n_dead": 0, "signed": signed}
    return {**facts, "atoms": atoms}


@pytest.fixture
def examples_of() -> Callable[..., dict[str, Any]]:
    """Makes what the evaluate stage stores of a dictionary's atoms in context."""
    return _examples


@pytest.fixture
def manifest() -> dict[str, Any]:
    return {
        "stage": "report",
        "hash": "0123456789ab",
        "key": {"config": {"name": "demo", "seed": 0, "model": {"name": "gemma", "hook": "blocks.8.hook_resid_post"}}},
        "versions": {"python": "3.11.7", "numpy": "1.26.4", "torch": "2.6.0"},
        "commit": "abcdef012345",
        "written": "2025-01-31T12:00:00+00:00",
    }


@pytest.fixture
def png(tmp_path: Path) -> Path:
    """A real PNG: one white pixel."""
    path = tmp_path / "pixel.png"
    matplotlib.image.imsave(path, np.ones((1, 1, 3)))
    return path
