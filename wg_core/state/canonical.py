"""JSON in one spelling: what every hash of a state, content or snapshot is taken of."""

from __future__ import annotations

import json
import math
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn, cast

from wg_core.errors import ConfigError, WGError

MAX_DEPTH = 64
_INT_RANGE = range(-(2**63), 2**64)


def canonical_json(value: Any) -> str:
    """`value` as JSON with sorted keys and no whitespace.

    Raises: ConfigError if it is not JSON (NaN, infinities and live objects are not).
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"not plain JSON: {error}") from error


def canonical_bytes(value: Any) -> bytes:
    """`canonical_json` in UTF-8. Raises: ConfigError."""
    try:
        return canonical_json(value).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"not plain JSON: a text holds half of a surrogate pair ({error.reason})") from error


def sha256_bytes(data: bytes) -> str:
    """The sha256 of `data`, hex."""
    return sha256(data).hexdigest()


def sha256_json(value: Any) -> str:
    """The sha256 of the canonical JSON of `value`, hex. Raises: ConfigError."""
    return sha256_bytes(canonical_bytes(value))


def is_sha256(value: object) -> bool:
    """Whether `value` is spelled like a sha256: 64 lower-case hex digits."""
    return isinstance(value, str) and len(value) == 64 and all(c in "0123456789abcdef" for c in value)


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text; duplicate keys, NaN and infinities are refused.

    Raises: ValueError.
    """
    try:
        return json.loads(data, object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_mapping(path: Path, error: type[WGError]) -> dict[str, Any]:
    """The mapping in a JSON file, read as `parse_json` does. Raises: `error` for anything else."""
    try:
        found = parse_json(path.read_bytes())
    except ValueError as wrong:
        raise error(f"{path} is no readable JSON: {wrong}") from wrong
    if not isinstance(found, dict):
        raise error(f"{path} holds no mapping")
    return cast("dict[str, Any]", found)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} appears twice")
    return result


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def plain(value: Any, path: str, *, ordered: bool = False) -> Any:
    """A deep copy of `value`, which must be plain JSON: text, numbers, booleans, null, lists and string-keyed dicts.

    Tuples become lists; subclasses of the JSON types become the plain type. Keys are sorted as in `canonical_json`, so
    that a value that was stored and read reads like one that was not; `ordered` keeps the order that was given.
    `path` names the place in errors. Raises: ConfigError.
    """
    return _plain(value, path, 0, ordered)


def _plain(value: Any, path: str, depth: int, ordered: bool) -> Any:
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        text = str.__str__(value)
        if text.isascii():
            return text
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError(f"{path}: the text holds half of a surrogate pair, which no file can store") from None
        return text
    if isinstance(value, int):
        number = int(value)
        if number not in _INT_RANGE:
            raise ConfigError(f"{path}: the integer has {number.bit_length()} bits; use at most 64, or a text")
        return number
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ConfigError(f"{path}: {float(value)} is not JSON; use a finite number or null")
        return float(value)
    if depth >= MAX_DEPTH:
        raise ConfigError(f"{path}: nested deeper than {MAX_DEPTH} levels (or a list or dict that holds itself)")
    if isinstance(value, dict):
        result: dict[str, Any] = {}
        given = cast("dict[Any, Any]", value)
        for key in given:
            if not isinstance(key, str):
                raise ConfigError(f"{path}: the key {key!r} is {type(key).__name__}; JSON keys are text")
        for key in given if ordered else sorted(given):
            result[_plain(key, path, depth, ordered)] = _plain(given[key], f"{path}.{key}", depth + 1, ordered)
        return result
    if isinstance(value, list | tuple):
        items = cast("list[Any] | tuple[Any, ...]", value)
        return [_plain(item, f"{path}[{i}]", depth + 1, ordered) for i, item in enumerate(items)]
    raise ConfigError(
        f"{path}: {type(value).__module__}.{type(value).__qualname__} is not plain JSON; "
        "keep bytes and tensors in the blob store and hand on their id, and turn other objects into dicts"
    )
