"""Repositories as the Hugging Face Hub has them: in the Hub's cache on disk, or behind a server on the loopback."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from torch import Tensor

COMMIT = "a" * 40
GATED, PRIVATE = "someone/gated", "someone/private"


def offline_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point huggingface_hub at ``cache``, with nothing to connect to."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    new_sessions()


def new_sessions() -> None:
    """Let huggingface_hub read its settings again; from 1.0 on the function has another name."""
    utils = huggingface_hub.utils
    (utils.close_session if hasattr(utils, "close_session") else utils.reset_sessions)()


def write_repository(cache: Path, repo_id: str, files: dict[str, bytes], commit: str = COMMIT) -> Path:
    """One revision of a repository in the Hub's cache layout; returns its snapshot."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    for name, content in files.items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(content)
    return snapshot


@contextmanager
def served_hub(repositories: dict[str, dict[str, bytes]]) -> Iterator[tuple[str, list[str]]]:
    """A server that answers for files as the Hub does; gives its address, and the paths that were asked for.

    Every repository has one commit, COMMIT, which is also its main.
    """
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            content = self._answer()
            if content is not None:
                self.wfile.write(content)

        def _answer(self) -> bytes | None:
            asked.append(self.path)
            owner, name, _, revision, *path = self.path.strip("/").split("/")
            files = repositories.get(f"{owner}/{name}")
            if f"{owner}/{name}" == GATED:
                return self._refuse(403, "GatedRepo")
            if files is None:
                return self._refuse(404, "RepoNotFound")
            if revision not in ("main", COMMIT):
                return self._refuse(404, "RevisionNotFound")
            content = files.get("/".join(path))
            if content is None:
                return self._refuse(404, "EntryNotFound")
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{abs(hash(content)):040x}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            return content

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def dictionary_learning_files(
    folder: str, tensors: dict[str, Tensor], trainer: dict[str, Any], buffer: dict[str, Any] | None = None
) -> dict[str, bytes]:
    """config.json and ae.pt as dictionary_learning writes them."""
    import io

    checkpoint = io.BytesIO()
    torch.save(tensors, checkpoint)
    config = {"trainer": trainer, "buffer": buffer or {}}
    return {f"{folder}/config.json": json.dumps(config).encode(), f"{folder}/ae.pt": checkpoint.getvalue()}
