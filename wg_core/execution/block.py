"""Block: the one thing that computes. Everything else only joins blocks."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import os
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, cast

from wg_core.errors import (
    CheckpointError,
    ConfigError,
    MissingInputError,
    OutputContractError,
    PortError,
    PortValueError,
    StateDictError,
    UnexpectedInputError,
    did_you_mean,
)
from wg_core.execution.context import FRAME, check_stop
from wg_core.structure.port import UNSET, Port, check_ports, kind_of

_NO_ARGUMENTS: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})  # shared; read only


class PortIndex:
    """The ports of a block, looked up by name, alias and direction."""

    __slots__ = ("by_name", "inputs", "outputs")

    def __init__(self, ports: Sequence[Port], owner: str, *, apart: bool = False) -> None:
        """With `apart`, an output may have the name of an input, as in a level that takes and gives `state`."""
        for side in [[p for p in ports if p.direction == d] for d in ("in", "out")] if apart else [ports]:
            check_ports(side, owner)
        self.inputs: dict[str, Port] = {p.name: p for p in ports if p.direction == "in"}
        self.outputs: dict[str, Port] = {p.name: p for p in ports if p.direction == "out"}
        self.by_name: dict[str, Port] = {}  # where an alias is the name of a port of the other direction, that port
        for port in ports:
            self.by_name[port.name] = port
            for alias in port.aliases:
                self.by_name.setdefault(alias, port)

    def find(self, name: str, direction: str) -> Port | None:
        """The port of this name or alias, first one of this direction."""
        side = self.inputs if direction == "in" else self.outputs
        return side.get(name) or next((p for p in side.values() if name in p.aliases), None) or self.by_name.get(name)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Which keys a load did not find, and which it did not expect."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


class Checkpoints(Protocol):
    """What writes and reads checkpoint files; the weights floor, which is above this one, puts it into `Block`."""

    def save(self, block: Block, path: Path | str, *, format: str, backend: str) -> Path: ...

    def load(
        self, block: Block, path: Path | str, *, strict: bool, rename: Mapping[str, str] | None, verify: bool
    ) -> LoadReport: ...


class Block:
    """Base of all blocks: declare `ports`, implement `forward`.

    Constructor arguments are the block's config: they are recorded, must be JSON values, and come back from `config`.
    A class without its own constructor takes `config={...}` and reads `self.config`. `ports` is a class attribute, or
    is set in `__init__` when it depends on the arguments.
    """

    ports: Sequence[Port] = ()
    role: ClassVar[str | None] = None
    agentic: ClassVar[bool] = False
    poolable: ClassVar[bool] = True
    config_model: ClassVar[Any] = None
    call_time_keys: ClassVar[frozenset[str]] = frozenset()
    passes_gradient: ClassVar[bool] = True

    checkpoints: ClassVar[Checkpoints | None] = None

    block_type: str | None = None
    backend: str = "local"
    training: bool = False
    model_revision: int = 0

    _index: ClassVar[PortIndex] = PortIndex((), "Block")
    _arguments: tuple[tuple[Any, ...], dict[str, Any]]
    _model_key: tuple[str, ...] | None = None
    placement: Mapping[str, Any] = {}

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        block = super().__new__(cls)
        block._arguments = (args, kwargs) if args or kwargs else _NO_ARGUMENTS
        return block

    def __init__(self, block_id: str | None = None, *, config: Mapping[str, Any] | None = None) -> None:
        self._block_id = block_id

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "ports" in cls.__dict__ and isinstance(cls.__dict__["ports"], (tuple, list)):
            cls._index = PortIndex(cls.ports, cls.__name__)

    # ---- identity and config -------------------------------------------------------------------------------------

    @property
    def block_id(self) -> str:
        """An id that is unique and stays through save and load."""
        found = getattr(self, "_block_id", None)
        if found is None:
            self._block_id = found = f"{type(self).__name__}_{uuid.uuid4().hex[:12]}"
        return found

    @property
    def name(self) -> str:
        """What errors call this block: its registered type, else its class."""
        return self.block_type or type(self).__name__

    @property
    def config(self) -> dict[str, Any]:
        """A deep copy of the constructor arguments as plain data.

        Raises: ConfigError if an argument is not JSON.
        """
        try:
            return json.loads(json.dumps(self._named_arguments(), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"block {self.name!r}: its config is not plain JSON data: {error}; "
                "give it texts, numbers, lists and mappings, and make objects of them in __init__",
                code="NOT_SERIALIZABLE",
            ) from error

    def _named_arguments(self) -> dict[str, Any]:
        args, kwargs = self._arguments
        parameters = inspect.signature(type(self).__init__).parameters
        names = [
            n for n, p in parameters.items() if n != "self" and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if "config" in parameters and parameters["config"].kind is not inspect.Parameter.VAR_KEYWORD:
            return dict(given.get("config") or {})
        return {k: v for k, v in given.items() if k not in ("block_id", "build")}

    def to_config(self) -> dict[str, Any]:
        """`{block_type, block_id?, config}`, enough to build an equal block without weights.

        Raises: ConfigError for a block that was not built from a registered type.
        """
        if self.block_type is None:
            raise ConfigError(
                f"block of class {type(self).__name__} has no registered type; register it with @register_block('role/name')",
                code="NOT_SERIALIZABLE",
            )
        return {"block_type": self.block_type, "config": {**self.config, **self.placement}}

    def model_ref(self) -> tuple[str, ...] | None:
        """The key under which the pool shares this block's model, or None."""
        args, given = self._arguments
        named: dict[str, Any] = self._named_arguments() if args else {**given, **(given.get("config") or {})}
        if self.placement.get("reuse") is False or not ("checkpoint_ref" in named or "model_id" in named):
            return None
        if self._model_key is None:
            own = {k: v for k, v in self.placement.items() if k == "reuse"}
            self._model_key = model_key(self.name, self.backend, {**self.config, **own}, self.call_time_keys)
        return self._model_key

    def fork(self, name: str) -> Self:
        """A block of the same type and arguments with a state of its own; to the pool it is another model, `reuse: name`."""
        args, given = self._arguments
        made = type(self)(*args, **given)
        made.block_type, made.backend, made.training = self.block_type, self.backend, self.training
        made.placement = {**self.placement, "reuse": name}
        return made

    def weight_hash(self) -> str | None:
        """Hash of the weights that this block runs, where it has local ones."""
        return None

    # ---- ports -----------------------------------------------------------------------------------------------------

    @property
    def port_index(self) -> PortIndex:
        """All ports of this block, indexed."""
        own = self.__dict__
        if "ports" in own:
            index = own.get("_own_index")
            if index is None:
                index = self._own_index = PortIndex(own["ports"], self.name)
            return index
        return type(self)._index

    @property
    def input_ports(self) -> tuple[Port, ...]:
        return tuple(self.port_index.inputs.values())

    @property
    def output_ports(self) -> tuple[Port, ...]:
        return tuple(self.port_index.outputs.values())

    def get_port(self, name: str) -> Port:
        """The port with this name or alias. Raises: PortError."""
        port = self.port_index.by_name.get(name)
        if port is None:
            raise PortError(f"block {self.name!r} has no port {name!r}; {did_you_mean(name, self.port_index.by_name)}")
        return port

    # ---- running ---------------------------------------------------------------------------------------------------

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Compute outputs from inputs, both keyed by port name; never changes an input value.

        May be a coroutine (`async def`), or return any awaitable of the outputs; such a block runs in `run_async`.
        A block that implements `stream_forward` needs no `forward`: this one runs it to its end.
        """
        if type(self).stream_forward is Block.stream_forward:
            raise NotImplementedError(f"{type(self).__name__}.forward")
        pieces = self.stream_forward(inputs)
        try:
            while True:
                next(pieces)
                frame = FRAME.get()
                if frame is not None:
                    check_stop(frame)
        except StopIteration as stop:
            return stop.value
        finally:
            pieces.close()

    def stream_forward(self, inputs: dict[str, Any]) -> Generator[dict[str, Any], None, dict[str, Any]]:
        """`forward` in pieces: a generator that yields `{streamable output port: piece}` and returns the whole outputs.

        What pieces add up to is the block's affair (for text they are joined); the result counts. It may be closed at
        any piece. A block without it gives no pieces.
        """
        return self.forward(inputs)
        yield {}  # never reached: makes this a generator

    def batch_forward(self, inputs: dict[str, Any]) -> Generator[Any, Any, dict[str, Any]]:
        """`forward` as a part of a batch, where a block offers it: a generator that yields what it wants computed.

        It is sent the answer to each request, and returns the outputs. `answer_batch` gets the requests of several
        calls at once, each made in the context of its own call.
        """
        raise NotImplementedError(f"{type(self).__name__}.batch_forward")

    def answer_batch(self, requests: Sequence[Any]) -> list[Any]:
        """The answers to requests of `batch_forward`, in order; what one is must not depend on the others.

        An exception in the place of an answer is raised in the run that asked, and in no other.
        """
        raise NotImplementedError(f"{type(self).__name__}.answer_batch")

    @property
    def batches(self) -> bool:
        """Whether calls of several runs are computed together: the block implements `batch_forward`."""
        return type(self).batch_forward is not Block.batch_forward

    def run(self, inputs: Mapping[str, Any], *, strict_types: bool = False) -> dict[str, Any]:
        """`forward` with all checks, for stand-alone use.

        Raises: MissingInputError, UnexpectedInputError, PortValueError (with `strict_types`), OutputContractError.
        """
        ports = self.port_index
        given: dict[str, Any] = {}
        for key, value in inputs.items():
            port = ports.find(key, "in")
            if port is None or port.direction != "in":
                raise UnexpectedInputError(
                    f"block {self.name!r} has no input {key!r}; {did_you_mean(key, ports.inputs)}"
                )
            given[port.name] = value
        for name, port in ports.inputs.items():
            if name not in given and port.default is not UNSET:
                given[name] = copy.deepcopy(port.default)
        missing = [n for n, p in ports.inputs.items() if n not in given and not p.optional]
        if missing:
            raise MissingInputError(
                f"block {self.name!r} needs {', '.join(map(repr, missing))}; given: {sorted(inputs) or 'nothing'}"
            )
        if strict_types:
            check_kinds(self.name, ports.inputs, given)
        outputs = self.forward(given)
        check_outputs(self.name, ports.outputs, outputs)
        if strict_types:
            check_kinds(self.name, ports.outputs, outputs)
        return outputs

    def materialize(self) -> None:
        """Load what `forward` needs (weights, sessions); the base has nothing to load."""
        for sub in self.get_sub_blocks().values():
            sub.materialize()

    def close(self) -> None:
        """Release resources; called by the pool."""

    # ---- composition and state ---------------------------------------------------------------------------------------

    def get_sub_blocks(self) -> dict[str, Block]:
        """Blocks that this one is made of, by name (a letter or '_' first, then letters, digits, '_')."""
        return {}

    def iter_blocks(self) -> Iterator[Block]:
        """This block and all below it, each instance once."""
        seen: set[int] = set()
        stack: list[Block] = [self]
        while stack:
            block = stack.pop()
            if id(block) in seen:
                continue
            seen.add(id(block))
            yield block
            stack.extend(reversed(list(block.get_sub_blocks().values())))

    def own_state_dict(self) -> dict[str, Any]:
        """State of this block alone: `name -> tensor or JSON value`."""
        return {}

    def load_own_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `own_state_dict` gave; called after all checks."""
        if state:
            raise StateDictError(f"block {self.name!r} keeps no state but was given {sorted(state)}")

    def state_dict(self) -> dict[str, Any]:
        """Own state plus each sub-block's under `"<sub>.<key>"`.

        Raises: StateDictError if an own key begins like a sub-block's.
        """
        state = dict(self.own_state_dict())
        for name, sub in self.get_sub_blocks().items():
            clash = [k for k in state if k.startswith(f"{name}.")]
            if clash:
                raise StateDictError(
                    f"block {self.name!r}: own state key {clash[0]!r} begins like sub-block {name!r}; rename one"
                )
            state.update({f"{name}.{k}": v for k, v in sub.state_dict().items()})
        return state

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> LoadReport:
        """Load a state dict into this block and its sub-blocks; nothing changes if it raises.

        Raises: StateDictError for missing or unexpected keys (with `strict`), and always for a wrong shape.
        """
        current = self.state_dict()
        missing = tuple(k for k in current if k not in state)
        unexpected = tuple(k for k in state if k not in current)
        wrong = [
            f"{k!r}: {kind_of(state[k])} for {kind_of(current[k])}"
            for k in current
            if k in state and getattr(current[k], "shape", None) != getattr(state[k], "shape", None)
        ]
        if wrong or (strict and (missing or unexpected)):
            raise StateDictError(
                f"block {self.name!r} cannot load this state: missing {list(missing)}, unexpected {list(unexpected)}, "
                f"wrong shape {wrong}"
            )
        take_over(self._shares({k: v for k, v in state.items() if k in current}))
        return LoadReport(missing, unexpected)

    def _shares(self, state: Mapping[str, Any]) -> list[tuple[Block, dict[str, Any]]]:
        """A checked state split by block: each with all its own keys."""
        rest = dict(state)
        shares: list[tuple[Block, dict[str, Any]]] = []
        for name, sub in self.get_sub_blocks().items():
            prefix = f"{name}."
            below = {k.removeprefix(prefix): rest.pop(k) for k in list(rest) if k.startswith(prefix)}
            shares += sub._shares(below)
        return [(self, {**self.own_state_dict(), **rest}), *shares] if rest else shares

    # ---- training surface ----------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Switch this block and all below it to training (or evaluation) mode."""
        for block in self.iter_blocks():
            block.training = mode
            block.mode_changed()
        return self

    def eval(self) -> Self:
        return self.train(False)

    def mode_changed(self) -> None:
        """Called after `training` changed; torch blocks pass it on to their modules."""

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """Own and sub-block parameters as `(name, torch parameter)`; none in the base."""
        for name, sub in self.get_sub_blocks().items():
            for key, parameter in sub.named_parameters():
                yield f"{name}.{key}", parameter

    def named_trainable_parameters(self) -> Iterator[tuple[str, Any]]:
        """Parameters with gradients on, each tensor once."""
        seen: set[int] = set()
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter

    def may_learn(self) -> bool:
        """Whether this block alone has parameters that learn, or will have once it is loaded; loads nothing."""
        return False

    def trainable_parameters(self) -> list[Any]:
        return [parameter for _, parameter in self.named_trainable_parameters()]

    def adapter_slots(self) -> list[str]:
        """Names of modules that accept weight adapters."""
        return []

    def freeze(self, patterns: str | Sequence[str] | None = None) -> Self:
        """Keep parameters from learning: those whose names match a glob (`"net.*"`), without patterns all.

        What is wholly frozen stays in evaluation mode. Raises: ConfigError if no parameter matches.
        """
        return self._hold(patterns, True)

    def unfreeze(self, patterns: str | Sequence[str] | None = None) -> Self:
        """Undo `freeze` where names match; what was not learning before stays so. Raises: ConfigError as `freeze`."""
        return self._hold(patterns, False)

    @property
    def frozen(self) -> bool:
        """Whether there are parameters and none of them learns."""
        learning = [parameter.requires_grad for _, parameter in self.named_parameters()]
        return bool(learning) and not any(learning)

    def _hold(self, patterns: str | Sequence[str] | None, frozen: bool) -> Self:
        globs = [patterns] if isinstance(patterns, str) else patterns
        if not self.hold_parameters("", globs, frozen) and globs is not None:
            names = [name for name, _ in self.named_parameters()]
            if names:
                raise ConfigError(
                    f"block {self.name!r}: no parameter matches {globs}; {did_you_mean(str(globs[0]), names)}"
                )
        return self

    def hold_parameters(self, prefix: str, globs: Sequence[str] | None, frozen: bool) -> int:
        """Freeze or unfreeze what matches, here and below, and say how many parameters did; none in the base.

        Names are matched with `prefix` before them.
        """
        return sum(
            sub.hold_parameters(f"{prefix}{name}.", globs, frozen) for name, sub in self.get_sub_blocks().items()
        )

    def weights_changed(self) -> bool:
        """Whether this block no longer is what its model reference says; the pool then serves a fresh one."""
        return self.model_revision > 0 or any(sub.weights_changed() for sub in self.get_sub_blocks().values())

    def to(self, device: Any = None, dtype: Any = None) -> Self:
        """Move weights to a device, or to another float type; the base has none."""
        for sub in self.get_sub_blocks().values():
            sub.to(device, dtype)
        return self

    def save_checkpoint(self, path: Path | str, *, format: str = "dir", backend: str = "safetensors") -> Path:
        """Write the state of this block and all below it to `path`. Raises: CheckpointError."""
        return self._checkpoints().save(self, path, format=format, backend=backend)

    def load_from_checkpoint(
        self, path: Path | str, *, strict: bool = True, rename: Mapping[str, str] | None = None, verify: bool = True
    ) -> LoadReport:
        """Load what `save_checkpoint` wrote; nothing changes if it raises.

        Raises: FileNotFoundError, CheckpointError, StateDictError.
        """
        return self._checkpoints().load(self, path, strict=strict, rename=rename, verify=verify)

    @classmethod
    def _checkpoints(cls) -> Checkpoints:
        if cls.checkpoints is None:
            raise CheckpointError("no checkpoint writer is installed; import wg_core.weights.load")
        return cls.checkpoints

    def describe(self) -> dict[str, Any]:
        """Role, ports and properties as plain data."""
        return {
            "block_type": self.block_type,
            "role": self.role,
            "agentic": self.agentic,
            "poolable": self.poolable,
            "ports": [
                {"name": p.name, "direction": p.direction, "types": list(p.types), "optional": not p.required}
                for p in self.port_index.by_name.values()
            ],
        }

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.block_type or 'unregistered'}>"


