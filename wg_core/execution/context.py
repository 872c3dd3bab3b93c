"""What a running block may know about its call: who it is in which world, seed, blobs, usage, events."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field, replace
from types import FunctionType, MappingProxyType
from typing import Any, Protocol, TypeVar, cast

from wg_core.errors import AbortRun, BudgetExceededError, ConfigError, RunTimeoutError
from wg_core.execution.blobs import BlobStore, MemoryBlobs
from wg_core.execution.budget import Budget, Hold
from wg_core.execution.calls import CallLog
from wg_core.structure.hyperlink import HyperLink, Resolvers

_log = logging.getLogger("wg_core.events")
Result = TypeVar("Result")


NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(slots=True)
class Event:
    """Something that happened in a run, as hooks see it; all are told the same one and leave it as it is.

    `kind` is one of run_start, run_end, node_start, node_end, node_error, loop_start, loop_iteration, loop_end,
    tool_start, tool_end, stage_start, stage_end, snapshot, model_call, progress. `path` names the place (`pipeline/graph/node`), `elapsed`
    is in seconds.
    """

    kind: str
    path: str
    level: str
    node_id: str | None = None
    iteration: int | None = None
    num_steps: int | None = None
    inputs: Mapping[str, Any] | None = None
    outputs: Mapping[str, Any] | None = None
    elapsed: float | None = None
    trace_context: Any = None
    data: Mapping[str, Any] = field(default_factory=lambda: NOTHING)


_bare_event = cast(
    "Callable[[], Event]", type("RunEvent", (Event,), {"__slots__": (), "__init__": object.__init__})
)
"""An event whose fields are set one by one, in half the time of a constructor that takes eleven."""

Hook = Callable[[Event], None]
"""What is told of events: of all, or of those whose kinds its attribute `kinds` names."""

Teller = Callable[..., None]
"""Tells hooks of one kind of event: `(node_id, iteration, num_steps, inputs, outputs, elapsed, data)`."""


def hears(hook: Hook, kind: str) -> bool:
    """Whether a hook is told of events of this kind."""
    kinds: Collection[str] | None = getattr(hook, "kinds", None)
    return kinds is None or kind in kinds


class Cancel(Protocol):
    """Anything like `threading.Event`: set it to stop a run."""

    def is_set(self) -> bool: ...


_PER_NODE = ("num_loop_steps", "seed", "max_agent_steps", "tool_errors", "per_node", "extra")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """All options of a run, handed down unchanged to every level.

    `num_loop_steps` is an int for all loops or a mapping by loop id; `per_node` overrides options for one child
    (number of steps, seed, extra); raises ConfigError for options that concern the whole run;
    `capture` lists `path:port` whose values are added to the result; `timeout` is in seconds; `strict_types` checks
    the kind of every value on every port and `guard_nan` stops at the first NaN or infinity; `usage` is the ledger that
    model use is added to, as `{model: {calls, prompt_tokens, completion_tokens, cost?}}`; `calls` keeps what models
    are asked and answer, or answers in their place; `budget` (`{calls, tokens, cost}`) is what they may be asked at most.
    `max_agent_steps` is how often an agent may be asked until it
    answers, and `tool_errors` what becomes of a tool call that fails: its `result` says so, or `raise`; both are taken
    from the graph's metadata where they are not given (else 10 steps, and `result`).
    """

    training: bool = False
    num_loop_steps: int | Mapping[str, int] | None = None
    device: Any = None
    callbacks: Sequence[Hook] = ()
    dry_run: bool = False
    seed: int | None = None
    max_agent_steps: int | None = None
    tool_errors: str | None = None
    timeout: float | None = None
    cancel: Cancel | None = None
    trace_context: Any = None
    per_node: Mapping[str, Mapping[str, Any]] | None = None
    capture: Sequence[str] = ()
    strict_types: bool = False
    guard_nan: bool = False
    blobs: BlobStore | None = None
    usage: dict[str, dict[str, float]] | None = None
    calls: CallLog | None = None
    budget: Budget | Mapping[str, Any] | None = None
    extra: Mapping[str, Any] | None = None
    resolvers: Resolvers | None = None

    def __post_init__(self) -> None:
        if self.budget is not None:
            object.__setattr__(self, "budget", Budget.of(self.budget))
        if self.tool_errors not in (None, "result", "raise"):
            raise ConfigError(f"tool_errors is 'result' or 'raise', not {self.tool_errors!r}")
        for node_id, chosen in (self.per_node or {}).items():
            for name in chosen:
                if name not in _PER_NODE:
                    raise ConfigError(
                        f"per_node[{node_id!r}]: {name!r} cannot be set for one node; {', '.join(_PER_NODE)} can"
                    )


class Frame:
    """One running level: mutable, private to one run. Blocks see it through `current_context()`."""

    __slots__ = (
        "blobs", "captured", "checked", "deadline", "ends", "hooks", "iteration", "level", "level_id", "node_id", "node_path", "options",
        "parent", "path", "plan", "root", "starts", "stoppable", "turn", "usage", "watched",
    )  # fmt: skip

    def __init__(
        self,
        level: str,
        level_id: str,
        options: RunOptions,
        parent: Frame | None = None,
        hooks: Sequence[Hook] = (),
    ) -> None:
        self.level = level
        self.level_id = level_id
        self.options = options
        self.parent = parent
        self.node_id: str | None = None
        self.iteration: int | None = None
        self.turn = 0
        self.plan: Any = None
        self.captured: dict[str, Any] = {}
        if parent is None:
            self.root: Frame = self
            self.path = level_id
            self.node_path = ""
            self.listen((*hooks, *options.callbacks))
            self.usage: dict[str, dict[str, float]] = options.usage if options.usage is not None else {}
            self.blobs: BlobStore = options.blobs if options.blobs is not None else MemoryBlobs()
            self.deadline = None if options.timeout is None else time.monotonic() + options.timeout
        else:
            self.root = parent.root
            under = parent.node_id if parent.node_id is not None else level_id
            self.path = f"{parent.path}/{under}"
            self.node_path = f"{parent.node_path}{under}/"
            self.listen((*parent.hooks, *hooks))
            self.usage = parent.usage
            self.blobs = parent.blobs
            self.deadline = parent.deadline
        self.stoppable = self.deadline is not None or options.cancel is not None
        self.checked = bool(self.stoppable or options.capture or options.strict_types or options.guard_nan)
        self.watched = bool(self.hooks) or self.checked

    def listen(self, hooks: tuple[Hook, ...]) -> None:
        """Tell these hooks from now on; who hears of the start and the end of a node is found out at once."""
        self.hooks = hooks
        self.starts = self._teller("node_start") if hooks else None
        self.ends = self._teller("node_end") if hooks else None

    def _teller(self, kind: str) -> Teller | None:
        heard = [h for h in self.hooks if hears(h, kind)]
        hooks = [h.__call__ if isinstance(type(h).__call__, FunctionType) else h for h in heard]  # a third faster
        path, level, trace_context = self.path, self.level, self.options.trace_context

        def told(
            node_id: str | None = None, iteration: int | None = None, num_steps: int | None = None,
            inputs: Mapping[str, Any] | None = None, outputs: Mapping[str, Any] | None = None,
            elapsed: float | None = None, data: Mapping[str, Any] = NOTHING,
        ) -> None:  # fmt: skip
            event = _bare_event()
            event.kind = kind
            event.path = path if node_id is None else f"{path}/{node_id}"
            event.level = level
            event.node_id = node_id
            event.iteration = iteration
            event.num_steps = num_steps
            event.inputs = inputs
            event.outputs = outputs
            event.elapsed = elapsed
            event.trace_context = trace_context
            event.data = data
            for hook in hooks:
                try:
                    hook(event)
                except AbortRun:
                    raise
                except Exception:
                    _log.exception("hook %r failed on %s at %s; the run goes on", hook, kind, event.path)

        return told if hooks else None

    def emit(self, kind: str, **fields: Any) -> None:
        """Tell the hooks that hear this kind; a failing one is logged and the run goes on, `AbortRun` stops it."""
        told = self._teller(kind) if self.hooks else None
        if told is not None:
            told(**fields)


FRAME: ContextVar[Frame | None] = ContextVar("wg_frame", default=None)


@dataclass(frozen=True, slots=True)
class CallContext:
    """An immutable look at the running call; see `current_context`."""

    path: str = ""
    world_id: str | None = None
    stage_id: str | None = None
    pipeline_id: str | None = None
    graph_id: str | None = None
    node_id: str | None = None
    step: int | None = None
    iteration: int | None = None
    seed: int | None = None
    training: bool = False
    trace_id: Any = None
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
    blobs: BlobStore = field(default_factory=MemoryBlobs)
    frame: Frame | None = field(default=None, repr=False, compare=False)

    def node_seed(self) -> int:
        """A seed in 0..2**63-1 derived from run seed, node path below the root, and iteration and turn at every level.

        Equal runs give equal seeds, whatever the root is called; without a run seed it is that of seed 0.
        """
        place = f"{self.frame.node_path}{self.node_id}" if self.frame is not None else ""
        around: list[object] = [f"turn {self.frame.turn}"] if self.frame is not None and self.frame.turn else []
        outer = self.frame.parent if self.frame is not None else None
        while outer is not None:
            if outer.iteration is not None:
                around.append(outer.iteration)
            if outer.turn:
                around.append(f"turn {outer.turn}")
            outer = outer.parent
        return derive_seed(self.seed or 0, place, self.iteration or 0, *around)

    def reads(self, port: str) -> bool:
        """Whether this optional output of the running block goes anywhere, so that it is worth making; yes if unknown."""
        frame = self.frame
        program = frame.plan.program if frame is not None and frame.plan is not None else ()
        op = next((op for op in program if getattr(op, "node_id", None) == self.node_id), None)
        if frame is None or op is None:
            return True
        return any(name == port for name, _ in op.optional_outs) or (
            f"{frame.node_path}{self.node_id}:{port}" in frame.options.capture
        )

    def hold(self, model: str, *, tokens: int, cost: float | None = 0.0) -> AbstractContextManager[Hold | None]:
        """Hold one call of at most so many tokens in the run's budget, before it is made; `add_usage` settles it.

        A call that fails counts as one. `cost` None is not known. Raises: BudgetExceededError.
        """
        budget = budget_of(self.frame.options) if self.frame is not None else None
        if budget is None:
            return nullcontext()
        if cost is None and budget.limits_cost:
            raise BudgetExceededError(
                f"{model}: what a call costs is not known, and the run has a budget of cost; give prices "
                "({prompt, completion}, per million tokens) in the block's config"
            )
        return _held(budget.hold(f"{self.path or model}: {model}", tokens, cost or 0.0))

    def add_usage(
        self,
        model: str,
        *,
        calls: int = 1,
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
        cached_tokens: int = 0,
        cost: float | None = None,
        held: Hold | None = None,
    ) -> None:
        """Add to the run's ledger of model use; `held` is what `hold` gave for the call.

        `cached_tokens` are those of the prompt that needed no computing, as they were known from another.
        """
        if self.frame is None:
            return
        used: dict[str, float] = {"calls": calls, "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        if cost is not None:
            used["cost"] = cost
        if cached_tokens:
            used["cached_tokens"] = cached_tokens
        if held is not None:
            held.settle(used)
        elif (budget := budget_of(self.frame.options)) is not None:
            budget.charge(used)
        add_rows(self.frame.usage, {model: used})

    def ask(
        self, model: str, request: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]
    ) -> Mapping[str, Any]:
        """What a model answers to `request`: the door of every block whose answer is paid for or cannot be repeated.

        `request` is plain JSON, all that decides the answer; `make()` asks the model and gives `{answer, ...}`, plain
        JSON too. A run that keeps its calls records both; in a replay the record answers and `make` is not called.
        Raises: ReplayError for a request that is not in the record.
        """
        return drained(self.ask_in_pieces(model, request, lambda: whole(make)))

    def ask_in_pieces(
        self, model: str, request: Mapping[str, Any], make: Callable[[], Generator[Any, None, Mapping[str, Any]]]
    ) -> Generator[Any, None, Mapping[str, Any]]:
        """As `ask`, where `make()` yields pieces of its answer on the way; a replay yields none."""
        calls = self.frame.options.calls if self.frame is not None else None
        if calls is None or self.frame is None:
            return (yield from make())
        place = f"{self.frame.node_path}{self.node_id}"
        found = calls.recall(place, model, request)
        return found if found is not None else calls.keep(place, model, request, (yield from make()))

    def resolve(self, link: HyperLink | Mapping[str, Any]) -> Any:
        """The target of a link, which is only read. Raises: LinkError where the run cannot find it."""
        found = self.frame.options.resolvers if self.frame is not None else None
        given = link if isinstance(link, HyperLink) else HyperLink.model_validate(link)
        return (found or Resolvers()).resolve(given)

    def emit(self, kind: str, **data: Any) -> None:
        """Send an event of this node to the run's hooks; raises AbortRun where the run was cancelled."""
        if self.frame is not None:
            check_stop(self.frame)
            self.frame.emit(kind, node_id=self.node_id, iteration=self.iteration, data=data)


