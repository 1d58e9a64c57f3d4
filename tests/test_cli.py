"""The command line: help that shows an example, and mistakes that end in a message and exit code 1."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from sae_lens import TopKSAE
from typer.main import get_command
from typer.testing import CliRunner

from ksvd_sae import Coding, Dictionary, doctor, import_sae
from ksvd_sae.cli import app
from ksvd_sae.offline.gemma import MODEL_NAME
from ksvd_sae.run.pipeline import Run
from tests.command_line import REPOSITORY
from tests.methods.test_importing import made
from tests.methods.test_published_saes import trainer
from tests.tiny_hub import dictionary_learning_files, new_sessions, offline_hub, write_repository
from tests.tiny_saes import tiny_topk_sae

COMMANDS = (
    "plan",
    "harvest",
    "train",
    "evaluate",
    "compare",
    "run",
    "study",
    "efficiency",
    "curves",
    "contrast",
    "import",
    "unpack",
    "publish",
    "doctor",
    "bench",
)
CONFIG: dict[str, Any] = {
    "model": {"name": "gpt2", "hook": "blocks.8.hook_resid_post"},
    "text": {"source": "hub", "dataset": "owner/texts"},
    "harvest": {"train_tokens": 1000, "heldout_tokens": 100},
    "dictionaries": {"db-ksvd": {"kind": "db_ksvd", "n_atoms": 32, "k": 4}},
}


@pytest.fixture(autouse=True)
def _own_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command sets up logging and environment for its process, which here is the tests'."""
    for name in ("HF_DATASETS_TRUST_REMOTE_CODE", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "1")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KSVD_SAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    root, known = logging.getLogger(), dict(logging.getLogger().manager.loggerDict)
    levels = {name: logger.level for name, logger in known.items() if isinstance(logger, logging.Logger)}
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [h for h in root.handlers if h not in handlers]:
        root.removeHandler(handler)
    root.setLevel(level)
    for name, was in levels.items():
        logging.getLogger(name).setLevel(was)


def invoke(*words: str) -> Any:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, list(words))


def test_large_pages_are_asked_for_by_commands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/test_import.py: not by the import."""
    name = "THP_MEM_ALLOC_ENABLE"
    monkeypatch.setenv(name, "0")
    assert invoke("unpack", "--help").exit_code == 0
    assert os.environ[name] == "0", "the user's stays"
    monkeypatch.delenv(name)
    assert invoke("unpack", "--help").exit_code == 0
    assert os.environ[name] == "1"


def plain(text: str) -> str:
    """Without the terminal's colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def said(*words: str) -> str:
    """What a command that must fail says: exit code 1, no traceback, and nothing but our own message."""
    done = invoke(*words)
    assert done.exit_code == 1, done.output
    assert isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    return plain(done.stderr)


def changed(path: Path, key: str, value: Any) -> str:
    """A config file that differs from CONFIG in one (possibly nested) key."""
    raw = json.loads(json.dumps(CONFIG))
    node = raw
    *parents, last = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    path.write_text(yaml.safe_dump(raw))
    return str(path)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return str(path)


# ---------------------------------------------------------------- help


def test_every_command_is_tested_here() -> None:
    assert set(get_command(app).commands) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    done = invoke(command, "--help")
    assert done.exit_code == 0
    shown = " ".join(plain(done.output).split())
    assert f"Example: ksvd-sae {command}" in shown


@pytest.mark.parametrize(
    "command",
    ["harvest", "train", "evaluate", "compare", "run", "efficiency"],
)
def test_example_names_a_config_that_loads(command: str) -> None:
    """Here, in an empty folder: by its name."""
    from ksvd_sae.run.config import load_config

    shown = " ".join(plain(invoke(command, "--help").output).split())
    words = shown.split("Example: ")[1].split()
    overrides = [words[words.index("--set") + 1]] if "--set" in words else []
    assert load_config(words[2], overrides).name == words[2]


def test_help_lists_the_commands_in_path_order() -> None:
    lines = [line.strip(" │|") for line in plain(invoke("--help").output).splitlines()]
    listed = [line.split()[0] for line in lines if line and line.split()[0] in COMMANDS]
    assert listed == list(COMMANDS)


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("harvest.train_token", "harvest.train_tokens"),
        ("modle", "model"),
        ("dictionaries.db-ksvd.n_atom", "dictionaries.db-ksvd.n_atoms"),
        ("evaluation.core.datset", "evaluation.core.dataset"),
        ("evaluation.sparse_prob", "evaluation.sparse_probing"),
    ],
)
@pytest.mark.parametrize("command", ["train", "run"])
def test_unknown_key(tmp_path: Path, key: str, near: str, command: str) -> None:
    message = said(command, changed(tmp_path / "tiny.yaml", key, 5))
    assert "ConfigError" in message
    assert f"unknown key '{key}'" in message
    assert f"did you mean '{near}'?" in message


