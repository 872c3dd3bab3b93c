"""The agent loop: the agent's forward, the tools that it calls, their results, and again until it answers.

A graph with agents runs each of them as one node of its plan. What that node calls is an `AgentLoop`: a session like
that of a level, so every driver runs the agent's turns and its tools as it runs any other node.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from wg_core.errors import (
    AbortRun,
    AgentStepLimitError,
    BudgetExceededError,
    NodeExecutionError,
    OutputContractError,
    PortValueError,
    ReplayError,
    RunTimeoutError,
    ToolError,
    WGError,
)
from wg_core.execution.block import Block, check_kinds, check_outputs
from wg_core.execution.context import FRAME, Frame, check_stop
from wg_core.execution.drive import Result, Session, drive
from wg_core.execution.plan import Call
from wg_core.execution.reach import Reach
from wg_core.execution.together import Beside, side_by_side
from wg_core.structure.port import UNSET, Port

if TYPE_CHECKING:
    from wg_core.execution.executable_graph import ExecutableGraph

AGENT_STEPS = 10
TOOL_ERRORS = ("result", "raise")
MEDIA = frozenset({"image", "audio", "video", "ref"})
_MAX_ERROR = 1000


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """What an agent is told about a tool; `parameters` is the JSON schema of its arguments."""

    id: str
    description: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that an agent may call: what the agent is told, the node, its output that is the result.

    Inputs in `fed` have their value from the graph, the others from the call. `timeout` is in seconds: what is
    asynchronous is cancelled then, what is not is found late when it returns. `reach` is what arguments may name.
    """

    spec: ToolSpec
    node_id: str
    result: str
    fed: tuple[str, ...] = ()
    timeout: float | None = None
    reach: Reach | None = None


def is_agentic(block: Any) -> bool:
    """Whether a block is an agent: marked so, with an optional input `tool_results` and output `tool_calls`."""
    if not isinstance(block, Block) or not block.agentic:
        return False
    ports = block.port_index
    ends = (ports.inputs.get("tool_results"), ports.outputs.get("tool_calls"))
    return all(port is not None and port.optional for port in ends)


@dataclass(frozen=True, slots=True)
class _Failed:
    """What stands for the outputs of a call that raised."""

    error: Exception


class _Pending:
    """The outputs of an asynchronous call that are still to come."""

    __slots__ = ("_body", "_timeout")

    def __init__(self, body: Any, timeout: float | None) -> None:
        self._body = body
        self._timeout = timeout

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._outputs().__await__()

    async def _outputs(self) -> Any:
        import asyncio

        try:
            async with asyncio.timeout(self._timeout):
                return await self._body
        except Exception as error:
            return _Failed(error)

    def close(self) -> None:
        if inspect.iscoroutine(self._body):
            self._body.close()


def _guarded(call: Callable[[dict[str, Any]], Any], timeout: float | None = None) -> Callable[[dict[str, Any]], Any]:
    """`call`, giving what it raises instead of raising it: a session goes on after outputs, not after an error."""

    def guard(inputs: dict[str, Any]) -> Any:
        try:
            outputs = call(inputs)
        except Exception as error:
            return _Failed(error)
        return outputs if outputs.__class__ is dict or not inspect.isawaitable(outputs) else _Pending(outputs, timeout)

    return guard


