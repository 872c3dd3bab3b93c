"""Providers: who speaks which wire format, by name; and one shared client for each endpoint."""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol, cast

from wg_core.errors import ConfigError, MissingCredentialError, did_you_mean

if TYPE_CHECKING:
    from wg_blocks.api.client import Client

_log = logging.getLogger("wg_blocks.api")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where calls go and which environment variable holds the key: equal endpoints share one client.

    `url` may be `env:NAME`; None is the provider's own address. `options` is the provider's own, as JSON text. With
    `allow_http` a key may travel in the clear to an address that `env:NAME` gives.
    """

    provider: str
    url: str | None = None
    api_key_env: str | None = None
    options: str = "{}"
    proxy_from_env: bool = False
    allow_http: bool = False

    def address(self, default: str) -> str:
        """The URL that calls go to. Raises: ConfigError for one that cannot be used, without showing it."""
        url = self.url or default
        if url.startswith("env:"):
            name = url.removeprefix("env:")
            url = os.environ.get(name, "").strip()
            if not url:
                raise ConfigError(
                    f"{self.provider}: the environment variable {name} is to hold endpoint_url; it is not set"
                )
            check_url(url, f"what {name} holds", allow_http=self.allow_http or self.api_key_env is None)
        return url.rstrip("/")

    def key(self, default_env: str | None = None) -> str | None:
        """The key, read now from the environment; None where none is asked for. Raises: MissingCredentialError."""
        name = self.api_key_env or default_env
        if name is None:
            return None
        key = os.environ.get(name, "").strip()
        if not key:
            raise MissingCredentialError(
                f"{self.provider}: the environment variable {name} holds the provider's key and is not set; set {name}"
            )
        if not key.isascii() or not key.isprintable() or " " in key:
            raise MissingCredentialError(f"{self.provider}: what the environment variable {name} holds is no key")
        return key


def check_url(url: str, what: str, *, allow_http: bool) -> None:
    """Raises: ConfigError for a URL with a secret in it, of another scheme, or (unless allowed) in the clear."""
    import ipaddress
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ConfigError(f"{what} is no URL") from None
    if parts.scheme not in ("http", "https") or not host or any(c.isspace() for c in url):
        raise ConfigError(f"{what} is http(s)://host[:port][/path], or env:NAME of the variable that holds it")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ConfigError(
            f"{what} holds no user, password, query or fragment; name the key's variable with api_key_env"
        )
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if parts.scheme == "http" and not loopback and not allow_http:
        raise ConfigError(f"{what}: a key would travel in the clear to {host}; use https, or say allow_http: true")


Tell = Callable[[str], Awaitable[None]]
"""Takes one piece of a text; waits while nobody asks for more."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool as a model wrote it: `arguments` is JSON text, not yet checked."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Chat:
    """One chat to complete; `images` (PNG) belong to the last user message, `settings` have the provider's names.

    `messages` are `{role, content}`, those of an assistant perhaps with `tool_calls` (`{id, name, arguments}`), those of
    the role `tool` with the `tool_call_id` that they answer (and `is_error` for an error). The `arguments` of a call are
    an object, or text that is no JSON object. `tools` are `{name, description, parameters}`, the last a JSON schema;
    `tool_choice` is `auto`, `none` or `required`. `form` is None or how a structure is asked for: `{"type": "json_schema", "schema": ..., "strict": ...}`
    or `{"type": "json_object"}`.
    """

    model: str
    messages: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]
    seed: int
    form: Mapping[str, Any] | None = None
    images: Sequence[bytes] = ()
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str = "auto"


