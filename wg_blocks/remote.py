"""The caller's side of a level behind HTTP; the server's side is `serve`."""

from __future__ import annotations

import atexit
import ipaddress
import math
import os
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, NoReturn
from urllib.parse import urlsplit

import httpx2

from wg_blocks.wire import Packed, decode, encode, read_token, references, unpack
from wg_core.assembly.models import EndpointEntry
from wg_core.errors import (
    AbortRun,
    ConfigError,
    CorruptSnapshotError,
    OutputContractError,
    PortValueError,
    RemoteError,
    ReplayError,
)
from wg_core.execution.blobs import BlobStore
from wg_core.execution.context import Frame, RunOptions, check_stop
from wg_core.levels.remote import RemoteAnswer, RemoteCall
from wg_core.state.canonical import plain, sha256_bytes

_RETRIED = (502, 503, 504)
_ROUNDS = 3
_MARGIN_S = 2.0
_BROKEN = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError)


@cache
def _client() -> httpx2.Client:
    """One client for the process: connections are reused, proxies of the environment and redirects are not followed."""
    limits = httpx2.Limits(max_connections=256, max_keepalive_connections=32, keepalive_expiry=20)
    client = httpx2.Client(trust_env=False, follow_redirects=False, limits=limits)
    atexit.register(client.close)
    return client


class HttpTransport:
    """Protocol version 1 over HTTP."""

    def run(self, endpoint: EndpointEntry, call: RemoteCall) -> RemoteAnswer:
        """One run on the server; blobs that one side lacks are sent and fetched.

        Raises: RemoteError, ConfigError, PortValueError, OutputContractError, AbortRun, RunTimeoutError.
        """
        frame = call.frame
        if frame.options.calls is not None and frame.options.calls.replaying:
            raise ReplayError(f"{call.path}: what runs behind an endpoint is not recorded, so this cannot be replayed")
        exchange = _Exchange(endpoint, call.path, frame)
        blobs = frame.blobs
        packed = Packed(blobs)
        request_id = uuid.uuid4().hex
        tree: dict[str, Any] = {
            "inputs": {k: encode(v, packed, f"{call.path}.{k}") for k, v in call.inputs.items()},
            "options": _options(call, exchange),
            "contract_hash": call.contract_hash,
            "request_id": request_id,
            "place": _place(frame) if call.inside else [],
        }
        if call.config_hash is not None:
            tree["config_hash"] = call.config_hash
        tree["blobs"] = [sha for sha in packed.refs if blobs.has(sha)]
        media_type, pieces = packed.body(tree)
        body = b"".join(pieces)
        if len(body) > endpoint.max_bytes:
            raise exchange.error("too_large", f"the request has {len(body)} bytes; the limit is {endpoint.max_bytes}")
        with exchange.cancelling(request_id):
            for _ in range(_ROUNDS):
                status, kind, answer = exchange.send("POST", "/run", body, media_type)
                if status != 424:
                    break
                for sha in _missing(exchange, answer):
                    exchange.expect(exchange.send("PUT", f"/blobs/{sha}", blobs.get(sha), "application/octet-stream"))
        exchange.expect((status, kind, answer))
        try:
            result, parts = unpack(kind, answer)
            outputs = {k: decode(v, parts, f"{call.path}.{k}") for k, v in result["outputs"].items()}
            usage = {m: {k: _amount(n) for k, n in row.items()} for m, row in result.get("usage", {}).items()}
        except (ValueError, KeyError, TypeError, AttributeError, PortValueError, ConfigError, RecursionError) as error:
            raise exchange.error(
                "bad_answer", f"its answer is not readable: {type(error).__name__}: {error}"
            ) from error
        _fetch(exchange, blobs, references(outputs))
        return RemoteAnswer(outputs, usage)

    def spec(self, endpoint: EndpointEntry, path: str) -> dict[str, Any]:
        """What the server says of itself. Raises: RemoteError, ConfigError."""
        exchange = _Exchange(endpoint, path, None)
        status, kind, body = exchange.send("GET", "/spec")
        exchange.expect((status, kind, body))
        try:
            answer = unpack(kind, body)[0]
            protocol = answer["protocol"]
        except (ValueError, KeyError, TypeError) as error:
            raise exchange.error("bad_answer", f"its /spec is not readable: {type(error).__name__}: {error}") from error
        if protocol != 1:
            raise exchange.error("protocol", f"it speaks protocol {protocol!r}; version 1 is needed")
        return answer


