"""Drivers of the one algorithm: in this thread, in an event loop, as a stream of chunks, node by node.

Each takes a session (a level's walk with all around it), runs the calls that it yields and sends the results back.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from wg_core.errors import NodeError, OutputContractError
from wg_core.execution.context import FRAME, Cancel, Frame, check_stop, stop_reason
from wg_core.execution.plan import Call, Placeholder
from wg_core.structure.port import kind_of

if TYPE_CHECKING:
    import asyncio

    from wg_core.execution.block import Block
    from wg_core.execution.executable_graph import ExecutableGraph

Result = dict[str, Any]
Done = TypeVar("Done")
Item = TypeVar("Item")
Session = Generator[tuple[Call, dict[str, Any]], Any, Result]
Stepping = Generator[tuple[Call, dict[str, Any]], Any, Done]  # a session within something that makes more of its result
Batched = Generator[tuple["Block", Any], Any, Done]
Around = Callable[[], AbstractContextManager[Any]]

_POLL = 0.05  # seconds between two looks at `cancel` while an awaitable is waited for


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of the outputs of a run, by exposed key; the last one is `final` and holds the whole result.

    `path` is the node that made the piece, `iteration` that of the loop around the node.
    """

    outputs: dict[str, Any]
    path: str
    iteration: int | None = None
    final: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """The node that comes next, and what it is given; entries of `inputs` may be replaced before going on."""

    path: str
    level: str
    node_id: str
    iteration: int | None
    inputs: dict[str, Any]


class Steps(Generic[Item]):
    """A paused run: an iterator of what comes next, `close()` to stop, and at the end `result`."""

    def __init__(self, body: Generator[Item, None, Result]) -> None:
        self._body = body
        self._result: Result | None = None

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        try:
            return next(self._body)
        except StopIteration as stop:
            if stop.value is not None:
                self._result = stop.value
            raise

    def close(self) -> None:
        """Stop the run where it is; nothing further is called."""
        self._body.close()

    @property
    def result(self) -> Result:
        """The outputs of the run. Raises: NodeError where it has not come to its end."""
        if self._result is None:
            raise NodeError("the run has no result yet: it was stopped, or there are steps left; go on to its end")
        return self._result


def drive(graph: ExecutableGraph[Any], session: Stepping[Done], dry: bool) -> Done:
    """Run a session here and now."""
    outputs: Result | None = None
    try:
        while True:
            op, inputs = session.send(outputs)
            try:
                outputs = dry_call(graph, op, inputs) if dry else op.call(inputs)
            except BaseException as error:
                session.throw(error)
                raise  # not reached: the walk raises
    except StopIteration as stop:
        return stop.value


async def drive_async(
    graph: ExecutableGraph[Any], session: Session, dry: bool, scope: asyncio.Timeout
) -> Result:
    """Run a session in the running event loop: what a block returns is awaited where it can be."""
    outputs: Result | None = None
    try:
        while True:
            op, inputs = session.send(outputs)
            try:
                below = graph.session_below(op, inputs)
                if below is not None:
                    outputs = await drive_async(*below, dry, scope)
                elif dry:
                    outputs = dry_call(graph, op, inputs)
                else:
                    outputs = op.call(inputs)
                    if outputs.__class__ is not dict and inspect.isawaitable(outputs):
                        outputs = await cast(Any, outputs)
            except BaseException as error:
                stopped = scope.expired() and type(error).__name__ == "CancelledError"
                session.throw(stop_reason(cast(Frame, FRAME.get())) if stopped else error)
                raise
    except StopIteration as stop:
        return stop.value


async def in_time(
    run: Callable[[asyncio.Timeout], Awaitable[Result]], timeout: float | None, cancel: Cancel | None
) -> Result:
    """Await `run(scope)`; the scope expires when the time is over or `cancel` is set, even while a block waits."""
    import asyncio

    loop = asyncio.get_running_loop()
    async with asyncio.timeout(timeout) as scope:
        if cancel is None:
            return await run(scope)

        def look() -> None:
            nonlocal next_look
            if cancel.is_set():
                scope.reschedule(loop.time())
            else:
                next_look = loop.call_later(_POLL, look)

        next_look = loop.call_later(_POLL, look)
        try:
            return await run(scope)
        finally:
            next_look.cancel()
    raise AssertionError("not reached: the run raises for itself when the scope expires")


