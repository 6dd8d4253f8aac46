"""A stand-in of the hub's HTTP API on this machine: enough for creating, filling and reading a model repository."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_standin" + "0" * 24
LARGE = (".safetensors",)  # what the hub keeps in its large-file store


class Hub(ThreadingHTTPServer):
    """The repositories, what was asked, and what goes wrong: `failures` maps a part of a path to (status, text)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.role = "write"
        self.repos: dict[str, dict[str, Any]] = {}
        self.store: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.failures: dict[str, tuple[int, str]] = {}
        self.loses: str | None = None  # a file that a commit silently leaves out

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return dict(self.repos[repo]["branches"][branch])

    def asked_for(self, part: str) -> int:
        return sum(part in path for _, path in self.asked)


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _answer(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/agent-harnesses":  # the library's own curiosity, once a process
            return self._send(200, {})
        self.server.asked.append((method, path))
        if not path.startswith("/store/"):
            self.server.tokens.add(self.headers.get("authorization"))
        for part, (status, text) in self.server.failures.items():
            if part in path:
                return self._send(status, {"error": text}, {"X-Error-Message": text})
        for pattern, handler in ROUTES:
            if match := re.fullmatch(pattern, path):
                return handler(self, body, **match.groupdict())
        return self._send(404, {"error": f"no {method} {path}"})

    def _send(self, status: int, tree: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(tree).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):
            self.wfile.write(content)

    def whoami(self, _: bytes) -> None:
        self._send(200, {"name": "me", "type": "user", "auth": {"accessToken": {"role": self.server.role}}})

    def create(self, body: bytes) -> None:
        tree = json.loads(body)
        repo = f"{tree.get('organization') or 'me'}/{tree['name']}"
        answer = {"url": f"{self.server.url}/{repo}"}
        if repo in self.server.repos:
            return self._send(409, {**answer, "error": "You already created this model repo"})
        private = tree.get("visibility") == "private"
        first = {".gitattributes": b"*.safetensors filter=lfs\n"}
        self.server.repos[repo] = {"private": private, "branches": {"main": first}, "created": tree}
        return self._send(200, answer)

    def info(self, _: bytes, repo: str) -> None:
        if repo not in self.server.repos:
            return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return self._send(200, {"id": repo, "private": self.server.repos[repo]["private"], "sha": "0" * 40})

    def branch(self, _: bytes, repo: str, branch: str) -> None:
        branches = self.server.repos[repo]["branches"]
        if branch in branches:
            return self._send(409, {"error": "exists"})
        branches[branch] = dict(branches["main"])
        return self._send(200, {})

    def yaml(self, body: bytes) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, branch: str) -> None:
        known = self.server.files(repo, branch)
        answers = []
        for file in json.loads(body)["files"]:
            name = file["path"]
            answer = {"path": name, "uploadMode": "lfs" if name.endswith(LARGE) else "regular", "shouldIgnore": False}
            if name in known:
                entry = _entry(name, known[name])
                answer["oid"] = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            answers.append(answer)
        self._send(200, {"files": answers})

    def batch(self, body: bytes, repo: str) -> None:
        objects = []
        for one in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/store/{one['oid']}"}}
            objects.append(one if one["oid"] in self.server.store else {**one, "actions": upload})
        self._send(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._send(400, {"error": "another content"})
        self.server.store[oid] = body
        return self._send(200, {})

    def commit(self, body: bytes, repo: str, branch: str) -> None:
        files = self.server.repos[repo]["branches"][branch]
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] != "header" and value["path"] == self.server.loses:
                continue
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server.store[value["oid"]]
        self._send(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{'1' * 40}", "commitOid": "1" * 40})

    def tree(self, _: bytes, repo: str, branch: str) -> None:
        self._send(200, [_entry(name, content) for name, content in self.server.files(repo, branch).items()])

    def paths(self, body: bytes, repo: str, branch: str) -> None:
        files = self.server.files(repo, branch)
        wanted = parse_qs(body.decode())["paths"]
        self._send(200, [_entry(name, files[name]) for name in wanted if name in files])


def _entry(name: str, content: bytes) -> dict[str, Any]:
    sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": sha1}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


NAME = r"(?P<repo>[^/]+/[^/]+?)"
ROUTES = [
    (r"/api/whoami-v2", Answers.whoami),
    (r"/api/repos/create", Answers.create),
    (r"/api/validate-yaml", Answers.yaml),
    (rf"/api/models/{NAME}", Answers.info),
    (rf"/api/models/{NAME}/revision/.+", Answers.info),
    (rf"/api/models/{NAME}/branch/(?P<branch>.+)", Answers.branch),
    (rf"/api/models/{NAME}/preupload/(?P<branch>.+)", Answers.preupload),
    (rf"/api/models/{NAME}/commit/(?P<branch>.+)", Answers.commit),
    (rf"/api/models/{NAME}/tree/(?P<branch>.+)", Answers.tree),
    (rf"/api/models/{NAME}/paths-info/(?P<branch>.+)", Answers.paths),
    (rf"/{NAME}\.git/info/lfs/objects/batch", Answers.batch),
    (r"/store/(?P<oid>[0-9a-f]{64})", Answers.put),
]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """The stand-in, running, with huggingface_hub turned to it and a token at hand."""
    from huggingface_hub import constants

    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its own protocol, to its own servers
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path_factory.mktemp("home") / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
