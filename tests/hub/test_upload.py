"""To a Hub and back: one commit or none, what broke off goes on, and every failure says what to do."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ksvd_sae.errors import HubError, ManifestError
from ksvd_sae.hub import upload as module
from ksvd_sae.hub.layout import Manifest
from ksvd_sae.hub.load import load, load_dictionary
from ksvd_sae.hub.source import Source
from ksvd_sae.hub.upload import upload
from ksvd_sae.hub.write import write_folder
from tests.hub.conftest import HOOK, REPO, Published, at_endpoint
from tests.hub.server import READ_TOKEN, TOKEN, Hub, sha256
from tests.tiny_shards import raw_activations

SPLIT = f"{HOOK}/learned/split"
# huggingface_hub tries large files so often.
TRIES = 6


def send(folder: Path, hub: Hub, **options: Any) -> str:
    return upload(folder, REPO, **options)


def fails(folder: Path, hub: Hub, match: str, **options: Any) -> HubError:
    with pytest.raises(HubError, match=f"(?s){match}") as caught:
        send(folder, hub, **options)
    return caught.value


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def small(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One SAE and its card."""
    folder = tmp_path_factory.mktemp("small") / "out"
    write_folder(Source([published.source.entries[0]]), REPO, folder, "mit")
    return folder


