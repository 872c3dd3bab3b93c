"""Graph: one whole task, made of blocks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

from wg_core.assembly.build import Build, fill_graph, fill_level, level_config, node_config
from wg_core.assembly.connect import Wishes
from wg_core.assembly.models import GraphEntry
from wg_core.assembly.pool import ModelPool, default_pool
from wg_core.assembly.registry import BlockRegistry, default_registry
from wg_core.assembly.roles import WeightAdapter, role_of
from wg_core.assembly.tools import check_reach, entry_options, tool_entry, tool_of
from wg_core.assembly.wiring import WiredGraph
from wg_core.errors import ConfigError, NodeError, ToolError, UnknownBlockTypeError, did_you_mean
from wg_core.execution.agent import Tool, is_agentic
from wg_core.execution.block import Block
from wg_core.execution.node import Node
from wg_core.execution.plan import iteration_order, tool_edges
from wg_core.execution.validate import Issue, ValidationResult
from wg_core.levels.level import Level

# task_kind -> the roles of which a graph of this kind has one
_EXPECTED: dict[str, tuple[str, ...]] = {
    "diffusion": ("solver",),
    "llm": ("llm", "agent"),
    "vlm": ("vlm", "llm"),
    "agent": ("agent",),
}


class Graph(Level[Block], WiredGraph):
    """A graph of blocks with typed ports; the first level that runs."""

    level = kind = "graph"

    def __init__(
        self, id: str | None = None, *, task_kind: str | None = None, metadata: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(id, metadata=metadata)
        self.task_kind = task_kind
        self.tools: dict[str, dict[str, Any]] = {}

    def add_node(
        self,
        what: str | type[Block] | Block | Node[Block] | Mapping[str, Any],
        node_id: str | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        registry: BlockRegistry | None = None,
        pool: ModelPool | None = None,
        auto_connect: bool = True,
        trainable: bool = True,
        pretrained: str | Path | Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
        hints: Mapping[str, str] | None = None,
        connect: Mapping[str, str | Sequence[str]] | None = None,
    ) -> str:
        """Add a block: a registered type (`"role/name"`), a registered class, a config mapping, a block, or a node.

        Types and mappings are built through `registry` and `pool` (default: the process-wide ones); the same model
        reference gives the same block. Returns the node id, made from the type where none is given.

        With `auto_connect` a block that has a role is joined to the others by the wiring rules, steered by `hints`
        (`branch`, `codec`) and by `connect`, which pins inputs to source nodes. `pretrained` is a checkpoint or a
        state dict. If anything fails, the graph is as before.

        Raises: NodeError, ConfigError, UnknownBlockTypeError, ToolError, StateDictError, CheckpointError.
        """
        if isinstance(what, Node):
            others = (node_id, config, registry, pool, pretrained, defaults, hints, connect)
            if not trainable or any(given is not None for given in others):
                raise NodeError(f"{self.id}: a Node is added as it is; set its own fields instead of giving arguments")
            block, node_id, trainable, defaults, hints = (
                what.child,
                what.node_id,
                what.trainable,
                what.defaults,
                what.hints,
            )
        elif isinstance(what, Block):
            if config is not None or registry is not None or pool is not None:
                raise NodeError(f"{self.id}: a ready block takes no config, registry or pool")
            block = what
        else:
            block = self._build(what, config, registry or default_registry(), default_pool() if pool is None else pool)
        if connect and not auto_connect:
            raise NodeError(
                f"{self.id}: connect pins what the wiring rules do, and auto_connect=False turns them off; use add_edge"
            )
        version = self.version
        given = node_id if node_id is not None else self._free_id(block)
        self.insert_node(block, given, trainable=trainable, defaults=defaults, hints=hints)
        try:
            if auto_connect:
                self.wire_node(given, connect)
                tools = self._tools_of(given)
            else:
                tools = {}
            if isinstance(pretrained, Mapping):
                block.load_state_dict(pretrained)
            elif pretrained is not None:
                block.load_from_checkpoint(pretrained)
        except BaseException:
            super().remove_node(given)
            self.version = version
            raise
        self.tools.update(tools)
        return given

    def _tools_of(self, node_id: str) -> dict[str, Any]:
        """New entries of the tool table: each tool node that meets an agent, under its own id."""
        role = role_of(self.nodes[node_id].child)
        if role not in ("agent", "tool"):
            return {}
        partners = {"agent": "tool", "tool": "agent"}[role]
        met = [
            n for n in self._wishes.born if role_of(self.nodes[n].child) == partners and self._wishes.pair(n, node_id)
        ]
        tools = met if role == "agent" else [node_id] * bool(met)
        known = {entry.get("node") for entry in self.tools.values()}
        return {
            t: tool_entry(self.id, t, t, self.nodes[t].child, fed=self._fed(t))
            for t in tools
            if t not in known and t not in self.tools
        }

    def add_tool(
        self,
        tool_id: str,
        node_id: str,
        *,
        description: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        result_port: str | None = None,
        timeout: float | None = None,
        roots: Sequence[str] = (),
        hosts: Sequence[str] = (),
    ) -> None:
        """Let agents of this graph call a node, under `tool_id`; `parameters` is a JSON schema of its arguments.

        By default the arguments are the inputs that the graph does not feed, the result is the only output, and the
        description is the first line of the block's. `timeout` is in seconds, for each call. Arguments with format
        `path`, `file-path` or `directory-path` lie within one of the folders `roots`, relative ones in the first; those
        with format `uri` name one of `hosts`.

        Raises: ToolError for a bad or taken id or a node that cannot be called, NodeError for an unknown node.
        """
        if tool_id in self.tools:
            raise ToolError(
                f"{self.id} has a tool {tool_id!r} already; choose another id, or remove_tool({tool_id!r}) first"
            )
        self.tools[tool_id] = tool_entry(
            self.id, tool_id, node_id, self.get_node(node_id).child,
            description=description, parameters=parameters, result_port=result_port, timeout=timeout, roots=roots,
            hosts=hosts, fed=self._fed(node_id),
        )  # fmt: skip
        self.version += 1

    def remove_tool(self, tool_id: str) -> None:
        """Take a node out of the tool table; the node stays. Raises: ToolError for an unknown id."""
        if tool_id not in self.tools:
            raise ToolError(f"{self.id} has no tool {tool_id!r}; {did_you_mean(tool_id, self.tools)}")
        del self.tools[tool_id]
        self.version += 1

    def remove_node(self, node_id: str) -> None:
        """Remove a node with its edges, exposed ports and tools."""
        super().remove_node(node_id)
        self.tools = {t: entry for t, entry in self.tools.items() if entry.get("node") != node_id}

    def rename_node(self, node_id: str, new_id: str) -> None:
        """Give a node another id; edges, exposed ports and place in the order stay."""
        super().rename_node(node_id, new_id)
        self.tools = {
            t: {**entry, "node": new_id} if entry.get("node") == node_id else entry for t, entry in self.tools.items()
        }

    def copy(self) -> Self:
        made = super().copy()
        wishes = self._wishes
        made._wishes = Wishes(dict(wishes.born), dict(wishes.asked), dict(wishes.pins))
        return made

    def resting(self) -> frozenset[str]:
        """Nodes that no plan calls: tools (the agent calls them) and adapters that live in another block's weights."""
        tools = {entry.get("node") for entry in self.tools.values()}
        used = {x.node_id for x in self.exposures("out", explicit=True)}
        return frozenset(
            n
            for n, node in self.nodes.items()
            if (n in tools and n not in used and not self.edges_out(n))
            or (not node.child.port_index.by_name and role_of(node.child) == "adapter")
        )

    def agents(self) -> dict[str, list[Tool]]:
        """The agents whose tools the graph runs, each with those that it may call.

        An agent in a graph without tools is one of them too, unless its `tool_calls` are taken care of outside.
        """
        found: dict[str, list[Tool]] = {}
        for node_id, node in self.nodes.items():
            if not is_agentic(node.child) or not (self.tools or self._unheard(node_id)):
                continue
            allowed = _allowed(node.child)
            found[node_id] = [self._tool(t) for t in self.tools if allowed is None or t in allowed]
        return found

    def _unheard(self, node_id: str) -> bool:
        ends = [(e.source_node, e.source_port) for e in self.edges_out(node_id)]
        ends += [(x.node_id, x.port_name) for x in self.exposures("out")]
        return (node_id, "tool_calls") not in ends

    def _tool(self, tool_id: str) -> Tool:
        entry = self.tools[tool_id]
        node = self.nodes[entry["node"]]
        return tool_of(tool_id, entry, node.child, node.defaults, self._fed(node.node_id))

    def _fed(self, node_id: str) -> list[str]:
        """The inputs of a node that have their value from an edge or from outside."""
        ports = [e.target_port for e in self.edges_in(node_id) if not e.carry]
        ports += [x.port_name for x in self.exposures("in", explicit=True) if x.node_id == node_id]
        return list(dict.fromkeys(ports))

    def _tool_problems(self) -> Iterator[tuple[str, str]]:
        """What is wrong with tools and agents, with the way out."""
        agents = {n: node.child for n, node in self.nodes.items() if is_agentic(node.child)}
        if self.tools and not agents:
            yield "it has tools but no agent to call them", "add an agent"
        broken = False
        for tool_id, entry in self.tools.items():
            name: Any = entry.get("node")
            try:
                options = entry_options(self.id, tool_id, entry)
                if not isinstance(name, str) or name not in self.nodes:
                    raise ToolError(f"tool {tool_id!r} is node {name!r}, which does not exist")
                fed = {*self._fed(name), *self.nodes[name].defaults}
                tool_entry(self.id, tool_id, name, self.nodes[name].child, **options, fed=fed, finished=True)
                check_reach(self.id, self._tool(tool_id), entry)
            except ToolError as error:
                broken = True
                yield str(error), "mend the tool, or drop it"
        for node_id, agent in agents.items():
            allowed = _allowed(agent) or []
            for tool_id in dict.fromkeys(allowed):
                if tool_id not in self.tools:
                    yield f"agent {node_id!r} may call {tool_id!r}, which is no tool", did_you_mean(tool_id, self.tools)
            if len(set(allowed)) != len(allowed):
                yield f"agent {node_id!r} lists a tool twice: {', '.join(allowed)}", "name each once"
        if not broken:
            yield from self._tool_cycles()

    def _tool_cycles(self) -> Iterator[tuple[str, str]]:
        """What a tool is given may not wait for the agent that calls it."""
        waits = tool_edges(self, self.agents())
        if not waits:
            return
        before = [set(c) for c in iteration_order(list(self.nodes), self.edges)]
        for members in iteration_order(list(self.nodes), [*self.edges, *waits]):
            if len(members) > 1 and set(members) not in before:
                yield f"a tool's input waits for the agent that calls it: {', '.join(members)}", "remove the tool's edge"
        for edge in waits:
            if edge.source_node == edge.target_node:
                said = f"agent {edge.source_node!r} feeds input {edge.target_port!r} of its own tool"
                yield said, "remove the edge; the agent gives values as arguments"

    def validate(
        self, strict: bool = True, *, deep: bool = False, for_training: bool = False
    ) -> ValidationResult:
        """Check the whole structure without loading or running anything; `deep` goes into children.

        Raises: ValidationError with all errors, if `strict`.
        """
        result = super().validate(strict=False, deep=deep, for_training=for_training)
        for said, way_out in self._tool_problems():
            result.issues.append(Issue("error", "AGENT_TOOLS", self.id, said, way_out))
        for node in self.nodes.values():
            if isinstance(node.child, WeightAdapter) and node.child.target not in self.nodes:
                said = f"its target {node.child.target!r} is no node; {did_you_mean(node.child.target, self.nodes)}"
                place = f"{self.id}/{node.node_id}"
                result.issues.append(Issue("error", "ADAPTER_TARGET", place, said, "add that node, or remove the adapter"))
        expected = _EXPECTED.get(self.task_kind or "")
        if expected and self.nodes and not any(role_of(block) in expected for block in self.iter_blocks()):
            said = f"a graph of task_kind {self.task_kind!r} has a block of role {' or '.join(expected)}, this one has none"
            result.issues.append(Issue("warning", "TASK_SHAPE", self.id, said, "add one, or correct task_kind"))
        if not result.is_valid:
            self._valid_stamp = None
            if strict:
                result.raise_errors()
        return result

    def _build(self, what: Any, config: Mapping[str, Any] | None, registry: BlockRegistry, pool: ModelPool) -> Block:
        if inspect.isclass(what):
            block_type = cast(type[Block], what).block_type
            if block_type is None:
                raise UnknownBlockTypeError(
                    f"class {what.__name__} is not registered; decorate it with @register_block('role/name')"
                )
            return registry.build({"block_type": block_type, "config": dict(config or {})}, pool=pool)
        if isinstance(what, str):
            return registry.build({"block_type": what, "config": dict(config or {})}, pool=pool)
        if isinstance(what, Mapping):
            if config is not None:
                raise NodeError(f"{self.id}: config is given twice, in the mapping and as an argument")
            return registry.build(cast("Mapping[str, Any]", what), pool=pool)
        raise NodeError(
            f"{self.id}: cannot add a {type(what).__name__}; give a block type, class, mapping, block or node"
        )

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
        graph.tools = {t: tool.model_dump(exclude_none=True) for t, tool in entry.tools.items()}
        fill_graph(graph, entry.nodes, build)
        fill_level(graph, entry, build)
        for lost in graph.wiring_report.skipped:
            raise build.at("edges").error(ConfigError(f"{lost.edge} is listed, but {lost.reason}; keep one of the two"))
        return graph

    def to_config(self) -> dict[str, Any]:
        first_of: dict[int, str] = {}
        nodes: list[dict[str, Any]] = []
        for node_id, node in self.nodes.items():
            try:
                nodes.append(node_config(node, first_of))
            except ConfigError as error:
                raise ConfigError(f"{self.id}/{node_id}: {error}", code=error.code) from error
        config = level_config(self, nodes)
        if self.task_kind is not None:
            config["task_kind"] = self.task_kind
        if self.tools:
            config["tools"] = dict(self.tools)
        return config


def _allowed(agent: Block) -> list[str] | None:
    """The tools that an agent may call; None for all."""
    tools: Any = getattr(agent, "tools", None)
    return list(cast("Sequence[str]", tools)) if isinstance(tools, (list, tuple)) else None
