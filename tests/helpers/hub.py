"""A small Hugging Face Hub on this machine: the endpoints that uploads and downloads call."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

TOKEN = "hf_right"
LARGE = 1000  # bytes, from which a file goes through LFS


@dataclasses.dataclass
class Repository:
    """A model's repository."""

    files: dict[str, bytes]
    private: bool = False
    commits: list[str] = dataclasses.field(default_factory=list)  # messages

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr((len(self.commits), sorted(self.files))).encode()).hexdigest()


class Hub:
    """Content of the server, and the requests that it received."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # of LFS, by SHA-256
        self.uploads: list[str] = []  # objects received, in order
        self.uploads_left: int | None = None  # until connections are cut; None: for ever


class Handler(http.server.BaseHTTPRequestHandler):
    """The endpoints; a path without one is a 404."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def answer(self, body: Any = None, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        if path.startswith("/objects/"):
            return self.receive(path.rpartition("/")[2], body)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials"}, 401)
        if path == "/api/whoami-v2":
            return self.answer({"name": "alice"})
        if path == "/api/validate-yaml":
            return self.answer({"warnings": [], "errors": []})
        if path == "/api/repos/create":
            values = json.loads(body)
            private = values.get("visibility") == "private" or bool(values.get("private"))
            name = f"{values.get('organization') or 'alice'}/{values['name']}"
            if not name.startswith("alice/"):
                return self.answer({"error": "Forbidden"}, 403)
            self.hub.repositories[name] = Repository({}, private)
            return self.answer({"url": f"{constants.ENDPOINT}/{name}"})
        found = re.match(r"(?:/api/models)?/([^/]+/[^/]+?)(?:\.git)?(?:/(.*))?$", path)
        name, rest = found.groups() if found else ("", "")
        if name not in self.hub.repositories:
            return self.answer({"error": "none"}, 404, X_Error_Code="RepoNotFound")
        return self.of_repository(name, self.hub.repositories[name], rest or "", body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def receive(self, oid: str, body: bytes) -> None:
        if self.hub.uploads_left == 0:
            self.close_connection = True
            return self.connection.close()
        if self.hub.uploads_left is not None:
            self.hub.uploads_left -= 1
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self.hub.uploads.append(oid)
        return self.answer({})

    def of_repository(self, name: str, repository: Repository, rest: str, body: bytes) -> None:
        action, _, argument = rest.partition("/")
        if action in ("", "revision"):
            siblings = [{"rfilename": path} for path in repository.files]
            values = {"id": name, "sha": repository.sha, "private": repository.private}
            return self.answer({**values, "siblings": siblings})
        if action == "tree":
            return self.answer(
                [
                    {"type": "file", "path": path, "size": len(data), "oid": _digest(data)}
                    for path, data in repository.files.items()
                ]
            )
        if action == "resolve":
            data = repository.files[argument.partition("/")[2]]
            return self.answer(data, ETag=f'"{_digest(data)}"', X_Repo_Commit=repository.sha)
        if action == "preupload":
            files = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            return self.answer(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": modes[file["size"] >= LARGE],
                            "shouldIgnore": False,
                        }
                        for file in files
                    ]
                }
            )
        if rest == "info/lfs/objects/batch":
            return self.answer({"objects": [self.batch(o) for o in json.loads(body)["objects"]]})
        if action == "commit":
            return self.commit(name, repository, [json.loads(line) for line in body.splitlines()])
        return self.answer({"error": rest}, 404)

    def batch(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.hub.objects:
            return wanted
        upload = {"href": f"{constants.ENDPOINT}/objects/{wanted['oid']}"}
        return {**wanted, "actions": {"upload": upload}}

    def commit(self, name: str, repository: Repository, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.commits.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del repository.files[value["path"]]
        url = f"{constants.ENDPOINT}/{name}/commit/{repository.sha}"
        self.answer({"commitUrl": url, "commitOid": repository.sha})


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serve(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """A Hub that `huggingface_hub` talks to, with the right token; it caches in `folder`."""
    handler = type("HandlerOfOneHub", (Handler,), {"hub": Hub()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    url = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    # As the environment's HF_ENDPOINT and so on set them when the library is imported.
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    close_session()  # one of before may refuse all as offline
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    try:
        yield handler.hub
    finally:
        close_session()
        server.shutdown()
        server.server_close()
