"""The other drivers of the one walk: asynchronous, in batches, as a stream, step by step; each stops cleanly."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Sequence
from typing import Any

import pytest
from blocks_for_tests import Affine, Calls, Const, Echo, Fails, Maybe, Modes, Sleeps, Where, chain, cycle

from wg_core import Block, BlockRegistry, Graph, Pipeline, Port, Stage, State, current_context
from wg_core.errors import (
    AbortRun,
    MissingInputError,
    NodeError,
    NodeExecutionError,
    OutputContractError,
    RunTimeoutError,
    UnexpectedInputError,
)
from wg_core.execution.context import Event
from wg_core.execution.drive import Chunk, Step
from wg_core.levels.remote import Remote, RemoteAnswer, RemoteCall


class Waits(Block):
    """Asynchronous: gives `x` and where it ran, after a pause in which others run."""

    ports = (Port("x", "in", "any", optional=True), Port("y", "out", "any"))

    def __init__(self, *, seconds: float = 0.0) -> None:
        super().__init__()
        self.seconds = seconds
        self.ended: list[str] = []

    async def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        self.ended.append("done")
        context = current_context()
        return {"y": [inputs.get("x"), context.path, context.seed]}


class Later(Block):
    """Asynchronous without a coroutine function: returns something awaitable."""

    ports = (Port("x", "in", "any"), Port("y", "out", "any"))

    def forward(self, inputs: dict[str, Any]) -> Any:
        async def later() -> dict[str, Any]:
            await asyncio.sleep(0)
            return {"y": inputs["x"]}

        return asyncio.ensure_future(later())


class Writes(Block):
    """Says a text word by word."""

    ports = (
        Port("x", "in", "text"),
        Port("y", "out", "text", streamable=True),
        Port("length", "out", "number"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self.closed = 0

    def stream_forward(self, inputs: dict[str, Any]) -> Generator[dict[str, Any], None, dict[str, Any]]:
        try:
            for word in inputs["x"].split():
                self.said.append(word)
                yield {"y": word}
        finally:
            self.closed += 1
        return {"y": inputs["x"], "length": len(inputs["x"])}


class Yields(Block):
    """Yields what it was told to yield."""

    ports = (Port("y", "out", "text", streamable=True), Port("n", "out", "number"))

    def __init__(self, *, piece: Any) -> None:
        super().__init__()
        self.piece = piece

    def stream_forward(self, inputs: dict[str, Any]) -> Generator[dict[str, Any], None, dict[str, Any]]:
        yield self.piece
        return {"y": "", "n": 0}


def writer(block: Writes | None = None, *, before: Block | None = None) -> Graph:
    graph = Graph("g")
    graph.add_node(before or Echo(), "first")
    graph.add_node(block or Writes(), "write")
    graph.add_edge("first", "y", "write", "x")
    graph.expose_input("first", "x", "prompt")
    graph.expose_output("write", "y", "text")
    graph.expose_output("write", "length", "length")
    return graph


def nested(*blocks: Block) -> Pipeline:
    pipeline = Pipeline("p")
    pipeline.add_graph(chain(*blocks, id="g"))
    return pipeline


# Every driver as a function with the signature of `run`, so that what holds for all is said once.


def by_async(level: Any, inputs: Any = None, **options: Any) -> dict[str, Any]:
    return asyncio.run(level.run_async(inputs, **options))


def by_batch(level: Any, inputs: Any = None, **options: Any) -> dict[str, Any]:
    (result,) = level.run_batch([inputs], **options)
    return result


def by_stream(level: Any, inputs: Any = None, **options: Any) -> dict[str, Any]:
    *pieces, last = level.stream(inputs, **options)
    assert last.final
    assert not any(p.final for p in pieces)
    return last.outputs


def by_steps(level: Any, inputs: Any = None, **options: Any) -> dict[str, Any]:
    steps = level.steps(inputs, **options)
    list(steps)
    return steps.result


def by_run(level: Any, inputs: Any = None, **options: Any) -> dict[str, Any]:
    return level.run(inputs, **options)


Run = Callable[..., dict[str, Any]]
DRIVERS: dict[str, Run] = {"run": by_run, "async": by_async, "batch": by_batch, "stream": by_stream, "steps": by_steps}


@pytest.fixture(params=DRIVERS)
def run(request: pytest.FixtureRequest) -> Run:
    return DRIVERS[request.param]


def with_optional() -> Graph:
    graph = Graph("g")
    graph.add_node(Maybe(), "m")
    graph.expose_input("m", "x", "x")
    graph.expose_output("m", "y", "y")
    graph.expose_output("m", "sign", "sign")
    return graph


# ---- what holds for all --------------------------------------------------------------------------------------------


def test_same_results_events_and_context(run: Run) -> None:
    """02 G-43: the drivers wrap one core: equal outputs, events, seeds and capture."""
    made = {
        "loop": (lambda: cycle(Affine(scale=2), Affine(offset=1)), {"x": 1}, {"num_loop_steps": 5}),
        "nested": (lambda: nested(Where(), Where()), {"x": []}, {"seed": 7, "extra": {"step": 3}}),
        "optional": (with_optional, {"x": -1}, {}),
        "captured": (lambda: nested(Affine(offset=1), Affine(scale=3)), {"x": 1}, {"capture": ["g/n0:y"]}),
        "dry": (lambda: nested(Fails(), Fails()), {"x": 1}, {"dry_run": True}),
    }
    for name, (make, inputs, options) in made.items():
        told: list[list[tuple[Any, ...]]] = []
        results: list[Any] = []
        for driver in (by_run, run):
            events: list[Event] = []
            results.append(driver(make(), inputs, callbacks=[events.append], **options))
            told.append([(e.kind, e.path, e.iteration, e.num_steps) for e in events])
        assert results[0] == results[1], name
        assert told[0] == told[1], name
        assert current_context().path == ""


def test_same_errors(run: Run) -> None:
    """02 G-28, G-37: a run is checked alike, and an error names its place once."""
    events: list[Event] = []
    with pytest.raises(NodeExecutionError) as caught:
        run(nested(Affine(), Fails()), {"x": 4711}, callbacks=[events.append])
    assert str(caught.value) == "p/g/n1 failed: ValueError: out of ink (inputs: x: int)"
    assert [e.path for e in events if e.kind == "node_error"] == ["p/g/n1"]
    with pytest.raises(MissingInputError, match="needs 'x'"):
        run(chain(Affine()), {})
    with pytest.raises(UnexpectedInputError, match="no input 'z'"):
        run(chain(Affine()), {"x": 1, "z": 2})
    with pytest.raises(UnexpectedInputError, match="'num_steps'"):
        run(chain(Affine()), {"x": 1}, num_steps=2)
    assert current_context().path == ""


@pytest.mark.parametrize("error", [StopIteration("s"), KeyError("k"), RuntimeError("r")])
def test_exceptions_that_generators_treat_specially(run: Run, error: Exception) -> None:
    """02 G-37."""

    class Raises(Block):
        ports = (Port("y", "out"),)

        def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
            raise error

    with pytest.raises(NodeExecutionError, match=f"chain/n0 failed: {type(error).__name__}") as caught:
        run(chain(Raises()))
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("driver", ["run", "stream", "steps"])
def test_an_interrupt_passes_through_and_leaves_nothing(driver: str) -> None:
    """02 U-1: Ctrl-C inside a block is no failure of the node, and the modes are as before."""
    import torch

    class Interrupted(Modes):
        def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
            raise KeyboardInterrupt

    block = Interrupted()
    block.train()
    with pytest.raises(KeyboardInterrupt):
        DRIVERS[driver](nested(block), {})
    assert (current_context().path, block.training, torch.is_grad_enabled()) == ("", True, True)


def test_timeout_stops_cleanly(run: Run) -> None:
    """02 G-27, U-1: between nodes, with the path, and the graph runs again."""
    last = Calls()
    pipeline = nested(Sleeps(seconds=0.05), last)
    with pytest.raises(RunTimeoutError, match=r"p/g: the run took longer than its timeout of 0\.02 s"):
        run(pipeline, {"x": 1}, timeout=0.02)
    assert last.calls == 0
    assert current_context().path == ""
    assert run(pipeline, {"x": 1}, timeout=10) == {"y": 1}


def test_cancel_stops_cleanly(run: Run) -> None:
    """02 G-27, U-1: no further node is called, and the graph runs again."""
    cancel = threading.Event()
    block = Calls()
    graph = cycle(block)

    def at_third(event: Event) -> None:
        if event.kind == "node_end" and event.iteration == 2:
            cancel.set()

    with pytest.raises(AbortRun, match="cycle: the run was cancelled"):
        run(graph, {"x": 1}, num_loop_steps=1000, cancel=cancel, callbacks=[at_third])
    assert block.calls == 3
    assert current_context().path == ""
    assert run(graph, {"x": 1}, num_loop_steps=2) == {"y": 1}


def test_modes_hold_inside_and_are_as_before_outside(run: Run) -> None:
    """02 G-39."""
    import torch

    block = Modes()
    block.train()
    assert run(chain(block))["y"] == {"training": False, "grad": False}
    assert (block.training, torch.is_grad_enabled()) == (True, True)
    assert run(chain(block), training=True)["y"] == {"training": True, "grad": True}


def test_every_driver_goes_on_with_a_run_that_calls_it() -> None:
    """02 G-27: inside a block, without options, a graph runs as a child of what runs: same seed, nested path."""

    class Inner(Block):
        ports = (Port("y", "out"),)

        def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
            graph = chain(Where(), id="inner")
            *_, streamed = graph.stream({"x": []})
            stepped = graph.steps({"x": []})
            list(stepped)
            return {"y": [r["y"][0] for r in (graph.run({"x": []}), streamed.outputs, stepped.result)]}

    first, *others = chain(Inner()).run(seed=9)["y"]
    assert (first["path"], first["seed"]) == ("chain/n0/n0", 9)
    assert others == [first, first]


def test_a_stage_takes_and_gives_state(run: Run) -> None:
    """02 G-1: the one contract of a stage, in every driver, also where the stage does not run."""
    stage = Stage("s", reads=["intent"], writes=["outcome"], inputs={"x": "intent.text"}, outputs={"outcome.narrative": "y"})
    stage.add_pipeline(nested(Echo(), Echo()))
    state = State.of({"intent": {"text": "calm"}})
    assert run(stage, {"state": state})["state"].read("outcome.narrative") == "calm"
    assert run(stage, {"state": State()})["state"] == State()
    with pytest.raises(UnexpectedInputError, match="no input 'actoin'; did you mean 'action'"):
        run(stage, {"state": state, "actoin": "x"})


# ---- asynchronous --------------------------------------------------------------------------------------------------


def test_awaitables_are_awaited_on_every_level() -> None:
    """02 G-43: coroutine functions, other awaitables and plain blocks side by side."""
    result = by_async(nested(Affine(offset=1), Waits(), Later()), {"x": 1}, seed=5)
    assert result == {"y": [2, "p/g/n1", 5]}
    assert by_async(cycle(Waits()), {"x": 0}, num_loop_steps=2)["y"][0] == [0, "cycle/n0", None]


def test_two_runs_in_one_loop_keep_their_own_context() -> None:
    """02 G-31, G-39: frames, seeds, iterations and gradients of runs that take turns are their own."""
    import torch

    class Looks(Waits):
        async def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
            seen: list[Any] = []
            for _ in range(5):
                await asyncio.sleep(self.seconds)
                context = current_context()
                seen.append((context.path, context.seed, context.training, torch.is_grad_enabled()))
            return {"y": [*inputs["x"], seen]}

    async def both() -> tuple[Any, Any, Any]:
        pipeline = nested(Looks(seconds=0.001), Looks())
        runs = [
            pipeline.run_async({"x": []}, seed=1),
            pipeline.run_async({"x": []}, seed=2, training=True),
        ]
        a, b = await asyncio.gather(*runs)
        return a, b, (current_context().path, torch.is_grad_enabled())

    a, b, after = asyncio.run(both())
    assert a["y"] == [[(f"p/g/n{i}", 1, False, False)] * 5 for i in (0, 1)]
    assert b["y"] == [[(f"p/g/n{i}", 2, True, True)] * 5 for i in (0, 1)]
    assert after == ("", True)
    assert torch.is_grad_enabled()


def test_waiting_runs_overlap() -> None:
    """02 G-43: while one run waits, others go on."""

    class Meets(Block):
        """Goes on when ten runs have come here."""

        ports = (Port("x", "in"), Port("y", "out"))

        async def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
            await all_here.wait()
            return {"y": inputs["x"]}

    async def many() -> list[Any]:
        graph = chain(Meets())
        return await asyncio.wait_for(asyncio.gather(*(graph.run_async({"x": i}) for i in range(10))), 60)

    all_here = asyncio.Barrier(10)
    assert [found["y"] for found in asyncio.run(many())] == list(range(10))


def test_run_says_that_a_block_is_asynchronous() -> None:
    """01 F-11: no silent coroutine, and the way out."""
    with pytest.raises(OutputContractError, match="chain/n0 is asynchronous; run what it is in with run_async"):
        chain(Waits()).run({"x": 1})
    with pytest.raises(NodeExecutionError, match="p/g/n0 is asynchronous"):
        nested(Waits()).run({"x": 1})
    with pytest.raises(OutputContractError, match="asynchronous"):
        Waits().run({"x": 1})


@pytest.mark.parametrize("how", ["timeout", "cancel", "task"])
def test_a_waiting_block_is_stopped_in_under_a_second(how: str) -> None:
    """02 G-27, U-1: the block sees the cancelling, nothing runs after it, the graph runs again."""
    waits, last = Waits(seconds=30), Calls()
    pipeline = nested(waits, last)
    cancel = threading.Event()

    async def stopped() -> None:
        options: dict[str, Any] = {"timeout": {"timeout": 0.1}, "cancel": {"cancel": cancel}, "task": {}}[how]
        task = asyncio.create_task(pipeline.run_async({"x": 1}, **options))
        await asyncio.sleep(0.1)
        if how == "task":
            task.cancel()
        cancel.set()
        await task

    expected: dict[str, Any] = {"timeout": RunTimeoutError, "cancel": AbortRun, "task": asyncio.CancelledError}
    began = time.perf_counter()
    with pytest.raises(expected[how]) as caught:
        asyncio.run(stopped())
    assert time.perf_counter() - began < 1.0
    assert how == "task" or str(caught.value).startswith("p/g: the run ")
    assert (waits.ended, last.calls) == (["cancelled"], 0)
    waits.seconds = 0
    assert by_async(pipeline, {"x": 1})["y"][0] == 1


def test_a_timeout_of_the_block_itself_is_its_failure() -> None:
    """02 G-37: not mistaken for the timeout of the run."""

    class GivesUp(Waits):
        async def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
            async with asyncio.timeout(0.01):
                await asyncio.sleep(5)
            return {"y": None}

    with pytest.raises(NodeExecutionError, match="chain/n0 failed: TimeoutError"):
        by_async(chain(GivesUp()), {"x": 1}, timeout=10)


def test_an_outer_timeout_is_not_swallowed() -> None:
    """02 U-1: a deadline around the run stays the caller's own."""

    async def outer() -> None:
        async with asyncio.timeout(0.05):
            await chain(Waits(seconds=5)).run_async({"x": 1}, timeout=10)

    with pytest.raises(TimeoutError) as caught:
        asyncio.run(outer())
    assert not isinstance(caught.value, RunTimeoutError)


