"""The schema of every configuration file: unknown keys are refused, JSON Schema comes from here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

from wg_core.structure.hyperlink import HyperEdge, HyperLink
from wg_core.structure.ids import ID_PATTERN

SCHEMA_VERSION = "1.0"


def _supported(version: str) -> str:
    major, _, minor = version.partition(".")
    if not (major.isdigit() and minor.isdigit()):
        raise ValueError(f"schema_version is 'major.minor', not {version!r}")
    if int(major) != int(SCHEMA_VERSION.split(".")[0]):
        raise ValueError(f"this file has schema version {version}, this engine reads {SCHEMA_VERSION}")
    return version


Id = Annotated[str, Field(pattern=rf"^{ID_PATTERN}$")]
PortKey = Annotated[str, Field(pattern=rf"^{ID_PATTERN}(:[a-z][a-z0-9_]*)*$")]
Version = Annotated[str, AfterValidator(_supported)]
Json = dict[str, JsonValue]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class EdgeEntry(Strict):
    """One edge; `carry` brings the value of the previous loop iteration."""

    source_node: Id
    source_port: PortKey
    target_node: Id
    target_port: PortKey
    carry: bool = False
    origin: Literal["manual", "auto"] = "manual"


class ExposureEntry(Strict):
    """A child's port offered to the outside."""

    name: Id | None = None
    node_id: Id
    port_name: PortKey


class Until(Strict):
    node: Id
    port: PortKey


class LoopEntry(Strict):
    """Settings of one cycle."""

    loop_id: Id
    num_steps: int | None = Field(default=None, ge=1)
    until: Until | None = None
    order: list[Id] | None = None


class NodeEntry(Strict):
    """A block in a graph: by registered type, as one of the world's named `models`, or shared with an earlier node."""

    node_id: Id
    block_type: str | None = None
    config: Json = {}
    model: Id | None = None
    shares: Id | None = None
    trainable: bool = True
    defaults: Json = {}
    hints: dict[str, str] = {}

    @model_validator(mode="after")
    def _one_source(self) -> NodeEntry:
        given = [n for n in ("block_type", "model", "shares") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError("a node names exactly one of block_type, model and shares")
        if self.config and self.block_type is None:
            raise ValueError(f"config belongs to block_type; what {given[0]!r} names has its own")
        return self


class LevelEntry(Strict):
    """What graph, pipeline and stage files have in common."""

    schema_version: Version = SCHEMA_VERSION
    title: str | None = None
    metadata: Json = {}
    edges: list[EdgeEntry] = []
    exposed_inputs: list[ExposureEntry] = []
    exposed_outputs: list[ExposureEntry] = []
    links: list[HyperLink] = []
    hyperedges: list[HyperEdge] = []


class GraphEntry(LevelEntry):
    """A graph: one whole task, made of blocks."""

    kind: Literal["graph"] = "graph"
    id: Id = "graph"
    task_kind: str | None = None
    nodes: list[NodeEntry]
    loops: list[LoopEntry] = []
    tools: Json = {}


class GraphNodeEntry(Strict):
    """A graph in a pipeline."""

    node_id: Id
    config: GraphEntry
    trainable: bool = True
    defaults: Json = {}


class PipelineEntry(LevelEntry):
    """A pipeline: graphs joined by their external ports."""

    kind: Literal["pipeline"] = "pipeline"
    id: Id = "pipeline"
    nodes: list[GraphNodeEntry]


class PipelineNodeEntry(Strict):
    """A pipeline in a stage."""

    node_id: Id
    config: PipelineEntry
    trainable: bool = True
    defaults: Json = {}


class StageEntry(Strict):
    """A stage: pipelines under a contract over state.

    `inputs` maps a pipeline input to `world`, `action`, `schema` or a block (`descriptions`, `descriptions.items`);
    `outputs` maps a block (or a field of it) to a pipeline output. Give one `graph`, or `nodes` with `edges`.
    """

    kind: Literal["stage"] = "stage"
    schema_version: Version = SCHEMA_VERSION
    id: Id | None = None
    role: str | None = None
    title: str | None = None
    metadata: Json = {}
    reads: list[str] | None = None
    writes: list[str] | None = None
    inputs: dict[PortKey, str] = {}
    outputs: dict[str, PortKey] = {}
    graph: GraphEntry | None = None
    nodes: list[PipelineNodeEntry] | None = None
    edges: list[EdgeEntry] = []
    exposed_inputs: list[ExposureEntry] = []
    exposed_outputs: list[ExposureEntry] = []
    links: list[HyperLink] = []
    hyperedges: list[HyperEdge] = []

    @model_validator(mode="after")
    def _one_form(self) -> StageEntry:
        if (self.graph is None) == (self.nodes is None):
            raise ValueError("a stage has either one 'graph' or 'nodes'")
        if self.graph is not None and (self.edges or self.exposed_inputs or self.exposed_outputs):
            raise ValueError("edges and exposed ports belong to 'nodes'; a single 'graph' has its own")
        return self


class ModelEntry(Strict):
    """A model that stages name as `model: NAME`."""

    block_type: str
    config: Json = {}
    defaults: Json = {}


class StorageEntry(Strict):
    """Where snapshots are kept; by default under the engine's home folder."""

    root: str | None = None


class ExecutionEntry(Strict):
    """How a world runs."""

    cycle: Literal["canonical"] = "canonical"
    models: dict[Id, ModelEntry] = {}
    stages: dict[Literal["philosopher", "author", "development", "architect", "creator"], StageEntry]
    storage: StorageEntry = StorageEntry()
    seed: int | None = None


class WorldEntry(Strict):
    """A world file: `execution` says how it runs, `content` what is in it."""

    schema_: str | None = Field(default=None, alias="$schema")
    kind: Literal["world"] = "world"
    schema_version: Version = SCHEMA_VERSION
    world_id: Id
    title: str | None = None
    tags: list[str] = []
    execution: ExecutionEntry
    content: Json = {}


class EndWorldEntry(Strict):
    """A world file that is only read: content without execution."""

    schema_: str | None = Field(default=None, alias="$schema")
    kind: Literal["end_world"] = "end_world"
    schema_version: Version = SCHEMA_VERSION
    world_id: Id
    title: str | None = None
    tags: list[str] = []
    content: Json


KINDS: dict[str, type[Strict]] = {
    "graph": GraphEntry,
    "pipeline": PipelineEntry,
    "stage": StageEntry,
    "world": WorldEntry,
    "end_world": EndWorldEntry,
}


def schema_of(kind: str) -> dict[str, Any]:
    """The JSON Schema of a kind of file."""
    return KINDS[kind].model_json_schema(by_alias=True)
