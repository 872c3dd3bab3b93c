"""Pipeline: whole graphs joined by their external ports, without cycles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, cast

from wg_core.assembly.build import Build, fill_level, level_config
from wg_core.assembly.models import PipelineEntry
from wg_core.execution.executable_graph import Node
from wg_core.levels.graph import Graph
from wg_core.levels.level import Child, Level


class Nested(Level[Child]):
    """A level whose children are levels."""

    allow_cycles = False

    def stamp(self) -> Any:
        return (self.version, *(cast("Level[Any]", n.child).stamp() for n in self.nodes.values()))

    def to_config(self) -> dict[str, Any]:
        return level_config(self, [_node_config(cast("Node[Level[Any]]", n)) for n in self.nodes.values()])


def _node_config(node: Node[Level[Any]]) -> dict[str, Any]:
    entry: dict[str, Any] = {"node_id": node.node_id, "config": node.child.to_config()}
    if not node.trainable:
        entry["trainable"] = False
    if node.defaults:
        entry["defaults"] = dict(node.defaults)
    return entry


class Pipeline(Nested[Graph]):
    """A directed acyclic graph of graphs."""

    level = kind = "pipeline"

    def add_graph(
        self,
        graph: Graph | Mapping[str, Any] | str | Path,
        node_id: str | None = None,
        *,
        trainable: bool = True,
        defaults: Mapping[str, Any] | None = None,
    ) -> str:
        """Add a graph, its config or its file; the id defaults to the graph's own.

        Raises: NodeError for a taken id, ConfigError.
        """
        if isinstance(graph, (str, Path)):
            graph = Graph.from_yaml(graph)
        elif not isinstance(graph, Graph):
            graph = Graph.from_config(graph)
        return self.insert_node(graph, node_id or graph.id, trainable=trainable, defaults=defaults)

    add_node = add_graph

    @classmethod
    def from_graph(cls, graph: Graph) -> Self:
        """A pipeline of one graph, with the graph's own contract."""
        pipeline = cls(graph.id)
        pipeline.add_graph(graph)
        return pipeline

    @classmethod
    def from_entry(cls, entry: PipelineEntry, build: Build) -> Self:
        pipeline = cls(entry.id)
        fill_level(pipeline, entry, build, Graph.from_entry)
        return pipeline
