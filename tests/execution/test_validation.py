"""Every validation code, with a failing example; what a plan and a description say."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from blocks_for_tests import Add, Affine, Calls, Const, Echo, Join, Model, Saw, Typed, chain, cycle, new_registry

from wg_core import Graph, ModelPool, Pipeline, ValidationError
from wg_core.execution.node import LoopSpec
from wg_core.execution.validate import Issue, validate_structure
from wg_core.structure.hyperlink import HyperEdge, HyperLink, Member, Resolvers


def empty() -> Graph:
    return Graph("g")


def exposure_broken() -> Pipeline:
    graph = chain(Affine(), id="g")
    pipeline = Pipeline("p")
    pipeline.add_graph(graph)
    pipeline.expose_output("g", "y", "result")
    graph.unexpose_output("y")
    graph.expose_output("n0", "y", "renamed")
    return pipeline


def exposure_clash() -> Graph:
    graph = Graph("g")
    graph.add_node(Typed(takes="text"), "a")
    graph.add_node(Typed(takes="image"), "b")
    graph.expose_input("a", "x", "x")
    graph.expose_input("b", "x", "x")
    return graph


def no_outputs() -> Graph:
    graph = Graph("g")
    graph.add_node(Typed(optional=True), "a")
    graph.add_node(Typed(optional=True, how="first"), "b")
    graph.add_edge("a", "y", "b", "x")
    graph.add_edge("b", "y", "a", "x", carry=True)
    return graph


def cycle_forbidden() -> Pipeline:
    pipeline = Pipeline("p")
    for name in ("g", "h"):
        pipeline.add_graph(chain(Affine(), id=name))
    pipeline.add_edge("g", "y", "h", "x")
    pipeline.add_edge("h", "y", "g", "x")
    return pipeline


def loop_no_carry() -> Graph:
    graph = chain(Affine(), Affine(), id="g")
    graph.unexpose_input("x")
    graph.add_edge("n1", "y", "n0", "x")
    return graph


def carry_outside_cycle() -> Graph:
    graph = Graph("g")
    graph.add_node(Affine(), "a")
    graph.add_node(Affine(), "b", defaults={"x": 0})
    graph.add_edge("a", "y", "b", "x", carry=True)
    return graph


def loop_no_seed() -> Graph:
    graph = cycle(Affine(), Affine(), id="g")
    graph.unexpose_input("x")
    graph.add_node(Affine(), "other")
    graph.expose_input("other", "x", "z")
    graph.expose_output("other", "y")
    return graph


def with_loops(*loops: LoopSpec) -> Graph:
    graph = cycle(Affine(), Affine(), id="g")
    graph.add_node(Const(value=1), "outside")
    graph.expose_output("outside", "y", "o")
    graph.set_loops(loops)
    return graph


def required_unfed() -> Graph:
    graph = chain(Affine(), Affine(), id="g")
    graph.remove_edge(graph.edges[0])
    return graph


def fan_in() -> Graph:
    graph = Graph("g")
    graph.add_node(Join(how="sum"), "j")
    for name in ("a", "b"):
        graph.add_node(Const(value=1), name)
        graph.add_edge(name, "y", "j", "x")
    graph.replace_block("j", Echo())
    return graph


def exposed_and_wired() -> Graph:
    graph = Graph("g")
    graph.add_node(Const(value=1), "a")
    graph.add_node(Echo(), "b")
    graph.expose_input("b", "x", "x")
    graph.add_edge("a", "y", "b", "x")
    return graph


def joined(*, gives: str = "number", now: str | None = None) -> Pipeline:
    """Two graphs joined by `out` -> `x`; then the first one's `out` is taken away, or is of another type."""
    first = Graph("first")
    first.add_node(Typed(takes="any", gives=gives, optional=True), "a")
    first.add_node(Typed(takes="any", gives=now or "any", optional=True), "b")
    first.expose_output("a", "y", "out")
    pipeline = Pipeline("p")
    pipeline.add_graph(first)
    pipeline.add_graph(chain(Affine(), id="second"))
    pipeline.add_edge("first", "out", "second", "x")
    first.unexpose_output("out")
    first.expose_output("b", "y", "out" if now else "gone")
    return pipeline


