"""Runs: hooks, options, context, seeds, modes, threads, large structures."""

from __future__ import annotations

import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from blocks_for_tests import (
    Add,
    Affine,
    Barrier,
    Calls,
    Const,
    Echo,
    Fails,
    Maybe,
    Modes,
    Sleeps,
    Talks,
    Weights,
    Where,
    chain,
    cycle,
)

from wg_core import Block, Graph, Pipeline, Port, current_context
from wg_core.errors import (
    AbortRun,
    ConfigError,
    CorruptSnapshotError,
    NodeError,
    NodeExecutionError,
    RunTimeoutError,
    UnexpectedInputError,
)
from wg_core.execution.blobs import MemoryBlobs
from wg_core.execution.context import Event, derive_seed
from wg_core.execution.node import LoopSpec
from wg_core.execution.plan import Placeholder


def pipeline_of(*blocks: Block) -> Pipeline:
    pipeline = Pipeline("p")
    pipeline.add_graph(chain(*blocks, id="g"))
    return pipeline


# ---- hooks -----------------------------------------------------------------------------------------------------------


def test_hooks_see_every_level_in_order() -> None:
    """02 G-45, G-46: registered and passed hooks both fire, with paths through the levels."""
    pipeline = Pipeline("p")
    pipeline.add_graph(cycle(Affine(scale=2), id="g"))
    registered: list[str] = []
    passed: list[Event] = []
    pipeline.hooks.append(lambda e: registered.append(e.kind))
    inner: list[str] = []
    pipeline.nodes["g"].child.hooks.append(lambda e: inner.append(e.kind))
    assert pipeline.run({"x": 1}, num_loop_steps=2, callbacks=[passed.append], trace_context="t") == {"y": 4}
    told = [(e.kind, e.path, e.level, e.iteration) for e in passed]
    assert told == [
        ("run_start", "p", "pipeline", None),
        ("node_start", "p/g", "pipeline", None),
        ("run_start", "p/g", "graph", None),
        ("loop_start", "p/g", "graph", None),
        ("node_start", "p/g/n0", "graph", 0),
        ("node_end", "p/g/n0", "graph", 0),
        ("loop_iteration", "p/g", "graph", 0),
        ("node_start", "p/g/n0", "graph", 1),
        ("node_end", "p/g/n0", "graph", 1),
        ("loop_iteration", "p/g", "graph", 1),
        ("loop_end", "p/g", "graph", 1),
        ("run_end", "p/g", "graph", None),
        ("node_end", "p/g", "pipeline", None),
        ("run_end", "p", "pipeline", None),
    ]
    assert registered == [e.kind for e in passed]
    assert inner == registered[2:-2]
    ended = passed[5]
    assert (ended.inputs, ended.outputs, ended.num_steps, ended.trace_context) == ({"x": 1}, {"y": 2}, 2, "t")
    assert ended.elapsed is not None
    assert ended.elapsed >= 0


def test_a_failing_hook_is_logged_and_does_not_stop_the_run(caplog: pytest.LogCaptureFixture) -> None:
    """02 G-47."""

    def broken(event: Event) -> None:
        raise RuntimeError("hook is broken")

    after: list[str] = []
    with caplog.at_level(logging.ERROR, "wg_core.events"):
        result = chain(Affine()).run({"x": 1}, callbacks=[broken, lambda e: after.append(e.kind)])
    assert result == {"y": 1}
    assert after == ["run_start", "node_start", "node_end", "run_end"]
    assert "hook is broken" in caplog.text
    assert "on node_start at chain/n0; the run goes on" in caplog.text


def test_abort_run_stops_cleanly_at_any_level() -> None:
    """02 G-47: AbortRun passes through unwrapped; the graph runs again afterwards."""
    second = Calls()
    pipeline = pipeline_of(Affine(), second)

    def stop(event: Event) -> None:
        if event.path == "p/g/n0" and event.kind == "node_end":
            raise AbortRun("enough")

    with pytest.raises(AbortRun, match="enough"):
        pipeline.run({"x": 1}, callbacks=[stop])
    assert second.calls == 0
    assert current_context().path == ""
    assert pipeline.run({"x": 1}) == {"y": 1}


