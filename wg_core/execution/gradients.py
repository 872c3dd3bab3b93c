"""Where gradients end: parameters that are to learn and reach every output only through what runs elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from wg_core.execution.block import Block

if TYPE_CHECKING:
    from wg_core.execution.executable_graph import ExecutableGraph


def cut_off(graph: ExecutableGraph[Any]) -> Iterator[tuple[str, list[str]]]:
    """Each node, at any depth, that is to learn and gets no gradient, with what cuts it off, as paths below `graph`.

    Nothing is loaded: whether a block learns is told from what is known of it now.
    """
    return _Flow(graph).cut_off()


class _Flow:
    """A structure as blocks and remote levels alone, joined through the exposed ports of all levels."""

    def __init__(self, graph: ExecutableGraph[Any]) -> None:
        self.leaves: dict[str, Any] = {}
        self.learning: dict[str, str] = {}  # node that is to learn -> the node in whose place it does
        self.back: dict[str, set[str]] = {}
        self.ahead: dict[str, set[str]] = {}
        self._walk(graph, "", True)
        self.outputs = [p for x in graph.exposures("out") for p in _ends(graph, "", x.node_id, x.port_name, "out")]

    def _walk(self, graph: ExecutableGraph[Any], prefix: str, trainable: bool) -> None:
        resting = graph.resting()
        for node_id, node in graph.nodes.items():
            path, learns = f"{prefix}{node_id}", trainable and node.trainable
            if _is_level(node.child):
                self._walk(node.child, f"{path}/", learns)
                continue
            self.leaves[path] = node.child
            if not learns or not isinstance(node.child, Block) or not any(b.may_learn() for b in node.child.iter_blocks()):
                continue
            target = getattr(node.child, "target", None)
            if node_id not in resting:
                self.learning[path] = path
            elif target in graph.nodes:
                self.learning[path] = f"{prefix}{target}"  # an adapter works where its target stands
        for e in graph.edges:
            for source in _ends(graph, prefix, e.source_node, e.source_port, "out"):
                for into in _ends(graph, prefix, e.target_node, e.target_port, "in"):
                    self.back.setdefault(into, set()).add(source)
                    self.ahead.setdefault(source, set()).add(into)

    def _passes(self, path: str) -> bool:
        return all(getattr(b, "passes_gradient", True) for b in (self.leaves[path], *_blocks(self.leaves[path])))

    def _reached(self, through: bool) -> set[str]:
        """What leads to an output; not `through` what passes no gradient on."""
        found, waiting = set(self.outputs), list(self.outputs)
        while waiting:
            path = waiting.pop()
            if through or self._passes(path):
                new = self.back.get(path, set()) - found
                found |= new
                waiting += new
        return found

    def cut_off(self) -> Iterator[tuple[str, list[str]]]:
        told, meant = self._reached(False), self._reached(True)
        for path, place in self.learning.items():
            if place in meant - told:
                yield path, self._walls(place)

    def _walls(self, path: str) -> list[str]:
        """The first on each way ahead that pass no gradient on."""
        seen, waiting, walls = {path}, [path], set[str]()
        while waiting:
            for after in self.ahead.get(waiting.pop(), set()) - seen:
                seen.add(after)
                if self._passes(after):
                    waiting.append(after)
                else:
                    walls.add(after)
        return sorted(walls)


def _is_level(child: Any) -> bool:
    return not isinstance(child, Block) and bool(child.nodes)


def _blocks(child: Any) -> Iterator[Block]:
    return child.iter_blocks() if isinstance(child, Block) else iter(())


def _ends(graph: ExecutableGraph[Any], prefix: str, node_id: str, port: str, direction: str) -> list[str]:
    """The blocks and remote levels behind a port of a node."""
    path, child = f"{prefix}{node_id}", graph.nodes[node_id].child
    if not _is_level(child):
        return [path]
    below = cast("ExecutableGraph[Any]", child)
    found = [_ends(below, f"{path}/", x.node_id, x.port_name, direction) for x in below.exposures(direction) if x.key == port]
    return [end for ends in found for end in ends]
