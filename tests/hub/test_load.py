"""What is loaded is what was published: from a folder or the Hub; damaged, forged and misplaced files are refused."""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, file_download
from safetensors.torch import load_file, save_file

import ksvd_sae
from ksvd_sae.errors import ConfigError, DictionaryError, HubError, InputTypeError, KsvdSaeError, ManifestError
from ksvd_sae.hub.layout import Manifest
from ksvd_sae.hub.source import open_source
from ksvd_sae.hub.upload import upload
from ksvd_sae.hub.write import write_folder
from tests.hub.conftest import HOOK, REPO, at_endpoint
from tests.hub.server import Hub
from tests.test_dictionary import rewrite
from tests.tiny_saes import tiny_dictionary

SAE_ID = f"{HOOK}/d/split"
WEIGHTS = f"{SAE_ID}/sae_weights.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One dictionary; read only."""
    place = tmp_path_factory.mktemp("one")
    replace(tiny_dictionary(), provenance={"model": "tiny", "hook": HOOK}).save(place / "d")
    write_folder(open_source(place / "d", [], "split"), REPO, place / "out", None)
    return place / "out"


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "out")
    return tmp_path / "out"


def refused(error: type[KsvdSaeError], match: str, *arguments: Any, **options: Any) -> None:
    for loader in (ksvd_sae.load, ksvd_sae.load_dictionary):
        with pytest.raises(error, match=f"(?s){match}"):
            loader(*arguments, **options)


# ---------------------------------------------------------------- a folder


def test_names_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    refused(ConfigError, f"no such sae_id.*limit: {SAE_ID}.*did you mean '{SAE_ID}'", folder, f"{HOOK}/d/signed")
    refused(ConfigError, "no such folder.*owner/name", tmp_path / "nowhere", SAE_ID)
    refused(ConfigError, "has no revisions", folder, SAE_ID, revision="main")
    refused(ManifestError, r"no manifest\.json in", tmp_path, SAE_ID)
    refused(InputTypeError, "no text", folder, 3)
    with pytest.raises(ConfigError, match="no device of this name"):
        ksvd_sae.load(folder, SAE_ID, device="abacus")


@pytest.mark.parametrize(
    "sae_id",
    ["../d", f"{HOOK}/../d", "/etc", "~/d", "", ".", f"{HOOK}//d", f"{HOOK}/d/", "a\\b", ".git", "a\0b", "a b"],
)
def test_paths_that_lead_elsewhere(folder: Path, sae_id: str) -> None:
    refused(ConfigError, "is no name in a published folder", folder, sae_id)


@pytest.mark.parametrize("name", ["../x", "/x", f"{SAE_ID}/../../x"])
def test_a_manifest_that_leads_elsewhere(copy: Path, name: str) -> None:
    raw = json.loads((copy / "manifest.json").read_text())
    raw["files"][name] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(raw))
    refused(ConfigError, "is no name in a published folder", copy, SAE_ID)


@pytest.mark.parametrize("name", [WEIGHTS, "manifest.json"])
def test_a_link_out_of_the_folder(copy: Path, tmp_path: Path, name: str) -> None:
    (copy / name).rename(tmp_path / "elsewhere")
    (copy / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ManifestError, match="is a link that leads out"):
        ksvd_sae.load(copy, SAE_ID)


def test_a_linked_folder_is_no_way_out(copy: Path, tmp_path: Path) -> None:
    (copy / HOOK / "d").rename(tmp_path / "elsewhere")
    (copy / HOOK / "d").symlink_to(tmp_path / "elsewhere")
    refused(ManifestError, "is a link that leads out", copy, SAE_ID)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors", "dictionary.json", "atoms.safetensors"])
