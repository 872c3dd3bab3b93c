"""The schema of every configuration file: unknown keys are refused, JSON Schema comes from here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    field_validator,
    model_validator,
)

from wg_core.assembly.schema_rules import completed
from wg_core.errors import did_you_mean
from wg_core.execution.reach import HOST
from wg_core.structure.hyperlink import HyperEdge, HyperLink
from wg_core.structure.ids import ID_PATTERN
from wg_core.structure.port import port_types
from wg_core.structure.versions import Format

CONFIG = Format("file", "1.0")
SCHEMA_VERSION = CONFIG.current


Id = Annotated[str, Field(pattern=rf"^{ID_PATTERN}$")]
PortKey = Annotated[str, Field(pattern=rf"^{ID_PATTERN}(:[a-z][a-z0-9_]*)*$")]
EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]
Version = Annotated[str, Field(pattern=rf"^{CONFIG.current.split('.')[0]}\.[0-9]{{1,6}}$")]
Json = dict[str, JsonValue]


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 3.0 is whole."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Flag = Annotated[bool, Field(strict=True)]
Whole = Annotated[int, Field(strict=True), BeforeValidator(_whole)]
Real = Annotated[float, Field(strict=True)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", defer_build=True)  # validators are built at first use


class EdgeEntry(Strict):
    """One edge; `carry` brings the value of the previous loop iteration."""

    source_node: Id
    source_port: PortKey
    target_node: Id
    target_port: PortKey
    carry: Flag = False
    origin: Literal["manual", "auto", "hyper"] = "manual"


class ExposureEntry(Strict):
    """A child's port offered to the outside."""

    name: Id | None = None
    node_id: Id
    port_name: PortKey


class Until(Strict):
    node: Id
    port: PortKey


class LoopEntry(Strict):
    """Settings of one cycle; with `grad_steps` gradients flow back through the last so many iterations only."""

    loop_id: Id
    num_steps: Whole | None = Field(default=None, ge=1)
    until: Until | None = None
    order: list[Id] | None = None
    grad_steps: Whole | None = Field(default=None, ge=1)


class NodeEntry(Strict):
    """A block in a graph: by registered type, as one of the world's named `models`, or shared with an earlier node."""

    node_id: Id
    block_type: str | None = None
    config: Json = {}
    model: Id | None = None
    shares: Id | None = None
    trainable: Flag = True
    defaults: Json = {}
    hints: dict[str, str] = {}
    links: list[HyperLink] = []

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


class ToolEntry(Strict):
    """A node that agents of the graph may call; the id of the node alone will do.

    `parameters` is the JSON schema of its arguments where they are not simply its inputs, `timeout` in seconds. An
    argument with format `path`, `file-path` or `directory-path` lies within one of `roots`, one with format `uri` names
    one of `hosts` (`name`, `*.name` for all below it, either with `:port`).
    """

    node: Id
    description: str | None = None
    parameters: Json | None = None
    result_port: PortKey | None = None
    timeout: Real | None = Field(default=None, gt=0)
    roots: list[Annotated[str, Field(min_length=1)]] | None = None
    hosts: list[Annotated[str, Field(pattern=f"^({HOST})$")]] | None = None


class GraphEntry(LevelEntry):
    """A graph: one whole task, made of blocks."""

    kind: Literal["graph"] = "graph"
    id: Id = "graph"
    task_kind: str | None = None
    nodes: list[NodeEntry]
    loops: list[LoopEntry] = []
    tools: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")], ToolEntry] = {}

    @field_validator("tools", mode="before")
    @classmethod
    def _nodes(cls, value: Any) -> Any:
        entries = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
        if not entries:
            return cast(Any, value)
        return {k: {"node": v} if isinstance(v, str) else v for k, v in entries.items()}


class PortEntry(Strict):
    """One port of a stored contract, in the words of a spec."""

    key: PortKey
    types: list[str] = Field(min_length=1)
    required: Flag = True
    aggregation: Literal["single", "concat", "sum", "first", "dict"] = "single"
    concat: Json | None = None
    default: JsonValue = None
    streamable: Flag = False
    schema_: JsonValue = Field(default=None, alias="schema")
    doc: str = ""

    @model_validator(mode="before")
    @classmethod
    def _one_type(cls, value: Any) -> Any:
        if isinstance(value, dict):
            words = cast("dict[str, Any]", value)
            if isinstance(words.get("types"), str):
                return {**words, "types": words["types"].split("|")}
        return cast(Any, value)

    @field_validator("types")
    @classmethod
    def _known(cls, types: list[str]) -> list[str]:
        for name in types:
            if name not in port_types():
                raise ValueError(f"unknown port type {name!r}; {did_you_mean(name, port_types())}")
        return types


class ContractEntry(Strict):
    """What is stored about a level that runs elsewhere: its ports, and what decides its results.

    `config_hash` pins the configuration that the server must run, `models` the hashes of its weights, and `requests`
    holds the schema of the requests that its makers accept.
    """

    inputs: list[PortEntry]
    outputs: list[PortEntry]
    config_hash: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    models: dict[str, str | None] = {}
    requests: Json | None = None


