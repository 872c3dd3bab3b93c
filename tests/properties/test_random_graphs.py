"""Random structures against a reference that reads like the definition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from blocks_for_tests import new_registry
from hypothesis import given, settings
from hypothesis import strategies as st

from wg_core import Block, BlockRegistry, Graph, ModelPool, Port
from wg_core.execution.node import LoopSpec

PRIME = 1_000_003  # numbers stay small, and a wrong order or a wrong feed shows


class Mix(Block):
    """`y = a + 7 * (sum of xs) + 31 * b` modulo a prime; `b` may be absent, `c` has a default."""

    ports = (
        Port("xs", "in", "number", optional=True, aggregation="sum"),
        Port("b", "in", "number", optional=True),
        Port("c", "in", "number", default=5),
        Port("y", "out", "number"),
        Port("big", "out", "number", optional=True),
    )

    def __init__(self, *, a: int = 0) -> None:
        super().__init__()
        self.a = a

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        y = mix(self.a, inputs.get("xs"), inputs.get("b"), inputs["c"])
        return {"y": y, "big": y} if y % 2 else {"y": y}


def mix(a: int, xs: int | None, b: int | None, c: int) -> int:
    return (a + 7 * (0 if xs is None else xs) + 31 * (0 if b is None else b + 1) + 101 * c) % PRIME


def registry() -> BlockRegistry:
    made = new_registry()
    made.register("test/mix", Mix)
    return made


@dataclass
class Plan:
    """A random structure: nodes are numbers, an edge leads from a node's port to another node's port."""

    values: list[int]
    edges: list[tuple[int, str, int, str]]
    carries: list[tuple[int, int]]
    defaults: dict[int, int]
    exposed: list[int]
    steps: int

    def feeds(self, node: int, port: str) -> list[tuple[int, str]]:
        return [(s, p) for s, p, t, q in self.edges if (t, q) == (node, port)]


@st.composite
def plans(draw: st.DrawFn, loops: bool) -> Plan:
    n = draw(st.integers(1, 7))
    values = draw(st.lists(st.integers(0, 99), min_size=n, max_size=n))
    edges: list[tuple[int, str, int, str]] = []
    carries: list[tuple[int, int]] = []
    single: set[tuple[int, str]] = set()
    for target in range(n):
        for source in draw(st.lists(st.integers(0, max(0, target - 1)), max_size=3, unique=True)) if target else []:
            out, into = draw(st.sampled_from(["y", "big"])), draw(st.sampled_from(["xs", "b", "c"]))
            if into != "xs":
                if (target, into) in single:
                    continue
                single.add((target, into))
            edges.append((source, out, target, into))
    if loops:
        # a ring over all nodes: 0 -> 1 -> ... -> n-1 ~> 0, so that everything is one loop
        edges += [(i, "y", i + 1, "xs") for i in range(n - 1) if (i, "y", i + 1, "xs") not in edges]
        carries.append((n - 1, 0))
        for target in draw(st.lists(st.integers(1, n - 1), max_size=2, unique=True)) if n > 1 else []:
            if (target, "b") not in single:
                carries.append((draw(st.integers(target, n - 1)), target))
    defaults = draw(st.dictionaries(st.integers(0, n - 1), st.integers(0, 9), max_size=3))
    exposed = draw(st.lists(st.integers(0, n - 1), max_size=3, unique=True))
    exposed = [i for i in exposed if (i, "b") not in single]
    return Plan(values, edges, carries, defaults, exposed, draw(st.integers(1, 4)) if loops else 1)


def build(plan: Plan, nodes: list[int], edges: list[tuple[int, str, int, str]]) -> Graph:
    """The structure, with nodes and edges added in the given order."""
    made, pool = registry(), ModelPool()
    graph = Graph("g")
    for i in nodes:
        defaults = {"c": plan.defaults[i]} if i in plan.defaults else {}
        graph.add_node("test/mix", f"n{i}", config={"a": plan.values[i]}, defaults=defaults, registry=made, pool=pool)
    for s, p, t, q in edges:
        graph.add_edge(f"n{s}", p, f"n{t}", q)
    for s, t in plan.carries:
        graph.add_edge(f"n{s}", "y", f"n{t}", "b", carry=True)
    for i in plan.exposed:
        graph.expose_input(f"n{i}", "b", f"in{i}")
    for i in range(len(plan.values)):
        graph.expose_output(f"n{i}", "y", f"out{i}")
    if plan.carries:
        graph.set_loops([LoopSpec("n0", num_steps=plan.steps)])
    return graph


def reference(plan: Plan, given: dict[str, int]) -> dict[str, int]:
    """What the structure means, worked out node by node without any engine."""
    before: dict[int, int] = {}
    now: dict[int, int] = {}
    for _ in range(plan.steps):
        before, now = now, {}
        for i, a in enumerate(plan.values):  # edges lead upwards, so the numbers are an order

            def fed(port: str, i: int = i, now: dict[int, int] = now) -> list[int]:
                found = [(now[s], p) for s, p in plan.feeds(i, port)]
                return [y for y, p in found if p == "y" or y % 2]

            xs = fed("xs")
            b = next(iter(fed("b")), given.get(f"in{i}"))
            for s, t in plan.carries:
                if t == i and s in before:
                    b = before[s]
            c = next(iter(fed("c")), plan.defaults.get(i, 5))
            now[i] = mix(a, sum(xs) if xs else None, b, c)
    return {f"out{i}": y for i, y in now.items()}


def given_to(plan: Plan) -> dict[str, int]:
    return {f"in{i}": 11 * i for i in plan.exposed[::2]}


@given(plans(loops=False))
def test_random_dags_equal_the_reference(plan: Plan) -> None:
    """02 G-27 to G-33, 01 F-5, F-7."""
    graph = build(plan, list(range(len(plan.values))), plan.edges)
    assert graph.run(given_to(plan)) == reference(plan, given_to(plan))


@given(plans(loops=True))
def test_random_loops_equal_the_reference(plan: Plan) -> None:
    """02 G-32, G-33."""
    graph = build(plan, list(range(len(plan.values))), plan.edges)
    assert graph.run(given_to(plan)) == reference(plan, given_to(plan))
    assert graph.run(given_to(plan), strict_types=True) == reference(plan, given_to(plan))


@given(plans(loops=False) | plans(loops=True), st.randoms(use_true_random=False))
def test_the_order_of_insertion_does_not_matter(plan: Plan, random: Any) -> None:
    """02 G-29: results are a function of the structure."""
    nodes, edges = list(range(len(plan.values))), list(plan.edges)
    random.shuffle(nodes)
    random.shuffle(edges)
    assert build(plan, nodes, edges).run(given_to(plan)) == reference(plan, given_to(plan))


@given(plans(loops=False) | plans(loops=True))
@settings(max_examples=60)
def test_random_structures_come_back_from_their_configuration(plan: Plan) -> None:
    """01 A-15, 02 G-51: to_config -> from_config gives an equal config and equal results."""
    graph = build(plan, list(range(len(plan.values))), plan.edges)
    config = graph.to_config()
    again = Graph.from_config(config, registry=registry(), pool=ModelPool())
    assert again.to_config() == config
    assert again.run(given_to(plan)) == graph.run(given_to(plan))
    assert again.plan().order() == graph.plan().order()


@given(plans(loops=False) | plans(loops=True), st.data())
@settings(max_examples=60)
def test_adding_and_removing_again_changes_nothing(plan: Plan, data: st.DataObject) -> None:
    """01 F-50, F-53, 02 G-18: mutators undo each other; indices stay in step with the edges."""
    graph = build(plan, list(range(len(plan.values))), plan.edges)
    config = graph.to_config()
    name = f"n{data.draw(st.integers(0, len(plan.values) - 1))}"
    graph.rename_node(name, "elsewhere")
    graph.rename_node("elsewhere", name)
    graph.add_node("test/mix", "extra", registry=registry())
    edge = graph.add_edge(name, "y", "extra", "xs")
    graph.remove_edge(edge)
    graph.add_edge(name, "y", "extra", "xs")
    graph.remove_node("extra")
    assert graph.to_config() == config
    for node in graph.nodes:
        assert list(graph.edges_in(node)) == [e for e in graph.edges if e.target_node == node]
        assert list(graph.edges_out(node)) == [e for e in graph.edges if e.source_node == node]
    assert graph.run(given_to(plan)) == reference(plan, given_to(plan))
