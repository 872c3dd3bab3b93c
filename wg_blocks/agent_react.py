"""An agent that thinks in words before each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from wg_blocks.agent_llm import LLMAgent
from wg_core import Block
from wg_core.errors import ConfigError


class ReActAgent(LLMAgent):
    """`agent/llm` whose model writes a `thought` before each call and before its answer, in the same structure.

    Thoughts have at most `thought_chars` characters and stay in the conversation; they are no part of the response.
    Without tools it is `agent/llm`. Source: Yao et al. 2022, https://arxiv.org/abs/2210.03629.

    Raises: what `agent/llm` raises, ConfigError for `calling: native`, which has no place for a thought.
    """

    def __init__(self, *, thought_chars: int = 240, build: Callable[[Mapping[str, Any]], Block], **words: Any) -> None:
        if isinstance(thought_chars, bool) or not isinstance(thought_chars, int) or thought_chars < 1:
            raise ConfigError(f"agent/react: thought_chars is a whole number >= 1, not {thought_chars!r}")
        super().__init__(build=build, **words)
        if self.calling == "native":
            raise ConfigError("agent/react: its thoughts are part of a structure; leave out calling: native, or take agent/llm")
        self.thought = {"type": "string", "minLength": 1, "maxLength": thought_chars}

    def form(self, properties: Mapping[str, Any]) -> dict[str, Any]:
        return super().form({"thought": dict(self.thought), **properties})
