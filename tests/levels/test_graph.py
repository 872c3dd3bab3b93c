"""Graph: adding blocks, writing down and building again, state, training selection."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks_for_tests import Affine, Const, Weights, chain, cycle

from wg_core import Block, BlockRegistry, ConfigError, Graph, ModelPool
from wg_core.errors import NodeError, StateDictError, UnknownBlockTypeError
from wg_core.execution.node import LoopSpec, Node
from wg_core.structure.hyperlink import HyperEdge, HyperLink


def test_the_public_surface_as_it_is_promised() -> None:
    """Design 4: these spellings."""
    g = Graph("adder")
    n = g.add_node(Affine(scale=2), "a")
    assert n == "a"
    g.add_node(Affine(offset=1), "b")
    g.add_edge("a", "y", "b", "x")
    g.add_edge("b", "y", "a", "x", carry=True)
    g.expose_input("a", "x", name="x")
    g.expose_output("b", "y", name="y")
    assert g.run({"x": 1}, num_loop_steps=5) == {"y": 63}


@pytest.mark.parametrize(
    ("what", "config"),
    [
        ("test/affine", {"scale": 3}),
        ({"block_type": "test/affine", "config": {"scale": 3}}, None),
        ({"type": "test/affine", "scale": 3}, None),
        (Affine(scale=3), None),
        (Node("a", Affine(scale=3), defaults={"x": 2}), None),
    ],
)
def test_ways_to_add_a_block(what: Any, config: Any, registry: BlockRegistry) -> None:
    """01 F-46, 02 G-12: a type, a mapping, a block, a node."""
    graph = Graph("g")
    more: dict[str, Any] = {} if isinstance(what, (Block, Node)) else {"registry": registry}
    if config is not None:
        more["config"] = config
    if not isinstance(what, Node):
        more["defaults"] = {"x": 2}
    node_id = graph.add_node(what, **more)
    assert graph.run({}) == {"y": 6}
    assert node_id == {"Node": "a", "Affine": "affine_0"}.get(type(what).__name__, "test_affine_0")


def test_generated_ids_count_up_and_skip_taken_ones() -> None:
    """02 G-12: deterministic from the type plus a counter."""
    graph = Graph("g")
    assert [graph.add_node(Const()) for _ in range(2)] == ["const_0", "const_1"]
    graph.remove_node("const_0")
    assert graph.add_node(Const()) == "const_0"


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda g, r: g.add_node(Affine(), "a", config={"scale": 1}), NodeError, "a ready block takes no config, registry or pool"),
        (lambda g, r: g.add_node(Node("a", Affine()), "b"), NodeError, "a Node is added as it is; set its own fields"),
        (lambda g, r: g.add_node({"block_type": "test/affine"}, "a", config={}, registry=r), NodeError, "config is given twice"),
        (lambda g, r: g.add_node(3, "a"), NodeError, "g: cannot add a int; give a block type, class, mapping, block or node"),
        (lambda g, r: g.add_node("test/afine", "a", registry=r), UnknownBlockTypeError, "did you mean 'test/affine'"),
        (lambda g, r: g.add_node("test/affine", "a", config={"z": 1}, registry=r), ConfigError, "unknown config key 'z'"),
        (lambda g, r: g.add_node("test/affine", "a", config={"token": "s"}, registry=r), ConfigError, "looks like a secret"),
        (lambda g, r: Graph("a b"), ConfigError, "bad graph id 'a b'"),
    ],
)  # fmt: skip
def test_forbidden_mixes_change_nothing(
    call: Callable[[Graph, BlockRegistry], Any], error: type[Exception], says: str, registry: BlockRegistry
) -> None:
    """01 F-1, A-2, A-16."""
    graph = Graph("g")
    with pytest.raises(error) as caught:
        call(graph, registry)
    assert says in str(caught.value)
    assert (graph.version, dict(graph.nodes)) == (0, {})


def full(registry: BlockRegistry) -> Graph:
    """A graph that uses everything a file can say."""
    graph = Graph("g", task_kind="generic", metadata={"description": "a test", "version": 3})
    graph.title = "Títle: of a graph"
    build = {"registry": registry, "pool": ModelPool()}
    graph.add_node("test/const", "start", config={"value": 1}, trainable=False, **build)
    graph.add_node("test/affine", "double", config={"scale": 2.5}, defaults={"x": 0}, **build)
    graph.add_node("test/reached", "check", config={"limit": 1e6}, hints={"branch": "cond"}, **build)
    graph.add_node(graph.nodes["double"].child, "again")
    graph.add_edge("start", "y", "double", "x")
    graph.add_edge("double", "y", "check", "x")
    graph.add_edge("check", "y", "double", "x", carry=True)
    graph.add_edge("check", "y", "again", "x", origin="auto")
    graph.set_loops([LoopSpec("double", 4, {"node": "check", "port": "done"}, ("double", "check"))])
    graph.expose_output("again", "y", "y")
    graph.expose_output("check", "done")
    graph.links.append(HyperLink(target_kind="world", target_id="tide", rel="inspired_by"))
    graph.hyperedges.append(HyperEdge.model_validate({"id": "h", "kind": "group", "members": [{"path": "start"}]}))
    return graph


def test_the_round_trip_loses_nothing(registry: BlockRegistry, tmp_path: Path) -> None:
    """01 A-15, 02 G-51: also through a file."""
    graph = full(registry)
    config = graph.to_config()
    again = Graph.from_config(config, registry=registry, pool=ModelPool())
    assert again.to_config() == config
    assert again.run() == graph.run() == {"y": 97.65625, "check:done": False}
    assert again.nodes["again"].child is again.nodes["double"].child
    assert [e.origin for e in again.edges] == [e.origin for e in graph.edges]
    from_file = Graph.from_yaml(graph.save_config(tmp_path / "g.yaml"), registry=registry, pool=ModelPool())
    assert from_file.to_config() == config
    assert Graph.from_yaml_text((tmp_path / "g.yaml").read_text(), registry=registry).to_config() == config


def test_a_block_without_a_type_cannot_be_written_down() -> None:
    """02 G-26 NOT_SERIALIZABLE, 01 A-2: ConfigError."""
    with pytest.raises(ConfigError, match="block of class Affine has no registered type; register it with @register_block"):
        chain(Affine()).to_config()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda g: g.metadata.update(note=object()), "g: metadata.note: builtins.object is not plain JSON"),
        (lambda g: g.metadata.update(scale=float("nan")), "g: metadata.scale: nan is not JSON"),
        (lambda g: g.metadata.update(note="\ud800"), "g: metadata.note: the text holds half of a surrogate pair"),
        (lambda g: g.set_default("a", "x", torch.ones(1)), "g/a: defaults.x: torch.Tensor is not plain JSON"),
        (lambda g: g.links.append(link({"of": {1, 2}})), r"g: links\[0\].meta.of: builtins.set is not plain JSON"),
        (lambda g: g.nodes["a"].links.append(link({"at": float("inf")})), r"g/a: links\[0\].meta.at: inf is not JSON"),
        (
            lambda g: g.hyperedges.append(HyperEdge.model_validate(
                {"id": "h", "kind": "group", "members": [{"path": "a"}], "payload": {"made": object()}})),
            r"g: hyperedges\[0\].payload.made: builtins.object is not plain JSON",
        ),
    ],
)  # fmt: skip
def test_what_no_file_can_hold_is_not_written(
    change: Callable[[Graph], Any], says: str, registry: BlockRegistry, tmp_path: Path
) -> None:
    """02 G-26 NOT_SERIALIZABLE, S-2: beside the blocks' own configuration too, and before there is a file."""
    graph = Graph("g")
    graph.add_node("test/affine", "a", registry=registry)
    change(graph)
    for write in (graph.save_config, graph.save):
        with pytest.raises(ConfigError, match=says) as caught:
            write(tmp_path / "written")
        assert caught.value.code == "NOT_SERIALIZABLE" and list(tmp_path.iterdir()) == []


