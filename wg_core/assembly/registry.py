"""The registry: block types by name, and building a block from its words."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pydantic import ValidationError as PydanticError

from wg_core.errors import ConfigError, DuplicateBlockTypeError, UnknownBlockTypeError, WGError, did_you_mean
from wg_core.execution.block import Block

if TYPE_CHECKING:
    from wg_core.assembly.pool import ModelPool

_log = logging.getLogger("wg_core.registry")
_TYPE = re.compile(r"[a-z][a-z0-9_]*/[a-z0-9][a-z0-9_]*")
_SECRETS = re.compile(
    r"(^|_)(api_?key|access_?key|private_?key|token|password|passwd|secret|credentials?|authorization)$"
)
# values that are secrets under any name: a bearer header, a provider's key, a URL with a user, password or key in it
_SECRET_VALUES = re.compile(
    r"(?i:bearer)\s+[\w.~+/=-]{16,}|sk-[\w-]{20,}|[a-z][a-z0-9+.-]*://[^/\s@]*:[^/\s@]+@\S*"
    r"|https?://\S+[?&](?i:[\w-]*(?:key|token|secret|password|sig|signature))=\S+"
)
Factory = Callable[..., Block]
B = TypeVar("B", bound=type[Block])


class BlockRegistry:
    """Block types and their factories, one for each backend.

    A factory is a Block class, a function `(block_id, config=...)`, or the dotted name `package.module:attribute` of
    one, imported at first use.
    """

    def __init__(self, *, plugins: bool = False) -> None:
        self._factories: dict[str, dict[str, Factory | str]] = {}
        self._transports: dict[str, Callable[[], Any] | str] = {}
        self._pending_plugins = plugins
        self._lock = threading.RLock()
        self.broken_plugins: dict[str, str] = {}

    def register(
        self, block_type: str, factory: Factory | str, *, backend: str = "local", override: bool = False
    ) -> None:
        """Register a factory; doing so again with the same one changes nothing.

        Raises: ConfigError for a bad type, DuplicateBlockTypeError for a taken one without `override`.
        """
        if not _TYPE.fullmatch(block_type):
            hint = f"; did you mean {block_type.replace('.', '/')!r}?" if "." in block_type else ""
            raise ConfigError(f"block type {block_type!r} is not of the form role/name (lower case){hint}")
        with self._lock:
            backends = self._factories.setdefault(block_type, {})
            known = backends.get(backend)
            if known is not None and known is not factory and known != factory and not override:
                raise DuplicateBlockTypeError(
                    f"block type {block_type!r} ({backend}) is registered as {_name(known)}; "
                    f"pass override=True to replace it by {_name(factory)}"
                )
            backends[backend] = factory

    def _load_plugins(self) -> None:
        with self._lock:
            if not self._pending_plugins:
                return
            self._pending_plugins = False
            for point in entry_points(group="wg.blocks"):
                try:
                    point.load()(self)
                except Exception as error:  # a broken plugin must not take the others down
                    self.broken_plugins[point.name] = f"{type(error).__name__}: {error}"
                    _log.warning("plugin %r of %s is broken and left out: %s", point.name, point.value, error)

    def get(self, block_type: str, backend: str = "local") -> Factory:
        """The factory of a type.

        Raises: UnknownBlockTypeError with near spellings, or with the backends that exist.
        """
        self._load_plugins()
        backends = self._factories.get(block_type)
        if not backends:
            broken = f"; broken plugins: {self.broken_plugins}" if self.broken_plugins else ""
            raise UnknownBlockTypeError(
                f"block type {block_type!r} is not registered; {did_you_mean(block_type, self._factories)}{broken}"
            )
        factory = backends.get(backend)
        if factory is None:
            raise UnknownBlockTypeError(
                f"block type {block_type!r} has no backend {backend!r}; it has {', '.join(map(repr, sorted(backends)))}"
            )
        if isinstance(factory, str):
            module, _, attribute = factory.partition(":")
            try:
                return cast(Factory, getattr(importlib.import_module(module), attribute))
            except (ImportError, AttributeError) as error:
                raise UnknownBlockTypeError(
                    f"block type {block_type!r} is registered as {factory!r}, which cannot be imported: {error}"
                ) from error
        return factory

    def register_transport(self, name: str, factory: Callable[[], Any] | str) -> None:
        """Register how endpoints of a kind are reached: a callable, or its dotted name, that gives a transport."""
        self._transports[name] = factory

    def transport(self, name: str) -> Any:
        """A transport of this name, made at its first use. Raises: ConfigError."""
        self._load_plugins()
        with self._lock:
            found = self._transports.get(name)
            if found is None:
                raise ConfigError(f"no transport {name!r} is registered; {did_you_mean(name, self._transports)}")
            if isinstance(found, str):
                module, _, attribute = found.partition(":")
                found = cast("Callable[[], Any]", getattr(importlib.import_module(module), attribute))
        return found()

    def list(self, role: str | None = None) -> list[str]:
        """All block types, or those of one role."""
        self._load_plugins()
        return sorted(t for t in self._factories if role is None or t.split("/", 1)[0] == role)

    def backends(self, block_type: str) -> list[str]:
        self._load_plugins()
        return sorted(self._factories.get(block_type, ()))

    def __contains__(self, block_type: object) -> bool:
        self._load_plugins()
        return block_type in self._factories

    def is_agentic(self, block_type: str, backend: str = "local") -> bool:
        """Whether a type is an agent: marked so, with an optional input `tool_results` and output `tool_calls`."""
        factory: Any = self.get(block_type, backend)
        if not getattr(factory, "agentic", False):
            return False
        ports = cast("type[Block]", factory)._index
        ends = (ports.inputs.get("tool_results"), ports.outputs.get("tool_calls"))
        return all(port is not None and port.optional for port in ends)

    def build(self, config: Mapping[str, Any], *, pool: ModelPool | None = None) -> Block:
        """Build a block from `{block_type, block_id?, config}` (or flat: all other keys are its config).

        A config with `checkpoint_ref` or `model_id` comes from `pool`, if one is given.

        Raises: ConfigError, also for arguments of the wrong type or value, UnknownBlockTypeError.
        """
        block_type, block_id, inner = canonical(config)
        if pool is not None:
            return pool.get_or_build({"block_type": block_type, "block_id": block_id, "config": inner}, self)
        return self.build_new(block_type, block_id, inner, None)

    def build_new(
        self, block_type: str, block_id: str | None, config: Mapping[str, Any], pool: ModelPool | None
    ) -> Block:
        """Build a block of its own, past the pool."""
        backend = config.get("backend", "local")
        if not isinstance(backend, str):
            raise ConfigError(f"block {block_type!r}: backend is a name, not {backend!r}")
        factory = self.get(block_type, backend)
        arguments = {k: v for k, v in config.items() if k not in ("backend", "reuse")}
        model = getattr(factory, "config_model", None)
        if model is not None:
            try:
                model.model_validate(arguments)
            except PydanticError as error:
                problems = "; ".join(f"config.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
                raise ConfigError(f"block {block_type!r}: {problems}") from None

        try:
            block = _call(factory, block_type, block_id, arguments, SubBuilder(self, pool))
        except WGError:
            raise
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            said = f"{type(error).__name__}: {error}"[:300]
            raise ConfigError(f"block {block_type!r}: its config was refused ({said}); check types and values") from error
        block.block_type = block_type
        block.backend = backend
        block.placement = {k: config[k] for k in ("backend", "reuse") if k in config}
        return block


@dataclass(frozen=True, slots=True)
class SubBuilder:
    """What a constructor is given as `build`: it makes sub-blocks through the same registry and pool."""

    registry: BlockRegistry
    pool: ModelPool | None

    def __call__(self, config: Mapping[str, Any]) -> Block:
        return self.registry.build(config, pool=self.pool)


def _call(factory: Factory, block_type: str, block_id: str | None, arguments: dict[str, Any], build: Any) -> Block:
    """Turn config into plain arguments; what the factory does not take is an error that names the key."""
    target = factory.__init__ if inspect.isclass(factory) else factory
    parameters = inspect.signature(target).parameters
    extra: dict[str, Any] = {"build": build} if "build" in parameters else {}
    if "config" in parameters and parameters["config"].kind is not inspect.Parameter.VAR_KEYWORD:
        return factory(block_id, config=arguments, **extra)
    known = [n for n, p in parameters.items() if n not in ("self", "build", "block_id") and p.kind is not p.VAR_KEYWORD]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in arguments:
        if key not in known and not open_ended:
            raise ConfigError(f"block {block_type!r}: unknown config key {key!r}; {did_you_mean(key, known)}")
    for name in known:
        if parameters[name].default is inspect.Parameter.empty and name not in arguments:
            raise ConfigError(f"block {block_type!r}: config key {name!r} is missing")
    block = factory(**arguments, **extra)
    if block_id is not None:
        block._block_id = block_id
    return block


def canonical(config: Mapping[str, Any]) -> tuple[str, str | None, dict[str, Any]]:
    """`(block_type, block_id, inner config)` of either written form; the input is not changed.

    Raises: ConfigError for a missing or contradictory type, unknown keys beside `config`, secrets, non-JSON values.
    """
    given: Any = config
    if not isinstance(given, Mapping):
        raise ConfigError(f"a block is described by a mapping, not {type(given).__name__}")
    rest = dict(config)
    block_type = rest.pop("block_type", None)
    if "config" in rest or block_type is None:
        synonym = rest.pop("type", None)
        if synonym is not None and block_type is not None and synonym != block_type:
            raise ConfigError(f"block_type {block_type!r} and type {synonym!r} differ; give one")
        block_type = block_type or synonym
    if not isinstance(block_type, str):
        raise ConfigError(f"a block needs block_type: role/name; got keys {sorted(config)}")
    block_id = rest.pop("block_id", None)
    inner: Any = rest.pop("config", None) if "config" in rest else None
    if inner is None:
        inner, rest = ({}, rest) if "config" in config else (rest, {})
    if rest:
        raise ConfigError(f"block {block_type!r}: unknown keys {sorted(rest)} beside 'config'; put them inside it")
    if not isinstance(inner, Mapping):
        raise ConfigError(f"block {block_type!r}: config is a mapping, not {type(inner).__name__}")
    try:
        copied = json.loads(json.dumps(inner, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"block {block_type!r}: its config is not plain JSON data: {error}") from None
    refuse_secrets(copied, f"block {block_type!r}")
    return block_type, block_id, copied


def refuse_secrets(value: Any, owner: str) -> None:
    """Raises: ConfigError where a key looks like a secret; name the environment variable instead (`api_key_env`)."""
    if isinstance(value, Mapping):
        for key, below in cast("Mapping[str, Any]", value).items():
            if isinstance(below, str) and (
                _SECRETS.search(key.lower().replace("-", "_")) or _SECRET_VALUES.fullmatch(below.strip())
            ):
                raise ConfigError(
                    f"{owner}: {key!r} looks like a secret; secrets stay in the environment, name the variable: {key}_env"
                )
            refuse_secrets(below, owner)
    elif isinstance(value, list):
        for below in cast("list[Any]", value):
            if isinstance(below, str) and _SECRET_VALUES.fullmatch(below.strip()):
                raise ConfigError(
                    f"{owner}: a list in it holds what looks like a secret; secrets stay in the environment, name the variable"
                )
            refuse_secrets(below, owner)


def _name(factory: Factory | str) -> str:
    return factory if isinstance(factory, str) else getattr(factory, "__qualname__", repr(factory))


_default: BlockRegistry | None = None
_default_lock = threading.Lock()


def default_registry() -> BlockRegistry:
    """The process-wide registry, with all installed plugins (entry points `wg.blocks`)."""
    global _default
    with _default_lock:
        if _default is None:
            _default = BlockRegistry(plugins=True)
        return _default


def register_block(
    block_type: str, *, backend: str = "local", override: bool = False, registry: BlockRegistry | None = None
) -> Callable[[B], B]:
    """Class decorator: `@register_block("role/name")`."""

    def decorate(cls: B) -> B:
        (registry or default_registry()).register(block_type, cls, backend=backend, override=override)
        if "block_type" not in cls.__dict__:
            cls.block_type = block_type
        return cls

    return decorate


__all__ = ["BlockRegistry", "canonical", "default_registry", "refuse_secrets", "register_block"]
