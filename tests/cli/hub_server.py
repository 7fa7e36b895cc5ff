"""The part of the Hugging Face Hub's HTTP interface that uploads and downloads of models use."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Repository:
    """What was committed to one model repository."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @property
    def commit(self) -> str:
        """A name for the present state."""
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


class Hub:
    """Repositories by name, on a port of this machine; only the `token` may write."""

    token = "hf_right"

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.http: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.hub = self
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Answer nothing any more."""
        self.http.shutdown()
        self.http.server_close()

    def create(self, body: dict[str, Any]) -> tuple[int, Any]:
        """POST /api/repos/create."""
        name = (
            f"{body['organization']}/{body['name']}" if body.get("organization") else body["name"]
        )
        if name.startswith("others/"):
            return 403, {
                "error": "You don't have the rights to create a model under this namespace"
            }
        url = {"url": f"{self.url}/{name}"}
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", **url}
        self.repositories[name] = Repository(private=body.get("visibility") == "private")
        return 200, url

    def commit(self, name: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        """POST /api/models/NAME/commit/main: a line of JSON for each part."""
        repository = self.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        oid = repository.commit
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid}

    def batch(self, body: dict[str, Any]) -> tuple[int, Any]:
        """POST /NAME.git/info/lfs/objects/batch: where large files are to be put."""
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.url}/large/{one['oid']}"}}}
            for one in body["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}

    def info(self, name: str) -> dict[str, Any]:
        """What GET /api/models/NAME/revision/main says."""
        repository = self.repositories[name]
        siblings = [{"rfilename": path} for path in sorted(repository.files)]
        return {"id": name, "sha": repository.commit, "siblings": siblings}


class Handler(BaseHTTPRequestHandler):
    """Answers for the hub of its server."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def do_POST(self) -> None:
        raw = self._body()
        if self.headers["Authorization"] != f"Bearer {self.hub.token}":
            return self._say(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            return self._say(*self.hub.create(json.loads(raw)))
        if self.path == "/api/validate-yaml":
            return self._say(200, {"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/(.+)/preupload/([^/?]+).*", self.path):
            if found[2] != "main":
                return self._say(404, {"error": "no such branch"}, "RevisionNotFound")
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith("safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(raw)["files"]
            ]
            return self._say(200, {"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            return self._say(*self.hub.batch(json.loads(raw)))
        if found := re.fullmatch(r"/api/models/(.+)/commit/main.*", self.path):
            lines = [json.loads(line) for line in raw.splitlines()]
            return self._say(*self.hub.commit(found[1], lines))
        return self._say(404, {"error": f"nothing at {self.path}"})

    def do_PUT(self) -> None:
        self.hub.large[self.path.removeprefix("/large/")] = self._body()
        self._say(200, {})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        if found := re.fullmatch(r"/api/models/(.+?)/tree/(\w+)/?(?:\?.*)?", self.path):
            if found[2] not in ("main", self.hub.repositories[found[1]].commit):
                return self._say(404, {"error": "no such branch"}, "RevisionNotFound")
            files = self.hub.repositories[found[1]].files
            return self._say(
                200,
                [
                    {"type": "file", "path": path, "size": len(content), "oid": "0"}
                    for path, content in files.items()
                ],
            )
        if found := re.fullmatch(r"/api/models/(.+?)(?:/revision/\w+)?(?:\?.*)?", self.path):
            if found[1] in self.hub.repositories:
                return self._say(200, self.hub.info(found[1]))
        elif found := re.fullmatch(r"/(.+/.+)/resolve/\w+/(.+)", self.path):
            repository = self.hub.repositories[found[1]]
            return self._send(repository, repository.files[found[2]])
        return self._say(404, {"error": "Repository not found"}, "RepoNotFound")

    def _body(self) -> bytes:
        self.hub.requests.append(f"{self.command} {self.path}")
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, repository: Repository, content: bytes) -> None:
        self.send_response(200)
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _say(self, status: int, content: Any, code: str = "") -> None:
        raw = json.dumps(content).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if isinstance(content, dict) and "error" in content:
            self.send_header("X-Error-Message", content["error"])
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def log_message(self, *words: object) -> None:
        pass
