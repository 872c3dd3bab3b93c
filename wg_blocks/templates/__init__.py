"""Templates that ship with the engine."""

from __future__ import annotations

from importlib import resources
from typing import Any

from wg_blocks.templates.graphs import GRAPHS
from wg_core.assembly.loader import parse


def register(templates: Any) -> None:
    """Register all templates of this package."""
    templates.register("world", "stub", stub)
    templates.register("world", "local", local)
    for name, builder in GRAPHS.items():
        templates.register("graph", name, builder)


def stub(world_id: str = "stub", seed: int | None = None) -> dict[str, Any]:
    """A whole world without models: scripted texts by seed and drawn maps. For trying things out and for tests."""
    return _world("stub_world.yaml", world_id, seed)


def local(
    world_id: str = "local", seed: int | None = None, model: str = "smollm2-135m-instruct", title: str | None = None
) -> dict[str, Any]:
    """A whole world of models on this machine, which `wg models pull` fetches; `model` is the language model."""
    config = _world("local_world.yaml", world_id, seed)
    config["execution"]["models"]["text"]["config"]["checkpoint_ref"] = model
    config["title"] = title or config["title"]
    return config


def _world(file: str, world_id: str, seed: int | None) -> dict[str, Any]:
    text = resources.files(__package__).joinpath(file).read_text(encoding="utf-8")
    config: dict[str, Any] = parse(text, file).data
    config["world_id"] = world_id
    if seed is not None:
        config["execution"]["seed"] = seed
    return config
