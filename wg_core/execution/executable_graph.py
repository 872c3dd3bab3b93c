"""The one container: nodes, edges, exposed ports, validation, plan, run. Graph, pipeline and stage are lines over it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar, cast

from wg_core.errors import EdgeError, MissingInputError, NodeError, UnexpectedInputError, WGError, did_you_mean
from wg_core.execution.agent import AgentLoop, Tool
from wg_core.execution.block import Block, PortIndex
from wg_core.execution.context import FRAME, Frame, Hook, RunOptions, options_for
from wg_core.execution.drawing import draw, kind_of_child, plan_data
from wg_core.execution.drive import (
    Chunk,
    Held,
    Session,
    Step,
    Steps,
    drive,
    drive_async,
    drive_batched,
    drive_steps,
    drive_stream,
    held,
    in_time,
    together,
)
from wg_core.execution.hyper import ORIGIN, Lowered, hyperedges_below, links_below, lower
from wg_core.execution.modes import modes
from wg_core.execution.plan import LOOP_PORTS, Call, Loop, LoopStart, Placeholder, Plan, compile_plan, copy_defaults
from wg_core.execution.tensors import map_tensors
from wg_core.execution.validate import ValidationResult, validate_structure
from wg_core.execution.walk import walk
from wg_core.structure.hyperlink import HyperEdge, HyperLink, Resolvers
from wg_core.structure.ids import ID_PATTERN, check_id
from wg_core.structure.port import UNSET, Port
from wg_core.structure.topology import Edge

Child = TypeVar("Child")
Spec = dict[str, Any]
_NO_DEFAULTS: Mapping[str, Any] = MappingProxyType({})
_NO_OPTIONS = RunOptions()


class Executable(Protocol):
    """What every level is: callable by name, inspectable, with blocks inside. Callers never ask which level it is."""

    def get_input_spec(self) -> list[Spec]: ...
    def get_output_spec(self) -> list[Spec]: ...
    def run(self, inputs: Mapping[Any, Any] | None = None, **options: Any) -> dict[str, Any]: ...
    def validate(
        self, strict: bool = True, *, deep: bool = False, for_training: bool = False
    ) -> ValidationResult: ...
    def plan(self) -> Plan: ...
    def iter_blocks(self) -> Iterator[Block]: ...


class ExternalPort(Port):
    """A port of a whole level, as its parent sees it; may be called `node:port`."""

    __slots__ = ()
    name_pattern = rf"(?:{ID_PATTERN})(?::[a-z][a-z0-9_]*)*"


@dataclass(slots=True)
class Node(Generic[Child]):
    """A place in a structure: exactly one child, and what holds at this place only.

    `defaults` gives values to unfed inputs, set with `set_default`; `hints` steer automatic wiring.
    """

    node_id: str
    child: Child
    trainable: bool = True
    defaults: Mapping[str, Any] = field(default_factory=lambda: _NO_DEFAULTS)
    hints: dict[str, str] = field(default_factory=dict[str, str])
    links: list[HyperLink] = field(default_factory=list[HyperLink])

    @property
    def block(self) -> Child:
        return self.child


@dataclass(frozen=True, slots=True)
class Exposure:
    """A port of a child offered to the outside, under `name` or `node:port`."""

    node_id: str
    port_name: str
    name: str | None = None

    @property
    def key(self) -> str:
        return self.name or f"{self.node_id}:{self.port_name}"


@dataclass(frozen=True, slots=True)
class LoopSpec:
    """What is set about one cycle: its id, steps, order inside an iteration, and when to stop early.

    With `grad_steps` gradients flow back through the last so many iterations only. In training, memory holds what was
    computed in each iteration that gradients flow through.
    """

    loop_id: str
    num_steps: int | None = None
    until: Mapping[str, str] | None = None
    order: tuple[str, ...] | None = None
    grad_steps: int | None = None

    def names(self, nodes: Mapping[str, Any]) -> set[str]:
        """The nodes by which these settings find their cycle; none where a lone cycle is meant."""
        named = {*(self.order or ()), self.until.get("node", "") if self.until else ""} - {""}
        return named | {self.loop_id} if self.loop_id in nodes else named


class ExecutableGraph(Generic[Child]):
    """A directed graph of children with typed ports that runs as a whole."""

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
        self.hooks: list[Hook] = []
        self.version = 0
        self._edges: dict[Edge, None] = {}
        self._in: dict[str, list[Edge]] = {}
        self._out: dict[str, list[Edge]] = {}
        self._exposed: dict[str, list[Exposure]] = {"in": [], "out": []}
        self._plan: Plan | None = None
        self._valid_stamp: Any = None
        self._external: tuple[Any, PortIndex] | None = None

    # ---- override points -------------------------------------------------------------------------------------------

    def ports_of(self, node: Node[Child]) -> PortIndex:
        """The ports of a node's child."""
        child = cast("Block | ExecutableGraph[Any]", node.child)
        return child.port_index

    def call_of(self, node: Node[Child]) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """What runs a node's child, called with its inputs."""
        child = cast("Block | ExecutableGraph[Any]", node.child)
        return child.forward

    def stamp(self) -> Any:
        """Changes whenever the structure, or that of a child, changes."""
        return (self.version, self.metadata.get("num_loop_steps"))

    def resting(self) -> frozenset[str]:
        """Nodes that are part of the structure but that no plan calls."""
        return frozenset()

    def agents(self) -> Mapping[str, Sequence[Tool]]:
        """The agents that run with their tools, each with those that it may call."""
        return {}

    def agent_call(self, op: Call, tools: Sequence[Tool], calls: Mapping[str, Call]) -> AgentLoop:
        """What the plan calls for an agent; `calls` are those of the tools, by node."""
        return AgentLoop(self, op, tools, calls)

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
        """Remove a node with its edges and exposed ports."""
        self.get_node(node_id)
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

        Raises: EdgeError for a taken id, an unknown kind, or members that cannot be joined so; then nothing is added.
        """
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
        others = [lower(self, h) for h in self.hyperedges]
        kept = {e for e in self.edges if e.origin != ORIGIN} | {e for other in others for e in other.edges}
        self._take_back(lower(self, found), kept, {Exposure(*x) for other in others for x in other.inputs})
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

    # ---- validation and plan ---------------------------------------------------------------------------------------

    def loop_spec(self, members: Sequence[str]) -> LoopSpec | None:
        """The settings that belong to the cycle of these nodes."""
        inside = set(members)
        for spec in self.loops:
            if spec.names(self.nodes) & inside:
                return spec
        return self.loops[0] if len(self.loops) == 1 and not self.loops[0].names(self.nodes) else None

    def validate(
        self, strict: bool = True, *, deep: bool = False, for_training: bool = False
    ) -> ValidationResult:
        """Check the whole structure without loading or running anything; `deep` goes into children.

        `for_training` also says which parameters get no gradient. Raises: ValidationError with all errors, if `strict`.
        """
        result = validate_structure(self, deep=deep, for_training=for_training)
        if result.is_valid:
            self._valid_stamp = self.stamp()
        elif strict:
            result.raise_errors()
        return result

    def plan(self) -> Plan:
        """The compiled plan, cached for as long as the structure stays.

        Raises: ValidationError.
        """
        stamp = self.stamp()
        if self._plan is None or self._plan.stamp != stamp:
            if self._valid_stamp != stamp:
                self.validate()
            self._plan = compile_plan(self, stamp)
        return self._plan

    def describe(self) -> str:
        """The plan as text: one line a step, loops indented."""
        lines = [f"{self.level} {self.id}"]
        loop: Loop | None = None
        for op in self.plan().program:
            if isinstance(op, LoopStart):
                loop = op.loop
                steps = loop.num_steps if loop.num_steps is not None else "1 unless the run says otherwise"
                lines.append(f"  loop {loop.loop_id} x {steps} (from {loop.steps_from})")
                lines += [f"    carry {edge}" for edge in loop.carry_edges]
            elif isinstance(op, Call):
                indent = "    " if loop and op.node_id in loop.nodes else "  "
                lines.append(f"{indent}{op.node_id}: {kind_of_child(self.nodes[op.node_id].child)}")
                if isinstance(op.call, AgentLoop):
                    lines += [f"{indent}  may call {t}: {kind_of_child(n.child)}" for t, n in op.call.tools().items()]
        return "\n".join(lines)

    def plan_data(self, num_loop_steps: int | Mapping[str, int] | None = None) -> dict[str, Any]:
        """The plan as JSON values, nested levels within: `{level, id, inputs, outputs, steps}`.

        A step is `{node, kind, plan?, tools?}`, or a loop: `{loop, num_steps, steps_from, iterations, carry: [{edge, seed}],
        until?, steps}`, where `seed` lists what iteration 0 reads instead, in order of preference.

        Raises: ValidationError.
        """
        return plan_data(self, num_loop_steps)

    def to_mermaid(self) -> str:
        """This level as a Mermaid flowchart: nested levels as subgraphs, carry edges dashed."""
        return draw(self).mermaid()

    def to_dot(self) -> str:
        """This level as a Graphviz digraph: nested levels as clusters, carry edges dashed."""
        return draw(self).dot()

    # ---- running ---------------------------------------------------------------------------------------------------

    def run(self, inputs: Mapping[Any, Any] | None = None, **options: Any) -> dict[str, Any]:
        """Run the whole structure: exposed inputs in, exposed outputs out.

        Inputs are keyed by exposed key, `node:port` or `(node, port)`. Options are those of `RunOptions`
        (`num_loop_steps`, `seed`, `training`, `dry_run`, `callbacks`, `capture`, ...).

        Raises: ValidationError, MissingInputError, UnexpectedInputError, NodeExecutionError, AbortRun,
        RunTimeoutError.
        """
        if not options and FRAME.get() is not None:
            return self.forward(dict(inputs or {}))
        return self._execute(inputs or {}, self._chosen(options), None)

    def _chosen(self, options: Mapping[str, Any]) -> RunOptions:
        if self.resolvers is not None:
            options = {"resolvers": self.resolvers, **options}
        if not options:
            return _NO_OPTIONS
        try:
            return RunOptions(**options)
        except TypeError as error:
            raise UnexpectedInputError(
                f"{self.id}.run: {error}; options are {', '.join(RunOptions.__slots__)}"
            ) from None

    def run_batch(self, batch: Iterable[Mapping[Any, Any]], **options: Any) -> list[dict[str, Any]]:
        """`run` for each of several inputs, in order; all get the same options.

        Where a block below computes calls of several runs together (`Block.batch_forward`), the runs go side by side.

        Raises: what `run` raises, with a note that names the item.
        """
        items = list(batch)
        if len(items) > 1 and self._side_by_side(options):
            plan, chosen = self.plan(), self._chosen(options)
            with self._modes(plan, chosen):
                return together([drive_batched(self, self._session(plan, i, chosen, None)) for i in items])
        results: list[dict[str, Any]] = []
        for i, inputs in enumerate(items):
            try:
                results.append(self.run(inputs, **options))
            except Exception as error:
                error.add_note(f"in item {i} of the batch")
                raise
        return results

    def _side_by_side(self, options: Mapping[str, Any]) -> bool:
        chosen = self._chosen(options)
        plain = type(self).run is ExecutableGraph.run and FRAME.get() is None and not (chosen.training or chosen.dry_run)
        return plain and any(block.batches for block in self.plan().blocks)

    async def run_async(self, inputs: Mapping[Any, Any] | None = None, **options: Any) -> dict[str, Any]:
        """`run` in an event loop: where a block's `forward` returns an awaitable it is awaited, on all levels.

        Other blocks run inline. `timeout` and `cancel` also end a block that waits.

        Raises: what `run` raises; CancelledError if the task is cancelled.
        """
        session, modes, chosen = self._opened(inputs, options)
        return await in_time(
            lambda scope: Held(drive_async(self, session, chosen.dry_run, scope), lambda: modes),
            chosen.timeout,
            chosen.cancel,
        )

    def stream(self, inputs: Mapping[Any, Any] | None = None, **options: Any) -> Generator[Chunk, None, None]:
        """`run` as an iterator of chunks: pieces of exposed streamable outputs, at last a final one with the result.

        A block gives pieces through `stream_forward`. It runs only while a chunk is asked for, so it is never ahead of
        its consumer; `close()` on the iterator stops the run. Inside a loop there are pieces in each iteration.

        Raises: what `run` raises, where a chunk is asked for.
        """
        session, modes, chosen = self._opened(inputs, options)

        def chunks() -> Generator[Chunk, None, None]:
            result = yield from drive_stream(self, session, chosen.dry_run)
            yield Chunk(result, self.id, final=True)

        return held(chunks(), lambda: modes)

    def steps(self, inputs: Mapping[Any, Any] | None = None, **options: Any) -> Steps[Step]:
        """`run` with a pause before each node, nodes of nested levels too: an iterator of `Step`.

        Going on runs the node; `close()` stops the run; when the iterator ends, `.result` holds the outputs.

        Raises: what `run` raises, where the next step is asked for.
        """
        session, modes, chosen = self._opened(inputs, options)
        return Steps(held(drive_steps(self, session, chosen.dry_run), lambda: modes))

    def dry_run(self, inputs: Mapping[Any, Any] | None = None, **options: Any) -> dict[str, Any]:
        """Walk the plan with typed placeholders: same order and checks, nothing computed."""
        given = dict(inputs or {})
        for entry in ExecutableGraph.get_input_spec(self):
            if entry["required"]:
                given.setdefault(entry["key"], Placeholder(tuple(entry["types"]), f"{self.id}.{entry['key']}"))
        return ExecutableGraph.run(self, given, dry_run=True, **options)

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Run as a child of what is running now, with its options."""
        parent = FRAME.get()
        if parent is None:
            return self.run(inputs)
        return self._execute(inputs, options_for(parent.options, parent.node_id), parent)

    def _opened(
        self, inputs: Mapping[Any, Any] | None, options: Mapping[str, Any]
    ) -> tuple[Session, AbstractContextManager[Any], RunOptions]:
        """A session to drive, the modes that its blocks run in, and its options; as a child where a run goes on."""
        parent = FRAME.get() if not options else None
        chosen = self._chosen(options) if parent is None else options_for(parent.options, parent.node_id)
        plan, plain = self.plan(), parent is not None or chosen.dry_run
        modes = nullcontext() if plain else self._modes(plan, chosen)
        return self._session(plan, inputs or {}, chosen, parent), modes, chosen

    def _execute(self, inputs: Mapping[Any, Any], options: RunOptions, parent: Frame | None) -> dict[str, Any]:
        plan = self.plan()
        session = self._session(plan, inputs, options, parent)
        if parent is not None or options.dry_run:
            return drive(self, session, options.dry_run)
        with self._modes(plan, options):
            return drive(self, session, False)

    def _modes(self, plan: Plan, options: RunOptions) -> AbstractContextManager[None]:
        return modes(plan.blocks, _trained_blocks(self) if options.training else None)

    def _session(
        self, plan: Plan, inputs: Mapping[Any, Any], options: RunOptions, parent: Frame | None
    ) -> Session:
        """The walk with all around it, for a driver: yields `(call, inputs)`, is sent outputs, gives the result.

        The frame of the calls is the current one while the session waits for outputs.
        """
        values = self._bind(plan, inputs)
        root = parent is None and not options.dry_run
        if root and options.device is not None:
            self.to(options.device)
            values = map_tensors(values, lambda tensor: tensor.to(options.device))
        frame = Frame(self.level, self.id, options, parent, tuple(self.hooks))
        around = FRAME.get()
        FRAME.set(frame)
        try:
            if frame.hooks:
                frame.emit("run_start")
            yield from walk(plan, values, frame)
            if self.stamp() != plan.stamp:
                raise NodeError(f"{self.id} was changed while it ran; change structures between runs")
            result = {
                key: values[slot] for key, slot, optional in plan.outputs if not optional or values[slot] is not UNSET
            }
            if frame.hooks:
                frame.emit("run_end", outputs=result)
            return {**result, **self._captured(frame)} if root and options.capture else result
        finally:
            if FRAME.get() is frame:
                FRAME.set(around)

    def session_below(self, op: Call, inputs: dict[str, Any]) -> tuple[ExecutableGraph[Any], Session] | None:
        """The level in the called node with a session for it, under the running frame; None for a block.

        For an agent with tools it is this level itself, with the session of the agent's turns.
        """
        if isinstance(op.call, AgentLoop):
            return self, op.call.session(inputs)
        node = self.nodes[op.node_id]
        child = node.child
        if not isinstance(child, ExecutableGraph):
            return None
        level = cast("ExecutableGraph[Any]", child)
        frame = cast(Frame, FRAME.get())
        return level, level._session(level.plan(), inputs, self.options_below(node, frame), frame)

    def options_below(self, node: Node[Child], frame: Frame) -> RunOptions:
        """The options of a level in `node`."""
        return options_for(frame.options, node.node_id)

    def stream_of(self, node: Node[Child]) -> Callable[[dict[str, Any]], Generator[dict[str, Any], None, dict[str, Any]]]:
        """What gives the pieces of a block's outputs."""
        return cast(Block, node.child).stream_forward

    def batch_of(self, node: Node[Child]) -> tuple[Block, Callable[[dict[str, Any]], Generator[Any, Any, dict[str, Any]]]]:
        """A block that computes calls of several runs together, and what gives its requests."""
        block = cast(Block, node.child)
        return block, block.batch_forward

    def _captured(self, frame: Frame) -> dict[str, Any]:
        missing = [key for key in frame.options.capture if key not in frame.captured]
        if missing:
            raise UnexpectedInputError(
                f"{self.id}: nothing to capture at {missing[0]!r}; {did_you_mean(missing[0], frame.captured)}"
            )
        return {key: frame.captured[key] for key in frame.options.capture}

    def _bind(self, plan: Plan, inputs: Mapping[Any, Any]) -> list[Any]:
        values = plan.initial.copy()
        for key, value in inputs.items():
            slot = plan.inputs.get(key)
            if slot is None:
                slot = plan.inputs.get(self._key(key))
                if slot is None:
                    raise UnexpectedInputError(f"{self.id} has no input {key!r}; {did_you_mean(str(key), plan.inputs)}")
            values[slot] = value
        missing = [key for key, slot in plan.required if values[slot] is UNSET]
        if missing:
            given = ", ".join(repr(k) for k in inputs) or "nothing"
            raise MissingInputError(f"{self.id} needs {', '.join(map(repr, missing))}; given: {given}")
        if plan.copied:
            copy_defaults(plan, values)
        return values

    def _key(self, key: Any) -> str:
        """The exposed key that a `(node, port)` or `node:port` address means."""
        address = tuple(cast("tuple[str, ...]", key)) if isinstance(key, tuple) else tuple(str(key).split(":", 1))
        for x in self.exposures("in"):
            if (x.node_id, x.port_name) == address:
                return x.key
        return ":".join(map(str, address))

    # ---- everything below ------------------------------------------------------------------------------------------

    def iter_blocks(self) -> Iterator[Block]:
        """All blocks below, sub-blocks too, each instance once."""
        seen: set[int] = set()
        for node in self.nodes.values():
            child = cast("Block | ExecutableGraph[Any]", node.child)
            for block in child.iter_blocks():
                if id(block) not in seen:
                    seen.add(id(block))
                    yield block

    def to(self, device: Any = None, dtype: Any = None) -> Self:
        """Move every block once to a device, or to another float type."""
        for block in self.iter_blocks():
            block.to(device, dtype)
        return self

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}: {len(self.nodes)} nodes, {len(self.edges)} edges>"


def _renamed(hyperedge: HyperEdge, old: str, new: str) -> HyperEdge:
    def moved(path: str) -> str:
        first, slash, rest = path.partition("/")
        return f"{new if first == old else first}{slash}{rest}"

    members = tuple(m.model_copy(update={"path": moved(m.path)}) for m in hyperedge.members)
    return hyperedge.model_copy(update={"members": members})


def _trained_blocks(graph: ExecutableGraph[Any]) -> Iterator[Block]:
    for node in graph.nodes.values():
        if node.trainable:
            child = node.child
            if isinstance(child, ExecutableGraph):
                yield from _trained_blocks(cast("ExecutableGraph[Any]", child))
            else:
                yield from cast(Block, child).iter_blocks()
