"""What JSON Schema cannot be told by the types of fields alone, so that it and the loader give one verdict on structure.

What refers to something (ids of nodes, cycles of edges, block types) is for the loader alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from wg_core.structure.ids import ID_PATTERN
from wg_core.structure.port import port_types

Rule = dict[str, Any]


def _given(name: str) -> Rule:
    """The key is there and not null."""
    return {"required": [name], "properties": {name: {"not": {"type": "null"}}}}


def _empty(*names: str) -> Rule:
    """Lists and mappings under these keys, if any, have nothing in them."""
    return {"properties": {name: {"maxItems": 0, "maxProperties": 0} for name in names}}


def _if(condition: Rule, then: Rule, otherwise: Rule | None = None) -> Rule:
    return {"if": condition, "then": then, **({"else": otherwise} if otherwise is not None else {})}


_PLACE: Rule = {"anyOf": [_given("endpoint"), _given("endpoint_url")]}
_PLACED: list[Rule] = [
    {"not": {"allOf": [_given("endpoint"), _given("endpoint_url")]}},
    _if(_given("contract"), _PLACE),
]
_PORTS = ("edges", "exposed_inputs", "exposed_outputs")
_OF_BASE = ("cycle", "models", "stages", "state_schema")

# model -> what else holds for it; the words for people are with the validators of `models`
RULES: dict[str, list[Rule]] = {
    "NodeEntry": [
        {"oneOf": [_given(name) for name in ("block_type", "model", "shares")]},
        _if({"not": _given("block_type")}, _empty("config")),
    ],
    "EndpointEntry": [{"oneOf": [_given("url"), _given("url_env")]}],
    "RemoteEntry": [*_PLACED, _PLACE],
    "GraphNodeEntry": [*_PLACED, {"oneOf": [_given("config"), _PLACE]}],
    "PipelineNodeEntry": [*_PLACED, {"oneOf": [_given("config"), _PLACE]}],
    "StageEntry": [
        *_PLACED,
        {"oneOf": [_given("graph"), _given("nodes"), _PLACE]},
        _if(_PLACE, _empty(*_PORTS, "inputs", "outputs")),
        _if(_given("graph"), _empty(*_PORTS)),
    ],
    "ExecutionEntry": [
        _if(
            {"properties": {"cycle": {"const": "canonical"}}},
            {"properties": {"stages": {"propertyNames": {"enum": "CANONICAL"}}}},
            {"properties": {"stages": {"propertyNames": {"not": {"const": "world_update"}}}}},
        ),
        _if(_given("base"), {"not": {"anyOf": [{"required": [name]} for name in _OF_BASE]}}, {"required": ["stages"]}),
        _if(_given("base"), _given("adapters"), {"not": _given("adapters")}),
    ],
}


def completed(schema: dict[str, Any], canonical: list[str]) -> dict[str, Any]:
    """A JSON Schema made from the models, with all that the models check beyond the types of their fields.

    `canonical` names the stages of the canonical cycle.
    """
    top = schema.pop("$ref", None)
    if top is not None:  # a kind that may hold one of its own kind
        schema = {**schema["$defs"][top.rpartition("/")[2]], **schema}
    for name, model in [(schema.get("title"), schema), *schema.get("$defs", {}).items()]:
        rules = RULES.get(str(name), [])
        if rules:
            model["allOf"] = [*model.get("allOf", []), *_replaced(rules, canonical)]
        shape = _SHAPES.get(str(name))
        if shape is not None:
            shape(model["properties"])
    _close(schema)
    return schema


def _replaced(rules: Any, canonical: list[str]) -> Any:
    if isinstance(rules, dict):
        return {k: canonical if v == "CANONICAL" else _replaced(v, canonical) for k, v in cast(Rule, rules).items()}
    return [_replaced(r, canonical) for r in cast("list[Any]", rules)] if isinstance(rules, list) else rules


def _tools(properties: dict[str, Any]) -> None:
    """A tool may be the id of its node alone."""
    named = properties["tools"]["patternProperties"]
    for pattern, entry in named.items():
        named[pattern] = {"anyOf": [{"type": "string", "pattern": f"^{ID_PATTERN}$"}, entry]}


def _types(properties: dict[str, Any]) -> None:
    """Types may be one text, `text|number`; all are registered."""
    known = sorted(port_types())
    one = f"({'|'.join(known)})"
    listed = {**properties["types"], "items": {"enum": known}}
    properties["types"] = {"anyOf": [listed, {"type": "string", "pattern": rf"^{one}(\|{one})*$"}]}


_SHAPES: dict[str, Callable[[dict[str, Any]], None]] = {"GraphEntry": _tools, "PortEntry": _types}


def _close(value: Any) -> None:
    """Keys that no pattern allows are not allowed."""
    if isinstance(value, dict):
        mapping = cast("dict[str, Any]", value)
        if "patternProperties" in mapping:
            mapping.setdefault("additionalProperties", False)
        for below in mapping.values():
            _close(below)
    elif isinstance(value, list):
        for below in cast("list[Any]", value):
            _close(below)
