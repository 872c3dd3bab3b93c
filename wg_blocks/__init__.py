"""What blocks do: one file per role or family."""

from __future__ import annotations

from typing import Any

BLOCKS = {
    "llm/hf": "wg_blocks.llm_local:CausalLM",
    "llm/fake": "wg_blocks.llm_fake:FakeLLM",
    "text/template": "wg_blocks.text:Template",
    "world/context": "wg_blocks.text:Context",
    "image/terrain": "wg_blocks.terrain:TerrainDiffusion",
    "image/relief": "wg_blocks.terrain:Relief",
    "map/measure": "wg_blocks.maps:MeasureMap",
    "describe/items": "wg_blocks.describe:DescribeItems",
    "graph/ref": "wg_blocks.graph_ref:GraphRef",
    "maker/dispatch": "wg_blocks.maker:Dispatch",
}


def register(registry: Any) -> None:
    """Register all block types of this package; each class is imported at its first use."""
    for block_type, factory in BLOCKS.items():
        registry.register(block_type, factory)