def test_node_error_is_told_once_with_its_place() -> None:
    """02 G-37, G-46, 01 A-2: NodeExecutionError names the whole path and the kinds of the inputs, not their contents."""
    events: list[Event] = []
    with pytest.raises(NodeExecutionError) as caught:
        pipeline_of(Affine(), Fails()).run({"x": 4711}, callbacks=[events.append])
    assert str(caught.value) == "p/g/n1 failed: ValueError: out of ink (inputs: x: int)"
    errors = [e for e in events if e.kind == "node_error"]
    assert [(e.path, e.data["error"]) for e in errors] == [("p/g/n1", "ValueError: out of ink")]


@pytest.mark.parametrize("error", [KeyError("k"), StopIteration("s"), RuntimeError("r"), NotImplementedError()])
def test_any_exception_of_a_block_is_wrapped_with_its_cause(error: Exception) -> None:
    """02 G-37: also those that generators treat specially."""

    class Raises(Block):
        ports = (Port("y", "out"),)

        def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
            raise error

    graph = Graph("g")
    graph.add_node(Raises(), "a")
    with pytest.raises(NodeExecutionError, match=f"g/a failed: {type(error).__name__}") as caught:
        graph.run()
    assert caught.value.__cause__ is error
    assert current_context().path == ""


def test_blocks_may_speak_to_hooks_and_to_the_ledger() -> None:
    """02 G-46, 01 F-16."""
    events: list[Event] = []
    usage: list[dict[str, dict[str, int]]] = []

    class Ledger(Block):
        ports = (Port("x", "in"), Port("y", "out"))

        def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
            frame = current_context().frame
            assert frame is not None
            usage.append({m: dict(r) for m, r in frame.usage.items()})
            return {"y": inputs["x"]}

    pipeline_of(Talks(), Talks(), Ledger()).run({"x": 1}, callbacks=[events.append])
    spoken = [e for e in events if e.kind == "progress"]
    assert [(e.path, e.data) for e in spoken] == [("p/g/n0", {"text": "half way"}), ("p/g/n1", {"text": "half way"})]
    assert usage == [{"tiny": {"calls": 2, "prompt_tokens": 6, "completion_tokens": 4}}]


# ---- context and seeds -------------------------------------------------------------------------------------------------


def test_the_context_tells_where_a_block_runs() -> None:
    """01 F-16."""
    here = pipeline_of(Where()).run({"x": []}, seed=7, extra={"step": 3})["y"][0]
    assert {k: here[k] for k in ("path", "pipeline_id", "graph_id", "node_id", "seed", "step", "training")} == {
        "path": "p/g/n0", "pipeline_id": "p", "graph_id": "g", "node_id": "n0", "seed": 7, "step": 3, "training": False,
    }  # fmt: skip


def test_outside_a_run_the_context_works_and_keeps_nothing() -> None:
    """01 F-16, F-18."""
    assert Talks().run({"x": 1}) == {"y": 1}
    context = current_context()
    assert (context.path, context.seed, context.step) == ("", None, None)
    assert context.node_seed() == current_context().node_seed()
    sha = context.blobs.put(b"data")
    assert context.blobs.get(sha) == b"data"


def seeds(structure: Graph | Pipeline, **options: Any) -> list[int]:
    return [here["node_seed"] for here in structure.run({"x": []}, **options)["y"]]


def test_seeds_differ_by_run_seed_node_and_iteration_and_by_nothing_else() -> None:
    """02 G-44: equal seed, path and iteration give equal seeds."""
    graph = cycle(Where(), Where())
    first = seeds(graph, seed=1, num_loop_steps=3)
    assert len(set(first)) == 6
    assert seeds(graph, seed=1, num_loop_steps=3) == first
    assert seeds(cycle(Where(), Where(), id="other"), seed=1, num_loop_steps=3) == first
    assert not set(seeds(graph, seed=2, num_loop_steps=3)) & set(first)
    assert seeds(graph, num_loop_steps=3) == seeds(graph, seed=0, num_loop_steps=3)
    assert all(0 <= s < 2**63 for s in first)
    assert first[0] == derive_seed(1, "n0", 0)


