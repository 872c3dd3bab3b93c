"""Ports: declaration, compatibility, value kinds."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wg_core import Block, Port
from wg_core.errors import PortError, PortValueError
from wg_core.structure.port import UNSET, port_types, register_port_type

TYPES = (
    "any", "tensor", "number", "text", "list", "dict", "image", "audio", "video", "bytes", "ref", "link", "world",
)  # fmt: skip


def out(types: str | tuple[str, ...]) -> Port:
    return Port("y", "out", types)  # type: ignore[arg-type]


def into(types: str | tuple[str, ...]) -> Port:
    return Port("x", "in", types)  # type: ignore[arg-type]


def test_all_types_of_the_spec_exist() -> None:
    """01 F-3: the port types."""
    assert set(TYPES) <= set(port_types())


@pytest.mark.parametrize(("source", "target"), list(itertools.product(TYPES, TYPES)))
def test_matrix_of_single_types(source: str, target: str) -> None:
    """01 F-4, A-3: equal types or `any` meet, nothing else; never a silent conversion."""
    expected = source == target or "any" in (source, target)
    assert out(source).compatible_with(into(target)) is expected
    assert out(source).partly_compatible_with(into(target)) is False


pairs = st.lists(st.sampled_from(TYPES), min_size=1, max_size=4, unique=True).map(tuple)


@given(pairs, pairs)
def test_matrix_of_unions(source: tuple[str, ...], target: tuple[str, ...]) -> None:
    """01 F-4, A-3: unions meet where any type of the source fits; a partial overlap is told apart."""
    fits = ["any" in (*source, *target) or s in target for s in source]
    assert out(source).compatible_with(into(target)) is any(fits)
    partial = "any" not in (*source, *target) and any(fits) and not all(fits)
    assert out(source).partly_compatible_with(into(target)) is partial


def test_union_spelled_with_bars_equals_a_tuple() -> None:
    """01 F-3."""
    assert Port("x", "in", "text|list") == Port("x", "in", ("text", "list"))


def test_directions_must_be_out_and_in() -> None:
    """01 F-4: false unless the edge leads from an output to an input."""
    assert not into("text").compatible_with(out("text"))
    assert not out("text").compatible_with(out("text"))
    assert not into("text").compatible_with(into("text"))


def test_a_registered_subtype_is_accepted_where_its_supertype_is() -> None:
    """01 F-3, F-4: new types without editing the core, one way only."""
    register_port_type("test_sketch", subtype_of="image")
    register_port_type("test_sketch", subtype_of="image")  # again: nothing changes
    assert out("test_sketch").compatible_with(into("image"))
    assert not out("image").compatible_with(into("test_sketch"))
    assert out("test_sketch").compatible_with(into("test_sketch"))
    assert into("test_sketch").accepts(np.zeros((1, 3, 2, 2)))
    assert not into("test_sketch").accepts("a picture")


def test_a_registered_type_with_its_own_check() -> None:
    """01 F-3."""
    register_port_type("test_even", check=lambda v: isinstance(v, int) and v % 2 == 0)
    assert into("test_even").accepts(4)
    assert not into("test_even").accepts(3)


@pytest.mark.parametrize(
    ("name", "supertype", "says"),
    [
        ("Bad-Name", None, "bad port type name 'Bad-Name'"),
        ("test_orphan", "imag", "did you mean 'image'"),
        ("image", "tensor", "'image' is registered already"),
    ],
)
def test_a_wrong_port_type_is_refused(name: str, supertype: str | None, says: str) -> None:
    """01 F-1, A-2: PortError names the type and the way out."""
    with pytest.raises(PortError, match=says):
        register_port_type(name, subtype_of=supertype)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "Text", "direction": "in"}, "bad port name 'Text'"),
        ({"name": "", "direction": "in"}, "bad port name ''"),
        ({"name": "a.b", "direction": "in"}, "bad port name 'a.b'"),
        ({"name": "x\n", "direction": "in"}, "bad port name"),
        ({"name": 3, "direction": "in"}, "bad port name 3"),
        ({"name": "x", "direction": "sideways"}, "'in' or 'out', not 'sideways'"),
        ({"name": "x", "direction": "in", "types": "txt"}, "unknown type 'txt'; did you mean 'text'"),
        ({"name": "x", "direction": "in", "types": ()}, "no type given"),
        ({"name": "x", "direction": "in", "aggregation": "mean"}, "'mean' is none of single, concat"),
        ({"name": "y", "direction": "out", "aggregation": "sum"}, "output port 'y' cannot aggregate"),
        ({"name": "y", "direction": "out", "default": 1}, "output port 'y' cannot have a default"),
        ({"name": "x", "direction": "in", "aggregation": "sum", "agg_dim": 1}, "belong to 'concat', not to 'sum'"),
        ({"name": "x", "direction": "in", "agg_sep": ","}, "belong to 'concat', not to 'single'"),
    ],
)
def test_a_wrong_port_is_refused(arguments: dict[str, object], says: str) -> None:
    """01 F-1, F-2, A-2: PortError names the port and what is legal."""
    with pytest.raises(PortError, match=says):
        Port(**arguments)  # type: ignore[arg-type]


def test_a_port_is_an_immutable_value() -> None:
    """01 F-2."""
    port = Port("x", "in", "text", aliases=("words",))
    assert port == Port("x", "in", ("text",), aliases=("words",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        port.name = "y"  # type: ignore[misc]


@pytest.mark.parametrize(
    "ports",
    [
        (Port("x", "in"), Port("x", "out")),
        (Port("x", "in"), Port("z", "in", aliases=("x",))),
        (Port("x", "in", aliases=("w",)), Port("z", "out", aliases=("w",))),
        (Port("y", "in", aliases=("x",)), Port("z", "out"), Port("x", "in")),
    ],
)
def test_port_names_are_unique_in_a_block(ports: tuple[Port, ...]) -> None:
    """01 F-2: across both directions, aliases included (but see T-15); the class itself is refused."""
    with pytest.raises(PortError, match=r"Twice: port name '[xw]' occurs twice"):
        type("Twice", (Block,), {"ports": ports})


def test_required_means_neither_optional_nor_defaulted() -> None:
    """01 F-7."""
    assert Port("x", "in").required
    assert not Port("x", "in", optional=True).required
    assert not Port("x", "in", default=None).required
    assert Port("x", "in").default is UNSET
    assert not UNSET


@pytest.mark.parametrize(
    ("types", "good", "bad"),
    [
        ("tensor", np.zeros(2), [1, 2]),
        ("number", 3, "3"),
        ("number", np.float32(1), None),
        ("text", "a", 1),
        ("text", ["a", "b"], ["a", 1]),
        ("list", [1], {"a": 1}),
        ("list", (1,), "a"),
        ("dict", {"a": 1}, [1]),
        ("image", np.zeros((1, 3, 2, 2)), "a.png"),
        ("audio", {"waveform": [0.0], "sample_rate": 8000}, {"sample_rate": 8000}),
        ("video", np.zeros((1, 2, 3, 2, 2)), []),
        ("bytes", b"a", "a"),
        ("ref", "file.png", 1),
        ("link", {"target_kind": "world", "target_id": "w"}, "w"),
        ("text|number", 1, {}),
    ],
)
def test_kinds_of_values(types: str, good: object, bad: object) -> None:
    """01 F-8, F-11: what `strict_types` accepts on a port."""
    assert into(types).accepts(good)
    assert not into(types).accepts(bad)


def test_strict_types_names_port_and_both_kinds_but_not_the_content() -> None:
    """01 F-11, A-2: PortValueError."""

    class Upper(Block):
        ports = (Port("text", "in", "text"), Port("out", "out", "text"))

        def forward(self, inputs: dict[str, object]) -> dict[str, object]:
            return {"out": inputs["text"]}

    assert Upper().run({"text": "a"}, strict_types=True) == {"out": "a"}
    with pytest.raises(PortValueError, match=r"Upper\.text takes text but got list of length 1") as caught:
        Upper().run({"text": [42]}, strict_types=True)
    assert "42" not in str(caught.value)
