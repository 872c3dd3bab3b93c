"""One suite over the doors to training of every level: graph, pipeline, stage and world learn by the same rules."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "weights"))

from nets import Linear, Reads, Tells

from wg_core import Graph, Pipeline, Stage, World, current_context
from wg_core.errors import (
    ConfigError,
    NodeError,
    NodeExecutionError,
    NothingTrainableError,
    PortValueError,
    UnexpectedInputError,
)
from wg_core.levels.training import bound_loss, calling
from wg_core.state.store import SnapshotStore
from wg_core.weights.fit import Binding, GroupSettings, TrainingConfig

TEXT = "1 -2 0.5"
X = torch.tensor([[1.0, -2.0, 0.5]])
TARGET = torch.tensor([[0.25, 0.0, -1.0]])
LR = 0.1


@dataclass
class Case:
    """A level around `first -> second`, where their nodes are, and what it is run with."""

    level: Any
    below: str
    inputs: dict[str, Any]
    first: Linear
    second: Linear

    def path(self, node: str) -> str:
        return f"{self.below}{node}"

    def config(self, **more: Any) -> TrainingConfig:
        bound = Binding(capture=self.path("second:y"), target="y")
        given = {"optimizer": "sgd", "lr": LR, "steps": 1, "loss": (bound,), **more}
        return TrainingConfig(**given)

    @property
    def example(self) -> dict[str, Any]:
        return {"inputs": self.inputs, "targets": {"y": TARGET}}


def graph(shared: bool = False) -> Graph:
    made, first = Graph("g"), Linear(init_seed=1)
    made.add_node(Reads(), "reads")
    made.add_node(first, "first")
    made.add_node(first if shared else Linear(init_seed=2), "second")
    made.add_node(Tells(), "tells")
    for a, b in (("reads", "first"), ("first", "second"), ("second", "tells")):
        made.add_edge(a, "y", b, "x")
    made.expose_input("reads", "x", "x")
    made.expose_output("tells", "y", "narrative")
    return made


def stage(shared: bool = False) -> Stage:
    made = Stage("s", reads=["intent"], writes=["outcome"], inputs={"x": "intent.text"}, outputs={"outcome.narrative": "narrative"})
    made.add_pipeline(graph(shared), "p")
    return made


def world(folder: Path, shared: bool = False) -> World:
    made = World("isle", {"tell": stage(shared)}, store=SnapshotStore(folder))
    made.set_cycle(["tell"])
    return made


KINDS = ("graph", "pipeline", "stage", "world")


def make(kind: str, folder: Path, shared: bool = False) -> Case:
    state = {"state": {"intent": {"text": TEXT}}}
    made: dict[str, Callable[[], tuple[Any, str, dict[str, Any]]]] = {
        "graph": lambda: (graph(shared), "", {"x": TEXT}),
        "pipeline": lambda: (Pipeline.from_graph(graph(shared)), "g/", {"x": TEXT}),
        "stage": lambda: (stage(shared), "p/g/", state),
        "world": lambda: (world(folder, shared), "tell/p/g/", {"tell": state}),
    }
    level, below, inputs = made[kind]()
    blocks = dict(level.block_paths())
    return Case(level, below, inputs, blocks[f"{below}first"], blocks[f"{below}second"])


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return make(request.param, tmp_path)


@pytest.fixture(params=KINDS)
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return make(request.param, tmp_path, shared=True)


def weight(block: Linear) -> torch.Tensor:
    return block.modules["net"].weight.detach().clone()


def by_hand(w1: torch.Tensor, w2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of mean((X W1' W2' - T)^2) by the formula: D = 2 (Y - T) / n, dW2 = D' H, dW1 = (D W2)' X."""
    h = X @ w1.t()
    d = 2 * (h @ w2.t() - TARGET) / TARGET.numel()
    return (d @ w2).t() @ X, d.t() @ h