def test_a_loop_that_ends_early_leaves_nothing_behind() -> None:
    """02 G-31: the coroutine of a run that is never finished is closed, also from another context."""
    waits = Waits(seconds=30)

    async def started() -> Coroutine[Any, Any, Any]:
        running = nested(waits).run_async({"x": 1})
        asyncio.create_task(running)  # noqa: RUF006
        await asyncio.sleep(0.01)
        return running

    asyncio.run(started())
    assert waits.ended == ["cancelled"]
    assert current_context().path == ""


# ---- batches -------------------------------------------------------------------------------------------------------


def test_a_batch_is_the_runs_in_order() -> None:
    """02 G-43."""
    graph = nested(Where())
    batch = [{"x": [i]} for i in range(3)]
    assert graph.run_batch(batch, seed=3) == [graph.run(inputs, seed=3) for inputs in batch]
    assert graph.run_batch([]) == []


class Joined(Block):
    """Doubles; calls of several runs are computed at once, and `sizes` tells how many."""

    ports = (Port("x", "in", "any"), Port("y", "out", "any"))

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": inputs["x"] * 2 + current_context().node_seed() % 7}

    def batch_forward(self, inputs: dict[str, Any]) -> Generator[Any, Any, dict[str, Any]]:
        doubled = yield inputs["x"]
        return {"y": doubled + current_context().node_seed() % 7}

    def answer_batch(self, requests: Sequence[Any]) -> list[Any]:
        self.sizes.append(len(requests))
        if 13 in requests:
            raise ValueError("13 cannot be doubled")
        return [KeyError("99 alone") if request == 99 else request * 2 for request in requests]


