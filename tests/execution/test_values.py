"""Where the value of an input comes from, and what is refused at the borders."""

from __future__ import annotations

from typing import Any

import pytest
from blocks_for_tests import Add, Affine, Const, Echo, Join, Maybe, Returns, Saw, chain

from wg_core import Block, Graph, Port
from wg_core.errors import MissingInputError, OutputContractError, PortValueError, UnexpectedInputError


def saw(**node: Any) -> Graph:
    graph = Graph("g")
    graph.add_node(Saw(), "a", **node)
    return graph


def test_an_optional_input_that_is_not_given_is_absent() -> None:
    """01 F-7, 02 G-28."""
    assert saw().run() == {"y": {"with_default": []}}


def test_an_explicit_none_is_a_value() -> None:
    """02 G-28, design 3: for inputs, defaults and what blocks return."""
    assert saw().run({"x": None}) == {"y": {"x": None, "with_default": []}}
    assert saw(defaults={"other": None}).run() == {"y": {"other": None, "with_default": []}}
    assert chain(Const(value=None), Saw()).run() == {"y": {"x": None, "with_default": []}}
    assert chain(Echo(), Echo()).run({"x": None}) == {"y": None}


def test_order_of_precedence() -> None:
    """01 F-7: edge, then exposed value, then node default, then port default."""
    graph = Graph("g")
    graph.add_node(Add(), "port_default")
    graph.add_node(Add(), "node_default", defaults={"b": 20})
    graph.add_node(Add(), "exposed", defaults={"b": 20})
    graph.add_node(Add(), "edge", defaults={"b": 20})
    graph.add_node(Const(value=40), "forty")
    graph.add_edge("forty", "y", "edge", "b")
    for node in ("port_default", "node_default", "exposed", "edge"):
        graph.expose_input(node, "a", "a")
        graph.expose_output(node, "y", node)
    graph.expose_input("exposed", "b", "b")
    assert graph.run({"a": 0, "b": 30}) == {"port_default": 10, "node_default": 20, "exposed": 30, "edge": 40}
    assert graph.run({"a": 0})["exposed"] == 20


def test_an_optional_output_that_was_not_set_falls_through_to_the_default() -> None:
    """01 F-7."""
    graph = Graph("g")
    graph.add_node(Maybe(), "m")
    graph.add_node(Add(), "n", defaults={"b": 7})
    graph.add_edge("m", "y", "n", "b")
    graph.expose_input("m", "x", "x")
    graph.expose_input("n", "a", "a")
    graph.expose_output("n", "y", "y")
    assert graph.run({"x": 1, "a": 0}) == {"y": 1}
    assert graph.run({"x": -1, "a": 0}) == {"y": 7}


def test_an_optional_output_into_a_required_input_without_default() -> None:
    """01 F-7, A-2: MissingInputError names the port and how to give it a default."""
    graph = chain(Maybe(), Affine())
    assert graph.run({"x": 1}) == {"y": 1}
    with pytest.raises(MissingInputError, match=r"chain/n1\.x is required, but .* was not set; .*defaults=\{'x': "):
        graph.run({"x": -1})


def test_an_exposed_optional_output_is_absent_when_it_was_not_set() -> None:
    """01 F-11: outputs may be optional."""
    graph = Graph("g")
    graph.add_node(Maybe(), "m")
    assert graph.run({"x": 1}) == {"y": 1, "sign": "+"}
    assert graph.run({"x": -1}) == {"sign": "-"}


def test_list_and_dict_defaults_are_copied_for_each_run() -> None:
    """02 G-28: an optional missing input gets a deep copy of the default."""

    class Grows(Block):
        ports = (Port("x", "in", "list", default=[0]), Port("y", "out", "list"))

        def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
            inputs["x"].append(1)  # a block that breaks the rule must not poison the next run
            return {"y": list(inputs["x"])}

    graph = Graph("g")
    graph.add_node(Grows(), "a")
    assert graph.run() == graph.run() == {"y": [0, 1]}
    assert Grows().run({}) == Grows().run({}) == {"y": [0, 1]}
    graph = Graph("g")
    graph.add_node(Grows(), "a", defaults={"x": [5]})
    assert graph.run() == graph.run() == {"y": [5, 1]}


def test_all_missing_inputs_are_named_at_once() -> None:
    """02 G-28, 01 A-2: MissingInputError."""
    graph = Graph("g")
    graph.add_node(Affine(), "a")
    graph.add_node(Affine(), "b")
    with pytest.raises(MissingInputError, match="g needs 'a:x', 'b:x'; given: nothing"):
        graph.run()
    with pytest.raises(MissingInputError, match="g needs 'b:x'; given: 'a:x'"):
        graph.run({"a:x": 1})
    with pytest.raises(MissingInputError, match="block 'Affine' needs 'x'; given: nothing"):
        Affine().run({})


