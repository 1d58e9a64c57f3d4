"""The offline model: real weights out of Python packages, converted once, and the loss that they must have.

Everything runs in processes of its own, since the Hub libraries read where their cache is at their import. The
conversion goes into the cache that the demo uses, so a machine pays for it once.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ksvd_sae.offline.gemma import CHECK_LOSS, CHECK_TOLERANCE, hub_home
from tests.command_line import environment

# Runs of blanks, line ends, accents, other scripts, what no vocabulary has, and special tokens' own names.
STRINGS = (
    "The government announced on Tuesday",
    "  two blanks,\n\n\ttabs and\nlines  ",
    "Z\u00fcrich na\u00efve caf\u00e9 \u2014 \u00a310m (\u20ac12m)",
    "\u65e5\u672c\u8a9e \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \U0001f9d1\u200d\U0001f4bb \U00012000",
    "def f(x):\n    return x**2  # 3.14159",
    "a<b>c <bo s> end",
    "",
)

USE = """
import json, os, sys
from pathlib import Path
from ksvd_sae.offline.gemma import CHECK_SENTENCE, MODEL_NAME, hub_home, prepare_gemma

prepare_gemma()
import torch
from transformer_lens import HookedTransformer

# n_ctx: without it TransformerLens makes attention masks for 8192 tokens in each of the 18 blocks.
model = HookedTransformer.from_pretrained_no_processing(MODEL_NAME, device="cpu", dtype=torch.float32, n_ctx=64)
with torch.no_grad():
    loss = float(model(CHECK_SENTENCE, return_type="loss", prepend_bos=True))
tokenizer = model.tokenizer
strings = json.loads(sys.argv[1])
encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in strings]
print(json.dumps({
    "loss": loss,
    "decoded": [tokenizer.decode(ids) for ids in encoded],
    "pieces": tokenizer.convert_ids_to_tokens(tokenizer(" government", add_special_tokens=False)["input_ids"]),
    "first": tokenizer(CHECK_SENTENCE)["input_ids"][:2],
    "bos": tokenizer.bos_token_id,
    "sizes": [model.cfg.n_layers, model.cfg.d_model, model.cfg.d_vocab],
    "hf_home": os.environ["HF_HOME"],
}))
"""

CONVERT_ALTERED = """
import json
from ksvd_sae.errors import KsvdSaeError
from ksvd_sae.offline import gemma

gemma.GGUF_SHA256 = "0" * 64
try:
    gemma.prepare_gemma()
except KsvdSaeError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""

TOO_LATE = """
import json
import huggingface_hub
from ksvd_sae.errors import KsvdSaeError
from ksvd_sae.offline import gemma

try:
    gemma.prepare_gemma()
except KsvdSaeError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


WHERE = """
import json, sys
from pathlib import Path
from ksvd_sae.offline.gemma import use_offline_hub

use_offline_hub(Path(sys.argv[1]))
from datasets import config
from huggingface_hub import constants
from transformers.utils import hub

print(json.dumps({
    "huggingface_hub": constants.HF_HUB_CACHE,
    # Its own until transformers 5.
    "transformers": getattr(hub, "TRANSFORMERS_CACHE", constants.HF_HUB_CACHE),
    "offline": constants.HF_HUB_OFFLINE,
    "datasets": str(config.HF_DATASETS_CACHE),
}))
"""


def run(code: str, *arguments: str, hf_home: Path, cache: Path | None, threads: int = 1, **variables: str) -> Any:
    """What the last line of a Python process prints, as JSON."""
    variables = {**environment(hf_home=hf_home, cache=cache, threads=threads), "HF_HUB_OFFLINE": "0", **variables}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


READ = """
import json, sys
import gguf
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

writer = gguf.GGUFWriter(sys.argv[1], "gemma3")
writer.add_block_count(1)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
readers = []

class Reader(gguf.GGUFReader):
    def __init__(self, path):
        readers.append(path)
        super().__init__(path)

gguf.GGUFReader = Reader
for _ in range(2):
    load_gguf_checkpoint(sys.argv[1], return_tensors=False)
print(json.dumps(readers))
"""


@pytest.fixture(scope="module")
def user_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The HF_HOME of a user, with something in it."""
    home = tmp_path_factory.mktemp("hf-home")
    (home / "token").write_text("mine")
    return home


@pytest.fixture(scope="module")
def model(user_home: Path) -> dict[str, Any]:
    """What a process finds that prepares the model and loads it by name."""
    found: dict[str, Any] = run(USE, json.dumps(STRINGS), hf_home=user_home, cache=None, threads=2)
    return found


def test_the_loss_is_the_published_models(model: dict[str, Any]) -> None:
    assert model["loss"] == pytest.approx(CHECK_LOSS, abs=CHECK_TOLERANCE)
    assert (CHECK_LOSS, CHECK_TOLERANCE) == (2.538, 0.01)
    assert model["sizes"] == [18, 640, 262_144]


@pytest.mark.parametrize("index", range(len(STRINGS)))
def test_text_comes_back_from_its_tokens(model: dict[str, Any], index: int) -> None:
    assert model["decoded"][index] == STRINGS[index]


def test_words_are_cut_as_gemma_cuts_them(model: dict[str, Any]) -> None:
    assert model["pieces"] == ["▁government"]
    assert model["first"][0] == model["bos"]
    assert model["first"][1] != model["bos"]


def test_the_users_hub_cache_is_untouched(model: dict[str, Any], user_home: Path) -> None:
    assert model["hf_home"] == str(hub_home())
    assert [path.name for path in user_home.rglob("*")] == ["token"]


def test_altered_weights_leave_no_half_snapshot(tmp_path: Path) -> None:
    kind, message = run(CONVERT_ALTERED, hf_home=tmp_path / "user", cache=tmp_path / "cache")
    assert kind == "ShardError"
    assert "SHA-256" in message
    assert "0" * 64 in message
    left = [path for path in (tmp_path / "cache").rglob("*") if not path.is_dir()]
    assert left == []
    assert not (tmp_path / "user").exists()
    snapshots = list((tmp_path / "cache").rglob("snapshots"))
    assert len(snapshots) == 1
    assert list(snapshots[0].iterdir()) == []


def test_called_too_late(tmp_path: Path) -> None:
    kind, message = run(TOO_LATE, hf_home=tmp_path / "user", cache=tmp_path / "cache")
    assert kind == "HubError"
    assert "before importing transformers" in message
    assert str(tmp_path / "user") in message
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("variable", ["HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"])
def test_older_variables_of_the_user_do_not_matter(tmp_path: Path, variable: str) -> None:
    home = tmp_path / "offline"
    places = run(WHERE, str(home), hf_home=tmp_path / "user", cache=None, **{variable: str(tmp_path / "mine")})
    assert places["offline"]
    assert {places["huggingface_hub"], places["transformers"]} == {str(home / "hub")}
    assert places["datasets"] == str(home / "datasets")


def test_transformers_reads_the_file_anew_each_time(user_home: Path, tmp_path: Path) -> None:
    """Once it does not, GGUFReader need not be replaced."""
    path = str(tmp_path / "model.gguf")
    assert run(READ, path, hf_home=user_home, cache=tmp_path) == [path, path]