def test_a_changed_file(copy: Path, name: str) -> None:
    path = copy / SAE_ID / name
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    loader = ksvd_sae.load if name in ("cfg.json", "sae_weights.safetensors") else ksvd_sae.load_dictionary
    with pytest.raises(ManifestError, match=rf"(?s){name} is not the file.*got: SHA-256.*copy or publish"):
        loader(copy, SAE_ID)
    path.unlink()
    with pytest.raises(ManifestError, match=f"no {SAE_ID}/{name}"):
        loader(copy, SAE_ID)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        "not json",
        '{"format": 2, "saes": {}, "files": {}}',
        '{"format": 1, "saes": {}, "files": {"a": 1}}',
        '{"format": NaN}',
        "[" * 100_000,
        " " * (16 << 20) + "{}",
    ],
    ids=["list", "empty", "text", "newer", "number", "nan", "deep", "large"],
)
def test_a_manifest_that_is_none(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    refused(ManifestError, "loading", copy, SAE_ID)


# ---------------------------------------------------------------- forged together with the manifest


def forge(copy: Path, change: Callable[[Path], None]) -> None:
    change(copy / SAE_ID)
    Manifest.of(copy, [SAE_ID]).write(copy)


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "cfg.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        held = load_file(folder / "sae_weights.safetensors")
        edit(held)
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, folder / "sae_weights.safetensors")

    return change