def partial_types() -> Graph:
    graph = Graph("g")
    graph.add_node(Typed(gives="text|number", optional=True), "a")
    graph.add_node(Typed(takes="number"), "b")
    graph.add_edge("a", "y", "b", "x")
    return graph


def tag_mismatch() -> Graph:
    graph = Graph("g")
    graph.add_node(Typed(gives="tensor", tag_out="latent", optional=True), "a")
    graph.add_node(Typed(takes="tensor", tag_in="token_ids"), "b")
    graph.add_edge("a", "y", "b", "x")
    return graph


def dead_end() -> Graph:
    graph = chain(Affine(), id="g")
    graph.add_node(Saw(), "lost")
    return graph


def duplicate_model() -> Graph:
    return chain(Model(checkpoint_ref="m"), Model(checkpoint_ref="m"), id="g")


def child_invalid() -> Pipeline:
    pipeline = Pipeline("p")
    pipeline.add_graph(required_unfed())
    return pipeline


def bad_id() -> Graph:
    graph = chain(Affine(), id="g")
    graph.id = "g h"
    return graph


def blank_field() -> Graph:
    graph = chain(Affine(), id="g")
    graph.hyperedges.append(HyperEdge(id=" ", kind="group", members=(Member(path="n0"),)))
    return graph


def default_unknown_port() -> Pipeline:
    graph = chain(Affine(), id="g")
    pipeline = Pipeline("p")
    pipeline.add_graph(graph, defaults={"x": 1})
    graph.unexpose_input("x")
    graph.expose_input("n0", "x", "number")
    return pipeline


def hyper_member() -> Graph:
    graph = chain(Affine(), id="g")
    graph.add_hyperedge(HyperEdge(id="h", kind="relation", members=(Member(path="nobody"),)))
    return graph


def link_unresolved() -> Graph:
    graph = chain(Affine(), id="g")
    graph.links.append(HyperLink(target_kind="world", target_id="lost"))
    graph.resolvers = Resolvers()
    return graph


class Learning(Echo):
    """A block with parameters that learn."""

    def may_learn(self) -> bool:
        return True


class Wall(Echo):
    """A block whose model runs elsewhere."""

    passes_gradient = False


def gradient_blocked() -> Pipeline:
    """`p/g/n0` learns and is only seen through the wall; `p/h/n0` learns behind it."""
    pipeline = Pipeline("p")
    pipeline.add_graph(chain(Learning(), Affine(), id="g"))
    pipeline.add_graph(chain(Wall(), id="far"))
    pipeline.add_graph(chain(Learning(), id="h"))
    pipeline.add_edge("g", "y", "far", "x")
    pipeline.add_edge("far", "y", "h", "x")
    return pipeline