class EndpointEntry(Strict):
    """Where a level runs and how it is reached: `url`, or `url_env`, the name of an environment variable with it.

    `token_env` names the variable with the bearer token. Times are in seconds, `max_bytes` bounds a request and an
    answer. `retries` count connection failures and the answers 502, 503 and 504; the first waits `backoff_s`, each
    other twice as long. With `allow_hosts` only these hosts are spoken to.
    """

    url: str | None = None
    url_env: EnvName | None = None
    transport: str = Field(default="http", pattern=r"^[a-z][a-z0-9_]*$")
    token_env: EnvName | None = None
    timeout_s: Real = Field(default=120.0, gt=0, le=86_400)
    connect_timeout_s: Real = Field(default=5.0, gt=0, le=600)
    retries: Whole = Field(default=2, ge=0, le=10)
    backoff_s: Real = Field(default=0.25, ge=0, le=60)
    allow_hosts: list[str] = []
    max_bytes: Whole = Field(default=256 * 1024 * 1024, ge=1024)

    @model_validator(mode="after")
    def _one_place(self) -> EndpointEntry:
        if (self.url is None) == (self.url_env is None):
            raise ValueError("an endpoint names either url or url_env")
        return self


class Placed(Strict):
    """What may run here (its configuration) or elsewhere (`endpoint` or `endpoint_url`, with a `contract`)."""

    endpoint: EndpointEntry | None = None
    endpoint_url: str | None = None
    contract: ContractEntry | None = None

    @model_validator(mode="after")
    def _one_endpoint(self) -> Self:
        if self.endpoint is not None and self.endpoint_url is not None:
            raise ValueError("endpoint_url is short for endpoint: {url: ...}; give one of them")
        if self.contract is not None and self.place() is None:
            raise ValueError("a contract is stored for what runs elsewhere; add its endpoint")
        return self

    def place(self) -> EndpointEntry | None:
        """The endpoint, whichever way it is written."""
        return EndpointEntry(url=self.endpoint_url) if self.endpoint_url is not None else self.endpoint


class RemoteEntry(Placed):
    """A level that runs elsewhere."""

    kind: Literal["remote"] = "remote"
    schema_version: Version = SCHEMA_VERSION
    id: Id = "remote"
    title: str | None = None
    metadata: Json = {}

    @model_validator(mode="after")
    def _a_place(self) -> RemoteEntry:
        if self.place() is None:
            raise ValueError("endpoint is missing: give endpoint: {url: ...} or endpoint_url")
        return self


def _here_or_there(entry: Any, word: str) -> None:
    if (entry.config is None) == (entry.place() is None):
        raise ValueError(f"a node has either a {word} as its config, or an endpoint with a contract")


class GraphNodeEntry(Placed):
    """A graph in a pipeline, here or behind an endpoint."""

    node_id: Id
    config: GraphEntry | None = None
    trainable: Flag = True
    defaults: Json = {}
    links: list[HyperLink] = []

    @model_validator(mode="after")
    def _one_child(self) -> GraphNodeEntry:
        _here_or_there(self, "graph")
        return self


class PipelineEntry(LevelEntry):
    """A pipeline: graphs joined by their external ports."""

    kind: Literal["pipeline"] = "pipeline"
    id: Id = "pipeline"
    nodes: list[GraphNodeEntry]


class PipelineNodeEntry(Placed):
    """A pipeline in a stage, here or behind an endpoint."""

    node_id: Id
    config: PipelineEntry | None = None
    trainable: Flag = True
    defaults: Json = {}
    links: list[HyperLink] = []

    @model_validator(mode="after")
    def _one_child(self) -> PipelineNodeEntry:
        _here_or_there(self, "pipeline")
        return self


class ConditionEntry(Strict):
    """What a stage asks of the state beyond its contract: blocks or fields of them that are filled, or empty."""

    filled: list[str] = []
    empty: list[str] = []


class StageEntry(Placed):
    """A stage: pipelines under a contract over state, or an endpoint where they run.

    `inputs` maps a pipeline input to `world`, `action`, `schema` or a block (`descriptions`, `descriptions.items`);
    `outputs` maps a block (or a field of it) to a pipeline output. Give one `graph`, or `nodes` with `edges`. With
    `execution_condition` the stage runs less often than its reads and writes say, never more often.
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
    execution_condition: ConditionEntry | None = None
    graph: GraphEntry | None = None
    nodes: list[PipelineNodeEntry] | None = None
    edges: list[EdgeEntry] = []
    exposed_inputs: list[ExposureEntry] = []
    exposed_outputs: list[ExposureEntry] = []
    links: list[HyperLink] = []
    hyperedges: list[HyperEdge] = []

    @model_validator(mode="after")
    def _one_form(self) -> StageEntry:
        if (self.graph is not None) + (self.nodes is not None) + (self.place() is not None) != 1:
            raise ValueError("a stage has one of 'graph', 'nodes' and 'endpoint'")
        if self.place() is not None and (self.edges or self.exposed_inputs or self.exposed_outputs):
            raise ValueError("edges and exposed ports belong to 'nodes'; what runs behind an endpoint has its own")
        if self.place() is not None and (self.inputs or self.outputs):
            raise ValueError("inputs and outputs are mapped where the stage runs, not beside its endpoint")
        if self.graph is not None and (self.edges or self.exposed_inputs or self.exposed_outputs):
            raise ValueError("edges and exposed ports belong to 'nodes'; a single 'graph' has its own")
        return self


class WorldStageEntry(StageEntry):
    """A stage at its place in a world."""

    trainable: Flag = True


class ModelEntry(Strict):
    """A model that stages name as `model: NAME`."""

    block_type: str
    config: Json = {}
    defaults: Json = {}


class StorageEntry(Strict):
    """Where snapshots are kept; by default under the engine's home folder."""

    root: str | None = None


