"""The provider `openai`: any server that speaks OpenAI's HTTP API, through the `openai` package."""

from __future__ import annotations

import base64
import binascii
import json
import re
import ssl
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from wg_blocks.api.client import max_response_bytes
from wg_blocks.api.providers import Chat, Endpoint, Fault, Picture, Text
from wg_core.errors import (
    ApiRateLimitError,
    ApiResponseError,
    ApiTimeoutError,
    ConfigError,
    MissingCredentialError,
    MissingExtraError,
    did_you_mean,
)

try:
    import httpx2
    import openai
except ImportError as missing:
    raise MissingExtraError("provider openai needs the openai package: pip install 'openai>=3,<4'") from missing

OWN_URL = "https://api.openai.com/v1"
OWN_KEY = "OPENAI_API_KEY"
CONNECT_S = 10.0

_TRAVEL = {"accept", "content-type", "content-length", "transfer-encoding", "user-agent", "idempotency-key", "host"}
_QUOTA = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "quota_exceeded")
_OPTIONS = ("organization", "project", "query")


class OpenAI:
    """Chat Completions, Embeddings and Images.

    Options: `organization`, `project` (sent as headers), `query` (sent with each URL, as Azure's api-version).
    """

    strict = True

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.options: dict[str, Any] = json.loads(endpoint.options)
        for name in self.options:
            if name not in _OPTIONS:
                raise ConfigError(f"provider openai has no option {name!r}; {did_you_mean(name, _OPTIONS)}")
        own = endpoint.url is None
        self.lengths = not own  # OpenAI's own service refuses them, decoders elsewhere keep them
        self.key_env = endpoint.api_key_env or (OWN_KEY if own else None)
        tokens = "max_completion_tokens" if own else "max_tokens"
        self.wire: Mapping[str, str] = {
            "temperature": "temperature", "top_p": "top_p", "stop": "stop", "seed": "seed", "max_new_tokens": tokens,
        }  # fmt: skip
        self._sdk: openai.AsyncOpenAI | None = None

    @property
    def sdk(self) -> openai.AsyncOpenAI:
        if self._sdk is None:
            url = self.endpoint.address(OWN_URL)
            door = _Door(self, httpx2.URL(url), trust_env=self.endpoint.proxy_from_env)
            http = httpx2.AsyncClient(transport=door, trust_env=False, follow_redirects=False, timeout=None)
            self._sdk = openai.AsyncOpenAI(
                api_key="set-at-the-door",  # the key itself never enters the package: see _Door
                admin_api_key="",
                organization="",
                project="",
                webhook_secret="",
                base_url=url,
                max_retries=0,  # tried again by the client, within the call's deadline
                timeout=None,
                default_query=self.options.get("query"),
                http_client=http,
            )
        return self._sdk

    async def close(self) -> None:
        if self._sdk is not None:
            await self._sdk.close()

    # ---- tasks

    async def chat(self, chat: Chat) -> Text:
        messages: list[dict[str, Any]] = [dict(m) for m in chat.messages]
        if chat.images:
            at = max(i for i, m in enumerate(messages) if m["role"] == "user")
            parts: list[Any] = [{"type": "text", "text": messages[at]["content"]}]
            for png in chat.images:
                url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
                parts.append({"type": "image_url", "image_url": {"url": url}})
            messages[at] = {"role": "user", "content": parts}
        body: dict[str, Any] = {"model": chat.model, "messages": messages, **chat.settings, **chat.extra}
        if chat.form is not None and chat.form["type"] == "json_schema":
            named = {"name": "answer", "schema": chat.form["schema"], "strict": chat.form["strict"]}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        elif chat.form is not None:
            body["response_format"] = {"type": "json_object"}
        answer = await self._post("/chat/completions", body)
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            self._wrong("its answer has no choices")
        message, finish = choices[0].get("message"), choices[0].get("finish_reason")
        if not isinstance(message, dict):
            self._wrong("its answer has no message")
        if message.get("refusal"):
            self._wrong(f"the model refused: {str(message['refusal'])[:500]}")
        if finish == "content_filter":
            self._wrong("the provider's content filter stopped the answer (finish_reason content_filter)")
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(str(p.get("text", "")) for p in content if isinstance(p, dict))
        if not isinstance(content, str):
            self._wrong(f"its answer has no text (content {type(content).__name__}, finish_reason {finish!r})")
        return Text(content, finish != "length", *_tokens(answer))

    async def embed(self, model: str, texts: Sequence[str], settings: Mapping[str, Any]) -> tuple[list[Any], int]:
        body = {"model": model, "input": list(texts), "encoding_format": "float", **settings}
        answer = await self._post("/embeddings", body)
        rows = answer.get("data")
        if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
            self._wrong("its answer has no data")
        by_index = {r.get("index", i): r.get("embedding") for i, r in enumerate(rows)}
        if sorted(by_index, key=str) != sorted(range(len(texts)), key=str):
            self._wrong(f"it gave {len(rows)} vectors for {len(texts)} texts")
        return [by_index[i] for i in range(len(texts))], _tokens(answer)[0]

    async def picture(self, picture: Picture) -> tuple[bytes, int, int]:
        body: dict[str, Any] = {"model": picture.model, "prompt": picture.prompt, "n": 1, **picture.settings}
        if not picture.model.startswith(("gpt-image", "chatgpt-image")):  # these always send bytes and refuse the word
            body["response_format"] = "b64_json"
        if picture.image is None:
            answer = await self._post("/images/generations", body)
        else:
            answer = await self._post(
                "/images/edits", body, files=[("image", ("image.png", picture.image, "image/png"))]
            )
        rows = answer.get("data")
        if not isinstance(rows, list) or not rows or not isinstance(rows[0], dict):
            self._wrong("its answer has no data")
        coded = rows[0].get("b64_json")
        if not isinstance(coded, str) or not coded:
            self._wrong("it gave no picture (b64_json); a picture behind a URL is not fetched")
        try:
            return base64.b64decode(coded, validate=True), *_tokens(answer)
        except (binascii.Error, ValueError):
            self._wrong("its picture is no base64")

    # ---- one request

    async def _post(self, path: str, body: Mapping[str, Any], files: Any = None) -> dict[str, Any]:
        """The JSON object that answers. Raises: Fault."""
        failure: Fault
        self.endpoint.key(self.key_env)
        try:
            extra: dict[str, Any] = {"headers": {"Content-Type": "multipart/form-data"}} if files else {}
            response = await self.sdk.post(path, body=body, files=files, cast_to=httpx2.Response, options=extra)
            return self._object(response)
        except (Fault, MissingCredentialError, ConfigError):
            raise
        except openai.APIStatusError as error:
            failure = self._status(error.response)
        except openai.APITimeoutError:
            failure = Fault(ApiTimeoutError(self._says(f"it took no connection within {CONNECT_S:g} s")), again=True)
        except openai.APIConnectionError as error:
            cause = error.__cause__
            if isinstance(cause, (_Refused, httpx2.LocalProtocolError, httpx2.UnsupportedProtocol)):
                failure = Fault(ApiResponseError(self._says(str(cause))))
            else:
                why = f"{type(cause).__name__}: {cause}" if cause is not None else "no reason given"
                failure = Fault(
                    ApiResponseError(self._says(f"it cannot be reached or broke off ({why}); see that it runs")),
                    again=True,
                )
        raise failure from None  # the package's errors hold the whole request

    def _object(self, response: httpx2.Response) -> dict[str, Any]:
        def no_number(name: str) -> NoReturn:
            raise ValueError(f"{name} is no JSON number")

        try:
            answer = json.loads(self.redact(response.content.decode("utf-8-sig")), parse_constant=no_number)
        except (ValueError, RecursionError) as error:
            kind = response.headers.get("content-type", "no media type")
            raise Fault(
                ApiResponseError(self._says(f"it answers {kind} that is no JSON ({error}): {self._shown(response)}"))
            ) from None
        if not isinstance(answer, dict):
            self._wrong(f"its answer is a JSON {type(answer).__name__}, not an object")
        if isinstance(answer.get("error"), dict):
            self._wrong(f"its answer is an error: {str(answer['error'].get('message'))[:500]}")
        return answer

    def _status(self, response: httpx2.Response) -> Fault:
        """What an answer other than 200 means."""
        status, said, code = response.status_code, self._shown(response), ""
        try:
            error = json.loads(response.content)["error"]
            said, code = str(error["message"])[:1000], f"{error.get('code')} {error.get('type')}"
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        said, wait = self.redact(said), _retry_after(response.headers)
        if status == 429:
            if any(word in code for word in _QUOTA):
                return Fault(ApiRateLimitError(self._says(f"the quota is used up (429): {said}")))
            asks = f"; it asks to wait {wait:g} s" if wait is not None else ""
            return Fault(ApiRateLimitError(self._says(f"too many requests (429){asks}: {said}")), again=True, wait=wait)
        if 300 <= status < 400:
            return Fault(
                ApiResponseError(
                    self._says(f"it answers {status}, a redirect, which is not followed; correct endpoint_url")
                )
            )
        if status in (401, 403):
            way = f"see what {self.key_env} holds" if self.key_env else "name the key's variable with api_key_env"
            return Fault(ApiResponseError(self._says(f"it refuses the key ({status}); {way}: {said}")))
        way = "; see structure" if status == 400 and re.search("response_format|schema", said) else ""
        again = status in (408, 409) or status >= 500
        return Fault(ApiResponseError(self._says(f"it answers {status}: {said}{way}")), again=again, wait=wait)

    def _shown(self, response: httpx2.Response) -> str:
        return repr(self.redact(response.content[:200].decode("utf-8", "replace")))

    def redact(self, text: str) -> str:
        """The text without the key, should the server have sent it back."""
        try:
            key = self.endpoint.key(self.key_env)
        except MissingCredentialError:
            return text
        return text.replace(key, "[key]") if key else text

    def _says(self, message: str) -> str:
        host = httpx2.URL(self.endpoint.address(OWN_URL)).host
        return self.redact(f"provider openai at {host}: {message}")

    def _wrong(self, message: str) -> NoReturn:
        raise Fault(ApiResponseError(self._says(message)))


