"""Adding nodes to a graph: every way to name a block, pretrained weights, and nothing left behind by a failure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from wg_core import Block, BlockRegistry, ConfigError, Graph, ModelPool, Port, WGError, register_block
from wg_core.assembly import roles
from wg_core.errors import (
    CheckpointError,
    MissingInputError,
    NodeError,
    PortError,
    StateDictError,
    ToolError,
    UnknownBlockTypeError,
)
from wg_core.execution.node import Node


class Net(roles.Backbone):
    """`pred = weight * latent`; the weight is its state."""

    def __init__(self, *, weight: float = 1, checkpoint_ref: str | None = None) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"pred": self.weight * inputs["latent"]}

    def own_state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def load_own_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weight = state["weight"]


class Step(roles.Solver):
    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"next_latent": inputs["latent"] + inputs["pred"], "next_timestep": inputs["timestep"]}


class Wild(roles.Tool):
    ports = (Port("x", "in", "tensor"), Port("y", "out", "tensor"))


class Bot(roles.Agent):
    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"response": inputs["context"]}


@pytest.fixture
def registry() -> BlockRegistry:
    found = BlockRegistry()
    found.register("backbone/net", Net)
    found.register("solver/step", Step)
    found.register("tool/wild", Wild)
    found.register("agent/bot", Bot)
    return found


def test_a_type_string_builds_and_wires(registry: BlockRegistry) -> None:
    graph = Graph("g")
    assert graph.add_node("backbone/net", registry=registry) == "backbone_net_0"
    assert graph.add_node("backbone/net", registry=registry, config={"weight": 3}) == "backbone_net_1"
    assert graph.nodes["backbone_net_1"].child.config == {"weight": 3}
    graph.add_node("solver/step", "s", registry=registry)
    assert "backbone_net_0.pred -> s.pred" in map(str, graph.edges)


def test_a_config_mapping_builds_and_is_not_changed(registry: BlockRegistry) -> None:
    given = {"block_type": "backbone/net", "config": {"weight": 2}}
    graph = Graph("g")
    graph.add_node(given, "n", registry=registry)
    assert graph.nodes["n"].child.config == {"weight": 2}
    assert given == {"block_type": "backbone/net", "config": {"weight": 2}}
    with pytest.raises(NodeError, match="config is given twice"):
        graph.add_node(given, "m", registry=registry, config={})


def test_a_registered_class_builds_as_its_type(registry: BlockRegistry) -> None:
    @register_block("backbone/of_this_test", registry=registry)
    class Own(Net):
        pass

    graph = Graph("g")
    assert graph.add_node(Own, registry=registry) == "backbone_of_this_test_0"
    assert graph.nodes["backbone_of_this_test_0"].child.block_type == "backbone/of_this_test"
    with pytest.raises(UnknownBlockTypeError, match="class Step is not registered"):
        graph.add_node(Step, registry=registry)


def test_a_ready_block_or_node_is_taken_as_it_is(registry: BlockRegistry) -> None:
    graph = Graph("g")
    block = Net(weight=4)
    graph.add_node(block, "a")
    assert graph.nodes["a"].child is block
    graph.add_node(block, "b")
    assert graph.nodes["b"].child is block, "one block may sit in several nodes"
    node: Node[Block] = Node("s", Step(), trainable=False, hints={"branch": "uncond"})
    assert graph.add_node(node) == "s"
    assert not graph.nodes["s"].trainable and graph.nodes["s"].hints == {"branch": "uncond"}
    assert "a.pred -> s.pred" in map(str, graph.edges), "a node is wired too"
    assert graph.add_node(Node("t", Step()), auto_connect=False) == "t"
    assert not graph.edges_in("t")
    refused: list[dict[str, Any]] = [{"config": {}}, {"registry": registry}, {"pool": ModelPool()}]
    for arguments in refused:
        with pytest.raises(NodeError, match="takes no config, registry or pool"):
            graph.add_node(Net(), "c", **arguments)
    for arguments in (
        *refused,
        {"node_id": "x"},
        {"trainable": False},
        {"hints": {"branch": "cond"}},
        {"pretrained": {}},
    ):
        with pytest.raises(NodeError, match="a Node is added as it is"):
            graph.add_node(Node("c", Step()), **arguments)
    assert set(graph.nodes) == {"a", "b", "s", "t"}


def test_the_same_reference_is_the_same_block(registry: BlockRegistry) -> None:
    graph, pool = Graph("g"), ModelPool()
    for node_id in ("a", "b"):
        graph.add_node("backbone/net", node_id, config={"checkpoint_ref": "w"}, registry=registry, pool=pool)
    assert graph.nodes["a"].child is graph.nodes["b"].child
    assert [entry.block for entry in pool.list()] == [graph.nodes["a"].child], "an empty pool is a pool too"


def test_two_words_are_enough(registry: BlockRegistry) -> None:
    config = {"id": "g", "nodes": [{"node_id": "n", "block_type": "backbone/net", "config": {"weight": 2}}]}
    graph = Graph.from_config(config, registry=registry)
    assert graph.nodes["n"].child.config == {"weight": 2}


def test_unknown_arguments_are_errors(registry: BlockRegistry) -> None:
    with pytest.raises(TypeError, match="node_name"):
        Graph("g").add_node("backbone/net", node_name="n", registry=registry)  # type: ignore[call-arg]


def test_pretrained_takes_a_state_or_a_checkpoint(registry: BlockRegistry, tmp_path: Path) -> None:
    graph = Graph("g")
    graph.add_node("backbone/net", "a", registry=registry, pretrained={"weight": 5})
    assert graph.nodes["a"].child.state_dict() == {"weight": 5}
    path = Net(weight=7).save_checkpoint(tmp_path / "net")
    for given in (path, str(path)):
        node = graph.add_node("backbone/net", registry=registry, pretrained=given)
        assert graph.nodes[node].child.state_dict() == {"weight": 7}


FAILURES: dict[str, tuple[Callable[[Graph, BlockRegistry], object], type[Exception]]] = {
    "unknown type": (lambda g, r: g.add_node("backbone/nett", "n", registry=r), UnknownBlockTypeError),
    "unknown config": (lambda g, r: g.add_node("backbone/net", "n", registry=r, config={"wait": 1}), ConfigError),
    "taken id": (lambda g, r: g.add_node("solver/step", "a", registry=r), NodeError),
    "bad id": (lambda g, r: g.add_node("solver/step", "a b", registry=r), ConfigError),
    "unknown default": (lambda g, r: g.add_node("solver/step", "n", registry=r, defaults={"pre": 1}), NodeError),
    "unknown hint": (lambda g, r: g.add_node("solver/step", "n", registry=r, hints={"brunch": "cond"}), NodeError),
    "pin without rule": (lambda g, r: g.add_node("solver/step", "n", registry=r, connect={"x_next": "a"}), NodeError),
    "pin without wiring": (
        lambda g, r: g.add_node("solver/step", "n", registry=r, connect={"pred": "a"}, auto_connect=False), NodeError,
    ),
    "missing state": (lambda g, r: g.add_node("backbone/net", "n", registry=r, pretrained={}), StateDictError),
    "unexpected state": (
        lambda g, r: g.add_node("backbone/net", "n", registry=r, pretrained={"weight": 1, "bias": 2}), StateDictError,
    ),
    "no checkpoint": (
        lambda g, r: g.add_node("backbone/net", "n", registry=r, pretrained="nowhere/at/all"),
        (FileNotFoundError, CheckpointError),  # type: ignore[dict-item]
    ),
    "uncallable tool": (lambda g, r: g.add_node("tool/wild", "n", registry=r), ToolError),
    "no block": (lambda g, r: g.add_node(7, "n"), NodeError),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_a_failing_add_node_changes_nothing(case: str, registry: BlockRegistry) -> None:  # proves 01 A-16
    add, error = FAILURES[case]
    graph = Graph("g")
    graph.add_node("backbone/net", "a", registry=registry)
    graph.add_node("agent/bot", "bot", registry=registry)
    graph.add_node("solver/step", "s", registry=registry)
    before = (list(graph.nodes), graph.edges, graph.version, dict(graph.tools), str(graph.wiring_report))
    with pytest.raises(error):
        add(graph, registry)
    assert (list(graph.nodes), graph.edges, graph.version, dict(graph.tools), str(graph.wiring_report)) == before


def test_errors_are_of_the_family() -> None:
    for error in (NodeError, StateDictError, ToolError, PortError, MissingInputError):
        assert issubclass(error, WGError)


def test_round_trip_keeps_everything(registry: BlockRegistry) -> None:  # proves 01 A-15, graph part
    graph = Graph("g", task_kind="diffusion", metadata={"owner": "demo"})
    graph.add_node("solver/step", "s", registry=registry, defaults={"timestep": 3}, trainable=False)
    graph.add_node("backbone/net", "n", registry=registry, hints={"branch": "cond"}, defaults={"timestep": 3})
    graph.add_node("agent/bot", "bot", registry=registry)
    graph.add_edge("s", "next_latent", "n", "latent", carry=True)
    graph.expose_input("s", "latent", "x")
    graph.expose_input("n", "latent", "x")
    graph.expose_input("bot", "context", "ask")
    graph.expose_output("s", "next_latent", "y")
    config = graph.to_config()
    assert [e.get("origin", "manual") for e in config["edges"]] == ["manual"] + 4 * ["auto"]
    again = Graph.from_config(config, registry=registry)
    assert again.to_config() == config
    given = {"x": 1.0, "ask": "?"}
    assert again.run(given, num_loop_steps=5) == graph.run(given, num_loop_steps=5) == {"y": 32.0}
