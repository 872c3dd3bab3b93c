"""Graph: one whole task, made of blocks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Self, cast

from wg_core.assembly.build import Build, fill_graph, fill_level, level_config, node_config
from wg_core.assembly.models import GraphEntry
from wg_core.assembly.pool import ModelPool, default_pool
from wg_core.assembly.registry import BlockRegistry, default_registry
from wg_core.errors import NodeError, UnknownBlockTypeError
from wg_core.execution.block import Block
from wg_core.execution.executable_graph import Node
from wg_core.levels.level import Level


class Graph(Level[Block]):
    """A graph of blocks with typed ports; the first level that runs."""

    level = kind = "graph"

    def __init__(self, id: str | None = None, *, task_kind: str | None = None, metadata: Mapping[str, Any] | None = None) -> None:
        super().__init__(id, metadata=metadata)
        self.task_kind = task_kind
        self.tools: dict[str, Any] = {}

    def add_node(
        self,
        what: str | type[Block] | Block | Node[Block] | Mapping[str, Any],
        node_id: str | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        registry: BlockRegistry | None = None,
        pool: ModelPool | None = None,
        trainable: bool = True,
        defaults: Mapping[str, Any] | None = None,
        hints: Mapping[str, str] | None = None,
    ) -> str:
        """Add a block: a registered type (`"role/name"`), a registered class, a config mapping, a block, or a node.

        Types and mappings are built through `registry` and `pool` (default: the process-wide ones); the same model
        reference gives the same block. Returns the node id, made from the type where none is given.

        Raises: NodeError, ConfigError, UnknownBlockTypeError.
        """
        if isinstance(what, Node):
            if config or registry or pool or defaults or hints or node_id or not trainable:
                raise NodeError(f"{self.id}: a Node is added as it is; set its own fields instead of giving arguments")
            return self.insert_node(
                what.child, what.node_id, trainable=what.trainable, defaults=what.defaults, hints=what.hints
            )
        if isinstance(what, Block):
            if config is not None or registry is not None or pool is not None:
                raise NodeError(f"{self.id}: a ready block takes no config, registry or pool")
            block = what
        else:
            block = self._build(what, config, registry or default_registry(), pool or default_pool())
        given = node_id if node_id is not None else self._free_id(block)
        return self.insert_node(block, given, trainable=trainable, defaults=defaults, hints=hints)

    def _build(self, what: Any, config: Mapping[str, Any] | None, registry: BlockRegistry, pool: ModelPool) -> Block:
        if inspect.isclass(what):
            block_type = cast(type[Block], what).block_type
            if block_type is None:
                raise UnknownBlockTypeError(f"class {what.__name__} is not registered; decorate it with @register_block('role/name')")
            return registry.build({"block_type": block_type, "config": dict(config or {})}, pool=pool)
        if isinstance(what, str):
            return registry.build({"block_type": what, "config": dict(config or {})}, pool=pool)
        if isinstance(what, Mapping):
            if config is not None:
                raise NodeError(f"{self.id}: config is given twice, in the mapping and as an argument")
            return registry.build(cast("Mapping[str, Any]", what), pool=pool)
        raise NodeError(f"{self.id}: cannot add a {type(what).__name__}; give a block type, class, mapping, block or node")

    def _free_id(self, block: Block) -> str:
        base = (block.block_type or type(block).__name__.lower()).replace("/", "_")
        n = 0
        while f"{base}_{n}" in self.nodes:
            n += 1
        return f"{base}_{n}"

    def add(self, node_id: str, block_type: str, **config: Any) -> str:
        """`add_node(block_type, node_id, config=config)` in two words."""
        return self.add_node(block_type, node_id, config=config)

    @classmethod
    def from_entry(cls, entry: GraphEntry, build: Build) -> Self:
        graph = cls(entry.id, task_kind=entry.task_kind, metadata=entry.metadata)
        graph.tools = dict(entry.tools)
        fill_graph(graph, entry.nodes, build)
        fill_level(graph, entry, build)
        return graph

    def to_config(self) -> dict[str, Any]:
        first_of: dict[int, str] = {}
        config = level_config(self, [node_config(node, first_of) for node in self.nodes.values()])
        if self.task_kind is not None:
            config["task_kind"] = self.task_kind
        if self.tools:
            config["tools"] = dict(self.tools)
        return config