def test_runs_of_a_batch_go_side_by_side_where_a_block_joins_them() -> None:
    """02 G-43: as one by one, on all levels and with one's own place; a failure is that of the node."""
    block = Joined()
    level = nested(block)
    batch = [{"x": i} for i in (1, 5, 8)]
    assert level.run_batch(batch, seed=3) == [level.run(inputs, seed=3) for inputs in batch]
    assert block.sizes == [3] and current_context().path == ""
    with pytest.raises(NodeExecutionError, match="13 cannot be doubled") as caught:
        level.run_batch([{"x": 1}, {"x": 13}])
    assert caught.value.__cause__ is not None
    assert "in items [0, 1] of the batch, which were computed together" in caught.value.__cause__.__notes__
    with pytest.raises(NodeExecutionError, match="99 alone") as alone:
        level.run_batch([{"x": 1}, {"x": 99}])
    assert alone.value.__notes__ == ["in item 1 of the batch"]
    with pytest.raises(MissingInputError) as missing:
        level.run_batch([{"x": 1}, {}])
    assert missing.value.__notes__ == ["in item 1 of the batch"]
    inside = chain(Affine())
    assert inside.run_batch([{"x": 1}, {"x": 2}]) == [inside.run({"x": i}) for i in (1, 2)]


def test_an_error_in_a_batch_names_the_item() -> None:
    with pytest.raises(MissingInputError) as caught:
        chain(Affine()).run_batch([{"x": 1}, {}])
    assert caught.value.__notes__ == ["in item 1 of the batch"]