def drive_stream(graph: ExecutableGraph[Any], session: Session, dry: bool) -> Generator[Chunk, None, Result]:
    """Run a session as its consumer asks for pieces: blocks whose streamable outputs are exposed give them."""
    offered: dict[str, dict[str, str]] = {}
    for x in graph.exposures("out"):
        if graph.ports_of(graph.nodes[x.node_id]).outputs[x.port_name].streamable:
            offered.setdefault(x.node_id, {})[x.port_name] = x.key
    outputs: Result | None = None
    try:
        while True:
            op, inputs = session.send(outputs)
            frame = cast(Frame, FRAME.get())
            keys = offered.get(op.node_id)
            try:
                if dry:
                    outputs = dry_call(graph, op, inputs)
                elif keys is None or frame.options.training:
                    outputs = op.call(inputs)
                else:
                    below = graph.session_below(op, inputs)
                    if below is not None:
                        chunks = drive_stream(*below, dry)
                        outputs = yield from (chunks if below[0] is graph else _renamed(chunks, keys))
                    else:
                        outputs = yield from _pieces(graph.stream_of(graph.nodes[op.node_id])(inputs), op, keys, frame)
            except BaseException as error:
                session.throw(error)
                raise
    except StopIteration as stop:
        return stop.value


def _renamed(chunks: Generator[Chunk, None, Result], keys: dict[str, str]) -> Generator[Chunk, None, Result]:
    while True:
        try:
            chunk = next(chunks)
        except StopIteration as stop:
            return stop.value
        named = {keys[k]: v for k, v in chunk.outputs.items() if k in keys}
        if named:
            try:
                yield Chunk(named, chunk.path, chunk.iteration)
            except BaseException:
                chunks.close()
                raise


def _pieces(
    pieces: Generator[dict[str, Any], None, Result], op: Call, keys: dict[str, str], frame: Frame
) -> Generator[Chunk, None, Result]:
    try:
        while True:
            try:
                piece = next(pieces)
            except StopIteration as stop:
                return stop.value
            check_stop(frame)
            _check_piece(piece, op)
            named = {keys[k]: v for k, v in piece.items() if k in keys}
            if named:
                yield Chunk(named, f"{frame.path}/{op.node_id}", frame.iteration)
    finally:
        pieces.close()


def _check_piece(piece: Any, op: Call) -> None:
    ports = op.ports.outputs
    if not isinstance(piece, dict) or any(k not in ports or not ports[k].streamable for k in cast("Result", piece)):
        given = sorted(cast("Result", piece)) if isinstance(piece, dict) else kind_of(piece)
        streamable = sorted(p.name for p in ports.values() if p.streamable)
        raise OutputContractError(
            f"stream_forward yielded {given}; a piece is a dict keyed by streamable output ports, here {streamable}"
        )


def drive_steps(graph: ExecutableGraph[Any], session: Session, dry: bool) -> Generator[Step, None, Result]:
    """Run a session one node at a time, nodes of nested levels too: a step is yielded before each."""
    outputs: Result | None = None
    try:
        while True:
            op, inputs = session.send(outputs)
            frame = cast(Frame, FRAME.get())
            try:
                below = graph.session_below(op, inputs)
                if below is None or below[0] is not graph:  # an agent's turns and tools are steps of their own
                    yield Step(f"{frame.path}/{op.node_id}", frame.level, op.node_id, frame.iteration, inputs)
                if below is not None:
                    outputs = yield from drive_steps(*below, dry)
                else:
                    outputs = dry_call(graph, op, inputs) if dry else op.call(inputs)
            except BaseException as error:
                session.throw(error)
                raise
    except StopIteration as stop:
        return stop.value


