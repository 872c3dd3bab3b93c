"""Each validation code that is raised where a mistake is made or read, with its place and the way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_validation
from blocks_for_tests import Add, Affine, Const, Echo, Typed, chain, new_registry

from wg_core import Block, Graph, ModelPool, Pipeline, WGError, World, register_block
from wg_core.levels.remote import Remote

ALL = {
    "BLANK_FIELD", "BAD_ID", "UNKNOWN_NODE", "UNKNOWN_PORT", "WRONG_DIRECTION", "TYPE_MISMATCH", "FAN_IN", "REQUIRED_UNFED",
    "EXPOSURE_BROKEN", "EXPOSURE_CLASH", "EXPOSED_AND_WIRED", "LOOP_NO_SEED", "LOOP_ORDER", "LOOP_STEPS", "CYCLE_FORBIDDEN",
    "UNREACHABLE", "DEAD_END", "NO_OUTPUTS", "EMPTY", "DUPLICATE_MODEL", "AGENT_TOOLS", "DEFAULT_UNKNOWN_PORT", "TASK_SHAPE",
    "CHILD_INVALID", "REMOTE_CONTRACT", "GRADIENT_BLOCKED", "HYPER_MEMBER", "LINK_UNRESOLVED", "UNKNOWN_BLOCK_TYPE", "BAD_REF",
    "SCHEMA", "VERSION", "NOT_SERIALIZABLE",
}  # fmt: skip


def two() -> Graph:
    graph = Graph("g")
    for name, block in (("a", Const(value=1)), ("b", Echo()), ("t", Typed(takes="text", optional=True)), ("i", Typed(gives="image"))):
        graph.add_node(block, name)
    return graph


def twice(first: Callable[[Graph], Any], second: Callable[[Graph], Any]) -> Any:
    graph = two()
    first(graph)
    return second(graph)


def text(graph: str) -> Any:
    return Graph.from_yaml_text(f"kind: graph\nid: g\n{graph}", registry=new_registry(), pool=ModelPool())


def ref(folder: Path, name: str) -> Any:
    (folder / "main.yaml").write_text(f"kind: graph\nnodes:\n  - {{ref: {name}}}\n")
    return Graph.from_yaml(folder / "main.yaml", registry=new_registry())


class Living(Block):
    """Takes an object that no file can hold."""

    def __init__(self, *, thing: Any = None) -> None:
        super().__init__()


def living(block: Block) -> Any:
    graph = Graph("g")
    graph.add_node(block, "a")
    return graph.to_config()


RAISED: list[tuple[str, Callable[[Path], Any], str, str]] = [
    ("BAD_ID", lambda _: Graph("g h"), "bad graph id 'g h'", "use a letter or '_' first"),
    ("BLANK_FIELD", lambda _: Graph(" "), "bad graph id ' '", "use a letter"),
    ("UNKNOWN_NODE", lambda _: two().add_edge("aa", "y", "b", "x"), "g has no node 'aa'", "did you mean 'a'"),
    ("UNKNOWN_PORT", lambda _: two().add_edge("a", "yy", "b", "x"), "g/a has no port 'yy'", "did you mean 'y'"),
    ("WRONG_DIRECTION", lambda _: two().add_edge("b", "x", "t", "x"), "g/b.x is an input where an output is needed", "known: 'y'"),
    ("TYPE_MISMATCH", lambda _: two().add_edge("i", "y", "t", "x"), "g/t.x takes 'text' but i.y gives 'image'", "put a block between"),
    ("FAN_IN", lambda _: twice(lambda g: g.add_edge("a", "y", "b", "x"), lambda g: g.add_edge("t", "y", "b", "x")), "g/b.x takes one", "remove"),
    ("EXPOSED_AND_WIRED", lambda _: twice(lambda g: g.add_edge("a", "y", "b", "x"), lambda g: g.expose_input("b", "x")), "g/b.x is fed", "remove"),
    ("EXPOSURE_CLASH", lambda _: twice(lambda g: g.expose_output("a", "y", "o"), lambda g: g.expose_output("b", "y", "o")), "g offers", "choose another"),
    ("DEFAULT_UNKNOWN_PORT", lambda _: two().set_default("b", "xx", 1), "g/b: default for unknown input 'xx'", "did you mean 'x'"),
    ("LOOP_NO_CARRY", lambda _: two().add_edge("b", "y", "b", "x"), "g: b.y -> b.x joins a node to itself", "add carry=True"),
    ("AGENT_TOOLS", lambda _: two().add_tool("9 9", "a"), "g", "9 9"),
    ("UNKNOWN_BLOCK_TYPE", lambda _: text("nodes: [{node_id: a, block_type: test/afine}]"), "<text>:3: nodes.0: ", "did you mean 'test/affine'"),
    ("UNKNOWN_NODE", lambda _: text(
        "nodes: [{node_id: a, block_type: test/echo}]\nedges:\n"
        "- {source_node: a, source_port: y, target_node: c, target_port: x}"), "<text>:5: edges.0: g has no node 'c'", "known: 'a'"),
    ("BAD_REF", lambda folder: ref(folder, "lost.yaml"), "main.yaml:3: nodes.0.ref: there is no file 'lost.yaml'", "looked for"),
    ("BAD_REF", lambda folder: ref(folder, "../main.yaml"), "nodes.0.ref: '../main.yaml' leaves the folder", "unless allow_outside_root"),
    ("SCHEMA", lambda _: text("nodes: [{node_id: a, block_type: t/a, confg: {}}]"), "<text>:3: nodes.0.confg: unknown key", "did you mean 'config'"),
    ("VERSION", lambda _: text("schema_version: '7.1'\nnodes: []"), "<text>:3: schema_version: this file has schema version 7.1", "reads 1.0; use"),
    ("NOT_SERIALIZABLE", lambda _: living(Add()), "g/a: block of class Add", "register it with"),
    ("NOT_SERIALIZABLE", lambda _: living(register_block("test/living", registry=new_registry())(Living)(thing=object())), "g/a: block", "give it texts"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "make", "place", "way_out"), RAISED, ids=[f"{i}-{case[0]}" for i, case in enumerate(RAISED)])
def test_a_mistake_is_refused_with_its_code(code: str, make: Callable[[Path], Any], place: str, way_out: str, tmp_path: Path) -> None:
    """02 G-26: at `add_edge`, at load and at `to_config`."""
    with pytest.raises(WGError) as caught:
        make(tmp_path)
    assert caught.value.code == code
    assert place in str(caught.value) and way_out in str(caught.value)


def tool_less() -> Graph:
    graph = chain(Affine(), id="g")
    graph.tools = {"count": {"node": "n9"}}
    return graph


def shapeless() -> Graph:
    graph = chain(Affine(), id="g")
    graph.task_kind = "diffusion"
    return graph


def contractless() -> Pipeline:
    pipeline = Pipeline("p")
    pipeline.add_graph(Remote("far", endpoint="http://127.0.0.1:9"))
    return pipeline


FOUND: list[tuple[str, Callable[[], Any], str, str, str]] = [
    ("AGENT_TOOLS", tool_less, "error", "g: it has tools but no agent", "add an agent"),
    ("TASK_SHAPE", shapeless, "warning", "g: a graph of task_kind 'diffusion'", "add one, or correct task_kind"),
    ("REMOTE_CONTRACT", contractless, "error", "p/far: a remote node needs a stored contract", "store what /spec answers"),
]


@pytest.mark.parametrize(("code", "make", "severity", "place", "way_out"), FOUND, ids=[case[0] for case in FOUND])
def test_the_codes_of_single_levels(code: str, make: Callable[[], Any], severity: str, place: str, way_out: str) -> None:
    """02 G-26."""
    found = [i for i in make().validate(strict=False, deep=True).issues if i.code == code]
    assert [i.severity for i in found if place in str(i) and way_out in str(i)] == [severity]


def test_every_code_has_an_example() -> None:
    """02 acceptance 6: in the table of what `validate` finds, or in those above."""
    shown = {code for _, _, code, _ in test_validation.CASES.values()}
    assert shown | {case[0] for case in RAISED} | {case[0] for case in FOUND} >= ALL


def test_a_world_is_checked_for_training_too() -> None:
    """02 G-24."""
    assert World.from_template("stub", world_id="isle").validate(deep=True, for_training=True).is_valid
