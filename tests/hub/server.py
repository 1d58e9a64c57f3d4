"""A Hub on the loopback: the part of its HTTP API that huggingface_hub's client uses for what we publish and load.

Repositories are commits of whole file trees; large files are kept by their SHA-256, and a commit may only name those
that are there. It can be told to fail, to stall, to cut connections and to damage what it sends.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

TOKEN, READ_TOKEN = "hf_abcdefghijklmnopqrstuvwxyz", "hf_mayonlyreadmayonlyreadmayonly"
OWNER = "somebody"
_LARGE = (".safetensors", ".png")

Kind = Literal["status", "cut", "lose", "stall", "half", "damage"]


@dataclass
class Trouble:
    """What happens to requests that fit, as often as ``times`` says.

    status: answered with this status. cut: no answer and nothing done. lose: done, but no answer. stall: no answer
    until the server ends. half: half of the body is sent. damage: a byte of the body is another.
    """

    method: str
    path: str
    kind: Kind
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1


@dataclass
class Repository:
    """branches: name -> commit. commits: its hash -> path -> content."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        known = json.dumps([branch, len(self.commits), {name: sha256(content) for name, content in files.items()}])
        sha = hashlib.sha1(known.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = dict(files), sha
        return sha

    def at(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Hub:
    """The server's side.

    asked: (method, path) of every request. sent: bytes of what was put here. resumed: where downloads went on.
    """

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    troubles: list[Trouble] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    ended: Event = field(default_factory=Event)
    lock: Any = field(default_factory=Lock)

    def trouble(self, method: str, path: str, kind: Kind, **more: Any) -> None:
        self.troubles.append(Trouble(method, path, kind, **more))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Without what the Hub itself puts into a new repository."""
        repository = self.repositories[repo_id]
        files = repository.commits[repository.at(revision) or ""]
        return {name: content for name, content in files.items() if name != ".gitattributes"}

    def put(self, repo_id: str, files: dict[str, bytes], branch: str = "main", private: bool = False) -> str:
        """Files as somebody else would commit them; the commit."""
        repository = self.repositories.setdefault(repo_id, Repository(private))
        before = repository.commits.get(repository.branches.get(branch, ""), {})
        return repository.commit(branch, {**before, **files})

    def count(self, method: str, path: str) -> int:
        return sum(method == how and bool(re.search(path, what)) for how, what in self.asked)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def oid(name: str, content: bytes) -> str:
    """By which the client knows that a file is the same: SHA-256 of large ones, git's hash of the others."""
    if name.endswith(_LARGE):
        return sha256(content)
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def log_message(self, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.asked.append((self.command, path))
            trouble = next((t for t in self.hub.troubles if self._fits(t, path)), None)
            if trouble is not None:
                trouble.times -= 1
        kind = None if trouble is None else trouble.kind
        if kind == "stall":
            self.hub.ended.wait(60)
        if kind in ("stall", "cut"):
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if trouble is not None and kind == "status":
            self._send(trouble.status, {"error": "as the test says"}, trouble.headers)
            return
        with self.hub.lock:
            status, content, headers = self._answer(path, body)
        if kind == "lose":
            self.close_connection = True
            return
        self._send(status, content, headers, kind)

    def _fits(self, trouble: Trouble, path: str) -> bool:
        return trouble.times > 0 and trouble.method == self.command and bool(re.search(trouble.path, path))

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None, kind: Kind | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind == "damage":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if kind == "half":
            body, self.close_connection = body[: len(body) // 2], True
        self.wfile.write(body)

    # ------------------------------------------------------------ what the Hub does

    def _answer(self, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        known = token in (TOKEN, READ_TOKEN)
        if token and not known:
            return 401, {}, {"X-Error-Message": "Invalid credentials in Authorization header"}
        if path == "/api/whoami-v2":
            return (200, {"name": OWNER, "type": "user"}, {}) if known else (401, {}, {})
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if found := re.fullmatch(r"/upload/(\w+)", path):
            return self._keep(found[1], body)
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = f"{asked.get('organization') or OWNER}/{asked['name']}"
            private = asked.get("private") or asked.get("visibility") == "private"
            return self._create(repo_id, bool(private), token)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|preupload|commit|branch)/(.+))?", path):
            return self._api(found[1], found[2] or "revision", found[3] or "main", body, token)
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body)) if token == TOKEN else (403, {}, {})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(found[1], found[2], found[3], known)
        return 404, {"error": path}, {}

    def _create(self, repo_id: str, private: bool, token: str) -> tuple[int, Any, dict[str, str]]:
        if token != TOKEN or not repo_id.startswith(f"{OWNER}/"):
            return 403, {}, {"X-Error-Message": "You don't have the rights to create a model under this namespace"}
        address = {"url": f"{self.hub.endpoint}/{repo_id}"}
        if repo_id in self.hub.repositories:
            return 409, {"error": "You already created this model repo", **address}, {}
        self.hub.put(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return 200, address, {}

    def _api(self, repo_id: str, what: str, revision: str, body: bytes, token: str) -> tuple[int, Any, dict[str, str]]:
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and token not in (TOKEN, READ_TOKEN)):
            return 404, {}, {"X-Error-Code": "RepoNotFound"}
        if what != "revision" and token != TOKEN:
            return 403, {}, {"X-Error-Message": "Forbidden: pass a token with write access"}
        if what == "branch":
            repository.branches.setdefault(revision, repository.branches["main"])
            return 200, {}, {}
        commit = repository.at(revision)
        if commit is None:
            return 404, {}, {"X-Error-Code": "RevisionNotFound"}
        files = repository.commits[commit]
        if what == "revision":
            siblings = [{"rfilename": name} for name in files]
            return 200, {"id": repo_id, "sha": commit, "private": repository.private, "siblings": siblings}, {}
        if what == "preupload":
            return 200, {"files": [self._mode(asked["path"], files) for asked in json.loads(body)["files"]]}, {}
        return self._commit(repository, repo_id, revision, files, [json.loads(line) for line in body.splitlines()])

    def _mode(self, name: str, files: dict[str, bytes]) -> dict[str, Any]:
        mode = "lfs" if name.endswith(_LARGE) else "regular"
        there = {"oid": oid(name, files[name])} if name in files else {}
        return {"path": name, "uploadMode": mode, "shouldIgnore": False, **there}

    def _batch(self, asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        objects = []
        for one in asked["objects"]:
            there = one["oid"] in self.hub.large
            # As the Hub's storage does it, with what lets anybody write there for a while.
            href = f"{self.hub.endpoint}/upload/{one['oid']}?X-Amz-Signature=secret"
            objects.append({**one} if there else {**one, "actions": {"upload": {"href": href}}})
        return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def _keep(self, expected: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if sha256(body) != expected:
            return 400, {"error": "another hash"}, {}
        self.hub.large[expected] = body
        self.hub.sent.append(len(body))
        return 200, {}, {}

    def _commit(
        self, repository: Repository, repo_id: str, branch: str, files: dict[str, bytes], lines: list[dict[str, Any]]
    ) -> tuple[int, Any, dict[str, str]]:
        new, parent = dict(files), lines[0]["value"].get("parentCommit")
        if parent is not None and parent != repository.branches[branch]:
            return 412, {"error": "A commit has happened since. Please refresh and try again."}, {}
        for line in lines[1:]:
            name = line["value"]["path"]
            if line["key"] == "file":
                new[name] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                if line["value"]["oid"] not in self.hub.large:
                    return 400, {"error": f"{name}: no such large file"}, {}
                new[name] = self.hub.large[line["value"]["oid"]]
            else:
                del new[name]
        commit = repository.commit(branch, new)
        return 200, {"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{commit}", "commitOid": commit}, {}

    def _resolve(self, repo_id: str, revision: str, name: str, known: bool) -> tuple[int, Any, dict[str, str]]:
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and not known):
            return 404, {}, {"X-Error-Code": "RepoNotFound"}
        commit = repository.at(revision)
        if commit is None:
            return 404, {}, {"X-Error-Code": "RevisionNotFound"}
        content = repository.commits[commit].get(name)
        if content is None:
            return 404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
        headers = {"X-Repo-Commit": commit, "ETag": f'"{oid(name, content)}"', "Accept-Ranges": "bytes"}
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start, whole = int(found[1]), len(content)
            self.hub.resumed.append(start)
            return 206, content[start:], {**headers, "Content-Range": f"bytes {start}-{whole - 1}/{whole}"}
        return 200, content, {**headers, "Content-Type": "application/octet-stream"}


@contextmanager
def served() -> Iterator[Hub]:
    """A Hub without repositories."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answer", (_Answer,), {"hub": hub}))
    # Requests that stall are not waited for.
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()