def drive_batched(graph: ExecutableGraph[Any], session: Stepping[Done]) -> Batched[Done]:
    """Run a session that is one of a batch: what blocks want computed with that of others is yielded, with the block."""
    outputs: Result | None = None
    try:
        while True:
            op, inputs = session.send(outputs)
            try:
                below = graph.session_below(op, inputs)
                if below is not None:
                    outputs = yield from drive_batched(*below)
                elif getattr(graph.nodes[op.node_id].child, "batches", False):
                    block, requests = graph.batch_of(graph.nodes[op.node_id])
                    outputs = yield from _of_block(block, requests(inputs))
                else:
                    outputs = op.call(inputs)
            except BaseException as error:
                session.throw(error)
                raise
    except StopIteration as stop:
        return stop.value


def _of_block(block: Block, requests: Generator[Any, Any, Result]) -> Batched[Result]:
    answer: Any = None
    try:
        while True:
            try:
                request = requests.send(answer)
            except StopIteration as stop:
                return stop.value
            answer = yield block, request
    finally:
        requests.close()


def together(runs: Sequence[Batched[Done]]) -> list[Done]:
    """Run `drive_batched` of several sessions side by side, each in a context of its own; results in order.

    Each goes on until it wants something of a block; what they want of one block is computed at once. A block that
    fails at that fails in each of the runs that it was asked by.
    """
    contexts = [copy_context() for _ in runs]
    results: dict[int, Done] = {}
    sent: dict[int, Any] = dict.fromkeys(range(len(runs)))
    try:
        while sent:
            asked: dict[int, tuple[list[int], list[Any], Block]] = {}
            for i, answer in sent.items():
                go_on = runs[i].throw if isinstance(answer, Exception) else runs[i].send
                try:
                    block, request = contexts[i].run(go_on, answer)
                except StopIteration as stop:
                    results[i] = stop.value
                except Exception as error:
                    error.add_note(f"in item {i} of the batch")
                    raise
                else:
                    rows, requests, _ = asked.setdefault(id(block), ([], [], block))
                    rows.append(i)
                    requests.append(request)
            sent = {}
            for rows, requests, block in asked.values():
                try:
                    sent |= zip(rows, block.answer_batch(requests), strict=True)
                except Exception as error:
                    error.add_note(f"in items {rows} of the batch, which were computed together")
                    sent |= dict.fromkeys(rows, error)
    finally:
        for context, run in zip(contexts, runs, strict=True):
            context.run(run.close)
    return [results[i] for i in range(len(runs))]


def dry_call(graph: ExecutableGraph[Any], op: Call, inputs: dict[str, Any]) -> Result:
    """What a dry run gives for a node: a level below is walked too, a block gives placeholders."""
    below = graph.session_below(op, inputs)
    if below is not None:
        return drive(*below, dry=True)
    return {n: Placeholder(p.types, f"{op.node_id}.{n}") for n, p in op.ports.outputs.items()}


def held(body: Generator[Any, Any, Any] | Coroutine[Any, Any, Any], around: Around) -> Generator[Any, Any, Any]:
    """`body`, each stretch of it run inside `around()` and with the frame that it left; outside all is as before.

    So a run that pauses leaves no trace in its consumer, and two that take turns do not see each other.
    """
    inside = FRAME.get()
    value: Any = None
    thrown: BaseException | None = None
    while True:
        outside = FRAME.get()
        FRAME.set(inside)
        try:
            with around():
                item = body.send(value) if thrown is None else body.throw(thrown)
        except StopIteration as stop:
            return stop.value
        finally:
            inside = FRAME.get()
            FRAME.set(outside)
        try:
            value = yield item
            thrown = None
        except BaseException as error:
            thrown = error


class Held:
    """`held` as an awaitable."""

    __slots__ = ("_around", "_body")

    def __init__(self, body: Coroutine[Any, Any, Any], around: Around) -> None:
        self._body = body
        self._around = around

    def __await__(self) -> Generator[Any, Any, Any]:
        return held(self._body, self._around)