def link(meta: dict[str, Any]) -> HyperLink:
    return HyperLink(target_kind="world", target_id="tide", meta=meta)


def test_a_file_of_another_level_is_refused() -> None:
    """02 G-51."""
    with pytest.raises(ConfigError, match=r"<graph>: kind: this is a pipeline, a graph is needed here"):
        Graph.from_config({"kind": "pipeline", "nodes": []})


def test_state_is_stored_once_for_each_block_and_comes_back() -> None:
    """01 A-10, A-5, 02 S-3."""
    shared = Weights(scale=2)
    graph = chain(shared, Weights(scale=3), shared)
    state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in graph.state_dict().items()}
    assert list(state) == ["n0:weight", "n0:steps", "n1:weight", "n1:steps"]
    other_shared = Weights()
    other = chain(other_shared, Weights(), other_shared)
    report = other.load_state_dict(state)
    assert (report.missing, report.unexpected) == ((), ())
    x = torch.ones(1, 2)
    assert torch.equal(other.run({"x": x})["y"], graph.run({"x": x})["y"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("n0:steps"), r"missing \['n0:steps'\]"),
        (lambda s: s.update({"n9:steps": 1}), r"unexpected \['n9:steps'\]"),
        (lambda s: s.update({"n1:weight": torch.ones(3, 3)}), r"wrong shape \['n1:weight'\]"),
    ],
)
def test_a_wrong_state_changes_nothing(change: Callable[[dict[str, Any]], Any], says: str) -> None:
    """01 F-22, A-2, A-5: StateDictError; strict by default."""
    graph = chain(Weights(scale=2), Weights(scale=3))
    state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in graph.state_dict().items()}
    state["n0:weight"] = torch.zeros(2, 2)
    change(state)
    with pytest.raises(StateDictError, match=f"chain cannot load this state: .*{says}"):
        graph.load_state_dict(state)
    assert torch.equal(graph.state_dict()["n0:weight"], torch.eye(2) * 2)


