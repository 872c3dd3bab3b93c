"""A value is let go after its last use."""

from __future__ import annotations

import weakref
from typing import Any

from blocks_for_tests import Calls, Echo, MakesThing, Reduces, Thing

from wg_core import Block, Graph, Port


class Watch:
    """Weak references to what was made, in order."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[Thing]] = []

    def __call__(self, thing: Thing) -> None:
        self.made.append(weakref.ref(thing))

    def alive(self) -> list[bool]:
        return [r() is not None for r in self.made]


def build(watch: Watch) -> tuple[Graph, Calls]:
    """make -> use -> probe: at the probe, nobody needs what `make` made."""
    graph = Graph("g")
    graph.add_node(MakesThing(watch), "make")
    graph.add_node(Reduces(), "use")
    graph.add_node(Reduces(), "between")
    probe = Calls(watch.alive)
    graph.add_node(probe, "probe")
    graph.add_edge("make", "y", "use", "x")
    graph.add_edge("use", "y", "between", "x")
    graph.add_edge("between", "y", "probe", "x")
    graph.expose_output("probe", "y", "y")
    return graph, probe


def test_released_after_the_last_use() -> None:
    """02 G-31."""
    watch = Watch()
    graph, probe = build(watch)
    graph.run()
    assert probe.seen == [[False]]


def test_kept_as_long_as_somebody_needs_it() -> None:
    """02 G-31: a second reader, or an exposed output, keeps it."""
    watch = Watch()
    graph, probe = build(watch)
    graph.add_node(Reduces(), "later")
    graph.add_edge("make", "y", "later", "x")
    graph.expose_output("later", "y", "later")
    graph.run()
    assert watch.alive() == [False]

    watch = Watch()
    graph, probe = build(watch)
    graph.expose_output("make", "y", "thing")
    result = graph.run()
    assert probe.seen == [[True]]
    assert isinstance(result["thing"], Thing)


def test_nothing_outlives_the_run() -> None:
    """02 G-30, G-31: neither the plan nor the graph keeps values of a run, also after an error."""
    watch = Watch()
    graph, _ = build(watch)
    graph.run()
    graph.run()
    assert watch.alive() == [False, False]


def test_an_output_that_nobody_reads_is_not_kept() -> None:
    """02 G-31."""

    class Both(MakesThing):
        ports = (Port("waste", "out"), Port("y", "out"))

        def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
            thing = Thing()
            self.watch(thing)
            return {"waste": thing, "y": 1}

    watch = Watch()
    graph = Graph("g")
    graph.add_node(Both(watch), "make")
    graph.add_node(Reduces(), "next")
    probe = Calls(watch.alive)
    graph.add_node(probe, "probe")
    graph.add_edge("make", "y", "next", "x")
    graph.add_edge("next", "y", "probe", "x")
    graph.expose_output("probe", "y", "y")
    graph.run()
    assert probe.seen == [[False]]


class StepTwo(MakesThing):
    """Makes a new thing from the carried one."""

    ports = (Port("x", "in"), Port("again", "in", "any", optional=True), Port("y", "out"))


def looped(watch: Watch) -> tuple[Graph, Calls, Calls]:
    """seed -> loop(step -> reduce -> inside) -> after -> probe."""
    graph = Graph("g")
    graph.add_node(MakesThing(watch), "seed")
    graph.add_node(StepTwo(watch), "step")
    graph.add_node(Reduces(), "reduce")
    inside = Calls(watch.alive)
    graph.add_node(inside, "inside")
    graph.add_node(Reduces(), "after")
    probe = Calls(watch.alive)
    graph.add_node(Reduces(), "between")
    graph.add_node(probe, "probe")
    graph.add_edge("seed", "y", "step", "x")
    graph.add_edge("step", "y", "reduce", "x")
    graph.add_edge("reduce", "y", "inside", "x")
    graph.add_edge("inside", "y", "step", "again", carry=True)  # keeps `reduce` and `inside` in the loop
    graph.add_edge("step", "y", "step", "x", carry=True)
    graph.add_edge("step", "y", "after", "x")
    graph.add_edge("after", "y", "between", "x")
    graph.add_edge("between", "y", "probe", "x")
    graph.expose_output("probe", "y", "y")
    return graph, inside, probe


def test_in_a_loop_the_seed_and_old_carries_are_let_go() -> None:
    """02 G-31, G-33: inside iteration k only what is carried on is alive, neither the seed nor older values."""
    watch = Watch()
    graph, inside, probe = looped(watch)
    graph.run(num_loop_steps=3)
    # made: seed, then one a step; `inside` runs after the step's thing was made and its predecessor read
    assert inside.seen == [[False, True], [False, False, True], [False, False, False, True]]
    assert probe.seen == [[False] * 4]


def test_what_a_loop_reads_from_outside_stays_until_its_end() -> None:
    """02 G-32: a constant of the loop is needed in every iteration, and let go after it."""

    class Uses(Block):
        ports = (Port("x", "in", "number"), Port("constant", "in"), Port("y", "out", "number"))

        def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
            assert isinstance(inputs["constant"], Thing)
            return {"y": inputs["x"] + 1}

    watch = Watch()
    graph = Graph("g")
    graph.add_node(MakesThing(watch), "make")
    graph.add_node(Uses(), "use")
    graph.add_node(Echo(), "next")
    probe = Calls(watch.alive)
    graph.add_node(probe, "probe")
    graph.add_edge("make", "y", "use", "constant")
    graph.add_edge("use", "y", "use", "x", carry=True)
    graph.add_edge("use", "y", "next", "x")
    graph.add_edge("next", "y", "probe", "x")
    graph.expose_input("use", "x", "x")
    graph.expose_output("probe", "y", "y")
    assert graph.run({"x": 0}, num_loop_steps=3) == {"y": 3}
    assert probe.seen == [[False]]