@pytest.fixture(scope="module")
def other(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another dictionary under the same name."""
    folder = tmp_path_factory.mktemp("other") / "out"
    changed = next(entry for entry in published.source.entries if entry.sae_id == f"{HOOK}/steps/split")
    write_folder(Source([replace(changed, name="learned")]), REPO, folder, "mit")
    return folder


def test_round_trip(published: Published, hub: Hub) -> None:
    where = send(published.folder, hub)
    assert where.startswith(f"{hub.endpoint}/{REPO}/commit/")
    assert hub.files(REPO) == contents(published.folder)
    assert len(hub.repositories[REPO].commits) == 2, "the Hub's own first and ours"
    x_BD = raw_activations(300)
    manifest = Manifest.read(published.folder / "manifest.json", "test")
    for sae_id in manifest.saes:
        fetched, local = (load(place, sae_id) for place in (REPO, published.folder))
        assert torch.equal(fetched.encode(x_BD), local.encode(x_BD)), sae_id
        assert torch.equal(fetched(x_BD), local(x_BD)), sae_id
        assert fetched.cfg == local.cfg
    entry = published.source.entries[0]
    assert entry.dictionary is not None
    dictionary = load_dictionary(REPO, entry.sae_id)
    assert torch.equal(dictionary.atoms_MD, entry.dictionary.atoms_MD)
    assert torch.equal(dictionary.encode(x_BD).values_BK, entry.dictionary.encode(x_BD).values_BK)
    assert dictionary.coding == entry.dictionary.coding


def test_again_changes_nothing(small: Path, hub: Hub) -> None:
    send(small, hub)
    sent, commits = list(hub.sent), dict(hub.repositories[REPO].commits)
    send(small, hub)
    assert hub.sent == sent
    assert hub.repositories[REPO].commits == commits


@pytest.mark.parametrize(
    ("kind", "more", "says"),
    [("status", {"status": 500}, "HTTP 500"), ("cut", {}, "onnection"), ("stall", {}, "no answer.*limit: 0 s")],
)
def test_a_broken_upload_goes_on(
    small: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, kind: Any, more: dict[str, int], says: str
) -> None:
    monkeypatch.setattr(module, "STALL_S", 0.2)
    large = {sha256(content): name for name, content in contents(small).items() if name.endswith(".safetensors")}
    assert len(large) == 2
    broken, name = sorted(large.items())[0]
    hub.trouble("PUT", broken, kind, times=TRIES, **more)
    error = fails(small, hub, f"{name}.*{says}.*run the same command again")
    assert "X-Amz-Signature" not in str(error), "by which anybody can write there"
    assert hub.files(REPO) == {}, "nothing is there until all is"
    arrived = hub.count("PUT", "/upload/") - TRIES
    send(small, hub)
    assert hub.files(REPO) == contents(small)
    assert hub.count("PUT", "/upload/") == TRIES + arrived + (2 - arrived), "what has arrived is not sent again"


def test_a_short_trouble_is_no_failure(small: Path, hub: Hub) -> None:
    hub.trouble("PUT", "/upload/", "status", status=503)
    hub.trouble("PUT", "/upload/", "cut")
    send(small, hub)
    assert hub.files(REPO) == contents(small)


def test_a_commit_whose_answer_is_lost(small: Path, hub: Hub) -> None:
    hub.trouble("POST", "/commit/", "lose")
    fails(small, hub, "run the same command again")
    commits = len(hub.repositories[REPO].commits)
    send(small, hub)
    assert hub.files(REPO) == contents(small)
    assert len(hub.repositories[REPO].commits) == commits


def test_a_commit_that_is_never_answered(small: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALL_S", 0.2)
    hub.trouble("POST", "/commit/", "stall")
    fails(small, hub, "no answer")
    assert hub.files(REPO) == {}
    send(small, hub)


@pytest.mark.parametrize(
    ("path", "status", "more", "says"),
    [
        ("/preupload/", 401, {}, "not logged in.*HTTP 401.*hf auth login"),
        ("/preupload/", 403, {}, "not allowed.*right to write"),
        ("/commit/", 404, {"X-Error-Code": "RepoNotFound"}, "no such repository or branch"),
        ("/commit/", 409, {}, "changed meanwhile.*run the same command again"),
        ("/commit/", 429, {"Retry-After": "30"}, "asks for a pause.*HTTP 429.*again in 30 s.*wait"),
        ("/commit/", 500, {}, "the Hub failed.*HTTP 500.*run the same command again"),
    ],
)
def test_refusals(small: Path, hub: Hub, path: str, status: int, more: dict[str, str], says: str) -> None:
    hub.trouble("POST", path, "status", status=status, headers=more)
    fails(small, hub, says)
    assert hub.files(REPO) == {}
    send(small, hub)
    assert hub.files(REPO) == contents(small)


@pytest.mark.parametrize("token", [None, "hf_wrong", READ_TOKEN])
def test_who_may_not_write(small: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str | None) -> None:
    monkeypatch.setenv("HF_TOKEN", token or "")
    if token == READ_TOKEN:
        fails(small, hub, "not allowed.*rights to create.*right to write")
    else:
        fails(small, hub, "not logged in.*hf auth login")
    assert hub.repositories == {}


def test_somebody_elses_namespace(small: Path, hub: Hub) -> None:
    with pytest.raises(HubError, match=r"(?s)not allowed.*somebody else's namespace"):
        upload(small, "another/name")


def test_no_hub(small: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    at_endpoint("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(HubError, match=r"(?s)broken connection.*run the same command again"):
        upload(small, REPO)


def test_the_token_is_told_to_nobody(
    small: Path, hub: Hub, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.trouble("POST", "/commit/", "status", status=403)
    error = fails(small, hub, "not allowed")
    send(small, hub)
    out = capfd.readouterr()
    said = "".join([caplog.text, out.out, out.err, str(error), repr(error.__cause__)])
    assert len(caplog.records) > 10
    assert TOKEN not in said
    assert all(TOKEN.encode() not in content for content in hub.files(REPO).values())


def test_other_dictionaries_are_not_replaced(small: Path, other: Path, hub: Hub) -> None:
    send(small, hub)
    fails(other, hub, rf"other dictionaries are there.*got: {SPLIT} \(\w+\).*limit: {SPLIT} \(\w+\).*--force")
    assert hub.files(REPO) == contents(small)
    send(other, hub, force=True)
    assert hub.files(REPO) == contents(other)


def test_the_same_dictionary_written_by_another_version(small: Path, hub: Hub, tmp_path: Path) -> None:
    send(small, hub)
    folder = tmp_path / "out"
    shutil.copytree(small, folder)
    config = folder / SPLIT / "cfg.json"
    config.write_text(config.read_text().replace('"trained_by": "ksvd-sae ', '"trained_by": "ksvd-sae 9'))
    Manifest.of(folder, [SPLIT]).write(folder)
    assert contents(folder) != contents(small)
    send(folder, hub)
    assert hub.files(REPO) == contents(folder)


def test_what_was_published_before_stays_named(small: Path, published: Published, hub: Hub) -> None:
    """More of the same run may come later; less of it would take an SAE away."""
    send(small, hub)
    send(published.folder, hub)
    assert hub.files(REPO) == contents(published.folder)
    fails(small, hub, "other dictionaries are there")
    send(small, hub, force=True)
    assert hub.files(REPO) == contents(small), "and nothing of the larger is left"


def test_files_of_somebody_else(small: Path, hub: Hub) -> None:
    hub.put(REPO, {"README.md": b"mine", "notes.txt": b"mine"})
    fails(small, hub, r"did not write.*got: README\.md\n.*--force")
    assert hub.files(REPO) == {"README.md": b"mine", "notes.txt": b"mine"}
    send(small, hub, force=True)
    assert hub.files(REPO) == {**contents(small), "notes.txt": b"mine"}


def test_a_manifest_that_is_none_of_ours(small: Path, hub: Hub) -> None:
    hub.put(REPO, {"manifest.json": b'{"files": ["notes.txt"]}', "notes.txt": b"mine"})
    with pytest.raises(ManifestError, match="none that"):
        send(small, hub)
    send(small, hub, force=True)
    assert hub.files(REPO) == {**contents(small), "notes.txt": b"mine"}


def test_a_change_meanwhile(small: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at what is there and the commit."""
    check = module._check_there

    def late(*arguments: Any) -> None:
        check(*arguments)
        hub.put(REPO, {"notes.txt": b"mine"})

    monkeypatch.setattr(module, "_check_there", late)
    fails(small, hub, "changed meanwhile, and nothing of this upload is in it.*commit has happened")
    assert hub.files(REPO) == {"notes.txt": b"mine"}


def test_private(small: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    send(small, hub, private=True)
    assert hub.repositories[REPO].private
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(HubError, match="no such repository"):
        load(REPO, SPLIT)
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert load(REPO, SPLIT).cfg.d_sae == 48


def test_a_public_repository_is_not_taken_for_a_private_one(small: Path, hub: Hub) -> None:
    hub.put(REPO, {".gitattributes": b""})
    fails(small, hub, "the repository is public", private=True)
    assert hub.files(REPO) == {}


def test_a_branch(small: Path, other: Path, hub: Hub) -> None:
    send(small, hub)
    hub.repositories[REPO].branches["old"] = hub.put("x/y", {})
    send(other, hub, revision="v2", force=True)
    assert hub.files(REPO) == contents(small)
    assert hub.files(REPO, "v2") == contents(other)
    x_BD = raw_activations(50)
    saes = [load(REPO, SPLIT, revision=revision) for revision in (None, "main", "v2")]
    assert torch.equal(saes[0].W_dec, saes[1].W_dec)
    assert not torch.equal(saes[0].encode(x_BD), saes[2].encode(x_BD))
    commit = hub.repositories[REPO].branches["v2"]
    assert torch.equal(load(REPO, SPLIT, revision=commit).W_dec, saes[2].W_dec)


def test_a_branch_of_a_new_repository(small: Path, hub: Hub) -> None:
    send(small, hub, revision="v1")
    assert hub.files(REPO) == {}
    assert hub.files(REPO, "v1") == contents(small)


def test_a_folder_that_was_changed(small: Path, hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(small, folder)
    (folder / "README.md").write_text("better")
    with pytest.raises(ManifestError, match=r"(?s)README\.md is not the file.*publish again"):
        send(folder, hub)
    (folder / "README.md").unlink()
    with pytest.raises(ManifestError, match=r"no README\.md in"):
        send(folder, hub)
    assert hub.asked == []
