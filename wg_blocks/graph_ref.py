"""A whole graph or pipeline as one block: for nested loops, as makers, and as tools of agents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wg_core import Block, Graph, Pipeline
from wg_core.structure.port import Port


class _Ref(Block):
    """Runs a level as one node; its exposed ports are the block's ports."""

    def _take(self, level: Graph | Pipeline) -> None:
        external = level.port_index
        self.ports = [
            Port(
                p.name, p.direction, p.types, p.optional, p.aggregation, p.default,
                schema=p.schema, streamable=p.streamable, description=p.description, agg_dim=p.agg_dim, agg_sep=p.agg_sep,
            )
            for p in (*external.inputs.values(), *external.outputs.values())
        ]  # fmt: skip
        self.level = level

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return self.level.forward(inputs)


class GraphRef(_Ref):
    """Runs `graph` (a graph's configuration) as one node; its exposed ports are the block's ports.

    Raises: ConfigError for a wrong graph, PortError for an exposed port that has no name of its own.
    """

    def __init__(self, *, graph: dict[str, Any], build: Any = None) -> None:
        super().__init__()
        self.graph = Graph.from_config(graph, **_source(build))
        self._take(self.graph)

    def get_sub_blocks(self) -> dict[str, Block]:
        return {node_id: node.block for node_id, node in self.graph.nodes.items()}


class PipelineRef(_Ref):
    """Runs `pipeline` (a pipeline's configuration) as one node; its exposed ports are the block's ports.

    Raises: ConfigError for a wrong pipeline, PortError for an exposed port that has no name of its own.
    """

    def __init__(self, *, pipeline: dict[str, Any], build: Any = None) -> None:
        super().__init__()
        self.pipeline = Pipeline.from_config(pipeline, **_source(build))
        self._take(self.pipeline)
        self._parts = {node_id: _Part(node.child.nodes) for node_id, node in self.pipeline.nodes.items()}

    def get_sub_blocks(self) -> dict[str, Block]:
        return dict(self._parts)


class _Part(Block):
    """The blocks of one graph of a pipeline, for whoever walks through all blocks."""

    def __init__(self, nodes: Mapping[str, Any]) -> None:
        super().__init__()
        self._nodes = nodes

    def get_sub_blocks(self) -> dict[str, Block]:
        return {node_id: node.child for node_id, node in self._nodes.items() if isinstance(node.child, Block)}

    def model_ref(self) -> None:
        return None


def _source(build: Any) -> dict[str, Any]:
    """The registry and pool that the block itself comes from."""
    return {} if build is None else {"registry": build.registry, "pool": build.pool}