def test_which_nodes_train() -> None:
    """02 T: `set_trainable`, parameters once, stable names."""
    graph = chain(Weights(), Weights())
    assert [n for n, _ in graph.named_trainable_parameters()] == ["n0:weight", "n1:weight"]
    graph.set_trainable("n0", False)
    assert [n for n, _ in graph.named_trainable_parameters()] == ["n1:weight"]
    graph.set_trainable("n0", freeze_others=True)
    assert [n for n, _ in graph.named_trainable_parameters()] == ["n0:weight"]
    with pytest.raises(NodeError, match="chain has no node 'n7'; known: 'n0', 'n1'"):
        graph.set_trainable("n7")
    with pytest.raises(NodeError, match="chain/n0 is a block; there is no node 'x' below it"):
        graph.set_trainable("n0/x")


def test_a_wrong_path_freezes_nothing() -> None:
    """01 F-53: every mutator is atomic."""
    graph = chain(Weights(), Weights())
    with pytest.raises(NodeError):
        graph.set_trainable("n0/x", freeze_others=True)
    assert all(node.trainable for node in graph.nodes.values())


def test_a_loop_that_trains() -> None:
    """02 G-39: gradients flow through carried values."""
    graph = cycle(Weights(scale=2))
    y = graph.run({"x": torch.ones(1, 2)}, num_loop_steps=3, training=True)["y"]
    y.sum().backward()
    weight = graph.trainable_parameters()[0]
    # y = x w^3 with x = (1, 1), w = 2 I: d(sum)/dw_ij = 3 * 2^2 for all i, j
    assert torch.equal(weight.grad, torch.full((2, 2), 12.0))
