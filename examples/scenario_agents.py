"""Agents only: one that calculates and asks a colleague, who is an agent with tools of its own; kept and taken up again.

The language model is scripted here, so that nothing has to be fetched. `{"block_type": "llm/hf", ...}` or `"llm/api"` in
its place is the same agent with a real one.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from wg_core import Block, Graph, Port


class Tides(Block):
    """Says when the water is high on a day of the month."""

    ports = (Port("day", "in", "number", schema={"type": "integer", "minimum": 1, "maximum": 31}), Port("hour", "out", "text"))

    def forward(self, inputs: dict) -> dict:
        minutes = int(inputs["day"] * 50.5) % 745
        return {"hour": f"{minutes // 60}:{minutes % 60:02d}"}


def thinker(*says: dict) -> dict:
    return {"block_type": "agent/llm", "config": {"llm": {"block_type": "llm/fake", "config": {"script": list(says)}}}}


def call(tool: str, **arguments: object) -> dict:
    return {"tool": tool, "arguments": arguments}


def told(event) -> None:
    if event.kind == "tool_end":
        print(f"  {event.path}: {dict(event.inputs)} -> {event.outputs.get('result', event.data.get('error'))}")


if __name__ == "__main__":
    clerk = Graph.from_template(
        "agent_with_tools",
        agent=thinker(call("calc", expression="12 ropes"), call("calc", expression="12 * 7"), {"answer": "84 fathoms."}),
        tools=["tool/calc"],
    )  # fmt: skip
    harbour = Graph("harbour")
    harbour.add_node("agent/llm", "master", config=thinker(
        call("tides", day=9), call("clerk", prompt="12 ropes of 7 fathoms?"),
        {"answer": "Sail at 7:34, with 84 fathoms of rope."}, {"answer": "As I said: at 7:34."},
    )["config"])  # fmt: skip
    harbour.add_node(Tides(), "tides")
    harbour.add_node("graph/ref", "clerk", config={"graph": clerk.to_config()})
    harbour.add_tool("tides", "tides", timeout=5)
    harbour.add_tool("clerk", "clerk", description="Does sums. Ask in words.")
    harbour.expose_input("master", "context", "prompt")
    for port in ("response", "status"):
        harbour.expose_output("master", port, port)

    print("When do we sail, and how much rope is there?")
    answer = harbour.run({"prompt": "When do we sail, and how much rope is there?"}, callbacks=[told], max_agent_steps=6)
    print(answer["response"])
    print("called:", [(c["tool_id"], c.get("error", "fine")[:60]) for c in answer["status"]["trail"]])
    with tempfile.TemporaryDirectory() as place:
        harbour.save_checkpoint(Path(place) / "session")  # the conversation is part of the state
        harbour.nodes["master"].block.reset_session()
        harbour.load_from_checkpoint(Path(place) / "session")
    print("Again?", harbour.run({"prompt": "Again?"})["response"], f"({len(harbour.nodes['master'].block.messages)} messages kept)")
    assert answer["status"]["ended"] == "answer" and "84" in answer["response"]
    for absent in ("wg_core.levels.stage", "wg_core.levels.world", "torch", "transformers", "dagster", "mlflow"):
        assert absent not in sys.modules, absent
