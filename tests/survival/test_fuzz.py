"""Configs, manifests, descriptions of SAEs and headers of tensors that someone changed: read, or refused by our errors.

Checksums and hashes are made to fit where a file has some: what they would have caught is in ``test_damage``.
"""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ksvd_sae.activations.shards import STAGE, ActivationShards
from ksvd_sae.dictionary import ATOMS_FILE, CONFIG_FILE, Dictionary
from ksvd_sae.errors import KsvdSaeError
from ksvd_sae.hub.layout import Manifest
from ksvd_sae.hub.load import load, load_dictionary
from ksvd_sae.run.config import load_config
from ksvd_sae.store import MANIFEST, checksum, content_hash, file_sha256, read_manifest
from tests.survival.conftest import Tally
from tests.survival.test_damage import KEY, dictionary, published, shards
from tests.survival.tiny_run import RAW

# Two cells.
_CONFIG = {**RAW, "grid": {"m": [64, 128], "k": [4]}, "dictionaries": {**RAW["dictionaries"], "pca": {"kind": "pca"}}}
_ODD = st.sampled_from([None, True, -1, 0, 1, 2**31, 2**70, 0.5, -0.0, 1e308, "", "0", "../..", "\x00", "é" * 300])
_VALUES = st.recursive(
    _ODD | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def changed(draw: st.DrawFn, value: Any) -> Any:
    """With one to three of its values replaced, taken out or joined by others."""
    value = deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        places = list(inner_places(value))
        if not places:
            break
        held, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(["replace", "take out", "add", "swap"])):
            case "replace":
                held[key] = draw(_VALUES)
            case "take out":
                del held[key]
            case "add" if isinstance(held, dict):
                held[draw(st.text(max_size=6))] = draw(_VALUES)
            case "add":
                held.append(draw(_VALUES))
            case "swap":
                other, its = draw(st.sampled_from(places))
                held[key] = deepcopy(other[its])
    return value


def inner_places(value: Any) -> Any:
    """(dict or list, key) of all that is inside."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from inner_places(value[key])


def a_config(draw: st.DrawFn, folder: Path) -> Callable[[], Any]:
    path = folder / "config.yaml"
    text = yaml.safe_dump(changed(draw, _CONFIG), allow_unicode=draw(st.booleans()), sort_keys=False)
    if draw(st.booleans()):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.text(max_size=5)) + text[at + draw(st.integers(0, 5)) :]
    path.write_text(text, errors="surrogateescape" if draw(st.booleans()) else "replace")
    return lambda: load_config(path)


def a_manifest(draw: st.DrawFn, folder: Path) -> Callable[[], Any]:
    path = folder / "shards" / MANIFEST
    manifest = json.loads((folder / "whole-manifest.json").read_text())
    del manifest["checksum"]
    manifest = changed(draw, manifest)
    if draw(st.booleans()):
        manifest["hash"] = content_hash(manifest.get("key"))
    path.write_text(json.dumps({**manifest, "checksum": checksum(manifest)}))

    def read() -> None:
        read_manifest(path.parent, STAGE, KEY)
        ActivationShards.open(path.parent, key=KEY).tensor()

    return read


def a_description(draw: st.DrawFn, folder: Path) -> Callable[[], Any]:
    """cfg.json of a published SAE, or dictionary.json."""
    place = folder / "published" / "out"
    sae_id = next(iter(json.loads((place / MANIFEST).read_text())["saes"]))
    name = draw(st.sampled_from(["cfg.json", CONFIG_FILE]))
    whole = json.loads((folder / f"whole-{name}").read_text())
    for each in ("cfg.json", CONFIG_FILE):
        shutil.copyfile(folder / f"whole-{each}", place / sae_id / each)
    config = changed(draw, whole)
    if name == CONFIG_FILE and config.pop("checksum", None) is not None:
        config["checksum"] = checksum([config, file_sha256(place / sae_id / ATOMS_FILE)])
    (place / sae_id / name).write_text(json.dumps(config))
    Manifest.of(place, [sae_id]).write(place)
    return lambda: (load if name == "cfg.json" else load_dictionary)(place, sae_id)


def a_header(draw: st.DrawFn, folder: Path) -> Callable[[], Any]:
    """Of a dictionary's tensors."""
    place, whole = folder / "dictionary", (folder / "whole-atoms").read_bytes()
    n_bytes = int.from_bytes(whole[:8], "little")
    header = json.dumps(changed(draw, json.loads(whole[8 : 8 + n_bytes]))).encode()
    said = draw(st.sampled_from([len(header), len(header), len(header), 0, n_bytes, 2**40, 2**64 - 1]))
    (place / ATOMS_FILE).write_bytes(said.to_bytes(8, "little") + header + whole[8 + n_bytes :])
    config = json.loads((place / CONFIG_FILE).read_text())
    config.pop("checksum", None)
    (place / CONFIG_FILE).write_text(
        json.dumps({**config, "checksum": checksum([config, file_sha256(place / ATOMS_FILE)])})
    )
    return lambda: Dictionary.load(place)


KINDS = {
    "configs": a_config,
    "manifests": a_manifest,
    "descriptions": a_description,
    "headers": a_header,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("shards", "dictionary", "published"):
        (folder / name).mkdir()
    shards(folder / "shards")
    shutil.copyfile(folder / "shards" / MANIFEST, folder / "whole-manifest.json")
    dictionary(folder / "dictionary")
    shutil.copyfile(folder / "dictionary" / ATOMS_FILE, folder / "whole-atoms")
    published(folder / "published")
    for name in ("cfg.json", CONFIG_FILE):
        (path,) = (folder / "published" / "out").rglob(name)
        shutil.copyfile(path, folder / f"whole-{name}")
    return folder


# SAELens' word on a description that asks for a model loaded in a way of its own: it is read.
@pytest.mark.filterwarnings(r"ignore:\s*This SAE has non-empty model_from_pretrained_kwargs:UserWarning")
@pytest.mark.parametrize("n", [100, pytest.param(5000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_only_our_own_errors(kind: str, n: int, folder: Path, tally: Tally) -> None:
    refused = read = 0

    # Not made smaller: that takes minutes, and what failed is small.
    @settings(max_examples=n, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        nonlocal refused, read
        attempt = KINDS[kind](data.draw, folder)
        try:
            attempt()
            read += 1
        except KsvdSaeError:
            refused += 1

    try:
        fuzz()
    finally:
        tally.add(f"changed {kind}", n, refused + read)
    assert refused > n // 10, "else this tests nothing"