def take_over(states: Sequence[tuple[Block, dict[str, Any]]]) -> None:
    """Give blocks their checked states; a block that refuses a value leaves all of them as before.

    Tensors were compared and cannot fail any more, so blocks with other values go first and are kept to go back to.
    """

    def plain(state: Mapping[str, Any]) -> bool:
        return not all(hasattr(value, "shape") for value in state.values())

    kept: list[tuple[Block, dict[str, Any]]] = []
    try:
        for block, state in sorted(states, key=lambda pair: not plain(pair[1])):
            if plain(state):
                own = block.own_state_dict()
                kept.append((block, {k: v.clone() if hasattr(v, "clone") else copy.deepcopy(v) for k, v in own.items()}))
            block.load_own_state_dict(state)
    except BaseException:
        for block, state in kept:
            block.load_own_state_dict(state)
        raise


def model_key(
    block_type: str, backend: str, config: Mapping[str, Any], call_time_keys: frozenset[str] = frozenset()
) -> tuple[str, ...] | None:
    """The identity of a model: `(block_type, backend, reference, fingerprint of the other load settings)`.

    `checkpoint_ref` (a model reference or path; two spellings of one file match) or `model_id` (a remote model, with
    its provider and endpoint) is the reference; a config with neither has no identity. `reuse: NAME` makes it another
    model, which is shared under that name only.

    Raises: ConfigError if both are given.
    """
    reference, remote = config.get("checkpoint_ref"), config.get("model_id")
    if reference is not None and remote is not None:
        raise ConfigError(
            f"block {block_type!r}: give checkpoint_ref (local weights) or model_id (a remote model), not both"
        )
    if reference is None and remote is None:
        return None
    if reference is not None:
        identity = os.path.realpath(str(reference)) if os.path.exists(str(reference)) else str(reference)
    else:
        identity = f"{config.get('provider', '')}+{config.get('endpoint_url', '')}+{remote}"
    identifying = {"backend", "checkpoint_ref", "model_id", "provider", "endpoint_url"} | call_time_keys
    identifying |= set() if isinstance(config.get("reuse"), str) else {"reuse"}
    rest = {k: v for k, v in config.items() if k not in identifying}
    fingerprint = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]
    return (block_type, backend, identity, fingerprint)