def test_unknown_key_that_is_like_no_other(tmp_path: Path) -> None:
    message = said("train", changed(tmp_path / "tiny.yaml", "harvest.zzzzzz", 5))
    assert "unknown key 'harvest.zzzzzz'" in message
    assert "train_tokens" in message


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("harvest.train_tokens", "many", ["harvest.train_tokens", "integer", "'many'"]),
        ("model", None, ["model"]),
        ("dictionaries", ["db_ksvd"], ["dictionaries"]),
        ("dictionaries.db-ksvd", {"n_atoms": 32, "k": 4}, ["dictionaries.db-ksvd", "kind"]),
        ("dictionaries.db-ksvd.k", 33, ["dictionaries.db-ksvd", "k = 33", "n_atoms = 32"]),
        # Names become names of files.
        ("dictionaries", {"db/ksvd": {"kind": "pca", "k": 2}}, ["db/ksvd"]),
        ("name", "../elsewhere", ["name", "elsewhere"]),
    ],
)
def test_wrong_value(tmp_path: Path, key: str, value: Any, expected: list[str]) -> None:
    message = said("train", changed(tmp_path / "tiny.yaml", key, value))
    assert "ConfigError" in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize("command", ["plan", "train", "evaluate", "compare", "run"])
@pytest.mark.parametrize(
    ("cells", "expected"),
    [("k=5", "no dictionary of this config has k=5"), ("n=4", "keys: dictionary, m, k"), ("k", "e.g. --cells m=")],
)
def test_cells_that_are_not_there(tmp_path: Path, command: str, cells: str, expected: str) -> None:
    message = said(command, changed(tmp_path / "tiny.yaml", "seed", 1), "--cells", cells)
    assert "ConfigError" in message
    assert expected in message


@pytest.mark.parametrize("content", [b"model: [unclosed", b"- a\n- b\n", b"", b"\xff\xfe\x00\x01"], ids=str)
def test_file_that_is_no_config(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd.yaml").write_bytes(content)
    message = said("train", "odd.yaml")
    assert "ConfigError" in message
    assert "odd.yaml: not" in message


def test_missing_file(config: str) -> None:
    message = said("train", "tyni.yaml")
    assert "tyni.yaml: no such file" in message
    assert "tiny.yaml" in message, "the configs that are there"
    for given in ("dmo", "eval_configs/demo.yaml"):
        assert "did you mean demo" in said("train", given), "those that come with the package"


def test_folder_for_a_file(tmp_path: Path) -> None:
    assert "ConfigError" in said("train", str(tmp_path))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("harvest.train_tokens", "not of the form key.sub=value"),
        ("harvest.train_tokens.more=5", "'train_tokens' holds a value"),
        ("harvest.train_tokens=[1", "not YAML"),
        ("harvest.train_token=5", "did you mean 'harvest.train_tokens'?"),
        ("harvest.train_tokens=5", "n_atoms = 32 is above harvest.train_tokens = 5"),
    ],
)
def test_bad_override(config: str, override: str, expected: str) -> None:
    message = said("train", config, "--set", override)
    assert "ConfigError" in message
    assert expected in message


def test_offline_source_has_one_model(tmp_path: Path) -> None:
    message = said("harvest", changed(tmp_path / "tiny.yaml", "model.source", "offline"))
    assert "ConfigError" in message
    assert "'gpt2'" in message
    assert MODEL_NAME in message


