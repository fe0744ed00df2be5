"""A hub on loopback: enough of its HTTP interface for the real `datasets` client to stream Parquet files from it.

A folder is served as the dataset owner/set, which is a model too, and as owner/NAME for every NAME in `faults`, where
things go wrong as scripted, and in `folders`, from folders of their own; owner/gated401 answers as to a client
without a login, owner/gated403 as to one that has not accepted the terms, any other name as missing. Every error
repeats the client's own Authorization header, as a careless server would.
"""

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GATED = {
    "gated401": (401, "Access to dataset owner/gated401 is restricted. You must be authenticated to access it."),
    "gated403": (403, "Access to dataset owner/gated403 is restricted. Visit the page to ask for access."),
}
EVER = 10**9


@dataclass
class Fault:
    """What goes wrong at the first `times` GET requests whose path holds `where`, after the first `spared` of them.

    Attributes:
        status: Answer with this status.
        how: Instead: close the connection in the middle of a body (`reset` it, or leave it `short`), send it in small
            pieces (`drip`), or accept the request and never answer (`silent`).
    """

    where: str
    status: int = 0
    how: Literal["", "reset", "short", "drip", "silent"] = ""
    times: int = EVER
    spared: int = 0
    headers: dict[str, str] = field(default_factory=dict)


class MockHub(ThreadingHTTPServer):
    """Serves one folder; `requests` collects what was asked, `faults` says what goes wrong for which dataset."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        self.faults: dict[str, list[Fault]] = {}
        self.folders: dict[str, Path] = {}
        self.lock = threading.Lock()
        self.closing = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self, name: str, path: str) -> Fault | None:
        """Return what goes wrong with this request, and count it."""
        with self.lock:
            for fault in self.faults.get(name, []):
                if fault.where not in path:
                    continue
                if fault.spared:
                    fault.spared -= 1
                elif fault.times:
                    fault.times -= 1
                    return fault
        return None

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing about clients that went away."""


@contextmanager
def running(folder: Path) -> Iterator[MockHub]:
    """Serve a folder for as long as the block runs."""
    hub = MockHub(folder)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.closing.set()
        hub.shutdown()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    server: MockHub
    protocol_version = "HTTP/1.1"
    how = ""
    folder: Path

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        self.server.requests.append(f"{self.command} {self.path}")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length).decode()
        found = re.fullmatch(r"/api/datasets/owner/([\w-]+)/paths-info/[^/]+", self.path)
        if not found or not self.known(found.group(1)):
            return self.send_error_text(404, "no such page")
        if self.goes_wrong(found.group(1), self.path):
            return None
        paths = json.loads(body)["paths"] if body.startswith("{") else re.findall(r"paths=([^&]+)", body)
        wanted = [self.folder / unquote(path) for path in ([paths] if isinstance(paths, str) else paths)]
        return self.send_json(200, [self.entry(file) for file in wanted if file.exists()])

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        found = re.match(r"(?:/api)?/(?:datasets/|models/)?owner/([\w-]+)(.*)", path)  # models have no prefix in URLs
        name = found.group(1) if found else ""
        if name in GATED:
            return self.send_error_text(*GATED[name], code="GatedRepo")
        if not found or not self.known(name):
            return self.send_error_text(404, "Repository not found", code="RepoNotFound")
        revision = re.search(r"/(?:revision|resolve|tree)/([^/]+)", path)
        if revision and revision.group(1) not in ("main", COMMIT):
            return self.send_error_text(404, "Invalid rev id", code="RevisionNotFound")
        if self.command == "GET" and self.goes_wrong(name, path):
            return None
        return self.serve(name, path.startswith("/api"), found.group(2))

    def serve(self, name: str, api: bool, rest: str) -> None:
        if api and re.fullmatch(r"(/revision/[^/]+)?", rest):
            files = [{"rfilename": self.name(file)} for file in self.files()]
            info = {"id": f"owner/{name}", "sha": COMMIT, "siblings": files, "private": False, "gated": False}
            return self.send_json(200, info | {"tags": [], "downloads": 0, "likes": 0})
        tree = re.fullmatch(r"/tree/[^/]+(/.*)?", rest)
        if api and tree:
            return self.send_tree((tree.group(1) or "").strip("/"))
        file = re.fullmatch(r"/resolve/[^/]+/(.+)", rest)
        if file and (self.folder / file.group(1)).is_file():
            return self.send_file(self.folder / file.group(1))
        return self.send_error_text(404, "Entry not found", code="EntryNotFound")

    def known(self, name: str) -> bool:
        self.server.tokens.add(self.headers.get("Authorization", ""))
        self.folder = self.server.folders.get(name, self.server.folder)
        return name == "set" or name in self.server.faults or name in self.server.folders

    def goes_wrong(self, name: str, path: str) -> bool:
        """Answer as the dataset's faults say; tell whether that was the whole answer."""
        fault = self.server.fault(name, path)
        self.how = fault.how if fault else ""
        if fault and fault.status:
            self.send_error_text(fault.status, "something is wrong", fault.headers)
        if self.how == "silent":
            self.server.closing.wait(30)
            self.close_connection = True
        return bool(fault and fault.status) or self.how == "silent"

    def files(self) -> list[Path]:
        return sorted(file for file in self.folder.rglob("*") if file.is_file())

    def name(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()

    def entry(self, file: Path) -> dict[str, object]:
        oid = hashlib.sha1(self.name(file).encode()).hexdigest()
        if file.is_dir():
            return {"type": "directory", "oid": oid, "size": 0, "path": self.name(file)}
        return {"type": "file", "oid": oid, "size": file.stat().st_size, "path": self.name(file)}

    def send_tree(self, under: str) -> None:
        folder = self.folder / under
        if not folder.is_dir():
            return self.send_error_text(404, "Entry not found", code="EntryNotFound")
        found = (
            folder.rglob("*") if "recursive=True" in self.path or "recursive=true" in self.path else folder.iterdir()
        )
        return self.send_json(200, [self.entry(file) for file in sorted(found)])

    def send_file(self, file: Path) -> None:
        content = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self.send_bytes(200, content, headers)
        first, last = int(asked.group(1)), min(int(asked.group(2) or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self.send_bytes(206, content[first : last + 1], headers)

    def send_error_text(self, status: int, text: str, headers: dict[str, str] | None = None, code: str = "") -> None:
        text = f"{text} (Authorization: {self.headers.get('Authorization')})"
        codes = {"X-Error-Code": code} if code else {}
        self.send_json(status, {"error": text}, codes | {"X-Error-Message": text} | (headers or {}))

    def send_json(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        self.send_bytes(status, json.dumps(content).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def send_bytes(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.send_body(content)

    def send_body(self, content: bytes) -> None:
        if self.how in ("reset", "short"):
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            if self.how == "reset":  # closing without lingering sends a reset instead of an end
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            self.close_connection = True
        elif self.how == "drip":
            for start in range(0, len(content), max(1, len(content) // 8)):
                self.wfile.write(content[start : start + max(1, len(content) // 8)])
                self.wfile.flush()
                self.server.closing.wait(0.2)
        else:
            self.wfile.write(content)