class _Refused(httpx2.TransportError):
    """An exchange that the door stops."""


class _Door(httpx2.AsyncBaseTransport):
    """The only way out: to one host, with the key and none of the environment's headers; answers only so large."""

    def __init__(self, provider: OpenAI, url: httpx2.URL, *, trust_env: bool) -> None:
        self._provider = provider
        self._origin = (url.scheme, url.host, url.port)
        self._inner: Any
        if trust_env:
            self._inner = httpx2.AsyncClient(trust_env=True, follow_redirects=False, timeout=None)
        else:  # reading the certificates takes 0.1 s, which a server without TLS need not cost
            verify: Any = True if url.scheme == "https" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            self._inner = httpx2.AsyncHTTPTransport(trust_env=False, verify=verify)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if (request.url.scheme, request.url.host, request.url.port) != self._origin:
            raise _Refused(f"a request to {request.url.host} was stopped; calls go to {self._origin[1]} only")
        headers = {k: v for k, v in request.headers.items() if k.lower() in _TRAVEL}
        headers["accept-encoding"] = "identity"
        options = self._provider.options
        for name in ("organization", "project"):
            if options.get(name):
                headers[f"openai-{name}"] = str(options[name])
        key = self._provider.endpoint.key(self._provider.key_env)
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
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
            raise _Refused(problem)
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
                raise _Refused(f"its answer is larger than max_response_bytes ({self._limit})")
            yield piece

    async def aclose(self) -> None:
        await self._stream.aclose()


def _tokens(answer: Mapping[str, Any]) -> tuple[int, int]:
    """Prompt and completion tokens as the server counted them; 0 where it did not."""
    usage = answer.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    pairs = (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens"))
    found = [next((usage[n] for n in names if n in usage), 0) for names in pairs]
    prompt, completion = (n if isinstance(n, int) and not isinstance(n, bool) and n > 0 else 0 for n in found)
    return prompt, completion


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait, from `retry-after-ms`, or `Retry-After` in seconds or as a date."""
    import email.utils
    import math
    import time

    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None
