"""One plain network as a block: a classifier of shapes is trained, looks at pictures, and is saved and loaded."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from shapes import SHAPES, batch, text
from torch import nn

from wg_core import Graph, Port, register_block
from wg_core.weights.module import ModuleBlock


@register_block("classifier/shapes")
class ShapeClassifier(ModuleBlock):
    """Says which shape a picture [B,1,16,16] shows: scores [B,4], and the name and certainty of the likeliest."""

    ports = (Port("picture", "in", "tensor"), Port("scores", "out", "tensor"), Port("found", "out", "list"))

    def build_modules(self) -> dict[str, nn.Module]:
        parts = [nn.Conv2d(1, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten()]
        return {"net": nn.Sequential(*parts, nn.Linear(32 * 9, len(SHAPES)))}

    def forward(self, inputs: dict) -> dict:
        scores = self.modules["net"](inputs["picture"])
        sure, which = scores.softmax(-1).max(-1)
        return {"scores": scores, "found": [f"{SHAPES[i]} ({p:.0%})" for i, p in zip(which, sure.detach(), strict=True)]}


def train(graph: Graph, steps: int) -> None:
    random = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(graph.trainable_parameters(), lr=3e-3)
    for _ in range(steps):
        pictures, labels = batch(32, random)
        loss = nn.functional.cross_entropy(graph.run({"picture": pictures}, training=True)["scores"], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    torch.set_num_threads(1)
    graph = Graph("look")
    graph.add_node("classifier/shapes", "eye")
    train(graph, 60)
    with tempfile.TemporaryDirectory() as place:
        graph.save(Path(place) / "eye")
        graph = Graph.load(Path(place) / "eye")
        pictures, labels = batch(200, torch.Generator().manual_seed(1))
        result = graph.run({"picture": pictures})
    right = (result["scores"].argmax(-1) == labels).float().mean().item()
    for i in range(2):
        print(f"{text(pictures[i])}\n{result['found'][i]}\n")
    print(f"{right:.0%} of 200 new pictures are named rightly")
    assert right > 0.9
    for absent in ("wg_core.levels.pipeline", "wg_core.levels.stage", "wg_core.levels.world", "dagster", "mlflow", "transformers"):
        assert absent not in sys.modules, absent
