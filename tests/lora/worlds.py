"""Worlds with tiny real models for the tests of LoRA worlds: two stages write with one language model, one draws."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tiny_lm import save_tiny_lm

from wg_core import ModelPool, World
from wg_core.levels.flow import Flow
from wg_core.state.store import SnapshotStore
from wg_core.weights.module import ModuleBlock

AT = {"tell": "tell/tell/tell/llm", "judge": "judge/judge/judge/llm"}


def model(folder: Path) -> Path:
    """The tiny language model, made once in a folder."""
    return folder / "lm" if (folder / "lm").is_dir() else save_tiny_lm(folder / "lm")


def config(folder: Path, world_id: str = "base") -> dict[str, Any]:
    """A world whose two stages share a language model; the second also has a model behind an API beside it."""

    def stage(name: str, said: str, more: Mapping[str, Any], outputs: Mapping[str, str], also: list[Any] | None = None) -> dict[str, Any]:
        defaults = {"prompt": said, "params": {"temperature": 0.9, "max_new_tokens": 12}}
        node = {"node_id": "llm", "model": "text", "defaults": defaults}
        ends = {"exposed_inputs": [("context", "context")], "exposed_outputs": [("text", "text")]}
        exposed = {k: [{"name": n, "node_id": "llm", "port_name": p} for n, p in v] for k, v in ends.items()}
        graph = {"id": name, "nodes": [node, *(also or [])], **exposed}
        return {"outputs": outputs, "graph": {"kind": "graph", **graph}, **more}

    far = {"block_type": "llm/api", "config": {"backend": "api", "provider": "fake", "model_id": "far-1"}}
    judge = {"reads": ["intent"], "writes": ["outcome"]}
    lm = {"block_type": "llm/hf", "config": {"checkpoint_ref": str(model(folder)), "dtype": "float64"}}  # rounding decides no token
    return {
        "kind": "world",
        "world_id": world_id,
        "execution": {
            "cycle": ["tell", "judge"],
            "models": {"text": lm},
            "stages": {
                "tell": stage("tell", "A storm lands.", {"writes": ["intent"], "reads": []}, {"intent.text": "text"}),
                "judge": stage("judge", "The bell rings.", judge, {"outcome.narrative": "text"},
                               [{"node_id": "far", **far, "defaults": {"prompt": "x"}}]),
            },
        },
        "content": {"description": "A harbour."},
    }  # fmt: skip


def base_world(folder: Path, snapshots: Path, pool: ModelPool | None = None) -> World:
    """The world of `config`, in a pool of its own."""
    world = World.from_config(config(folder), pool=ModelPool() if pool is None else pool)
    world.set_storage(SnapshotStore(snapshots))
    return world


def flow_of(world: World) -> Flow:
    """A step of the world without committing it."""
    flow = world.begin(seed=1, state={})
    try:
        for role in world.cycle:
            flow = world.run_stage(role, flow)
    finally:
        world.store.journal_clear(world.world_id, flow.step)
        world.abandon(flow)
    return flow


def texts(world: World) -> tuple[str, str]:
    """What the two stages write in a step."""
    state = flow_of(world).state
    return state["intent"]["text"], state["outcome"]["narrative"]


def teach(world: Any, seed: int, *, size: float = 0.6, only: str = "") -> None:
    """Numbers that change something, in the adapters whose `set/key` begins with `only`."""
    generator = torch.Generator().manual_seed(seed)
    for name, adapter in world.adapters().items():
        if name.startswith(only):
            with torch.no_grad():
                for _, parameter in adapter.named_parameters():
                    parameter.copy_((torch.rand(parameter.shape, generator=generator) - 0.5) * size)


def block_at(world: World, path: str) -> ModuleBlock:
    """The block at a path of a world."""
    found: Any = dict(world.block_paths())[path]
    return found
