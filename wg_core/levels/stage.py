"""Stage: pipelines under a contract over the state."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, cast

from wg_core.assembly.build import Build, fill_level
from wg_core.assembly.models import StageEntry
from wg_core.errors import ConfigError, OutputContractError, PortValueError, UnexpectedInputError, did_you_mean
from wg_core.execution.context import FRAME, Event, RunOptions
from wg_core.execution.drive import Session, Stepping, drive
from wg_core.execution.node import Spec
from wg_core.execution.validate import Issue, ValidationResult
from wg_core.levels.graph import Graph
from wg_core.levels.pipeline import Nested, Pipeline, here_or_there
from wg_core.levels.remote import Remote
from wg_core.state.state import BLOCKS, State, block_name
from wg_core.structure.port import Port
from wg_core.weights.profiling import Asked, profiled

SOURCES = ("world", "action", "schema")

# role -> (reads, writes): which blocks a stage of the canonical cycle needs and makes
CONTRACTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "philosopher": (BLOCKS[:3], BLOCKS[3:4]),
    "author": (BLOCKS[:4], BLOCKS[4:]),
    "world_update": (BLOCKS, ()),
    "development": ((), BLOCKS[:1]),
    "architect": (BLOCKS[:1], BLOCKS[1:2]),
    "creator": (BLOCKS[1:2], BLOCKS[2:3]),
}


@dataclass(frozen=True, slots=True)
class StageResult:
    """What a stage did: the state after it, whether it ran and why not, seconds, model use, and what was captured."""

    state: State
    ran: bool
    reason: str = ""
    seconds: float = 0.0
    usage: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, dict[str, float]])
    captured: Mapping[str, Any] = field(default_factory=dict[str, Any])
    events: Sequence[Event] = ()


Condition = Mapping[str, Sequence[str]]


def _kind(place: str) -> str:
    """The type of what a mapping names; empty for a field, whose type the schema of its block says."""
    return {"world": "world", "action": "text"}.get(place) or ("" if "." in place else "dict")


def why_not(state: State, reads: Sequence[str], writes: Sequence[str], condition: Condition | None = None) -> str:
    """Why a stage with this contract does not run on `state`; empty where it runs.

    A stage runs when all it reads is filled and nothing it writes is; a condition asks for more. Raises: ConfigError
    for a condition on an unknown field.
    """
    filled = state.filled_names()
    for block in reads:
        if block not in filled:
            return f"block {BLOCKS.index(block) + 1} ({block}) is empty"
    for block in writes:
        if block in filled:
            return f"block {BLOCKS.index(block) + 1} ({block}) is already filled"
    for wanted, paths in (condition or {}).items():
        for path in paths:
            holds = path in filled if path in BLOCKS else state.read(path) not in (None, "", [], {})
            if holds != (wanted == "filled"):
                return f"execution_condition: {path} is {'filled' if holds else 'empty'}"
    return ""


def _checked(id: str, condition: Condition | None) -> dict[str, list[str]]:
    """The parts of a condition that say something. Raises: ConfigError."""
    for wanted, paths in (condition or {}).items():
        if wanted not in ("filled", "empty"):
            known = did_you_mean(wanted, ("filled", "empty"))
            raise ConfigError(f"stage {id!r}: execution_condition has no part {wanted!r}; {known}")
        for path in paths:
            try:
                block_name(path.partition(".")[0])
            except ConfigError as error:
                raise ConfigError(f"stage {id!r}: execution_condition.{wanted}: {error}") from error
    return {wanted: list(paths) for wanted, paths in (condition or {}).items() if paths}


class Stage(Nested[Pipeline | Remote]):
    """A directed acyclic graph of pipelines, and which blocks of the state it reads and writes.

    `inputs` maps a pipeline input to `world`, `action`, `schema` (the JSON schema of what is to be written) or a
    block or field of it (`descriptions.items`); `outputs` maps a block or field to a pipeline output. What is not
    mapped is matched by equal names. `execution_condition` (`{filled: [paths], empty: [paths]}`) asks more of the state
    before the stage runs than that what it reads is filled and what it writes is not.
    """

    level = kind = "stage"
    is_walk = False

    def __init__(
        self,
        id: str,
        *,
        role: str | None = None,
        reads: Sequence[str | int] | None = None,
        writes: Sequence[str | int] | None = None,
        inputs: Mapping[str, str] | None = None,
        outputs: Mapping[str, str] | None = None,
        execution_condition: Condition | None = None,
    ) -> None:
        super().__init__(id)
        self.role = role or id
        default_reads, default_writes = CONTRACTS.get(self.role, ((), ()))
        self.reads = tuple(block_name(b) for b in reads) if reads is not None else default_reads
        self.writes = tuple(block_name(b) for b in writes) if writes is not None else default_writes
        if not self.writes:
            raise ConfigError(f"stage {id!r} of role {self.role!r} writes nothing; name its blocks with writes=[...]")
        self.execution_condition = _checked(id, execution_condition)
        self._mapped: tuple[Any, dict[str, str], dict[str, str]] | None = None
        self._given_inputs = dict(inputs or {})
        self._given_outputs = dict(outputs or {})

    def why_not(self, state: State) -> str:
        """Why the stage does not run on `state`; empty where it runs."""
        return why_not(state, self.reads, self.writes, self.execution_condition)

    def add_pipeline(self, pipeline: Pipeline | Graph | Remote, node_id: str | None = None, **more: Any) -> str:
        """Add a pipeline (or a graph, as a pipeline of one), or the proxy of a remote one; the id defaults to its own."""
        if isinstance(pipeline, Graph):
            pipeline = Pipeline.from_graph(pipeline)
        return self.insert_node(pipeline, node_id or pipeline.id, **more)

    add_node = add_pipeline

    # ---- mapping between state and ports -----------------------------------------------------------------------------

    def input_mapping(self) -> dict[str, str]:
        """Pipeline input -> source. Raises: ConfigError for unknown names and where equal names are ambiguous."""
        specs = {s["key"]: s for s in super().get_input_spec()}
        for key, source in self._given_inputs.items():
            if key not in specs:
                raise ConfigError(
                    f"stage {self.id!r}: inputs maps {key!r}, which no pipeline takes; {did_you_mean(key, specs)}"
                )
            block = source.split(".", 1)[0]
            if source not in SOURCES and block not in self.reads:
                known = [*SOURCES, *self.reads]
                raise ConfigError(
                    f"stage {self.id!r}: input {key!r} comes from {source!r}; {did_you_mean(block, known)}"
                )
        mapping = dict(self._given_inputs)
        for key, spec in specs.items():
            if key not in mapping:
                if key in (*SOURCES, *self.reads):
                    mapping[key] = key
                elif spec["required"]:
                    raise ConfigError(
                        f"stage {self.id!r}: required pipeline input {key!r} has no source; map it: inputs: {{{key}: BLOCK}}, "
                        f"from {', '.join((*SOURCES, *self.reads))}"
                    )
        return mapping

    def output_mapping(self) -> dict[str, str]:
        """Block or field -> pipeline output. Raises: ConfigError."""
        keys = [s["key"] for s in super().get_output_spec()]
        for target, key in self._given_outputs.items():
            if target.split(".", 1)[0] not in self.writes:
                raise ConfigError(f"stage {self.id!r}: outputs fills {target!r}; {did_you_mean(target, self.writes)}")
            if key not in keys:
                raise ConfigError(f"stage {self.id!r}: output {target!r} comes from {key!r}; {did_you_mean(key, keys)}")
        parts = sorted(target.split(".") for target in self._given_outputs)
        for one, next_one in pairwise(parts):
            if next_one[: len(one)] == one:
                raise ConfigError(
                    f"stage {self.id!r}: outputs fills {'.'.join(one)!r} as a whole and {'.'.join(next_one)!r} within it; "
                    "map one of the two"
                )
        mapping = dict(self._given_outputs)
        for block in self.writes:
            if not any(t.split(".", 1)[0] == block for t in mapping):
                if block not in keys:
                    raise ConfigError(
                        f"stage {self.id!r} writes {block!r} but no pipeline output has this name; "
                        f"map it: outputs: {{{block}: OUTPUT}}; {did_you_mean(block, keys)}"
                    )
                mapping[block] = block
        return mapping

    def mapping_issues(self) -> Iterator[Issue]:
        """What is wrong with the mapping: names, and types where a whole block or a source meets a port."""
        try:
            sources, targets = self.input_mapping(), self.output_mapping()
        except ConfigError as error:
            yield Issue("error", "MAPPING", self.id, str(error), "")
            return
        takes = {s["key"]: Port("x", "in", s["types"]) for s in super().get_input_spec()}
        gives = {s["key"]: Port("x", "out", s["types"]) for s in super().get_output_spec()}
        pairs = [(key, source, Port("x", "out", kind), takes[key]) for key, source in sources.items() if (kind := _kind(source))]
        pairs += [(key, target, gives[key], Port("x", "in", kind)) for target, key in targets.items() if (kind := _kind(target))]
        for key, place, out, into in pairs:
            if not out.compatible_with(into):
                said = f"{key!r} is mapped to {place!r}, but {'|'.join(into.types)!r} is taken and {'|'.join(out.types)!r} given"
                yield Issue("error", "TYPE_MISMATCH", self.id, said, "map another port, or a field of the block", port=key)

    def validate(
        self, strict: bool = True, *, deep: bool = False, for_training: bool = False
    ) -> ValidationResult:
        """Check the whole structure and its mapping to the state without loading or running anything.

        Raises: ValidationError with all errors, if `strict`.
        """
        result = super().validate(strict=False, deep=deep, for_training=for_training)
        result.issues += self.mapping_issues() if self.nodes else ()
        if not result.is_valid:
            self._valid_stamp = None
            if strict:
                result.raise_errors()
        return result

    def _mappings(self) -> tuple[dict[str, str], dict[str, str]]:
        """Both mappings, found once until something below changes."""
        stamp = self.stamp()
        if self._mapped is None or self._mapped[0] != stamp:
            self._mapped = (stamp, self.input_mapping(), self.output_mapping())
        return self._mapped[1], self._mapped[2]

    # ---- running -----------------------------------------------------------------------------------------------------

    def step(
        self,
        state: State,
        *,
        world: Any = None,
        action: str | None = None,
        schema: Mapping[str, Any] | None = None,
        events: bool = False,
        **options: Any,
    ) -> StageResult:
        """Run on `state` if the contract says so, else hand it on unchanged with the reason.

        `world` is a read-only view of the content; with `events` the result has all events of the run. A dry run hands
        the state on as it is. Raises: OutputContractError if a declared block stays empty.
        """
        heard = listen(options) if events else []
        stepping, modes, chosen = self.stepping(state, {"world": world, "action": action, "schema": schema}, options)
        with modes:
            return replace(drive(self, stepping, chosen.dry_run), events=heard)

    def stepping(
        self, state: State, sources: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[Stepping[StageResult], AbstractContextManager[Any], RunOptions]:
        """`step` as a session for a driver, the modes that its blocks run in, and its options."""
        reason = self.why_not(state)
        if reason:
            return at_once(StageResult(state, False, reason)), nullcontext(), self._chosen(options)
        ledger, options = ledger_of(options)
        session, modes, chosen = super()._opened(self._given(state, sources), options)

        def whole() -> Stepping[StageResult]:
            before = rows_of(ledger)
            started = time.perf_counter()
            outputs = yield from session
            seconds = time.perf_counter() - started
            captured = {key: outputs[key] for key in chosen.capture if key in outputs}
            after = state if chosen.dry_run else self._written(state, outputs)  # placeholders are no blocks
            return StageResult(after, True, "", seconds, usage_since(ledger, before), captured)

        return whole(), modes, chosen

    def _given(self, state: State, sources: Mapping[str, Any]) -> dict[str, Any]:
        """What the pipelines are given."""
        inputs: dict[str, Any] = {}
        for key, source in self._mappings()[0].items():
            value = sources.get(source) if source in SOURCES else state.read(source)
            if value is not None:
                inputs[key] = value
        return inputs

    def _written(self, state: State, outputs: Mapping[str, Any]) -> State:
        """The state with what the pipelines made. Raises: OutputContractError if a declared block stays empty."""
        for block, value in self._collect(outputs).items():
            state = state.put(block, value)
        empty = [b for b in self.writes if b not in state.filled_names()]
        if empty:
            raise OutputContractError(
                f"stage {self.id!r} ran but left {', '.join(empty)} empty; it declares writes {list(self.writes)}"
            )
        return state

    def _opened(
        self, inputs: Mapping[Any, Any] | None, options: Mapping[str, Any]
    ) -> tuple[Session, AbstractContextManager[Any], RunOptions]:
        """The pipelines' session between the two mappings; pieces of a stream are keyed by pipeline output."""
        stepping, modes, chosen = self.stepping(*_state_of(inputs), options)

        def whole() -> Session:
            return _common((yield from stepping))

        return whole(), modes, chosen

    def _collect(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        blocks: dict[str, Any] = {}
        for target, key in self._mappings()[1].items():
            block, _, path = target.partition(".")
            if key not in outputs:
                continue
            if not path:
                blocks[block] = outputs[key]
                continue
            at = blocks.setdefault(block, {})
            *parents, last = path.split(".")
            for part in parents:
                at = at.setdefault(part, {})
            at[last] = outputs[key]
        return blocks

    def run(self, inputs: Mapping[Any, Any] | None = None, *, profile: Asked = None, **options: Any) -> dict[str, Any]:
        """The common contract: `{"state", "world"?, "action"?, "schema"?}` in, `{"state"}` out; `profile` as at any level."""
        state, sources = _state_of(inputs)
        with profiled(profile, self.id, options) as chosen:
            return _common(self.step(state, **sources, **chosen))

    def dry_run(self, inputs: Mapping[Any, Any] | None = None, **options: Any) -> dict[str, Any]:
        """Check the mapping and walk the pipelines with placeholders; gives the written blocks' placeholders."""
        self.input_mapping()
        given = super().dry_run(inputs, **options)
        return {target: given[key] for target, key in self.output_mapping().items()}

    def get_input_spec(self) -> list[Spec]:
        """The inputs of the stage itself: the state, and what its pipelines map beside it."""
        mapped = set(self.input_mapping().values())
        beside = [
            _entry(k, t, False) for k, t in (("world", "world"), ("action", "text"), ("schema", "dict")) if k in mapped
        ]
        return [_entry("state", "dict", False), *beside]

    def get_output_spec(self) -> list[Spec]:
        return [_entry("state", "dict", True)]

    # ---- configuration -----------------------------------------------------------------------------------------------

    @classmethod
    def from_entry(cls, entry: StageEntry, build: Build) -> Stage:
        if entry.place() is not None:
            from wg_core.levels.remote_stage import RemoteStage

            return RemoteStage.of_entry(entry, build)
        try:
            stage = cls(
                entry.id or entry.role or "stage", role=entry.role, reads=entry.reads, writes=entry.writes,
                inputs=entry.inputs, outputs=entry.outputs, execution_condition=condition_of(entry),
            )  # fmt: skip
        except ConfigError as error:
            raise build.error(error) from error
        if entry.graph is not None:
            stage.add_pipeline(Graph.from_entry(entry.graph, build.at("graph")))
        fill_level(stage, entry, build, here_or_there(Pipeline.from_entry) if entry.nodes is not None else None)
        return stage

    def hashed(self) -> dict[str, Any]:
        return {**super().hashed(), **self.mapping_config()}

    def mapping_config(self) -> dict[str, Any]:
        """The contract over the state, as a file writes it."""
        contract = CONTRACTS.get(self.role)
        parts: dict[str, Any] = {
            "role": self.role,
            "reads": list(self.reads) if contract is None or contract[0] != self.reads else None,
            "writes": list(self.writes) if contract is None or contract[1] != self.writes else None,
            "inputs": self._given_inputs,
            "outputs": self._given_outputs,
            "execution_condition": self.execution_condition,
        }
        return {k: v for k, v in parts.items() if v}

    def to_config(self) -> dict[str, Any]:
        config = {**super().to_config(), **self.mapping_config()}
        lone = self._lone_graph()
        if lone is not None:
            del config["nodes"]
            config["graph"] = lone.to_config()
        return config

    def _lone_graph(self) -> Graph | None:
        if len(self.nodes) != 1:
            return None
        ((node_id, node),) = self.nodes.items()
        pipeline = node.child
        if isinstance(pipeline, Remote) or len(pipeline.nodes) != 1:
            return None
        ((graph_id, inner),) = pipeline.nodes.items()
        if isinstance(inner.child, Remote):
            return None
        plain = (
            not (node.defaults or inner.defaults or self.edges or pipeline.edges) and node.trainable and inner.trainable
        )
        plain = plain and not (node.links or inner.links or pipeline.links or pipeline.hyperedges or self.hyperedges)
        plain = plain and not (pipeline.title or pipeline.metadata)
        plain = plain and not any(
            level.exposures(d, explicit=True) for level in (cast("Nested[Any]", self), pipeline) for d in ("in", "out")
        )
        return inner.child if plain and node_id == graph_id == inner.child.id == pipeline.id else None


def condition_of(entry: StageEntry) -> Condition | None:
    """The condition that a file gives a stage."""
    return entry.execution_condition.model_dump() if entry.execution_condition is not None else None


def _state_of(inputs: Mapping[Any, Any] | None) -> tuple[State, dict[str, Any]]:
    """The state in the inputs of a stage, and what is beside it. Raises: UnexpectedInputError, PortValueError."""
    given = dict(inputs or {})
    state = given.pop("state", None) or State()
    for key in given:
        if key not in SOURCES:
            raise UnexpectedInputError(f"a stage has no input {key!r}; {did_you_mean(str(key), ('state', *SOURCES))}")
    try:
        return state if isinstance(state, State) else State.from_json(state), given
    except ConfigError as error:
        raise PortValueError(str(error)) from error


def _entry(key: str, type_name: str, required: bool) -> Spec:
    return {
        "key": key, "name": key, "node_id": "", "port_name": key, "bindings": [], "types": [type_name], "required": required,
        "optional": not required, "aggregation": "single", "streamable": False, "schema": None, "doc": "",
    }  # fmt: skip


def _common(result: StageResult) -> dict[str, Any]:
    """A result as the common contract has it."""
    return {"state": result.state, **result.captured}


def at_once(result: StageResult) -> Stepping[StageResult]:
    """A session without any call."""
    yield from ()
    return result


def listen(options: dict[str, Any]) -> list[Event]:
    """The list that all events of a run with these options come to."""
    heard: list[Event] = []
    options["callbacks"] = (*options.get("callbacks", ()), heard.append)
    return heard


Ledger = dict[str, dict[str, float]]


def ledger_of(options: Mapping[str, Any]) -> tuple[Ledger, Mapping[str, Any]]:
    """Where a run with these options keeps its model use: with the run that goes on here, else of its own; and options."""
    frame = FRAME.get()
    if frame is not None and not options:
        return frame.usage, options
    own: Ledger | None = options.get("usage")
    ledger = {} if own is None else own
    return ledger, {**options, "usage": ledger}


def rows_of(ledger: Ledger) -> Ledger:
    """A copy of a ledger of model use."""
    return {m: dict(row) for m, row in ledger.items()}


def usage_since(ledger: Ledger, before: Ledger) -> Ledger:
    """Model use that a ledger holds and `before`, a copy of it, does not."""
    rows = {m: {k: v - before.get(m, {}).get(k, 0) for k, v in row.items()} for m, row in ledger.items()}
    return {m: row for m, row in rows.items() if any(row.values())}
