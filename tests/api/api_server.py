"""A small server that speaks OpenAI's HTTP API on this machine, and can be told to misbehave."""

from __future__ import annotations

import base64
import json
import random
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from wires import refusal

from wg_blocks.api.sound import to_wav
from wg_blocks.llm_fake import invent
from wg_blocks.maps import to_png

KEY = "sk-test-0123456789-needle"


def chat(content: Any, finish: str = "stop", **message: Any) -> dict[str, Any]:
    """A reply with this content."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    return {"json": {"choices": [choice], "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}}}


def status(code: int, message: str = "no", error_code: str | None = None, **headers: str) -> dict[str, Any]:
    """A reply that is an error."""
    return {"status": code, "json": {"error": {"message": message, "code": error_code}}, "headers": headers}


def events(*data: Any, named: bool = False, done: bool = True) -> dict[str, Any]:
    """A reply that is an event stream; with `named` events have the name of their type."""
    names = [f"event: {e['type']}\n" if named else "" for e in data]
    texts = [e if isinstance(e, str) else json.dumps(e) for e in data]
    lines = [f"{name}data: {text}\n\n" for name, text in zip(names, texts, strict=True)]
    end = "data: [DONE]\n\n" * (done and not named)
    return {"raw": ("".join(lines) + end).encode(), "headers": {"Content-Type": "text/event-stream; charset=utf-8"}}


def deltas(text: str, finish: str | None = "stop", *more: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a chat completion: a word each, `more` deltas, the reason for its end, and usage."""
    said = [{"content": piece} for piece in re.findall(r"\s*\S+", text)]
    out: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": d}]} for d in (*said, *more)]
    out += [{"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}] if finish else []
    return [*out, {"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 7}}]


class ApiServer(ThreadingHTTPServer):
    """`replies` are given first, in turn, None for a good one; then good answers. `seen` holds `(path, headers, body)` of all requests.

    A conversation that a provider would refuse for its tool calls is refused, and takes no reply.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies: deque[dict[str, Any] | None] = deque()
        self.seen: list[tuple[str, dict[str, str], Any]] = []
        self.at_once = self.most_at_once = 0
        self.pause = 0.0
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.written = 0
        self.left = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ApiServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        try:
            body = json.loads(raw)
        except ValueError:
            body = raw
        server = self.server
        with server.lock:
            server.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            refused = refusal(self.path, body)
            reply = refused or (server.replies.popleft() if server.replies else None)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            time.sleep(server.pause)
            self._send(good(self.path.split("?")[0], body) if reply is None else reply)
        finally:
            with server.lock:
                server.at_once -= 1

    def _send(self, reply: dict[str, Any]) -> None:
        if reply.get("hang"):
            self.server.over.wait(30)
            return
        if "flow" in reply:
            self._flow(reply["flow"])
            return
        data = reply["raw"] if "raw" in reply else json.dumps(reply["json"]).encode()
        self.send_response(reply.get("status", 200))
        for name, value in {"Content-Type": "application/json", **reply.get("headers", {})}.items():
            self.send_header(name.replace("_", "-"), value)
        if (length := reply.get("length", len(data))) is not None:
            self.send_header("Content-Length", str(length))
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        for at in range(0, len(data), reply.get("drip", len(data) or 1)):
            self.wfile.write(data[at : at + reply.get("drip", len(data))])
            self.wfile.flush()
            if "drip" in reply and self.server.over.wait(0.1):
                return
        self.close_connection = "length" in reply

    def _flow(self, pieces: Iterable[bytes]) -> None:
        """Write an event stream piece by piece; `left` is set when the client goes away."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for piece in pieces:
                self.wfile.write(piece)
                self.wfile.flush()
                self.server.written += 1
                if self.server.over.wait(0.002):
                    return
        except OSError:
            self.server.left.set()
        self.close_connection = True


def good(path: str, body: Any) -> dict[str, Any]:
    if path.endswith("/chat/completions"):
        form = body.get("response_format", {})
        rng = random.Random(json.dumps(body, sort_keys=True))
        if form.get("type") == "json_schema":
            return chat(json.dumps(invent(form["json_schema"]["schema"], rng)))
        text = f"An answer number {rng.randrange(10**6)}."
        return events(*deltas(text)) if body.get("stream") else chat(text)
    if path.endswith("/audio/speech"):
        tone = np.sin(np.arange(len(body["input"]) * 100, dtype=np.float32) / 7)[None] * np.float32(0.5)
        return {"raw": to_wav(tone, 24000), "headers": {"Content-Type": "audio/wav"}}
    if path.endswith("/audio/transcriptions"):
        return {"json": {"text": "The bell rings.", "usage": {"input_tokens": 14, "output_tokens": 4}}}
    if path.endswith("/embeddings"):
        rows = [{"index": i, "embedding": [float(len(t)), 0.5, -1]} for i, t in enumerate(body["input"])]
        return {"json": {"data": rows[::-1], "usage": {"prompt_tokens": 3}}}
    return picture(to_png(np.full((8, 12, 3), 100, np.uint8)))


def picture(data: bytes) -> dict[str, Any]:
    return {"json": {"data": [{"b64_json": base64.b64encode(data).decode()}]}}


@contextmanager
def serving() -> Iterator[ApiServer]:
    """A running server."""
    server = ApiServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()