def test_a_step_is_the_computed_update(case: Case) -> None:
    """02 T-1, T-2, T-6, T-7, T-11, 03 L-1: W - lr dW at every level, the loss bound to a port inside."""
    w1, w2 = weight(case.first), weight(case.second)
    g1, g2 = by_hand(w1, w2)
    result = case.level.fit([case.example], case.config())
    torch.testing.assert_close(weight(case.first), w1 - LR * g1)
    torch.testing.assert_close(weight(case.second), w2 - LR * g2)
    assert result.steps == 1 and result.stopped == "steps"
    assert case.first.modules["net"].weight.grad is None and not case.first.training


@pytest.mark.parametrize("chosen", ["first", "second"])
def test_what_is_chosen_learns_and_nothing_else(case: Case, chosen: str) -> None:
    """02 T-1, 03 L-1, L-2: by path, dotted path and glob, from the top of any level."""
    still = {"first": case.second, "second": case.first}[chosen]
    learns = getattr(case, chosen)
    w1, w2, before = weight(case.first), weight(case.second), weight(still)
    gradient = by_hand(w1, w2)[("first", "second").index(chosen)]
    was = weight(learns)
    case.level.fit([case.example], case.config(trainable=(case.path(chosen).replace("/", "."),)))
    torch.testing.assert_close(weight(learns), was - LR * gradient)
    assert torch.equal(weight(still), before)
    names = [case.path(chosen) + ":net.weight"]
    assert [n for n, _ in case.level.named_trainable_parameters()] == names
    case.level.set_trainable(f"{case.below}*" if case.below else "*s*", freeze_others=True)
    case.level.set_trainable(f"*{case.below}{chosen}" if case.below else chosen, False)
    assert names[0] not in [n for n, _ in case.level.named_trainable_parameters()]


def test_a_shared_block_learns_from_all_its_uses_once(shared: Case) -> None:
    """02 T-2, T-3, 01 T-44, 04 X-3: one parameter, and the gradient is the sum over the uses."""
    w = weight(shared.first)
    g1, g2 = by_hand(w, w)
    assert shared.first is shared.second and len(shared.level.trainable_parameters()) == 1
    shared.level.fit([shared.example], shared.config())
    torch.testing.assert_close(weight(shared.first), w - LR * (g1 + g2))


@pytest.mark.parametrize("chosen", [0, 1])
def test_a_frozen_use_of_a_shared_block_gives_no_gradient_and_lets_it_pass(shared: Case, chosen: int) -> None:
    """02 T-4, 01 T-45, 03 L-1: only the use that learns counts, though the loss goes through the other."""
    w = weight(shared.first)
    only = by_hand(w, w)[chosen]
    shared.level.set_trainable(shared.path(("second", "first")[chosen]), False)
    shared.level.fit([shared.example], shared.config())
    torch.testing.assert_close(weight(shared.first), w - LR * only)


def test_selection_by_role(case: Case) -> None:
    """03 L-2: every block of a role, wherever it is."""
    case.first.role, case.second.role = "backbone", "decoder"
    case.level.set_trainable("role:back*", freeze_others=True)
    assert [n for n, _ in case.level.named_trainable_parameters()] == [case.path("first:net.weight")]
    with pytest.raises(NodeError, match=r"no block of role 'backbon'; did you mean 'backbone'"):
        case.level.set_trainable("role:backbon")
    with pytest.raises(NodeError, match=r"no node matches '\*nobody\*'"):
        case.level.set_trainable("*nobody*")


def test_nothing_to_train_is_an_error_before_the_optimizer(case: Case) -> None:
    """01 T-44."""
    for node in ("reads", "first", "second", "tells"):
        case.level.set_trainable(case.path(node), False)
    assert case.level.trainable_parameters() == []
    with pytest.raises(NothingTrainableError, match="no parameter to train"):
        case.level.fit([case.example], case.config())


