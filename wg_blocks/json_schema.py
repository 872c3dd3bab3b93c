"""JSON schemas for what models write: check them, bound them for decoding, check answers against them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from wg_core.errors import ConfigError

MAX_STRING = 240
MAX_ITEMS = 8
MAX_NUMBER = 1_000_000

_SCALARS: dict[str, Any] = {"type": ["string", "integer", "boolean"]}
_IN_PLACE = ("allOf", "anyOf", "oneOf")


def check_schema(schema: Any) -> None:
    """Raises: ConfigError for what is no JSON schema (2020-12), refers to what it does not hold, or has a bad pattern."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    if not isinstance(schema, Mapping):
        raise ConfigError(f"a JSON schema is an object, not {type(schema).__name__}")
    try:
        if not _in_one_piece().is_valid(schema):
            Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ConfigError(f"bad JSON schema at {error.json_path}: {error.message[:300]}") from error
    refs = set(_values(schema, "$ref", "$dynamicRef"))
    outside = sorted(ref for ref in refs if not ref.startswith("#"))
    if outside:
        raise ConfigError(f"JSON schema refers to {outside[0]!r}; only refs inside it ('#/$defs/...') are read")
    resolver = Registry().with_resource("", DRAFT202012.create_resource(schema)).resolver()
    for ref in sorted(refs):
        try:
            resolver.lookup(ref)
        except Unresolvable:
            raise ConfigError(f"JSON schema refers to {ref!r}, which it does not hold; define it or take the ref out") from None
    for pattern in _values(schema, "pattern"):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"JSON schema has the pattern {pattern[:200]!r}, which Python cannot read: {error}") from None


@lru_cache(maxsize=1)
def _in_one_piece() -> Any:
    """The meta-schema with its vocabularies joined: the same verdict as theirs in a small part of the time.

    Source: https://json-schema.org/draft/2020-12/schema.
    """
    from jsonschema import Draft202012Validator
    from jsonschema_specifications import REGISTRY

    def here(node: Any) -> Any:
        if isinstance(node, list):
            return [here(item) for item in node]
        if not isinstance(node, Mapping):
            return node
        found = {key: here(value) for key, value in node.items() if key not in ("$dynamicRef", "$dynamicAnchor", "$id")}
        if "$dynamicRef" in node:
            found["$ref"] = "#"
        elif isinstance(ref := node.get("$ref"), str):
            found["$ref"] = "#" + ref.partition("#")[2]
        return found

    top = Draft202012Validator.META_SCHEMA
    vocabularies = [REGISTRY.contents("https://json-schema.org/draft/2020-12/" + part["$ref"]) for part in top["allOf"]]
    whole: dict[str, Any] = {"type": top["type"], "properties": {}, "$defs": {}}
    for piece in (top, *vocabularies):
        for key in ("properties", "$defs"):
            whole[key] |= {name: here(form) for name, form in piece.get(key, {}).items()}
    return Draft202012Validator(whole)


def problems(schema: Mapping[str, Any], value: Any) -> list[str]:
    """What is wrong with `value` under `schema`, as `path: message` (at most five); empty when it is valid."""
    from itertools import islice

    from jsonschema import Draft202012Validator

    errors = Draft202012Validator(schema).iter_errors(value)
    try:
        return [f"{error.json_path}: {error.message[:200]}" for error in islice(errors, 5)]
    except RecursionError:
        return ["$: it is nested too deeply, or the schema refers to itself without end"]


def bounded(schema: Any, max_string: int = MAX_STRING, max_items: int = MAX_ITEMS) -> Any:
    """A copy in which nothing is unlimited, for decoding: what is valid under it is valid under `schema` too.

    Strings, arrays and numbers without an upper limit get one, objects take only the properties that they name, and
    "anything" becomes a string, integer or true/false. `uniqueItems` is left to the check of the finished answer.
    """

    def walk(node: Any, closed: bool) -> Any:
        if node is True or node == {}:
            node = _SCALARS
        if not isinstance(node, Mapping):
            return node
        out = {k: v for k, v in node.items() if k not in ("uniqueItems", "title", "description", "default", "examples")}
        mixed = any(k in out for k in _IN_PLACE) or "$ref" in out
        for key in _IN_PLACE:
            if key in out:
                out[key] = [walk(s, closed and key != "allOf") for s in out[key]]
        for key in ("properties", "$defs", "patternProperties", "dependentSchemas"):
            if key in out:
                out[key] = {k: walk(s, True) for k, s in out[key].items()}
        for key in ("items", "additionalProperties", "contains"):
            if isinstance(out.get(key), Mapping) or out.get(key) is True:
                out[key] = walk(out[key], True)
        if "prefixItems" in out:
            out["prefixItems"] = [walk(s, True) for s in out["prefixItems"]]
        if "enum" in out or "const" in out:
            return out
        kinds = _kinds(out)
        if "string" in kinds and not {"maxLength", "pattern", "format"} & set(out):
            out["maxLength"] = max(max_string, out.get("minLength", 0))
        if "array" in kinds:
            fixed = len(out.get("prefixItems", ()))
            if out.get("items", True) is True:
                out["items"] = walk(_SCALARS, True)
            if "maxItems" not in out and out["items"] is not False:
                out["maxItems"] = max(max_items, out.get("minItems", 0), fixed)
        if kinds & {"number", "integer"}:
            _bound_number(out)
        known = set(out.get("properties", {}))
        free = "additionalProperties" in out or "patternProperties" in out
        if "object" in kinds and closed and not mixed and not free and set(out.get("required", ())) <= known:
            out["additionalProperties"] = False
        return out

    return walk(schema, True)


def _kinds(node: Mapping[str, Any]) -> set[str]:
    """The types that a schema speaks of: those it names, else those its keywords are about."""
    named = node.get("type")
    if named is not None:
        return {named} if isinstance(named, str) else set(named)
    about = {
        "string": ("maxLength", "minLength", "pattern"),
        "array": ("items", "prefixItems", "minItems", "maxItems"),
        "object": ("properties", "required"),
        "number": ("minimum", "maximum", "multipleOf"),
    }
    return {kind for kind, keys in about.items() if any(k in node for k in keys)}


def _bound_number(out: dict[str, Any]) -> None:
    low = out.get("minimum", out.get("exclusiveMinimum"))
    high = out.get("maximum", out.get("exclusiveMaximum"))
    if high is None:
        out["maximum"] = max(MAX_NUMBER, (low or 0) + MAX_NUMBER)
    if low is None:
        out["minimum"] = min(-MAX_NUMBER, (high or 0) - MAX_NUMBER)


def _values(node: Any, *keys: str) -> list[str]:
    """The texts that stand under these keys, at any depth."""
    if isinstance(node, Mapping):
        own = [v for k, v in node.items() if k in keys and isinstance(v, str)]
        return own + [text for v in node.values() for text in _values(v, *keys)]
    if isinstance(node, list):
        return [text for v in node for text in _values(v, *keys)]
    return []