@contextmanager
def unrecorded() -> Generator[None]:
    """Inside, what models are asked is not recorded by itself: it is part of a call that is."""
    frame = FRAME.get()
    if frame is None or frame.options.calls is None:
        yield
        return
    quiet = copy(frame)
    quiet.options = replace(frame.options, calls=None)
    token = FRAME.set(quiet)
    try:
        yield
    finally:
        FRAME.reset(token)


@contextmanager
def _held(hold: Hold) -> Generator[Hold]:
    try:
        yield hold
    finally:
        hold.settle({"calls": 1})


def budget_of(options: RunOptions) -> Budget | None:
    """The budget of a run."""
    return cast("Budget | None", options.budget)


def whole(make: Callable[[], Result]) -> Generator[Any, None, Result]:
    """A result without pieces."""
    return make()
    yield  # never reached: makes this a generator


def drained(pieces: Generator[Any, None, Result]) -> Result:
    """The result of a generator whose pieces nobody wants."""
    while True:
        try:
            next(pieces)
        except StopIteration as stop:
            return stop.value


_LEDGER = threading.Lock()


def add_rows(ledger: dict[str, dict[str, float]], more: Mapping[str, Mapping[str, float]]) -> None:
    """Add rows of model use to a ledger, `{model: {calls, prompt_tokens, completion_tokens, cost?}}`."""
    with _LEDGER:  # tools that run side by side add to one
        for model, row in more.items():
            mine = ledger.setdefault(model, {"calls": 0, "prompt_tokens": 0, "completion_tokens": 0})
            for name, value in row.items():
                mine[name] = mine.get(name, 0) + value


