"""Which automatic edges follow from the roles of a graph's blocks: one computation from scratch, and its report.

The result is a pure function of the nodes, their hints and pins, the edges that were given and the exposed ports.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from wg_core.assembly.roles import role_of
from wg_core.assembly.rules import Rule, get_rules, hint, rules_into
from wg_core.errors import did_you_mean
from wg_core.execution.block import Block
from wg_core.execution.executable_graph import ExecutableGraph
from wg_core.execution.node import Node
from wg_core.structure.port import Port
from wg_core.structure.topology import Edge, components


@dataclass(frozen=True, slots=True)
class Replaced:
    """An edge that a rule offers, and the one of higher priority (or the pinned one) that took its input."""

    edge: Edge
    by: Edge


@dataclass(frozen=True, slots=True)
class Skipped:
    """An edge that a rule offers and that was not made, with the reason."""

    edge: Edge
    reason: str


@dataclass(frozen=True, slots=True)
class BrokenPin:
    """An input that was pinned to a source and is not fed by it."""

    node_id: str
    port: str
    source: str
    reason: str


@dataclass(slots=True)
class WiringReport:
    """What automatic wiring did; of several losers for one input the first is named.

    `ambiguous` are edges that lost only by coming later.
    """

    added: list[Edge] = field(default_factory=list[Edge])
    replaced: list[Replaced] = field(default_factory=list[Replaced])
    skipped: list[Skipped] = field(default_factory=list[Skipped])
    ambiguous: list[Skipped] = field(default_factory=list[Skipped])
    broken_pins: list[BrokenPin] = field(default_factory=list[BrokenPin])

    def about(self, node_id: str) -> WiringReport:
        """Only what touches one node."""

        def touches(edge: Edge) -> bool:
            return node_id in (edge.source_node, edge.target_node)

        return WiringReport(
            [e for e in self.added if touches(e)],
            [r for r in self.replaced if touches(r.edge) or touches(r.by)],
            [s for s in self.skipped if touches(s.edge)],
            [s for s in self.ambiguous if touches(s.edge)],
            [p for p in self.broken_pins if node_id == p.node_id],
        )

    def __str__(self) -> str:
        lines = [f"added {e}" for e in self.added]
        lines += [f"replaced {r.edge} by {r.by}" for r in self.replaced]
        lines += [f"skipped {s.edge}: {s.reason}" for s in (*self.ambiguous, *self.skipped)]
        return "\n".join(lines) or "nothing to wire"


Slot = tuple[str, str, bool]


@dataclass(slots=True)
class Wishes:
    """What automatic wiring goes by, beside the nodes.

    `born` holds when each node with a role came, `asked` when a node was (last) to be wired: rules look at a pair
    of nodes if the one was there when the other asked. `pins` says per node and input which sources it takes.
    """

    born: dict[str, int] = field(default_factory=dict[str, int])
    asked: dict[str, int] = field(default_factory=dict[str, int])
    pins: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict[str, dict[str, tuple[str, ...]]])

    def pair(self, a: str, b: str) -> bool:
        return self.born[b] <= self.asked.get(a, -1) or self.born[a] <= self.asked.get(b, -1)

    def forget(self, node_id: str) -> None:
        for table in (self.born, self.asked, self.pins):
            table.pop(node_id, None)

    def rename(self, old: str, new: str) -> None:
        tables: list[dict[str, Any]] = [self.born, self.asked, self.pins]
        for table in tables:
            if old in table:
                table[new] = table.pop(old)
        for pins in self.pins.values():
            for port, sources in pins.items():
                pins[port] = tuple(new if s == old else s for s in sources)


class Connector:
    """One computation of all automatic edges."""

    def __init__(
        self,
        graph: ExecutableGraph[Block],
        wishes: Wishes,
        given: Sequence[Edge],
        exposed: Set[tuple[str, str]],
        careful: bool = False,
    ) -> None:
        self.graph = graph
        self.wishes = wishes
        self.given = given
        self.exposed = exposed
        self.careful = careful
        self.report = WiringReport()
        self.manual = [e for e in given if e.origin != "auto"]
        self.listed = {e: i for i, e in enumerate(given) if e.origin == "auto"}
        self.place = {n: i for i, n in enumerate(n for n in graph.nodes if n in wishes.born)}
        self.by_role: dict[str, list[Node[Block]]] = {}
        for node_id in self.place if wishes.asked else ():
            node = graph.nodes[node_id]
            self.by_role.setdefault(role_of(node.child) or "", []).append(node)
        self.held: dict[Slot, list[Edge]] = {}
        self.chosen: list[Edge] = []
        self.following: dict[str, list[str]] = {}
        self._sources: dict[Any, list[tuple[Node[Block], Port]]] = {}
        self._downstream: dict[str, set[str]] = {}
        for edge in self.manual:
            self.take(edge)

    def take(self, edge: Edge) -> None:
        self.held.setdefault((edge.target_node, edge.target_port, edge.carry), []).append(edge)
        if not edge.carry:
            self.following.setdefault(edge.source_node, []).append(edge.target_node)

    def solve(self) -> list[Edge]:
        """All automatic edges: data first, then what follows other data, then what goes back along the data."""
        offers: dict[Slot, tuple[tuple[bool, bool, int, int], list[tuple[int, Rule]]]] = {}
        for role, nodes in self.by_role.items():
            for number, rule in rules_into(role):
                for node in nodes:
                    if rule.target_port in node.child.port_index.inputs and _holds(rule.target_hints, node):
                        key = (rule.carry, rule.follows is not None, number, self.place[node.node_id])
                        slot = (node.node_id, rule.target_port, rule.carry)
                        offers.setdefault(slot, (key, []))[1].append((number, rule))
        listed: dict[Slot, list[Edge]] = {}
        for edge, number in self.listed.items():
            slot = (edge.target_node, edge.target_port, edge.carry)
            listed.setdefault(slot, []).append(edge)
            offers.setdefault(slot, ((edge.carry, False, -1, number), []))
        for slot, (_, rules) in sorted(offers.items(), key=lambda item: item[1][0]):
            self.fill(slot, rules, listed.get(slot, []))
        if not self.careful and self.closes_cycle():
            again = Connector(self.graph, self.wishes, self.given, self.exposed, careful=True)
            again.solve()
            self.report, self.chosen = again.report, again.chosen
            return self.chosen
        self.check_pins()
        self.report.added = self.chosen
        return self.chosen

    # ---- one input -------------------------------------------------------------------------------------------------

    def fill(self, slot: Slot, rules: list[tuple[int, Rule]], listed: list[Edge]) -> None:
        """Choose the edge of one input, or the edges if it joins several."""
        node_id, port_name, carry = slot
        port = self.graph.nodes[node_id].child.port_index.inputs[port_name]
        candidates = self.candidates(slot, port, rules, listed)
        pinned = self.wishes.pins.get(node_id, {}).get(port_name)
        if pinned:
            offered = list(candidates)
            wanted = [c for c in offered if c[1].source_node in pinned]
            if wanted:
                self.report.replaced += [Replaced(c[1], wanted[0][1]) for c in offered if c not in wanted]
            candidates = iter(wanted or offered)
        hands = self.held.get(slot, [])
        if port.aggregation != "single":
            present = set(hands)
            for _, edge in candidates:
                if edge not in present:
                    self.accept(edge)
            return
        if hands or (not carry and (node_id, port_name) in self.exposed):
            first = next(candidates, None)
            if first is not None and first[1] not in hands:
                self.skip(first[1], f"{hands[0]} was given by hand" if hands else "the input is exposed")
            return
        winner = next((c for c in candidates if self.accept(c[1])), None)
        loser = next(candidates, None)
        if winner is None or loser is None:
            return
        if loser[0] < winner[0]:
            self.report.replaced.append(Replaced(loser[1], winner[1]))
        else:
            self.report.ambiguous.append(Skipped(loser[1], f"{winner[1].source_node} came first"))

    def accept(self, edge: Edge) -> bool:
        if (
            self.careful
            and not edge.carry
            and edge not in self.listed
            and self.reaches(edge.target_node, edge.source_node)
        ):
            self.skip(edge, "it would close a cycle")
            return False
        self.take(edge)
        self.chosen.append(edge)
        return True

    def skip(self, edge: Edge, reason: str) -> None:
        self.report.skipped.append(Skipped(edge, reason))

    def candidates(
        self, slot: Slot, port: Port, rules: list[tuple[int, Rule]], listed: list[Edge]
    ) -> Iterator[tuple[int, Edge]]:
        """Priority and edge of all that may feed an input, best first; edges listed from before lead their priority."""
        target, name, carry = slot
        queue: list[tuple[int, int, Edge | Rule]] = [(-self.priority_of(e), -1, e) for e in listed]
        queue += [(-rule.priority, number, rule) for number, rule in rules]
        queue.sort(key=lambda item: item[:2])
        seen = {e.source_node for e in listed}
        for negative, _, offer in queue:
            if isinstance(offer, Edge):
                if not carry or offer.source_node in self.downstream(target):
                    yield -negative, offer
                else:
                    self.skip(offer, "it is in no cycle")
                continue
            told = False
            for source, out in self.sources(offer, self.graph.nodes[target]):
                if source.node_id in seen:
                    continue
                seen.add(source.node_id)
                edge = Edge(source.node_id, out.name, target, name, carry, "auto")
                if out.compatible_with(port):
                    yield -negative, edge
                elif not told:
                    told = True
                    self.skip(edge, f"{'|'.join(out.types)!r} does not fit {'|'.join(port.types)!r}")

    def sources(self, rule: Rule, target: Node[Block]) -> Iterator[tuple[Node[Block], Port]]:
        """Nodes that a rule lets feed `target`, with the port, in insertion order."""
        pins = self.wishes.pins.get(target.node_id, {}).get(rule.target_port, ())
        for node, port in self.pool(rule, target):
            if (node is target) is rule.itself and (
                node.node_id in pins or self.wishes.pair(node.node_id, target.node_id)
            ):
                yield node, port

    def pool(self, rule: Rule, target: Node[Block]) -> list[tuple[Node[Block], Port]]:
        alike = {n: hint(target.hints, n) for n in rule.same}
        if rule.itself:
            nodes = [target]
        elif rule.carry:  # what is in no cycle has nothing to bring (yet)
            loop = self.downstream(target.node_id)
            nodes = [n for n in self.by_role.get(rule.source_role, []) if n.node_id in loop]
        elif rule.follows is not None:
            feeds = self.held.get((target.node_id, rule.follows, False), ())
            nodes = [n for e in feeds if role_of((n := self.graph.nodes[e.source_node]).child) == rule.source_role]
        else:
            key = (rule.source_role, rule.source_port, *rule.source_hints.items(), *alike.items())
            if key not in self._sources:
                self._sources[key] = self.fitting(rule, alike, self.by_role.get(rule.source_role, []))
            return self._sources[key]
        return self.fitting(rule, alike, nodes)

    def fitting(
        self, rule: Rule, alike: Mapping[str, str], nodes: Sequence[Node[Block]]
    ) -> list[tuple[Node[Block], Port]]:
        return [
            (node, port)
            for node in nodes
            if node.node_id in self.place
            and (port := node.child.port_index.outputs.get(rule.source_port)) is not None
            and _holds({**rule.source_hints, **alike}, node)
        ]

    def priority_of(self, edge: Edge) -> int:
        """The priority of a listed edge: that of the rule it is like."""
        source, target = self.graph.nodes[edge.source_node], self.graph.nodes[edge.target_node]
        ends = (edge.source_port, edge.target_port, edge.carry)
        return max(
            (
                rule.priority
                for rule in get_rules(role_of(source.child) or "", role_of(target.child) or "")
                if (rule.source_port, rule.target_port, rule.carry) == ends
                and _holds(rule.target_hints, target)
                and _holds({**rule.source_hints, **{n: hint(target.hints, n) for n in rule.same}}, source)
            ),
            default=0,
        )

    # ---- the whole -------------------------------------------------------------------------------------------------

    def downstream(self, node_id: str) -> set[str]:
        """All nodes to which data edges lead from a node, and itself."""
        if node_id not in self._downstream:
            self._downstream[node_id] = _reachable(node_id, self.following)
        return self._downstream[node_id]

    def reaches(self, start: str, goal: str) -> bool:
        return goal in _reachable(start, self.following)

    def closes_cycle(self) -> bool:
        return any(len(c) > 1 for c in components(list(self.graph.nodes), self.following)) or any(
            n in s for n, s in self.following.items()
        )

    def check_pins(self) -> None:
        made = {(e.source_node, e.target_node, e.target_port) for e in (*self.manual, *self.chosen)}
        reasons = {(s.edge.source_node, s.edge.target_node, s.edge.target_port): s.reason for s in self.report.skipped}
        for node_id, pins in self.wishes.pins.items():
            for port, sources in pins.items():
                for source in sources:
                    if (source, node_id, port) not in made:
                        nodes = self.graph.nodes
                        reason = (
                            "no rule joins them"
                            if source in nodes
                            else f"there is no such node; {did_you_mean(source, nodes)}"
                        )
                        self.report.broken_pins.append(
                            BrokenPin(node_id, port, source, reasons.get((source, node_id, port), reason))
                        )


def _reachable(start: str, following: Mapping[str, Sequence[str]]) -> set[str]:
    seen = {start}
    waiting = [start]
    while waiting:
        for succ in following.get(waiting.pop(), ()):
            if succ not in seen:
                seen.add(succ)
                waiting.append(succ)
    return seen


def _holds(hints: Mapping[str, str], node: Node[Block]) -> bool:
    return all(hint(node.hints, name) == value for name, value in hints.items())