# ---- streams -------------------------------------------------------------------------------------------------------


def test_pieces_then_the_whole() -> None:
    """02 G-43: pieces by exposed key with their place; the result comes from the last chunk only."""
    chunks = list(writer().stream({"prompt": "a calm sea"}))
    place = "g/write"
    assert chunks[:-1] == [Chunk({"text": w}, place) for w in ("a", "calm", "sea")]
    assert chunks[-1] == Chunk({"text": "a calm sea", "length": 10}, "g", final=True)


def test_a_block_with_stream_forward_needs_no_forward() -> None:
    """02 G-43: `run` gives what the generator returned."""
    assert writer().run({"prompt": "a calm sea"}) == {"text": "a calm sea", "length": 10}
    assert Writes().run({"x": "two words"}) == {"y": "two words", "length": 9}
    with pytest.raises(NotImplementedError, match=r"Nothing\.forward"):

        class Nothing(Block):
            pass

        Nothing().forward({})


def test_pieces_pass_through_nested_levels_under_their_keys() -> None:
    """02 G-43: only what each level exposes comes out."""
    pipeline = Pipeline("p")
    pipeline.add_graph(writer(), "one")
    pipeline.add_graph(writer(), "two")
    pipeline.add_edge("one", "text", "two", "prompt")
    pipeline.expose_input("one", "prompt", "ask")
    pipeline.expose_output("two", "text", "answer")
    chunks = list(pipeline.stream({"ask": "so it is"}))
    assert chunks[:-1] == [Chunk({"answer": w}, "p/two/write") for w in ("so", "it", "is")]
    assert chunks[-1].outputs == {"answer": "so it is"}


