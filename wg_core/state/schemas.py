"""JSON schemas of what models write into the state, restricted to what a world holds.

They keep to the part of JSON Schema that constrained decoding supports, and every text is bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wg_core.state.content import WorldContent

MAX_CHANGES = 2


def _text(longest: int, shortest: int = 1) -> dict[str, Any]:
    return {"type": "string", "minLength": shortest, "maxLength": longest}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _one_of(values: Sequence[str]) -> dict[str, Any]:
    return {"type": "string", "enum": list(values)}


def intent_schema(content: WorldContent) -> dict[str, Any]:
    """`{text, focus}`; focus names at most two living entities."""
    properties: dict[str, Any] = {"text": _text(320, 20)}
    entities = content.ids("entity")
    if entities:
        properties["focus"] = {"type": "array", "items": _one_of(entities), "minItems": 1, "maxItems": 2}
    return _object(properties)


def outcome_schema(content: WorldContent) -> dict[str, Any]:
    """`{narrative, changes}`; changes update what there is, or add an entity, place or term under a new id."""
    forms: list[dict[str, Any]] = []
    for kind in ("entity", "place", "term"):
        ids = content.ids(kind)
        if ids:
            change = {"op": _one_of(["update"]), "kind": _one_of([kind]), "id": _one_of(ids), "fields": _object({"now": _text(120, 8)})}
            forms.append(_object(change))
    new = {"op": _one_of(["add"]), "kind": _one_of(["entity", "place", "term"])}
    new["id"] = {"type": "string", "pattern": "^[a-z][a-z_]{2,23}$"}
    forms.append(_object({**new, "fields": _object({"name": _text(32, 2), "description": _text(120, 8)})}))
    changes = {"type": "array", "items": {"anyOf": forms}, "minItems": 1, "maxItems": MAX_CHANGES}
    return _object({"narrative": _text(420, 40), "changes": changes})
