"""Hyperedges and links: lowered, asked after, resolved, written down."""

from __future__ import annotations

from typing import Any

import pytest
from blocks_for_tests import Add, Affine, Const, Echo, Join, chain, new_registry

from wg_core import Block, ConfigError, Graph, ModelPool, Pipeline, Port, Stage, ValidationError, current_context
from wg_core.errors import EdgeError, LinkError, NodeExecutionError
from wg_core.execution.hyper import Lowered, register_lowering, resolvers_of
from wg_core.structure.hyperlink import HyperEdge, HyperLink, Member, Resolvers
from wg_core.structure.topology import Edge


def hyperedge(kind: str, *members: tuple[str, str | None] | tuple[str, str | None, str], id: str = "mood") -> HyperEdge:
    return HyperEdge(id=id, kind=kind, members=tuple(Member(path=p, port=q, role=r[0] if r else None) for p, q, *r in members))


def three() -> Graph:
    """`source`, and two readers whose sum comes out."""
    registry = new_registry()
    graph = Graph("g")
    graph.add_node("test/const", "source", config={"value": 2}, registry=registry)
    graph.add_node("test/affine", "a", config={"scale": 10}, registry=registry)
    graph.add_node("test/affine", "b", config={"offset": 1}, registry=registry)
    graph.add_node("test/join", "sum", config={"how": "sum"}, registry=registry)
    graph.add_edge("a", "y", "sum", "x")
    graph.add_edge("b", "y", "sum", "x")
    graph.expose_output("sum", "y", "y")
    return graph


FROM_SOURCE = hyperedge("context", ("source", "y", "source"), ("a", "x"), ("b", "x"))
FROM_OUTSIDE = hyperedge("context", ("a", "x"), ("b", "x"))


def nested() -> Pipeline:
    pipeline = Pipeline("p")
    pipeline.add_graph(chain(Affine(), Affine(), id="g"))
    pipeline.add_graph(chain(Affine(), id="h"))
    return pipeline


# ---- lowering ------------------------------------------------------------------------------------------------------


def test_a_context_with_a_source_becomes_edges() -> None:
    """02 H-1, H-2: one value to several inputs; data flows along the edges that it was lowered to."""
    graph = three()
    graph.add_hyperedge(FROM_SOURCE)
    assert [str(e) for e in graph.edges if e.origin == "hyper"] == ["source.y -> a.x", "source.y -> b.x"]
    assert graph.run() == {"y": 23}


def test_a_context_without_a_source_becomes_one_input() -> None:
    """02 H-2: a fan-out input, named like the hyperedge."""
    graph = three()
    graph.add_hyperedge(FROM_OUTSIDE)
    assert [(e["key"], len(e["bindings"])) for e in graph.get_input_spec()] == [("mood", 2)]
    assert graph.run({"mood": 3}) == {"y": 34}


def test_relations_and_groups_have_no_effect_on_a_run() -> None:
    """02 H-2."""
    graph = chain(Affine(scale=2), Affine())
    plan = graph.plan().order()
    graph.add_hyperedge(hyperedge("relation", ("n0", "y"), ("n1", None, "reader")))
    graph.add_hyperedge(hyperedge("group", ("n0", None), id="both"))
    assert graph.plan().order() == plan
    assert graph.run({"x": 1}) == {"y": 2}


def test_a_kind_of_ones_own() -> None:
    """02 H-2: custom kinds register a lowering; unknown ones are refused."""

    def ring(graph: Any, edge: HyperEdge) -> Lowered:
        first, *rest = [m.path for m in edge.members]
        return Lowered(tuple(Edge(a, "y", b, "x") for a, b in zip((first, *rest), rest, strict=False)))

    register_lowering("test_row", ring)
    register_lowering("test_row", ring)
    with pytest.raises(EdgeError, match="'test_row' has a lowering already"):
        register_lowering("test_row", lambda graph, edge: Lowered())
    graph = Graph("g")
    for name in "abc":
        graph.add_node(Affine(offset=1), name)
    graph.expose_input("a", "x", "x")
    graph.add_hyperedge(hyperedge("test_row", ("a", None), ("b", None), ("c", None)))
    assert graph.run({"x": 0}) == {"c:y": 3}
    with pytest.raises(EdgeError, match=r"is of kind 'test_raw', which has no lowering; register one.*did you mean 'test_row'"):
        graph.add_hyperedge(hyperedge("test_raw", ("a", None), id="other"))


