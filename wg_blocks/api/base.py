"""What all blocks behind an API share: their config, their client, what a call costs, and clean answers."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic import ValidationError as PydanticError

from wg_blocks.api.cache import ResponseCache
from wg_blocks.api.client import Limits
from wg_blocks.api.providers import Endpoint, Provider, check_url, client_for, providers
from wg_core import Block, current_context
from wg_core.errors import ConfigError

T = TypeVar("T")

_ENV = r"^[A-Z_][A-Z0-9_]{0,127}$"  # capitals only: a key that was put here by mistake does not pass for a name


class Prices(BaseModel):
    """What a million tokens cost, and a `call` beside them (a picture, a recording), in any one currency."""

    model_config = ConfigDict(extra="forbid")

    prompt: float = Field(default=0.0, ge=0)
    completion: float = Field(default=0.0, ge=0)
    call: float = Field(default=0.0, ge=0)


class ApiConfig(BaseModel):
    """How a model is reached. Equal configs are one block; equal provider, endpoint and key source one client.

    `endpoint_url` is `http(s)://...` or `env:NAME`; without it the provider's own. `api_key_env` names the variable
    with the key; without it no key is sent to an `endpoint_url`. `timeout_s` is for one answer, with all attempts.
    `prices` are per million tokens. With `cache` an answer is kept under the engine's home folder, by the whole request,
    and an equal request is not made again. `options` go to the provider, `extra_body` into each request as they are.
    """

    model_config = ConfigDict(extra="forbid")

    model_id: str = Field(min_length=1, max_length=256)
    provider: str | None = None
    endpoint_url: str | None = None
    api_key_env: str | None = Field(default=None, pattern=_ENV)
    timeout_s: float = Field(default=120.0, gt=0, le=3600)
    max_retries: int = Field(default=3, ge=0, le=10)
    max_concurrent_requests: int = Field(default=8, ge=1, le=256)
    max_response_bytes: int = Field(default=8 << 20, ge=1024, le=1 << 30)
    prices: Prices | None = None
    cache: bool = False
    options: dict[str, Any] = {}
    extra_body: dict[str, Any] = {}
    allow_http: bool = False
    proxy_from_env: bool = False


class ChatConfig(ApiConfig):
    """`structure` is how a schema is asked for: `strict` as the schema that strict decoding takes (what that cannot say
    is checked afterwards), `json_schema` as it is, `json_object` or `prompt` in words; `auto` is strict where possible.
    `wire` adds or renames settings that the server knows (`{top_k: top_k}`), or leaves one out (`{seed: null}`).
    """

    structure: Literal["auto", "strict", "json_schema", "json_object", "prompt"] = "auto"
    wire: dict[str, str | None] = {}


@dataclass(frozen=True)
class Asking(Generic[T]):
    """One request as a block makes it: `request` is plain JSON and all that decides the answer, `shown` what hooks see.

    `prompt_tokens` and `completion_tokens` are what it may take; `tokens(answer)` is what it took. `check(answer)` raises
    for what is no result.
    """

    request: Mapping[str, Any]
    shown: Mapping[str, Any]
    prompt_tokens: int
    completion_tokens: int
    tokens: Callable[[T], tuple[int, int]]
    show: Callable[[T], Any]
    to_json: Callable[[T], Any]
    of_json: Callable[[Any], T]
    check: Callable[[T], object] | None = None


class ApiBlock(Block):
    """Base of blocks whose model runs elsewhere: no weights, no parameters, nothing is contacted before the first call.

    Raises: ConfigError at building; at a call MissingCredentialError, ApiTimeoutError, ApiRateLimitError,
    ApiResponseError, BudgetExceededError.
    """

    config_model: ClassVar[type[ApiConfig]] = ApiConfig
    default_provider: ClassVar[str | None] = None  # of a type that is named after one
    passes_gradient = False

    def __init__(self, block_id: str | None = None, *, config: Mapping[str, Any] | None = None) -> None:
        super().__init__(block_id)
        try:
            self.api: Any = self.config_model.model_validate(dict(config or {}))
        except PydanticError as error:
            told = "; ".join(f"config.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ConfigError(f"block {self.name!r}: {told}") from None
        api: ApiConfig = self.api
        name = api.provider or self.default_provider
        if name is None and api.endpoint_url is None:
            raise ConfigError(
                f"block {self.name!r}: model_id {api.model_id!r} needs a provider or an endpoint_url; "
                f"providers: {', '.join(providers.names())}"
            )
        if api.endpoint_url is not None and api.endpoint_url.startswith("env:"):
            if not re.fullmatch(_ENV, api.endpoint_url.removeprefix("env:")):
                raise ConfigError("endpoint_url env:NAME names an environment variable in capitals")
        elif api.endpoint_url is not None:
            check_url(api.endpoint_url, "endpoint_url", allow_http=api.allow_http or api.api_key_env is None)
        name = name or "openai"
        providers.check(name)
        self.endpoint = Endpoint(
            name, api.endpoint_url.rstrip("/") if api.endpoint_url is not None else None, api.api_key_env,
            json.dumps(api.options, sort_keys=True), api.proxy_from_env, api.allow_http,
        )  # fmt: skip
        self.limits = Limits(api.timeout_s, api.max_retries, api.max_concurrent_requests, api.max_response_bytes)
        self.model = f"{name}/{api.model_id}"
        self._where = {
            "provider": name, "options": api.options, "extra_body": api.extra_body, "model": api.model_id,
        }  # fmt: skip
        self._cache = ResponseCache() if api.cache else None

    def ask(
        self, asking: Asking[T], attempt: Callable[..., Awaitable[T]], *, stream: bool = False
    ) -> Generator[str, None, tuple[T, dict[str, int]]]:
        """One answer through the shared client, from the cache if it is kept there; counted and told to the run's hooks.

        Gives the answer and its `{calls, prompt_tokens, completion_tokens}`, which are 0 for one that was kept.

        `attempt(provider)` makes one attempt, `attempt(provider, tell)` where the answer is to be streamed. The call is
        held to the run's budget before it is made. Raises: BudgetExceededError, and what the client raises.
        """
        context = current_context()
        request: dict[str, Any] = {}
        if self._cache is not None:
            request = {**self._where, "endpoint": self.endpoint.address("own"), **asking.request}
        kept = self._cache.get(request, asking.of_json) if self._cache is not None else None
        if kept is not None:
            answer = kept
            self._tell(asking, answer, 0.0, {"prompt_tokens": 0, "completion_tokens": 0}, cached=True)
            return answer, {"calls": 0, "prompt_tokens": 0, "completion_tokens": 0}
        most = self.cost(asking.prompt_tokens, asking.completion_tokens)
        with context.hold(self.model, tokens=asking.prompt_tokens + asking.completion_tokens, cost=most) as held:
            started = time.perf_counter()
            client = client_for(self.endpoint)
            if stream:
                answer = yield from client.pieces(self.model, attempt, self.limits, context.frame)
            else:
                answer = client.call(self.model, attempt, self.limits, context.frame)
            seconds = time.perf_counter() - started
            prompt, completion = asking.tokens(answer)
            counts: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
            if self.api.prices is not None:
                counts["cost"] = self.cost(prompt, completion)
            context.add_usage(self.model, **counts, held=held)
        self._tell(asking, answer, seconds, counts)
        if asking.check is not None:
            asking.check(answer)
        if self._cache is not None:
            self._cache.put(request, asking.to_json(answer))
        return answer, {"calls": 1, "prompt_tokens": prompt, "completion_tokens": completion}

    def provider(self) -> Provider:
        """The provider behind the shared client."""
        return client_for(self.endpoint).provider

    def cost(self, prompt: int, completion: int) -> float | None:
        """What so many tokens cost, None where it is not known."""
        prices = self.api.prices
        if prices is None:
            return 0.0 if self.endpoint.provider == "fake" else None
        return prices.call + (prompt * prices.prompt + completion * prices.completion) / 1e6

    def _tell(self, asking: Asking[T], answer: T, seconds: float, counts: Mapping[str, Any], **more: Any) -> None:
        current_context().emit(
            "model_call", model=self.model, request=dict(asking.shown), answer=asking.show(answer), seconds=seconds,
            **counts, **more,
        )  # fmt: skip


def no_number(name: str) -> None:
    """For `json.loads`: NaN and the infinities are no JSON. Raises: ValueError."""
    raise ValueError(f"{name} is no JSON number")


def estimate(text: str) -> int:
    """Tokens of a text, where the model's tokenizer is elsewhere: four for three words, one for four characters."""
    return max(-(-len(text.split()) * 4 // 3), -(-len(text) // 4))


def sha(data: bytes) -> str:
    """The sha256 of bytes, in hex."""
    return hashlib.sha256(data).hexdigest()
