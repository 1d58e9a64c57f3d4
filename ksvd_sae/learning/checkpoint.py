"""Where training stands, on disk: one safetensors file, whole or not there, without pickle.

A resumed run ends with the bits of an uninterrupted one (on the CPU, with the same number of threads): the file holds
the atoms, the centre, the state of the generator, the position in the pass and the log so far; the order of the samples
follows from the seed and the pass.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ksvd_sae.errors import ManifestError
from ksvd_sae.learning.averaging import Average
from ksvd_sae.learning.drift import Drift
from ksvd_sae.learning.training import BatchLog, TrainingState
from ksvd_sae.store import atomic_path, checksum

logger = logging.getLogger(__name__)

FORMAT = 2
# Rows that tell one batch from another.
PROBE_ROWS = 16

Fingerprint = Mapping[str, Mapping[str, Any]]


def digest(tensor: Tensor | None) -> str | None:
    """First 12 hex digits of the SHA-256 of a tensor's numbers as float64; None of None."""
    if tensor is None:
        return None
    return hashlib.sha256(tensor.detach().double().cpu().contiguous().numpy().tobytes()).hexdigest()[:12]


def probe(batch_BD: Tensor) -> str:
    """A batch's first rows as a digest: enough to notice other data, or another order."""
    return str(digest(batch_BD[:PROBE_ROWS]))


def save_checkpoint(path: Path, state: TrainingState, fingerprint: Fingerprint) -> None:
    """Write where training stands.

    Args: fingerprint: two levels of JSON values; what the run's bits follow from (arguments, samples).
    """
    assert state.atoms_MD is not None, "a state before the first batch is no state to keep"
    assert state.idle_M is not None
    tensors = {
        "atoms": state.atoms_MD.contiguous().cpu(),
        "centre": state.centre_D.contiguous().cpu(),
        "idle": state.idle_M.cpu(),
        "generator": state.generator.get_state(),
    }
    if state.average is not None:
        tensors["average"] = state.average.mean_MD.contiguous().cpu()
        tensors["average_age"] = state.average.age_M.cpu()
    if state.drift is not None and state.drift.mean_D is not None:
        tensors["drift_mean"] = state.drift.mean_D.contiguous().cpu()
    facts = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "threads": torch.get_num_threads(),
        "device": state.atoms_MD.device.type,
        "pass_index": state.pass_index,
        "batches_done": state.batches_done,
        "pass_probe": state.pass_probe,
        "samples_seen": state.samples_seen,
        "passed_over": state.passed_over,
        "drift": None if state.drift is None else [state.drift.n_samples, state.drift.within, state.drift.n_within],
        "log": [asdict(line) for line in state.log],
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"training": json.dumps(facts), "checksum": _checksum(facts, tensors)})


def load_checkpoint(path: Path, fingerprint: Fingerprint, started: TrainingState) -> TrainingState:
    """Read what ``save_checkpoint`` wrote.

    Args:
        fingerprint: of the run that wants to go on.
        started: a fresh state of that run: its device, its weighting and its options are taken.
    Raises: ManifestError if the file is no checkpoint, or one of other arguments or other samples.
    """
    where = f"resuming from {path}"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            facts = json.loads(metadata["training"])
            # Copies: what is mapped from a file is aligned as the file has it, and products may differ in the last bit.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        # Of another format, another version's.
        if facts["format"] == FORMAT and metadata["checksum"] != _checksum(facts, tensors):
            raise ValueError("its checksum is not that of what it holds")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ManifestError(
            f"{where}: {type(error).__name__}: {error}",
            cause="not a checkpoint of ours, or an altered file",
            cure="delete it, or fit without resume",
        ) from error
    if facts["format"] != FORMAT:
        raise ManifestError(
            f"{where}: written by another version", got=f"format {facts['format']}", limit=f"format {FORMAT}"
        )
    differences = _differences(facts["fingerprint"], fingerprint)
    if differences:
        raise ManifestError(
            f"{where}: the checkpoint is from another run",
            got="; ".join(differences),
            cause="other arguments, other samples, or a path that another run uses",
            cure="fit without resume, with another checkpoint_path, or with what the checkpoint was made from",
        )
    device = started.centre_D.device
    if (facts["threads"], facts["device"]) != (torch.get_num_threads(), device.type):
        logger.warning(
            "%s: written with %d threads on %s, going on with %d on %s: the last bits may come out otherwise",
            where,
            facts["threads"],
            facts["device"],
            torch.get_num_threads(),
            device.type,
        )
    average = None
    if "average" in tensors:
        average = Average(tensors["average"].to(device), tensors["average_age"].to(device))
    # Checkpoints of before they were followed have neither.
    drift = None
    if facts.get("drift") is not None:
        n_samples, within, n_within = facts["drift"]
        mean_D = tensors["drift_mean"].to(device) if "drift_mean" in tensors else None
        drift = Drift(n_samples, mean_D, within, n_within)
    return TrainingState(
        generator=torch.Generator().set_state(tensors["generator"]),
        centre_D=tensors["centre"].to(device),
        weighting=started.weighting,
        atoms_MD=tensors["atoms"].to(device),
        idle_M=tensors["idle"].to(device),
        average=average,
        samples_seen=facts["samples_seen"],
        pass_index=facts["pass_index"],
        batches_done=facts["batches_done"],
        pass_probe=facts["pass_probe"],
        log=[BatchLog(**line) for line in facts["log"]],
        options=started.options,
        passed_over=facts.get("passed_over", 0),
        drift=drift,
    )


def _checksum(facts: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Of all that a checkpoint holds."""
    bytes_of = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}
    return checksum([json.loads(json.dumps(facts)), bytes_of])


def check_probe(state: TrainingState, found: str) -> None:
    """Raise ManifestError if a resumed pass does not begin as it did before.

    Args: found: probe of its first batch.
    """
    if state.pass_probe != found:
        raise ManifestError(
            f"resuming from a checkpoint: the samples of pass {state.pass_index} do not begin as they did",
            cause="a stream that gives other batches each time, or other data of the same size",
            cure="a stream that repeats itself, or fit without resume",
        )


def _differences(on_disk: Fingerprint, wanted: Fingerprint) -> list[str]:
    """Up to six places where two fingerprints differ."""
    wanted = json.loads(json.dumps(wanted))  # the other has been through JSON
    values = (
        (f"{part}.{name}", on_disk.get(part, {}).get(name), wanted.get(part, {}).get(name))
        for part in sorted({*on_disk, *wanted})
        for name in sorted({*on_disk.get(part, {}), *wanted.get(part, {})})
    )
    return [f"{name}: found {old!r}, wanted {new!r}" for name, old, new in values if old != new][:6]
