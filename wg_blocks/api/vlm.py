"""A model behind an API that looks at pictures."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from wg_blocks.api.llm import ApiChat
from wg_blocks.api.pictures import pngs
from wg_blocks.prompt import LLM_PORTS, tally
from wg_core import Port
from wg_core.errors import PortValueError
from wg_core.execution.context import drained


class ApiVLM(ApiChat):
    """Answers for pictures: one text for one, a list for a batch; `prompt` is one text, or a list with one for each.

    Raises: what `ApiChat` raises, PortValueError for what is no picture.
    """

    role = "vlm"
    ports: Sequence[Port] = (
        Port("image", "in", "image|ref|list", description="a picture [B,3,H,W] in 0..1, an artifact, or a list"),
        Port("prompt", "in", "text|list", True, aliases=("text",), description="default: Describe this picture."),
        *(p for p in LLM_PORTS if p.name not in ("prompt", "token_ids")),
    )

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return drained(self._looked(inputs, stream=False))

    def stream_forward(self, inputs: dict[str, Any]) -> Generator[dict[str, Any], None, dict[str, Any]]:
        return self._looked(inputs, stream=True)

    def _looked(self, inputs: dict[str, Any], *, stream: bool) -> Generator[dict[str, Any], None, dict[str, Any]]:
        pictures, batch = pngs(inputs["image"], f"{self.name}.image")
        prompt = inputs.get("prompt") or "Describe this picture."
        if isinstance(prompt, list) and len(prompt) != len(pictures):
            raise PortValueError(f"{self.name}: {len(prompt)} prompts for {len(pictures)} pictures; give one for each")
        answers: list[dict[str, Any]] = []
        for i, picture in enumerate(pictures):
            asked = prompt[i] if isinstance(prompt, list) else prompt
            alone = stream and len(pictures) == 1
            answers.append((yield from self.complete({**inputs, "prompt": asked}, [picture], stream=alone)))
        usage = tally()
        for answer in answers:
            usage = tally(usage, answer["usage"])
        if not batch:
            return answers[0]
        out: dict[str, Any] = {"text": [a["text"] for a in answers], "usage": usage}
        if "schema" in inputs:
            out["data"] = [a["data"] for a in answers]
        return out
