"""Generative worlds: the engine. Plain Python; torch is imported only when a block needs it."""

from wg_core.assembly.pool import ModelPool
from wg_core.assembly.registry import BlockRegistry, register_block
from wg_core.errors import ConfigError, ValidationError, WGError
from wg_core.execution.block import Block
from wg_core.execution.context import current_context
from wg_core.levels.end_world import EndWorld
from wg_core.levels.graph import Graph
from wg_core.levels.pipeline import Pipeline
from wg_core.levels.stage import Stage
from wg_core.levels.world import Flow, World
from wg_core.state.content import WorldContent
from wg_core.state.state import State
from wg_core.structure.port import Port

__all__ = [
    "Block", "BlockRegistry", "ConfigError", "EndWorld", "Flow", "Graph", "ModelPool", "Pipeline", "Port", "Stage", "State",
    "ValidationError", "WGError", "World", "WorldContent", "current_context", "register_block",
]  # fmt: skip
