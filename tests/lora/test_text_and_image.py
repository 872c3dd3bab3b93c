"""Text and image parts of a world learn by one path: one fit over the adapters of a language model and of a diffusion backbone."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from wg_core import Graph, ModelPool, World
from wg_core.levels.lora_world import lora_world
from wg_core.levels.training import calling
from wg_core.weights.training_config import TrainingConfig
from worlds import AT, block_at, config, texts

NET, END = "tell/tell/tell/net", "tell/tell/tell/solver:next_latent"
DATA = torch.zeros(1, 1, 8, 8)
DATA[..., :4] = 1.5  # what is to be drawn: a bright left half


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> World:
    folder = tmp_path_factory.getbasetemp() / "worlds"
    folder.mkdir(exist_ok=True)
    given = config(folder)
    drawing = Graph("drawing")
    drawing.add_node("initializer/noise", "start", config={"shape": [1, 1, 8, 8]})
    drawing.add_node("backbone/toy", "net", config={"channels": 1, "width": 16})
    drawing.add_node("solver/euler", "solver", config={"num_steps": 8})
    made, tell = drawing.to_config(), given["execution"]["stages"]["tell"]["graph"]
    tell["nodes"] += made["nodes"]
    tell["edges"] = made["edges"]
    world = World.from_config(given, pool=ModelPool())
    world.set_storage(tmp_path / "snapshots")
    return world


def far_off(world: World) -> float:
    """How far from the picture a world draws, by Euler steps through its own graph (mean square)."""
    drawn = world.rehearse({"tell": {}}, training=False, seed=3, capture=[END], per_node=None, num_loop_steps=8)[END]
    return float((drawn - DATA).square().mean())


def test_one_fit_for_text_and_picture(base: World) -> None:
    """03 L-9, L-2: noise prediction and answers in one training; the base is frozen and its hashes stay."""
    world = lora_world(base, "noir", rank=8, modules=["*"], targets=["stage:tell/*"])
    assert list(world.adapters()) == ["default/tell.tell.tell.llm", "default/tell.tell.tell.net"]
    before = [block_at(base, p).weight_hash() for p in (NET, AT["tell"]) if block_at(base, p).materialize() is None]
    plain, drew = texts(base), far_off(base)
    assert far_off(world) == drew

    def loss(batch: list[Any]) -> Any:
        losses: list[Any] = []
        for example in batch:
            if "answer" in example:
                with calling(world, AT["tell"]) as block:
                    losses.append(block.answer_loss([example])[0])  # type: ignore[attr-defined]
                continue
            noise = torch.randn(8, 1, 8, 8)
            time = torch.rand(8).reshape(-1, 1, 1, 1)
            with calling(world, NET) as net:  # the velocity from data to noise (Lipman et al. 2023, https://arxiv.org/abs/2210.02747)
                seen = {"latent": (1 - time) * DATA + time * noise, "timestep": time.flatten()}
                losses.append((net.forward(seen)["pred"] - (noise - DATA)).square().mean())
        return torch.stack(losses).sum() / len(batch)

    words = {"messages": [{"role": "user", "content": "A storm"}], "answer": " lands"}
    examples = [words, {"picture": 1}]
    told: list[float] = []
    plan = TrainingConfig(steps=60, batch_size=2, lr=0.02, seed=1)
    world.fit(examples, plan, loss, hooks=[lambda e: told.append(e.data["loss"]) if e.kind == "train_step" else None])
    assert median(told[-9:]) < 0.6 * median(told[:9])
    assert far_off(world) < 0.5 * drew and far_off(base) == drew
    assert texts(world)[0] != plain[0] and texts(base) == plain
    assert [block_at(base, p).weight_hash() for p in (NET, AT["tell"])] == before
    assert all(p.grad is None for p in (NET, AT["tell"]) for _, p in block_at(base, p).named_parameters())
