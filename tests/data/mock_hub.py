"""A hub on loopback: enough of its HTTP interface for the real `datasets` client to stream Parquet files from it.

A folder is served as the dataset owner/set; owner/gated401 answers as to a client without a login, owner/gated403 as
to one that has not accepted the terms, any other name as missing.
"""

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GATED = {
    "gated401": (401, "Access to dataset owner/gated401 is restricted. You must be authenticated to access it."),
    "gated403": (403, "Access to dataset owner/gated403 is restricted. Visit the page to ask for access."),
}


class MockHub(ThreadingHTTPServer):
    """Serves one folder; `requests` collects what was asked, the next `stumbles` reads of a file answer 503."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests: list[str] = []
        self.stumbles = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: MockHub
    protocol_version = "HTTP/1.1"

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        self.server.requests.append(f"{self.command} {self.path}")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length).decode()
        found = re.fullmatch(r"/api/datasets/owner/set/paths-info/[^/]+", self.path)
        if not found:
            return self.send_json(404, {"error": "no such page"})
        paths = json.loads(body)["paths"] if body.startswith("{") else re.findall(r"paths=([^&]+)", body)
        wanted = [self.server.folder / unquote(path) for path in ([paths] if isinstance(paths, str) else paths)]
        return self.send_json(200, [self.entry(file) for file in wanted if file.exists()])

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        gated = re.search(r"/owner/(gated40[13])\b", path)
        if gated:
            status, text = GATED[gated.group(1)]
            return self.send_json(status, {"error": text}, {"X-Error-Code": "GatedRepo", "X-Error-Message": text})
        if not re.match(r"(/api)?/datasets/owner/set\b", path):
            return self.send_json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        revision = re.search(r"/(?:revision|resolve|tree)/([^/]+)", path)
        if revision and revision.group(1) not in ("main", COMMIT):
            return self.send_json(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        if re.fullmatch(r"/api/datasets/owner/set(/revision/[^/]+)?", path):
            files = [{"rfilename": self.name(file)} for file in self.files()]
            info = {"id": "owner/set", "sha": COMMIT, "siblings": files, "private": False, "gated": False, "tags": []}
            return self.send_json(200, info | {"downloads": 0, "likes": 0})
        tree = re.fullmatch(r"/api/datasets/owner/set/tree/[^/]+(/.*)?", path)
        if tree:
            return self.send_tree((tree.group(1) or "").strip("/"))
        file = re.fullmatch(r"/datasets/owner/set/resolve/[^/]+/(.+)", path)
        if file and self.command == "GET" and self.server.stumbles:
            self.server.stumbles -= 1
            return self.send_json(503, {"error": "try again"})
        if file and (self.server.folder / file.group(1)).is_file():
            return self.send_file(self.server.folder / file.group(1))
        return self.send_json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})

    def files(self) -> list[Path]:
        return sorted(file for file in self.server.folder.rglob("*") if file.is_file())

    def name(self, file: Path) -> str:
        return file.relative_to(self.server.folder).as_posix()

    def entry(self, file: Path) -> dict[str, object]:
        oid = hashlib.sha1(self.name(file).encode()).hexdigest()
        if file.is_dir():
            return {"type": "directory", "oid": oid, "size": 0, "path": self.name(file)}
        return {"type": "file", "oid": oid, "size": file.stat().st_size, "path": self.name(file)}

    def send_tree(self, under: str) -> None:
        folder = self.server.folder / under
        if not folder.is_dir():
            return self.send_json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
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

    def send_json(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        self.send_bytes(status, json.dumps(content).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def send_bytes(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
