"""The one container that runs: validation, plan, drivers. Graph, pipeline and stage are lines over it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Protocol, Self, cast

from wg_core.errors import MissingInputError, NodeError, UnexpectedInputError, did_you_mean
from wg_core.execution.agent import AgentLoop, Tool
from wg_core.execution.block import Block
from wg_core.execution.container import Container
from wg_core.execution.context import FRAME, Frame, Hook, RunOptions, options_for
from wg_core.execution.drawing import draw, kind_of_child, plan_data
from wg_core.execution.drive import (
    Chunk,
    Held,
    Session,
    Step,
    Steps,
    drive,
    drive_async,
    drive_batched,
    drive_steps,
    drive_stream,
    held,
    in_time,
    together,
)
from wg_core.execution.modes import modes
from wg_core.execution.node import Child, Node, Spec
from wg_core.execution.plan import Call, Loop, LoopStart, Placeholder, Plan, compile_plan, copy_defaults
from wg_core.execution.tensors import map_tensors
from wg_core.execution.validate import ValidationResult, validate_structure
from wg_core.execution.walk import walk
from wg_core.structure.port import UNSET

_NO_OPTIONS = RunOptions()


class Executable(Protocol):
    """What every level is: callable by name, inspectable, with blocks inside. Callers never ask which level it is."""

    def get_input_spec(self) -> list[Spec]: ...
    def get_output_spec(self) -> list[Spec]: ...
    def run(self, inputs: Mapping[Any, Any] | None = None, **options: Any) -> dict[str, Any]: ...
    def validate(
        self, strict: bool = True, *, deep: bool = False, for_training: bool = False
    ) -> ValidationResult: ...
    def plan(self) -> Plan: ...
    def iter_blocks(self) -> Iterator[Block]: ...


class ExecutableGraph(Container[Child]):
    """A directed graph of children with typed ports that runs as a whole."""

    is_walk: ClassVar[bool] = True  # whether a run is the walk over its plan and nothing else

    def __init__(self, id: str | None = None, *, metadata: Mapping[str, Any] | None = None) -> None:
        super().__init__(id, metadata=metadata)
        self.hooks: list[Hook] = []
        self._plan: Plan | None = None
        self._valid_stamp: Any = None

    # ---- override points -------------------------------------------------------------------------------------------

    def call_of(self, node: Node[Child]) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """What runs a node's child, called with its inputs."""
        child = cast("Block | ExecutableGraph[Any]", node.child)
        return child.forward

    def agents(self) -> Mapping[str, Sequence[Tool]]:
        """The agents that run with their tools, each with those that it may call."""
        return {}

    def agent_call(self, op: Call, tools: Sequence[Tool], calls: Mapping[str, Call]) -> AgentLoop:
        """What the plan calls for an agent; `calls` are those of the tools, by node."""
        return AgentLoop(self, op, tools, calls)

    # ---- validation and plan ---------------------------------------------------------------------------------------

    def validate(
        self, strict: bool = True, *, deep: bool = False, for_training: bool = False
    ) -> ValidationResult:
        """Check the whole structure without loading or running anything; `deep` goes into children.

        `for_training` also says which parameters get no gradient. Raises: ValidationError with all errors, if `strict`.
        """
        result = validate_structure(self, deep=deep, for_training=for_training)
        if result.is_valid:
            self._valid_stamp = self.stamp()
        elif strict:
            result.raise_errors()
        return result

    def plan(self) -> Plan:
        """The compiled plan, cached for as long as the structure stays.

        Raises: ValidationError.
        """
        stamp = self.stamp()
        if self._plan is None or self._plan.stamp != stamp:
            if self._valid_stamp != stamp:
                self.validate()
            self._plan = compile_plan(self, stamp)
        return self._plan

    def describe(self) -> str:
        """The plan as text: one line a step, loops indented."""
        lines = [f"{self.level} {self.id}"]
        loop: Loop | None = None
        for op in self.plan().program:
            if isinstance(op, LoopStart):
                loop = op.loop
                steps = loop.num_steps if loop.num_steps is not None else "1 unless the run says otherwise"
                lines.append(f"  loop {loop.loop_id} x {steps} (from {loop.steps_from})")
                lines += [f"    carry {edge}" for edge in loop.carry_edges]
            elif isinstance(op, Call):
                indent = "    " if loop and op.node_id in loop.nodes else "  "
                lines.append(f"{indent}{op.node_id}: {kind_of_child(self.nodes[op.node_id].child)}")
                if isinstance(op.call, AgentLoop):
                    lines += [f"{indent}  may call {t}: {kind_of_child(n.child)}" for t, n in op.call.tools().items()]
        return "\n".join(lines)

    def plan_data(self, num_loop_steps: int | Mapping[str, int] | None = None) -> dict[str, Any]:
        """The plan as JSON values, nested levels within: `{level, id, inputs, outputs, steps}`.

        A step is `{node, kind, plan?, tools?}`, or a loop: `{loop, num_steps, steps_from, iterations, carry: [{edge, seed}],
        until?, steps}`, where `seed` lists what iteration 0 reads instead, in order of preference.

        Raises: ValidationError.
        """
        return plan_data(self, num_loop_steps)

    def to_mermaid(self) -> str:
        """This level as a Mermaid flowchart: nested levels as subgraphs, carry edges dashed."""
        return draw(self).mermaid()

    def to_dot(self) -> str:
        """This level as a Graphviz digraph: nested levels as clusters, carry edges dashed."""
        return draw(self).dot()

    # ---- running ---------------------------------------------------------------------------------------------------

    def run(self, inputs: Mapping[Any, Any] | None = None, **options: Any) -> dict[str, Any]:
        """Run the whole structure: exposed inputs in, exposed outputs out.

        Inputs are keyed by exposed key, `node:port` or `(node, port)`. Options are those of `RunOptions`
        (`num_loop_steps`, `seed`, `training`, `dry_run`, `callbacks`, `capture`, ...).

        Raises: ValidationError, MissingInputError, UnexpectedInputError, NodeExecutionError, AbortRun,
        RunTimeoutError.
        """
        if not options and FRAME.get() is not None:
            return self.forward(dict(inputs or {}))
        return self._execute(inputs or {}, self._chosen(options), None)

    def _chosen(self, options: Mapping[str, Any]) -> RunOptions:
        if self.resolvers is not None:
            options = {"resolvers": self.resolvers, **options}
        if not options:
            return _NO_OPTIONS
        try:
            return RunOptions(**options)
        except TypeError as error:
            raise UnexpectedInputError(
                f"{self.id}.run: {error}; options are {', '.join(RunOptions.__slots__)}"
            ) from None

    def run_batch(self, batch: Iterable[Mapping[Any, Any]], **options: Any) -> list[dict[str, Any]]:
        """`run` for each of several inputs, in order; all get the same options.

        Where a block below computes calls of several runs together (`Block.batch_forward`), the runs go side by side.

        Raises: what `run` raises, with a note that names the item.
        """
        items = list(batch)
        if len(items) > 1 and self._side_by_side(options):
            plan, chosen = self.plan(), self._chosen(options)
            with self._modes(plan, chosen):
                return together([drive_batched(self, self._session(plan, i, chosen, None)) for i in items])
        results: list[dict[str, Any]] = []
        for i, inputs in enumerate(items):
            try:
                results.append(self.run(inputs, **options))
            except Exception as error:
                error.add_note(f"in item {i} of the batch")
                raise
        return results

    def _side_by_side(self, options: Mapping[str, Any]) -> bool:
        chosen = self._chosen(options)
        plain = self.is_walk and FRAME.get() is None and not (chosen.training or chosen.dry_run)
        return plain and any(block.batches for block in self.plan().blocks)

    async def run_async(self, inputs: Mapping[Any, Any] | None = None, **options: Any) -> dict[str, Any]:
        """`run` in an event loop: where a block's `forward` returns an awaitable it is awaited, on all levels.

        Other blocks run inline. `timeout` and `cancel` also end a block that waits.

        Raises: what `run` raises; CancelledError if the task is cancelled.
        """
        session, modes, chosen = self._opened(inputs, options)
        return await in_time(
            lambda scope: Held(drive_async(self, session, chosen.dry_run, scope), lambda: modes),
            chosen.timeout,
            chosen.cancel,
        )

    def stream(self, inputs: Mapping[Any, Any] | None = None, **options: Any) -> Generator[Chunk, None, None]:
        """`run` as an iterator of chunks: pieces of exposed streamable outputs, at last a final one with the result.

        A block gives pieces through `stream_forward`. It runs only while a chunk is asked for, so it is never ahead of
        its consumer; `close()` on the iterator stops the run. Inside a loop there are pieces in each iteration.

        Raises: what `run` raises, where a chunk is asked for.
        """
        session, modes, chosen = self._opened(inputs, options)

        def chunks() -> Generator[Chunk, None, None]:
            result = yield from drive_stream(self, session, chosen.dry_run)
            yield Chunk(result, self.id, final=True)

        return held(chunks(), lambda: modes)

    def steps(self, inputs: Mapping[Any, Any] | None = None, **options: Any) -> Steps[Step]:
        """`run` with a pause before each node, nodes of nested levels too: an iterator of `Step`.

        Going on runs the node; `close()` stops the run; when the iterator ends, `.result` holds the outputs.

        Raises: what `run` raises, where the next step is asked for.
        """
        session, modes, chosen = self._opened(inputs, options)
        return Steps(held(drive_steps(self, session, chosen.dry_run), lambda: modes))

    def dry_run(self, inputs: Mapping[Any, Any] | None = None, **options: Any) -> dict[str, Any]:
        """Walk the plan with typed placeholders: same order and checks, nothing computed."""
        given = dict(inputs or {})
        for entry in ExecutableGraph.get_input_spec(self):
            if entry["required"]:
                given.setdefault(entry["key"], Placeholder(tuple(entry["types"]), f"{self.id}.{entry['key']}"))
        return ExecutableGraph.run(self, given, dry_run=True, **options)

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Run as a child of what is running now, with its options."""
        parent = FRAME.get()
        if parent is None:
            return self.run(inputs)
        return self._execute(inputs, options_for(parent.options, parent.node_id), parent)

    def _opened(
        self, inputs: Mapping[Any, Any] | None, options: Mapping[str, Any]
    ) -> tuple[Session, AbstractContextManager[Any], RunOptions]:
        """A session to drive, the modes that its blocks run in, and its options; as a child where a run goes on."""
        parent = FRAME.get() if not options else None
        chosen = self._chosen(options) if parent is None else options_for(parent.options, parent.node_id)
        plan, plain = self.plan(), parent is not None or chosen.dry_run
        modes = nullcontext() if plain else self._modes(plan, chosen)
        return self._session(plan, inputs or {}, chosen, parent), modes, chosen

    def _execute(self, inputs: Mapping[Any, Any], options: RunOptions, parent: Frame | None) -> dict[str, Any]:
        plan = self.plan()
        session = self._session(plan, inputs, options, parent)
        if parent is not None or options.dry_run:
            return drive(self, session, options.dry_run)
        with self._modes(plan, options):
            return drive(self, session, False)

    def _modes(self, plan: Plan, options: RunOptions) -> AbstractContextManager[None]:
        return modes(plan.blocks, _trained_blocks(self) if options.training else None)

    def _session(
        self, plan: Plan, inputs: Mapping[Any, Any], options: RunOptions, parent: Frame | None
    ) -> Session:
        """The walk with all around it, for a driver: yields `(call, inputs)`, is sent outputs, gives the result.

        The frame of the calls is the current one while the session waits for outputs.
        """
        values = self._bind(plan, inputs)
        root = parent is None and not options.dry_run
        if root and options.device is not None:
            self.to(options.device)
            values = map_tensors(values, lambda tensor: tensor.to(options.device))
        frame = Frame(self.level, self.id, options, parent, tuple(self.hooks))
        frame.plan = plan
        around = FRAME.get()
        FRAME.set(frame)
        try:
            if frame.hooks:
                frame.emit("run_start")
            yield from walk(plan, values, frame)
            if self.stamp() != plan.stamp:
                raise NodeError(f"{self.id} was changed while it ran; change structures between runs")
            result = {
                key: values[slot] for key, slot, optional in plan.outputs if not optional or values[slot] is not UNSET
            }
            if frame.hooks:
                frame.emit("run_end", outputs=result)
            return {**result, **self._captured(frame)} if root and options.capture else result
        finally:
            if FRAME.get() is frame:
                FRAME.set(around)

    def session_below(self, op: Call, inputs: dict[str, Any]) -> tuple[ExecutableGraph[Any], Session] | None:
        """The level in the called node with a session for it, under the running frame; None for a block.

        For an agent with tools it is this level itself, with the session of the agent's turns.
        """
        if isinstance(op.call, AgentLoop):
            return self, op.call.session(inputs)
        node = self.nodes[op.node_id]
        child = node.child
        if not isinstance(child, ExecutableGraph):
            return None
        level = cast("ExecutableGraph[Any]", child)
        frame = cast(Frame, FRAME.get())
        return level, level._session(level.plan(), inputs, self.options_below(node, frame), frame)

    def options_below(self, node: Node[Child], frame: Frame) -> RunOptions:
        """The options of a level in `node`."""
        return options_for(frame.options, node.node_id)

    def stream_of(self, node: Node[Child]) -> Callable[[dict[str, Any]], Generator[dict[str, Any], None, dict[str, Any]]]:
        """What gives the pieces of a block's outputs."""
        return cast(Block, node.child).stream_forward

    def batch_of(self, node: Node[Child]) -> tuple[Block, Callable[[dict[str, Any]], Generator[Any, Any, dict[str, Any]]]]:
        """A block that computes calls of several runs together, and what gives its requests."""
        block = cast(Block, node.child)
        return block, block.batch_forward

    def _captured(self, frame: Frame) -> dict[str, Any]:
        missing = [key for key in frame.options.capture if key not in frame.captured]
        if missing:
            raise UnexpectedInputError(
                f"{self.id}: nothing to capture at {missing[0]!r}; {did_you_mean(missing[0], frame.captured)}"
            )
        return {key: frame.captured[key] for key in frame.options.capture}

    def _bind(self, plan: Plan, inputs: Mapping[Any, Any]) -> list[Any]:
        values = plan.initial.copy()
        for key, value in inputs.items():
            slot = plan.inputs.get(key)
            if slot is None:
                slot = plan.inputs.get(self._key(key))
                if slot is None:
                    raise UnexpectedInputError(f"{self.id} has no input {key!r}; {did_you_mean(str(key), plan.inputs)}")
            values[slot] = value
        missing = [key for key, slot in plan.required if values[slot] is UNSET]
        if missing:
            given = ", ".join(repr(k) for k in inputs) or "nothing"
            raise MissingInputError(f"{self.id} needs {', '.join(map(repr, missing))}; given: {given}")
        if plan.copied:
            copy_defaults(plan, values)
        return values

    def _key(self, key: Any) -> str:
        """The exposed key that a `(node, port)` or `node:port` address means."""
        address = tuple(cast("tuple[str, ...]", key)) if isinstance(key, tuple) else tuple(str(key).split(":", 1))
        for x in self.exposures("in"):
            if (x.node_id, x.port_name) == address:
                return x.key
        return ":".join(map(str, address))

    # ---- everything below ------------------------------------------------------------------------------------------

    def to(self, device: Any = None, dtype: Any = None) -> Self:
        """Move every block once to a device, or to another float type."""
        for block in self.iter_blocks():
            block.to(device, dtype)
        return self


def _trained_blocks(graph: ExecutableGraph[Any]) -> Iterator[Block]:
    for node in graph.nodes.values():
        if node.trainable:
            child = node.child
            if isinstance(child, ExecutableGraph):
                yield from _trained_blocks(cast("ExecutableGraph[Any]", child))
            else:
                yield from cast(Block, child).iter_blocks()
