"""A model hub on 127.0.0.1: as much of the public HTTP API as huggingface_hub's snapshot_download speaks.

Metadata of a revision, the tree of a commit, and files with ETag, X-Repo-Commit, sizes and ranges; weights are kept as
LFS objects, whose ETag is their SHA-256. Faults are switched on by the attributes of `MockHub`.
"""

import hashlib
import json
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


def commit_of(files: dict[str, bytes]) -> str:
    digest = hashlib.sha1()
    for name, data in sorted(files.items()):
        digest.update(name.encode() + b"\0" + data)
    return digest.hexdigest()


class MockHub:
    """The repositories and the faults.

    Attributes:
        repos: id -> revision -> commit.
        commits: (id, commit) -> file name -> content.
        gated: ids whose files are refused (their metadata is public, as on the real hub).
        status: answer everything with this status.
        cut: file name -> after so many bytes the connection is closed, as often as the second number says.
        short: file name -> so many bytes are announced and sent, though the metadata promise more.
        requests: (method, path, Range header) of what was asked.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.url = ""
        self.reset()

    def reset(self) -> None:
        """An empty hub without faults."""
        self.repos: dict[str, dict[str, str]] = {}
        self.commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.status: int | None = None
        self.cut: dict[str, tuple[int, int]] = {}
        self.short: dict[str, int] = {}
        self.requests: list[tuple[str, str, str | None]] = []

    def push(self, repo: str, files: dict[str, bytes], revision: str = "main") -> str:
        commit = commit_of(files)
        self.repos.setdefault(repo, {})[revision] = commit
        self.commits[repo, commit] = files
        return commit

    def push_folder(self, repo: str, folder: Path, revision: str = "main", **more: bytes) -> str:
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        return self.push(repo, files | more, revision)

    def fetched(self, method: str = "GET") -> list[str]:
        """Names of the files that were asked for."""
        return [p.rpartition("/")[2] for m, p, _ in self.requests if m == method and "/resolve/" in p]

    @contextmanager
    def running(self) -> Iterator["MockHub"]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                _answer(hub, self)

            do_HEAD = do_GET

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            server.daemon_threads = True
            self.url = f"http://127.0.0.1:{server.server_address[1]}"
            thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
            thread.start()
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()


def _answer(hub: MockHub, request: BaseHTTPRequestHandler) -> None:
    path = unquote(urlsplit(request.path).path)
    with hub.lock:
        hub.requests.append((request.command, path, request.headers.get("Range")))
    if hub.status is not None:
        return _send(request, hub.status, b"{}", {})
    words = path.strip("/").split("/")
    if words[:2] == ["api", "models"] and len(words) >= 4:
        return _api(hub, request, "/".join(words[2:4]), words[4:])
    if len(words) >= 5 and words[2] == "resolve":
        return _file(hub, request, "/".join(words[:2]), words[3], "/".join(words[4:]))
    return _send(request, 404, b"{}", {})


def _send(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
    request.send_response(status)
    for name, value in ({"Content-Length": str(len(body))} | headers).items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)


def _refuse(request: BaseHTTPRequestHandler, status: int, code: str) -> None:
    _send(request, status, b'{"error": "refused"}', {"X-Error-Code": code, "X-Error-Message": code})


def _commit(hub: MockHub, request: BaseHTTPRequestHandler, repo: str, revision: str) -> str | None:
    """The commit, or None after the refusal has been sent."""
    if repo not in hub.repos or repo in hub.private:
        # To strangers, the real hub does not tell the two apart.
        _refuse(request, 401 if repo in hub.private else 404, "RepoNotFound")
    elif revision in hub.repos[repo]:
        return hub.repos[repo][revision]
    elif (repo, revision) in hub.commits:
        return revision
    else:
        _refuse(request, 404, "RevisionNotFound")
    return None


def _api(hub: MockHub, request: BaseHTTPRequestHandler, repo: str, rest: list[str]) -> None:
    commit = _commit(hub, request, repo, "/".join(rest[1:]) or "main")
    if commit is None:
        return
    files = hub.commits[repo, commit]
    answer: Any
    if rest[:1] == ["tree"]:
        answer = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            | (
                {"lfs": {"oid": _etag(name, data), "size": len(data), "pointerSize": 130}}
                if _lfs(name)
                else {}
            )
            for name, data in files.items()
        ]
    else:
        siblings = [{"rfilename": name} for name in files]
        answer = {"_id": "0", "id": repo, "modelId": repo, "sha": commit, "siblings": siblings}
        answer |= {"private": False, "gated": repo in hub.gated, "tags": [], "downloads": 0}
    _send(request, 200, json.dumps(answer).encode(), {"Content-Type": "application/json"})


def _lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def _etag(name: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if _lfs(name) else hashlib.sha1(data).hexdigest()


def _file(hub: MockHub, request: BaseHTTPRequestHandler, repo: str, revision: str, name: str) -> None:
    commit = _commit(hub, request, repo, revision)
    if commit is None:
        return
    if repo in hub.gated:
        _refuse(request, 403 if request.headers.get("Authorization") else 401, "GatedRepo")
        return
    data = hub.commits[repo, commit].get(name)
    if data is None:
        _refuse(request, 404, "EntryNotFound")
        return
    headers = {"ETag": f'"{_etag(name, data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
    if _lfs(name):
        headers |= {"X-Linked-Etag": f'"{_etag(name, data)}"', "X-Linked-Size": str(len(data))}
    if request.command == "HEAD":
        _send(request, 200, b"", headers | {"Content-Length": str(len(data))})
        return
    if name in hub.short:
        _send(request, 200, data[: hub.short[name]], headers)
        return
    status, body, wanted = 200, data, request.headers.get("Range")
    if wanted:
        begin = int(wanted.removeprefix("bytes=").partition("-")[0])
        status, body = 206, data[begin:]
        headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
    with hub.lock:
        after, times = hub.cut.get(name, (0, 0))
        if times:
            hub.cut[name] = (after, times - 1)
    if times:
        request.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            request.send_header(key, value)
        request.end_headers()
        request.wfile.write(body[:after])
        request.wfile.flush()
        request.close_connection = True
        return
    _send(request, status, body, headers)


def point_at(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch, *, offline: bool = False) -> None:
    """What the environment variables would do in a new process."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setenv("CHIASM_CACHE", str(cache / "chiasm"))
    trees = sys.modules.get("huggingface_hub._tree_cache")
    if trees is not None:  # kept in memory by path
        monkeypatch.setattr(trees, "_IN_MEMORY_TREE_CACHE", {}, raising=False)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
