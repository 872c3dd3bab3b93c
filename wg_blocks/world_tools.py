"""Tools that let an agent look into its world: they read the view that the stage is given, and change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wg_blocks.search import Build, searcher
from wg_core import Block, Port
from wg_core.assembly.roles import Tool
from wg_core.errors import ToolError, did_you_mean

MAX_ITEMS = 20
MAX_NAMES = 64
KINDS = ("entity", "place", "term", "rule")

_WORLD = Port("world", "in", "world", description="the view of the world; the graph feeds it")
_QUERY = Port("query", "in", "text", schema={"type": "string", "minLength": 1}, description="words to look for")


def _count(name: str, default: int, what: str) -> Port:
    schema = {"type": "integer", "minimum": 1, "maximum": MAX_ITEMS}
    return Port(name, "in", "number", default=default, schema=schema, description=what)


class _Searching(Tool):
    """A tool that searches by words, or with `search: {block_type, config}` by meaning (see `world/context`)."""

    def __init__(self, *, search: Mapping[str, Any] | None = None, build: Build | None = None) -> None:
        super().__init__()
        self.rank = searcher(search, build)

    def get_sub_blocks(self) -> dict[str, Block]:
        return {"search": self.rank.block} if self.rank is not None else {}


class SearchContent(_Searching):
    """Finds what is known in the world about some words."""

    ports = (
        _WORLD,
        _QUERY,
        _count("limit", 5, "how many passages at most"),
        Port("result", "out", "list", description="{text, source}, best first; empty where nothing matches"),
    )

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"result": inputs["world"].search(inputs["query"], int(inputs["limit"]), linked=False, rank=self.rank)}


class ReadEntity(Tool):
    """Reads all that is known about one character, place, term or rule, by its id or name.

    Of a world with few names the agent is told which there are. Raises: ToolError naming near ids where there is none.
    """

    ports = (
        _WORLD,
        Port("id", "in", "text", schema={"type": "string", "minLength": 1}, description="its id or name"),
        Port("kind", "in", "text", True, schema={"type": "string", "enum": list(KINDS)}, description="any without it"),
        Port("result", "out", "dict", description="{id, kind, retired, fields}"),
    )

    def narrowed(self, parameters: Mapping[str, Any], fed: Mapping[str, Any]) -> Mapping[str, Any]:
        """The arguments' schema with the names that the fed world has, if they are few."""
        names = list(dict.fromkeys(name for kind in KINDS[:3] for name in _named(fed["world"], kind)))
        if not 0 < len(names) <= MAX_NAMES or "id" not in parameters["properties"]:
            return parameters
        properties = parameters["properties"]
        return {**parameters, "properties": {**properties, "id": {**properties["id"], "enum": names}}}

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        world, wanted = inputs["world"], inputs["id"]
        kinds = [inputs["kind"]] if "kind" in inputs else KINDS
        found = (world.read(kind, wanted) or world.read(kind, _match(world, kind, wanted)) for kind in kinds)
        record = next(filter(None, found), None)
        if record is None:
            what = kinds[0] if len(kinds) == 1 else "record"
            raise ToolError(f"there is no {what} {wanted!r}; {did_you_mean(wanted, [i for k in kinds for i in _ids(world, k)])}")
        return {"result": {key: record[key] for key in ("id", "kind", "retired", "fields") if key in record}}


def _ids(world: Any, kind: str) -> list[str]:
    return {"entity": world.entity_ids, "place": world.place_ids, "term": world.term_ids}.get(kind, [])


def _named(world: Any, kind: str) -> dict[str, str]:
    """Id by name and by id."""
    found: dict[str, str] = {}
    for each in _ids(world, kind):
        name = str(world.read(kind, each)["fields"].get("name") or each)
        found.setdefault(name, each)
        found.setdefault(each, each)
    return found


def _match(world: Any, kind: str, wanted: str) -> str:
    plain = wanted.strip().casefold()
    return next((each for name, each in _named(world, kind).items() if name.casefold() == plain), "")


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


class QuoteEndWorld(_Searching):
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
        linked = one if one is not None else True
        return {"result": world.search(inputs["query"], int(inputs["limit"]), linked=linked, rank=self.rank)}