def test_unknown_inputs_are_refused_with_near_spellings() -> None:
    """02 G-28, 01 A-2: UnexpectedInputError."""
    graph = chain(Affine())
    with pytest.raises(UnexpectedInputError, match="chain has no input 'xx'; did you mean 'x'"):
        graph.run({"xx": 1})
    with pytest.raises(UnexpectedInputError, match="block 'Affine' has no input 'z'; known: 'x'"):
        Affine().run({"z": 1})
    with pytest.raises(UnexpectedInputError, match="has no input 'y'"):
        Affine().run({"x": 1, "y": 1})


def test_inputs_are_addressed_by_key_by_node_port_or_by_pair() -> None:
    """02 G-19."""
    graph = chain(Affine(offset=1))
    assert graph.run({"x": 1}) == graph.run({"n0:x": 1}) == graph.run({("n0", "x"): 1}) == {"y": 2}
    with pytest.raises(UnexpectedInputError, match="n1"):
        graph.run({("n1", "x"): 1})


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ({"y": 1, "z": 2}, "g/a: its output has undeclared 'z'; it declares ['y']"),
        ({}, "g/a: its output lacks 'y'; it declares ['y']"),
        ({"z": 2}, "g/a: its output lacks 'y' and has undeclared 'z'"),
        (None, "g/a returned NoneType; a block returns a dict"),
        ([1], "g/a returned list of length 1; a block returns a dict"),
        ("y", "g/a returned str of length 1"),
    ],
)
def test_what_a_block_returns_is_what_it_declares(returned: Any, says: str) -> None:
    """01 F-11, A-2, design 3: undeclared outputs are an error, missing ones too; also stand-alone."""
    graph = Graph("g")
    graph.add_node(Returns(returned=returned), "a")
    with pytest.raises(OutputContractError) as caught:
        graph.run()
    assert says in str(caught.value)
    with pytest.raises(OutputContractError):
        Returns(returned=returned).run({})


def test_an_undeclared_output_beside_optional_ones_is_an_error_too() -> None:
    """01 F-11."""

    class Loose(Block):
        ports = (Port("y", "out", optional=True), Port("z", "out"))

        def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
            return {"z": 1, "w": 2}

    graph = Graph("g")
    graph.add_node(Loose(), "a")
    with pytest.raises(OutputContractError, match="g/a: its output has undeclared 'w'"):
        graph.run()


@pytest.mark.parametrize("how", ["concat", "sum", "first", "dict"])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_aggregation_in_a_run(how: str, number: int) -> None:
    """01 F-5, A-4, 02 G-17: the executor executes the policy, in edge order."""
    graph = Graph("g")
    graph.add_node(Join(how=how, optional=True), "j")
    for i in range(number):
        graph.add_node(Const(value=i + 1 if how == "sum" else [i]), f"c{i}")
        graph.add_edge(f"c{i}", "y", "j", "x")
    graph.expose_output("j", "y", "y")
    expected: dict[str, dict[int, Any]] = {
        "concat": {1: [0], 3: [0, 1, 2]},
        "sum": {1: 1, 3: 6},
        "first": {1: [0], 3: [0]},
        "dict": {1: {"c0:y": [0]}, 3: {"c0:y": [0], "c1:y": [1], "c2:y": [2]}},
    }
    assert graph.run() == {"y": expected[how].get(number, "nothing")}


def test_a_mapping_given_to_a_dict_port_from_outside_is_that_mapping() -> None:
    """01 F-5: `dict` always yields a mapping; one that is given whole is not wrapped again."""
    graph = Graph("g")
    graph.add_node(Join(how="dict"), "j")
    assert graph.run({"x": {"a": 1}}) == {"y": {"a": 1}}
    assert graph.run({"x": 5}) == {"y": {"run": 5}}


def test_an_aggregation_error_names_the_node() -> None:
    """01 F-5, A-2."""
    graph = Graph("g")
    graph.add_node(Join(how="sum"), "j")
    graph.add_node(Const(value="a"), "a")
    graph.add_node(Const(value=1), "b")
    graph.add_edge("a", "y", "j", "x")
    graph.add_edge("b", "y", "j", "x")
    with pytest.raises(PortValueError, match="g/j: port 'x' cannot sum these values: a:y: str of length 1, b:y: int"):
        graph.run()


def test_values_pass_by_reference() -> None:
    """02 G-31, 01 F-12."""
    value = [1, 2]
    assert chain(Echo(), Echo()).run({"x": value})["y"] is value


def test_strict_types_and_finite_numbers_on_request() -> None:
    """01 F-11: value checks are switchable; the message names the place, not the value."""
    graph = chain(Echo(), Affine())
    with pytest.raises(PortValueError, match=r"chain/n1\.x takes number but got str of length 3"):
        graph.run({"x": "abc"}, strict_types=True)
    with pytest.raises(PortValueError, match=r"chain/n1\.y is not finite: float"):
        chain(Affine(), Affine(scale=float("inf"))).run({"x": 1}, guard_nan=True)
    assert graph.run({"x": 1}, strict_types=True, guard_nan=True) == {"y": 1}
