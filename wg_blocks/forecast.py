"""What a run will ask of language models, before it is paid for: calls and tokens, from prompts and settings alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from wg_blocks.agent_llm import LLMAgent
from wg_blocks.prompt import Settings
from wg_blocks.text import Template
from wg_core.execution.agent import AGENT_STEPS
from wg_core.execution.block import Block
from wg_core.execution.executable_graph import ExecutableGraph
from wg_core.execution.node import Node
from wg_core.execution.plan import steps_of

CHARS_PER_TOKEN = 4  # a common estimate for text that no tokenizer has counted


def forecast(level: ExecutableGraph[Any], path: str = "", times: int = 1) -> Iterator[dict[str, Any]]:
    """One row for each language model node below `level`, loading no weights.

    `{path, model, calls, calls_at_most, per_item, prompt_tokens, context_tokens, completion_tokens, counted_by}`:
    `prompt_tokens` are those of the template and system text (what is filled in comes on top), `context_tokens` the
    room for context, `completion_tokens` the bound; all are for one call. With `per_item` each item of a list is a call.
    """
    loops = {node_id: steps_of(loop, None) for loop in level.plan().loops for node_id in loop.nodes}
    for node_id, node in level.nodes.items():
        here, often = f"{path}/{node_id}".strip("/"), times * loops.get(node_id, 1)
        if isinstance(node.child, ExecutableGraph):
            yield from forecast(node.child, here, often)
        elif getattr(node.child, "role", None) == "llm" and isinstance(node.child, Block):
            yield _row(level, node, here, often)
        elif isinstance(node.child, LLMAgent):
            yield _agent_row(level, node.child, node_id, here, often)


def _agent_row(level: ExecutableGraph[Any], agent: LLMAgent, node_id: str, path: str, times: int) -> dict[str, Any]:
    """An agent asks its model at least once, and once more for each tool call."""
    settings = Settings.of(agent.params)
    specs = [tool.spec for tool in level.agents().get(node_id, ())]
    steps = level.metadata.get("max_agent_steps", AGENT_STEPS)
    tokens, counted_by = _count(agent.llm, agent.head(specs))
    return {
        "path": path,
        "model": _name(agent.llm),
        "calls": times,
        "calls_at_most": times * (min(steps, agent.max_calls + 1) * (1 + settings.max_repairs) if specs else 1),
        "per_item": False,
        "prompt_tokens": tokens,
        "context_tokens": agent.limits["history_chars"] // CHARS_PER_TOKEN,
        "completion_tokens": settings.max_new_tokens,
        "counted_by": counted_by,
    }


def _row(level: ExecutableGraph[Any], node: Node[Any], path: str, times: int) -> dict[str, Any]:
    block: Any = node.child
    settings = Settings.of(node.defaults.get("params"))
    exposed = {x.port_name for x in level.exposures("in", explicit=True) if x.node_id == node.node_id}
    fed = {e.target_port for e in level.edges_in(node.node_id)} | exposed | set(node.defaults)
    sources = [level.nodes[e.source_node].child for e in level.edges_in(node.node_id) if e.target_port == "prompt"]
    templates = [b for b in sources if isinstance(b, Template)]
    fixed = [node.defaults.get("system"), node.defaults.get("prompt"), *(b.fixed_text for b in templates)]
    texts = [text for text in fixed if isinstance(text, str)]
    counts = [_count(block, text) for text in texts]
    return {
        "path": path,
        "model": _name(block),
        "calls": times,
        "calls_at_most": times * (1 + (settings.max_repairs if "schema" in fed else 0)),
        "per_item": any(b.each is not None for b in templates),
        "prompt_tokens": sum(number for number, _ in counts),
        "context_tokens": settings.context_tokens if "context" in fed else 0,
        "completion_tokens": settings.max_new_tokens,
        "counted_by": counts[0][1] if counts else "words",
    }


def _count(block: Any, text: str) -> tuple[int, str]:
    counter = getattr(block, "estimate_tokens", None)
    return counter(text) if counter is not None else (-(-len(text.split()) * 4 // 3), "words")


def _name(block: Any) -> str:
    config: Mapping[str, Any] = block.config
    return str(config.get("checkpoint_ref") or config.get("model_id") or block.block_type)


def totals(rows: list[dict[str, Any]]) -> dict[str, int]:
    """All rows together: calls, prompt tokens with full context, and the bound on written tokens."""
    return {
        "calls": sum(r["calls"] for r in rows),
        "calls_at_most": sum(r["calls_at_most"] for r in rows),
        "prompt_tokens": sum(r["calls"] * (r["prompt_tokens"] + r["context_tokens"]) for r in rows),
        "completion_tokens": sum(r["calls"] * r["completion_tokens"] for r in rows),
    }
