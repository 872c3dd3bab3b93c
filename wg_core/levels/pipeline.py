"""Pipeline: whole graphs joined by their external ports, without cycles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, cast

from wg_core.assembly.build import Build, fill_level, level_config, plain_links, plain_part
from wg_core.assembly.models import PipelineEntry
from wg_core.execution.node import Node
from wg_core.levels.graph import Graph
from wg_core.levels.level import Child, Level
from wg_core.levels.remote import Remote, remote_child


class Nested(Level[Child]):
    """A level whose children are levels."""

    allow_cycles = False

    def stamp(self) -> Any:
        return (self.version, *(cast("Level[Any]", n.child).stamp() for n in self.nodes.values()))

    def to_config(self) -> dict[str, Any]:
        return level_config(self, [_node_config(cast("Node[Level[Any]]", n)) for n in self.nodes.values()])

    def hashed(self) -> dict[str, Any]:
        nodes = [_node_config(cast("Node[Level[Any]]", n), hashed=True) for n in self.nodes.values()]
        return level_config(self, nodes)

    def parts(self) -> Iterator[tuple[tuple[str | int, ...], Any]]:
        for i, node in enumerate(self.nodes.values()):
            yield ("nodes", i, "config"), node.child

    def remotes(self) -> Iterator[Remote]:
        for node in self.nodes.values():
            yield from cast("Level[Any]", node.child).remotes()


def _node_config(node: Node[Level[Any]], *, hashed: bool = False) -> dict[str, Any]:
    child = node.child
    entry: dict[str, Any] = {"node_id": node.node_id}
    if hashed:
        entry["config"] = child.config_hash
    elif isinstance(child, Remote):
        entry.update(child.placed_config())
    else:
        entry["config"] = child.to_config()
    if not node.trainable:
        entry["trainable"] = False
    if node.defaults:
        entry["defaults"] = plain_part(dict(node.defaults), f"node {node.node_id!r}: defaults")
    if node.links:
        entry["links"] = plain_links(node.links, f"node {node.node_id!r}: links")
    return entry


def here_or_there(build_here: Callable[[Any, Build], Any]) -> Callable[[Any, Build], Any]:
    """How a node's entry becomes its child: built here, or the proxy of what runs elsewhere."""

    def child(entry: Any, build: Build) -> Any:
        if entry.config is None:
            return remote_child(entry.node_id, entry, build)
        return build_here(entry.config, build.at("config"))

    return child


class Pipeline(Nested[Graph | Remote]):
    """A directed acyclic graph of graphs, each here or behind an endpoint."""

    level = kind = "pipeline"

    def add_graph(
        self,
        graph: Graph | Remote | Mapping[str, Any] | str | Path,
        node_id: str | None = None,
        *,
        trainable: bool = True,
        defaults: Mapping[str, Any] | None = None,
    ) -> str:
        """Add a graph, the proxy of a remote one, its config or its file; the id defaults to its own.

        Raises: NodeError for a taken id, ConfigError.
        """
        if isinstance(graph, (str, Path)):
            graph = Graph.from_yaml(graph)
        elif not isinstance(graph, (Graph, Remote)):
            far = "endpoint" in graph or "endpoint_url" in graph
            graph = Remote.from_config({"id": node_id or "remote", **graph}) if far else Graph.from_config(graph)
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
        fill_level(pipeline, entry, build, here_or_there(Graph.from_entry))
        return pipeline
