"""A graph that joins its blocks by their roles.

Automatic edges are computed from scratch (`connect`) when somebody looks at the edges after a change, never patched,
so the order of building does not matter.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from wg_core.assembly.connect import BrokenPin, Connector, Replaced, Skipped, WiringReport, Wishes
from wg_core.assembly.roles import role_of
from wg_core.assembly.rules import HINTS, Rule, check_hints, get_rules, register_rule, rules_into
from wg_core.errors import EdgeError, NodeError, did_you_mean
from wg_core.execution.block import Block
from wg_core.execution.executable_graph import ExecutableGraph
from wg_core.execution.node import Exposure
from wg_core.execution.validate import Issue, ValidationResult
from wg_core.structure.topology import Edge

__all__ = [
    "HINTS",
    "BrokenPin",
    "Replaced",
    "Rule",
    "Skipped",
    "WiredGraph",
    "WiringReport",
    "apply_auto_connect",
    "get_rules",
    "register_rule",
    "suggest_edges",
]

_wiring = threading.RLock()


class WiredGraph(ExecutableGraph[Block]):
    """A graph whose blocks are joined by their roles.

    What was given (edges by hand, and automatic edges that a file lists) is kept in `_given`; the edges of the
    graph are those plus what the rules make of them, computed anew at the first look after a change.
    """

    version: int

    def __init__(self, id: str | None = None, *, metadata: Mapping[str, Any] | None = None) -> None:
        super().__init__(id, metadata=metadata)
        self._given: dict[Edge, Edge] = {}
        self._listed = 0
        self._wishes = Wishes()
        self._stale = False
        self._report = WiringReport()

    # ---- the automatic part ----------------------------------------------------------------------------------------

    @property
    def wiring_report(self) -> WiringReport:
        """What the rules made of the graph as it is now."""
        self._wire()
        return self._report

    def auto_connect_all(self) -> WiringReport:
        """Wire every node that has a role, also those that were loaded or added without."""
        for node_id, node in self.nodes.items():
            if role_of(node.child) is not None:
                self._wishes.born.setdefault(node_id, self.version)
                self._wishes.asked[node_id] = self.version
        self._change()
        self.version += 1
        return self.wiring_report

    def wire_node(self, node_id: str, connect: Mapping[str, str | Sequence[str]] | None = None) -> None:
        """Let the rules join a node to what is there and to what comes; `connect` pins inputs to source nodes.

        A pinned source may come later; `validate` tells if it never did.
        Raises: NodeError for an unknown node, and for a pin on an input that no rule feeds.
        """
        block = self.get_node(node_id).child
        role = role_of(block)
        pins: dict[str, tuple[str, ...]] = {}
        ruled = sorted({r.target_port for _, r in rules_into(role or "") if r.target_port in block.port_index.inputs})
        for name, sources in (connect or {}).items():
            port = block.port_index.find(name, "in")
            if port is None or port.name not in ruled:
                has = f"role {role!r}" if role else "a block without a role"
                raise NodeError(
                    f"{self.id}/{node_id}: connect names {name!r}, which no wiring rule feeds ({has}); "
                    f"{did_you_mean(name, ruled)}; join it with add_edge"
                )
            pins[port.name] = (sources,) if isinstance(sources, str) else tuple(sources)
        if role is None:
            return
        self._wishes.asked[node_id] = self.version
        if pins:
            self._wishes.pins[node_id] = pins
        self._change()

    def suggested(self, node_id: str) -> list[Edge]:
        """The edges that the rules would add for a node; changes nothing."""
        wishes = self._wishes
        wished = Wishes(dict(wishes.born), {**wishes.asked, node_id: self.version}, wishes.pins)
        if role_of(self.get_node(node_id).child) is None:
            return []
        wished.born.setdefault(node_id, self.version)
        present = set(self.edges)
        found = Connector(self, wished, list(self._given.values()), self._taken()).solve()
        return [e for e in found if node_id in (e.source_node, e.target_node) and e not in present]

    def _taken(self) -> set[tuple[str, str]]:
        return {(x.node_id, x.port_name) for x in self._exposed["in"]}

    def _change(self) -> None:
        self._stale = self._stale or bool(self._wishes.asked or self._listed)

    def _wire(self) -> None:
        if not self._stale:
            return
        with _wiring:
            if not self._stale:
                return
            given = list(self._given.values())
            solver = Connector(self, self._wishes, given, self._taken())
            chosen = dict.fromkeys(solver.solve())
            edges = [e for e in given if e.origin != "auto" or e in chosen]
            edges += [e for e in chosen if e not in self._given]
            self._edges = {}
            self._in = {n: [] for n in self.nodes}
            self._out = {n: [] for n in self.nodes}
            for edge in edges:
                self._keep(edge)
            self._report = solver.report
            self._stale = False

    def _yield(self, node_id: str, port: str, carry: bool) -> None:
        """Let automatic edges make room on an input for what is given by hand."""
        node = self.nodes.get(node_id)
        found = node.child.port_index.find(port, "in") if node else None
        if found is not None:
            for edge in [
                e for e in self._in[node_id] if e.origin == "auto" and (e.target_port, e.carry) == (found.name, carry)
            ]:
                self._drop(edge)
                self._stale = True

    def _freeze(self) -> None:
        """Take the edges as they are; rules then look only at nodes that come later."""
        self._wire()
        self._given = {e: e for e in self._edges}
        self._listed = len([e for e in self._given if e.origin == "auto"])
        self._wishes.asked.clear()
        self._wishes.pins.clear()

    # ---- building --------------------------------------------------------------------------------------------------

    def insert_node(
        self,
        child: Block,
        node_id: str,
        *,
        trainable: bool = True,
        defaults: Mapping[str, Any] | None = None,
        hints: Mapping[str, str] | None = None,
    ) -> str:
        """Add a ready block under `node_id`, without wiring it.

        Raises: NodeError for a taken id, a default of an unknown port or an unknown hint, ConfigError for a bad id.
        """
        check_hints(hints or {}, f"{self.id}/{node_id}")
        super().insert_node(child, node_id, trainable=trainable, defaults=defaults, hints=hints)
        if role_of(child) is not None:
            self._wishes.born[node_id] = self.version
        return node_id

    def remove_node(self, node_id: str) -> None:
        """Remove a node with its edges and exposed ports."""
        super().remove_node(node_id)
        self._change()
        self._given = {e: e for e in self._given.values() if node_id not in (e.source_node, e.target_node)}
        self._listed = sum(e.origin == "auto" for e in self._given.values())
        self._wishes.forget(node_id)

    def rename_node(self, node_id: str, new_id: str) -> None:
        """Give a node another id; edges, exposed ports and place in the order stay."""
        self._wire()
        super().rename_node(node_id, new_id)

        def moved(name: str) -> str:
            return new_id if name == node_id else name

        given = (
            Edge(moved(e.source_node), e.source_port, moved(e.target_node), e.target_port, e.carry, e.origin)
            for e in self._given.values()
        )
        self._given = {e: e for e in given}
        self._wishes.rename(node_id, new_id)
        self._change()

    def replace_block(self, node_id: str, child: Block) -> None:
        """Put another block with the same ports into a node.

        Raises: NodeError if a port that is in use is missing or of another direction or type.
        """
        self._wire()
        super().replace_block(node_id, child)
        if role_of(child) is None:
            self._wishes.forget(node_id)
        else:
            self._wishes.born.setdefault(node_id, self.version)
        self._change()

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
        """Join an output to an input; takes the place of an automatic edge there.

        Raises: EdgeError for unknown ends, a wrong direction, types that do not meet, a second feed of a single
        input, or an edge from a node to itself that is not a carry edge.
        """
        if isinstance(source, Edge):
            into, name, carry, origin = source.target_node, source.target_port, source.carry, source.origin
        else:
            into, name = target or "", target_port or ""
        if origin != "auto":
            self._yield(into, name, carry)
        edge = super().add_edge(source, source_port, target, target_port, carry=carry, origin=origin)
        before = self._given.get(edge)
        if before is None or (before.origin == "auto" and edge.origin != "auto"):
            self._given.pop(edge, None)
            self._given[edge] = edge
            self._listed += (edge.origin == "auto") - (before is not None)
            self._change()
        return edge

    def remove_edge(self, edge: Edge) -> None:
        """Remove an edge.

        Removing an automatic one takes the wiring into your hands: all other edges stay as they are, and rules look
        only at nodes that are added later (`auto_connect_all` wires all again).
        Raises: EdgeError if there is no such edge.
        """
        self._wire()
        if edge not in self._edges:
            raise EdgeError(f"{self.id} has no edge {edge}")
        own = next(e for e in self._out[edge.source_node] if e == edge)
        if own.origin == "auto":
            self._freeze()
            self._listed -= 1
        super().remove_edge(own)
        del self._given[own]
        self._change()

    def expose_input(self, node_id: str, port: str, name: str | None = None) -> str:
        """Offer a child's input under `name` (default `node:port`), in place of an automatic edge.

        Raises: NodeError for unknown ends, EdgeError for a single input that an edge given by hand feeds.
        """
        self._yield(node_id, port, False)
        key = super().expose_input(node_id, port, name)
        self._change()
        return key

    def unexpose_input(self, key: str) -> None:
        super().unexpose_input(key)
        self._change()

    # ---- looking ---------------------------------------------------------------------------------------------------

    @property
    def edges(self) -> tuple[Edge, ...]:
        self._wire()
        return super().edges

    def edges_in(self, node_id: str) -> Sequence[Edge]:
        self._wire()
        return super().edges_in(node_id)

    def edges_out(self, node_id: str) -> Sequence[Edge]:
        self._wire()
        return super().edges_out(node_id)

    def _loose_ends(self, direction: str) -> Iterator[Exposure]:
        self._wire()
        return super()._loose_ends(direction)

    def validate(
        self, strict: bool = True, *, deep: bool = False, for_training: bool = False
    ) -> ValidationResult:
        """Check the whole structure without loading or running anything; `deep` goes into children.

        Raises: ValidationError with all errors, if `strict`.
        """
        result = super().validate(strict=False, deep=deep, for_training=for_training)
        report = self.wiring_report
        for lost in report.ambiguous:
            node, port = lost.edge.target_node, lost.edge.target_port
            message = f"{lost.edge.source_node} could feed it too, but {lost.reason}"
            way_out = f"pin it with connect={{{port!r}: ...}}, join it with add_edge, or say hints"
            path = f"{self.id}/{node}.{port}"
            result.issues.append(Issue("warning", "AMBIGUOUS_WIRING", path, message, way_out, node=node, port=port))
        for pin in report.broken_pins:
            message = f"it is pinned to {pin.source!r}, but {pin.reason}"
            way_out = "join it with add_edge, or pin another node"
            path = f"{self.id}/{pin.node_id}.{pin.port}"
            result.issues.append(Issue("error", "PIN_BROKEN", path, message, way_out, node=pin.node_id, port=pin.port))
        if not result.is_valid:
            self._valid_stamp = None
            if strict:
                result.raise_errors()
        return result


def suggest_edges(graph: WiredGraph, node_id: str) -> list[Edge]:
    """The edges that the rules would add for a node; changes nothing. Raises: NodeError."""
    return graph.suggested(node_id)


def apply_auto_connect(graph: WiredGraph, node_id: str) -> WiringReport:
    """Let the rules join a node to the others; returns what that made of the node. Raises: NodeError."""
    before = set(graph.edges)
    graph.wire_node(node_id)
    graph.version += 1
    report = graph.wiring_report.about(node_id)
    report.added = [e for e in report.added if e not in before]
    return report