CASES: dict[str, tuple[Callable[[], Graph | Pipeline], str, str, str]] = {
    "EMPTY": (empty, "error", "EMPTY", "g: this graph has no nodes; add one with add_node [EMPTY]"),
    "EXPOSURE_BROKEN": (
        exposure_broken, "error", "EXPOSURE_BROKEN", "p/g.y: output 'result' is bound to g.y, which does not exist; expose an existing",
    ),
    "EXPOSURE_CLASH": (exposure_clash, "error", "EXPOSURE_CLASH", "g: input 'x' feeds ports of types that do not meet: text, image; use two"),
    "NO_OUTPUTS": (no_outputs, "warning", "NO_OUTPUTS", "g: nothing comes out: no output is exposed or left over; expose_output("),
    "CYCLE_FORBIDDEN": (
        cycle_forbidden, "error", "CYCLE_FORBIDDEN", "p: a pipeline has no cycles, but g -> h -> g; put the loop inside one graph",
    ),
    "LOOP_NO_CARRY": (
        loop_no_carry, "error", "LOOP_NO_CARRY",
        "g: the cycle n0 -> n1 -> n0 has no carry edge that breaks it; mark the edge that brings the previous iteration's value "
        "with carry=True; candidates: n0.y -> n1.x, n1.y -> n0.x",
    ),
    "CARRY_OUTSIDE_CYCLE": (
        carry_outside_cycle, "error", "CARRY_OUTSIDE_CYCLE", "g: carry edge a.y ~> b.x is in no cycle; make it a plain edge",
    ),
    "LOOP_NO_SEED": (
        loop_no_seed, "error", "LOOP_NO_SEED",
        "g/n0.x: iteration 0 has no value for n0.x, which only n1.y ~> n0.x feeds; expose the port, join an edge from outside",
    ),
    "LOOP_STEPS": (
        lambda: with_loops(LoopSpec("n0", num_steps=0)), "error", "LOOP_STEPS", "g: loop 'n0': num_steps is 0; use a whole number >= 1",
    ),
    "LOOP_STEPS of another kind": (
        lambda: with_loops(LoopSpec("n0", num_steps="3")), "error", "LOOP_STEPS",  # type: ignore[arg-type]
        "g: loop 'n0': num_steps is '3'; use a whole number >= 1",
    ),
    "LOOP_ORDER no permutation": (
        lambda: with_loops(LoopSpec("n0", order=("n0",))), "error", "LOOP_ORDER",
        "g: loop 'n0': order ['n0'] is not the cycle's nodes ['n0', 'n1']; list every node of the cycle once",
    ),
    "LOOP_ORDER contradiction": (
        lambda: with_loops(LoopSpec("n0", order=("n1", "n0"))), "error", "LOOP_ORDER",
        "g: loop 'n0': order contradicts n0.y -> n1.x; swap the two nodes or make it a carry edge",
    ),
    "LOOP_ORDER unknown loop": (
        lambda: with_loops(LoopSpec("outside")), "error", "LOOP_ORDER",
        "g: loop 'outside' belongs to no cycle; name one of the cycle's nodes as loop_id",
    ),
    "LOOP_ORDER early end outside the loop": (
        lambda: with_loops(LoopSpec("n0", until={"node": "outside", "port": "y"})), "error", "LOOP_ORDER",
        "g: loop 'n0' ends at outside.y, which is no output inside the loop; name an output of n0, n1",
    ),
    "LOOP_ORDER early end at an input": (
        lambda: with_loops(LoopSpec("n0", until={"node": "n1", "port": "x"})), "error", "LOOP_ORDER", "loop 'n0' ends at n1.x",
    ),
    "REQUIRED_UNFED": (
        required_unfed, "error", "REQUIRED_UNFED",
        "g/n1.x: required input n1.x has no edge, exposed input or default; join an edge, expose it, or set a default",
    ),
    "FAN_IN": (fan_in, "error", "FAN_IN", "g/j.x: j.x takes one edge and has 2; remove edges, or declare an aggregation on the port"),
    "EXPOSED_AND_WIRED": (
        exposed_and_wired, "error", "EXPOSED_AND_WIRED", "g/b.x: b.x is exposed and fed by a.y -> b.x; unexpose it or remove the edge",
    ),
    "UNKNOWN_PORT": (
        joined, "error", "UNKNOWN_PORT", "p: edge first.out -> second.x ends at a port that is gone; remove the edge",
    ),
    "TYPE_MISMATCH": (
        lambda: joined(now="text"), "error", "TYPE_MISMATCH",
        "p: second.x takes 'number' but first.out gives 'text'; put a block between that converts it",
    ),
    "PARTIAL_TYPES": (partial_types, "warning", "PARTIAL_TYPES", "g: a.y -> b.x: only some of 'text|number' fit 'number'; "),
    "TAG_MISMATCH": (tag_mismatch, "warning", "TAG_MISMATCH", "g: a.y -> b.x: tag 'latent' meets 'token_ids'; "),
    "DEAD_END": (dead_end, "warning", "DEAD_END", "g/lost: nothing that lost makes reaches an output; expose one of its outputs"),
    "DUPLICATE_MODEL": (
        duplicate_model, "error", "DUPLICATE_MODEL", "g: two blocks hold the model 'm'; build them through one pool, or set reuse: false",
    ),
    "BAD_ID": (bad_id, "error", "BAD_ID", "bad graph id 'g h'; use a letter or '_' first"),
    "BAD_ID of a loop": (lambda: with_loops(LoopSpec("n0"), LoopSpec("a b", order=("n0",))), "error", "BAD_ID", "bad loop id 'a b'; "),
    "BLANK_FIELD": (blank_field, "error", "BLANK_FIELD", "g: the hyperedge id is blank; give it a name"),
    "LOOP_STEPS by default": (
        lambda: cycle(Affine(), Affine(), id="g"), "warning", "LOOP_STEPS",
        "g: loop 'n0' runs once unless a run says otherwise; set the number of its steps in loops, or give each run num_loop_steps={'n0': N}",
    ),
    "DEFAULT_UNKNOWN_PORT": (
        default_unknown_port, "warning", "DEFAULT_UNKNOWN_PORT",
        "p/g: g has a default for 'x', which is none of its inputs; take it away, or correct it; known: 'number'",
    ),
    "UNREACHABLE": (
        required_unfed, "warning", "UNREACHABLE", "g/n1: no input and no source leads to n1; join an edge to it, or expose an input",
    ),
    "HYPER_MEMBER": (hyper_member, "error", "HYPER_MEMBER", "g: relation 'h': there is no node 'nobody'; change its members"),
    "LINK_UNRESOLVED": (
        link_unresolved, "warning", "LINK_UNRESOLVED", "g: link to world lost leads nowhere here; register a resolver",
    ),
    "GRADIENT_BLOCKED": (
        gradient_blocked, "warning", "GRADIENT_BLOCKED",
        "p/g/n0: g/n0 is to learn, but its only ways to an output lead through far/n0, where gradients end; take the loss before",
    ),
    "CHILD_INVALID": (child_invalid, "error", "CHILD_INVALID", "p/g: this child is invalid; see its own errors"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_code_has_a_failing_example(case: str) -> None:
    """02 G-26, acceptance 6: severity, and a message that names the path and the way out."""
    make, severity, code, says = CASES[case]
    structure = make()
    result = structure.validate(strict=False, deep=code == "CHILD_INVALID", for_training=code == "GRADIENT_BLOCKED")
    found = [i for i in result.issues if i.code == code]
    assert found, result.issues
    assert any(says in str(i) for i in found), [str(i) for i in found]
    assert all(i.severity == severity and i.hint for i in found)
    assert result.is_valid is not any(i.severity == "error" for i in result.issues)
    if severity == "error":
        with pytest.raises(ValidationError) as caught:
            structure.validate(deep=code == "CHILD_INVALID")
        assert code in str(caught.value)
        assert caught.value.result.errors == result.errors


def test_no_code_is_without_an_example() -> None:
    """02 acceptance 6: the codes in the source are the codes above."""
    source = Path(validate_structure.__code__.co_filename).read_text(encoding="utf-8")
    codes = set(re.findall(r'"([A-Z]+(?:_[A-Z]+)*)"', source)) - {"ValidationError"}
    assert codes == {code for _, _, code, _ in CASES.values()}


def test_gradients_are_only_asked_after_for_training() -> None:
    """02 G-24, M-6: what is frozen, or has another way to an output, or stands behind the wall, is fine."""
    pipeline = gradient_blocked()
    assert pipeline.validate(deep=True).issues == []
    blocked = [i.path for i in pipeline.validate(for_training=True).issues]
    assert blocked == ["p/g/n0"]
    pipeline.set_trainable("g/n0", False)
    assert pipeline.validate(for_training=True).issues == []
    pipeline.set_trainable("g/n0", True)
    pipeline.nodes["g"].trainable = False
    assert pipeline.validate(for_training=True).issues == []
    pipeline.nodes["g"].trainable = True
    pipeline.expose_output("h", "y", "far_end")
    pipeline.expose_output("g", "y", "near_end")
    assert pipeline.validate(for_training=True).issues == []


def test_sources_and_tools_are_reached() -> None:
    """02 G-26 UNREACHABLE: pure sources, defaults and loops with a seed are fine."""
    graph = chain(Const(value=1), Affine(), id="g")
    graph.add_node(Affine(), "own", defaults={"x": 1})
    graph.expose_output("own", "y", "own")
    assert graph.validate().issues == []
    loop = cycle(Affine(), Affine())
    loop.metadata["num_loop_steps"] = 2
    assert loop.validate().issues == []


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("diffusion", "a graph of task_kind 'diffusion' has a block of role solver, this one has none"),
        ("llm", "role llm or agent"),
        ("agent", "role agent"),
        ("generic", ""),
        (None, ""),
    ],
)
def test_a_task_kind_expects_roles(kind: str | None, says: str) -> None:
    """02 G-26 TASK_SHAPE: a warning only; unusual graphs stay legal."""
    graph = chain(Affine(), id="g")
    graph.task_kind = kind
    result = graph.validate()
    assert [(i.code, i.severity) for i in result.issues] == ([("TASK_SHAPE", "warning")] if says else [])
    assert says in str(result)


