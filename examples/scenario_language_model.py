"""A language model only: a tiny one is made, asked, taught three answers, asked again, saved and loaded."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import tiny_lm

from wg_core import Graph

LESSONS = {
    "Who draws the coast?": "Mara Venn walks the shore after each storm and draws what has moved.",
    "Who counts the boats?": "Oskar Hale, the harbour master, counts boats, rope and days until the ice.",
    "Who knows the currents?": "Iven, the ferry boy, knows every current and tells nobody how.",
}
PARAMS = {"temperature": 0, "repetition_penalty": 1.0, "max_new_tokens": 40}


def learn(folder: Path) -> tuple[Graph, list[float]]:
    """A graph with the model in it, and how the loss went."""
    tiny_lm.make(folder, [*LESSONS, *LESSONS.values()])
    graph = Graph.from_template("text_to_text", llm={"block_type": "llm/hf", "config": {"checkpoint_ref": str(folder)}})
    block = graph.nodes["llm"].block
    print("before:", repr(graph.run({"prompt": "Who draws the coast?", "params": PARAMS})["text"]))
    examples = [{"messages": [{"role": "user", "content": q}], "answer": a} for q, a in LESSONS.items()]
    return graph, tiny_lm.train(block, examples, 80)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        graph, losses = learn(Path(place) / "tiny")
        print(f"loss of {sum(p.numel() for p in graph.trainable_parameters())} parameters: {losses[0]:.2f} -> {losses[-1]:.3f}")
        graph.save(Path(place) / "taught")
        taught = Graph.load(Path(place) / "taught")
        for question, answer in LESSONS.items():
            said = taught.run({"prompt": question, "params": PARAMS})["text"]
            print(f"{question} {said}")
            assert said == answer
    for absent in ("wg_core.levels.pipeline", "wg_core.levels.stage", "wg_core.levels.world", "dagster", "mlflow", "openai"):
        assert absent not in sys.modules, absent