def test_a_nested_graph_draws_anew_in_each_outer_iteration() -> None:
    """02 G-44: the iterations of all levels around a node count."""

    class Inner(Block):
        """A graph as a block."""

        ports = (Port("x", "in", "list"), Port("y", "out", "list"))

        def __init__(self) -> None:
            super().__init__()
            self.graph = chain(Where(), id="inner")

        def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
            return self.graph.forward(inputs)

    assert len(set(seeds(cycle(Inner()), seed=1, num_loop_steps=3))) == 3


def test_blobs_are_the_runs_own_unless_given() -> None:
    """Blobs in memory: found again by hash, verified, absent ones are named."""

    class Puts(Block):
        ports = (Port("y", "out", "text"),)

        def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
            return {"y": current_context().blobs.put(b"hello")}

    graph = Graph("g")
    graph.add_node(Puts(), "a")
    store = MemoryBlobs()
    sha = graph.run(blobs=store)["y"]
    assert store.has(sha)
    assert store.get(sha) == b"hello"
    with pytest.raises(CorruptSnapshotError, match="give the run the store that holds it"):
        MemoryBlobs().get(sha)


# ---- options -----------------------------------------------------------------------------------------------------------


def test_capture_adds_inner_values_to_the_result() -> None:
    """02 U: inner values by path, through the levels; an unknown one is named with near spellings."""
    pipeline = pipeline_of(Affine(scale=2), Affine(scale=3))
    assert pipeline.run({"x": 1}, capture=["g/n0:y"]) == {"y": 6, "g/n0:y": 2}
    assert cycle(Affine(scale=2)).run({"x": 1}, num_loop_steps=3, capture=["n0:y"]) == {"y": 8, "n0:y": 8}
    with pytest.raises(UnexpectedInputError, match="p: nothing to capture at 'g/n0:z'; did you mean 'g/n0:y'"):
        pipeline.run({"x": 1}, capture=["g/n0:z"])


def test_per_node_options_reach_one_child_only() -> None:
    """02 G-27, P-7."""
    pipeline = Pipeline("p")
    for name in ("g1", "g2"):
        pipeline.add_graph(cycle(Affine(scale=2), id=name))
    pipeline.add_edge("g1", "y", "g2", "x")
    assert pipeline.run({"g1:x": 1}, num_loop_steps=2) == {"g2:y": 16}
    assert pipeline.run({"g1:x": 1}, num_loop_steps=2, per_node={"g1": {"num_loop_steps": 5}}) == {"g2:y": 128}


@pytest.mark.parametrize("option", [{"num_loop_step": 3}, {"timeout": 1.0}, {"training": True}, {"callbacks": [print]}])
def test_options_that_cannot_be_set_for_one_node_are_refused(option: dict[str, Any]) -> None:
    """02 P-7, 01 A-2: ConfigError; what concerns the whole run is not silently dropped."""
    with pytest.raises(ConfigError, match=rf"per_node\['g'\]: {next(iter(option))!r} .*num_loop_steps"):
        pipeline_of(Affine()).run({"x": 1}, per_node={"g": option})


def test_unknown_options_are_refused() -> None:
    """02 G-27, 01 A-2."""
    with pytest.raises(UnexpectedInputError, match=r"chain\.run: .*'num_steps'; options are training, num_loop_steps"):
        chain(Affine()).run({"x": 1}, num_steps=3)


def test_timeout_stops_between_nodes_and_says_so() -> None:
    """02 G-27, 01 A-2: RunTimeoutError."""
    last = Calls()
    with pytest.raises(RunTimeoutError, match=r"longer than its timeout of 0\.02 s"):
        pipeline_of(Sleeps(seconds=0.05), last).run({"x": 1}, timeout=0.02)
    assert last.calls == 0
    assert chain(Affine()).run({"x": 1}, timeout=10) == {"y": 1}


def test_cancel_stops_a_loop_from_outside() -> None:
    """02 G-27: anything like `threading.Event`."""
    cancel = threading.Event()

    def at_third(event: Event) -> None:
        if event.kind == "loop_iteration" and event.iteration == 2:
            cancel.set()

    block = Calls()
    with pytest.raises(AbortRun, match="cycle: the run was cancelled"):
        cycle(block).run({"x": 1}, num_loop_steps=1000, cancel=cancel, callbacks=[at_third])
    assert block.calls == 3


