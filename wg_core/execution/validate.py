"""Validation: everything that can be said about a structure without running it, as a list of issues."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

from wg_core.errors import ValidationError, did_you_mean
from wg_core.execution.gradients import cut_off
from wg_core.execution.hyper import links_below, problems
from wg_core.execution.plan import configured_steps, group_cycles, iteration_order
from wg_core.structure.ids import ID_PATTERN
from wg_core.structure.port import UNSET, Port
from wg_core.structure.topology import Edge, find_cycle

if TYPE_CHECKING:
    from wg_core.execution.executable_graph import ExecutableGraph

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Issue:
    """One finding: what, where, and the way out."""

    severity: Severity
    code: str
    path: str
    message: str
    hint: str = ""
    node: str | None = None
    port: str | None = None
    edge: Edge | None = None

    def __str__(self) -> str:
        return f"{self.path}: {self.message}{f'; {self.hint}' if self.hint else ''} [{self.code}]"


@dataclass(slots=True)
class ValidationResult:
    """All issues of a structure."""

    issues: list[Issue] = field(default_factory=list[Issue])

    @property
    def errors(self) -> list[Issue]:
        return [i for i in self.issues if i.severity == "error"]

    @property
    def warnings(self) -> list[Issue]:
        return [i for i in self.issues if i.severity == "warning"]

    @property
    def is_valid(self) -> bool:
        return not self.errors

    def raise_errors(self) -> NoReturn:
        raise ValidationError(self)

    def __str__(self) -> str:
        return "\n".join(str(i) for i in (self.errors or self.issues)) or "valid"


def validate_structure(
    graph: ExecutableGraph[Any], *, deep: bool = False, for_training: bool = False
) -> ValidationResult:
    """All checks on `graph`; with `deep` also on its children, their paths prefixed."""
    result = ValidationResult(list(_Checks(graph).all()))
    if for_training and result.is_valid:
        result.issues += [_blocked(graph, path, walls) for path, walls in cut_off(graph)]
    if deep:
        for node_id, node in graph.nodes.items():
            check = getattr(node.child, "validate", None)
            if check is not None:
                below = cast(ValidationResult, check(strict=False, deep=True))
                place = f"{graph.id}/{node_id}"
                result.issues += [replace(i, path="/".join([place, *i.path.split("/", 1)[1:]])) for i in below.issues]
                if not below.is_valid:
                    said, way_out = "this child is invalid", "see its own errors"
                    result.issues.append(Issue("error", "CHILD_INVALID", place, said, way_out))
    return result


def _blocked(graph: ExecutableGraph[Any], path: str, walls: Sequence[str]) -> Issue:
    said = f"{path} is to learn, but its only ways to an output lead through {', '.join(walls)}, where gradients end"
    way_out = "take the loss before that, run that part here, or freeze the node with set_trainable(path, False)"
    return Issue("warning", "GRADIENT_BLOCKED", f"{graph.id}/{path}", said, way_out, node=path)


class _Checks:
    def __init__(self, graph: ExecutableGraph[Any]) -> None:
        self.graph = graph
        self.ports = {n: graph.ports_of(node) for n, node in graph.nodes.items()}
        self.resting = graph.resting()
        self.exposed_in = {(x.node_id, x.port_name) for x in graph.exposures("in")}

    def error(self, code: str, message: str, hint: str = "", **where: Any) -> Issue:
        return Issue("error", code, self._path(where), message, hint, **where)

    def warning(self, code: str, message: str, hint: str = "", **where: Any) -> Issue:
        return Issue("warning", code, self._path(where), message, hint, **where)

    def _path(self, where: dict[str, Any]) -> str:
        path = self.graph.id
        if where.get("node"):
            path += f"/{where['node']}"
        if where.get("port"):
            path += f".{where['port']}"
        return path

    def all(self) -> Iterator[Issue]:
        yield from self.ids()
        if not self.graph.nodes:
            yield self.error("EMPTY", f"this {self.graph.level} has no nodes", "add one with add_node")
            return
        broken = list(self.exposures())
        yield from broken
        if broken and any(i.code == "EXPOSURE_BROKEN" for i in broken):
            return
        yield from self.cycles()
        yield from self.feeds()
        yield from self.edges()
        yield from self.reach()
        yield from self.models()
        yield from self.hyper()

    def ids(self) -> Iterator[Issue]:
        """Ids that were set past the methods that check them."""
        graph = self.graph
        named = [(f"{graph.level} id", graph.id), *(("node id", n) for n in graph.nodes)]
        named += [("loop id", spec.loop_id) for spec in graph.loops]
        named += [("exposed name", x.name) for d in ("in", "out") for x in graph.exposures(d, explicit=True) if x.name is not None]
        named += [("hyperedge id", h.id) for h in graph.hyperedges]
        for what, value in named:
            if not value.strip():
                yield self.error("BLANK_FIELD", f"the {what} is blank", "give it a name")
            elif not re.fullmatch(ID_PATTERN, value):
                hint = "use a letter or '_' first, then letters, digits and '_', at most 64 in all"
                yield self.error("BAD_ID", f"bad {what} {value!r}", hint)

    def exposures(self) -> Iterator[Issue]:
        graph = self.graph
        by_key: dict[str, list[Port]] = {}
        for direction in ("in", "out"):
            for x in graph.exposures(direction, explicit=True):
                port = self.ports[x.node_id].find(x.port_name, direction) if x.node_id in self.ports else None
                if port is None or port.direction != direction:
                    yield self.error(
                        "EXPOSURE_BROKEN", f"{direction}put {x.key!r} is bound to {x.node_id}.{x.port_name}, which does not exist",
                        "expose an existing port", node=x.node_id, port=x.port_name,
                    )  # fmt: skip
                elif direction == "in":
                    by_key.setdefault(x.key, []).append(port)
        for key, ports in by_key.items():
            common = set(ports[0].types)
            for port in ports[1:]:
                if "any" in port.types:
                    continue
                common = set(port.types) if "any" in common else common & set(port.types)
            if not common:
                kinds = ", ".join("|".join(p.types) for p in ports)
                yield self.error(
                    "EXPOSURE_CLASH", f"input {key!r} feeds ports of types that do not meet: {kinds}", "use two names"
                )
        if not graph.exposures("out"):
            yield self.warning(
                "NO_OUTPUTS", "nothing comes out: no output is exposed or left over", "expose_output(...)"
            )

    def cycles(self) -> Iterator[Issue]:
        graph = self.graph
        in_loop: set[Edge] = set()
        spans: list[list[str]] = []
        for members, is_loop in group_cycles(list(graph.nodes), graph.edges):
            if not is_loop:
                continue
            spans.append(members)
            inside = set(members)
            internal = [e for e in graph.edges if e.source_node in inside and e.target_node in inside]
            in_loop.update(internal)
            if not graph.allow_cycles:
                following = {n: [e.target_node for e in internal if e.source_node == n] for n in members}
                cycle = " -> ".join(find_cycle(members, following) or members)
                yield self.error(
                    "CYCLE_FORBIDDEN", f"a {graph.level} has no cycles, but {cycle}", "put the loop inside one graph"
                )
                continue
            if any(len(c) > 1 for c in iteration_order(members, graph.edges)) or not any(e.carry for e in internal):
                following = {
                    n: [e.target_node for e in internal if e.source_node == n and not e.carry] for n in members
                }
                cycle = " -> ".join(find_cycle(members, following) or members)
                candidates = ", ".join(str(e) for e in internal if not e.carry)
                yield self.error(
                    "LOOP_NO_CARRY", f"the cycle {cycle} has no carry edge that breaks it",
                    f"mark the edge that brings the previous iteration's value with carry=True; candidates: {candidates}",
                )  # fmt: skip
                continue
            yield from self.seeds(inside, internal)
            yield from self.loop_settings(members, inside)
        for e in graph.edges:
            if e.carry and e not in in_loop:
                yield self.error(
                    "CARRY_OUTSIDE_CYCLE", f"carry edge {e} is in no cycle", "make it a plain edge", edge=e
                )
        for spec in graph.loops:
            named = spec.names(graph.nodes)
            if not any(named & set(m) for m in spans) and not (len(spans) == 1 and not named):
                yield self.error(
                    "LOOP_ORDER",
                    f"loop {spec.loop_id!r} belongs to no cycle",
                    "name one of the cycle's nodes as loop_id",
                )

    def seeds(self, inside: set[str], internal: Sequence[Edge]) -> Iterator[Issue]:
        for e in internal:
            if not e.carry:
                continue
            port = self.ports[e.target_node].inputs[e.target_port]
            node = self.graph.nodes[e.target_node]
            seeded = (
                (e.target_node, e.target_port) in self.exposed_in
                or any(o.target_port == e.target_port and not o.carry for o in self.graph.edges_in(e.target_node))
                or e.target_port in node.defaults
                or port.default is not UNSET
            )
            if not seeded and not port.optional:
                yield self.error(
                    "LOOP_NO_SEED", f"iteration 0 has no value for {e.target_node}.{e.target_port}, which only {e} feeds",
                    "expose the port, join an edge from outside the loop, or give the node a default",
                    node=e.target_node, port=e.target_port, edge=e,
                )  # fmt: skip

    def loop_settings(self, members: Sequence[str], inside: set[str]) -> Iterator[Issue]:
        graph = self.graph
        spec = graph.loop_spec(members)
        if configured_steps(graph, spec, members)[0] is None:
            name = spec.loop_id if spec and spec.loop_id else members[0]
            yield self.warning(
                "LOOP_STEPS", f"loop {name!r} runs once unless a run says otherwise",
                f"set the number of its steps in loops, or give each run num_loop_steps={{{name!r}: N}}",
            )  # fmt: skip
        if spec is None:
            return
        steps: Any = spec.num_steps
        if steps is not None and (type(steps) is not int or steps < 1):
            yield self.error("LOOP_STEPS", f"loop {spec.loop_id!r}: num_steps is {steps!r}", "use a whole number >= 1")
        depth: Any = spec.grad_steps
        if depth is not None and (type(depth) is not int or depth < 1):
            yield self.error("LOOP_STEPS", f"loop {spec.loop_id!r}: grad_steps is {depth!r}", "use a whole number >= 1")
        elif depth is not None and spec.until is not None:
            yield self.error(
                "LOOP_STEPS", f"loop {spec.loop_id!r}: grad_steps counts from the last step, which until leaves open",
                "leave out one of the two",
            )  # fmt: skip
        if spec.until is not None:
            node, port = spec.until.get("node"), spec.until.get("port")
            if node not in inside or port not in self.ports[node].outputs:
                yield self.error(
                    "LOOP_ORDER", f"loop {spec.loop_id!r} ends at {node}.{port}, which is no output inside the loop",
                    f"name an output of {', '.join(members)}",
                )  # fmt: skip
        if spec.order:
            if sorted(spec.order) != sorted(members):
                yield self.error(
                    "LOOP_ORDER", f"loop {spec.loop_id!r}: order {list(spec.order)} is not the cycle's nodes {list(members)}",
                    "list every node of the cycle once",
                )  # fmt: skip
                return
            place = {n: i for i, n in enumerate(spec.order)}
            for e in graph.edges:
                if (
                    not e.carry
                    and e.source_node in inside
                    and e.target_node in inside
                    and place[e.source_node] > place[e.target_node]
                ):
                    yield self.error(
                        "LOOP_ORDER", f"loop {spec.loop_id!r}: order contradicts {e}", "swap the two nodes or make it a carry edge",
                        edge=e,
                    )  # fmt: skip

    def feeds(self) -> Iterator[Issue]:
        graph = self.graph
        for node_id, node in graph.nodes.items():
            index = self.ports[node_id]
            data: dict[str, list[Edge]] = {}
            carried: set[str] = set()
            for e in graph.edges_in(node_id):
                if e.carry:
                    carried.add(e.target_port)
                else:
                    data.setdefault(e.target_port, []).append(e)
            for name in node.defaults:
                if name not in index.inputs:
                    yield self.warning(
                        "DEFAULT_UNKNOWN_PORT", f"{node_id} has a default for {name!r}, which is none of its inputs",
                        f"take it away, or correct it; {did_you_mean(name, index.inputs)}", node=node_id,
                    )  # fmt: skip
            for name, port in index.inputs.items():
                fed = name in data or name in node.defaults or (node_id, name) in self.exposed_in
                if port.required and not fed and name not in carried and node_id not in self.resting:
                    yield self.error(
                        "REQUIRED_UNFED", f"required input {node_id}.{name} has no edge, exposed input or default",
                        "join an edge, expose it, or set a default", node=node_id, port=name,
                    )  # fmt: skip
                if port.aggregation == "single" and name in data:
                    if len(data[name]) > 1:
                        yield self.error(
                            "FAN_IN",
                            f"{node_id}.{name} takes one edge and has {len(data[name])}",
                            "remove edges, or declare an aggregation on the port",
                            node=node_id,
                            port=name,
                        )
                    if (node_id, name) in self.exposed_in:
                        yield self.error(
                            "EXPOSED_AND_WIRED", f"{node_id}.{name} is exposed and fed by {data[name][0]}",
                            "unexpose it or remove the edge", node=node_id, port=name,
                        )  # fmt: skip

    def edges(self) -> Iterator[Issue]:
        for e in self.graph.edges:
            source = self.ports[e.source_node].outputs.get(e.source_port)
            target = self.ports[e.target_node].inputs.get(e.target_port)
            if source is None or target is None:
                yield self.error("UNKNOWN_PORT", f"edge {e} ends at a port that is gone", "remove the edge", edge=e)
            elif not source.compatible_with(target):
                yield self.error(
                    "TYPE_MISMATCH", f"{e.target_node}.{target.name} takes {'|'.join(target.types)!r} but {e.source_node}."
                    f"{source.name} gives {'|'.join(source.types)!r}", "put a block between that converts it", edge=e,
                )  # fmt: skip
            else:
                if source.partly_compatible_with(target):
                    yield self.warning(
                        "PARTIAL_TYPES",
                        f"{e}: only some of {'|'.join(source.types)!r} fit {'|'.join(target.types)!r}",
                        "narrow the output's types, or put a block between that converts the rest",
                        edge=e,
                    )
                if source.tag and target.tag and source.tag != target.tag:
                    message = f"{e}: tag {source.tag!r} meets {target.tag!r}"
                    yield self.warning("TAG_MISMATCH", message, "check that this value is meant", edge=e)

    def reach(self) -> Iterator[Issue]:
        graph = self.graph
        outward = {x.node_id for x in graph.exposures("out")} | self.resting
        waiting = list(outward)
        while waiting:
            for e in graph.edges_in(waiting.pop()):
                if e.source_node not in outward:
                    outward.add(e.source_node)
                    waiting.append(e.source_node)
        for node_id in graph.nodes:
            if node_id not in outward and node_id not in self.resting:
                yield self.warning(
                    "DEAD_END",
                    f"nothing that {node_id} makes reaches an output",
                    "expose one of its outputs",
                    node=node_id,
                )

        begun = {n for n, _ in self.exposed_in}
        begun |= {n for n in graph.nodes if all(not p.required or k in graph.nodes[n].defaults for k, p in self.ports[n].inputs.items())}
        waiting = list(begun)
        while waiting:
            for e in graph.edges_out(waiting.pop()):
                if e.target_node not in begun:
                    begun.add(e.target_node)
                    waiting.append(e.target_node)
        for node_id in graph.nodes:
            if node_id not in begun and node_id not in self.resting:
                yield self.warning(
                    "UNREACHABLE", f"no input and no source leads to {node_id}", "join an edge to it, or expose an input", node=node_id
                )

    def models(self) -> Iterator[Issue]:
        owners: dict[tuple[str, ...], Any] = {}
        for block in self.graph.iter_blocks():
            key = block.model_ref() if block.poolable else None
            if key is None:
                continue
            other = owners.setdefault(key, block)
            if other is not block:
                yield self.error(
                    "DUPLICATE_MODEL",
                    f"two blocks hold the model {key[2]!r}",
                    "build them through one pool, or set reuse: false in one",
                )

    def hyper(self) -> Iterator[Issue]:
        for hyperedge, problem in problems(self.graph):
            yield self.error(
                "HYPER_MEMBER", f"{hyperedge.kind} {hyperedge.id!r}: {problem}", "change its members, or add it with add_hyperedge"
            )
        resolvers = self.graph.resolvers
        for path, link in links_below(self.graph) if resolvers is not None else ():
            if resolvers is not None and not resolvers.knows(link):
                yield self.warning(
                    "LINK_UNRESOLVED", f"link to {link} leads nowhere here", "register a resolver, or correct the link",
                    **({"node": path} if path else {}),
                )  # fmt: skip
