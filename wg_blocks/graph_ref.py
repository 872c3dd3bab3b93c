"""A whole graph as one block: for nested loops, and for graphs as makers."""

from __future__ import annotations

from typing import Any

from wg_core import Block, Graph
from wg_core.structure.port import Port


class GraphRef(Block):
    """Runs `graph` (a graph's configuration) as one node; its exposed ports are the block's ports.

    Raises: ConfigError for a wrong graph, PortError for an exposed port that has no name of its own.
    """

    def __init__(self, *, graph: dict[str, Any]) -> None:
        super().__init__()
        self.graph = Graph.from_config(graph)
        external = self.graph.port_index
        self.ports = [
            Port(p.name, p.direction, p.types, p.optional, p.aggregation, p.default, schema=p.schema)
            for p in (*external.inputs.values(), *external.outputs.values())
        ]

    def get_sub_blocks(self) -> dict[str, Block]:
        return {node_id: node.block for node_id, node in self.graph.nodes.items()}

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return self.graph.forward(inputs)
