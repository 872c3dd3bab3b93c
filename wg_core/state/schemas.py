"""JSON schemas of what models write into the state, restricted to what a world holds.

They keep to the part of JSON Schema that constrained decoding supports. Texts are bounded sentences, so that a small
model neither rambles nor breaks off, and of the names of a large world a step offers a few, drawn by its seed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from wg_core.state.content import WorldContent

MAX_CHANGES = 2
MAX_NAMES = 3
WITHIN = r'[^"\\\n.!?]'
SENTENCE = f"[A-Z]{WITHIN}{{20,140}}[a-z][.]"
NAME = r"[A-Z][a-z]{2,10}( [A-Z][a-z]{2,10}){0,2}"


def _pattern(pattern: str) -> dict[str, Any]:
    return {"type": "string", "pattern": f"^{pattern}$"}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _one_of(values: Sequence[str]) -> dict[str, Any]:
    return {"type": "string", "enum": list(values)}


def offered(ids: Sequence[str], seed: int, first: Sequence[str] = ()) -> list[str]:
    """At most `MAX_NAMES` of `ids`: those of `first` that exist, then others drawn by `seed`."""
    wanted = [i for i in first if i in ids][:MAX_NAMES]
    rest = sorted(set(ids) - set(wanted))
    return wanted + random.Random(seed).sample(rest, min(len(rest), MAX_NAMES - len(wanted)))


def _begins_with(content: WorldContent, kind: str, id: str) -> str:
    """A sentence that begins with the name of a record, so that it is about it."""
    name = str((content.get(kind, id) or {}).get("fields", {}).get("name", ""))
    plain = re.fullmatch(r"[A-Za-z][A-Za-z '-]{0,40}", name)
    return f"{name[0].upper()}{name[1:]} [a-z]{WITHIN}{{20,120}}[a-z][.]" if plain else SENTENCE


def intent_schema(content: WorldContent, seed: int) -> dict[str, Any]:
    """`{focus, text}`: the entity that it is about, and one or two sentences that begin with its name."""
    entities = offered(content.ids("entity"), seed)
    if not entities:
        return _object({"text": _pattern(f"{SENTENCE}( {SENTENCE})?")})
    forms = [
        _object(
            {
                "focus": {"type": "array", "items": _one_of([id]), "minItems": 1, "maxItems": 1},
                "text": _pattern(f"{_begins_with(content, 'entity', id)}( {SENTENCE})?"),
            }
        )
        for id in entities
    ]
    return forms[0] if len(forms) == 1 else {"anyOf": forms}


def outcome_schema(content: WorldContent, seed: int, focus: Sequence[str] = ()) -> dict[str, Any]:
    """`{narrative, changes}`: two or three sentences; changes update what there is, or add something new.

    `focus` names the entities that the intent was about; they are offered first, and the narrative begins with one.
    """
    forms: list[dict[str, Any]] = []
    for kind in ("entity", "place", "term"):
        ids = offered(content.ids(kind), seed, focus)
        if ids:
            change = {"op": _one_of(["update"]), "kind": _one_of([kind]), "id": _one_of(ids)}
            forms.append(_object({**change, "fields": _object({"now": _pattern(SENTENCE)})}))
    new = {"op": _one_of(["add"]), "kind": _one_of(["entity", "place"]), "id": _pattern("[a-z]{3,12}(_[a-z]{3,12})?")}
    forms.append(_object({**new, "fields": _object({"name": _pattern(NAME), "description": _pattern(SENTENCE)})}))
    changes = {"type": "array", "items": {"anyOf": forms}, "minItems": 1, "maxItems": MAX_CHANGES}
    first = _begins_with(content, "entity", focus[0]) if focus and focus[0] in content.ids("entity") else SENTENCE
    return _object({"narrative": _pattern(f"{first}( {SENTENCE}){{1,2}}"), "changes": changes})