def test_pieces_in_a_loop_tell_their_iteration() -> None:
    graph = Graph("g")
    graph.add_node(Writes(), "write")
    graph.add_edge("write", "y", "write", "x", carry=True)
    graph.expose_input("write", "x", "x")
    graph.expose_output("write", "y", "y")
    chunks = list(graph.stream({"x": "on and"}, num_loop_steps=2))
    assert [(c.outputs["y"], c.iteration) for c in chunks] == [
        ("on", 0), ("and", 0), ("on", 1), ("and", 1), ("on and", None),
    ]  # fmt: skip


def test_the_producer_is_never_ahead_of_its_consumer() -> None:
    """02 G-43: backpressure."""
    block = Writes()
    stream = writer(block).stream({"prompt": "one two three"})
    assert block.said == []
    for n in (1, 2, 3):
        next(stream)
        assert len(block.said) == n
        assert current_context().path == ""


def test_closing_the_stream_stops_the_run() -> None:
    """02 G-43: at once, cleanly, on every level, and the graph runs again."""
    import torch

    block, after = Writes(), Calls()
    graph = writer(block)
    graph.add_node(after, "after")
    graph.add_edge("write", "y", "after", "x")
    graph.expose_output("after", "y", "done")
    pipeline = Pipeline.from_graph(graph)
    stream = pipeline.stream({"prompt": "one two three"})
    assert next(stream).outputs == {"text": "one"}
    began = time.perf_counter()
    stream.close()
    assert time.perf_counter() - began < 1.0
    assert (block.said, block.closed, after.calls) == (["one"], 1, 0)
    assert (current_context().path, torch.is_grad_enabled()) == ("", True)
    assert list(stream) == []
    assert by_stream(pipeline, {"prompt": "again"})["done"] == "again"


