"""An agent whose model is behind an API, described in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from wg_blocks.agent_llm import LLMAgent
from wg_blocks.api.base import ChatConfig
from wg_core import Block


class ApiAgent(LLMAgent):
    """`agent/llm` on a model behind an API: the words of `llm/api` and those of the agent side by side.

    Tools are called as the provider has them (`calling: native`) unless said. The model is a block `llm/api` of the pool
    as in `agent/llm`, shared with all who name it so.

    Raises: what `agent/llm` and `llm/api` raise.
    """

    def __init__(self, *, calling: str = "native", build: Callable[[Mapping[str, Any]], Block], **words: Any) -> None:
        model = {name: words.pop(name) for name in ChatConfig.model_fields if name in words}
        llm = {"block_type": "llm/api", "config": model}
        super().__init__(llm=llm, calling=calling, build=build, **words)

    def model_ref(self) -> None:
        """None: the model is the sub-block's, a conversation is nobody else's."""
        return None
