"""Language and diffusion in one pipeline: a language model decides what to draw, a diffusion model draws it.

Both are tiny and trained here: the first learns which shape answers a question, the second to draw shapes. Each is a
graph of its own, the pipeline joins them, and both are saved together. Writes language_and_diffusion.png.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import tiny_lm
import torch
from scenario_diffusion import shape_graph, train
from shapes import save, text

from wg_core import Graph, Pipeline

RIDDLES = {
    "What does the moon look like?": "circle",
    "What shape has a window?": "square",
    "What marks a place on a map?": "cross",
    "What is on a sailor's shirt?": "stripes",
}


def riddle_graph(folder: Path) -> Graph:
    """`prompt` in, the name of a shape out."""
    tiny_lm.make(folder, [*RIDDLES, *RIDDLES.values()])
    graph = Graph.from_template("text_to_text", llm={"block_type": "llm/hf", "config": {"checkpoint_ref": str(folder)}})
    examples = [{"messages": [{"role": "user", "content": q}], "answer": a} for q, a in RIDDLES.items()]
    losses = tiny_lm.train(graph.nodes["llm"].block, examples, 50)
    print(f"language: loss {losses[0]:.2f} -> {losses[-1]:.3f}")
    return graph


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        decide, paint = riddle_graph(Path(place) / "tiny"), shape_graph()
        losses = train(paint, 350)
        print(f"diffusion: loss {losses[0]:.2f} -> {sum(losses[-20:]) / 20:.2f}")
        pipeline = Pipeline("riddles")
        pipeline.add_graph(decide, "decide", defaults={"params": {"temperature": 0, "max_new_tokens": 8}})
        pipeline.add_graph(paint, "paint", defaults={"negative": ""})
        pipeline.add_edge("decide", "text", "paint", "prompt")
        pipeline.expose_input("decide", "prompt", "question")
        pipeline.expose_output("decide", "text", "shape")
        pipeline.expose_output("paint", "image", "picture")
        pipeline.save(Path(place) / "riddles")
        again = Pipeline.load(Path(place) / "riddles")
        results = [again.run({"question": question}, seed=3) for question in RIDDLES]
    for question, result in zip(RIDDLES, results, strict=True):
        print(f"\n{question} {result['shape']}\n{text(result['picture'][0])}")
        assert result["shape"] == RIDDLES[question]
    save(torch.cat([result["picture"] for result in results]), "language_and_diffusion.png")
    for absent in ("wg_core.levels.stage", "wg_core.levels.world", "dagster", "mlflow", "openai"):
        assert absent not in sys.modules, absent
