"""Automatic wiring: the same edges in every order, and nothing given by hand is ever touched."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterable
from typing import Any

import pytest
import role_blocks as small
from hypothesis import given, settings
from hypothesis import strategies as st

from wg_core import Block, ConfigError, Graph, ModelPool, Port, ValidationError
from wg_core.assembly import roles
from wg_core.assembly.rules import _by_target, _rules
from wg_core.assembly.wiring import HINTS, Rule, apply_auto_connect, get_rules, register_rule, suggest_edges
from wg_core.errors import EdgeError, NodeError, ToolError
from wg_core.structure.topology import Edge

REGISTRY = small.registry()

# Eight nodes, one of each role, and the edges that follow from the table (proves 01 A-8).
EIGHT = {
    "tok": "tokenizer", "txt": "conditioner", "ini": "initializer", "net": "backbone",
    "cfg": "guidance", "stp": "solver", "dec": "codec", "ctl": "adapter",
}  # fmt: skip
EDGES_OF_EIGHT = {
    "tok.token_ids -> txt.input", "tok.attention_mask -> txt.attention_mask",
    "txt.embedding -> net.condition", "txt.embedding -> ctl.condition", "ctl.adapted -> net.adapter_features",
    "net.pred -> cfg.pred_cond", "cfg.pred_guided -> stp.pred",
    "stp.next_latent ~> net.latent", "stp.next_timestep ~> net.timestep",
    "stp.next_latent ~> stp.latent", "stp.next_timestep ~> stp.timestep",
    "ini.latent -> net.latent", "ini.timestep -> net.timestep", "ini.latent -> stp.latent", "ini.timestep -> stp.timestep",
    "stp.next_latent -> dec.decode_latent",
}  # fmt: skip

CFG_HINTS = {"tok0": {"branch": "uncond"}, "neg": {"branch": "uncond"}, "net0": {"branch": "uncond"}}


def graph_of(nodes: Iterable[tuple[str, str]], hints: dict[str, dict[str, str]] | None = None) -> Graph:
    graph = Graph("g")
    for node_id, role in nodes:
        graph.add_node(f"{role}/small", node_id, registry=REGISTRY, hints=(hints or {}).get(node_id))
    return graph


def edges(graph: Graph) -> set[str]:
    return {str(e) for e in graph.edges}


def auto(graph: Graph) -> set[str]:
    return {str(e) for e in graph.edges if e.origin == "auto"}


# ---- order -----------------------------------------------------------------------------------------------------------


def test_all_orders_of_six_nodes_give_one_edge_set() -> None:  # proves 01 A-8
    six = ["txt", "ini", "net", "cfg", "stp", "dec"]
    found = {frozenset(edges(graph_of((n, EIGHT[n]) for n in order))) for order in itertools.permutations(six)}
    assert found == {frozenset(e for e in EDGES_OF_EIGHT if "tok" not in e and "ctl" not in e)}


def test_many_orders_of_eight_nodes_give_one_edge_set() -> None:  # proves 01 A-8
    draw = random.Random(8)
    for _ in range(400):
        order = draw.sample(list(EIGHT.items()), 8)
        assert edges(graph_of(order)) == EDGES_OF_EIGHT, [n for n, _ in order]


@given(st.permutations(list(EIGHT.items())), st.lists(st.integers(0, 7), max_size=8))
def test_order_does_not_matter_even_when_looked_at_in_between(order: list[tuple[str, str]], looks: list[int]) -> None:
    graph = Graph("g")
    for i, (node_id, role) in enumerate(order):
        graph.add_node(f"{role}/small", node_id, registry=REGISTRY)
        if i in looks:
            graph.validate(strict=False)
    assert edges(graph) == EDGES_OF_EIGHT


@given(st.permutations(list(EIGHT)), st.permutations(list(EIGHT)))
def test_a_node_that_leaves_is_as_if_it_had_never_come(order: list[str], going: list[str]) -> None:
    graph = graph_of((n, EIGHT[n]) for n in order)
    gone: set[str] = set()
    for node_id in going[:4]:
        graph.remove_node(node_id)
        gone.add(node_id)
        assert edges(graph) == edges(graph_of((n, EIGHT[n]) for n in order if n not in gone))


STEPS = [
    ("node", "ini"), ("node", "net"), ("node", "cfg"), ("node", "stp"), ("node", "dec"), ("node", "extra"),
    ("edge", "extra.y -> stp.pred"), ("expose", "net.timestep"),
]  # fmt: skip


@given(st.permutations(STEPS))
def test_edges_and_exposures_by_hand_may_come_in_any_order(steps: list[tuple[str, str]]) -> None:
    graph = Graph("g")
    waiting = list(steps)
    while waiting:
        for step in list(waiting):
            kind, what = step
            names = what.replace(" -> ", ".").split(".")
            if kind == "node":
                graph.add_node(f"{EIGHT.get(what, 'free')}/small", what, registry=REGISTRY)
            elif not {names[0], names[-2]} <= set(graph.nodes):
                continue
            elif kind == "edge":
                graph.add_edge(*names)
            else:
                graph.expose_input(*names, name="t")
            waiting.remove(step)
    assert [str(e) for e in graph.edges if e.origin == "manual"] == ["extra.y -> stp.pred"]
    # The manual feed takes guidance's place; backbone and guidance are then outside the loop, so nothing is carried to them.
    assert auto(graph) == {
        "net.pred -> cfg.pred_cond", "ini.latent -> net.latent", "ini.latent -> stp.latent", "ini.timestep -> stp.timestep",
        "stp.next_latent ~> stp.latent", "stp.next_timestep ~> stp.timestep", "stp.next_latent -> dec.decode_latent",
    }  # fmt: skip
    assert [(x.node_id, x.port_name) for x in graph.exposures("in", explicit=True)] == [("net", "timestep")]


# ---- what the wiring does --------------------------------------------------------------------------------------------


def test_guidance_displaces_the_direct_edge_and_gives_it_back() -> None:  # proves 01 A-8
    graph = graph_of([("net", "backbone"), ("stp", "solver")])
    assert "net.pred -> stp.pred" in edges(graph)
    graph.add_node("guidance/small", "cfg", registry=REGISTRY)
    assert "net.pred -> stp.pred" not in edges(graph) and "cfg.pred_guided -> stp.pred" in edges(graph)
    assert [(str(r.edge), str(r.by)) for r in graph.wiring_report.replaced] == [
        ("net.pred -> stp.pred", "cfg.pred_guided -> stp.pred")
    ]
    graph.remove_node("cfg")
    assert "net.pred -> stp.pred" in edges(graph)


CFG = [
    ("tok", "tokenizer"), ("txt", "conditioner"), ("neg", "conditioner"), ("net", "backbone"), ("net0", "backbone"),
    ("cfg", "guidance"), ("stp", "solver"), ("ini", "initializer"), ("dec", "codec"),
]  # fmt: skip


def test_branches_go_by_hints() -> None:
    expected = {
        "tok.token_ids -> txt.input", "tok.attention_mask -> txt.attention_mask",
        "tok.token_ids -> neg.input", "tok.attention_mask -> neg.attention_mask",  # a lone tokenizer serves both
        "txt.embedding -> net.condition", "neg.embedding -> net0.condition",
        "net.pred -> cfg.pred_cond", "net0.pred -> cfg.pred_uncond", "cfg.pred_guided -> stp.pred",
        "stp.next_latent -> dec.decode_latent",
    }  # fmt: skip
    for node in ("net", "net0", "stp"):
        for port in ("latent", "timestep"):
            expected |= {f"ini.{port} -> {node}.{port}", f"stp.next_{port} ~> {node}.{port}"}
    draw = random.Random(9)
    for _ in range(300):
        graph = graph_of(draw.sample(CFG, len(CFG)), CFG_HINTS)
        assert edges(graph) == expected
        assert not graph.wiring_report.ambiguous


def test_a_tokenizer_of_the_same_branch_is_preferred_and_brings_its_mask() -> None:
    nodes = [("tok", "tokenizer"), ("tok0", "tokenizer"), ("txt", "conditioner"), ("neg", "conditioner")]
    for order in itertools.permutations(nodes):
        assert edges(graph_of(order, CFG_HINTS)) == {
            "tok.token_ids -> txt.input", "tok.attention_mask -> txt.attention_mask",
            "tok0.token_ids -> neg.input", "tok0.attention_mask -> neg.attention_mask",
        }  # fmt: skip


def test_the_mask_never_comes_without_the_tokens() -> None:
    graph = graph_of([("tok", "tokenizer"), ("txt", "conditioner"), ("other", "free")])
    graph.add_edge("other", "y", "txt", "input")
    assert edges(graph) == {"other.y -> txt.input"}
    graph = graph_of([("tok", "tokenizer"), ("txt", "conditioner")])
    graph.expose_input("txt", "input")
    assert edges(graph) == set()


def test_the_codec_is_never_pulled_into_the_loop() -> None:
    nodes = [("ini", "initializer"), ("net", "backbone"), ("stp", "solver"), ("enc", "codec"), ("dec", "codec")]
    for order in itertools.permutations(nodes):
        graph = graph_of(order, {"enc": {"codec": "encode"}})
        touching = {e for e in edges(graph) if "enc." in e or "dec." in e}
        assert touching == {"enc.encode_latent -> ini.init_latent", "stp.next_latent -> dec.decode_latent"}
        assert {loop.nodes for loop in graph.plan().loops} == {("net", "stp")}


def test_an_encoding_codec_without_initializer_seeds_the_loop() -> None:
    graph = graph_of([("net", "backbone"), ("stp", "solver"), ("enc", "codec")], {"enc": {"codec": "encode"}})
    assert {"enc.encode_latent -> net.latent", "enc.encode_latent -> stp.latent"} <= edges(graph)
    graph.add_node("initializer/small", "ini", registry=REGISTRY)
    assert "enc.encode_latent -> net.latent" not in edges(graph) and "ini.latent -> net.latent" in edges(graph)


ODD_NAMES = ["zz", "_9", "a", "Q1", "m_m", "b0"]


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_loop_with_odd_names_equals_the_closed_form(steps: int) -> None:  # proves 01 A-9
    kinds = ["txt", "ini", "net", "cfg", "stp", "dec"]
    # x <- x + (x/2 + t), t <- t + 1, from x=1, t=0; solved: x_n = 5 * 1.5**n - 2n - 4
    closed = 5 * 1.5**steps - 2 * steps - 4
    draw = random.Random(steps)
    for order in itertools.islice(itertools.permutations(kinds), 0, None, 1 if steps == 2 else 7):
        names = dict(zip(kinds, draw.sample(ODD_NAMES, 6), strict=True))
        graph = graph_of((names[k], EIGHT[k]) for k in order)
        graph.expose_input(names["txt"], "input", "prompt")
        graph.expose_output(names["dec"], "decode_image", "image")
        assert graph.run({"prompt": 3}, num_loop_steps=steps) == {"image": pytest.approx(100 * closed)}
        assert graph.nodes[names["dec"]].child.calls == ["decode"], "the decoder runs once"


def test_several_conditions_and_adapters_are_all_taken() -> None:
    nodes = [("net", "backbone"), ("a", "conditioner"), ("b", "conditioner"), ("c", "adapter"), ("d", "adapter")]
    graph = graph_of(nodes)
    assert {"a.embedding -> net.condition", "b.embedding -> net.condition"} <= edges(graph)
    assert {"c.adapted -> net.adapter_features", "d.adapted -> net.adapter_features"} <= edges(graph)


def test_a_weight_adapter_has_no_edges_and_is_never_called() -> None:
    graph = graph_of([("ini", "initializer"), ("net", "backbone"), ("stp", "solver")])
    graph.add_node("adapter/lora", "lora", registry=REGISTRY)
    assert not [e for e in edges(graph) if "lora" in e]
    assert "lora" not in graph.plan().order()
    assert not [i for i in graph.validate().warnings if i.node == "lora"]


def test_ports_that_do_not_fit_are_not_joined_and_reported() -> None:
    class Words(roles.Solver):
        ports = (
            Port("latent", "in", "tensor"), Port("timestep", "in", "number"), Port("pred", "in", "text"),
            Port("next_latent", "out", "tensor"), Port("next_timestep", "out", "number"),
        )  # fmt: skip

    graph = graph_of([("net", "backbone")])
    graph.add_node(Words(), "stp")
    assert "net.pred -> stp.pred" not in edges(graph)
    assert "'tensor' does not fit 'text'" in str(graph.wiring_report)


def test_blocks_without_a_role_are_never_wired() -> None:
    graph = graph_of([("net", "backbone"), ("stp", "solver"), ("free", "free")])
    assert not [e for e in edges(graph) if "free" in e]


def test_nothing_is_carried_without_a_cycle() -> None:
    graph = graph_of([("stp", "solver"), ("net0", "backbone")], CFG_HINTS)
    assert edges(graph) == {"stp.next_latent ~> stp.latent", "stp.next_timestep ~> stp.timestep"}


def test_an_edge_that_would_close_a_data_cycle_is_left_out() -> None:
    for order in itertools.permutations(["tok", "txt", "net", "stp", "dec", "cap"]):
        graph = Graph("g")
        for n in order:
            graph.add_node(f"{EIGHT.get(n, 'free')}/small", n, registry=REGISTRY)
        graph.add_edge("dec", "decode_image", "cap", "x")
        graph.add_edge("cap", "y", "txt", "input")
        # decoded image -> caption -> condition -> backbone -> solver -> decoder would have no beginning
        assert "stp.next_latent -> dec.decode_latent" not in edges(graph)
        assert "txt.embedding -> net.condition" in edges(graph)
        assert "close a cycle" in str(graph.wiring_report)
        assert not [i for i in graph.validate(strict=False).errors if i.code == "LOOP_NO_CARRY"]


# ---- ambiguity and pins ----------------------------------------------------------------------------------------------


def test_the_first_of_several_sources_wins_with_a_warning() -> None:
    graph = graph_of([("one", "backbone"), ("two", "backbone"), ("stp", "solver")])
    assert "one.pred -> stp.pred" in edges(graph) and "two.pred -> stp.pred" not in edges(graph)
    warning = next(i for i in graph.validate(strict=False).warnings if i.code == "AMBIGUOUS_WIRING")
    assert warning.path == "g/stp.pred" and "two could feed it too" in warning.message and "connect=" in warning.hint


def test_a_pin_chooses_also_a_source_that_comes_later() -> None:
    for early in (True, False):
        graph = graph_of([("one", "backbone")] + [("two", "backbone")] * early)
        graph.add_node("solver/small", "stp", registry=REGISTRY, connect={"pred": "two"})
        if not early:
            broken = graph.validate(strict=False).errors
            assert [(i.code, i.path) for i in broken if i.code == "PIN_BROKEN"] == [("PIN_BROKEN", "g/stp.pred")]
            assert "there is no such node" in str(broken)
            with pytest.raises(ValidationError, match="pinned to 'two'"):
                graph.validate()
            graph.add_node("backbone/small", "two", registry=REGISTRY)
        assert "two.pred -> stp.pred" in edges(graph) and "one.pred -> stp.pred" not in edges(graph)
        assert not graph.wiring_report.ambiguous and not graph.wiring_report.broken_pins


def test_a_pin_beats_priority_and_takes_aliases_and_lists() -> None:
    graph = graph_of(
        [("net", "backbone"), ("cfg", "guidance"), ("a", "conditioner"), ("b", "conditioner"), ("c", "conditioner")]
    )
    graph.add_node("solver/small", "stp", registry=REGISTRY, connect={"model_output": "net"})
    assert "net.pred -> stp.pred" in edges(graph)
    graph.add_node("backbone/small", "two", registry=REGISTRY, connect={"condition": ["a", "c"]})
    assert {e for e in edges(graph) if "two.condition" in e} == {
        "a.embedding -> two.condition",
        "c.embedding -> two.condition",
    }


def test_two_loops_in_one_graph_by_pins() -> None:
    graph = graph_of([("ini", "initializer"), ("net", "backbone"), ("stp", "solver")])
    graph.add_node("initializer/small", "ini2", registry=REGISTRY)
    pins = {"latent": "ini2", "timestep": "ini2"}
    graph.add_node("backbone/small", "net2", registry=REGISTRY, connect=pins)
    graph.add_node("solver/small", "stp2", registry=REGISTRY, connect={**pins, "pred": "net2"})
    assert {"stp2.next_latent ~> net2.latent", "stp2.next_timestep ~> net2.timestep"} <= edges(graph)
    assert "stp.next_latent ~> net2.latent" not in edges(graph), "what is carried follows the loop"
    assert sorted(loop.nodes for loop in graph.plan().loops) == [("net", "stp"), ("net2", "stp2")]


@pytest.mark.parametrize(
    ("block_type", "connect", "message"),
    [
        ("solver/small", {"prd": "net"}, "did you mean 'pred'"),
        ("solver/small", {"next_latent": "net"}, "no wiring rule feeds"),
        ("free/small", {"x": "net"}, "a block without a role"),
    ],
)
def test_a_pin_on_an_input_without_rule_is_refused(block_type: str, connect: dict[str, str], message: str) -> None:
    graph = graph_of([("net", "backbone")])
    version = graph.version
    with pytest.raises(NodeError, match=message):
        graph.add_node(block_type, "n", registry=REGISTRY, connect=connect)
    assert list(graph.nodes) == ["net"] and graph.version == version


def test_a_pin_that_no_rule_can_make_is_told() -> None:
    graph = graph_of([("tok", "tokenizer")])
    graph.add_node("solver/small", "stp", registry=REGISTRY, connect={"pred": "tok"})
    assert "no rule joins them" in str(graph.validate(strict=False))


# ---- what is given by hand -------------------------------------------------------------------------------------------


def test_manual_edges_stay_and_take_the_place_of_automatic_ones() -> None:
    graph = graph_of(EIGHT.items())
    graph.add_node("free/small", "mine", registry=REGISTRY)
    graph.edges  # noqa: B018 - look, so that automatic edges are in place
    manual = graph.add_edge("mine", "y", "stp", "pred")
    assert edges(graph) - EDGES_OF_EIGHT == {"mine.y -> stp.pred"} and "cfg.pred_guided -> stp.pred" not in edges(graph)
    graph.auto_connect_all()
    assert manual in graph.edges and "given by hand" in str(graph.wiring_report)
    graph.remove_edge(manual)
    assert edges(graph) == EDGES_OF_EIGHT
    with pytest.raises(EdgeError, match="takes one data edge"):
        graph.add_edge("mine", "y", "stp", "pred")
        graph.add_edge("net", "pred", "stp", "pred")


def test_an_automatic_edge_can_be_made_ones_own() -> None:
    graph = graph_of([("net", "backbone"), ("stp", "solver")])
    graph.edges  # noqa: B018
    graph.add_edge("net", "pred", "stp", "pred")
    graph.add_node("guidance/small", "cfg", registry=REGISTRY)
    assert "net.pred -> stp.pred" in edges(graph) - auto(graph)


def test_exposed_inputs_are_left_alone_and_the_loop_still_carries() -> None:
    graph = graph_of([("ini", "initializer"), ("net", "backbone"), ("stp", "solver")])
    graph.edges  # noqa: B018
    graph.expose_input("net", "latent", "start")
    graph.expose_input("stp", "latent", "start")
    assert not [e for e in edges(graph) if e.startswith("ini.latent")]
    assert {"stp.next_latent ~> net.latent", "stp.next_latent ~> stp.latent"} <= edges(graph)
    graph.expose_output("stp", "next_latent", "x")
    assert graph.run({"start": 3.0}, num_loop_steps=1) == {"x": 4.5}
    graph.unexpose_input("start")
    assert "ini.latent -> net.latent" in edges(graph)


def test_a_refused_edge_or_exposure_changes_nothing() -> None:  # proves 01 A-16
    graph = graph_of(EIGHT.items())
    before, version = graph.edges, graph.version
    with pytest.raises(EdgeError, match="takes 'tensor' but"):
        graph.add_edge("tok", "decoded_text", "stp", "pred")
    with pytest.raises(EdgeError):
        graph.add_edge("tok", "nothing", "stp", "pred")
    with pytest.raises(NodeError):
        graph.expose_input("stp", "nothing")
    with pytest.raises(ConfigError):
        graph.expose_input("stp", "pred", "not a name")
    assert (graph.edges, graph.version) == (before, version)


def test_removing_an_automatic_edge_takes_the_wiring_into_ones_hands() -> None:
    graph = graph_of(EIGHT.items())
    gone = next(e for e in graph.edges if str(e) == "ctl.adapted -> net.adapter_features")
    graph.remove_edge(gone)
    assert edges(graph) == EDGES_OF_EIGHT - {str(gone)}
    graph.add_node("backbone/small", "net0", registry=REGISTRY, hints={"branch": "uncond"})
    assert str(gone) not in edges(graph) and "net0.pred -> cfg.pred_uncond" in edges(graph)
    graph.auto_connect_all()
    assert str(gone) in edges(graph)
    with pytest.raises(EdgeError, match="has no edge"):
        graph.remove_edge(Edge("tok", "token_ids", "net", "condition"))


def test_a_node_added_without_wiring_is_a_partner_later() -> None:
    graph = graph_of([("net", "backbone")])
    graph.add_node("solver/small", "stp", registry=REGISTRY, auto_connect=False)
    assert edges(graph) == set()
    graph.add_node("guidance/small", "cfg", registry=REGISTRY)
    assert edges(graph) == {"net.pred -> cfg.pred_cond", "cfg.pred_guided -> stp.pred"}
    assert "stp.next_latent ~> net.latent" in {str(e) for e in graph.auto_connect_all().added}


def test_renaming_and_replacing_keep_the_wiring() -> None:
    graph = graph_of([("net", "backbone"), ("cfg", "guidance"), ("ini", "initializer")])
    graph.add_node("solver/small", "stp", registry=REGISTRY, connect={"pred": "net"})
    before = edges(graph)
    graph.rename_node("net", "model")
    assert edges(graph) == {e.replace("net.", "model.") for e in before}
    graph.auto_connect_all()
    assert "model.pred -> stp.pred" in edges(graph), "the pin follows the new name"
    graph.replace_block("model", small.Backbone(rate=2))
    assert edges(graph) == {e.replace("net.", "model.") for e in before}


# ---- looking without changing ----------------------------------------------------------------------------------------


def test_suggestions_are_pure_and_apply_makes_them() -> None:
    graph = graph_of([("net", "backbone"), ("ini", "initializer")])
    graph.add_node("solver/small", "stp", registry=REGISTRY, auto_connect=False)
    before, version = graph.edges, graph.version
    suggested = suggest_edges(graph, "stp")
    assert (graph.edges, graph.version) == (before, version)
    report = apply_auto_connect(graph, "stp")
    assert set(report.added) == set(suggested) == set(graph.edges) - set(before)
    assert {str(e) for e in suggested} >= {"net.pred -> stp.pred", "stp.next_latent ~> stp.latent"}
    assert suggest_edges(graph, "stp") == []
    graph.add_node("free/small", "free", registry=REGISTRY)
    assert suggest_edges(graph, "free") == []
    with pytest.raises(NodeError, match="did you mean 'stp'"):
        suggest_edges(graph, "stpp")


def test_the_report_names_what_was_done() -> None:
    graph = graph_of(EIGHT.items())
    report = graph.wiring_report
    assert {str(e) for e in report.added} == EDGES_OF_EIGHT
    assert {str(e) for e in report.about("tok").added} == {e for e in EDGES_OF_EIGHT if e.startswith("tok")}
    assert "replaced net.pred -> stp.pred by cfg.pred_guided -> stp.pred" in str(report)
    assert str(Graph("g").wiring_report) == "nothing to wire"


# ---- hints and rules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        ({"brnch": "cond"}, "unknown hint 'brnch'; did you mean 'branch'"),
        ({"branch": "uncnd"}, "did you mean 'uncond'"),
        ({"codec": "both"}, "known: 'decode', 'encode'"),
    ],
)
def test_hints_are_checked(hints: dict[str, str], message: str) -> None:
    graph = Graph("g")
    with pytest.raises(NodeError, match=message):
        graph.add_node("codec/small", "c", registry=REGISTRY, hints=hints)
    assert not graph.nodes and graph.version == 0
    config = {"id": "g", "nodes": [{"node_id": "c", "block_type": "codec/small", "hints": hints}]}
    with pytest.raises(ConfigError, match=message):
        Graph.from_config(config, registry=REGISTRY)


def test_the_first_value_of_a_hint_is_its_default() -> None:
    assert {name: values[0] for name, values in HINTS.items()} == {"branch": "cond", "codec": "decode"}


def test_rules_can_be_asked_for() -> None:
    assert [(r.target_port, r.source_hints) for r in get_rules("backbone", "guidance")] == [
        ("pred_cond", {"branch": "cond"}), ("pred_uncond", {"branch": "uncond"}),
    ]  # fmt: skip
    assert all(r.carry for r in get_rules("solver", "backbone"))
    for pair in (
        ("llm", "tokenizer"),
        ("llm", "conditioner"),
        ("vlm", "conditioner"),
        ("conditioner", "agent"),
        ("tokenizer", "llm"),
    ):
        assert get_rules(*pair) == [], "these are joined by hand only"  # proves 01 T-28


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule("backbon", "pred", "solver", "pred"), "did you mean 'backbone'"),
        (Rule("backbone", "prd", "solver", "pred"), "did you mean 'pred'"),
        (Rule("backbone", "pred", "solver", "pred", same=("brunch",)), "did you mean 'branch'"),
        (Rule("backbone", "pred", "solver", "pred", source_hints={"branch": "no"}), "hint 'branch' is 'no'"),
    ],
)
def test_bad_rules_are_refused(rule: Rule, message: str) -> None:
    before = get_rules()
    with pytest.raises(ConfigError, match=message):
        register_rule(rule)
    assert get_rules() == before


def test_a_role_and_rule_from_outside_are_wired() -> None:  # proves 01 A-17, wiring part
    class Sharpener(Block):
        role = "sharpener_of_tests"
        ports = (Port("image", "in", "image"), Port("sharp", "out", "image"))

        def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
            return {"sharp": inputs["image"] + 1}

    roles.register_role("sharpener_of_tests", Sharpener)
    rule = Rule("codec", "decode_image", "sharpener_of_tests", "image", source_hints={"codec": "decode"})
    try:
        assert register_rule(rule) is rule
        register_rule(rule)
        assert get_rules("codec", "sharpener_of_tests") == [rule]
        for first in (True, False):
            graph = graph_of([("ini", "initializer"), ("net", "backbone"), ("stp", "solver")])
            if first:
                graph.add_node(Sharpener(), "sharp")
            graph.add_node("codec/small", "dec", registry=REGISTRY)
            if not first:
                graph.add_node(Sharpener(), "sharp")
            graph.expose_output("sharp", "sharp", "image")
            assert graph.run({}) == {"image": 151.0}
    finally:
        _rules.remove(rule)
        del _by_target["sharpener_of_tests"], roles.KNOWN_ROLES["sharpener_of_tests"]


# ---- agents and tools ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(["bot", "calc", "sum"])))
def test_tools_are_registered_with_an_agent_and_not_joined(order: tuple[str, ...]) -> None:  # proves 01 T-27 row 15
    graph = Graph("g")
    for n in order:
        graph.add_node("agent/small" if n == "bot" else "tool/small", n, registry=REGISTRY)
    assert graph.tools == {"calc": {"node": "calc"}, "sum": {"node": "sum"}} and not graph.edges
    graph.infer_exposed_ports()
    assert graph.plan().order() == ["bot"], "tools are called by the agent, not by the plan"
    assert graph.run({"bot:context": "hello"}) == {"bot:response": "hello"}
    again = Graph.from_config(graph.to_config(), registry=REGISTRY)
    assert again.tools == graph.tools and again.to_config() == graph.to_config()
    graph.rename_node("calc", "abacus")
    assert graph.tools["calc"] == {"node": "abacus"}
    graph.remove_node("abacus")
    assert graph.tools == {"sum": {"node": "sum"}}


def test_a_tool_without_an_agent_is_an_ordinary_node() -> None:
    graph = graph_of([("calc", "tool")])
    assert graph.tools == {} and graph.run({"expression": "2"}) == {"result": 2.0}


def test_any_node_can_be_made_a_tool_by_hand() -> None:  # proves 01 T-26, registration
    graph = graph_of([("bot", "agent"), ("free", "free"), ("stp", "solver"), ("cut", "tokenizer")])
    graph.add_tool("look_up", "free", description="looks up")
    assert graph.tools["look_up"] == {"node": "free", "description": "looks up"}
    assert graph.resting() == {"free"}
    for tool_id, node, options, message in (
        ("step", "stp", {}, "input 'latent' needs a tensor"),
        ("bad id", "free", {}, "letters, digits"),
        ("look_up", "free", {}, "already"),
        ("cut", "cut", {}, "result_port"),
        ("cut", "cut", {"result_port": "decoded"}, "did you mean 'decoded_text'"),
    ):
        with pytest.raises(ToolError, match=message):
            graph.add_tool(tool_id, node, **options)
    graph.add_tool("cut", "cut", result_port="decoded_text")
    with pytest.raises(NodeError, match="did you mean 'free'"):
        graph.add_tool("other", "fre")
    assert set(graph.tools) == {"look_up", "cut"}
    graph.remove_tool("cut")
    with pytest.raises(ToolError, match="did you mean 'look_up'"):
        graph.remove_tool("look")
    assert set(graph.tools) == {"look_up"} and "cut" in graph.nodes


def test_a_tool_that_cannot_be_called_is_refused_and_nothing_changes() -> None:
    class Filter(roles.Tool):
        ports = (Port("x", "in", "tensor"), Port("y", "out", "tensor"))

    graph = graph_of([("bot", "agent")])
    version = graph.version
    with pytest.raises(ToolError, match="'x' needs a tensor"):
        graph.add_node(Filter(), "filter")
    assert (list(graph.nodes), graph.tools, graph.version) == (["bot"], {}, version)
    graph.add_node(Filter(), "filter", auto_connect=False)
    assert graph.tools == {}


def test_broken_tool_tables_are_told() -> None:
    graph = graph_of([("calc", "tool")])
    graph.tools = {"calc": {"node": "calc"}}
    assert "no agent" in str(graph.validate(strict=False))
    graph.add_node("agent/small", "bot", registry=REGISTRY)
    graph.tools["gone"] = {"node": "nowhere"}
    with pytest.raises(ValidationError, match="'nowhere', which does not exist"):
        graph.validate()


# ---- files -----------------------------------------------------------------------------------------------------------


def test_loaded_graphs_keep_their_edges_as_listed() -> None:  # proves 01 T-38
    graph = graph_of(EIGHT.items())
    graph.add_node("free/small", "mine", registry=REGISTRY)
    graph.add_edge("dec", "decode_image", "mine", "x")
    graph.expose_input("tok", "text", "prompt")
    config = graph.to_config()
    pool = ModelPool()
    again = Graph.from_config(config, registry=REGISTRY, pool=pool)
    assert [(str(e), e.origin) for e in again.edges] == [(str(e), e.origin) for e in graph.edges]
    assert again.to_config() == config
    bare = {**config, "edges": [], "exposed_inputs": [{"name": n, "node_id": n, "port_name": p} for n, p in (
        ("txt", "input"), ("net", "latent"), ("net", "timestep"), ("stp", "latent"), ("stp", "timestep"), ("stp", "pred"),
        ("cfg", "pred_cond"), ("ctl", "condition"),
    )]}  # fmt: skip
    bare["exposed_inputs"] = [{**x, "name": f"{x['node_id']}_{x['port_name']}"} for x in bare["exposed_inputs"]]
    assert Graph.from_config(bare, registry=REGISTRY, pool=pool).edges == (), "loading never wires"


def test_a_loaded_graph_goes_on_being_wired() -> None:
    loop = graph_of([("ini", "initializer"), ("net", "backbone"), ("stp", "solver")])
    again = Graph.from_config(loop.to_config(), registry=REGISTRY)
    again.add_node("guidance/small", "cfg", registry=REGISTRY)
    loop.add_node("guidance/small", "cfg", registry=REGISTRY)
    assert edges(again) == edges(loop)
    again.remove_node("cfg")
    assert "net.pred -> stp.pred" in edges(again), "the listed edge comes back"


def test_wiring_a_loaded_graph_again_finds_the_same_edges() -> None:
    graph = graph_of(CFG, CFG_HINTS)
    again = Graph.from_config(graph.to_config(), registry=REGISTRY)
    report = again.auto_connect_all()
    assert [str(e) for e in again.edges] == [str(e) for e in graph.edges]
    assert len(report.added) == len(set(report.added)) and not report.ambiguous


def test_a_loaded_automatic_edge_can_be_replaced_by_hand() -> None:
    loop = graph_of([("ini", "initializer"), ("net", "backbone"), ("stp", "solver"), ("mine", "free")])
    again = Graph.from_config(loop.to_config(), registry=REGISTRY)
    again.add_edge("mine", "y", "stp", "pred")
    assert "net.pred -> stp.pred" not in edges(again)
    again = Graph.from_config(loop.to_config(), registry=REGISTRY)
    again.remove_edge(Edge("net", "pred", "stp", "pred"))
    lost = {"net.pred -> stp.pred", "stp.next_latent ~> net.latent", "stp.next_timestep ~> net.timestep"}
    assert edges(again) == edges(loop) - lost, "what was carried along the edge goes with it"


def test_a_file_that_contradicts_itself_is_refused() -> None:
    loop = graph_of([("ini", "initializer"), ("net", "backbone"), ("stp", "solver"), ("mine", "free")])
    config = loop.to_config()
    config["edges"].append({"source_node": "mine", "source_port": "y", "target_node": "stp", "target_port": "pred"})
    with pytest.raises(ConfigError, match=r"net\.pred -> stp\.pred is listed, but mine\.y"):
        Graph.from_config(config, registry=REGISTRY)
    config = loop.to_config()
    config["exposed_inputs"] = [{"node_id": "stp", "port_name": "pred"}]
    with pytest.raises(ConfigError, match="the input is exposed"):
        Graph.from_config(config, registry=REGISTRY)


# ---- any graph at all ------------------------------------------------------------------------------------------------

ROLES = sorted(set(EIGHT.values()))
NODE = st.tuples(
    st.sampled_from([*ROLES, "free"]),
    st.fixed_dictionaries(
        {"branch": st.sampled_from(["cond", "uncond"]), "codec": st.sampled_from(["decode", "encode"])}
    ),
)


@settings(max_examples=150)
@given(
    st.lists(NODE, min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=4),
    st.randoms(),
)
def test_whatever_is_built_is_wired_legally(
    nodes: list[tuple[str, dict[str, str]]], manual: list[tuple[int, int]], draw: random.Random
) -> None:
    def build(late: bool) -> Graph:
        graph = Graph("g")
        ids = [f"n{i}" for i in range(len(nodes))]

        def join() -> None:
            for a, b in manual:
                if a % len(ids) < b % len(ids) < len(graph.nodes) and nodes[b % len(ids)][0] == "free":
                    port = next(iter(graph.nodes[ids[a % len(ids)]].child.port_index.outputs))
                    edge = Edge(ids[a % len(ids)], port, ids[b % len(ids)], "x")
                    if not any(e.origin == "manual" for e in graph.edges_in(edge.target_node)):
                        graph.add_edge(edge)

        for node_id, (role, hints) in zip(ids, nodes, strict=True):
            graph.add_node(f"{role}/small", node_id, registry=REGISTRY, hints=hints)
            if not late:
                join()
        join()
        return graph

    graph, other = build(late=False), build(late=True)
    assert auto(graph) == auto(other), "when a look or a manual edge comes does not matter"
    issues = {i.code for i in graph.validate(strict=False).errors}
    assert issues <= {"REQUIRED_UNFED", "LOOP_NO_SEED"}, "wiring makes no double feeds, no cycles, no idle carries"
    before = [(str(e), e.origin) for e in graph.edges]
    graph.auto_connect_all()
    assert [(str(e), e.origin) for e in graph.edges] == before


@pytest.mark.parametrize(
    "roles_in_turn", [["free"], ["solver"], ["initializer", "backbone", "solver"], ["conditioner"]]
)
def test_work_grows_with_the_graph_and_not_with_its_square(roles_in_turn: list[str]) -> None:
    def calls(count: int) -> int:
        """Python calls for building and looking at a graph of `count` nodes: the same number at every run."""
        seen = 0

        def count_call(frame: Any, event: str, argument: Any) -> None:
            nonlocal seen
            seen += event == "call"

        graph = Graph("g")
        sys.setprofile(count_call)
        try:
            for i in range(count):
                graph.add_node(f"{roles_in_turn[i % len(roles_in_turn)]}/small", f"n{i}", registry=REGISTRY)
                if roles_in_turn == ["free"] and i:
                    graph.add_edge(f"n{i - 1}", "y", f"n{i}", "x")
            graph.validate(strict=False)
        finally:
            sys.setprofile(None)
        return seen

    calls(20)
    assert calls(480) < 1.5 * 8 * calls(60)
