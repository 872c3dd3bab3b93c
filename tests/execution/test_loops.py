"""Loops against results worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from blocks_for_tests import (
    Add,
    Affine,
    Calls,
    Const,
    Echo,
    Fails,
    Initial,
    Join,
    LoopInfo,
    Maybe,
    OwnSteps,
    Reached,
    TwoStep,
    chain,
    cycle,
)
from hypothesis import given
from hypothesis import strategies as st

from wg_core import Block, Graph, Port
from wg_core.errors import NodeExecutionError, PortValueError
from wg_core.execution.node import LoopSpec

whole = st.integers(-3, 3)


@given(a=whole, b=whole, c=whole, d=whole, x=whole, steps=st.integers(1, 6))
def test_a_cycle_of_two_equals_the_closed_form(a: int, b: int, c: int, d: int, x: int, steps: int) -> None:
    """02 G-29, G-33, 01 A-9: N iterations of y = c (a x + b) + d."""
    graph = cycle(Affine(scale=a, offset=b), Affine(scale=c, offset=d))
    expected = x
    for _ in range(steps):
        expected = c * (a * expected + b) + d
    assert graph.run({"x": x}, num_loop_steps=steps) == {"y": expected}


def test_carry_reads_the_value_of_the_previous_iteration() -> None:
    """02 G-33: a snapshot of k-1, never the latest in the buffer. Fibonacci needs both at once."""
    graph = Graph("fib")
    graph.add_node(Add(), "next")  # next = a + b
    graph.add_node(Echo(), "keep")  # what b was
    graph.add_edge("next", "y", "next", "b", carry=True)
    graph.add_edge("keep", "y", "next", "a", carry=True)
    graph.add_edge("next", "y", "keep", "x", carry=True)
    graph.expose_input("next", "a", "a")
    graph.expose_input("next", "b", "b")
    graph.expose_input("keep", "x", "b")
    graph.expose_output("next", "y", "y")
    numbers = [graph.run({"a": 0, "b": 1}, num_loop_steps=n)["y"] for n in range(1, 9)]
    assert numbers == [1, 2, 3, 5, 8, 13, 21, 34]


def test_what_comes_after_a_loop_sees_final_values_and_runs_once() -> None:
    """02 G-29, G-33, 01 A-9: the decoder runs once, after the loop."""
    graph = cycle(Affine(scale=2), Affine(offset=1))
    after = Calls()
    graph.add_node(after, "decode")
    graph.add_edge("n1", "y", "decode", "x")
    graph.unexpose_output("y")
    graph.expose_output("decode", "y", "y")
    assert graph.run({"x": 1}, num_loop_steps=4) == {"y": 31}
    assert after.calls == 1
    assert graph.plan().order() == ["n0", "n1", "decode"]


def test_what_comes_from_outside_is_constant_for_the_whole_loop() -> None:
    """02 G-32."""
    graph = Graph("g")
    graph.add_node(Const(value=5), "five")
    graph.add_node(Add(), "sum")
    graph.add_edge("five", "y", "sum", "b")
    graph.add_edge("sum", "y", "sum", "a", carry=True)
    graph.expose_input("sum", "a", "a")
    assert graph.run({"a": 0}, num_loop_steps=4) == {"sum:y": 20}


@pytest.mark.parametrize("how", ["exposed", "edge", "node default", "optional"])
def test_seeds(how: str) -> None:
    """02 G-33: iteration 0 reads the exposed value, else the edge from outside, else the default, else nothing."""
    graph = Graph("g")
    if how == "optional":
        graph.add_node(Join(how="first", optional=True), "n")
        graph.add_edge("n", "y", "n", "x", carry=True)
        graph.expose_output("n", "y", "y")
        assert graph.run(num_loop_steps=3) == {"y": "nothing"}
        return
    graph.add_node(Affine(scale=2), "n", defaults={"x": 3} if how == "node default" else {})
    graph.add_edge("n", "y", "n", "x", carry=True)
    graph.expose_output("n", "y", "y")
    if how == "edge":
        graph.add_node(Const(value=3), "three")
        graph.add_edge("three", "y", "n", "x")
    elif how == "exposed":
        graph.expose_input("n", "x", "x")
    assert graph.run({"x": 3} if how == "exposed" else {}, num_loop_steps=3) == {"y": 24}


def test_none_is_a_seed_and_a_carried_value() -> None:
    """02 G-28 in loops."""
    graph = cycle(Calls(), Calls())
    assert graph.run({"x": None}, num_loop_steps=3) == {"y": None}


def test_an_optional_output_carried_unset_falls_back_to_nothing() -> None:
    """02 G-33, 01 F-7: the carry of an unset output leaves the input as if nothing was fed."""

    class Counts(Block):
        ports = (Port("x", "in", "number", optional=True), Port("y", "out", "number"))

        def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
            return {"y": inputs.get("x", 100) - 1}

    graph = Graph("g")
    graph.add_node(Counts(), "count")
    graph.add_node(Maybe(), "maybe")
    graph.add_edge("count", "y", "maybe", "x")
    graph.add_edge("maybe", "y", "count", "x", carry=True)
    graph.expose_input("count", "x", "x")
    graph.expose_output("count", "y", "y")
    assert [graph.run({"x": 1}, num_loop_steps=n)["y"] for n in (1, 2, 3)] == [0, -1, 99]


def test_loop_ports_tell_index_and_total_also_to_what_seeds_the_loop() -> None:
    """02 G-35, design 3: the initializer receives `loop_total` of the loop that it seeds."""
    graph = Graph("g")
    graph.add_node(Initial(), "start")
    graph.add_node(LoopInfo(), "step")
    graph.add_edge("start", "y", "step", "x")
    graph.add_edge("step", "y", "step", "x", carry=True)
    graph.expose_output("step", "y", "y")
    assert graph.run(num_loop_steps=3) == {"y": [3, [0, 3], [1, 3], [2, 3]]}
    assert graph.run() == {"y": [1, [0, 1]]}


def test_loop_ports_are_absent_outside_a_loop() -> None:
    """02 G-35: optional reserved ports."""
    assert chain(LoopInfo()).run({"x": []}) == {"y": [[None, None]]}


def test_a_solver_may_need_another_number_of_iterations() -> None:
    """Design 3: `num_loop_steps` counts sampler steps, `iterations(steps)` says how often to run."""
    graph = Graph("g")
    graph.add_node(Initial(), "start")
    graph.add_node(TwoStep(), "heun")
    graph.add_edge("start", "y", "heun", "x")
    graph.add_edge("heun", "y", "heun", "x", carry=True)
    graph.expose_output("heun", "y", "y")
    assert graph.run(num_loop_steps=3) == {"y": [3, [0, 3], [1, 3], [2, 3], [3, 3], [4, 3]]}


def test_where_the_number_of_steps_comes_from() -> None:
    """02 G-34: run argument, then the loop's settings, then metadata, then the solver's configuration, then 1."""

    def steps(graph: Graph, **options: Any) -> int:
        return len(graph.run({"x": []}, **options)["y"])

    graph = cycle(OwnSteps(num_steps=4))
    assert steps(graph) == 4
    graph = cycle(OwnSteps(num_steps=4), id="m")
    graph.metadata["num_loop_steps"] = 5
    assert steps(graph) == 5
    graph.set_loops([LoopSpec("n0", num_steps=6)])
    assert steps(graph) == 6
    assert steps(graph, num_loop_steps=2) == 2
    assert steps(graph, num_loop_steps={"n0": 3}) == 3
    assert steps(graph, num_loop_steps={"other": 3}) == 6
    assert steps(cycle(LoopInfo())) == 1


@pytest.mark.parametrize("steps", [0, -1, True, 2.5, "3"])
def test_a_wrong_number_of_steps_is_named(steps: Any) -> None:
    """02 G-34, 01 A-2: PortValueError names the loop and the value."""
    with pytest.raises(PortValueError, match=r"cycle: loop 'n0' needs a whole number of steps >= 1, not "):
        cycle(Affine()).run({"x": 1}, num_loop_steps=steps)


def two_loops() -> Graph:
    graph = Graph("two")
    graph.add_node(Affine(scale=2), "double")
    graph.add_edge("double", "y", "double", "x", carry=True)
    graph.add_node(Affine(offset=1), "plus")
    graph.add_edge("double", "y", "plus", "x")
    graph.add_edge("plus", "y", "plus", "x", carry=True)
    graph.expose_input("double", "x", "x")
    graph.expose_output("plus", "y", "y")
    graph.expose_output("double", "y", "mid")
    return graph


def test_several_loops_in_one_graph_have_their_own_steps() -> None:
    """02 G-34, G-36."""
    graph = two_loops()
    assert graph.run({"x": 1}, num_loop_steps={"double": 5, "plus": 3}) == {"y": 35, "mid": 32}
    assert graph.run({"x": 1}, num_loop_steps=2) == {"y": 6, "mid": 4}
    graph.set_loops([LoopSpec("plus", num_steps=10)])
    assert graph.run({"x": 1}) == {"y": 12, "mid": 2}


def test_until_ends_a_loop_early() -> None:
    """02 G-35: N is the upper bound."""
    graph = Graph("g")
    graph.add_node(Affine(scale=2), "double")
    graph.add_node(Reached(limit=100), "check")
    graph.add_edge("double", "y", "check", "x")
    graph.add_edge("check", "y", "double", "x", carry=True)
    graph.expose_input("double", "x", "x")
    graph.expose_output("check", "y", "y")
    graph.set_loops([LoopSpec("double", num_steps=50, until={"node": "check", "port": "done"})])
    assert graph.run({"x": 1}) == {"y": 128}
    assert graph.run({"x": 200}) == {"y": 400}
    assert graph.run({"x": 1}, num_loop_steps=3) == {"y": 8}


def test_an_explicit_order_inside_the_loop() -> None:
    """02 G-32: overridable by `loops[].order`."""
    graph = Graph("g")
    for name in ("a", "b"):
        graph.add_node(Affine(offset=1), name)
    graph.add_edge("a", "y", "b", "x", carry=True)
    graph.add_edge("b", "y", "a", "x", carry=True)
    graph.expose_input("a", "x", "a")
    graph.expose_input("b", "x", "b")
    assert graph.plan().order() == ["a", "b"]
    graph.set_loops([LoopSpec("a", order=("b", "a"))])
    assert graph.plan().order() == ["b", "a"]


def test_data_and_carry_from_inside_the_loop_on_one_port() -> None:
    """02 G-33: iteration 0 reads what is made in the same iteration, later ones the carried value."""
    graph = Graph("g")
    graph.add_node(Affine(scale=10), "a")
    graph.add_node(Affine(offset=1), "b")
    graph.add_edge("a", "y", "b", "x")
    graph.add_edge("b", "y", "b", "x", carry=True)
    graph.add_edge("b", "y", "a", "x", carry=True)
    graph.expose_input("a", "x", "x")
    graph.expose_output("b", "y", "y")
    assert [graph.run({"x": 1}, num_loop_steps=n)["y"] for n in (1, 2, 3)] == [11, 12, 13]


def test_a_failure_in_a_loop_names_the_iteration() -> None:
    """02 G-37, 01 A-2: NodeExecutionError with path, iteration and input kinds; the cause is kept."""
    graph = cycle(Affine(), Fails(at=2))
    assert graph.run({"x": 1}, num_loop_steps=2) == {"y": 1}
    with pytest.raises(
        NodeExecutionError, match=r"cycle/n1 failed in iteration 2: ValueError: out of ink \(inputs: x: int\)"
    ) as caught:
        graph.run({"x": 1}, num_loop_steps=5)
    assert isinstance(caught.value.__cause__, ValueError)


def test_aggregating_input_with_data_and_carry() -> None:
    """02 G-17 in loops: the carry is one of the feeds; unset in iteration 0."""
    graph = Graph("g")
    graph.add_node(Const(value=[1]), "one")
    graph.add_node(Join(how="concat"), "join")
    graph.add_edge("one", "y", "join", "x")
    graph.add_edge("join", "y", "join", "x", carry=True)
    graph.expose_output("join", "y", "y")
    assert graph.run(num_loop_steps=3) == {"y": [1, 1, 1]}
