"""Generative worlds: the engine. Plain Python; torch is imported only when a block needs it.

Each name is imported at its first use, so that a program with graphs only holds no stages and no worlds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wg_core.assembly.pool import ModelPool
    from wg_core.assembly.registry import BlockRegistry, register_block
    from wg_core.errors import ConfigError, ValidationError, WGError
    from wg_core.execution.block import Block
    from wg_core.execution.context import current_context
    from wg_core.levels.end_world import EndWorld
    from wg_core.levels.flow import Flow
    from wg_core.levels.graph import Graph
    from wg_core.levels.pipeline import Pipeline
    from wg_core.levels.stage import Stage
    from wg_core.levels.step_together import step_together
    from wg_core.levels.world import World
    from wg_core.state.content import WorldContent
    from wg_core.state.state import State
    from wg_core.structure.port import Port

_HOMES = {
    "ModelPool": "assembly.pool",
    "BlockRegistry": "assembly.registry",
    "register_block": "assembly.registry",
    "ConfigError": "errors",
    "ValidationError": "errors",
    "WGError": "errors",
    "Block": "execution.block",
    "current_context": "execution.context",
    "EndWorld": "levels.end_world",
    "Graph": "levels.graph",
    "Pipeline": "levels.pipeline",
    "Stage": "levels.stage",
    "Flow": "levels.flow",
    "World": "levels.world",
    "step_together": "levels.step_together",
    "WorldContent": "state.content",
    "State": "state.state",
    "Port": "structure.port",
}

__all__ = [
    "Block", "BlockRegistry", "ConfigError", "EndWorld", "Flow", "Graph", "ModelPool", "Pipeline", "Port", "Stage", "State",
    "ValidationError", "WGError", "World", "WorldContent", "current_context", "register_block",
    "step_together",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
