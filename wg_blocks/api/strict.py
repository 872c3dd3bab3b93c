"""JSON schemas in the form that strict structured outputs take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KEPT = {
    "string": ("pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "array": ("minItems", "maxItems"),
}
_LOST = ("allOf", "not", "if", "patternProperties", "dependentSchemas", "dependentRequired", "contains", "prefixItems")


class _NotStrict(Exception):
    """The schema allows what strict decoding cannot."""


def strict_form(schema: Mapping[str, Any], *, lengths: bool = False) -> tuple[dict[str, Any], bool] | None:
    """The schema for strict decoding, and whether the answer is wrapped as `{"answer": ...}`; None if there is none.

    All properties become required (what was optional may be null) and objects closed; limits that strict decoding does
    not know are told in descriptions. What obeys it may still break `schema`, so the answer is checked against that.
    """
    try:
        form = _walk(schema, lengths)
        definitions = {k: _walk(v, lengths) for k, v in schema.get("$defs", {}).items()}
    except _NotStrict:
        return None
    wrapped = form.get("type") != "object"
    if wrapped:
        form = {"type": "object", "properties": {"answer": form}, "required": ["answer"], "additionalProperties": False}
    return {**form, **({"$defs": definitions} if definitions else {})}, wrapped


def _walk(node: Any, lengths: bool) -> dict[str, Any]:
    if not isinstance(node, Mapping) or any(k in node for k in _LOST):
        raise _NotStrict
    told = [str(node["description"])] if "description" in node else []
    if "$ref" in node:
        if not str(node["$ref"]).startswith("#/$defs/"):
            raise _NotStrict
        return {"$ref": node["$ref"]}
    out: dict[str, Any] = {}
    choices = node.get("anyOf", node.get("oneOf"))
    if choices is not None:
        if "properties" in node:
            raise _NotStrict
        out["anyOf"] = [_walk(c, lengths) for c in choices]
    elif "const" in node or "enum" in node:
        out |= {"type": node["type"]} if "type" in node else {}
        out["enum"] = [node["const"]] if "const" in node else list(node["enum"])
    else:
        kind = node.get("type") or ("object" if "properties" in node else "array" if "items" in node else None)
        if kind is None:
            raise _NotStrict
        out["type"] = kind
        for one in [kind] if isinstance(kind, str) else kind:
            out |= {k: node[k] for k in _KEPT.get(one, ()) if k in node}
            if one == "object":
                out |= _object(node, lengths)
            elif one == "array":
                out["items"] = _walk(node.get("items"), lengths)
            elif one == "string" and lengths:
                out |= {k: node[k] for k in ("minLength", "maxLength") if k in node}
            elif one == "string" and ("minLength" in node or "maxLength" in node):
                told.append(f"{node.get('minLength', 0)} to {node.get('maxLength', 'any number of')} characters")
    return out | ({"description": "; ".join(told)} if told else {})


def _object(node: Mapping[str, Any], lengths: bool) -> dict[str, Any]:
    properties, required = node.get("properties", {}), node.get("required", ())
    if node.get("additionalProperties") not in (None, False) or not set(required) <= set(properties):
        raise _NotStrict
    if not properties and node.get("additionalProperties") is not False:
        raise _NotStrict
    walked = {k: _walk(v, lengths) for k, v in properties.items()}
    given = {k: v if k in required else {"anyOf": [v, {"type": "null"}]} for k, v in walked.items()}
    return {"properties": given, "required": list(given), "additionalProperties": False}


def without_nulls(value: Any) -> Any:
    """The value without object members that are null: how strict answers leave out what was optional."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value
