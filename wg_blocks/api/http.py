"""What providers behind HTTP share: one request or stream through their package, and what its failures mean."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn

import httpx2

from wg_blocks.api.door import CONNECT_S, Door, Refused
from wg_blocks.api.providers import Chat, Endpoint, Fault, Hear, Picture, Speak, Tell, Text
from wg_core.errors import (
    ApiRateLimitError,
    ApiResponseError,
    ApiTimeoutError,
    ConfigError,
    MissingCredentialError,
    did_you_mean,
)

_QUOTA = (
    "insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "quota_exceeded", "billing_error",
)  # fmt: skip


class HttpProvider:
    """Base of providers that speak through a package of the family that `openai` and `anthropic` are of.

    The package is made with `sdk_settings` by `make_sdk`; the key never enters it. Tasks that a subclass does not
    implement are refused.
    """

    name: ClassVar[str]
    package: ClassVar[Any]
    own_url: ClassVar[str]
    own_key: ClassVar[str]
    options: ClassVar[Sequence[str]] = ()
    strict = True
    lengths = True

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.chosen: dict[str, Any] = json.loads(endpoint.options)
        for name in self.chosen:
            if name not in self.options:
                raise ConfigError(f"provider {self.name} has no option {name!r}; {did_you_mean(name, self.options)}")
        self.own = endpoint.url is None
        self.key_env = endpoint.api_key_env or (self.own_key if self.own else None)
        self._sdk: Any = None

    def make_sdk(self, **settings: Any) -> Any:
        """The package's asynchronous client."""
        raise NotImplementedError

    def headers(self, key: str | None) -> dict[str, str]:
        """Headers of every request."""
        raise NotImplementedError

    @property
    def sdk(self) -> Any:
        if self._sdk is None:
            url = self.endpoint.address(self.own_url)
            door = Door(
                httpx2.URL(url),
                lambda: self.headers(self.endpoint.key(self.key_env)),
                trust_env=self.endpoint.proxy_from_env,
            )
            self._sdk = self.make_sdk(
                api_key="set-at-the-door",  # the key itself never enters the package: see Door
                base_url=url,
                max_retries=0,  # tried again by the client, within the call's deadline
                timeout=None,
                http_client=httpx2.AsyncClient(transport=door, trust_env=False, follow_redirects=False, timeout=None),
            )
        return self._sdk

    async def close(self) -> None:
        if self._sdk is not None:
            await self._sdk.close()

    # ---- tasks

    async def chat(self, chat: Chat, tell: Tell | None = None) -> Text:
        self._lacks("chats")

    async def embed(self, model: str, texts: Sequence[Any], settings: Mapping[str, Any]) -> tuple[list[Any], int]:
        self._lacks("embeddings")

    async def picture(self, picture: Picture) -> tuple[bytes, int, int]:
        self._lacks("pictures")

    async def speak(self, speak: Speak) -> bytes:
        self._lacks("speech")

    async def hear(self, hear: Hear) -> Text:
        self._lacks("transcription")

    def _lacks(self, what: str) -> NoReturn:
        raise Fault(ConfigError(f"provider {self.name} offers no {what}; name another provider for this block"))

    # ---- one exchange

    async def post(self, path: str, body: Mapping[str, Any], files: Any = None) -> dict[str, Any]:
        """The JSON object that answers. Raises: Fault."""
        return self._object(await self.send(path, body, files))

    async def send(self, path: str, body: Mapping[str, Any], files: Any = None) -> httpx2.Response:
        """The answer as it came. Raises: Fault."""
        self.endpoint.key(self.key_env)
        extra: dict[str, Any] = {"headers": {"Content-Type": "multipart/form-data"}} if files else {}
        with self._faults():
            return await self.sdk.post(path, body=body, files=files, cast_to=httpx2.Response, options=extra)

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """The JSON objects of an event stream, as they come. Raises: Fault."""
        self.endpoint.key(self.key_env)
        with self._faults():
            stream = await self.sdk.post(
                path, body=body, cast_to=object, stream=True, stream_cls=self.package.AsyncStream[object]
            )
            try:
                kind = stream.response.headers.get("content-type", "no media type")
                if not kind.startswith("text/event-stream"):
                    await stream.response.aread()
                    self.wrong(f"it answers {kind} that is no event stream: {self._shown(stream.response)}")
                async for event in stream:
                    if not isinstance(event, dict):
                        self.wrong(f"an event of its stream is a JSON {type(event).__name__}, not an object")
                    yield event
            except (ValueError, RecursionError) as error:
                raise self._wrong(f"an event of its stream is no JSON ({error})") from None
            finally:
                await stream.close()
                await stream._iterator.aclose()  # it and the stream refer to each other: only a collector would end it

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Turns the errors of the package into Faults; they hold the whole request, so none is kept as a cause."""
        failure: Fault
        sdk = self.package
        try:
            yield
            return
        except (Fault, MissingCredentialError, ConfigError):
            raise
        except sdk.APIStatusError as error:
            if error.response.status_code < 300:  # an error event of a stream
                failure = self._event_error(error.body)
            else:
                failure = self._status(error.response)
        except sdk.APITimeoutError:
            failure = Fault(ApiTimeoutError(self.says(f"it took no connection within {CONNECT_S:g} s")), again=True)
        except (sdk.APIConnectionError, httpx2.TransportError) as error:
            cause = error if isinstance(error, httpx2.TransportError) else error.__cause__
            if isinstance(cause, (Refused, httpx2.LocalProtocolError, httpx2.UnsupportedProtocol)):
                failure = self._wrong(str(cause))
            else:
                why = f"{type(cause).__name__}: {cause}" if cause is not None else "no reason given"
                failure = self._wrong(f"it cannot be reached or broke off ({why}); see that it runs", again=True)
        except sdk.APIError as error:
            failure = self._event_error(error.body or {"message": error.message})
        raise failure from None

    def _event_error(self, body: Any) -> Fault:
        """What an error in the middle of a stream means."""
        error = body.get("error", body) if isinstance(body, Mapping) else body
        said = str(error.get("message") if isinstance(error, Mapping) else error)[:500]
        busy = isinstance(error, Mapping) and "overloaded" in f"{error.get('type')} {error.get('code')}"
        return self._wrong(f"its stream ended in an error: {said}", again=busy)

    def _object(self, response: httpx2.Response) -> dict[str, Any]:
        def no_number(name: str) -> NoReturn:
            raise ValueError(f"{name} is no JSON number")

        try:
            answer = json.loads(self.redact(response.content.decode("utf-8-sig")), parse_constant=no_number)
        except (ValueError, RecursionError) as error:
            kind = response.headers.get("content-type", "no media type")
            raise self._wrong(f"it answers {kind} that is no JSON ({error}): {self._shown(response)}") from None
        if not isinstance(answer, dict):
            self.wrong(f"its answer is a JSON {type(answer).__name__}, not an object")
        if error := answer.get("error"):
            said = error.get("message") if isinstance(error, dict) else error
            self.wrong(f"its answer is an error: {str(said or error)[:500]}")
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
        if status in (402, 429):
            if status == 402 or any(word in code for word in _QUOTA):
                return Fault(ApiRateLimitError(self.says(f"the quota is used up ({status}): {said}")))
            asks = f"; it asks to wait {wait:g} s" if wait is not None else ""
            return Fault(ApiRateLimitError(self.says(f"too many requests (429){asks}: {said}")), again=True, wait=wait)
        if 300 <= status < 400:
            return self._wrong(f"it answers {status}, a redirect, which is not followed; correct endpoint_url")
        if status in (401, 403):
            way = f"see what {self.key_env} holds" if self.key_env else "name the key's variable with api_key_env"
            return self._wrong(f"it refuses the key ({status}); {way}: {said}")
        way = "; see structure" if status == 400 and re.search("response_format|schema", said) else ""
        again = status in (408, 409) or status >= 500
        return Fault(ApiResponseError(self.says(f"it answers {status}: {said}{way}")), again=again, wait=wait)

    # ---- words

    def _shown(self, response: httpx2.Response) -> str:
        return repr(self.redact(response.content[:200].decode("utf-8", "replace")))

    def redact(self, text: str) -> str:
        """The text without the key, should the server have sent it back."""
        key = self._key_if_set()
        return text.replace(key, "[key]") if key else text

    def _key_if_set(self) -> str | None:
        try:
            return self.endpoint.key(self.key_env)
        except MissingCredentialError:
            return None

    def says(self, message: str) -> str:
        host = httpx2.URL(self.endpoint.address(self.own_url)).host
        return self.redact(f"provider {self.name} at {host}: {message}")

    def _wrong(self, message: str, *, again: bool = False) -> Fault:
        return Fault(ApiResponseError(self.says(message)), again=again)

    def wrong(self, message: str) -> NoReturn:
        """Raises: Fault, with an ApiResponseError that says this."""
        raise self._wrong(message)

    def told(self, tell: Tell) -> Told:
        """The text of a stream, told on as it grows."""
        return Told(tell, self._key_if_set())


class Told:
    """The text of a stream; pieces are told without the key, should the server have sent it back in pieces."""

    def __init__(self, tell: Tell, key: str | None) -> None:
        self._tell = tell
        self._key = key
        self._parts: list[str] = []
        self._held = ""

    async def add(self, piece: str) -> None:
        text = self._held + piece
        self._held = ""
        if self._key:
            text = text.replace(self._key, "[key]")
            held = next(
                (n for n in range(min(len(self._key) - 1, len(text)), 0, -1) if text.endswith(self._key[:n])), 0
            )
            text, self._held = text[: len(text) - held], text[len(text) - held :]
        if text:
            self._parts.append(text)
            await self._tell(text)

    async def end(self) -> str:
        """Tell what was held back; gives the whole text."""
        if self._held:
            self._parts.append(self._held)
            await self._tell(self._held)
            self._held = ""
        return "".join(self._parts)


def counted(answer: Mapping[str, Any]) -> tuple[int, int]:
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