def test_groups_by_path(shared: Case, case: Case) -> None:
    """02 T-5: names are paths, order is stable, and one block with two settings is refused."""
    config = case.config(per_path={case.path("second"): GroupSettings(lr=0.5)}, weight_decay=0.01)
    groups = case.level.parameter_groups(config)
    assert [(g["name"], g["lr"], g["weight_decay"], g["names"]) for g in groups] == [
        ("rest", LR, 0.01, [case.path("first:net.weight")]),
        (case.path("second"), 0.5, 0.01, [case.path("second:net.weight")]),
    ]
    first, second = shared.path("first"), shared.path("second")
    differ = {first: GroupSettings(lr=0.5), second: GroupSettings(lr=0.2)}
    if shared.below == case.below:
        with pytest.raises(ConfigError, match="set different values for one parameter"):
            shared.level.parameter_groups(case.config(per_path=differ))
        own = shared.config(per_path={**differ, f"block:{first}": GroupSettings(lr=0.3)})
        assert [(g["lr"], len(g["params"])) for g in shared.level.parameter_groups(own)] == [(0.3, 1)]
    with pytest.raises(ConfigError, match="'nowhere' meets no parameter"):
        case.level.parameter_groups(case.config(per_path={"nowhere": GroupSettings(lr=1)}))


def test_calling_gives_the_surroundings_of_a_real_call(case: Case) -> None:
    """02 T-9: a loss by hand sees the context of a call at that place."""
    seen: list[Any] = []

    class Looks(Linear):
        def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
            c = current_context()
            ids = (c.path, c.world_id, c.stage_id, c.pipeline_id, c.graph_id, c.node_id, c.training, self.training)
            seen.append((*ids, torch.is_grad_enabled()))
            return super().forward(inputs)

    inner: Any = case.level
    for name in filter(None, case.below.split("/")):
        inner = inner.places()[name].child
    inner.replace_block("second", Looks(init_seed=2))
    for training in (True, False):
        case.level.rehearse(case.inputs, training=training)
        with calling(case.level, case.path("second"), training=training) as block:
            block.run({"x": X})
        assert seen[0] == seen[1] and seen[0][-3:] == (training, training, training)
        seen.clear()
    assert not block.training
    with calling(case.level, case.path("second"), seed=3):
        assert current_context().seed == 3
    with pytest.raises(NodeError, match="has no node 'secnd'; did you mean 'second'"), calling(case.level, case.path("secnd")):
        pass
    with pytest.raises(NodeError, match="no part 'x'"), calling(case.level, case.path("second/x")):
        pass


def test_calling_holds_still_what_does_not_learn(case: Case) -> None:
    """02 T-4: gradients pass to the inputs and no weight takes any."""
    case.level.set_trainable(case.path("second"), False)
    x = X.clone().requires_grad_()
    with calling(case.level, case.path("second")) as block:
        block.run({"x": x})["y"].sum().backward()
    assert x.grad is not None and case.second.modules["net"].weight.grad is None
    assert case.second.modules["net"].weight.requires_grad
    with calling(case.level, case.path("first")) as block:
        block.run({"x": X})["y"].sum().backward()
    assert case.first.modules["net"].weight.grad is not None
    with torch.no_grad(), calling(case.level, case.path("first")) as block:
        assert not current_context().training and not block.training


def test_a_loss_names_what_it_lacks(case: Case) -> None:
    with pytest.raises(ConfigError, match="has no loss"):
        bound_loss(case.level, TrainingConfig())
    with pytest.raises(UnexpectedInputError, match="nothing to capture at"):
        case.level.fit([case.example], case.config(loss=(Binding(capture=case.path("sekond:y"), target="y"),)))
    with pytest.raises(ConfigError, match="no target 'y'; there are none"):
        case.level.fit([{"inputs": case.inputs}], case.config())
    with pytest.raises(ConfigError, match="is str, and no tensor"):
        case.level.fit([case.example], case.config(loss=(Binding(capture=case.path("tells:y"), target="y"),)))


def test_a_value_that_is_not_finite_names_its_node(case: Case) -> None:
    """Issue: the guard names the node, here of the second layer that overflows."""
    with torch.no_grad():
        case.second.modules["net"].weight.fill_(float("inf"))
    with pytest.raises((PortValueError, NodeExecutionError), match=r"second\.y is not finite"):
        case.level.fit([case.example], case.config())
