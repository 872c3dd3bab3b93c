"""A small hub on loopback: one repository, served as huggingface_hub's client asks for it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(repo: str, files: dict[str, bytes], revision: str) -> Generator[tuple[str, list[str]]]:
    """(address, paths asked for) of a hub whose `repo` has `files` at one revision, known as `revision` and COMMIT."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def answer(self, status: int, body: bytes, kind: str, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked.append(path)
            api, resolve = f"/api/models/{repo}", f"/{repo}/resolve/{COMMIT}/"
            if path in (f"{api}/revision/{revision}", f"{api}/revision/{COMMIT}"):
                siblings = [{"rfilename": name} for name in files]
                info = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
                self.answer(200, json.dumps(info).encode(), "application/json")
            elif path == f"{api}/tree/{COMMIT}":
                tree = [{"type": "file", "path": n, "size": len(d), "oid": _etag(d)} for n, d in files.items()]
                self.answer(200, json.dumps(tree).encode(), "application/json")
            elif path.startswith(resolve) and (name := path.removeprefix(resolve)) in files:
                data = files[name]
                self.answer(200, data, "application/octet-stream", ETag=f'"{_etag(data)}"', X_Repo_Commit=COMMIT)
            else:
                self.answer(404, b'{"error": "not found"}', "application/json", X_Error_Code="EntryNotFound")

        do_HEAD = do_GET  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
