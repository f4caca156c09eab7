"""A hub on loopback that huggingface_hub and modelscope_hub really download from. Both protocols, on one port.

    with FakeHub() as hub:
        hub.commit("models", "owner/tiny", {"config.json": b"{}"})
        ... HF_ENDPOINT=hub.url or MODELSCOPE_ENDPOINT=hub.url

`hub.faults` holds what goes wrong, `hub.log` what was asked for.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]
MAIN = ("main", "master")
_LARGE = (".safetensors", ".parquet", ".bin")
"""Endings of the files that Hugging Face keeps in LFS, where it knows their SHA-256."""


@dataclass
class Fault:
    """What happens to requests whose method and path (`GET /api/...`) match, `times` times."""

    match: str
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    """Bytes of the body that are sent before the connection is closed."""
    corrupt: bool = False
    """One byte of the body is another."""
    meanwhile: Callable[[], object] | None = None
    """What happens after the answer was worked out and before it is sent."""
    times: int = 1_000_000


@dataclass(frozen=True)
class Asked:
    """One request."""

    method: str
    path: str
    range: str | None


@dataclass
class Repository:
    """Commits, oldest first; each is the whole of its files."""

    commits: dict[str, Files] = field(default_factory=dict)
    gated: bool = False

    def resolve(self, revision: str) -> str | None:
        if revision in MAIN:
            return list(self.commits)[-1]
        return revision if revision in self.commits else None

    def changed_by(self, path: str, until: str) -> tuple[str, int]:
        """(commit, its place) that gave the file the content that it has at `until`."""
        order = list(self.commits)
        content = self.commits[until][path]
        place = order.index(until)
        while place > 0 and self.commits[order[place - 1]].get(path) == content:
            place -= 1
        return order[place], place


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def folder_files(folder: Path) -> Files:
    """The content of a folder, as `FakeHub.commit` takes it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class FakeHub:
    """Serves repositories from memory as long as it is entered."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.faults: list[Fault] = []
        self.log: list[Asked] = []
        self.token: str | None = None
        """Without it in its header a request is answered 401."""
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def commit(self, kind: str, name: str, files: Mapping[str, bytes]) -> str:
        """Add a commit that consists of exactly these files; returns its hash."""
        repository = self.repositories.setdefault((kind, name), Repository())
        told = str(len(repository.commits)) + "".join(f"{path} {sha256(data)}\n" for path, data in files.items())
        commit = hashlib.sha1(told.encode()).hexdigest()
        repository.commits[commit] = dict(files)
        return commit

    def asked(self, pattern: str) -> list[Asked]:
        """Requests whose path matches."""
        return [entry for entry in self.log if re.search(pattern, unquote(entry.path))]

    def fault_for(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.match, request):
                fault.times -= 1
                return fault
        return None

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: FakeHub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the console."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.do_GET()

    def do_GET(self) -> None:
        hub, address = self.server.hub, urlsplit(self.path)
        path = unquote(address.path)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        hub.log.append(Asked(self.command, self.path, self.headers.get("Range")))
        self.fault = hub.fault_for(f"{self.command} {unquote(self.path)}")
        if self.fault is not None and self.fault.status is not None:
            self._json({"error": "as ordered"}, self.fault.status, self.fault.headers)
        elif hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._json(
                {"error": "who are you?"}, 401, {"X-Error-Message": "Invalid credentials in Authorization header"}
            )
        elif not (self._modelscope(path, query) or self._huggingface(path)):
            self._json({"error": "no such page"}, 404)

    # -- ModelScope: /api/v1/{models,datasets}/OWNER/NAME[/repo[/files|/tree]] --------------------------------------

    def _modelscope(self, path: str, query: Mapping[str, str]) -> bool:
        if not path.startswith("/api/v1/"):
            return False
        match = re.fullmatch(r"/api/v1/(models|datasets)/([^/]+/[^/]+)(?:/(repo|repo/files|repo/tree))?", path)
        if match is None:
            self._json({"Code": 200, "Success": True, "Data": {}})
            return True
        repository = self.server.hub.repositories.get((match[1], match[2]))
        commit = repository.resolve(query.get("Revision", "master")) if repository else None
        if repository is None or commit is None:
            self._modelscope_error(404, "not found")
        elif repository.gated:
            self._modelscope_error(403, "access denied")
        elif match[3] is None:
            self._json({"Code": 200, "Success": True, "Data": {"Id": 1, "Name": match[2].split("/")[1]}})
        elif match[3] == "repo":
            data = repository.commits[commit].get(query.get("FilePath", ""))
            self._modelscope_error(404, "no such file") if data is None else self._file(data, {})
        else:
            entries = [] if query.get("PageNumber", "1") != "1" else _modelscope_files(repository, commit)
            self._json({"Code": 200, "Success": True, "Data": {"Files": entries}, "TotalCount": len(entries)})
        return True

    def _modelscope_error(self, status: int, message: str) -> None:
        self._json({"Code": 10010205001, "Message": message, "Success": False}, status)

    # -- Hugging Face: /api/{models,datasets}/OWNER/NAME[/revision/REV|/tree/REV], /[datasets/]OWNER/NAME/resolve/... --

    def _huggingface(self, path: str) -> bool:
        api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        page = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if api is None and page is None:
            return False
        kind, name = (
            (api[1], api[2]) if api else ("datasets" if page and page[1] else "models", page[2] if page else "")
        )
        revision = (api[4] or "main") if api else page[3] if page else "main"
        repository = self.server.hub.repositories.get((kind, name))
        commit = repository.resolve(revision) if repository else None
        if repository is None:
            self._huggingface_error(404, "RepoNotFound")
        elif repository.gated:
            self._huggingface_error(403, "GatedRepo")
        elif commit is None:
            self._huggingface_error(404, "RevisionNotFound")
        elif api:
            self._huggingface_api(name, repository.commits[commit], commit, is_tree=api[3] == "tree")
        elif page:
            data = repository.commits[commit].get(page[4])
            if data is None:
                self._huggingface_error(404, "EntryNotFound")
            else:
                etag = sha256(data) if page[4].endswith(_LARGE) else git_sha1(data)
                self._file(data, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})
        return True

    def _huggingface_api(self, name: str, files: Files, commit: str, *, is_tree: bool) -> None:
        if is_tree:
            self._json([_huggingface_file(path, data, "path", "oid", "oid") for path, data in files.items()])
            return
        siblings = [_huggingface_file(path, data, "rfilename", "blobId", "sha256") for path, data in files.items()]
        self._json({"_id": "0", "id": name, "sha": commit, "private": False, "tags": [], "siblings": siblings})

    def _huggingface_error(self, status: int, code: str) -> None:
        self._json({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})

    # -- answers ----------------------------------------------------------------------------------------------------

    def _json(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _file(self, data: bytes, headers: Mapping[str, str]) -> None:
        if self.fault is not None and self.fault.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            self._send(200, data, {"Accept-Ranges": "bytes", **headers})
            return
        start, end = int(match[1]), int(match[2] or len(data) - 1)
        told = {"Content-Range": f"bytes {start}-{end}/{len(data)}", **headers}
        self._send(206, data[start : end + 1], told)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        if self.fault is not None and self.fault.meanwhile is not None:
            self.fault.meanwhile()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.fault.cut_after if self.fault is not None else None
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True


def _huggingface_file(path: str, data: bytes, name: str, blob: str, lfs: str) -> dict[str, Any]:
    entry = {"type": "file", name: path, "size": len(data), blob: git_sha1(data)}
    if path.endswith(_LARGE):
        entry["lfs"] = {lfs: sha256(data), "size": len(data), "pointerSize": 130}
    return entry


def _modelscope_files(repository: Repository, commit: str) -> list[dict[str, Any]]:
    entries = []
    for path, data in repository.commits[commit].items():
        changed, place = repository.changed_by(path, commit)
        entries.append(
            {
                "Name": path.rsplit("/", 1)[-1],
                "Path": path,
                "Type": "blob",
                "Size": len(data),
                "Sha256": sha256(data),
                "Revision": changed,
                "CommittedDate": 1_700_000_000 + place,
            }
        )
    return entries