@pytest.mark.parametrize(
    ("edge", "says"),
    [
        (hyperedge("context", ("source", "y", "source"), ("nobody", "x")), "'nobody'"),
        (hyperedge("context", ("source", "y", "source"), ("a", None)), "'a' names no port"),
        (hyperedge("context", ("source", "y", "source")), "at least one other member"),
        (hyperedge("context", ("source", "y", "source"), ("a", "y", "source"), ("b", "x")), "one source at most"),
        (hyperedge("context", ("source", "y", "source"), ("a", "x"), ("b", "z")), "g/b has no port 'z'"),
        (hyperedge("context", ("source", "y", "source"), ("a", "x"), ("b", "y")), "g/b.y is an output where an input is needed"),
        (hyperedge("context", ("a", "y", "source"), ("b", "x"), ("a", "x")), "joins a node to itself"),
    ],
)
def test_what_cannot_be_joined_changes_nothing(edge: HyperEdge, says: str) -> None:
    """02 H-2: all or nothing."""
    graph = three()
    before = (graph.edges, graph.exposures("in", explicit=True), graph.hyperedges)
    with pytest.raises(EdgeError, match=says):
        graph.add_hyperedge(edge)
    assert (graph.edges, graph.exposures("in", explicit=True), graph.hyperedges) == before
    assert graph.run({"a:x": 1, "b:x": 1}) == {"y": 12}


def test_removing_takes_back_what_was_lowered() -> None:
    """02 H-2: and nothing that was given by hand."""
    graph = three()
    graph.add_edge("source", "y", "a", "x")
    before = graph.to_config()
    graph.add_hyperedge(FROM_SOURCE)
    with pytest.raises(EdgeError, match="has a hyperedge 'mood'; choose another id"):
        graph.add_hyperedge(FROM_SOURCE)
    graph.remove_hyperedge("mood")
    assert graph.to_config() == before
    graph = three()
    graph.add_hyperedge(FROM_OUTSIDE)
    graph.remove_hyperedge("mood")
    assert graph.exposures("in", explicit=True) == []
    with pytest.raises(EdgeError, match="no hyperedge 'mood'"):
        graph.remove_hyperedge("mood")


def test_a_renamed_node_stays_a_member() -> None:
    graph = three()
    graph.add_hyperedge(FROM_SOURCE)
    graph.rename_node("a", "alpha")
    assert [m.path for m in graph.hyperedges[0].members] == ["source", "alpha", "b"]
    assert graph.validate().is_valid
    assert graph.run() == {"y": 23}


def test_a_removed_node_leaves_its_hyperedges() -> None:
    """02 G-18, H-2: those that hold without it stay, the others go with what they had joined."""
    graph = three()
    graph.add_hyperedge(FROM_SOURCE)
    graph.add_hyperedge(hyperedge("relation", ("a", None), ("b", None), id="pair"))
    graph.add_hyperedge(hyperedge("group", ("a", "y"), id="alone"))
    graph.remove_node("a")
    assert [(h.id, [m.path for m in h.members]) for h in graph.hyperedges] == [("mood", ["source", "b"]), ("pair", ["b"])]
    assert graph.validate().is_valid
    assert graph.run() == {"y": 3}
    graph.remove_node("source")
    assert [h.id for h in graph.hyperedges] == ["pair"]
    assert [str(e) for e in graph.edges] == ["b.y -> sum.x"]
    pipeline = nested()
    pipeline.add_hyperedge(hyperedge("relation", ("g/n0", None), ("h/n0", None)))
    pipeline.remove_node("g")
    assert [m.path for m in pipeline.hyperedges[0].members] == ["h/n0"]
    assert pipeline.validate().is_valid


def test_a_hyperedge_whose_members_are_gone_can_be_removed() -> None:
    """02 G-18, H-2: also beside others of that kind."""
    graph = three()
    for id in ("lost", "astray"):
        graph.hyperedges.append(hyperedge("context", ("gone", "y", "source"), ("a", "x"), id=id))
    graph.add_hyperedge(FROM_OUTSIDE)
    for id in ("lost", "mood", "astray"):
        graph.remove_hyperedge(id)
    assert graph.hyperedges == [] and graph.exposures("in", explicit=True) == []


def test_a_hyperedge_has_an_id_like_any_other() -> None:
    """02 G-10, G-26 BAD_ID: refused where it is added."""
    graph = three()
    with pytest.raises(ConfigError, match="bad hyperedge id 'a-b'") as caught:
        graph.add_hyperedge(hyperedge("group", ("a", None), id="a-b"))
    assert caught.value.code == "BAD_ID" and graph.hyperedges == []


def test_a_context_over_the_graphs_of_a_pipeline() -> None:
    """02 H-1: every level."""
    pipeline = nested()
    pipeline.add_hyperedge(hyperedge("context", ("g", "x"), ("h", "x")))
    assert pipeline.run({"mood": 4}) == {"g:y": 4, "h:y": 4}