def test_cancel_and_timeout_reach_a_block_between_pieces() -> None:
    """02 U-1: also in `run`, where nobody reads the pieces."""
    for stop in ("cancel", "timeout"):
        for streamed in (True, False):
            cancel = threading.Event()

            class Endless(Writes):
                def stream_forward(self, inputs: dict[str, Any]) -> Generator[dict[str, Any], None, dict[str, Any]]:
                    try:
                        while True:
                            time.sleep(0.005)
                            self.said.append("on")
                            if len(self.said) == 3:
                                cancel.set()  # noqa: B023
                            yield {"y": "on"}
                    finally:
                        self.closed += 1

            block = Endless()
            options: dict[str, Any] = {"cancel": cancel} if stop == "cancel" else {"timeout": 0.05}
            with pytest.raises(AbortRun if stop == "cancel" else RunTimeoutError, match=r"^g: the run"):
                (by_stream if streamed else by_run)(writer(block), {"prompt": "x"}, **options)
            assert block.closed == 1
            assert stop == "timeout" or len(block.said) == 3


def test_nothing_leaks_between_a_stream_and_its_consumer() -> None:
    """02 G-39: two streams that take turns, and a consumer that trains in between."""
    import torch

    class Grad(Writes):
        def stream_forward(self, inputs: dict[str, Any]) -> Generator[dict[str, Any], None, dict[str, Any]]:
            for _ in range(3):
                yield {"y": f"{torch.is_grad_enabled()} {current_context().seed}"}
            return {"y": "", "length": 0}

    graph = writer(Grad())
    one, two = graph.stream({"prompt": ""}, seed=1), graph.stream({"prompt": ""}, seed=2)
    for _ in range(3):
        assert [next(s).outputs["text"] for s in (one, two)] == ["False 1", "False 2"]
        assert torch.is_grad_enabled()
        assert current_context().seed is None
    one.close()
    assert next(two).final


@pytest.mark.parametrize("piece", ["text", {"n": 1}, {"z": 1}])
def test_a_wrong_piece_is_an_error(piece: Any) -> None:
    """01 F-11."""
    with pytest.raises(NodeExecutionError, match=r"chain/n0 failed: OutputContractError: .*streamable output ports, here \['y'\]"):
        list(chain(Yields(piece=piece)).stream())


def test_a_failing_stream_names_its_place() -> None:
    class Breaks(Writes):
        def stream_forward(self, inputs: dict[str, Any]) -> Generator[dict[str, Any], None, dict[str, Any]]:
            yield {"y": "one"}
            raise ValueError("out of ink")

    stream = writer(Breaks()).stream({"prompt": "x"})
    assert next(stream).outputs == {"text": "one"}
    with pytest.raises(NodeExecutionError, match="g/write failed: ValueError: out of ink"):
        next(stream)


# ---- steps ---------------------------------------------------------------------------------------------------------


def test_each_node_waits_to_be_let_on() -> None:
    """02 U-9: path, level and inputs before each node of every level; nothing runs ahead."""
    calls = [Calls(), Calls()]
    steps = nested(*calls).steps({"x": 1})
    seen: list[Step] = []
    ran: list[int] = []
    for step in steps:
        seen.append(step)
        ran.append(sum(c.calls for c in calls))
        assert current_context().path == ""
    assert [(s.path, s.level, s.node_id, s.inputs) for s in seen] == [
        ("p/g", "pipeline", "g", {"x": 1}), ("p/g/n0", "graph", "n0", {"x": 1}), ("p/g/n1", "graph", "n1", {"x": 1}),
    ]  # fmt: skip
    assert ran == [0, 0, 1]
    assert steps.result == {"y": 1}


