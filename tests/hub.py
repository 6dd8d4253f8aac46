"""A stand-in of the hub's HTTP API on this machine: enough for creating, filling, listing and downloading repositories.

Models are named OWNER/NAME, data sets datasets/OWNER/NAME. Large files are redirected to a store under another name of
the machine, as the hub does; it knows byte ranges, and can cut a connection short.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_standin" + "0" * 24
LARGE = (".safetensors", ".parquet")  # what the hub keeps in its large-file store
PIECE = 1 << 12


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
        self.known_tokens = {TOKEN}
        self.grants: set[str] = set()  # gated repositories that the token's account is let into
        self.failures: dict[str, tuple[int, str]] = {}
        self.loses: str | None = None  # a file that a commit silently leaves out
        self.cuts: list[int] = []  # bytes of a large file after which the next connections break
        self.stalls_at: int | None = None  # bytes of a large file after which nothing more comes for a while
        self.ignores_ranges = False
        self.spoils: str | None = None  # a large file (by its SHA-256) whose first byte arrives changed
        self.ranges: list[tuple[str, int]] = []  # large files sent: SHA-256, first byte
        self.store_tokens: set[str | None] = set()  # what the store was shown

    def add(
        self, repo: str, files: Mapping[str, bytes], *, branch: str = "main", gated: bool = False, private: bool = False
    ) -> str:
        """Put `files` on a branch of a repository, in place of what it held; the commit's SHA."""
        one = self.repos.setdefault(repo, {"private": private, "gated": gated, "branches": {}, "commits": {}})
        one["branches"][branch] = dict(files)
        one["commits"][_commit(files)] = dict(files)
        self.store.update({hashlib.sha256(c).hexdigest(): c for n, c in files.items() if n.endswith(LARGE)})
        return _commit(files)

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return dict(self.repos[repo]["branches"][branch])

    def at(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """The files at a branch or commit, None for none."""
        known = self.repos[repo]
        return known["branches"].get(revision, known.get("commits", {}).get(revision))

    def asked_for(self, part: str) -> int:
        return sum(part in path for _, path in self.asked)


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

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
        of_store = path.startswith("/store/")
        (self.server.store_tokens if of_store else self.server.tokens).add(self.headers.get("authorization"))
        for part, (status, text) in self.server.failures.items():
            if part in path:
                return self._send(status, {"error": text}, {"X-Error-Message": text})
        for pattern, handler in READING if method in ("GET", "HEAD") else WRITING:
            if match := re.fullmatch(pattern, path):
                return handler(self, body, **match.groupdict())
        return self._send(404, {"error": f"no {method} {path}"})

    def _send(self, status: int, tree: Any, headers: dict[str, str] | None = None) -> None:
        self._send_bytes(status, json.dumps(tree).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send_bytes(self, status: int, content: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for at in range(0, len(content) if cut is None else cut, PIECE):
                self.wfile.write(content[at : at + PIECE])
                while self.server.stalls_at is not None and at >= self.server.stalls_at:
                    time.sleep(0.01)
        if cut is not None:
            self.close_connection = True

    def _refused(self, repo: str) -> bool:
        """Whether the one who asks may not have the files of `repo`; then it has been said."""
        shown = self.headers.get("authorization")
        if shown is not None and shown.removeprefix("Bearer ") not in self.server.known_tokens:
            self._send(
                401, {"error": "Invalid credentials"}, _error(None, "Invalid credentials in Authorization header")
            )
        elif repo not in self.server.repos or (self.server.repos[repo]["private"] and shown is None):
            status = 401 if shown is None else 404  # the hub does not say which repositories there are
            self._send(status, {"error": "Repository not found"}, _error("RepoNotFound", "Repository not found"))
        else:
            return False
        return True

    def _gated(self, repo: str) -> bool:
        shown = self.headers.get("authorization")
        if not self.server.repos[repo].get("gated") or (shown and repo in self.server.grants):
            return False
        text = f"Access to model {repo} is restricted"
        self._send(403 if shown else 401, {"error": text}, _error("GatedRepo", text))
        return True

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

    def info(self, _: bytes, repo: str, kind: str, revision: str = "main") -> None:
        repo = _key(kind, repo)
        if self._refused(repo):
            return None
        files = self.server.at(repo, revision)
        if files is None:
            return self._no_revision(revision)
        siblings = [_sibling(name, content) for name, content in sorted(files.items())]
        known = self.server.repos[repo]
        about = {"private": known["private"], "gated": "manual" if known.get("gated") else False}
        return self._send(200, {"id": repo, **about, "sha": _commit(files), "siblings": siblings})

    def _no_revision(self, revision: str) -> None:
        self._send(404, {"error": f"Invalid rev id: {revision}"}, _error("RevisionNotFound", "Invalid rev id"))

    def resolve(self, _: bytes, repo: str, revision: str, name: str, kind: str | None = None) -> None:
        """A file: small ones at once, large ones at the store."""
        repo = _key(kind, repo)
        if self._refused(repo) or self._gated(repo):
            return None
        files = self.server.at(repo, revision)
        if files is None:
            return self._no_revision(revision)
        commit = {"X-Repo-Commit": _commit(files)}
        if name not in files:
            return self._send(
                404, {"error": "Entry not found"}, {**_error("EntryNotFound", "Entry not found"), **commit}
            )
        content, entry = files[name], _entry(name, files[name])
        if "lfs" not in entry:
            return self._send_bytes(200, content, {**commit, "ETag": f'"{entry["oid"]}"'})
        oid = entry["lfs"]["oid"]
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        where = f"http://localhost:{self.server.server_port}/store/{oid}?signature=secret"
        return self._send_bytes(302, b"", {**commit, **linked, "Location": where})

    def stored(self, _: bytes, oid: str) -> None:
        """A large file, or the rest of it from a byte on."""
        content = self.server.store[oid]
        if oid == self.server.spoils:
            content = bytes([content[0] ^ 1]) + content[1:]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range") or "")
        asked = None if self.server.ignores_ranges else asked
        first = int(asked[1]) if asked else 0
        headers = {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        cut = self.server.cuts.pop(0) if self.server.cuts and self.command == "GET" else None
        self.server.ranges.append((oid, first))
        self._send_bytes(206 if asked else 200, content[first:], headers, cut)

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

    def tree(self, _: bytes, repo: str, kind: str, branch: str, folder: str | None = None) -> None:
        files = self.server.at(_key(kind, repo), branch) or {}
        start = f"{folder}/" if folder else ""
        inside = {name: content for name, content in files.items() if name.startswith(start)}
        folders: list[str] = []
        if parse_qs(urlsplit(self.path).query).get("recursive", ["true"])[0].lower() == "false":
            folders = sorted({start + rest.split("/")[0] for name in inside if "/" in (rest := name[len(start) :])})
            inside = {name: content for name, content in inside.items() if "/" not in name[len(start) :]}
        entries = [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in folders]
        self._send(200, [*entries, *(_entry(name, content) for name, content in inside.items())])

    def paths(self, body: bytes, repo: str, kind: str, branch: str) -> None:
        files = self.server.at(_key(kind, repo), branch) or {}
        wanted = parse_qs(body.decode())["paths"]
        self._send(200, [_entry(name, files[name]) for name in wanted if name in files])


def _entry(name: str, content: bytes) -> dict[str, Any]:
    sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": sha1}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


def _sibling(name: str, content: bytes) -> dict[str, Any]:
    entry = _entry(name, content)
    sibling = {"rfilename": name, "size": len(content), "blobId": entry["oid"]}
    if "lfs" in entry:
        sibling["lfs"] = {"sha256": entry["lfs"]["oid"], "size": len(content), "pointerSize": 130}
    return sibling


def _commit(files: Mapping[str, bytes]) -> str:
    """What a commit of these files is called."""
    digest = hashlib.sha1(usedforsecurity=False)
    for name, content in sorted(files.items()):
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _error(code: str | None, message: str) -> dict[str, str]:
    return {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


def _key(kind: str | None, repo: str) -> str:
    return f"datasets/{repo}" if kind == "datasets" else repo


NAME = r"(?P<repo>[^/]+/[^/]+?)"
KIND = r"(?P<kind>models|datasets)"
READING = [
    (r"/api/whoami-v2", Answers.whoami),
    (rf"/api/{KIND}/{NAME}", Answers.info),
    (rf"/api/{KIND}/{NAME}/revision/(?P<revision>.+)", Answers.info),
    (rf"/api/{KIND}/{NAME}/tree/(?P<branch>[^/]+)(?:/(?P<folder>.*?))?/?", Answers.tree),
    (r"/store/(?P<oid>[0-9a-f]{64})", Answers.stored),
    (rf"/(?:(?P<kind>datasets)/)?{NAME}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", Answers.resolve),
]
WRITING = [
    (r"/api/repos/create", Answers.create),
    (r"/api/validate-yaml", Answers.yaml),
    (rf"/api/models/{NAME}/branch/(?P<branch>.+)", Answers.branch),
    (rf"/api/models/{NAME}/preupload/(?P<branch>.+)", Answers.preupload),
    (rf"/api/models/{NAME}/commit/(?P<branch>.+)", Answers.commit),
    (rf"/api/{KIND}/{NAME}/paths-info/(?P<branch>.+)", Answers.paths),
    (rf"/{NAME}\.git/info/lfs/objects/batch", Answers.batch),
    (r"/store/(?P<oid>[0-9a-f]{64})", Answers.put),
]


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    """The stand-in, answering until the block ends."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
