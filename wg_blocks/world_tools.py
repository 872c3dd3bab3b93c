"""Tools that let an agent look into its world: they read the view that the stage is given, and change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wg_core import Port
from wg_core.assembly.roles import Tool
from wg_core.errors import ToolError, did_you_mean

MAX_ITEMS = 20
KINDS = ("entity", "place", "term", "rule")

_WORLD = Port("world", "in", "world", description="the view of the world; the graph feeds it")
_QUERY = Port("query", "in", "text", schema={"type": "string", "minLength": 1}, description="words to look for")


def _count(name: str, default: int, what: str) -> Port:
    schema = {"type": "integer", "minimum": 1, "maximum": MAX_ITEMS}
    return Port(name, "in", "number", default=default, schema=schema, description=what)


class SearchContent(Tool):
    """Finds what is known in the world about some words."""

    ports = (
        _WORLD,
        _QUERY,
        _count("limit", 5, "how many passages at most"),
        Port("result", "out", "list", description="{text, source}, best first; empty where nothing matches"),
    )

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"result": inputs["world"].search(inputs["query"], int(inputs["limit"]), linked=False)}


class ReadEntity(Tool):
    """Reads all that is known about one character, place, term or rule, by its id or name.

    Raises: ToolError naming near ids where there is none.
    """

    ports = (
        _WORLD,
        Port("id", "in", "text", schema={"type": "string", "minLength": 1}, description="its id or name"),
        Port("kind", "in", "text", default="entity", schema={"type": "string", "enum": list(KINDS)}),
        Port("result", "out", "dict", description="{id, kind, retired, fields}"),
    )

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        world, kind, wanted = inputs["world"], inputs["kind"], inputs["id"]
        record = world.read(kind, wanted) or _named(world, kind, wanted)
        return {"result": {key: record[key] for key in ("id", "kind", "retired", "fields") if key in record}}


def _named(world: Any, kind: str, wanted: str) -> Mapping[str, Any]:
    ids = {"entity": world.entity_ids, "place": world.place_ids, "term": world.term_ids}.get(kind, [])
    names: dict[str, str] = {}
    for found in ids:
        record = world.read(kind, found)
        names.setdefault(str(record["fields"].get("name") or found).casefold(), found)
        names.setdefault(found.casefold(), found)
    match = names.get(wanted.strip().casefold())
    if match is None:
        raise ToolError(f"there is no {kind} {wanted!r}; {did_you_mean(wanted, ids)}")
    return world.read(kind, match)


class ReadChronicle(Tool):
    """Reads what happened last in the world."""

    ports = (
        _WORLD,
        _count("last", 3, "how many events"),
        Port("result", "out", "list", description="{step, narrative}, oldest first"),
    )

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        entries = inputs["world"].last(int(inputs["last"]))
        return {"result": [{"step": e["step"], "narrative": e["narrative"]} for e in entries]}


class QuoteEndWorld(Tool):
    """Quotes from the finished worlds that this world is linked to.

    Raises: ToolError for a world that is not linked.
    """

    ports = (
        _WORLD,
        _QUERY,
        Port("from_world", "in", "text", optional=True, description="the id of one linked world; all without it"),
        _count("limit", 3, "how many passages at most"),
        Port("result", "out", "list", description="{text, source}, best first; empty where nothing matches"),
    )

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        world, one = inputs["world"], inputs.get("from_world")
        if one is not None and one not in world.linked_ids:
            raise ToolError(f"no end world {one!r} is linked; {did_you_mean(one, world.linked_ids)}")
        return {"result": world.search(inputs["query"], int(inputs["limit"]), linked=one if one is not None else True)}