def test_cancel_reaches_a_block_that_reports_progress() -> None:
    """02 G-27: a long call stops at its next event."""
    cancel = threading.Event()

    class Long(Block):
        ports = (Port("y", "out"),)

        def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
            for i in range(1000):
                current_context().emit("progress", done=i)
                if i == 5:
                    cancel.set()
            return {"y": 0}

    graph = Graph("g")
    graph.add_node(Long(), "a")
    with pytest.raises(AbortRun, match="cancelled"):
        graph.run(cancel=cancel)


def test_a_dry_run_calls_no_forward_and_gives_typed_placeholders() -> None:
    """02 G-41, 02 acceptance 7: same order and keys, nothing computed, no mode or device changed."""
    blocks = [Calls(), Modes(), Calls()]
    pipeline = Pipeline("p")
    pipeline.add_graph(chain(*blocks, id="g"))
    blocks[1].train()
    blocks[1].changes.clear()
    events: list[Event] = []
    result = pipeline.dry_run(callbacks=[events.append], device="meta")
    assert result == {"y": Placeholder(("any",), "n2.y")}
    assert [e.path for e in events if e.kind == "node_start"] == ["p/g", "p/g/n0", "p/g/n1", "p/g/n2"]
    assert [b.calls for b in (blocks[0], blocks[2])] == [0, 0]
    assert blocks[1].changes == []


def test_a_dry_run_walks_two_iterations_and_checks_given_inputs() -> None:
    """02 G-41: iterations 0 and 1 prove seeds and carries; wrong inputs are still refused."""
    graph = cycle(Affine(), Affine())
    events: list[Event] = []
    graph.dry_run(callbacks=[events.append])
    assert [e.iteration for e in events if e.kind == "loop_iteration"] == [0, 1]
    with pytest.raises(UnexpectedInputError, match="cycle has no input 'z'"):
        graph.dry_run({"z": 1})
    graph = Graph("agg")
    graph.add_node(Add(), "a", defaults={"a": 1})
    assert graph.dry_run() == {"y": Placeholder(("number",), "a.y")}


def test_optional_outputs_are_set_in_a_dry_run() -> None:
    """02 G-41."""
    assert set(chain(Maybe()).dry_run()) == {"y"}


# ---- modes, devices ----------------------------------------------------------------------------------------------------


def test_a_run_is_without_training_and_gradients_by_default() -> None:
    """02 G-39: blocks in eval mode, gradients off; prior modes come back."""
    block = Modes()
    block.train()
    graph = Graph("g")
    graph.add_node(block, "a")
    assert graph.run() == {"y": {"training": False, "grad": False}}
    assert block.training is True
    assert torch.is_grad_enabled()


def test_training_switches_only_blocks_of_trainable_nodes() -> None:
    """02 G-39: frozen ones stay in eval mode; gradients flow; all modes come back."""
    trained, frozen = Modes(), Modes()
    frozen.train()
    graph = Graph("g")
    graph.add_node(trained, "a")
    graph.add_node(frozen, "b", trainable=False)
    result = graph.run(training=True)
    assert result == {"a:y": {"training": True, "grad": True}, "b:y": {"training": False, "grad": True}}
    assert (trained.training, frozen.training) == (False, True)
    with torch.no_grad():
        assert graph.run(training=True)["a:y"]["grad"] is False  # the caller's choice stands


def test_modes_come_back_after_errors_too() -> None:
    """02 G-39."""
    block = Modes()
    graph = chain(block, Fails())
    with pytest.raises(NodeExecutionError):
        graph.run(training=True)
    assert block.training is False
    assert block.changes == [True, False]
    block.train()
    with pytest.raises(NodeExecutionError):
        graph.run()
    assert block.training is True
    assert torch.is_grad_enabled()


def test_gradients_flow_through_a_graph_only_in_training() -> None:
    """02 G-39: the executor never calls backward."""
    graph = chain(Weights(), Weights())
    x = torch.ones(1, 2)
    assert not graph.run({"x": x})["y"].requires_grad
    y = graph.run({"x": x}, training=True)["y"]
    y.sum().backward()
    assert all(p.grad is not None for p in graph.trainable_parameters())


