"""Hyperedges and links of a structure: lowered to what carries data, and asked after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from wg_core.errors import EdgeError, WGError, did_you_mean
from wg_core.execution.block import Block
from wg_core.structure.hyperlink import HyperEdge, HyperLink, Resolvers
from wg_core.structure.topology import Edge

if TYPE_CHECKING:
    from wg_core.execution.container import Container

ORIGIN = "hyper"


@dataclass(frozen=True, slots=True)
class Lowered:
    """What carries the data of a hyperedge: edges, and exposed inputs as `(node, port, name)`."""

    edges: tuple[Edge, ...] = ()
    inputs: tuple[tuple[str, str, str], ...] = ()


Lowering = Callable[["Container[Any]", HyperEdge], Lowered]


def _note(graph: Container[Any], hyperedge: HyperEdge) -> Lowered:
    return Lowered()


def _context(graph: Container[Any], hyperedge: HyperEdge) -> Lowered:
    ends: list[tuple[str, str]] = []
    sources: list[tuple[str, str]] = []
    for member in hyperedge.members:
        if member.port is None or member.path not in graph.nodes:
            raise EdgeError(
                f"{graph.id}: context {hyperedge.id!r} joins ports of nodes of this {graph.level}; {member.path!r} "
                + ("names no port" if member.path in graph.nodes else did_you_mean(member.path, graph.nodes))
            )
        (sources if member.role == "source" else ends).append((member.path, member.port))
    if len(sources) > 1 or not ends:
        raise EdgeError(f"{graph.id}: context {hyperedge.id!r} needs one source at most and at least one other member")
    if sources:
        return Lowered(edges=tuple(Edge(*sources[0], *end, origin=ORIGIN) for end in ends))
    return Lowered(inputs=tuple((*end, hyperedge.id) for end in ends))


_lowerings: dict[str, Lowering] = {"context": _context, "relation": _note, "group": _note}


def register_lowering(kind: str, lowering: Lowering) -> None:
    """Let hyperedges of a kind of one's own carry data: `lowering(level, hyperedge)` says along what.

    Raises: EdgeError for a kind that has another lowering.
    """
    if _lowerings.setdefault(kind, lowering) is not lowering:
        raise EdgeError(f"hyperedge kind {kind!r} has a lowering already; choose another name")


def lower(graph: Container[Any], hyperedge: HyperEdge) -> Lowered:
    """What carries the data of a hyperedge. Raises: EdgeError for an unknown kind or members that cannot be joined."""
    lowering = _lowerings.get(hyperedge.kind)
    if lowering is None:
        raise EdgeError(
            f"{graph.id}: hyperedge {hyperedge.id!r} is of kind {hyperedge.kind!r}, which has no lowering; register one, or "
            f"use relation for a note; {did_you_mean(hyperedge.kind, _lowerings)}"
        )
    return lowering(graph, hyperedge)


def carried_by(graph: Container[Any], hyperedge: HyperEdge) -> Lowered:
    """`lower` of a hyperedge that is there already: nothing where its members cannot be joined any more."""
    try:
        return lower(graph, hyperedge)
    except WGError:
        return Lowered()


def without(graph: Container[Any], hyperedge: HyperEdge, node_id: str) -> HyperEdge | None:
    """A hyperedge without its members in a node; None where the others would not be joined as they were."""
    members = tuple(m for m in hyperedge.members if m.path.partition("/")[0] != node_id)
    if len(members) == len(hyperedge.members):
        return hyperedge
    if not members:
        return None
    rest = hyperedge.model_copy(update={"members": members})
    try:
        left = lower(graph, rest)
    except WGError:
        return None
    was = carried_by(graph, hyperedge)
    return rest if {*left.edges, *left.inputs} <= {*was.edges, *was.inputs} else None


def find(graph: Container[Any], path: str) -> Any:
    """The level or block at a node path below `graph`, or None."""
    at: Any = graph
    for name in path.split("/") if path else ():
        if isinstance(at, Block):
            at = at.get_sub_blocks().get(name)
        else:
            node = cast("Container[Any]", at).nodes.get(name)
            at = node.child if node is not None else None
        if at is None:
            return None
    return at


def problems(graph: Container[Any]) -> Iterator[tuple[HyperEdge, str]]:
    """What is wrong with the hyperedges of a level: unknown members, and data that does not flow."""
    seen: set[str] = set()
    for hyperedge in graph.hyperedges:
        if hyperedge.id in seen:
            yield hyperedge, "there is another with this id"
        seen.add(hyperedge.id)
        whole = True
        for member in hyperedge.members:
            child = find(graph, member.path)
            if child is None:
                yield hyperedge, f"there is no node {member.path!r}"
            elif member.port is not None and member.port not in child.port_index.by_name:
                yield hyperedge, f"{member.path} has no port {member.port!r}; {did_you_mean(member.port, child.port_index.by_name)}"
            else:
                continue
            whole = False
        if not whole:
            continue
        try:
            lowered = lower(graph, hyperedge)
        except WGError as error:
            yield hyperedge, str(error)
            continue
        exposed = {(x.node_id, x.port_name, x.name) for x in graph.exposures("in", explicit=True)}
        lost = [str(e) for e in lowered.edges if e not in graph.edges]
        lost += [f"input {name} -> {node}.{port}" for node, port, name in lowered.inputs if (node, port, name) not in exposed]
        if lost:
            yield hyperedge, f"it is not joined: {', '.join(lost)}"


# ---- links -----------------------------------------------------------------------------------------------------------


def links_below(graph: Container[Any], path: str = "") -> Iterator[tuple[str, HyperLink]]:
    """All links of a level, its nodes and everything below, with the node path that they stand at."""
    for link in graph.links:
        yield path, link
    for node_id, node in graph.nodes.items():
        below = f"{path}/{node_id}" if path else node_id
        for link in node.links:
            yield below, link
        if not isinstance(node.child, Block):
            yield from links_below(node.child, below)


def hyperedges_below(graph: Container[Any], path: str = "") -> Iterator[tuple[str, HyperEdge]]:
    """All hyperedges of a level and everything below, with the path of the level that holds them."""
    for hyperedge in graph.hyperedges:
        yield path, hyperedge
    for node_id, node in graph.nodes.items():
        if not isinstance(node.child, Block):
            yield from hyperedges_below(node.child, f"{path}/{node_id}" if path else node_id)


def resolvers_of(graph: Container[Any]) -> Resolvers:
    """Resolvers of links into a level: `target_id` is a node path, for kind `port` with the port as fragment."""

    def target(link: HyperLink) -> Any:
        found = find(graph, link.target_id)
        if found is None:
            raise LookupError(f"{graph.id} has no node at {link.target_id!r}")
        if link.target_kind == "port":
            port = found.port_index.by_name.get(link.fragment)
            if port is None:
                raise LookupError(f"{link.target_id!r} has no port {link.fragment!r}")
            return port
        kind = "block" if isinstance(found, Block) else found.level
        if kind != link.target_kind:
            raise LookupError(f"{link.target_id!r} is a {kind}")
        return found

    def knows(link: HyperLink) -> bool:
        try:
            target(link)
        except LookupError:
            return False
        return True

    made = Resolvers()
    for kind in ("port", "block", "graph", "pipeline", "stage"):
        made.register(kind, target, knows=knows)
    return made
