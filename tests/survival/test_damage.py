"""Files that a disk or a copy has damaged: every flipped bit and every cut is noticed, or changes nothing."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.dictionary import Dictionary
from ksvd_sae.errors import KsvdSaeError
from ksvd_sae.hub.load import load
from ksvd_sae.hub.source import open_source
from ksvd_sae.hub.write import write_folder
from ksvd_sae.learning.checkpoint import load_checkpoint, save_checkpoint
from ksvd_sae.learning.coding import Coding
from ksvd_sae.learning.dbksvd import DictionaryLearner, LearnerOptions
from ksvd_sae.store import read_manifest, write_manifest
from tests.survival.conftest import Tally
from tests.tiny_saes import tiny_dictionary
from tests.tiny_shards import raw_activations, write_harvest

KEY = {"made": "by hand", "tokens": 100}
FINGERPRINT = {"arguments": {"k": 3}, "samples": {"n_samples": 500}}


def shards(folder: Path) -> None:
    x_ND = raw_activations(300)
    write_harvest(folder, KEY, x_ND[:250], x_ND[250:])


def read_shards(folder: Path) -> Any:
    return [ActivationShards.open(folder, part, key=KEY).tensor() for part in ("train", "heldout")]


def dictionary(folder: Path) -> None:
    replace(tiny_dictionary("mp_refit"), provenance={"model": "some/model", "hook": "blocks.0.hook_resid_post"}).save(
        folder
    )


def read_dictionary(folder: Path) -> Any:
    found = Dictionary.load(folder)
    return found.atoms_MD, found.centre_D, found.coding, found.provenance


def checkpoint(folder: Path) -> None:
    learner = DictionaryLearner(LearnerOptions(24, Coding(3), passes=2), device="cpu").fit(raw_activations(500))
    assert learner.state is not None
    save_checkpoint(folder / "checkpoint", learner.state, FINGERPRINT)


def read_checkpoint(folder: Path) -> Any:
    started = DictionaryLearner(LearnerOptions(24, Coding(3)), device="cpu")._started(torch.zeros(16))
    state = load_checkpoint(folder / "checkpoint", FINGERPRINT, started)
    assert state.average is not None
    kept = (state.atoms_MD, state.centre_D, state.idle_M, state.average.mean_MD, state.generator.get_state())
    return *kept, [asdict(line) for line in state.log], state.samples_seen, state.pass_index, state.batches_done


def manifest(folder: Path) -> None:
    write_manifest(folder, "train", KEY, samples_seen=1000, seconds=1.5, name="db-ksvd", files={"a": "b"})


def read_a_manifest(folder: Path) -> Any:
    found = read_manifest(folder, "train", KEY)
    return {name: found[name] for name in ("stage", "hash", "key", "samples_seen", "name", "files", "seconds")}


def published(folder: Path) -> None:
    dictionary(folder / "d")
    write_folder(open_source(folder / "d", [], "split"), "somebody/dictionaries", folder / "out", "mit")


def read_published(folder: Path) -> Any:
    sae = load(folder / "out", "blocks.0.hook_resid_post/d/split")
    return list(sae.state_dict().values()), json.dumps(sae.cfg.to_dict())


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "shards": (shards, read_shards),
    "dictionaries": (dictionary, read_dictionary),
    "checkpoints": (checkpoint, read_checkpoint),
    "manifests": (manifest, read_a_manifest),
    "published folders": (published, read_published),
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def damage(path: Path, draw: random.Random) -> None:
    """Flip a bit, or cut the file off; one time in four the latter."""
    content = bytearray(path.read_bytes())
    if draw.random() < 0.25:
        content = content[: draw.randrange(len(content))]
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


@pytest.mark.parametrize("kind", KINDS)
def test_damage(kind: str, tmp_path: Path, tally: Tally) -> None:
    write, read = KINDS[kind]
    whole, copy = tmp_path / "whole", tmp_path / "copy"
    whole.mkdir()
    write(whole)
    wanted, draw = read(whole), random.Random(kind)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    detected = 0
    for number in range(200):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        damage(copy / draw.choice(files), draw)
        try:
            harmless = same(read(copy), wanted)
        except KsvdSaeError:
            detected, harmless = detected + 1, True
        tally.count(f"damaged {kind}", survived=harmless)
        assert harmless, f"{kind}, number {number}: read as if nothing had happened"
    assert detected >= 50, "else this tests nothing"
