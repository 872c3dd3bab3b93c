"""The state: the five blocks that flow round a world's cycle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from wg_core.errors import ConfigError, did_you_mean
from wg_core.state.canonical import canonical_json, parse_json, plain, sha256_json
from wg_core.state.forms import BLOCKS, DEFAULT_SCHEMA, Artifact, StateSchema, block_name, block_schema

__all__ = ["BLOCKS", "Artifact", "State", "StateSchema", "block_name", "block_schema"]


class State:
    """Five blocks, immutable: `put` gives a new state, `get` a copy.

    Blocks are named or numbered 1 to 5. Values are plain JSON in the forms of `schema`; anything else is refused.
    """

    __slots__ = ("_blocks", "_filled", "_hash", "_schema")
    _blocks: dict[str, Any]
    _filled: tuple[str, ...] | None
    _hash: str | None
    _schema: StateSchema

    def __init__(self, *, schema: StateSchema = DEFAULT_SCHEMA) -> None:
        self._fill({}, schema)

    def _fill(self, blocks: dict[str, Any], schema: StateSchema) -> State:
        object.__setattr__(self, "_blocks", blocks)
        object.__setattr__(self, "_schema", schema)
        object.__setattr__(self, "_filled", None)
        object.__setattr__(self, "_hash", None)
        return self

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a State is immutable; use state.put({name!r}, value), which gives a new one")

    @classmethod
    def of(cls, blocks: Mapping[Any, Any], *, schema: StateSchema = DEFAULT_SCHEMA) -> State:
        """A state of `{block name or number: value}`. Raises: ConfigError naming block and field."""
        checked: dict[str, Any] = {}
        for block, value in blocks.items():
            name = block_name(block)
            if name in checked:
                raise ConfigError(f"state.{name} is given twice, by name and by number; give it once")
            checked[name] = schema.check(name, value)
        return cls.__new__(cls)._fill(checked, schema)

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str | bytes, *, schema: StateSchema = DEFAULT_SCHEMA) -> State:
        """The state of `to_json()`, or of its text. Raises: ConfigError."""
        if isinstance(data, str | bytes):
            try:
                data = parse_json(data)
            except ValueError as error:
                raise ConfigError(f"state: not JSON: {error}") from None
        if not isinstance(data, Mapping):
            raise ConfigError(f"state: a mapping of blocks is needed, not {type(data).__name__}")
        return cls.of(data, schema=schema)

    def to_json(self) -> dict[str, Any]:
        """The present blocks by name, in the order of the cycle's table; a copy."""
        return {name: plain(self._blocks[name], name) for name in BLOCKS if name in self._blocks}

    def put(self, block: int | str, value: Any) -> State:
        """A new state with `block` replaced. Raises: ConfigError naming block and field."""
        name = block_name(block)
        return State.__new__(State)._fill({**self._blocks, name: self._schema.check(name, value)}, self._schema)

    def get(self, block: int | str) -> Any:
        """A copy of the block's value, None if it is absent. Raises: ConfigError for an unknown block."""
        name = block_name(block)
        return plain(self._blocks[name], name) if name in self._blocks else None

    def read(self, dotted: str) -> Any:
        """A copy of the value at `block` or `block.field...`, None where the state has none.

        Raises: ConfigError for an unknown block or field.
        """
        name, fields = self.check_path(dotted, schema=self._schema)
        value = self._blocks.get(name)
        for field in fields:
            if not isinstance(value, dict):
                return None
            value = cast("dict[str, Any]", value).get(field)
        return plain(value, dotted)

    def write(self, dotted: str, value: Any) -> State:
        """A new state with `block` or `block.field...` replaced, the rest of the block kept. Raises: ConfigError."""
        name, fields = self.check_path(dotted, schema=self._schema)
        if not fields:
            return self.put(name, value)
        block = cast("dict[str, Any]", self.get(name) or {})
        here = block
        for field in fields[:-1]:
            inner: Any = here.setdefault(field, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"state.{dotted}: {field!r} holds no fields; write {name}.{fields[0]} whole")
            here = cast("dict[str, Any]", inner)
        here[fields[-1]] = value
        return self.put(name, block)

    @staticmethod
    def check_path(dotted: str, *, schema: StateSchema = DEFAULT_SCHEMA) -> tuple[str, tuple[str, ...]]:
        """`dotted` as block name and fields below it. Raises: ConfigError for an unknown block or top field."""
        block, *fields = dotted.split(".")
        name = block_name(block)
        known = schema.fields(name)
        if not all(fields):
            raise ConfigError(f"state path {dotted!r} has an empty part; write 'block' or 'block.field'")
        if fields and known is not None and fields[0] not in known:
            hint = did_you_mean(fields[0], known)
            raise ConfigError(f"state path {dotted!r}: block {name!r} has no field {fields[0]!r}; {hint}")
        return name, tuple(fields)

    def filled(self) -> frozenset[int]:
        """The numbers of the blocks that are present and not empty.

        Empty are: an intent without words, no requests, slots without artifacts, descriptions without words or facts,
        and an outcome with neither words nor changes.
        """
        return frozenset(BLOCKS.index(name) + 1 for name in self.filled_names())

    def filled_names(self) -> tuple[str, ...]:
        """The names of the filled blocks, in order."""
        if self._filled is None:
            found = tuple(b for b in BLOCKS if b in self._blocks and _says(b, self._blocks[b]))
            object.__setattr__(self, "_filled", found)
        return cast("tuple[str, ...]", self._filled)

    def artifacts(self) -> Iterator[dict[str, Any]]:
        """Copies of all artifacts, slot by slot in order of name."""
        slots = self._blocks.get("artifacts", {})
        for slot in sorted(slots):
            yield from plain(slots[slot], f"artifacts.{slot}")

    def hash(self) -> str:
        """The sha256 of the canonical JSON of the present blocks."""
        if self._hash is None:
            object.__setattr__(self, "_hash", sha256_json(self._blocks))
        return cast(str, self._hash)

    @property
    def schema(self) -> StateSchema:
        """The forms that this state obeys."""
        return self._schema

    def __eq__(self, other: object) -> bool:
        return isinstance(other, State) and other.hash() == self.hash()

    def __hash__(self) -> int:
        return hash(self.hash())

    def __copy__(self) -> State:
        return self

    def __deepcopy__(self, memo: object) -> State:
        return self

    def __repr__(self) -> str:
        text = canonical_json(self.to_json())
        return f"State({text if len(text) <= 200 else text[:200] + '...'})"


def _says(name: str, value: Any) -> bool:
    if name == "intent":
        return bool(value["text"].strip())
    if name == "generation_config":
        return bool(value["requests"])
    if name == "artifacts":
        return any(value.values())
    if name == "descriptions":
        return any(item["text"].strip() or item["facts"] for item in value["items"])
    return bool(value["narrative"].strip() or value["changes"])