@dataclass(frozen=True, slots=True)
class Text:
    """What a model wrote, whether it ended by itself, the tokens that it took, and the tools that it calls."""

    text: str
    ended: bool
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture to make, from words or from another picture (PNG)."""

    model: str
    prompt: str
    settings: Mapping[str, Any]
    seed: int
    image: bytes | None = None


@dataclass(frozen=True, slots=True)
class Speak:
    """One text to say."""

    model: str
    text: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Hear:
    """One recording (WAV) to write down."""

    model: str
    wav: bytes
    settings: Mapping[str, Any]


class Provider(Protocol):
    """Speaks one wire format to one endpoint; each method makes one attempt.

    Raises: Fault (with the error that the caller is told). `wire` maps names of `Settings` to the provider's own;
    `strict` says whether a JSON schema is to come in the form of `strict_form` or as it is, `lengths` whether that form
    may hold the lengths of texts.
    """

    wire: Mapping[str, str]
    strict: bool
    lengths: bool

    async def chat(self, chat: Chat, tell: Tell | None = None) -> Text:
        """The whole answer; with `tell` it is streamed and its pieces are told as they come."""
        ...

    async def embed(self, model: str, texts: Sequence[Any], settings: Mapping[str, Any]) -> tuple[list[Any], int]:
        """Vectors in the order of `texts` (or what the server takes beside them), and the tokens that they took."""
        ...

    async def picture(self, picture: Picture) -> tuple[bytes, int, int]:
        """The bytes of an image file, prompt tokens and completion tokens."""
        ...

    async def speak(self, speak: Speak) -> bytes:
        """The bytes of a sound file (WAV)."""
        ...

    async def hear(self, hear: Hear) -> Text:
        """What is said in a recording."""
        ...

    async def close(self) -> None: ...


class Fault(Exception):
    """One attempt failed: what to tell the caller, whether to try `again`, and after how many seconds."""

    def __init__(self, error: Exception, *, again: bool = False, wait: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.again = again
        self.wait = wait


Factory = Callable[[Endpoint], Provider]


class ProviderRegistry:
    """Provider factories by name; packages add theirs through the entry point group `wg.providers`.

    An entry point is a callable that takes this registry. A factory, or its dotted name `package.module:attribute`,
    is called with an `Endpoint` at the first call that needs it.
    """

    def __init__(self, *, plugins: bool = False) -> None:
        self._factories: dict[str, Factory | str] = {}
        self._pending_plugins = plugins
        self._lock = threading.RLock()
        self.broken_plugins: dict[str, str] = {}

    def register(self, name: str, factory: Factory | str, *, override: bool = False) -> None:
        """Raises: ConfigError for a name that another factory has, without `override`."""
        with self._lock:
            known = self._factories.setdefault(name, factory)
            if known is not factory and known != factory:
                if not override:
                    raise ConfigError(f"provider {name!r} is registered already; pass override=True to replace it")
                self._factories[name] = factory

    def names(self) -> list[str]:
        self._load_plugins()
        return sorted(self._factories)

    def check(self, name: str) -> None:
        """Raises: ConfigError for a name that nobody registered, with near spellings and broken plugins."""
        if name in self._factories:
            return
        if name not in self.names():
            broken = f"; broken plugins: {self.broken_plugins}" if self.broken_plugins else ""
            raise ConfigError(f"provider {name!r} is not registered; {did_you_mean(name, self._factories)}{broken}")

    def make(self, endpoint: Endpoint) -> Provider:
        """A provider of this endpoint. Raises: ConfigError, MissingExtraError and what the factory raises."""
        self.check(endpoint.provider)
        factory = self._factories[endpoint.provider]
        if isinstance(factory, str):
            module, _, attribute = factory.partition(":")
            factory = cast(Factory, getattr(importlib.import_module(module), attribute))
        return factory(endpoint)

    def _load_plugins(self) -> None:
        with self._lock:
            if not self._pending_plugins:
                return
            self._pending_plugins = False
            for point in entry_points(group="wg.providers"):
                try:
                    point.load()(self)
                except Exception as error:  # a broken plugin must not take the others down
                    self.broken_plugins[point.name] = f"{type(error).__name__}: {error}"
                    _log.warning("plugin %r of %s is broken and left out: %s", point.name, point.value, error)


providers = ProviderRegistry(plugins=True)
providers.register("openai", "wg_blocks.api.openai_api:OpenAI")
providers.register("anthropic", "wg_blocks.api.anthropic_messages:Anthropic")
providers.register("fake", "wg_blocks.api.fake:Fake")


def register_provider(name: str, factory: Factory | str, *, override: bool = False) -> None:
    """Add a provider for this process. Raises: ConfigError for a taken name."""
    providers.register(name, factory, override=override)


_clients: dict[Endpoint, Client] = {}
_clients_lock = threading.Lock()


def client_for(endpoint: Endpoint) -> Client:
    """The client of this endpoint, shared by all blocks of the process."""
    from wg_blocks.api.client import Client

    with _clients_lock:
        found = _clients.get(endpoint)
        if found is None:
            found = _clients[endpoint] = Client(providers.make(endpoint))
        return found


def close_clients() -> None:
    """Close all connections; the next call opens new ones."""
    with _clients_lock:
        gone = list(_clients.values())
        _clients.clear()
    for client in gone:
        client.close()


def _after_fork() -> None:
    global _clients_lock
    _clients_lock = threading.Lock()
    _clients.clear()


atexit.register(close_clients)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