# ---- validation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edge", "says"),
    [
        (hyperedge("relation", ("nobody", None)), "relation 'mood': there is no node 'nobody'"),
        (hyperedge("group", ("g/nobody", None)), "there is no node 'g/nobody'"),
        (hyperedge("relation", ("g/n0", "z")), "g/n0 has no port 'z'; known: 'x', 'y'"),
        (hyperedge("relation", ("g", "yy")), "g has no port 'yy'; did you mean 'y'"),
    ],
)
def test_members_must_be_there(edge: HyperEdge, says: str) -> None:
    """02 G-26 HYPER_MEMBER."""
    pipeline = nested()
    pipeline.add_hyperedge(edge)
    (issue,) = pipeline.validate(strict=False).errors
    assert issue.code == "HYPER_MEMBER"
    assert says in str(issue)
    with pytest.raises(ValidationError, match="HYPER_MEMBER"):
        pipeline.run({"g:x": 1, "h:x": 1})


def test_a_context_whose_edge_was_removed_is_an_error() -> None:
    """02 G-26 HYPER_MEMBER: no hyperedge claims what does not flow."""
    graph = three()
    graph.add_hyperedge(FROM_SOURCE)
    graph.set_default("a", "x", 1)
    graph.remove_edge(Edge("source", "y", "a", "x"))
    (issue,) = graph.validate(strict=False).errors
    assert str(issue).startswith("g: context 'mood': it is not joined: source.y -> a.x; ")


def test_two_hyperedges_of_one_id() -> None:
    graph = chain(Affine())
    graph.hyperedges += [hyperedge("group", ("n0", None))] * 2
    assert [i.code for i in graph.validate(strict=False).errors] == ["HYPER_MEMBER"]


# ---- files ---------------------------------------------------------------------------------------------------------


def test_the_round_trip_keeps_hyperedges_links_and_order() -> None:
    """02 S-15, H-3: level and node links, lowered edges, equal results."""
    graph = three()
    graph.add_hyperedge(FROM_SOURCE)
    graph.add_hyperedge(hyperedge("group", ("a", None), ("b", None), id="readers"))
    graph.links.append(HyperLink(target_kind="world", target_id="tide", rel="inspired_by", meta={"n": [1]}))
    graph.nodes["a"].links.append(HyperLink(target_kind="artifact", target_id="f00", fragment="top"))
    pipeline = Pipeline.from_graph(graph)
    pipeline.nodes["g"].links.append(HyperLink(target_kind="end_world", target_id="old"))
    stage = Stage("s", writes=["outcome"], reads=[], outputs={"outcome.narrative": "y"})
    stage.add_pipeline(pipeline)
    stage.nodes["g"].links.append(HyperLink(target_kind="state", target_id="s1"))
    for level in (graph, pipeline, stage):
        config = level.to_config()
        again = type(level).from_config(config, registry=new_registry(), pool=ModelPool())
        assert again.to_config() == config
        assert [str(link) for link in again.links_from("g")] == [str(link) for link in level.links_from("g")]
    again = Graph.from_config(graph.to_config(), registry=new_registry())
    assert (again.edges, again.hyperedges, again.run()) == (graph.edges, graph.hyperedges, graph.run())
    assert again.nodes["a"].links == graph.nodes["a"].links


def test_a_file_may_name_the_hyperedge_alone() -> None:
    """02 H-2: it is lowered on loading; a wrong one names its place in the file."""
    config = three().to_config()
    text = {"id": "mood", "kind": "context", "members": [{"path": "a", "port": "x"}, {"path": "b", "port": "x"}]}
    graph = Graph.from_config({**config, "hyperedges": [text]}, registry=new_registry())
    assert graph.run({"mood": 3}) == {"y": 34}
    text["members"].append({"path": "nobody", "port": "x"})  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"hyperedges\.0: g: .*'nobody'"):
        Graph.from_config({**config, "hyperedges": [text]}, registry=new_registry())


# ---- queries -------------------------------------------------------------------------------------------------------


def test_questions_about_links_and_hyperedges() -> None:
    """02 H-5: across levels, by path and by target."""
    pipeline = nested()
    inner = pipeline.nodes["g"].child
    here = HyperLink(target_kind="world", target_id="tide")
    there = HyperLink(target_kind="block", target_id="tide")
    pipeline.links.append(here)
    pipeline.nodes["h"].links.append(here)
    inner.links.append(there)
    inner.nodes["n0"].links.append(there)
    assert pipeline.links_from() == [here]
    assert (pipeline.links_from("g"), pipeline.links_from("g/n0"), pipeline.links_from("x")) == ([there], [there], [])
    assert [at for at, _ in pipeline.links_to("tide")] == ["", "g", "g/n0", "h"]
    assert pipeline.links_to("tide", "world") == [("", here), ("h", here)]
    group, below = hyperedge("group", ("g/n0", None), ("h", None)), hyperedge("relation", ("n0", "y"), id="below")
    pipeline.add_hyperedge(group)
    inner.add_hyperedge(below)
    assert pipeline.hyperedges_of("g/n0") == [group, below]
    assert pipeline.hyperedges_of("h") == [group]
    assert pipeline.hyperedges_of("g") == []


