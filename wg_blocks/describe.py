"""Descriptions: what was seen in each artifact, as data and as prose."""

from __future__ import annotations

from typing import Any

from wg_core import Block, Port
from wg_core.errors import PortValueError


class DescribeItems(Block):
    """Joins measured facts and texts about them to a description of each artifact.

    Inputs: `facts`, one {artifact_id, ...} for each artifact, and `texts`, one text for each in the same order (a lone
    text is one); `measured`, the facts as sentences, opens each text word for word, so that what was measured is told
    exactly. Output `data`: {"items": [{artifact_id, text, facts}]}, where `facts` no longer holds the id.

    Raises: PortValueError where the numbers differ, a fact names no artifact, or a text is empty.
    """

    ports = (
        Port("facts", "in", "list", description="measured facts, one entry for each artifact"),
        Port("texts", "in", "text|list", description="one text for each entry of facts"),
        Port("measured", "in", "list", optional=True, description="a sentence or more for each entry of facts"),
        Port("data", "out", "dict", description="{items: [{artifact_id, text, facts}]}"),
    )

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        facts, texts = inputs["facts"], inputs["texts"]
        texts = [texts] if isinstance(texts, str) else list(texts)
        measured = inputs.get("measured", [""] * len(facts))
        if not len(facts) == len(texts) == len(measured):
            counts = f"{len(facts)} facts but {len(texts)} texts and {len(measured)} measured"
            raise PortValueError(f"describe/items got {counts}; give one for each")
        items: list[dict[str, Any]] = []
        for number, (fact, text, said) in enumerate(zip(facts, texts, measured, strict=True)):
            if not isinstance(fact.get("artifact_id"), str):
                raise PortValueError(f"facts[{number}] has no artifact_id; measure artifacts, not pictures")
            if not isinstance(text, str) or not text.strip():
                raise PortValueError(f"texts[{number}] (artifact {fact['artifact_id'][:12]}) is empty or no text")
            rest = {k: v for k, v in fact.items() if k != "artifact_id"}
            items.append({"artifact_id": fact["artifact_id"], "text": f"{said} {text.strip()}".strip(), "facts": rest})
        return {"data": {"items": items}}