def test_children_are_checked_deep_with_their_paths() -> None:
    """02 G-26 CHILD_INVALID: path-prefixed."""
    result = child_invalid().validate(strict=False, deep=True)
    assert [(i.code, i.path) for i in result.errors] == [("REQUIRED_UNFED", "p/g/n1.x"), ("CHILD_INVALID", "p/g")]
    assert child_invalid().validate(strict=False).is_valid


def test_all_errors_come_at_once_and_nothing_is_changed() -> None:
    """02 G-24: strict raises all errors; not strict never raises."""
    graph = required_unfed()
    graph.add_node(Add(), "more")
    before = graph.version
    with pytest.raises(ValidationError) as caught:
        graph.run({"x": 1})
    assert [i.port for i in caught.value.result.errors] == ["x", "a"]
    assert graph.version == before


def test_seed_and_carry_on_one_port_is_fine() -> None:
    """02 G-26: not EXPOSED_AND_WIRED, not FAN_IN."""
    graph = cycle(Affine(), Affine())
    graph.set_loops([LoopSpec("n0", num_steps=3)])
    assert graph.validate().issues == []


def test_validation_runs_nothing_and_is_cached_by_structure() -> None:
    """02 G-24, G-25: pure."""
    block = Calls()
    graph = chain(block)
    assert graph.validate().is_valid
    assert block.calls == 0
    plan = graph.plan()
    assert graph.plan() is plan
    graph.expose_output("n0", "y", "again")
    assert graph.plan() is not plan


