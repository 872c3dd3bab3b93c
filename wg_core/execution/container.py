"""What is joined to what in a level: nodes, edges, hyperedges, and the ports that it offers outside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Generic, cast

from wg_core.errors import EdgeError, NodeError, WGError, did_you_mean
from wg_core.execution.block import Block, PortIndex
from wg_core.execution.hyper import ORIGIN, Lowered, carried_by, hyperedges_below, links_below, lower, without
from wg_core.execution.node import Child, Exposure, ExternalPort, LoopSpec, Node, Spec
from wg_core.execution.plan import LOOP_PORTS
from wg_core.structure.hyperlink import HyperEdge, HyperLink, Resolvers
from wg_core.structure.ids import check_id
from wg_core.structure.port import UNSET, Port
from wg_core.structure.topology import Edge


class Container(Generic[Child]):
    """Children with typed ports, joined by edges; `version` counts what was changed."""

    level: ClassVar[str] = "graph"
    allow_cycles: ClassVar[bool] = True
    passes_gradient: ClassVar[bool] = True

    def __init__(self, id: str | None = None, *, metadata: Mapping[str, Any] | None = None) -> None:
        self.id = check_id(id if id is not None else self.level, f"{self.level} id")
        self.title: str | None = None
        self.metadata: dict[str, Any] = dict(metadata or {})
        self.nodes: dict[str, Node[Child]] = {}
        self.loops: tuple[LoopSpec, ...] = ()
        self.links: list[HyperLink] = []
        self.hyperedges: list[HyperEdge] = []
        self.resolvers: Resolvers | None = None
        self.version = 0
        self._edges: dict[Edge, None] = {}
        self._in: dict[str, list[Edge]] = {}
        self._out: dict[str, list[Edge]] = {}
        self._exposed: dict[str, list[Exposure]] = {"in": [], "out": []}
        self._external: tuple[Any, PortIndex] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}: {len(self.nodes)} nodes, {len(self.edges)} edges>"

    def ports_of(self, node: Node[Child]) -> PortIndex:
        """The ports of a node's child."""
        child = cast("Block | Container[Any]", node.child)
        return child.port_index

    def stamp(self) -> Any:
        """Changes whenever the structure, or that of a child, changes."""
        return (self.version, self.metadata.get("num_loop_steps"))

    def resting(self) -> frozenset[str]:
        """Nodes that are part of the structure but that no plan calls."""
        return frozenset()

    # ---- building --------------------------------------------------------------------------------------------------

    def insert_node(
        self,
        child: Child,
        node_id: str,
        *,
        trainable: bool = True,
        defaults: Mapping[str, Any] | None = None,
        hints: Mapping[str, str] | None = None,
    ) -> str:
        """Add a ready child under `node_id`.

        Raises: NodeError for a taken id or a default of an unknown port, ConfigError for a bad id.
        """
        check_id(node_id, "node id")
        if node_id in self.nodes:
            raise NodeError(f"{self.id}: node id {node_id!r} is taken; choose another")
        node = Node(node_id, child, trainable, hints=dict(hints or {}))
        if defaults:
            named = {self._default_port(node, key): value for key, value in defaults.items()}
            node.defaults = MappingProxyType(named)
        self.nodes[node_id] = node
        self._in[node_id] = []
        self._out[node_id] = []
        self.version += 1
        return node_id

    def _default_port(self, node: Node[Child], key: str) -> str:
        index = self.ports_of(node)
        port = index.find(key, "in")
        if port is None or port.direction != "in":
            raise NodeError(
                f"{self.id}/{node.node_id}: default for unknown input {key!r}; {did_you_mean(key, index.inputs)}",
                code="DEFAULT_UNKNOWN_PORT",
            )
        return port.name

    def set_default(self, node_id: str, port: str, value: Any = UNSET) -> None:
        """Give an input of a node its default at this place; without a value, take it away.

        Raises: NodeError for an unknown node or input.
        """
        node = self.get_node(node_id)
        changed = {**node.defaults, self._default_port(node, port): value}
        node.defaults = MappingProxyType({k: v for k, v in changed.items() if v is not UNSET})
        self.version += 1

    def set_loops(self, loops: Iterable[LoopSpec]) -> None:
        """Set what is known about the cycles: their steps, order and early end."""
        self.loops = tuple(loops)
        self.version += 1

    def get_node(self, node_id: str) -> Node[Child]:
        """Raises: NodeError for an unknown id."""
        node = self.nodes.get(node_id)
        if node is None:
            raise NodeError(f"{self.id} has no node {node_id!r}; {did_you_mean(node_id, self.nodes)}")
        return node

    def remove_node(self, node_id: str) -> None:
        """Remove a node with its edges, its exposed ports and its part in hyperedges.

        A hyperedge whose other members are not joined without it, as those of a context without its source, goes too.
        """
        self.get_node(node_id)
        for hyperedge in list(self.hyperedges):
            rest = without(self, hyperedge, node_id)
            if rest is None:
                self.remove_hyperedge(hyperedge.id)
            else:
                self.hyperedges[self.hyperedges.index(hyperedge)] = rest
        for edge in {*self._in[node_id], *self._out[node_id]}:
            self._drop(edge)
        del self.nodes[node_id], self._in[node_id], self._out[node_id]
        for direction, kept in self._exposed.items():
            self._exposed[direction] = [x for x in kept if x.node_id != node_id]
        self.version += 1

    def replace_block(self, node_id: str, child: Child) -> None:
        """Put another child with the same ports into a node.

        Raises: NodeError if a port that is in use is missing or of another direction or type.
        """
        node = self.get_node(node_id)
        old, new = self.ports_of(node), self.ports_of(Node(node_id, child))
        used = {e.target_port for e in self._in[node_id]} | {e.source_port for e in self._out[node_id]}
        used |= node.defaults.keys() | {
            x.port_name for kind in self._exposed.values() for x in kind if x.node_id == node_id
        }
        for name in sorted(used):
            port, was = new.by_name.get(name), old.by_name[name]
            if port is None or port.name != name or (port.direction, port.types) != (was.direction, was.types):
                offered = ", ".join(f"{p.name} ({p.direction} {'|'.join(p.types)})" for p in new.by_name.values())
                raise NodeError(
                    f"{self.id}/{node_id}: the new block lacks port {name!r} ({was.direction} {'|'.join(was.types)}), "
                    f"which is in use; it has {offered}"
                )
        node.child = child
        self.version += 1

    def rename_node(self, node_id: str, new_id: str) -> None:
        """Give a node another id; edges, exposed ports, loops and place in the order stay."""
        node = self.get_node(node_id)
        check_id(new_id, "node id")
        if new_id in self.nodes:
            raise NodeError(f"{self.id}: node id {new_id!r} is taken")

        def moved(name: str) -> str:
            return new_id if name == node_id else name

        node.node_id = new_id
        self.nodes = {moved(k): v for k, v in self.nodes.items()}
        edges = [
            Edge(moved(e.source_node), e.source_port, moved(e.target_node), e.target_port, e.carry, e.origin)
            for e in self._edges
        ]
        self._edges = {}
        self._in = {n: [] for n in self.nodes}
        self._out = {n: [] for n in self.nodes}
        for edge in edges:
            self._keep(edge)
        for direction, exposed in self._exposed.items():
            self._exposed[direction] = [Exposure(moved(x.node_id), x.port_name, x.name) for x in exposed]
        self.hyperedges = [_renamed(h, node_id, new_id) for h in self.hyperedges]
        self.loops = tuple(
            LoopSpec(
                moved(s.loop_id), s.num_steps,
                {**s.until, "node": moved(s.until["node"])} if s.until else None,
                tuple(map(moved, s.order)) if s.order else None, s.grad_steps,
            )
            for s in self.loops
        )  # fmt: skip
        self.version += 1

    @property
    def edges(self) -> tuple[Edge, ...]:
        return tuple(self._edges)

    def edges_in(self, node_id: str) -> Sequence[Edge]:
        return self._in[node_id]

    def edges_out(self, node_id: str) -> Sequence[Edge]:
        return self._out[node_id]

    def add_edge(
        self,
        source: str | Edge,
        source_port: str | None = None,
        target: str | None = None,
        target_port: str | None = None,
        *,
        carry: bool = False,
        origin: str = "manual",
    ) -> Edge:
        """Join an output to an input; adding an equal edge again changes nothing.

        Raises: EdgeError for unknown ends, a wrong direction, types that do not meet, a second feed of a single
        input, or an edge from a node to itself that is not a carry edge.
        """
        if isinstance(source, Edge):
            edge = source
        else:
            if source_port is None or target is None or target_port is None:
                raise EdgeError(f"{self.id}: an edge needs source node, source port, target node and target port")
            edge = Edge(source, source_port, target, target_port, carry, origin)
        out = self._end(edge.source_node, edge.source_port, "out")
        into = self._end(edge.target_node, edge.target_port, "in")
        if (out.name, into.name) != (edge.source_port, edge.target_port):
            edge = Edge(edge.source_node, out.name, edge.target_node, into.name, edge.carry, edge.origin)
        if edge in self._edges:
            return edge
        if not out.compatible_with(into):
            raise EdgeError(
                f"{self.id}/{edge.target_node}.{into.name} takes {'|'.join(into.types)!r} but "
                f"{edge.source_node}.{out.name} gives {'|'.join(out.types)!r}; put a block between that converts it",
                code="TYPE_MISMATCH",
            )
        if edge.source_node == edge.target_node and not edge.carry:
            raise EdgeError(
                f"{self.id}: {edge} joins a node to itself; add carry=True to bring the previous iteration's value",
                code="LOOP_NO_CARRY",
            )
        if into.aggregation == "single":
            for other in self._in[edge.target_node]:
                if other.target_port == into.name and other.carry == edge.carry:
                    raise EdgeError(
                        f"{self.id}/{edge.target_node}.{into.name} takes one {'carry' if edge.carry else 'data'} edge and has "
                        f"{other}; remove that edge, or declare an aggregation on the port",
                        code="FAN_IN",
                    )
        self._keep(edge)
        self.version += 1
        return edge

    def remove_edge(self, edge: Edge) -> None:
        """Raises: EdgeError if there is no such edge."""
        if edge not in self._edges:
            raise EdgeError(f"{self.id} has no edge {edge}")
        self._drop(edge)
        self.version += 1

    def add_hyperedge(self, hyperedge: HyperEdge) -> None:
        """Add an edge of any arity; what carries its data (edges, exposed inputs) is added with it.

        Raises: ConfigError for a bad id, EdgeError for a taken id, an unknown kind, or members that cannot be joined so;
        then nothing is added.
        """
        check_id(hyperedge.id, "hyperedge id")
        if any(h.id == hyperedge.id for h in self.hyperedges):
            raise EdgeError(f"{self.id} has a hyperedge {hyperedge.id!r}; choose another id")
        lowered = lower(self, hyperedge)
        before = (set(self.edges), set(self._exposed["in"]))
        try:
            for edge in lowered.edges:
                self.add_edge(edge)
            for node_id, port, name in lowered.inputs:
                self.expose_input(node_id, port, name)
        except WGError:
            self._take_back(lowered, *before)
            raise
        self.hyperedges.append(hyperedge)
        self.version += 1

    def remove_hyperedge(self, hyperedge_id: str) -> None:
        """Take away a hyperedge and what only it had joined. Raises: EdgeError for an unknown id."""
        found = next((h for h in self.hyperedges if h.id == hyperedge_id), None)
        if found is None:
            known = did_you_mean(hyperedge_id, [h.id for h in self.hyperedges])
            raise EdgeError(f"{self.id} has no hyperedge {hyperedge_id!r}; {known}")
        self.hyperedges.remove(found)
        others = [carried_by(self, h) for h in self.hyperedges]
        kept = {e for e in self.edges if e.origin != ORIGIN} | {e for other in others for e in other.edges}
        self._take_back(carried_by(self, found), kept, {Exposure(*x) for other in others for x in other.inputs})
        self.version += 1

    def _take_back(self, lowered: Lowered, kept_edges: set[Edge], kept_inputs: set[Exposure]) -> None:
        for edge in lowered.edges:
            if edge in self.edges and edge not in kept_edges:
                self.remove_edge(edge)
        gone = {Exposure(*x) for x in lowered.inputs} - kept_inputs
        self._exposed["in"] = [x for x in self._exposed["in"] if x not in gone]

    def hyperedges_of(self, path: str) -> list[HyperEdge]:
        """The hyperedges, here and below, that the node at this path is a member of."""
        return [
            h for at, h in hyperedges_below(self) for m in h.members if path == (f"{at}/{m.path}" if at else m.path)
        ]

    def links_from(self, path: str = "") -> list[HyperLink]:
        """The links that stand at a node path; those of this level itself at the empty path."""
        return [link for at, link in links_below(self) if at == path]

    def links_to(self, target_id: str, kind: str | None = None) -> list[tuple[str, HyperLink]]:
        """Where, here and below, links to a target stand, as `(node path, link)`."""
        return [
            (at, link)
            for at, link in links_below(self)
            if link.target_id == target_id and kind in (None, link.target_kind)
        ]

    def _keep(self, edge: Edge) -> None:
        self._edges[edge] = None
        self._out[edge.source_node].append(edge)
        self._in[edge.target_node].append(edge)

    def _drop(self, edge: Edge) -> None:
        del self._edges[edge]
        self._out[edge.source_node].remove(edge)
        self._in[edge.target_node].remove(edge)

    def _end(self, node_id: str, port_name: str, direction: str, error: type[WGError] = EdgeError) -> Port:
        node = self.nodes.get(node_id)
        if node is None:
            raise error(f"{self.id} has no node {node_id!r}; {did_you_mean(node_id, self.nodes)}", code="UNKNOWN_NODE")
        index = self.ports_of(node)
        port = index.find(port_name, direction)
        known = index.outputs if direction == "out" else index.inputs
        if port is None:
            said = f"{self.id}/{node_id} has no port {port_name!r}; {did_you_mean(port_name, known)}"
            raise error(said, code="UNKNOWN_PORT")
        if port.direction != direction:
            raise error(
                f"{self.id}/{node_id}.{port_name} is an {port.direction}put where an {direction}put is needed; "
                f"{did_you_mean(port_name, known)}",
                code="WRONG_DIRECTION",
            )
        return port

    # ---- external ports --------------------------------------------------------------------------------------------

    def expose_input(self, node_id: str, port: str, name: str | None = None) -> str:
        """Offer a child's input under `name` (default `node:port`); one name may feed several ports.

        Raises: NodeError for unknown ends, EdgeError for a single input that an edge feeds.
        """
        found = self._end(node_id, port, "in", NodeError)
        if found.aggregation == "single":
            for e in self._in[node_id]:
                if e.target_port == found.name and not e.carry:
                    raise EdgeError(
                        f"{self.id}/{node_id}.{found.name} is fed by {e} already; remove the edge to expose the port",
                        code="EXPOSED_AND_WIRED",
                    )
        return self._expose("in", node_id, found.name, name)

    def expose_output(self, node_id: str, port: str, name: str | None = None) -> str:
        """Offer a child's output under `name` (default `node:port`). Raises: NodeError, also for a taken name."""
        found = self._end(node_id, port, "out", NodeError)
        return self._expose("out", node_id, found.name, name)

    def _expose(self, direction: str, node_id: str, port: str, name: str | None) -> str:
        if name is not None:
            check_id(name, "exposed port name")
        new = Exposure(node_id, port, name)
        if new in self._exposed[direction]:
            return new.key
        for x in self._exposed[direction]:
            if direction == "out" and x.key == new.key:
                said = f"{self.id} offers an output {new.key!r} already; output names are unique, choose another"
                raise NodeError(said, code="EXPOSURE_CLASH")
            if direction == "in" and (x.node_id, x.port_name) == (node_id, port):
                raise NodeError(
                    f"{self.id}/{node_id}.{port} is exposed as {x.key!r} already; unexpose_input({x.key!r}) first"
                )
        self._exposed[direction].append(new)
        self.version += 1
        return new.key

    def unexpose_input(self, key: str) -> None:
        self._unexpose("in", key)

    def unexpose_output(self, key: str) -> None:
        self._unexpose("out", key)

    def _unexpose(self, direction: str, key: str) -> None:
        kept = [x for x in self._exposed[direction] if x.key != key]
        if len(kept) == len(self._exposed[direction]):
            raise NodeError(f"{self.id} offers no {direction}put {key!r}; {did_you_mean(key, [x.key for x in kept])}")
        self._exposed[direction] = kept
        self.version += 1

    def infer_exposed_ports(self, overwrite: bool = False) -> None:
        """Expose unfed inputs and unconsumed outputs as `node:port`, per direction where nothing is exposed yet."""
        for direction in ("in", "out"):
            if overwrite or not self._exposed[direction]:
                self._exposed[direction] = list(self._loose_ends(direction))
        self.version += 1

    def _loose_ends(self, direction: str) -> Iterator[Exposure]:
        resting = self.resting()
        for node_id, node in self.nodes.items():
            if node_id in resting:
                continue
            index = self.ports_of(node)
            if direction == "in":
                fed = {e.target_port for e in self._in[node_id] if not e.carry} | set(node.defaults)
                for name in index.inputs:
                    if name not in fed and name not in LOOP_PORTS:
                        yield Exposure(node_id, name)
            else:
                used = {e.source_port for e in self._out[node_id] if e.target_node != node_id}
                for name in index.outputs:
                    if name not in used:
                        yield Exposure(node_id, name)

    def exposures(self, direction: str, *, explicit: bool = False) -> list[Exposure]:
        """What is exposed; without any word about it, a lone child's own ports, else all loose ends."""
        given = self._exposed[direction]
        if given or explicit:
            return given
        loose = list(self._loose_ends(direction))
        if len(self.nodes) == 1:
            return [Exposure(x.node_id, x.port_name, x.port_name) for x in loose]
        return loose

    @property
    def port_index(self) -> PortIndex:
        """The external ports of this level, as a parent sees them."""
        stamp = self.stamp()
        if self._external is None or self._external[0] != stamp:
            ports = [
                ExternalPort(
                    entry["key"],
                    cast(Any, direction),
                    entry["types"],
                    entry["optional"],
                    entry["aggregation"],
                    entry.get("default", UNSET),
                    schema=entry["schema"],
                    streamable=entry["streamable"],
                    description=entry["doc"],
                    **entry.get("concat", {}),
                )
                for direction, entries in (("in", self.get_input_spec()), ("out", self.get_output_spec()))
                for entry in entries
            ]
            self._external = (stamp, PortIndex(ports, self.id, apart=True))
        return self._external[1]

    def get_input_spec(self) -> list[Spec]:
        """External inputs as plain data.

        Each entry has `key, name, node_id, port_name, bindings, types, required, optional, aggregation, streamable,
        schema, doc`, and `default` and `concat` (how values join) where there is one.
        """
        bound: dict[str, list[Exposure]] = {}
        for x in self.exposures("in"):
            bound.setdefault(x.key, []).append(x)
        return [self._spec_entry(key, bindings, "in") for key, bindings in bound.items()]

    def get_output_spec(self) -> list[Spec]:
        """External outputs as plain data, in the form of `get_input_spec`."""
        return [self._spec_entry(x.key, [x], "out") for x in self.exposures("out")]

    def _spec_entry(self, key: str, bindings: list[Exposure], direction: str) -> Spec:
        ports = [cast(Port, self.ports_of(self.nodes[x.node_id]).find(x.port_name, direction)) for x in bindings]
        first = ports[0]
        types = [t for t in first.types if all(t in p.types or "any" in p.types for p in ports)] or list(first.types)
        if direction == "in":
            defaults = [
                self.nodes[x.node_id].defaults.get(x.port_name, p.default) for x, p in zip(bindings, ports, strict=True)
            ]
            required = any(not p.optional and d is UNSET for p, d in zip(ports, defaults, strict=True))
        else:
            defaults, required = [], not first.optional
        entry: Spec = {
            "key": key,
            "name": bindings[0].name or key,
            "node_id": bindings[0].node_id,
            "port_name": bindings[0].port_name,
            "bindings": [{"node_id": x.node_id, "port_name": x.port_name} for x in bindings],
            "types": types,
            "required": required,
            "optional": not required,
            "aggregation": first.aggregation if len(ports) == 1 else "single",
            "streamable": first.streamable,
            "schema": first.schema,
            "doc": first.description,
        }
        if entry["aggregation"] == "concat":
            entry["concat"] = {"agg_dim": first.agg_dim, "agg_sep": first.agg_sep}
        if defaults and defaults[0] is not UNSET and not required:
            entry["default"] = defaults[0]
        return entry

    def loop_spec(self, members: Sequence[str]) -> LoopSpec | None:
        """The settings that belong to the cycle of these nodes."""
        inside = set(members)
        for spec in self.loops:
            if spec.names(self.nodes) & inside:
                return spec
        return self.loops[0] if len(self.loops) == 1 and not self.loops[0].names(self.nodes) else None

    def iter_blocks(self) -> Iterator[Block]:
        """All blocks below, sub-blocks too, each instance once."""
        seen: set[int] = set()
        for node in self.nodes.values():
            child = cast("Block | Container[Any]", node.child)
            for block in child.iter_blocks():
                if id(block) not in seen:
                    seen.add(id(block))
                    yield block


def _renamed(hyperedge: HyperEdge, old: str, new: str) -> HyperEdge:
    def moved(path: str) -> str:
        first, slash, rest = path.partition("/")
        return f"{new if first == old else first}{slash}{rest}"

    members = tuple(m.model_copy(update={"path": moved(m.path)}) for m in hyperedge.members)
    return hyperedge.model_copy(update={"members": members})
