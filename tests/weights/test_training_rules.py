"""Rules of training that one graph shows: loops with a depth, recurrent layers held still, what cuts the gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import PORTS, Linear, chain

from wg_core import Block, BlockRegistry, Graph, World
from wg_core.errors import ConfigError, NothingTrainableError, ValidationError
from wg_core.execution.node import LoopSpec
from wg_core.weights.fit import Binding, TrainingConfig
from wg_core.weights.module import ModuleBlock

LOSS = (Binding(output="y", target="y"),)


class Factor(ModuleBlock):
    """One number that its input is multiplied with."""

    ports = PORTS

    def build_modules(self) -> dict[str, Any]:
        module = torch.nn.Module()
        module.w = torch.nn.Parameter(torch.tensor(2.0))
        return {"net": module}

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": self.modules["net"].w * inputs["x"]}


def looped(depth: int | None) -> Graph:
    graph = chain(("net", Factor()))
    graph.add_edge("net", "y", "net", "x", carry=True)
    graph.set_loops([LoopSpec("net", num_steps=4, grad_steps=depth)])
    return graph


@pytest.mark.parametrize(("depth", "times"), [(None, 4), (4, 4), (9, 4), (3, 3), (1, 1)])
def test_gradients_go_back_through_so_many_iterations(depth: int | None, times: int) -> None:
    """02 T-7: y = x w^4; with the first iterations cut off, y = c w^k with c = x w^(4-k), so dy/dw = k x w^3."""
    graph, x = looped(depth), torch.tensor(3.0, requires_grad=True)
    w = graph.trainable_parameters()[0]
    y = graph.run({"x": x}, training=True)["y"]
    y.backward()
    assert y.item() == 3 * 2**4 and w.grad.item() == times * 3 * 2**3
    assert (x.grad is None) is (times < 4)
    w.grad = None
    graph.fit(
        [{"inputs": {"x": torch.tensor(3.0)}, "targets": {"y": torch.tensor(47.0)}}],
        TrainingConfig(optimizer="sgd", lr=0.001, steps=1, loss=LOSS),
    )
    assert w.item() == pytest.approx(2 - 0.001 * 2 * (48 - 47) * times * 24)


def test_the_depth_is_written_down_and_checked() -> None:
    """02 S-15, T-7."""
    graph = looped(2)
    graph.rename_node("net", "core")
    assert graph.loops[0].grad_steps == 2
    registry = BlockRegistry()
    registry.register("test/factor", Factor)
    config = {
        "kind": "graph", "id": "g", "nodes": [{"node_id": "a", "block_type": "test/factor"}],
        "edges": [{"source_node": "a", "source_port": "y", "target_node": "a", "target_port": "x", "carry": True}],
        "loops": [{"loop_id": "a", "num_steps": 4, "grad_steps": 2}],
        "exposed_inputs": [{"name": "x", "node_id": "a", "port_name": "x"}],
    }  # fmt: skip
    written = Graph.from_config(config, registry=registry).to_config()
    assert written["loops"] == config["loops"]
    assert Graph.from_config(written, registry=registry).plan().loops[0].grad_steps == 2
    graph.set_loops([LoopSpec("core", num_steps=4, grad_steps=0)])
    with pytest.raises(ValidationError, match="grad_steps is 0"):
        graph.validate()
    graph.set_loops([LoopSpec("core", num_steps=4, grad_steps=1, until={"node": "core", "port": "y"})])
    with pytest.raises(ValidationError, match="grad_steps counts from the last step"):
        graph.validate()


class Recurrent(ModuleBlock):
    """A layer that keeps a list of its weights beside them."""

    ports = PORTS

    def build_modules(self) -> dict[str, Any]:
        return {"rnn": torch.nn.LSTM(3, 3, batch_first=True)}

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": self.modules["rnn"](inputs["x"])[0]}


def test_a_recurrent_layer_is_held_still_too() -> None:
    """02 T-1, T-4: no kind of block is excluded."""
    block, first = Recurrent(), Linear()
    graph = chain(("first", first), ("rnn", block))
    x = torch.ones(1, 2, 3)
    graph.run({"x": x}, training=True)["y"].sum().backward()
    assert all(p.grad is not None for p in block.trainable_parameters())
    for p in graph.trainable_parameters():
        p.grad = None
    graph.set_trainable("rnn", False)
    graph.run({"x": x}, training=True)["y"].sum().backward()
    assert all(p.grad is None for p in block.trainable_parameters()) and first.modules["net"].weight.grad is not None
    graph.set_trainable("rnn")
    graph.run({"x": x}, training=True)["y"].sum().backward()
    assert all(p.grad is not None for p in block.trainable_parameters())


class Far(Block):
    """Something that gives numbers and no gradient, as all that runs elsewhere."""

    ports = PORTS
    passes_gradient = False

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": torch.tensor(inputs["x"].tolist())}


def test_what_runs_elsewhere_has_no_parameters_and_what_comes_after_it_learns(caplog: pytest.LogCaptureFixture) -> None:
    """02 T-8, G-26 GRADIENT_BLOCKED, 04 X-3: before the cut nothing can learn, which is said; a loss of that alone is refused."""
    before, after = Linear(init_seed=1), Linear(init_seed=2)
    graph = chain(("before", before), ("far", Far()), ("after", after))
    assert [n for n, _ in graph.named_trainable_parameters()] == ["before:net.weight", "after:net.weight"]
    x, y = torch.ones(1, 3), torch.zeros(1, 3)
    kept, was = (b.modules["net"].weight.detach().clone() for b in (before, after))
    config = TrainingConfig(optimizer="sgd", lr=0.1, steps=1, loss=LOSS)
    graph.fit([{"inputs": {"x": x}, "targets": {"y": y}}], config)
    assert ["GRADIENT_BLOCKED" in r.getMessage() and "before" in r.getMessage() for r in caplog.records] == [True]
    h = x @ kept.t()
    torch.testing.assert_close(after.modules["net"].weight.detach(), was - 0.1 * (2 * (h @ was.t()) / 3).t() @ h)
    assert torch.equal(before.modules["net"].weight, kept)
    graph.set_trainable("before", freeze_others=True)
    with pytest.raises(NothingTrainableError, match="depends on no parameter"):
        graph.fit([{"inputs": {"x": x}, "targets": {"y": y}}], config)


def test_a_world_writes_down_which_stages_learn() -> None:
    """02 T-1, 03 L-1."""
    world = World.from_template("stub", world_id="isle", seed=1)
    world.set_trainable("author", False)
    config = world.to_config()
    assert config["execution"]["stages"]["author"]["trainable"] is False
    again = World.from_config(config)
    assert [n for n, node in again.places().items() if not node.trainable] == ["author"]
    assert again.to_config() == config


def test_an_example_of_another_form_is_refused() -> None:
    """02 T-6: a bound loss says what it takes."""
    with pytest.raises(ConfigError, match="an example for a bound loss is"):
        looped(None).fit([{"x": torch.tensor(3.0)}], TrainingConfig(steps=1, loss=LOSS))
