"""Builders: from a checked entry to a structure, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from wg_core.assembly.loader import WORLDS, Document, checked, parse, read
from wg_core.assembly.migrate import migrated, version_problems
from wg_core.assembly.models import KINDS, ExposureEntry, LevelEntry, ModelEntry, NodeEntry, StageEntry
from wg_core.assembly.pool import ModelPool, default_pool
from wg_core.assembly.registry import BlockRegistry, default_registry
from wg_core.errors import ConfigError, NodeError, WGError, did_you_mean
from wg_core.execution.block import Block
from wg_core.execution.executable_graph import ExecutableGraph
from wg_core.execution.node import LoopSpec, Node
from wg_core.state.canonical import plain
from wg_core.structure.hyperlink import HyperLink
from wg_core.structure.topology import Edge


@dataclass(slots=True)
class Build:
    """What building needs: registry, pool, the named models, and the document for error places."""

    registry: BlockRegistry = field(default_factory=default_registry)
    pool: ModelPool = field(default_factory=default_pool)
    models: Mapping[str, ModelEntry] = field(default_factory=dict[str, ModelEntry])
    document: Document = field(default_factory=lambda: Document(None, "<config>"))
    where: tuple[str | int, ...] = ()

    def at(self, *where: str | int) -> Build:
        """The same, one step deeper in the document."""
        return Build(self.registry, self.pool, self.models, self.document, (*self.where, *where))

    def error(self, error: Exception) -> ConfigError:
        """`error` as a ConfigError that begins with file, line and path."""
        return self.document.error(self.where, str(error), getattr(error, "code", ""))


def open_document(
    path: Path | str, *, root: Path | None = None, allow_outside_root: bool = False
) -> tuple[str, Document]:
    """Read a file of any level and say its kind.

    Raises: ConfigError.
    """
    document = read(path, root=root, allow_outside_root=allow_outside_root)
    return kind_of_document(document), document


def parse_document(text: str, source: str = "<text>") -> tuple[str, Document]:
    """`open_document` for text; it may not refer to files.

    Raises: ConfigError, also where the text holds a `ref`.
    """
    document = parse(text, source)
    _refuse_refs(document, document.data, ())
    return kind_of_document(document), document


def _refuse_refs(document: Document, value: Any, where: tuple[str | int, ...]) -> None:
    if isinstance(value, dict):
        mapping = cast("dict[str, Any]", value)
        if "ref" in mapping and mapping.keys() <= {"ref", "overrides"}:
            raise document.error(
                where, "text may not refer to files; load the world from its file, or write the part out", "BAD_REF"
            )
        for key, below in mapping.items():
            if key != "content" or where not in WORLDS:
                _refuse_refs(document, below, (*where, key))
    elif isinstance(value, list):
        for i, below in enumerate(cast("list[Any]", value)):
            _refuse_refs(document, below, (*where, i))


def kind_of_document(document: Document) -> str:
    """Raises: ConfigError for a missing or unknown kind."""
    data = document.data
    if not isinstance(data, dict):
        raise document.error((), "this is not a mapping with a 'kind'")
    kind = cast("dict[str, Any]", data).get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise document.error(
            ("kind",) if kind is not None else (), f"unknown kind {kind!r}; {did_you_mean(str(kind), KINDS)}"
        )
    return kind


def checked_entry(document: Document, kind: str) -> Any:
    """The document as the entry of `kind`, older minor versions migrated. Raises: ConfigError."""
    found = kind_of_document(document)
    if found != kind:
        raise document.error(("kind",), f"this is a {found}, a {kind} is needed here")
    problem = next(version_problems(document.data, kind), None)
    if problem is not None:
        raise document.error((*problem[0], "schema_version"), problem[1], "VERSION")
    document.data = migrated(document.data, kind)
    return checked(KINDS[kind], document)


def fill_graph(graph: ExecutableGraph[Block], entries: list[NodeEntry], build: Build) -> None:
    """Build the blocks of a graph through registry and pool; errors name the file, line and node."""
    for i, entry in enumerate(entries):
        here = build.at("nodes", i)
        try:
            graph.insert_node(
                _block(graph, entry, build),
                entry.node_id,
                trainable=entry.trainable,
                defaults={**_model_defaults(entry, build), **entry.defaults},
                hints=entry.hints,
            )
            graph.nodes[entry.node_id].links = list(entry.links)
        except WGError as error:
            raise here.error(error) from error


def _model_defaults(entry: NodeEntry, build: Build) -> Mapping[str, Any]:
    model = build.models.get(entry.model or "")
    return model.defaults if model is not None else {}


def _block(graph: ExecutableGraph[Block], entry: NodeEntry, build: Build) -> Block:
    if entry.shares is not None:
        if entry.shares not in graph.nodes:
            raise NodeError(
                f"node {entry.node_id!r} shares {entry.shares!r}, which is no earlier node; {did_you_mean(entry.shares, graph.nodes)}"
            )
        return graph.nodes[entry.shares].child
    if entry.model is not None:
        return build.registry.build(_model(entry.node_id, entry.model, build), pool=build.pool)
    config = _with_models(entry.node_id, entry.config, build) if build.models else entry.config
    return build.registry.build({"block_type": entry.block_type, "config": config}, pool=build.pool)


def _model(node_id: str, name: str, build: Build) -> dict[str, Any]:
    """The block that a named model is."""
    model = build.models.get(name)
    if model is None:
        raise NodeError(f"node {node_id!r} names model {name!r}; {did_you_mean(name, build.models)}")
    return {"block_type": model.block_type, "config": model.config}


def _with_models(node_id: str, value: Any, build: Build) -> Any:
    """A block's config in which `{model: NAME}` stands for a part of the block: the named model's block."""
    if isinstance(value, dict):
        mapping = cast("dict[str, Any]", value)
        if mapping.keys() == {"model"} and isinstance(mapping["model"], str):
            return _model(node_id, mapping["model"], build)
        return {k: _with_models(node_id, v, build) for k, v in mapping.items()}
    if isinstance(value, list):
        return [_with_models(node_id, v, build) for v in cast("list[Any]", value)]
    return value


def fill_level(
    level: ExecutableGraph[Any],
    entry: LevelEntry | StageEntry,
    build: Build,
    child: Callable[[Any, Build], Any] | None = None,
) -> None:
    """Everything that all levels share: children (made by `child` of a node's entry), edges, exposed ports, links; then validation."""
    if child is not None:
        for i, node in enumerate(cast(Any, entry).nodes):
            here = build.at("nodes", i)
            below = child(node, here)
            try:
                level.insert_node(below, node.node_id, trainable=node.trainable, defaults=node.defaults)
                level.nodes[node.node_id].links = list(node.links)
            except WGError as error:
                raise here.error(error) from error
    for i, e in enumerate(entry.edges):
        try:
            level.add_edge(Edge(e.source_node, e.source_port, e.target_node, e.target_port, e.carry, e.origin))
        except WGError as error:
            raise build.at("edges", i).error(error) from error
    for key, expose in (("exposed_inputs", level.expose_input), ("exposed_outputs", level.expose_output)):
        exposures: list[ExposureEntry] = getattr(entry, key)
        for i, x in enumerate(exposures):
            try:
                expose(x.node_id, x.port_name, x.name)
            except WGError as error:
                raise build.at(key, i).error(error) from error
    level.title = entry.title
    level.metadata = dict(entry.metadata)
    level.links = list(entry.links)
    for i, hyperedge in enumerate(entry.hyperedges):
        try:
            level.add_hyperedge(hyperedge)
        except WGError as error:
            raise build.at("hyperedges", i).error(error) from error
    level.set_loops(
        LoopSpec(
            loop.loop_id,
            loop.num_steps,
            loop.until.model_dump() if loop.until else None,
            tuple(loop.order) if loop.order else None,
            loop.grad_steps,
        )
        for loop in getattr(entry, "loops", ())
    )
    result = level.validate(strict=False)
    if not result.is_valid:
        raise build.error(ConfigError(str(result)))


def node_config(node: Node[Block], first_of: dict[int, str]) -> dict[str, Any]:
    """A graph node as plain data; a block seen before is written as `shares`, unless the pool shares it by itself."""
    block = node.child
    entry: dict[str, Any] = {"node_id": node.node_id}
    first = first_of.setdefault(id(block), node.node_id)
    if first != node.node_id and block.model_ref() is None:
        entry["shares"] = first
    else:
        entry.update(block.to_config())
        if not entry["config"]:
            del entry["config"]
    if not node.trainable:
        entry["trainable"] = False
    if node.defaults:
        entry["defaults"] = plain_part(dict(node.defaults), "defaults")
    if node.hints:
        entry["hints"] = dict(node.hints)
    if node.links:
        entry["links"] = plain_links(node.links, "links")
    return entry


def plain_part(value: Any, what: str) -> Any:
    """A copy of a part of a level as a file writes it. Raises: ConfigError for what no file can hold."""
    try:
        return plain(value, what, ordered=True)
    except ConfigError as error:
        raise ConfigError(str(error), code="NOT_SERIALIZABLE") from error


def plain_links(links: Iterable[HyperLink], what: str) -> list[dict[str, Any]]:
    """Links as a file writes them. Raises: ConfigError."""
    return plain_part([link.model_dump(exclude_none=True) for link in links], what)


def level_config(level: ExecutableGraph[Any], nodes: list[dict[str, Any]]) -> dict[str, Any]:
    """What all levels write: the inverse of `fill_level`. Raises: ConfigError for what is no plain data."""

    def edge(e: Edge) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "source_node": e.source_node, "source_port": e.source_port,
            "target_node": e.target_node, "target_port": e.target_port,
        }  # fmt: skip
        if e.carry:
            entry["carry"] = True
        if e.origin != "manual":
            entry["origin"] = e.origin
        return entry

    def exposed(direction: str) -> list[dict[str, Any]]:
        return [
            {**({"name": x.name} if x.name else {}), "node_id": x.node_id, "port_name": x.port_name}
            for x in level.exposures(direction, explicit=True)
        ]

    def loop(spec: LoopSpec) -> dict[str, Any]:
        values = {
            "num_steps": spec.num_steps,
            "until": dict(spec.until) if spec.until else None,
            "order": list(spec.order or ()) or None,
            "grad_steps": spec.grad_steps,
        }
        return {"loop_id": spec.loop_id, **{k: v for k, v in values.items() if v is not None}}

    config: dict[str, Any] = {"kind": level.level, "schema_version": "1.0", "id": level.id, "nodes": nodes}
    parts: dict[str, Any] = {
        "title": level.title,
        "metadata": plain_part(level.metadata, f"{level.id}: metadata"),
        "edges": [edge(e) for e in level.edges],
        "loops": [loop(s) for s in level.loops],
        "exposed_inputs": exposed("in"),
        "exposed_outputs": exposed("out"),
        "links": plain_links(level.links, f"{level.id}: links"),
        "hyperedges": plain_part([x.model_dump(exclude_none=True) for x in level.hyperedges], f"{level.id}: hyperedges"),
    }
    return {**config, **{k: v for k, v in parts.items() if v}}