def _amount(value: Any) -> float:
    """A number of the ledger. Raises: ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} is no amount of use")
    return value


class _Exchange:
    """The requests of one call: address, token, time that is left, retries, errors."""

    def __init__(self, endpoint: EndpointEntry, path: str, frame: Frame | None) -> None:
        self.endpoint = endpoint
        self.path = path
        self.frame = frame
        self.url, self.host = address(endpoint, path)
        self.ends = time.monotonic() + endpoint.timeout_s
        self.headers: dict[str, str] = {}
        if endpoint.token_env:
            self.headers["Authorization"] = f"Bearer {read_token(endpoint.token_env, os.environ)}"
        trace = frame.options.trace_context if frame is not None else None
        parent = trace.get("traceparent") if isinstance(trace, dict) else trace
        if isinstance(parent, str) and parent.isascii() and parent.isprintable():
            self.headers["traceparent"] = parent

    def left(self) -> float:
        """Seconds until the endpoint's timeout, or the run's if that is sooner. Raises: RunTimeoutError, RemoteError."""
        now = time.monotonic()
        if self.frame is not None:
            check_stop(self.frame)
        if now >= self.ends:
            self.too_slow()
        deadline = self.frame.deadline if self.frame is not None else None
        return min(self.ends, deadline if deadline is not None else self.ends) - now

    def too_slow(self) -> NoReturn:
        if self.frame is not None:
            check_stop(self.frame)
        raise self.error(
            "timeout",
            f"no answer within {self.endpoint.timeout_s:g} s; raise timeout_s of the endpoint or see what it does",
        )

    def send(
        self, method: str, path: str, body: bytes | None = None, media_type: str | None = None
    ) -> tuple[int, str, bytes]:
        """Status, media type and body; connection failures, 502, 503 and 504 are tried again, with the same body."""
        headers = {**self.headers, **({"Content-Type": media_type} if media_type else {})}
        endpoint = self.endpoint
        for attempt in range(endpoint.retries + 1):
            pause = endpoint.backoff_s * 2**attempt
            try:
                # the server ends a run at its time and says so; the margin leaves it time for that
                timeout = httpx2.Timeout(self.left() + _MARGIN_S, connect=min(endpoint.connect_timeout_s, self.left()))
                with _client().stream(
                    method, self.url + path, content=body, headers=headers, timeout=timeout
                ) as response:
                    status, kind, answer = (
                        response.status_code,
                        response.headers.get("content-type", ""),
                        self._read(response),
                    )
                problem = f"it answers {status}"
                if status not in _RETRIED:
                    return status, kind, answer
                wait = response.headers.get("retry-after", "")
                pause = max(pause, min(float(wait), 30.0)) if wait.isdigit() else pause
            except _BROKEN as error:
                status, kind, answer = 0, "", b""
                problem = f"{type(error).__name__}: {error}"
            except httpx2.TimeoutException:
                self.too_slow()
            if attempt < endpoint.retries:
                time.sleep(max(0.0, min(pause, self.left())))
        if status:
            return status, kind, answer
        raise self.error(
            "unreachable",
            f"cannot be reached or broke off ({problem}, tried {endpoint.retries + 1} times); start it (wg serve) or correct "
            "the endpoint's url; what is finished stays, the step can be run again",
        )

    def _read(self, response: httpx2.Response) -> bytes:
        pieces: list[bytes] = []
        size = 0
        for piece in response.iter_bytes():
            size += len(piece)
            if size > self.endpoint.max_bytes:
                raise self.error("too_large", f"its answer is larger than max_bytes, {self.endpoint.max_bytes}")
            if time.monotonic() > self.ends + _MARGIN_S:
                self.too_slow()
            pieces.append(piece)
        return b"".join(pieces)

    def expect(self, reply: tuple[int, str, bytes]) -> None:
        """Let a good answer pass. Raises: RemoteError, and the error that a local run would have raised."""
        status, kind, body = reply
        if status in (200, 204):
            return
        if 300 <= status < 400:
            raise self.error(
                "redirect", f"it answers {status}, a redirect, which is not followed; correct the url", status
            )
        said = self.said(kind, body)
        code, message = str(said.get("code", "http")), str(said.get("message", ""))[:4000]
        if code == "cancelled":
            raise AbortRun(f"{self.path}: the run was cancelled ({self.host}: {message})")
        if code == "run_timeout":
            self.too_slow()
        if said.get("kind") == "OutputContractError":
            raise OutputContractError(f"{self.path} at {self.host}: {message}")
        ways = {
            "unauthorized": f"it wants a token: {'set ' + self.endpoint.token_env if self.endpoint.token_env else 'name its variable with token_env'}",
            "contract_mismatch": "what is stored about it is out of date; store what its /spec answers",
            "config_mismatch": "it runs another configuration; serve the pinned one, or store what its /spec answers",
        }  # fmt: skip
        way = f"; {ways[code]}" if code in ways else ""
        raise self.error(
            code, f"it answers {status} {code}: {message or body[:200].decode('utf-8', 'replace')}{way}", status
        )

    @staticmethod
    def said(kind: str, body: bytes) -> dict[str, Any]:
        """What an error answer says, nothing if it is not one of this protocol."""
        try:
            error = unpack(kind, body)[0]["error"]
        except (ValueError, KeyError, TypeError):
            return {}
        return error if isinstance(error, dict) else {}

    def error(self, code: str, message: str, status: int | None = None) -> RemoteError:
        return RemoteError(f"{self.path} at {self.host}: {message}", code=code, status=status)

    @contextmanager
    def cancelling(self, request_id: str) -> Iterator[None]:
        """Tell the server when the run is cancelled here while it works."""
        cancel = self.frame.options.cancel if self.frame is not None else None
        if cancel is None:
            yield
            return
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.05):
                if cancel.is_set():
                    with suppress(httpx2.HTTPError):  # then it notices that nobody waits any longer
                        _client().delete(f"{self.url}/run/{request_id}", headers=self.headers, timeout=5.0)
                    return

        with ThreadPoolExecutor(1, thread_name_prefix="wg-cancel") as watcher:
            watcher.submit(watch)
            try:
                yield
            finally:
                over.set()


def address(endpoint: EndpointEntry, path: str) -> tuple[str, str]:
    """The endpoint's URL without a slash at its end, and its host with port, which alone is shown in messages.

    Raises: ConfigError for a bad URL, a host outside `allow_hosts`, or a token that would travel in the clear.
    """
    url = endpoint.url if endpoint.url is not None else os.environ.get(endpoint.url_env or "", "").strip()
    if not url:
        raise ConfigError(
            f"{path}: the environment variable {endpoint.url_env} is to hold the endpoint's url and is not set"
        )
    try:
        parts = urlsplit(url)
        name, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"{path}: the endpoint's url is malformed: {error}") from None
    if parts.scheme not in ("http", "https") or not name:
        raise ConfigError(
            f"{path}: an endpoint's url is http://host:port or https://host, not {parts.scheme or 'without'}://..."
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(f"{path}: an endpoint's url holds no user, password, query or fragment; use token_env")
    host = f"{name}:{port}" if port is not None else name
    if endpoint.allow_hosts and name not in endpoint.allow_hosts and host not in endpoint.allow_hosts:
        raise ConfigError(f"{path}: host {host} is not among allow_hosts {endpoint.allow_hosts}")
    if endpoint.token_env and parts.scheme == "http" and not _loopback(name) and not endpoint.allow_hosts:
        raise ConfigError(
            f"{path}: a token would travel in the clear to {host}; use https, or list the host in allow_hosts"
        )
    return url.rstrip("/"), host


def _loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _options(call: RemoteCall, exchange: _Exchange) -> dict[str, Any]:
    """The options with a meaning elsewhere, as JSON."""
    given: RunOptions = call.options
    options: dict[str, Any] = {"timeout_s": exchange.left()}
    for name in ("seed", "num_loop_steps", "max_agent_steps", "tool_errors", "per_node", "extra"):
        value = getattr(given, name)
        if value is not None:
            options[name] = plain(dict(value) if hasattr(value, "items") else value, f"{call.path}: option {name}")
    if given.trace_context is not None:
        with suppress(ConfigError):  # an object of this process says nothing elsewhere
            options["trace_context"] = plain(given.trace_context, "trace_context")
    return options


def _place(frame: Frame) -> list[dict[str, Any]]:
    """The running levels from the outermost in, as data."""
    chain: list[dict[str, Any]] = []
    at: Frame | None = frame
    while at is not None:
        chain.append({"level": at.level, "id": at.level_id, "node": at.node_id, "iteration": at.iteration, "turn": at.turn})
        at = at.parent
    return chain[::-1]


def _missing(exchange: _Exchange, answer: bytes) -> list[str]:
    return [str(sha) for sha in exchange.said("application/json", answer).get("blobs", [])]


def _fetch(exchange: _Exchange, blobs: BlobStore, wanted: set[str]) -> None:
    """Get what the answer refers to and is not here yet; bytes are checked against their hash."""
    for sha in sorted(wanted):
        if blobs.has(sha):
            continue
        status, kind, data = exchange.send("GET", f"/blobs/{sha}")
        if status != 200:
            exchange.expect((status, kind, data))
        if sha256_bytes(data) != sha:
            raise CorruptSnapshotError(f"{exchange.path} at {exchange.host}: blob {sha} came with other bytes")
        blobs.put(data)
