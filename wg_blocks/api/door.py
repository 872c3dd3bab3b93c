"""The only way out of the process for calls behind an API: to one host, with the key, and answers only so large."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from typing import Any

import httpx2

from wg_blocks.api.client import max_response_bytes

CONNECT_S = 10.0

_TRAVEL = {
    "accept", "content-type", "content-length", "transfer-encoding", "user-agent", "idempotency-key", "host",
    "anthropic-version",
}  # fmt: skip


class Refused(httpx2.TransportError):
    """An exchange that the door stops."""


class Door(httpx2.AsyncBaseTransport):
    """Puts `headers()` (the key among them) on requests to one origin and stops all others.

    Of the headers that a provider's package sets only those travel that every request needs, so that nothing of the
    environment goes along. Answers are not compressed and at most as large as the call allows. Raises: Refused.
    """

    def __init__(self, url: httpx2.URL, headers: Callable[[], Mapping[str, str]], *, trust_env: bool) -> None:
        self._headers = headers
        self._origin = (url.scheme, url.host, url.port)
        self._inner: Any
        if trust_env:
            self._inner = httpx2.AsyncClient(trust_env=True, follow_redirects=False, timeout=None)
        else:  # reading the certificates takes 0.1 s, which a server without TLS need not cost
            verify: Any = True if url.scheme == "https" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            self._inner = httpx2.AsyncHTTPTransport(trust_env=False, verify=verify)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if (request.url.scheme, request.url.host, request.url.port) != self._origin:
            raise Refused(f"a request to {request.url.host} was stopped; calls go to {self._origin[1]} only")
        headers = {k: v for k, v in request.headers.items() if k.lower() in _TRAVEL}
        headers |= {"accept-encoding": "identity", **self._headers()}
        timeout = {"connect": CONNECT_S, "read": None, "write": None, "pool": None}
        sent = httpx2.Request(
            request.method, request.url, headers=headers, stream=request.stream, extensions={"timeout": timeout}
        )
        if isinstance(self._inner, httpx2.AsyncClient):
            response = await self._inner.send(sent, stream=True)
        else:
            response = await self._inner.handle_async_request(sent)
        limit = max_response_bytes.get()
        problem = ""
        if response.headers.get("content-encoding", "identity") != "identity":
            problem = "its answer is compressed, which was not asked for"
        elif int(response.headers.get("content-length") or 0) > limit:
            problem = f"its answer is larger than max_response_bytes ({limit})"
        if problem:
            await response.aclose()
            raise Refused(problem)
        return httpx2.Response(
            response.status_code,
            headers=response.headers,
            stream=_Bounded(response.stream, limit),
            extensions=response.extensions,
        )

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Bounded(httpx2.AsyncByteStream):
    """A stream that ends with an error when it grows too large."""

    def __init__(self, stream: Any, limit: int) -> None:
        self._stream = stream
        self._limit = limit

    async def __aiter__(self) -> Any:
        size = 0
        async for piece in self._stream:
            size += len(piece)
            if size > self._limit:
                raise Refused(f"its answer is larger than max_response_bytes ({self._limit})")
            yield piece

    async def aclose(self) -> None:
        await self._stream.aclose()
