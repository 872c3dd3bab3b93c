"""Training here and not there: a shared block that learns in one place only, and lets gradients through in the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import Linear, Net, Outer, chain

from wg_core import Graph, Pipeline, Port
from wg_core.weights.module import frozen_forward

X = torch.linspace(-1, 1, 12).reshape(4, 3)


def gradient(graph: Any, first: Any, shared: Any) -> tuple[Any, Any, Any]:
    """(output, gradient of what comes before, gradient of the shared block)."""
    first.modules["net"].weight.grad = shared.modules["net"].weight.grad = None
    y = graph.run({"x": X}, training=True)["y"]
    y.square().sum().backward()
    return y.detach(), first.modules["net"].weight.grad, shared.modules["net"].weight.grad


def expected(first: Any, shared: Any, trained: str) -> tuple[Any, Any, Any]:
    """The same by plain torch: first -> shared (use a) -> shared (use b), learning in one use."""
    w0 = first.modules["net"].weight.detach().clone().requires_grad_()
    w = shared.modules["net"].weight.detach().clone().requires_grad_()
    a, b = (w if trained == use else w.detach() for use in "ab")
    y = X @ w0.t() @ a.t() @ b.t()
    y.square().sum().backward()
    return y.detach(), w0.grad, w.grad


@pytest.mark.parametrize("trained", ["a", "b"])
def test_the_gradient_is_that_of_the_trainable_use_alone(trained: str) -> None:
    # proves 01 A-18, T-45, 02 T-4
    first, shared = Linear(init_seed=1), Linear(init_seed=2)
    graph = chain(("first", first), ("a", shared), ("b", shared))
    graph.set_trainable("b" if trained == "a" else "a", False)
    for got, want in zip(gradient(graph, first, shared), expected(first, shared, trained), strict=True):
        torch.testing.assert_close(got, want)
    assert len(graph.trainable_parameters()) == 2
    graph.set_trainable("a")
    graph.set_trainable("b")
    both = gradient(graph, first, shared)[2]
    torch.testing.assert_close(both, expected(first, shared, "a")[2] + expected(first, shared, "b")[2])


def test_a_graph_that_is_not_trainable_in_its_pipeline_holds_all_its_nodes_still() -> None:
    first, shared = Linear(init_seed=1), Linear(init_seed=2)
    pipeline = Pipeline("p")
    pipeline.add_graph(chain(("first", first), ("use", shared), id="a"))
    pipeline.add_graph(chain(("use", shared), id="b"))
    pipeline.add_edge("a", "y", "b", "x")
    pipeline.expose_input("a", "x", "x")
    pipeline.expose_output("b", "y", "y")
    pipeline.set_trainable("b", False)
    for got, want in zip(gradient(pipeline, first, shared), expected(first, shared, "a"), strict=True):
        torch.testing.assert_close(got, want)
    pipeline.set_trainable("b")
    pipeline.set_trainable("a", False)
    _, before, shared_grad = gradient(pipeline, first, shared)
    assert before is None
    torch.testing.assert_close(shared_grad, expected(first, shared, "b")[2])


def test_the_still_use_is_in_evaluation_mode_and_the_other_is_not() -> None:
    shared = Net()
    graph = Graph("g")
    for node_id in ("learns", "still"):
        graph.add_node(shared, node_id)
        graph.expose_input(node_id, "x", "x")
        graph.expose_output(node_id, "y", node_id)
    graph.set_trainable("still", False)
    before = {k: v.clone() for k, v in shared.state_dict().items()}
    torch.manual_seed(0)
    outputs = graph.run({"x": X}, training=True)
    assert shared.training is False and shared.modules["enc"].training is False  # as it was before the run
    assert int(shared.state_dict()["enc.1.num_batches_tracked"]) == 1  # one use learned, the other left no trace
    assert not torch.equal(outputs["learns"], outputs["still"])
    assert before.keys() == shared.state_dict().keys()
    assert all(p.requires_grad for p in shared.trainable_parameters())


def test_blocks_inside_blocks_are_held_still_too() -> None:
    block, x = Outer().train(), X.clone().requires_grad_()
    y = frozen_forward(block, {"x": x})["y"]
    torch.testing.assert_close(y, block.eval().run({"x": X})["y"])
    y.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(p.grad is None for _, p in block.named_parameters())
    assert not block.parts["net"].modules["enc"].training


def test_an_error_in_the_still_use_leaves_modes_and_weights_as_they_were() -> None:
    class Fails(Net):
        ports = (Port("x", "in", "tensor"), Port("y", "out", "tensor"))

        def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
            raise RuntimeError("no")

    block = Fails().train()
    block.materialize()
    with pytest.raises(RuntimeError, match="no"):
        frozen_forward(block, {"x": X})
    assert block.training and block.modules["enc"].training
    assert all(isinstance(p, torch.nn.Parameter) and p.requires_grad for _, p in block.named_parameters())