class BudgetEntry(Strict):
    """What a step may ask of models at most; `tokens` are those read and written, `cost` is in the unit of the prices."""

    calls: Whole | None = Field(default=None, ge=0)
    tokens: Whole | None = Field(default=None, ge=0)
    cost: Real | None = Field(default=None, ge=0, allow_inf_nan=False)


class AdapterSetEntry(Strict):
    """Adapters of one style: what they are, and the blocks that they work on.

    `targets` are globs over paths (`author/*`), or `stage:GLOB` and `role:GLOB`; `modules` globs over the layers of a
    block. With `per_stage` a model that several stages use has an adapter for each of them, else one for all.
    """

    block_type: str = "adapter/lora"
    rank: Whole = Field(default=8, ge=1)
    alpha: Real | None = None
    dropout: Real = Field(default=0.0, ge=0, lt=1)
    modules: list[str] = Field(default=["all-linear"], min_length=1)
    targets: list[str] = Field(default=["*"], min_length=1)
    per_stage: Flag = False
    init_seed: Whole = 0


class AdaptersEntry(Strict):
    """The adapter sets of a world. `folder` holds what they learned, `active` names those that work (by default all)."""

    folder: str | None = None
    active: list[Id] | None = None
    sets: dict[Id, AdapterSetEntry] = Field(min_length=1)

    @model_validator(mode="after")
    def _known_sets(self) -> AdaptersEntry:
        for name in self.active or ():
            if name not in self.sets:
                raise ValueError(f"active names the set {name!r}; {did_you_mean(name, self.sets)}")
        return self


class BaseEntry(Strict):
    """The frozen world that a LoRA world stands on; `config_hash` pins what it was when the adapters learned."""

    world: WorldEntry
    config_hash: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")


UPDATE = "world_update"
CANONICAL = ("philosopher", "author", "world_update", "development", "architect", "creator")


class ExecutionEntry(Strict):
    """How a world runs.

    A `cycle` of one's own names every stage once, and `world_update` where the state is to become true (at most once).
    `state_schema` adds fields to the blocks of the state: `{block: {field: JSON Schema}}`. A LoRA world has a `base`
    and `adapters` in place of cycle, models, stages and state schema, which are those of its base.
    """

    cycle: Literal["canonical"] | list[Id] = "canonical"
    models: dict[Id, ModelEntry] = {}
    stages: dict[Id, WorldStageEntry] = {}
    state_schema: dict[str, dict[str, Json]] = {}
    base: BaseEntry | None = None
    adapters: AdaptersEntry | None = None
    storage: StorageEntry = StorageEntry()
    seed: Whole | None = None
    budget: BudgetEntry = BudgetEntry()

    @model_validator(mode="after")
    def _own_or_of_base(self) -> ExecutionEntry:
        if (self.base is None) != (self.adapters is None):
            raise ValueError("a LoRA world has both a 'base' and 'adapters'; another world has neither")
        given = [key for key in ("cycle", "models", "stages", "state_schema") if key in self.model_fields_set]
        if self.base is not None and given:
            raise ValueError(f"a LoRA world runs the stages of its base; leave out {', '.join(given)}")
        if self.base is None and "stages" not in given:
            raise ValueError("key 'stages' is missing")
        return self

    @field_validator("stages")
    @classmethod
    def _known_stages(cls, stages: dict[str, WorldStageEntry], info: ValidationInfo) -> dict[str, WorldStageEntry]:
        canonical = [role for role in CANONICAL if role != UPDATE]
        for name in stages:
            if name == UPDATE:
                raise ValueError("world_update is built in and has no entry of its own")
            if info.data.get("cycle") == "canonical" and name not in canonical:
                raise ValueError(f"the canonical cycle has no stage {name!r}; {did_you_mean(name, canonical)}")
        return stages


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
    """A world file that is only read: content without execution.

    `content` is written out as in a world file, or is the `{root: sha256}` of a frozen world, whose parts lie in
    `blobs/` beside the file.
    """

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
    "remote": RemoteEntry,
    "world": WorldEntry,
    "end_world": EndWorldEntry,
}


def schema_of(kind: str) -> dict[str, Any]:
    """The JSON Schema of a kind of file."""
    return completed(KINDS[kind].model_json_schema(by_alias=True), [role for role in CANONICAL if role != UPDATE])