def derive_seed(seed: int, *parts: object) -> int:
    """A seed in 0..2**63-1 from `seed` and a path (sha256, first 63 bits)."""
    text = "\x1f".join([str(seed), *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def check_stop(frame: Frame) -> None:
    """Raises: AbortRun if the run was cancelled, RunTimeoutError if its time is over."""
    cancel = frame.options.cancel
    if (cancel is not None and cancel.is_set()) or (frame.deadline is not None and time.monotonic() > frame.deadline):
        raise stop_reason(frame)


def stop_reason(frame: Frame) -> AbortRun | RunTimeoutError:
    """What to raise in a run that is to stop: AbortRun where it was cancelled, else RunTimeoutError."""
    if frame.options.cancel is not None and frame.options.cancel.is_set():
        return AbortRun(f"{frame.path}: the run was cancelled")
    return RunTimeoutError(f"{frame.path}: the run took longer than its timeout of {frame.options.timeout} s")


_OUTSIDE = CallContext()


def current_context() -> CallContext:
    """The context of the call that runs now; outside any run an empty one whose methods work and keep nothing."""
    frame = FRAME.get()
    if frame is None:
        return _OUTSIDE
    ids: dict[str, str] = {}
    at: Frame | None = frame
    while at is not None:
        ids.setdefault(at.level, at.level_id)
        at = at.parent
    extra = frame.options.extra or {}
    return CallContext(
        path=frame.path if frame.node_id is None else f"{frame.path}/{frame.node_id}",
        world_id=ids.get("world"),
        stage_id=ids.get("stage"),
        pipeline_id=ids.get("pipeline"),
        graph_id=ids.get("graph"),
        node_id=frame.node_id,
        step=extra.get("step"),
        iteration=frame.iteration,
        seed=frame.options.seed,
        training=frame.options.training,
        trace_id=frame.options.trace_context,
        extra=extra,
        blobs=frame.blobs,
        frame=frame,
    )


def options_for(options: RunOptions, node_id: str | None) -> RunOptions:
    """`options` with the overrides of `per_node[node_id]`."""
    if not options.per_node or node_id is None or node_id not in options.per_node:
        return options
    return replace(options, **options.per_node[node_id])