def spoil(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda held: held["W_dec"][3].fill_(value)


FORGED = {
    "unknown architecture": (config(architecture="os.system"), "architecture 'os.system'"),
    "no text": (config(architecture=["db_ksvd"]), "architecture"),
    "larger": (config(d_sae=96), r"W_dec: \[48, 16\].*limit:.*W_dec: \[96, 16\]"),
    "enormous": (config(d_sae=2 * 10**12), "W_dec"),
    "negative": (config(d_in=-4), "k out of range"),
    "k too large": (config(k=17), "k out of range"),
    "no number": (config(k="3"), "k must be a whole number"),
    "no dtype": (config(dtype="object"), "dtype"),
    "NaN": (tensors(spoil(float("nan"))), "W_dec holds NaN or infinity"),
    "infinite": (tensors(spoil(float("inf"))), "W_dec holds NaN or infinity"),
    "zero row": (tensors(spoil(0.0)), "a row of W_dec is zero"),
    "integers": (tensors(lambda held: held.update(b_enc=held["b_enc"].to(torch.int32))), "b_enc.*I32"),
    "missing": (tensors(lambda held: held.pop("b_dec")), "b_dec: missing"),
    "additional": (tensors(lambda held: held.update(more=torch.ones(3))), "more: no such tensor"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged(copy: Path, name: str) -> None:
    change, says = FORGED[name]
    forge(copy, change)
    with pytest.raises(KsvdSaeError, match=f"(?s){says}"):
        ksvd_sae.load(copy, SAE_ID)


class Runs:
    """What unpickling would run."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["sae_weights.safetensors", "atoms.safetensors"])
def test_nothing_is_unpickled(copy: Path, tmp_path: Path, name: str) -> None:
    mark = tmp_path / "ran"
    forge(copy, lambda folder: torch.save(Runs(mark), folder / name))
    loader = ksvd_sae.load if name.startswith("sae") else ksvd_sae.load_dictionary
    with pytest.raises(DictionaryError):
        loader(copy, SAE_ID)
    assert not mark.exists()
    torch.load(io.BytesIO((copy / SAE_ID / name).read_bytes()), weights_only=False)
    assert mark.exists(), "else this tests nothing"


@pytest.mark.parametrize("value", [float("nan"), 2.0])
def test_forged_atoms(copy: Path, value: float) -> None:
    def change(folder: Path) -> None:
        held = load_file(folder / "atoms.safetensors")
        held["atoms"][0, 0] = value
        save_file(held, folder / "atoms.safetensors")
        rewrite(folder)

    forge(copy, change)
    with pytest.raises(DictionaryError, match="not of unit norm"):
        ksvd_sae.load_dictionary(copy, SAE_ID)


def test_a_forged_centre(copy: Path) -> None:
    def change(folder: Path) -> None:
        held = load_file(folder / "atoms.safetensors")
        held["centre"][0] = float("inf")
        save_file(held, folder / "atoms.safetensors")
        rewrite(folder)

    forge(copy, change)
    with pytest.raises(DictionaryError, match="the centre holds NaN or infinity"):
        ksvd_sae.load_dictionary(copy, SAE_ID)


# ---------------------------------------------------------------- the Hub


@pytest.fixture
def there(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    # Newer clients ask again with more patience, several times.
    monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", 0.3, raising=False)
    upload(folder, REPO)
    hub.asked.clear()
    return hub


def test_only_what_is_needed_is_fetched(there: Hub) -> None:
    ksvd_sae.load(REPO, SAE_ID)
    fetched = {path.rsplit("/", 1)[1] for method, path in there.asked if method == "GET"}
    assert fetched == {"manifest.json", "cfg.json", "sae_weights.safetensors"}


def test_a_damaged_download(there: Hub) -> None:
    there.trouble("GET", "sae_weights", "damage")
    with pytest.raises(ManifestError, match=r"(?s)sae_weights.*is not the file.*delete (\S+) and load again") as caught:
        ksvd_sae.load(REPO, SAE_ID)
    with pytest.raises(ManifestError):
        ksvd_sae.load(REPO, SAE_ID)
    assert caught.value.cure is not None
    Path(caught.value.cure.split()[1]).unlink()
    assert ksvd_sae.load(REPO, SAE_ID).cfg.d_sae == 48


def test_a_download_that_is_cut_goes_on(there: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = (folder / WEIGHTS).stat().st_size // 2
    # What came of a file is kept chunk by chunk.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", half // 2)
    there.trouble("GET", "sae_weights", "half")
    # Newer clients go on by themselves.
    with suppress(HubError):
        ksvd_sae.load(REPO, SAE_ID)
    sae = ksvd_sae.load(REPO, SAE_ID)
    assert there.resumed == [half], "the other half alone"
    assert torch.equal(sae.W_dec, ksvd_sae.load(folder, SAE_ID).W_dec)


@pytest.mark.parametrize(("kind", "more"), [("status", {"status": 500}), ("stall", {}), ("cut", {})])
@pytest.mark.parametrize("file", ["manifest.json", "sae_weights"])
def test_a_hub_that_fails(there: Hub, kind: Any, more: dict[str, int], file: str) -> None:
    there.trouble("HEAD", file, kind, times=99, **more)
    with pytest.raises(HubError, match=r"(?s)from the Hugging Face Hub.*cure:"):
        ksvd_sae.load(REPO, SAE_ID)
    there.troubles.clear()
    assert ksvd_sae.load(REPO, SAE_ID).cfg.d_sae == 48


def test_what_the_hub_lacks(there: Hub) -> None:
    refused(HubError, "no such repository", "somebody/else", SAE_ID)
    refused(HubError, "no such revision.*got: v9", REPO, SAE_ID, revision="v9")
    there.put("somebody/other", {"cfg.json": b"{}"})
    refused(HubError, r"no such file", "somebody/other", SAE_ID)
    refused(ConfigError, "no such sae_id", REPO, f"{HOOK}/d/signed")


def test_files_of_two_publications(there: Hub) -> None:
    """Another's file put in the place of ours: not what the manifest says."""
    there.put(REPO, {f"{SAE_ID}/cfg.json": b"{}"})
    with pytest.raises(ManifestError, match=r"cfg\.json is not the file"):
        ksvd_sae.load(REPO, SAE_ID)


def test_in_the_cache_no_hub_is_needed(there: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ksvd_sae.load(REPO, SAE_ID)
    at_endpoint("http://127.0.0.1:9", monkeypatch)
    again = ksvd_sae.load(REPO, SAE_ID)
    assert torch.equal(first.W_dec, again.W_dec)
