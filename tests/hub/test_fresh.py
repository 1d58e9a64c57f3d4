"""Publish and load as users do, each in a process of its own that talks to a Hub by HF_ENDPOINT."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ksvd_sae.hub.layout import Manifest
from ksvd_sae.hub.load import load
from tests.command_line import REPOSITORY
from tests.hub.conftest import HOOK, REPO, Published
from tests.hub.server import TOKEN, Hub, served
from tests.tiny_shards import raw_activations

SAMPLES = "samples.safetensors"
# The card's own lines are run as they are printed, and whatever SAE they have made is asked for codes.
OURS = """
import sys
from safetensors.torch import load_file, save_file
codes = {}
for name, lines in zip(("load", "from_pretrained"), sys.stdin.read().split("=====")):
    known = {}
    exec(lines, known)
    sae = known["sae"]
    codes[name] = sae.encode(load_file("samples.safetensors")["x"]).detach()
    if "latents" in known:
        assert known["latents"].shape == (4, sae.cfg.d_sae), known["latents"].shape
save_file(codes, "codes.safetensors")
"""
PUBLISH = """
import sys
from ksvd_sae.cli import app
source, repository = sys.argv[1:]
words = ["publish", source, repository, "--license", "mit", "-v"]
app([*words, "--dictionary", "learned", "--folder", "shown"], standalone_mode=False)
print("=====")
app([*words, "--view", "both", "--upload"], standalone_mode=False)
"""
STOCK = f"""
import json, sys
from safetensors.torch import load_file, save_file
from sae_lens import SAE
assert "ksvd_sae" not in sys.modules
try:
    SAE.from_pretrained("{REPO}", "{HOOK}/learned/split")
except KeyError as error:
    print(error)
from huggingface_hub import hf_hub_download
with open(hf_hub_download("{REPO}", "{HOOK}/learned/split/cfg.json")) as file:
    print(json.load(file)["metadata"]["needs"])
x = load_file("samples.safetensors")["x"]
names = {{"steps": "{HOOK}/steps/matching_pursuit", "linear": "{HOOK}/linear/nonnegative"}}
codes = {{name: SAE.from_pretrained("{REPO}", sae_id).encode(x).detach() for name, sae_id in names.items()}}
save_file({{name: code.contiguous() for name, code in codes.items()}}, "codes.safetensors")
assert "ksvd_sae" not in sys.modules
"""


@pytest.fixture(scope="module")
def elsewhere(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Path, str]]:
    """A Hub to which the command has published the run, a folder with samples, and what the command said."""
    folder = tmp_path_factory.mktemp("elsewhere")
    save_file({"x": raw_activations(200)}, folder / SAMPLES)
    with served() as hub:
        cache = published.folder.parent / "cache"
        said = run(hub, folder, "-c", PUBLISH, str(published.results), REPO, token=TOKEN, KSVD_SAE_CACHE=str(cache))
        yield hub, folder, said


def run(hub: Hub, folder: Path, *words: str, text: str = "", token: str = "", **more: str) -> str:
    """What a fresh Python prints, both streams."""
    known = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "HUGGINGFACE"))}
    known |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "hf-home"), "PYTHONPATH": str(REPOSITORY)}
    known |= {"HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "1000", **more}
    command = [sys.executable, "-W", "ignore", *words]
    done = subprocess.run(command, input=text, cwd=folder, env=known, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_publish(elsewhere: tuple[Hub, Path, str], published: Published) -> None:
    hub, folder, said = elsewhere
    here = {str(p.relative_to(published.folder)): p.read_bytes() for p in published.folder.rglob("*") if p.is_file()}
    assert hub.files(REPO) == here
    assert re.search(rf"\d+  {HOOK}/learned/split/cfg\.json\n", said)
    assert f"bytes in published/{REPO}" in said
    assert f"{hub.endpoint}/{REPO}/commit/" in said
    assert TOKEN not in said
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []


def test_nothing_is_sent_unless_asked(elsewhere: tuple[Hub, Path, str]) -> None:
    hub, folder, said = elsewhere
    shown = said.split("=====")[0]
    assert f"nothing was sent; the same command with --upload sends it to {REPO}" in shown
    # With this every upload begins; what clients from 2.4 on ask for at their first request comes before it.
    assert hub.count("GET", "/api/whoami-v2") == 1
    assert next(what for _, what in hub.asked if what != "/api/agent-harnesses") == "/api/whoami-v2"
    manifest = Manifest.read(folder / "shown" / "manifest.json", "test")
    assert list(manifest.saes) == [f"{HOOK}/learned/split", f"{HOOK}/linear/nonnegative"]
    listed = {
        name: int(size.replace(",", "")) for size, name in re.findall(r"^ *([\d,]+)  (\S+)$", shown, re.MULTILINE)
    }
    assert listed == {name: (folder / "shown" / name).stat().st_size for name in (*manifest.files, "manifest.json")}


def test_the_cards_lines_run(elsewhere: tuple[Hub, Path, str], published: Published) -> None:
    hub, folder, _ = elsewhere
    snippets = re.findall(r"```python\n(.*?)```", hub.files(REPO)["README.md"].decode(), re.DOTALL)
    assert [len(lines.splitlines()) for lines in snippets] == [3, 3]
    run(hub, folder, "-c", OURS, text="=====".join(snippets))
    codes = load_file(folder / "codes.safetensors")
    here = load(published.folder, f"{HOOK}/learned/split").encode(raw_activations(200))
    assert torch.equal(codes["load"], here)
    assert torch.equal(codes["from_pretrained"], here)


def test_saelens_without_us(elsewhere: tuple[Hub, Path, str], published: Published) -> None:
    """The name is all that SAELens says; what to do is in the metadata. What stands beside loads."""
    hub, folder, _ = elsewhere
    name, needs = run(hub, folder, "-c", STOCK).splitlines()[:2]
    assert name == "'db_ksvd'"
    assert "import ksvd_sae" in needs
    codes, x_BD = load_file(folder / "codes.safetensors"), raw_activations(200)
    assert torch.equal(codes["steps"] != 0, load(published.folder, f"{HOOK}/steps/split").encode(x_BD) != 0)
    assert torch.equal(codes["linear"], load(published.folder, f"{HOOK}/linear/nonnegative").encode(x_BD))
