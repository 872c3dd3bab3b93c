"""Templates that ship with the engine."""

from __future__ import annotations

from importlib import resources
from typing import Any

from wg_blocks.templates.graphs import GRAPHS
from wg_core.assembly.loader import parse


def register(templates: Any) -> None:
    """Register all templates of this package."""
    templates.register("world", "stub", stub)
    for name, builder in GRAPHS.items():
        templates.register("graph", name, builder)


def stub(world_id: str = "stub", seed: int | None = None) -> dict[str, Any]:
    """A whole world without models: scripted texts by seed and drawn maps. For trying things out and for tests."""
    text = resources.files(__package__).joinpath("stub_world.yaml").read_text(encoding="utf-8")
    config: dict[str, Any] = parse(text, "stub_world.yaml").data
    config["world_id"] = world_id
    if seed is not None:
        config["execution"]["seed"] = seed
    return config