@dataclass(slots=True)
class _Use:
    """A tool with the call of its node and what the node is given where the agent says nothing."""

    tool: Tool
    op: Call
    defaults: dict[str, Any] = field(default_factory=dict[str, Any])
    narrowed: Any = None  # the block's own word on its arguments, if it has one
    validator: Any = None

    def told(self, given: Mapping[str, Any]) -> ToolSpec:
        """What this run's agent is told: the block may narrow its arguments by what the graph feeds it."""
        fed = self.fed(given)
        if not callable(self.narrowed) or not set(self.tool.fed) <= fed.keys():
            return self.tool.spec
        parameters = self.narrowed(self.tool.spec.parameters, fed)
        return replace(self.tool.spec, parameters=cast("Mapping[str, Any]", parameters))

    def fed(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs that the graph gives, by port."""
        prefix = f"{self.tool.node_id}."
        return {k.removeprefix(prefix): v for k, v in given.items() if k.startswith(prefix)}

    def inputs(self, arguments: Any, given: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
        """The node's inputs in a call. Raises: ToolError for arguments that the tool does not take."""
        spec = self.tool.spec
        if not isinstance(arguments, Mapping):
            raise ToolError(f"arguments of {spec.id!r} are an object, not {type(arguments).__name__}")
        chosen = dict(cast("Mapping[str, Any]", arguments))
        wrong = self._problems(chosen)
        if wrong:
            takes = ", ".join(spec.parameters.get("properties", {})) or "nothing"
            raise ToolError(f"bad arguments for {spec.id!r}: {'; '.join(wrong)}; it takes {takes}")
        if self.tool.reach is not None:
            chosen = self.tool.reach.confined(chosen)
        ports = self.op.ports.inputs
        inputs = self.fed(given)
        inputs |= {k: copy.deepcopy(v) for k, v in self.defaults.items() if k not in chosen and k not in inputs}
        inputs |= {k: _referred(ports[k], v, results) for k, v in chosen.items()}
        missing = [name for name, port in ports.items() if port.required and name not in inputs]
        if missing:
            raise ToolError(f"{spec.id!r} needs {', '.join(map(repr, missing))}; given: {', '.join(inputs) or 'nothing'}")
        return inputs

    def _problems(self, arguments: Mapping[str, Any]) -> list[str]:
        if self.validator is None:
            from jsonschema import Draft202012Validator

            self.validator = Draft202012Validator(dict(self.tool.spec.parameters))
        wrong = islice(self.validator.iter_errors(arguments), 4)
        return [f"{e.json_path[2:] or 'all'}: {e.message[:200]}" for e in wrong]


def _referred(port: Port, value: Any, results: Mapping[str, Any]) -> Any:
    """An argument as the port takes it: media are named by the id of the call that made them."""
    kinds = set(port.types)
    if not isinstance(value, str) or not kinds & MEDIA or kinds & {"text", "any"}:
        return value
    if value in results:
        return results[value]
    if "ref" in kinds:
        return value
    raise ToolError(
        f"{port.name} is {'|'.join(port.types)} and {value!r} names no result; "
        f"give the call_id of one: {', '.join(results) or 'there are none yet'}"
    )


class AgentLoop:
    """What the plan calls for an agent: its turns and the tools in between, as one node.

    Values for tools that come from the graph arrive among the inputs, as `node.port`.
    """

    __slots__ = ("block", "graph", "op", "uses")

    def __init__(self, graph: ExecutableGraph[Any], op: Call, tools: Sequence[Tool], calls: Mapping[str, Call]) -> None:
        self.graph = graph
        self.block = graph.nodes[op.node_id].child
        self.op = Call(op.node_id, _guarded(op.call), op.ports)
        self.uses: dict[str, _Use] = {}
        for tool in tools:
            call = calls[tool.node_id]
            node = graph.nodes[tool.node_id]
            values = {n: node.defaults.get(n, p.default) for n, p in call.ports.inputs.items() if n not in tool.fed}
            guarded = Call(tool.node_id, _guarded(call.call, tool.timeout), call.ports)
            narrowed = getattr(node.child, "narrowed", None) if tool.fed else None
            self.uses[tool.spec.id] = _Use(tool, guarded, {n: v for n, v in values.items() if v is not UNSET}, narrowed)

    def tools(self) -> dict[str, Any]:
        """The nodes that the agent may call, by tool id."""
        return {tool_id: self.graph.nodes[use.op.node_id] for tool_id, use in self.uses.items()}

    def __call__(self, inputs: dict[str, Any]) -> Result:
        return drive(self.graph, self.session(inputs), dry=False)

    def session(self, inputs: dict[str, Any]) -> Session:
        """The turns of one run, for a driver; gives the agent's outputs once it calls no tool.

        The graph's metadata may bound a run in time (`max_agent_seconds`, looked at between turns), and let the calls of
        one turn run side by side, so many at once (`parallel_tools`); else they run in their order.

        Raises: AgentStepLimitError, OutputContractError for calls of a wrong form, what the agent raises, and with
        `tool_errors="raise"` what a tool raises.
        """
        frame = cast(Frame, FRAME.get())
        own = {k: v for k, v in inputs.items() if "." not in k}
        if frame.options.dry_run:
            return cast(Result, (yield self.op, own))
        turns = _whole_number("max_agent_steps", self._option(frame, "max_agent_steps", AGENT_STEPS), frame)
        at_once = _whole_number("parallel_tools", self.graph.metadata.get("parallel_tools", 1), frame)
        seconds = self.graph.metadata.get("max_agent_seconds")
        due = None if seconds is None else time.monotonic() + seconds
        bind = getattr(self.block, "bind_tools", None)
        if callable(bind):
            bind([use.told(inputs) for use in self.uses.values()])
        agent, before = self.op.node_id, frame.turn
        run = _Run(self, inputs, frame, before, self._option(frame, "tool_errors", "result") == "raise")
        calls: list[dict[str, Any]] = []
        limit = f"{turns} steps"
        try:
            for turn in range(turns):
                frame.turn = before + turn
                check_stop(frame)
                if due is not None and time.monotonic() > due:
                    limit = f"{seconds} s"
                    break
                outputs = _whole(self.op, (yield self.op, own), frame)
                calls = _calls(outputs, turn, f"{frame.path}/{agent}")
                if not calls:
                    return {k: v for k, v in outputs.items() if k != "tool_calls"}
                results = yield from (run.in_order(calls) if at_once == 1 else run.together(calls, at_once))
                own = {**own, "tool_results": results}
        finally:
            frame.node_id, frame.turn = agent, before
        wanted = ", ".join(repr(call["tool_id"]) for call in calls)
        raise AgentStepLimitError(
            f"{frame.path}/{agent} gave no answer in {limit} and wanted {wanted} next; "
            "allow more with max_agent_steps or max_agent_seconds, or look at its tool results"
        )

    def _option(self, frame: Frame, name: str, default: Any) -> Any:
        asked = getattr(frame.options, name)
        return asked if asked is not None else self.graph.metadata.get(name, default)


@dataclass(slots=True)
class _Called:
    """A call of a tool on its way: what is called with which inputs, or why it cannot be."""

    tool_id: str
    call_id: str
    arguments: Any
    node_id: str
    turn: int
    use: _Use | None
    inputs: dict[str, Any]
    failed: Exception | None
    began: float

    @property
    def said(self) -> dict[str, str]:
        return {"tool_id": self.tool_id, "call_id": self.call_id}


class _Run:
    """The tool calls of one run of an agent; every turn gives their results, in the order of the calls."""

    def __init__(self, loop: AgentLoop, given: Mapping[str, Any], frame: Frame, turn: int, raising: bool) -> None:
        self.agent, self.uses, self.given, self.frame = loop.op, loop.uses, given, frame
        self.turn, self.raising = turn, raising
        self.made: dict[str, Any] = {}

    def in_order(self, calls: Sequence[Mapping[str, Any]]) -> Generator[tuple[Call, dict[str, Any]], Any, list[Result]]:
        results: list[Result] = []
        for call in calls:
            called = self._begin(call)
            outputs: Any = None
            late = False
            if called.use is not None and called.failed is None:
                end = self.frame.deadline
                self.frame.deadline = due = _sooner(end, called.use.tool.timeout)
                try:
                    outputs = yield called.use.op, called.inputs
                    late = due is not None and time.monotonic() > due
                finally:
                    self.frame.deadline = end
            results.append(self._end(called, outputs, late))
            self.frame.node_id = self.agent.node_id
        return results

    def together(
        self, calls: Sequence[Mapping[str, Any]], at_once: int
    ) -> Generator[tuple[Call, dict[str, Any]], Any, list[Result]]:
        """The same side by side: what one call makes is there for the next turn, not for the other calls."""
        frame = self.frame
        begun = [self._begin(call) for call in calls]
        beside = {
            i: Beside(c.node_id, c.use.op.call, c.inputs, c.turn, _sooner(frame.deadline, c.use.tool.timeout))
            for i, c in enumerate(begun)
            if c.use is not None and c.failed is None
        }
        frame.node_id = self.agent.node_id
        if beside:
            run = partial(_run_beside, [*beside.values()], at_once, frame)
            yield Call(self.agent.node_id, run, self.agent.ports), {}
        results: list[Result] = []
        for i, called in enumerate(begun):
            side = beside.get(i)
            if side is None:
                results.append(self._end(called, None, False))
                continue
            called.began = time.perf_counter() - side.seconds
            results.append(self._end(called, side.outputs, side.late))
        frame.node_id = self.agent.node_id
        return results

    def _begin(self, call: Mapping[str, Any]) -> _Called:
        """A call, checked and with its inputs. Raises: AbortRun, RunTimeoutError where the run is to stop."""
        frame, use = self.frame, self.uses.get(call["tool_id"])
        node_id = use.op.node_id if use is not None else self.agent.node_id
        self.turn += 1
        frame.node_id, frame.turn = node_id, self.turn
        check_stop(frame)
        called = _Called(
            call["tool_id"], call["call_id"], call["arguments"], node_id, self.turn, use, {}, None, time.perf_counter()
        )
        frame.emit(
            "tool_start", node_id=node_id, iteration=frame.iteration, inputs=called.arguments,
            data={**called.said, "agent": self.agent.node_id},
        )  # fmt: skip
        try:
            if use is None:
                known = ", ".join(map(repr, self.uses)) or "there are none"
                raise ToolError(f"there is no tool {called.tool_id!r}; tools: {known}")
            if isinstance(wrong := call.get("error"), str):
                raise ToolError(wrong)
            called.inputs = use.inputs(called.arguments, self.given, self.made)
            if frame.options.strict_types:
                check_kinds(f"{frame.path}/{node_id}", use.op.ports.inputs, called.inputs)
        except WGError as error:
            called.failed, called.inputs = error, {}
        return called

    def _end(self, called: _Called, outputs: Any, late: bool) -> Result:
        """`{call_id, tool_id, result}`, or `error` in place of the result."""
        frame, use, failed = self.frame, called.use, called.failed
        frame.node_id, frame.turn = called.node_id, called.turn
        value: Any = None
        if use is not None and failed is None:
            timeout = use.tool.timeout
            try:
                whole = _whole(use.op, outputs, frame)
                value = whole.get(use.tool.result)
                if frame.options.capture:
                    at = f"{frame.node_path}{called.node_id}:"
                    frame.root.captured.update({f"{at}{port}": v for port, v in whole.items()})
            except Exception as error:
                failed = error
            if timeout is not None and (late or isinstance(failed, (RunTimeoutError, TimeoutError))):
                check_stop(frame)
                failed = ToolError(f"{called.tool_id!r} took longer than its timeout of {timeout} s")
        text = None if failed is None else _told(failed)
        data = {**called.said, "agent": self.agent.node_id}
        frame.emit(
            "tool_end", node_id=called.node_id, iteration=frame.iteration, inputs=called.arguments,
            outputs={"result": value} if text is None else {}, elapsed=time.perf_counter() - called.began,
            data=data if text is None else {**data, "error": text},
        )  # fmt: skip
        if failed is None:
            self.made[called.call_id] = value
            return {**called.said, "result": value}
        if _stops(failed) or (self.raising and isinstance(failed, NodeExecutionError)):
            raise failed
        if self.raising:
            raise NodeExecutionError(f"{frame.path}/{called.node_id}, called as tool {called.tool_id!r}: {text}") from failed
        return {**called.said, "error": text}


def _run_beside(calls: Sequence[Beside], at_once: int, frame: Frame, _: dict[str, Any]) -> Any:
    return side_by_side(calls, at_once, frame)


def _sooner(end: float | None, timeout: float | None) -> float | None:
    due = None if timeout is None else time.monotonic() + timeout
    return due if end is None else end if due is None else min(due, end)


def _whole_number(name: str, value: Any, frame: Frame) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PortValueError(f"{frame.path}: {name} is a whole number >= 1, not {value!r}")
    return value


def _whole(op: Call, outputs: Any, frame: Frame) -> dict[str, Any]:
    """The checked outputs of a call. Raises: OutputContractError, and what the call raised."""
    if isinstance(outputs, _Failed):
        raise outputs.error
    if isinstance(outputs, _Pending):
        outputs.close()
        raise OutputContractError(f"{frame.path}/{op.node_id} is asynchronous; run it with `await ....run_async(...)`")
    check_outputs(f"{frame.path}/{op.node_id}", op.ports.outputs, outputs)
    return cast("dict[str, Any]", outputs)


def _calls(outputs: Mapping[str, Any], turn: int, where: str) -> list[dict[str, Any]]:
    """The tool calls of a turn, each with an id. Raises: OutputContractError for another form."""
    given: Any = outputs.get("tool_calls") or []
    calls: list[dict[str, Any]] = []
    good = isinstance(given, (list, tuple))
    for i, call in enumerate(cast("list[Any]", given) if good else ()):
        entry: dict[str, Any] = dict(cast("Mapping[str, Any]", call)) if isinstance(call, Mapping) else {}
        entry = {"call_id": f"call_{turn}_{i}", "arguments": {}, **entry}
        good = good and isinstance(entry.get("tool_id"), str) and isinstance(entry["call_id"], str)
        calls.append(entry)
    if not good or len({call["call_id"] for call in calls}) != len(calls):
        raise OutputContractError(
            f"{where}.tool_calls is a list of {{call_id, tool_id, arguments}} with ids that differ, not {str(given)[:300]}"
        )
    return calls


def _told(error: Exception) -> str:
    """An error as the agent reads it."""
    text = str(error) if isinstance(error, ToolError) else f"{type(error).__name__}: {error}"
    return text[:_MAX_ERROR]


def _stops(error: BaseException | None) -> bool:
    """Whether an error ends the run whatever the policy: it was cancelled, is over its time or its budget, or leaves its record."""
    while error is not None:
        if isinstance(error, (AbortRun, RunTimeoutError, BudgetExceededError, ReplayError)):
            return True
        error = error.__cause__
    return False