def check_kinds(owner: str, ports: Mapping[str, Port], values: Mapping[str, Any]) -> None:
    """Raises: PortValueError for the first value that is of none of its port's kinds."""
    for name, value in values.items():
        port = ports[name]
        if not port.accepts(value):
            raise PortValueError(f"{owner}.{name} takes {'|'.join(port.types)} but got {kind_of(value)}")


def check_outputs(owner: str, ports: Mapping[str, Port], outputs: Any) -> None:
    """Raises: OutputContractError if `outputs` is no dict, lacks a non-optional port or holds an undeclared one."""
    if not isinstance(outputs, dict):
        if inspect.isawaitable(outputs):
            if inspect.iscoroutine(outputs):
                outputs.close()
            raise OutputContractError(f"{owner} is asynchronous; run what it is in with run_async")
        raise OutputContractError(
            f"{owner} returned {kind_of(outputs)}; a block returns a dict keyed by its output ports"
        )
    unknown = [str(k) for k in cast("dict[Any, Any]", outputs) if k not in ports]
    missing = [k for k, p in ports.items() if k not in outputs and not p.optional]
    if unknown or missing:
        parts = [f"lacks {', '.join(map(repr, missing))}"] if missing else []
        parts += [f"has undeclared {', '.join(map(repr, unknown))}"] if unknown else []
        raise OutputContractError(f"{owner}: its output {' and '.join(parts)}; it declares {sorted(ports)}")