def test_one_pool_means_no_duplicate_model() -> None:
    """02 G-13."""
    pool, registry = ModelPool(), new_registry()
    graph = Graph("g")
    for name in ("a", "b"):
        graph.add_node("test/model", name, config={"checkpoint_ref": "m"}, pool=pool, registry=registry)
    assert graph.validate().is_valid
    assert graph.nodes["a"].child is graph.nodes["b"].child


def test_order_of_insertion_breaks_ties_only() -> None:
    """02 G-29."""
    graph = Graph("g")
    for name in ("late", "free", "early"):
        graph.add_node(Echo(), name)
    graph.add_edge("early", "y", "late", "x")
    assert graph.plan().order() == ["free", "early", "late"]


def test_describe_shows_steps_loops_and_carries() -> None:
    """02 G-42."""
    graph = cycle(Affine(), Affine())
    graph.set_loops([LoopSpec("n0", num_steps=7)])
    assert graph.describe().splitlines() == [
        "graph cycle",
        "  loop n0 x 7 (from loops)",
        "    carry n1.y ~> n0.x",
        "    n0: Affine",
        "    n1: Affine",
    ]


def test_issues_are_values() -> None:
    """02 G-24: severity, code, path, node, port, edge, message, hint."""
    issue = required_unfed().validate(strict=False).errors[0]
    assert issue == Issue(
        "error", "REQUIRED_UNFED", "g/n1.x", "required input n1.x has no edge, exposed input or default",
        "join an edge, expose it, or set a default", node="n1", port="x",
    )  # fmt: skip