# ---- resolving -----------------------------------------------------------------------------------------------------


class Follows(Block):
    """Reads what a link points to."""

    ports = (Port("link", "in", "link"), Port("y", "out", "any"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": current_context().resolve(inputs["link"])}


def follower() -> Graph:
    graph = Graph("g")
    graph.add_node(Follows(), "f")
    return graph


def test_links_are_resolved_when_somebody_follows_them() -> None:
    """02 H-3, H-4: passed in at run, lazy, as a value on a port in either form."""
    asked: list[str] = []
    resolvers = Resolvers().register("world", lambda link: asked.append(link.target_id) or link.target_id.upper())
    link = HyperLink(target_kind="world", target_id="tide")
    graph = follower()
    graph.links.append(link)
    graph.resolvers = resolvers
    assert graph.validate().issues == []
    assert asked == []
    assert graph.run({"link": link}) == {"y": "TIDE"}
    assert Pipeline.from_graph(follower()).run({"link": link.model_dump()}, resolvers=resolvers) == {"y": "TIDE"}
    assert asked == ["tide", "tide"]


def test_an_unresolved_link_is_kept_and_is_an_error_only_when_followed() -> None:
    """02 H-4, G-26 LINK_UNRESOLVED: a warning, the link stays as it is."""
    graph = follower()
    lost = HyperLink(target_kind="world", target_id="lost")
    odd = HyperLink(target_kind="wurld", target_id="tide")
    graph.links.append(lost)
    graph.nodes["f"].links.append(odd)
    assert graph.validate().issues == []

    def find(link: HyperLink) -> Any:
        raise LookupError("no such world")

    graph.resolvers = Resolvers().register("world", find, knows=lambda link: False)
    result = graph.validate()
    assert [(i.code, i.severity, i.path) for i in result.issues] == [
        ("LINK_UNRESOLVED", "warning", "g"), ("LINK_UNRESOLVED", "warning", "g/f"),
    ]  # fmt: skip
    assert (graph.links, graph.links_from("f")) == ([lost], [odd])
    with pytest.raises(NodeExecutionError, match="LinkError: link to world lost: no such world"):
        graph.run({"link": lost})
    with pytest.raises(NodeExecutionError, match="nothing resolves kind 'wurld'; did you mean 'world'"):
        graph.run({"link": odd})
    with pytest.raises(LinkError, match="nothing resolves"):
        current_context().resolve(lost)


def test_links_into_a_level() -> None:
    """02 H-3, H-4: ports, blocks and levels by node path; looking does not change anything."""
    pipeline = nested()
    resolvers = resolvers_of(pipeline)
    before = (pipeline.version, pipeline.stamp())
    graph = pipeline.nodes["g"].child
    assert resolvers.resolve(HyperLink(target_kind="graph", target_id="g")) is graph
    assert resolvers.resolve(HyperLink(target_kind="block", target_id="g/n1")) is graph.nodes["n1"].child
    port = HyperLink(target_kind="port", target_id="g/n1", fragment="y")
    assert resolvers.resolve(port).name == "y"
    assert resolvers.resolve(HyperLink(target_kind="port", target_id="h", fragment="x")).direction == "in"
    for wrong in (
        HyperLink(target_kind="graph", target_id="g/n1"),
        HyperLink(target_kind="block", target_id="nobody"),
        HyperLink(target_kind="port", target_id="h", fragment="z"),
        HyperLink(target_kind="port", target_id="g/n1", fragment="z"),
    ):
        assert not resolvers.knows(wrong)
        with pytest.raises(LinkError):
            resolvers.resolve(wrong)
    assert (pipeline.version, pipeline.stamp()) == before


def test_aggregation_sees_a_context_like_any_edge() -> None:
    """02 G-17, H-1."""
    graph = Graph("g")
    graph.add_node(Const(value=1), "a")
    graph.add_node(Join(how="dict"), "j")
    graph.add_node(Add(), "add")
    graph.add_node(Echo(), "e")
    graph.add_hyperedge(hyperedge("context", ("a", "y", "source"), ("j", "x"), ("add", "a"), ("e", "x")))
    assert graph.run() == {"j:y": {"a:y": 1}, "add:y": 11, "e:y": 1}