def test_as_a_process(tmp_path: Path) -> None:
    """The real exit code and the real streams."""
    path = changed(tmp_path / "tiny.yaml", "harvest.train_token", 5)
    done = subprocess.run(
        [sys.executable, "-m", "ksvd_sae.cli", "train", path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "did you mean 'harvest.train_tokens'?" in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- stages out of order


@pytest.mark.parametrize(
    ("command", "cure"),
    [
        ("train", "ksvd-sae harvest"),
        ("evaluate", "ksvd-sae train"),
        ("compare", "ksvd-sae evaluate"),
    ],
)
def test_stage_before_its_input(config: str, command: str, cure: str) -> None:
    message = said(command, config)
    assert "ManifestError" in message
    assert f"run `{cure}" in message


def test_so_far_before_there_is_anything(config: str) -> None:
    message = said("train", config, "--so-far")
    assert "ManifestError" in message
    assert "so far: no training tokens are collected" in message
    assert "`ksvd-sae harvest CONFIG` collects it" in message


def test_verbose_shows_the_traceback(config: str) -> None:
    done = invoke("compare", config, "--verbose")
    assert done.exit_code == 1
    assert "Traceback" in done.stderr


def test_interrupted(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(run: Run) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "harvest", interrupted)
    done = invoke("harvest", config)
    assert done.exit_code == 130
    assert "run the same command again" in done.stderr


def test_a_scheduler_that_ends_the_job(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def ended(run: Run) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise AssertionError("it went on")

    monkeypatch.setattr(Run, "harvest", ended)
    done = invoke("harvest", config)
    assert done.exit_code == 143
    assert "run the same command again" in done.stderr
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_bug_keeps_its_traceback(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(run: Run) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Run, "train", bug)
    done = invoke("train", config)
    assert isinstance(done.exception, ZeroDivisionError)


def test_results_folder_and_overrides_reach_the_run(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Run] = []
    monkeypatch.setattr(Run, "train", lambda run: seen.append(run) or [])
    done = invoke("train", config, "--results", "elsewhere", "--set", "seed=3", "--set", "harvest.outlier_factor=null")
    assert done.exit_code == 0, done.output
    (run,) = seen
    assert run.results == tmp_path.resolve() / "elsewhere" / "tiny"
    assert run.cache == tmp_path.resolve() / "cache"
    assert (run.config.seed, run.config.harvest.outlier_factor) == (3, None)


# ---------------------------------------------------------------- doctor


def examined() -> tuple[int, dict[str, str], str]:
    done = invoke("doctor")
    shown = plain(done.output)
    facts = dict(line.split(maxsplit=1) for line in shown.splitlines() if len(line.split()) > 1)
    return done.exit_code, facts, shown


def test_doctor_facts(tmp_path: Path) -> None:
    code, facts, shown = examined()
    assert code == 0, shown
    assert facts["numpy"] == numpy.__version__
    assert {"python", "torch", "sae-lens", "sae-bench", "transformers", "transformer-lens"} <= set(facts)
    assert facts["device"].startswith(("cpu, ", "cuda: "))
    assert facts["hub"] == "https://huggingface.co: not asked, HF_HUB_OFFLINE is set"
    assert facts["cache"].startswith(str(tmp_path / "cache"))
    assert facts["cache"].endswith("GiB free)")
    assert "working set" in shown
    assert not (tmp_path / "cache").exists(), "nothing is made"


def test_doctor_where_no_cache_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "access", lambda place, mode: place != tmp_path)
    code, _, shown = examined()
    assert code == 1
    assert f"{tmp_path} cannot be written. Mend: set KSVD_SAE_CACHE" in " ".join(shown.split())


@pytest.mark.timeout(120)
def test_doctor_with_a_relative_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KSVD_SAE_CACHE", "not/there/yet")
    code, facts, shown = examined()
    assert code == 0, shown
    assert "not/there/yet" in facts["cache"]


@contextmanager
def hub(status: int, content: bytes) -> Iterator[str]:
    """A server on the loopback that gives one answer to every request; its address."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    asked: list[str] = []
    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert asked
    assert all(path.startswith("/api/models") for path in asked)


@pytest.mark.parametrize(
    ("status", "content", "reachable"),
    [(200, b"[]", True), (200, b"<html>log in first</html>", False), (503, b"[]", False)],
    ids=["answers", "a portal's page", "out of service"],
)
def test_doctor_asks_the_hub(monkeypatch: pytest.MonkeyPatch, status: int, content: bytes, reachable: bool) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with hub(status, content) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint + "/")
        code, facts, _ = examined()
    assert code == 0
    assert facts["hub"].startswith(f"{endpoint}: {'reachable' if reachable else 'not reachable ('}")


def test_doctor_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    code, facts, _ = examined()
    assert code == 0
    assert facts["hub"].startswith(f"{endpoint}: not reachable (")
    assert "make demo" in facts["hub"]


def test_doctor_where_something_else_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that does not speak HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b"220 mail.example ready\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        code, facts, shown = examined()
        thread.join()
    assert code == 0, shown
    assert "not reachable (" in facts["hub"]


@pytest.mark.parametrize(
    ("requirement", "problem", "mend"),
    [
        ("numpy<1", "numpy", "pip install 'numpy<1'"),
        ("no-such-package>=2", "no-such-package is missing", "pip install 'no-such-package>=2'"),
    ],
)
def test_doctor_finds_versions_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, requirement: str, problem: str, mend: str
) -> None:
    lines = ["torch>=2", "no-such-extra>=1; extra == 'vision'", requirement]
    monkeypatch.setattr(doctor, "requires", lambda package: lines)
    code, _, shown = examined()
    assert code == 1
    assert shown.count("PROBLEM") == 1
    assert problem in shown
    assert mend in shown
    assert "working set" not in shown


# ---------------------------------------------------------------- import


def test_import_writes_a_dictionary(tmp_path: Path) -> None:
    sae = tiny_topk_sae()
    sae.save_model(tmp_path / "sae")
    done = invoke("import", "sae", "--coder", "mp", "--k", "3", "--signed", "--to", "dictionary")
    assert done.exit_code == 0, done.output
    assert "24 atoms of 16 dimensions; 0 rows of norm 0 left out; 0 near duplicates" in " ".join(
        plain(done.output).split()
    )
    loaded = Dictionary.load(tmp_path / "dictionary")
    assert loaded.coding == Coding(3, "mp")
    assert torch.equal(loaded.atoms_MD, import_sae(sae).atoms_MD)
    assert invoke("import", "sae", "--to", "dictionary").exit_code == 0
    assert Dictionary.load(tmp_path / "dictionary").coding == Coding(4, "omp", nonnegative=True)


def test_the_lines_of_its_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    page = (REPOSITORY / "docs" / "import.md").read_text()
    blocks = {kind: re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("sh", "python")}
    assert all(blocks.values())
    sae = made(TopKSAE, d_in=32, d_sae=64, k=20)
    sae.save_model(tmp_path / "saes" / "layer_9")
    tensors = {
        "encoder.weight": sae.W_enc.T,
        "decoder.weight": sae.W_dec.T,
        "encoder.bias": sae.b_enc,
        "b_dec": sae.b_dec,
    }
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    release = "saebench_gemma-2-2b_width-2pow12_date-0108"
    folder = "MatryoshkaBatchTopK_gemma-2-2b__0108/resid_post_layer_12/trainer_1"
    offline_hub(tmp_path / "hub", monkeypatch)
    request.addfinalizer(new_sessions)
    for repository, place in ((f"adamkarvonen/{release}", folder), ("someone/saes", "layer_12")):
        write_repository(tmp_path / "hub", repository, dictionary_learning_files(place, tensors, trainer("topk")))
    for line in blocks["sh"][1].splitlines():  # type: ignore[index]
        done = invoke(*line.split()[1:])
        assert done.exit_code == 0, done.output
        assert Dictionary.load(line.split()[-1]).n_atoms == 64
    names = {"x": torch.randn(50, 32)}
    exec(compile(blocks["python"][1], "import.md", "exec"), names)  # type: ignore[index]
    torch.testing.assert_close(names["sae"].decode(names["latents"]).detach(), names["x_hat"], rtol=1e-4, atol=1e-4)


def test_import_of_nothing_is_a_message() -> None:
    message = said("import", "nowhere", "--to", "dictionary")
    assert "importing nowhere: no SAE there" in message
    assert not Path("dictionary").exists()


# ---------------------------------------------------------------- studies


def test_study_without_a_file_is_a_message() -> None:
    assert "no such file" in said("study", "nowhere.yaml")


def test_study_of_a_layer_that_it_has_not_is_a_message() -> None:
    message = said("study", "study-engine", "--layer", "7")
    assert "no layer 7" in message
    assert "[9, 13]" in message


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"WORLD_SIZE": "2"}, "there is no RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": ""}, "there is no RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "two", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "not below WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "port"}, "MASTER_PORT"),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
def test_half_of_an_environment_of_torchrun(given: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    shown = said("run", "demo")
    assert words in shown
    assert "unset WORLD_SIZE" in shown


def test_a_command_for_one_process_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = invoke("plan", "demo")
    assert said.exit_code == 2
    assert "ksvd-sae plan is for one process; under torchrun: harvest, train, evaluate, compare, run" in " ".join(
        plain(said.output).split()
    )
