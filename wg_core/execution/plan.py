"""Compile a structure once into a program over slots; running it is then a walk from step to step.

Every value has a slot in a list. A node step gathers its inputs from slots, calls, and stores its outputs in slots; a
loop is a jump back. What can be decided beforehand (where a value comes from, whether it can be absent, when it is used
for the last time) is decided here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

from wg_core.execution.block import Block, PortIndex
from wg_core.structure.port import UNSET, Port, aggregate
from wg_core.structure.topology import Edge, components

if TYPE_CHECKING:
    from wg_core.execution.agent import Tool
    from wg_core.execution.executable_graph import ExecutableGraph
    from wg_core.execution.node import Node

Resolve = Callable[[list[Any]], Any]

LOOP_PORTS = ("loop_index", "loop_total")
_TRASH = 0


@dataclass(slots=True)
class Call:
    """One node: gather, call, store, free."""

    node_id: str
    call: Callable[[dict[str, Any]], dict[str, Any]]
    ports: PortIndex
    sure: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    special: list[tuple[str, Resolve, bool]] = field(default_factory=list[tuple[str, Resolve, bool]])
    outs: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    optional_outs: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    sure_outs: int = 0  # how many outputs there are if none is optional, else -1
    free: list[int] = field(default_factory=list[int])
    reads: list[int] = field(default_factory=list[int])
    then: Op | None = field(default=None, repr=False)


@dataclass(slots=True)
class Loop:
    """One cycle of the structure, run `num_steps` times."""

    loop_id: str
    nodes: tuple[str, ...]
    num_steps: int | None
    steps_from: str
    iterations: Callable[[int], int] | None
    index_slot: int
    total_slot: int
    carries: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    carry_edges: list[Edge] = field(default_factory=list[Edge])
    seeds: list[tuple[int, Resolve]] = field(default_factory=list[tuple[int, Resolve]])
    seed_reads: list[int] = field(default_factory=list[int])
    seed_free: list[int] = field(default_factory=list[int])
    until_slot: int | None = None
    grad_steps: int | None = None
    start: int = 0
    free: list[int] = field(default_factory=list[int])


@dataclass(slots=True)
class LoopStart:
    loop: Loop
    then: Op | None = field(default=None, repr=False)


@dataclass(slots=True)
class LoopEnd:
    loop: Loop
    then: Op | None = field(default=None, repr=False)


Op = Call | LoopStart | LoopEnd


@dataclass(slots=True)
class Plan:
    """A compiled structure; each step of its program knows the one after it, as `then`."""

    stamp: Any
    program: list[Op]
    initial: list[Any]
    inputs: dict[str, int]
    required: list[tuple[str, int]]
    outputs: list[tuple[str, int, bool]]
    loops: list[Loop]
    copied: list[int]
    blocks: list[Block]

    def order(self) -> list[str]:
        """Node ids in the order of their first call."""
        return [op.node_id for op in self.program if isinstance(op, Call)]


def _chain(slots: Sequence[int]) -> Resolve:
    chain = tuple(slots)

    def resolve(values: list[Any]) -> Any:
        for slot in chain:
            value = values[slot]
            if value is not UNSET:
                return value
        return UNSET

    return resolve


def _aggregated(port: Port, feeds: Sequence[tuple[str, int]], rest: Sequence[int]) -> Resolve:
    sources, chain = tuple(feeds), tuple(rest)

    def resolve(values: list[Any]) -> Any:
        given = [(name, values[slot]) for name, slot in sources]
        for _, value in given:
            if isinstance(value, Placeholder):
                return value
        value = aggregate(port, given)
        if value is UNSET:
            for slot in chain:
                value = values[slot]
                if value is not UNSET:
                    if port.aggregation == "dict" and isinstance(value, (Mapping, Placeholder)):
                        return cast(Any, value)
                    return aggregate(port, [("run", value)])
        return value

    return resolve


@dataclass(frozen=True, slots=True)
class Placeholder:
    """What a dry run puts where a value of these types would be."""

    types: tuple[str, ...]
    source: str


def group_cycles(nodes: Sequence[str], edges: Sequence[Edge]) -> list[tuple[list[str], bool]]:
    """Components in execution order, each with whether it is a loop."""
    following: dict[str, list[str]] = {n: [] for n in nodes}
    selfish: set[str] = set()
    for e in edges:
        following[e.source_node].append(e.target_node)
        if e.source_node == e.target_node:
            selfish.add(e.source_node)
    return [(c, len(c) > 1 or c[0] in selfish) for c in components(nodes, following)]


def iteration_order(members: Sequence[str], edges: Sequence[Edge]) -> list[list[str]]:
    """Order inside one iteration: components of the non-carry edges among `members` (each of one node if legal)."""
    inside = set(members)
    following: dict[str, list[str]] = {n: [] for n in members}
    for e in edges:
        if not e.carry and e.source_node in inside and e.target_node in inside:
            following[e.source_node].append(e.target_node)
    return components(members, following)


def tool_edges(graph: ExecutableGraph[Any], agents: Mapping[str, Sequence[Tool]]) -> list[Edge]:
    """What an agent waits for beside its own edges: the sources of its tools, as edges to the agent."""
    return [
        Edge(e.source_node, e.source_port, agent, e.target_port)
        for agent, tools in agents.items()
        for node_id in dict.fromkeys(tool.node_id for tool in tools)
        for e in graph.edges_in(node_id)
    ]


def compile_plan(graph: ExecutableGraph[Any], stamp: Any) -> Plan:
    """Compile a valid structure."""
    return _Compiler(graph).compile(stamp)


class _Compiler:
    def __init__(self, graph: ExecutableGraph[Any]) -> None:
        self.graph = graph
        self.edges = list(graph.edges)
        self.initial: list[Any] = [None]
        self.copied: list[int] = []
        self.sure: set[int] = set()
        self.output_slot: dict[tuple[str, str], int] = {}
        self.carry_slot: dict[Edge, int] = {}
        self.loop_of: dict[str, Loop] = {}
        self.loops: list[Loop] = []
        self.program: list[Op] = []
        self.ports = {n.node_id: graph.ports_of(n) for n in graph.nodes.values()}
        self.inputs: dict[str, int] = {}
        self.input_of: dict[tuple[str, str], int] = {}
        self.needed: set[int] = set()
        self.agents = graph.agents()
        self.before = [*self.edges, *tool_edges(graph, self.agents)]

    def slot(self, value: Any = UNSET) -> int:
        self.initial.append(value)
        return len(self.initial) - 1

    def compile(self, stamp: Any) -> Plan:
        graph = self.graph
        for exposed in graph.exposures("in"):
            slot = self.inputs.get(exposed.key)
            if slot is None:
                slot = self.inputs[exposed.key] = self.slot()
            self.input_of[exposed.node_id, exposed.port_name] = slot
        wanted = {(e.source_node, e.source_port) for e in self.edges}
        wanted |= {(x.node_id, x.port_name) for x in graph.exposures("out")}
        wanted |= {(loop.until["node"], loop.until["port"]) for loop in graph.loops if loop.until}
        for key in wanted:
            slot = self.output_slot[key] = self.slot()
            if not self.ports[key[0]].outputs[key[1]].optional:
                self.sure.add(slot)
        resting = graph.resting()
        groups = [g for g in group_cycles(list(graph.nodes), self.before) if g[1] or g[0][0] not in resting]
        for members, is_loop in groups:
            if is_loop:
                self._declare_loop(members)
        for members, is_loop in groups:
            if is_loop:
                self._loop(self.loop_of[members[0]])
            else:
                self._node(graph.nodes[members[0]])
        for op, then in pairwise(self.program):
            op.then = then
        outputs = [
            (x.key, self.output_slot[x.node_id, x.port_name], self.ports[x.node_id].outputs[x.port_name].optional)
            for x in graph.exposures("out")
        ]
        self._free_after_last_use({slot for _, slot, _ in outputs})
        required = [(key, slot) for key, slot in self.inputs.items() if slot in self.needed]
        return Plan(
            stamp,
            self.program,
            self.initial,
            self.inputs,
            required,
            outputs,
            self.loops,
            self.copied,
            list(graph.iter_blocks()),
        )

    def _declare_loop(self, members: list[str]) -> None:
        graph = self.graph
        spec = graph.loop_spec(members)
        order = list(spec.order) if spec and spec.order else [c[0] for c in iteration_order(members, self.before)]
        solver = next((n for n in order if callable(getattr(graph.nodes[n].child, "iterations", None))), None)
        num_steps, origin = configured_steps(graph, spec, order)
        loop = Loop(
            loop_id=spec.loop_id if spec and spec.loop_id else order[0],
            nodes=tuple(order),
            num_steps=num_steps,
            steps_from=origin,
            iterations=graph.nodes[solver].child.iterations if solver else None,
            index_slot=self.slot(0),
            total_slot=self.slot(1),
            grad_steps=spec.grad_steps if spec else None,
        )
        self.sure |= {loop.index_slot, loop.total_slot}
        inside = set(members)
        for e in self.edges:
            if e.carry and e.source_node in inside and e.target_node in inside:
                slot = self.carry_slot[e] = self.slot()
                loop.carries.append((self.output_slot[e.source_node, e.source_port], slot))
                loop.carry_edges.append(e)
        if spec and spec.until:
            loop.until_slot = self.output_slot[spec.until["node"], spec.until["port"]]
        for n in members:
            self.loop_of[n] = loop
        self.loops.append(loop)

    def _loop(self, loop: Loop) -> None:
        self.program.append(LoopStart(loop))
        loop.start = len(self.program)
        for node_id in loop.nodes:
            self._node(self.graph.nodes[node_id])
        self.program.append(LoopEnd(loop))

    def _node(self, node: Node[Any]) -> None:
        ports = self.ports[node.node_id]
        op = Call(node.node_id, self.graph.call_of(node), ports)
        by_port: dict[str, list[Edge]] = {}
        for e in self.graph.edges_in(node.node_id):
            by_port.setdefault(e.target_port, []).append(e)
        for name, port in ports.inputs.items():
            self._feed(op, node, port, by_port.get(name, []))
        if node.node_id in self.agents:
            self._tools(op, self.agents[node.node_id])
        trashed = False
        for name, port in ports.outputs.items():
            slot = self.output_slot.get((node.node_id, name), _TRASH)
            if port.optional:
                if slot:
                    op.optional_outs.append((name, slot))
            else:
                op.outs.append((name, slot))
                trashed = trashed or not slot
        op.sure_outs = -1 if op.optional_outs else len(op.outs)
        if trashed:
            op.free.append(_TRASH)
        self.program.append(op)

    def _tools(self, op: Call, tools: Sequence[Tool]) -> None:
        """Let the call of an agent run its tools; what the graph gives them is gathered for it, as `node.port`."""
        graph = self.graph
        calls: dict[str, Call] = {}
        extra: dict[str, Port] = {}
        for tool in tools:
            if tool.node_id in calls:
                continue
            node, ports = graph.nodes[tool.node_id], self.ports[tool.node_id]
            call = calls[tool.node_id] = Call(tool.node_id, graph.call_of(node), ports)
            for name in tool.fed:
                extra[f"{tool.node_id}.{name}"] = ports.inputs[name]
                self._feed(call, node, ports.inputs[name], [e for e in graph.edges_in(tool.node_id) if e.target_port == name])
            op.sure += [(f"{tool.node_id}.{name}", slot) for name, slot in call.sure]
            op.special += [(f"{tool.node_id}.{name}", resolve, required) for name, resolve, required in call.special]
            op.reads += call.reads
        op.call = graph.agent_call(op, tools, calls)
        if extra:
            op.ports = copy.copy(op.ports)
            op.ports.inputs = {**op.ports.inputs, **extra}

    def _feed(self, op: Call, node: Node[Any], port: Port, edges: list[Edge]) -> None:
        """Decide where the value of one input comes from: edges, then an exposed input, then a default."""
        rest: list[int] = []
        exposed = self.input_of.get((node.node_id, port.name))
        if exposed is not None:
            rest.append(exposed)
        default = node.defaults.get(port.name, port.default)
        loop = self._loop_seen_by(node.node_id) if port.name in LOOP_PORTS else None
        if loop is not None and not edges and exposed is None and port.name not in node.defaults:
            rest.append(loop.index_slot if port.name == "loop_index" else loop.total_slot)
        elif default is not UNSET:
            slot = self.slot(default)
            self.sure.add(slot)
            rest.append(slot)
            if isinstance(default, (list, dict)):
                self.copied.append(slot)
        if port.aggregation != "single":
            feeds = [(f"{e.source_node}:{e.source_port}", self._edge_slot(e)) for e in edges]
            if not feeds and not rest:
                return
            op.special.append((port.name, _aggregated(port, feeds, rest), port.required))
            op.reads += [slot for _, slot in feeds] + rest
            if exposed is not None and port.required and default is UNSET and not feeds:
                self.needed.add(exposed)
            return
        data = [e for e in edges if not e.carry]
        carry = [e for e in edges if e.carry]
        chain = [self._edge_slot(e) for e in data] + rest
        if carry:
            loop = self.loop_of[node.node_id]
            slot = self.carry_slot[carry[0]]
            if exposed is not None and port.required and not data and default is UNSET:
                self.needed.add(exposed)
                self.sure.add(exposed)
            source_sure = self.output_slot[carry[0].source_node, carry[0].source_port] in self.sure
            if data and data[0].source_node in loop.nodes:
                chain = [slot, *chain]  # iteration 0 reads a value made in the same iteration
            else:
                loop.seeds.append((slot, _chain(chain)))
                loop.seed_reads += chain
                if source_sure and any(s in self.sure for s in chain):
                    self.sure.add(slot)
                chain = [slot]
        elif exposed is not None and chain[0] == exposed and port.required and default is UNSET:
            self.needed.add(exposed)
            self.sure.add(exposed)
        if not chain:
            return
        cut = next((i for i, s in enumerate(chain) if s in self.sure), len(chain) - 1)
        chain = chain[: cut + 1]
        op.reads += chain
        if chain[0] in self.sure:
            op.sure.append((port.name, chain[0]))
        else:
            op.special.append((port.name, _chain(chain), port.required))

    def _edge_slot(self, edge: Edge) -> int:
        return self.carry_slot[edge] if edge.carry else self.output_slot[edge.source_node, edge.source_port]

    def _loop_seen_by(self, node_id: str) -> Loop | None:
        """The loop that a node is in, else the one that it seeds."""
        if node_id in self.loop_of:
            return self.loop_of[node_id]
        return next(
            (self.loop_of[e.target_node] for e in self.graph.edges_out(node_id) if e.target_node in self.loop_of), None
        )

    def _free_after_last_use(self, kept: set[int]) -> None:
        last: dict[int, int] = {}
        made_in: dict[int, Loop | None] = {}
        spans: dict[int, tuple[int, Loop]] = {}
        loop: Loop | None = None
        for pc, op in enumerate(self.program):
            if isinstance(op, LoopStart):
                loop = op.loop
                for slot in loop.seed_reads:
                    last[slot] = pc
                for _, slot in loop.carries:
                    made_in[slot] = loop
            elif isinstance(op, LoopEnd):
                for made in spans.values():
                    if made[1] is op.loop:
                        last[made[0]] = pc
                for source, _ in op.loop.carries:
                    last[source] = pc
                for slot in (op.loop.index_slot, op.loop.total_slot, op.loop.until_slot):
                    if slot is not None:
                        last[slot] = pc
                loop = None
            else:
                for _, slot in (*op.outs, *op.optional_outs):
                    made_in[slot] = loop
                for slot in op.reads:
                    last[slot] = pc
                    if loop is not None and made_in.get(slot) is not loop:
                        spans[slot] = (slot, loop)  # from outside: needed in every iteration
        for slot, pc in last.items():
            if slot in kept or slot == _TRASH:
                continue
            op = self.program[pc]
            if isinstance(op, Call):
                op.free.append(slot)
            elif isinstance(op, LoopEnd):
                op.loop.free.append(slot)
            else:
                op.loop.seed_free.append(slot)


def configured_steps(graph: ExecutableGraph[Any], spec: Any, order: Sequence[str]) -> tuple[int | None, str]:
    """The number of steps that the structure itself names, and where."""
    if spec and spec.num_steps is not None:
        return spec.num_steps, "loops"
    steps = graph.metadata.get("num_loop_steps")
    if steps is not None:
        return steps, "metadata"
    for node_id in order:
        child = graph.nodes[node_id].child
        if callable(getattr(child, "iterations", None)):
            steps = getattr(child, "num_steps", None)
            if steps is not None:
                return steps, f"node {node_id}"
    return None, "default"


def steps_of(loop: Loop, asked: int | Mapping[str, int] | None) -> int:
    """How many steps a run does in `loop`: asked for, else configured, else 1."""
    if isinstance(asked, Mapping):
        asked = asked.get(loop.loop_id)
    steps = asked if asked is not None else loop.num_steps
    return 1 if steps is None else steps


def copy_defaults(plan: Plan, values: list[Any]) -> None:
    """Give this run its own copies of list and dict defaults."""
    for slot in plan.copied:
        values[slot] = copy.deepcopy(values[slot])