def test_a_run_on_a_device_moves_its_inputs() -> None:
    """02 G-40: tensors also inside dicts, lists and tuples."""
    value = {"a": [torch.ones(2)], "b": (torch.ones(1), "text"), "c": 3}
    moved = chain(Echo()).run({"x": value}, device="meta")["y"]
    assert moved["a"][0].device.type == moved["b"][0].device.type == "meta"
    assert moved["b"][1] == "text"
    assert moved["c"] == 3
    assert value["a"][0].device.type == "cpu"


# ---- re-entrancy, change, size -----------------------------------------------------------------------------------------


def test_two_threads_run_one_graph_at_once() -> None:
    """02 G-31, 02 acceptance 8: distinct inputs, distinct results, while both are inside."""
    graph = chain(Affine(scale=2), Barrier(2), Affine(offset=1))
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda x: graph.run({"x": x})["y"], range(20)))
    assert results == [2 * x + 1 for x in range(20)]


def test_threads_have_their_own_iterations_and_seeds() -> None:
    """02 G-31, G-44."""
    graph = cycle(Where(), Barrier(2))
    graph.unexpose_output("y")
    graph.expose_output("n0", "y", "y")
    expected = seeds(cycle(Where(), Echo()), seed=1, num_loop_steps=5)
    with ThreadPoolExecutor(2) as threads:
        runs = list(threads.map(lambda n: seeds(graph, seed=n, num_loop_steps=5), (1, 2)))
    assert runs[0] == expected
    assert not set(runs[0]) & set(runs[1])


def test_a_graph_may_run_itself_from_within() -> None:
    """02 G-31: re-entrant."""
    graph = Graph("g")

    class Recursive(Block):
        ports = (Port("x", "in", "number"), Port("y", "out", "number"))

        def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
            x = inputs["x"]
            return {"y": 1 if x == 0 else x * graph.run({"x": x - 1})["y"]}

    graph.add_node(Recursive(), "a")
    assert graph.run({"x": 5}) == {"y": 120}


def test_a_change_of_the_structure_during_a_run_is_an_error() -> None:
    """02 G-30, 01 A-2: NodeError; the next run sees the new structure."""
    for structure in (chain(Affine(), id="g"), pipeline_of(Affine())):
        graph = structure if isinstance(structure, Graph) else structure.nodes["g"].child

        def change(event: Event, graph: Graph = graph) -> None:
            if event.kind == "node_start" and "late" not in graph.nodes:
                graph.add_node(Const(value=1), "late")

        with pytest.raises(NodeError, match="was changed while it ran; change structures between runs"):
            structure.run({"x": 1}, callbacks=[change])
        assert structure.run({"x": 1}) == {"y": 1}


def test_a_change_between_runs_is_seen() -> None:
    """02 G-30: nothing stale, also through a pipeline, also for steps in the metadata."""
    pipeline = pipeline_of(Affine(), Affine())
    assert pipeline.run({"x": 1}) == {"y": 1}
    graph = pipeline.nodes["g"].child
    graph.replace_block("n0", Affine(scale=5))
    assert pipeline.run({"x": 1}) == {"y": 5}
    looped = cycle(Affine(scale=2))
    assert looped.run({"x": 1}) == {"y": 2}
    looped.metadata["num_loop_steps"] = 3
    assert looped.run({"x": 1}) == {"y": 8}
    looped.set_loops([LoopSpec("n0", num_steps=4)])
    assert looped.run({"x": 1}) == {"y": 16}


def test_more_nodes_in_a_row_than_calls_may_nest() -> None:
    """02 G-29: no recursion limit anywhere: building, validating, planning, running, writing down."""
    n = 3000
    assert n > 2 * sys.getrecursionlimit()
    graph = Graph("long")
    block = Affine(offset=1)
    block.block_type = "test/affine"
    for i in range(n):
        graph.add_node(block, f"n{i}")
        if i:
            graph.add_edge(f"n{i - 1}", "y", f"n{i}", "x")
    graph.expose_input("n0", "x", "x")
    graph.expose_output(f"n{n - 1}", "y", "y")
    assert graph.run({"x": 0}) == {"y": n}
    assert len(graph.to_config()["nodes"]) == n
    graph.add_edge(f"n{n - 1}", "y", "n0", "x", carry=True)
    assert graph.run({"x": 0}, num_loop_steps=2) == {"y": 2 * n}
