"""What `fit` adds to a bare training loop: `python benchmarks/training.py [--steps N] [--json]`.

A small two-layer network learns the same examples three ways: a loop of plain torch, `fit` with a loss by hand, and
`level.fit` of a graph with a bound loss. All take equal updates. Runs are interleaved and each figure is the median of
its repetitions; ratios are per update, to the bare loop of the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from wg_core import Graph, Port
from wg_core.weights.fit import Binding, TrainingConfig, fit
from wg_core.weights.module import ModuleBlock


class Layers(ModuleBlock):
    """Two linear layers."""

    ports = (Port("x", "in", "tensor"), Port("y", "out", "tensor"))

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.width = width

    def build_modules(self) -> dict[str, Any]:
        w = self.width
        return {"net": torch.nn.Sequential(torch.nn.Linear(w, w), torch.nn.GELU(), torch.nn.Linear(w, w))}

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": self.modules["net"](inputs["x"])}


def examples(width: int, rows: int) -> list[dict[str, Any]]:
    """Batches of random rows, each one an example."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(rows, width, generator=generator) for _ in range(16)]
    return [{"inputs": {"x": x}, "targets": {"y": x.flip(1)}} for x in made]


def bare(width: int, data: list[dict[str, Any]], steps: int) -> float:
    net = Layers(width=width).modules["net"].train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.0)
    began = time.perf_counter()
    for step in range(steps):
        example = data[step % len(data)]
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(net(example["inputs"]["x"]), example["targets"]["y"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        float(loss.detach())
    return (time.perf_counter() - began) / steps


def by_hand(width: int, data: list[dict[str, Any]], steps: int) -> float:
    block = Layers(width=width)
    net = block.modules["net"].train()

    def loss(batch: Any) -> Any:
        return torch.nn.functional.mse_loss(net(batch[0]["inputs"]["x"]), batch[0]["targets"]["y"])

    began = time.perf_counter()
    fit(block.named_trainable_parameters(), data, loss, TrainingConfig(steps=steps, clip_norm=1.0))
    return (time.perf_counter() - began) / steps


def bound(width: int, data: list[dict[str, Any]], steps: int) -> float:
    graph = Graph("g")
    graph.add_node(Layers(width=width), "net")
    graph.expose_input("net", "x", "x")
    graph.expose_output("net", "y", "y")
    config = TrainingConfig(steps=steps, clip_norm=1.0, loss=(Binding(output="y", target="y"),))
    began = time.perf_counter()
    graph.fit(data, config)
    return (time.perf_counter() - began) / steps


CASES = {"bare torch": bare, "fit, loss by hand": by_hand, "graph.fit, bound loss": bound}


def measure(width: int, rows: int, steps: int, repeats: int) -> dict[str, dict[str, float]]:
    data = examples(width, rows)
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for case in CASES.values():
        case(width, data, 5)
    for _ in range(repeats):
        for name, case in CASES.items():
            seconds[name].append(case(width, data, steps))
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return {name: {"ms": value * 1e3, "ratio": value / middle["bare torch"]} for name, value in middle.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {f"width {w}, {r} rows": measure(w, r, given.steps, given.repeats) for w, r in ((64, 16), (512, 64))}
    if given.json:
        print(json.dumps(found, indent=1))
        return
    for size, rows in found.items():
        print(size)
        for name, row in rows.items():
            print(f"  {name:24} {row['ms']:8.3f} ms an update   {row['ratio']:5.2f} x")


if __name__ == "__main__":
    main()