def test_iterations_are_steps_too() -> None:
    steps = cycle(Affine(scale=2)).steps({"x": 1}, num_loop_steps=3)
    assert [(s.iteration, s.inputs["x"]) for s in steps] == [(0, 1), (1, 2), (2, 4)]


def test_inputs_may_be_replaced_before_going_on() -> None:
    """02 U-9: injected intermediates."""
    steps = chain(Affine(offset=1), Affine(scale=10)).steps({"x": 1})
    for step in steps:
        if step.node_id == "n1":
            step.inputs["x"] = 5
    assert steps.result == {"y": 50}


def test_stopping_between_steps() -> None:
    """02 U-9: closes cleanly; there is no result."""
    first, second = Calls(), Calls()
    pipeline = nested(first, second)
    steps = pipeline.steps({"x": 1})
    for step in steps:
        if step.node_id == "n1":
            steps.close()
    assert (first.calls, second.calls) == (1, 0)
    with pytest.raises(NodeError, match="no result yet"):
        _ = steps.result
    assert pipeline.run({"x": 1}) == {"y": 1}


def test_a_level_without_nodes_of_its_own_is_not_called_twice() -> None:
    """02 G-31: a graph in two places steps through both."""
    graph = chain(Const(value=3))
    pipeline = Pipeline("p")
    pipeline.add_graph(graph, "a")
    pipeline.add_graph(graph, "b")
    assert [s.path for s in pipeline.steps()] == ["p/a", "p/a/n0", "p/b", "p/b/n0"]


def test_the_turns_of_an_agent_are_driven_alike(run: Run) -> None:
    """02 G-43, G-48: an agent and its tool, in every driver; what the agent says comes in pieces."""

    class Asks(Block):
        agentic = True
        role = "agent"
        ports = (
            Port("prompt", "in", "text"),
            Port("tool_results", "in", "list", optional=True),
            Port("answer", "out", "text", streamable=True),
            Port("tool_calls", "out", "list", optional=True),
        )

        def stream_forward(self, inputs: dict[str, Any]) -> Generator[dict[str, Any], None, dict[str, Any]]:
            results = inputs.get("tool_results")
            if not results:
                return {"answer": "", "tool_calls": [{"call_id": "1", "tool_id": "double", "arguments": {"x": 4}}]}
            yield {"answer": "it is "}
            yield {"answer": str(results[0]["result"])}
            return {"answer": f"it is {results[0]['result']}"}

    graph = Graph("g")
    graph.add_node(Asks(), "ask")
    graph.add_node(Affine(scale=2), "double")
    graph.add_tool("double", "double")
    graph.expose_input("ask", "prompt", "prompt")
    graph.expose_output("ask", "answer", "reply")
    expected = graph.run({"prompt": "twice four?"})
    assert expected == {"reply": "it is 8"}
    pipeline = Pipeline.from_graph(graph)
    for level in (graph, pipeline):
        assert run(level, {"prompt": "twice four?"}) == expected
        *pieces, _ = level.stream({"prompt": "twice four?"})
        assert [p.outputs["reply"] for p in pieces] == ["it is ", "8"]


class Near:
    """A transport that answers from a level in this process."""

    def __init__(self, level: Any) -> None:
        self.level = level

    def run(self, endpoint: Any, call: RemoteCall) -> RemoteAnswer:
        return RemoteAnswer(self.level.run(call.inputs, seed=call.options.seed))

    def spec(self, endpoint: Any, path: str) -> dict[str, Any]:
        raise NotImplementedError


def test_what_runs_elsewhere_is_one_call_in_every_driver(run: Run) -> None:
    """02 G-43, M-1: a remote graph alone, and as a node of a pipeline."""
    registry = BlockRegistry()
    registry.register_transport("near", lambda: Near(chain(Affine(scale=3))))
    contract = {"inputs": [{"key": "x", "types": ["number"]}], "outputs": [{"key": "y", "types": ["number"]}]}
    remote = Remote("far", endpoint={"url": "http://far", "transport": "near"}, contract=contract, registry=registry)
    assert run(remote, {"x": 2}) == {"y": 6}
    pipeline = nested(Affine(offset=1))
    pipeline.add_graph(remote)
    pipeline.add_edge("g", "y", "far", "x")
    assert run(pipeline, {"g:x": 1}) == {"far:y": 6}
    assert [s.path for s in pipeline.steps({"g:x": 1})] == ["p/g", "p/g/n0", "p/far"]
