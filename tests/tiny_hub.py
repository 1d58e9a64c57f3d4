"""Repositories as the Hugging Face Hub has them: in the Hub's cache on disk, or behind a server on the loopback."""

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from torch import Tensor

COMMIT = "a" * 40
GATED, PRIVATE = "someone/gated", "someone/private"


def offline_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point huggingface_hub, and transformers if it is loaded, at ``cache``, with nothing to connect to."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    # transformers 4 has copies of its own.
    if (copies := sys.modules.get("transformers.utils.hub")) is not None:
        monkeypatch.setattr(copies, "TRANSFORMERS_CACHE", str(cache), raising=False)
        monkeypatch.setattr(copies, "_is_offline_mode", True, raising=False)
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

    with _serving(Answer) as endpoint:
        yield endpoint, asked


@contextmanager
def served_datasets(repositories: dict[str, dict[str, dict[str, bytes]]]) -> Iterator[tuple[str, list[str]]]:
    """As ``served_hub``, for data sets, whose files are listed too; of each, revision -> files.

    Every revision has a commit of its own: ``commit_of`` it.
    """
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self.wfile.write(self._answer())

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            names = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            self.wfile.write(self._answer(names))

        def _answer(self, names: list[str] | None = None) -> bytes:
            asked.append(self.path)
            path = unquote(urlsplit(self.path).path).strip("/")
            is_api = path.startswith("api/")
            owner, name, *rest = path.removeprefix("api/").removeprefix("datasets/").split("/")
            if f"{owner}/{name}" == GATED:
                return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
            revisions = repositories.get(f"{owner}/{name}")
            if revisions is None:
                return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            what, revision, *inside = rest or ["revision", "main"]
            by_commit = {commit_of(known): known for known in revisions}
            revision = by_commit.get(revision, revision)
            if revision not in revisions:
                return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            files, commit = revisions[revision], commit_of(revision)
            if not is_api:
                content = files.get("/".join(inside))
                if content is None:
                    return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return self._send(200, content, {"X-Repo-Commit": commit, "ETag": f'"{commit}{len(content)}"'})
            listed = [{"type": "file", "path": file, "oid": commit, "size": len(c)} for file, c in files.items()]
            if what == "paths-info":
                listed = [entry for entry in listed if entry["path"] in (names or ())]
            info = {"id": f"{owner}/{name}", "sha": commit, "siblings": [{"rfilename": file} for file in files]}
            return self._send(200, json.dumps(info if what == "revision" else listed).encode(), {})

        def _send(self, status: int, content: bytes, headers: dict[str, str]) -> bytes:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            return content

        def log_message(self, *args: Any) -> None:
            pass

    with _serving(Answer) as endpoint:
        yield endpoint, asked


def commit_of(revision: str) -> str:
    """The commit of a served data set's revision."""
    return hashlib.sha1(revision.encode()).hexdigest()


@contextmanager
def _serving(answer: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), answer)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
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
