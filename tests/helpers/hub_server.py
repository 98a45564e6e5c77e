"""A small server in place of a model hub: it answers the requests of `huggingface_hub` for small files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


class Hub:
    """Repositories in memory: the newest commit of each, its files, and whether it is private."""

    def __init__(self) -> None:
        self.address = ""
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []

    def commit_id(self, name: str) -> str:
        listed = json.dumps({path: hashlib.sha1(data).hexdigest() for path, data in self.repositories[name].items()})
        return hashlib.sha1(listed.encode()).hexdigest()


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Yields a hub that serves until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _json(self, value: object, status: int = 200, **headers: str) -> None:
            self._send(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = urlparse(self.path).path
            if path == "/api/repos/create":
                asked = json.loads(body)
                owner = asked.get("organization") or "somebody"
                name = asked["name"] if "/" in asked["name"] else f"{owner}/{asked['name']}"
                status = 409 if name in hub.repositories else 200
                hub.repositories.setdefault(name, {})
                hub.private.setdefault(name, asked.get("private") or asked.get("visibility") == "private")
                self._json({"url": f"{hub.address}/{name}", "name": name}, status)
            elif path == "/api/validate-yaml":
                self._json({"errors": [], "warnings": []})
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/.+", path):
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                    for file in json.loads(body)["files"]
                ]
                self._json({"files": files})
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/.+", path):
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "header":
                        hub.messages.append(line["value"]["summary"])
                    elif line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        hub.repositories[found[1]][line["value"]["path"]] = content
                commit = hub.commit_id(found[1])
                self._json({"commitUrl": f"{hub.address}/{found[1]}/commit/{commit}", "commitOid": commit})
            else:
                self._json({"error": f"the stand-in does not know POST {path}"}, 501)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
            tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            name = next((found[1] for found in (info, tree, file) if found), "")
            files = hub.repositories.get(name)
            if files is None:
                self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            elif info:
                listed = [{"rfilename": path} for path in sorted(files)]
                self._json({"id": name, "sha": hub.commit_id(name), "siblings": listed, "private": False, "tags": []})
            elif tree:
                oids = {path: hashlib.sha1(data).hexdigest() for path, data in files.items()}
                self._json([{"type": "file", "path": p, "size": len(files[p]), "oid": oids[p]} for p in sorted(files)])
            elif file and file[3] in files:
                content = files[file[3]]
                etag = f'"{hashlib.sha1(content).hexdigest()}"'
                self._send(200, content, ETag=etag, X_Repo_Commit=hub.commit_id(name), Accept_Ranges="bytes")
            else:
                self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
