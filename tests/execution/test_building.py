"""Building a structure: nodes, edges, exposed ports; a failing call changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from blocks_for_tests import Add, Affine, Calls, Const, Echo, Join, Saw, Typed, chain, cycle

from wg_core import Block, Graph, Port
from wg_core.errors import ConfigError, EdgeError, NodeError
from wg_core.execution.node import LoopSpec
from wg_core.structure.topology import Edge


def snapshot(graph: Graph) -> dict[str, Any]:
    """All that a mutator could change."""
    return {
        "version": graph.version,
        "nodes": {k: (n.node_id, n.child, n.trainable, dict(n.defaults), dict(n.hints)) for k, n in graph.nodes.items()},
        "edges": graph.edges,
        "in": {n: list(graph.edges_in(n)) for n in graph.nodes},
        "out": {n: list(graph.edges_out(n)) for n in graph.nodes},
        "inputs": list(graph.exposures("in", explicit=True)),
        "outputs": list(graph.exposures("out", explicit=True)),
        "loops": list(graph.loops),
    }


def base() -> Graph:
    graph = Graph("g")
    graph.add_node(Affine(), "a")
    graph.add_node(Add(), "b")
    graph.add_node(Affine(), "c", defaults={"x": 0})
    graph.add_node(Typed(takes="text", gives="text", optional=True), "words")
    graph.add_edge("a", "y", "b", "a")
    graph.expose_input("a", "x", "x")
    graph.expose_output("b", "y", "y")
    return graph


FAILING: dict[str, tuple[Callable[[Graph], Any], type[Exception], str]] = {
    "taken id": (lambda g: g.add_node(Affine(), "a"), NodeError, "g: node id 'a' is taken; choose another"),
    "bad id": (lambda g: g.add_node(Affine(), "a-b"), ConfigError, "bad node id 'a-b': use a letter"),
    "default of an unknown port": (
        lambda g: g.add_node(Add(), "d", defaults={"bb": 1}), NodeError, "g/d: default for unknown input 'bb'; did you mean 'b'",
    ),
    "default of an output": (
        lambda g: g.add_node(Add(), "d", defaults={"y": 1}), NodeError, "g/d: default for unknown input 'y'",
    ),
    "unknown source": (
        lambda g: g.add_edge("aa", "y", "b", "b"), EdgeError, "g has no node 'aa'; did you mean 'a'",
    ),
    "unknown target": (lambda g: g.add_edge("a", "y", "bb", "b"), EdgeError, "g has no node 'bb'; did you mean 'b'"),
    "unknown port": (lambda g: g.add_edge("a", "yy", "b", "b"), EdgeError, "g/a has no port 'yy'; did you mean 'y'"),
    "output as target": (
        lambda g: g.add_edge("a", "y", "b", "y"), EdgeError, "g/b.y is an output where an input is needed; known: 'a', 'b'",
    ),
    "input as source": (lambda g: g.add_edge("a", "x", "b", "b"), EdgeError, "g/a.x is an input where an output is needed"),
    "types that do not meet": (
        lambda g: g.add_edge("a", "y", "words", "x"), EdgeError,
        "g/words.x takes 'text' but a.y gives 'number'; put a block between that converts it",
    ),
    "second feed of a single input": (
        lambda g: g.add_edge("c", "y", "b", "a"), EdgeError,
        "g/b.a takes one data edge and has a.y -> b.a; remove that edge, or declare an aggregation on the port",
    ),
    "self edge without carry": (
        lambda g: g.add_edge("b", "y", "b", "b"), EdgeError, "b.y -> b.b joins a node to itself; add carry=True",
    ),
    "half an edge": (lambda g: g.add_edge("a", "y", "b"), EdgeError, "an edge needs source node, source port"),
    "removing an unknown node": (lambda g: g.remove_node("bb"), NodeError, "g has no node 'bb'; did you mean 'b'"),
    "removing an unknown edge": (
        lambda g: g.remove_edge(Edge("a", "y", "b", "b")), EdgeError, "g has no edge a.y -> b.b",
    ),
    "renaming to a taken id": (lambda g: g.rename_node("a", "b"), NodeError, "g: node id 'b' is taken"),
    "renaming to a bad id": (lambda g: g.rename_node("a", "b c"), ConfigError, "bad node id 'b c'"),
    "replacing by other ports": (
        lambda g: g.replace_block("a", Const(value=1)), NodeError, "g/a: the new block lacks port 'x' (in number), which is in use; it has y (out any)",
    ),
    "replacing by other types": (
        lambda g: g.replace_block("a", Typed(takes="number", gives="text")), NodeError,
        "lacks port 'y' (out number), which is in use; it has x (in number), y (out text)",
    ),
    "exposing an unknown node": (lambda g: g.expose_input("z", "x"), NodeError, "g has no node 'z'"),
    "exposing an unknown port": (lambda g: g.expose_input("a", "xx"), NodeError, "g/a has no port 'xx'; did you mean 'x'"),
    "exposing an output as input": (lambda g: g.expose_input("a", "y"), NodeError, "g/a.y is an output where an input is needed"),
    "exposing a fed input": (
        lambda g: g.expose_input("b", "a"), EdgeError, "g/b.a is fed by a.y -> b.a already; remove the edge to expose the port",
    ),
    "exposing under a bad name": (lambda g: g.expose_input("b", "b", "my-name"), ConfigError, "bad exposed port name 'my-name'"),
    "exposing an input under a second name": (
        lambda g: g.expose_input("a", "x", "other"), NodeError, "g/a.x is exposed as 'x' already",
    ),
    "a taken output name": (
        lambda g: g.expose_output("a", "y", "y"), NodeError, "g offers an output 'y' already; output names are unique",
    ),
    "unexposing an unknown input": (lambda g: g.unexpose_input("xx"), NodeError, "g offers no input 'xx'; did you mean 'x'"),
    "unexposing an unknown output": (lambda g: g.unexpose_output("z"), NodeError, "g offers no output 'z'; known: 'y'"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILING)
def test_a_failing_call_names_both_sides_and_changes_nothing(case: str) -> None:
    """01 F-53, A-16, A-2, 02 G-9: every mutator is atomic, also for `version`."""
    call, error, says = FAILING[case]
    graph = base()
    before = snapshot(graph)
    with pytest.raises(error) as caught:
        call(graph)
    assert says in str(caught.value)
    assert snapshot(graph) == before
    assert graph.run({"x": 1}) == {"y": 11}


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.add_node(Const(value=1), "new"),
        lambda g: g.add_edge("a", "y", "b", "b"),
        lambda g: g.remove_edge(g.edges[0]),
        lambda g: g.remove_node("words"),
        lambda g: g.rename_node("a", "alpha"),
        lambda g: g.replace_block("a", Affine(scale=2)),
        lambda g: g.expose_output("a", "y", "mid"),
        lambda g: g.unexpose_output("y"),
        lambda g: g.infer_exposed_ports(overwrite=True),
        lambda g: g.set_default("b", "b", 3),
        lambda g: g.set_loops([LoopSpec("a")]),
    ],
)
def test_every_change_bumps_the_version(change: Callable[[Graph], Any]) -> None:
    """01 F-53, 02 G-18."""
    graph = base()
    before = graph.version
    change(graph)
    assert graph.version > before


def test_an_equal_edge_again_is_a_no_op() -> None:
    """01 F-50, 02 G-16."""
    graph = base()
    before = snapshot(graph)
    assert graph.add_edge("a", "y", "b", "a") == graph.edges[0]
    assert graph.add_edge(Edge("a", "y", "b", "a", origin="auto")) == graph.edges[0]
    assert snapshot(graph) == before


def test_one_output_may_feed_many_inputs_and_an_aggregating_input_takes_many_edges() -> None:
    """01 F-5."""
    graph = Graph("g")
    graph.add_node(Const(value="a"), "a")
    graph.add_node(Const(value="b"), "b")
    graph.add_node(Join(how="concat"), "j")
    graph.add_node(Echo(), "e")
    graph.add_edge("b", "y", "j", "x")
    graph.add_edge("a", "y", "j", "x")
    graph.add_edge("a", "y", "e", "x")
    assert graph.run() == {"j:y": "b\na", "e:y": "a"}  # in edge insertion order


def test_one_data_and_one_carry_edge_may_meet_in_a_single_input() -> None:
    """01 F-52, 02 G-17."""
    graph = Graph("g")
    graph.add_node(Const(value=1), "start")
    graph.add_node(Affine(offset=1), "n")
    graph.add_edge("start", "y", "n", "x")
    graph.add_edge("n", "y", "n", "x", carry=True)
    with pytest.raises(EdgeError, match=r"g/n\.x takes one carry edge and has n\.y ~> n\.x"):
        graph.add_node(Affine(), "m")
        graph.add_edge("m", "y", "n", "x", carry=True)


def test_aliases_are_stored_under_canonical_names() -> None:
    """01 T-3, F-10."""

    class Aliased(Block):
        ports = (
            Port("prompt", "in", "text", aliases=("text", "words")),
            Port("answer", "out", "text", aliases=("out",)),
        )

        def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
            return {"answer": inputs["prompt"]}

    graph = Graph("g")
    graph.add_node(Aliased(), "a")
    graph.add_node(Aliased(), "b", defaults={"words": "hi"})
    assert graph.nodes["b"].defaults == {"prompt": "hi"}
    graph.remove_node("b")
    graph.add_node(Aliased(), "b")
    assert graph.add_edge("a", "out", "b", "words") == Edge("a", "answer", "b", "prompt")
    graph.expose_input("a", "text", "x")
    assert graph.get_input_spec()[0]["port_name"] == "prompt"
    assert graph.run({"x": "hi"}) == {"b:answer": "hi"}
    assert Aliased().run({"text": "hi"}) == {"answer": "hi"}
    assert Aliased().get_port("out").name == "answer"


def test_removing_a_node_takes_its_edges_and_exposures_along() -> None:
    """02 G-18, G-9."""
    graph = base()
    graph.remove_node("a")
    assert graph.edges == ()
    assert graph.exposures("in", explicit=True) == []
    assert list(graph.edges_in("b")) == []
    graph.expose_input("b", "a", "x")
    assert graph.run({"x": 1}) == {"y": 11}


def test_renaming_keeps_edges_exposures_loops_and_order() -> None:
    """02 G-18."""
    graph = cycle(Affine(scale=2), Affine(offset=1))
    graph.set_loops([LoopSpec("n0", num_steps=3, order=("n0", "n1"))])
    expected = graph.run({"x": 1})
    graph.rename_node("n0", "first")
    assert list(graph.nodes) == ["first", "n1"]
    assert graph.run({"x": 1}) == expected
    assert graph.plan().loops[0].loop_id == "first"


def test_replacing_a_block_keeps_wiring_and_defaults() -> None:
    """02 G-18: same ports, another block."""

    class NoB(Block):
        ports = (Port("a", "in", "number"), Port("y", "out", "number"))

    graph = base()
    graph.replace_block("a", Affine(scale=5))
    assert graph.run({"x": 1}) == {"y": 15}
    graph.set_default("b", "b", 0)
    with pytest.raises(NodeError, match="g/b: the new block lacks port 'b'"):
        graph.replace_block("b", NoB())


def test_fan_out_of_one_input_name() -> None:
    """02 G-20: one name, several ports; the spec shows one entry with a list of bindings."""
    graph = Graph("g")
    graph.add_node(Affine(scale=2), "a")
    graph.add_node(Saw(), "b")
    graph.expose_input("a", "x", "x")
    graph.expose_input("b", "x", "x")
    entry, *rest = graph.get_input_spec()
    assert rest == []
    assert entry["key"] == "x"
    assert entry["required"] is True
    assert entry["bindings"] == [{"node_id": "a", "port_name": "x"}, {"node_id": "b", "port_name": "x"}]
    assert graph.run({"x": 3}) == {"a:y": 6, "b:y": {"x": 3, "with_default": []}}


def test_specs_name_all_that_a_caller_needs() -> None:
    """01 F-55, 02 G-22."""
    graph = base()
    graph.expose_input("b", "b", "b")
    assert [(e["key"], e["types"], e["required"], e.get("default")) for e in graph.get_input_spec()] == [
        ("x", ["number"], True, None),
        ("b", ["number"], False, 10),
    ]
    entry = graph.get_output_spec()[0]
    assert set(entry) >= {"key", "name", "node_id", "port_name", "bindings", "types", "optional", "streamable", "schema"}


def test_without_a_word_a_lone_child_offers_its_own_keys() -> None:
    """Design 3: nothing exposed."""
    graph = Graph("g")
    graph.add_node(Add(), "a")
    assert [e["key"] for e in graph.get_input_spec()] == ["a", "b"]
    assert graph.run({"a": 1}) == {"y": 11}
    graph.add_node(Affine(), "b")
    assert [e["key"] for e in graph.get_input_spec()] == ["a:a", "a:b", "b:x"]


def test_infer_exposed_ports_acts_where_nothing_was_said() -> None:
    """02 G-21: per direction; `overwrite` resets; keys are `node:port`."""
    graph = base()
    graph.remove_node("words")
    graph.remove_node("c")
    graph.infer_exposed_ports()
    assert [e["key"] for e in graph.get_input_spec()] == ["x"]
    graph.infer_exposed_ports(overwrite=True)
    assert [e["key"] for e in graph.get_input_spec()] == ["a:x", "b:b"]
    assert [e["key"] for e in graph.get_output_spec()] == ["b:y"]


def test_defaults_and_loops_are_changed_through_the_graph_only() -> None:
    """02 G-30: what the plan depends on cannot change behind its back."""
    graph = base()
    assert graph.run({"x": 1}) == {"y": 11}
    with pytest.raises(TypeError):
        graph.nodes["b"].defaults["b"] = 5  # type: ignore[index]
    with pytest.raises(AttributeError):
        graph.loops.append(LoopSpec("a"))  # type: ignore[attr-defined]
    graph.set_default("b", "b", 5)
    assert graph.run({"x": 1}) == {"y": 6}
    graph.set_default("b", "b")
    assert graph.run({"x": 1}) == {"y": 11}
    with pytest.raises(NodeError, match="g/b: default for unknown input 'bb'; did you mean 'b'"):
        graph.set_default("b", "bb", 5)


def test_a_node_may_be_added_whole_and_the_same_block_sits_in_several() -> None:
    """01 F-48, 02 G-11."""
    block = Calls()
    graph = chain(block, block)
    assert graph.run({"x": 1}) == {"y": 1}
    assert block.calls == 2
    assert list(graph.iter_blocks()) == [block]
