"""What the engine adds to the work of its blocks: `python benchmarks/engine_overhead.py [--repeats N] [--json]`.

All figures come from one run. Each is the median of repetitions that are interleaved (one of each case, then again),
so that a slow moment of the machine meets every case alike. The blocks do next to nothing, so what is left is dispatch.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import gc
import json
import statistics
import sys
import time
import tracemalloc
from collections import deque
from collections.abc import Callable
from typing import Any

from wg_core import Block, Graph, Port


class Increment(Block):
    """Adds one."""

    ports = (Port("x", "in", "number"), Port("y", "out", "number"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": inputs["x"] + 1}


class Total(Block):
    """Adds what it is fed."""

    ports = (Port("x", "in", "number", aggregation="sum"), Port("y", "out", "number"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": inputs["x"]}


def chain(n: int) -> Graph:
    """`n` nodes in a row."""
    graph = Graph(f"chain{n}")
    for i in range(n):
        graph.add_node(Increment(), f"n{i}")
        if i:
            graph.add_edge(f"n{i - 1}", "y", f"n{i}", "x")
    graph.expose_input("n0", "x", "x")
    graph.expose_output(f"n{n - 1}", "y", "y")
    return graph


def fan(n: int) -> Graph:
    """One node feeds `n`, which feed one."""
    graph = Graph(f"fan{n}")
    graph.add_node(Increment(), "first")
    graph.add_node(Total(), "last")
    for i in range(n):
        graph.add_node(Increment(), f"n{i}")
        graph.add_edge("first", "y", f"n{i}", "x")
        graph.add_edge(f"n{i}", "y", "last", "x")
    graph.expose_input("first", "x", "x")
    graph.expose_output("last", "y", "y")
    return graph


def loop() -> Graph:
    """A cycle of two nodes."""
    graph = Graph("loop")
    graph.add_node(Increment(), "a")
    graph.add_node(Increment(), "b")
    graph.add_edge("a", "y", "b", "x")
    graph.add_edge("b", "y", "a", "x", carry=True)
    graph.expose_input("a", "x", "x")
    graph.expose_output("b", "y", "y")
    return graph


def bare(n: int) -> Callable[[], Any]:
    """The same forwards called in a plain Python loop, dicts included."""
    forwards = [Increment().forward for _ in range(n)]

    def run() -> Any:
        x = 0
        for forward in forwards:
            x = forward({"x": x})["y"]
        return x

    return run


def sequential(n: int) -> Callable[[], Any]:
    """`torch.nn.Sequential` over modules that add one to a number."""
    import torch

    class Inc(torch.nn.Module):
        def forward(self, x: int) -> int:
            return x + 1

    modules = torch.nn.Sequential(*[Inc() for _ in range(n)])

    def run() -> Any:
        with torch.no_grad():
            return modules(0)

    return run


def engine(graph: Graph, **options: Any) -> Callable[[], Any]:
    graph.run({"x": 0}, **options)

    def run() -> Any:
        return graph.run({"x": 0}, **options)["y"]

    return run


def waiting(graph: Graph) -> Callable[[], Any]:
    """`run_async` of a chain of plain blocks, in an event loop that is there already."""
    loop = asyncio.new_event_loop()
    atexit.register(loop.close)

    def run() -> Any:
        return loop.run_until_complete(graph.run_async({"x": 0}))["y"]

    run()
    return run


class Trace:
    """The seconds of each node, as a step that is tracked keeps them."""

    kinds = ("model_call", "node_end")

    def __init__(self) -> None:
        self.nodes: deque[tuple[str, float]] = deque(maxlen=1000)

    def __call__(self, event: Any) -> None:
        self.nodes.append((event.path, event.elapsed))


def cases() -> dict[str, tuple[Callable[[], Any], int]]:
    """Name -> what to time, and how many node calls it makes."""
    found: dict[str, tuple[Callable[[], Any], int]] = {}
    for n in (10, 100, 1000):
        found[f"chain {n}"] = (engine(chain(n)), n)
        found[f"bare loop {n}"] = (bare(n), n)
        found[f"nn.Sequential {n}"] = (sequential(n), n)
    found["heard chain 1000"] = (engine(chain(1000), callbacks=(lambda event: None,)), 1000)
    found["traced chain 1000"] = (engine(chain(1000), callbacks=(Trace(),)), 1000)
    found["async chain 1000"] = (waiting(chain(1000)), 1000)
    found["chain 10000"] = (engine(chain(10_000)), 10_000)
    found["fan 100"] = (engine(fan(100)), 102)
    found["bare loop 102"] = (bare(102), 102)
    found["loop 50x2"] = (engine(loop(), num_loop_steps=50), 100)
    return found


def medians(repeats: int) -> dict[str, float]:
    """Microseconds per node call of each case."""
    all_cases = cases()
    samples: dict[str, list[float]] = {name: [] for name in all_cases}
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for name, (run, calls) in all_cases.items():
                times = max(1, 1000 // calls)
                began = time.perf_counter()
                for _ in range(times):
                    run()
                samples[name].append((time.perf_counter() - began) / (times * calls) * 1e6)
    finally:
        gc.enable()
    return {name: statistics.median(values) for name, values in samples.items()}


def python_calls(graph: Graph, nodes: int) -> float:
    """Python function calls of a run per node, the block's own included."""
    graph.run({"x": 0})
    counted = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal counted
        counted += event == "call"

    sys.setprofile(count)
    try:
        graph.run({"x": 0})
    finally:
        sys.setprofile(None)
    return counted / nodes


def prepare(graph: Graph, compiled: bool) -> Graph:
    """The graph validated, and compiled where asked."""
    if compiled:
        graph.plan()
    else:
        graph.validate()
    return graph


def build_ms(n: int, repeats: int, *, compiled: bool) -> float:
    """Milliseconds to add, join and validate `n` typed nodes, and to compile their plan."""
    took: list[float] = []
    for _ in range(repeats):
        began = time.perf_counter()
        prepare(chain(n), compiled)
        took.append(time.perf_counter() - began)
    return statistics.median(took) * 1e3


def bytes_per_node(n: int, *, compiled: bool) -> float:
    """Memory of a validated chain (and its plan), blocks included, per node."""
    chain(10).plan()
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    graph = prepare(chain(n), compiled)
    gc.collect()
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert graph.nodes
    return held / n


def measure(repeats: int) -> dict[str, Any]:
    per_node = medians(repeats)
    return {
        "us_per_node": {name: round(value, 3) for name, value in per_node.items()},
        "hook_of_all_events_adds_us_per_node": round(per_node["heard chain 1000"] - per_node["chain 1000"], 2),
        "trace_adds_us_per_node": round(per_node["traced chain 1000"] - per_node["chain 1000"], 2),
        "python_calls_per_node_chain_1000": round(python_calls(chain(1000), 1000), 2),
        "python_calls_per_node_chain_10": round(python_calls(chain(10), 10), 2),
        "python_calls_per_node_fan_100": round(python_calls(fan(100), 102), 2),
        "engine_over_bare_1000": round(per_node["chain 1000"] / per_node["bare loop 1000"], 2),
        "engine_over_sequential_1000": round(per_node["chain 1000"] / per_node["nn.Sequential 1000"], 2),
        "fan_over_bare": round(per_node["fan 100"] / per_node["bare loop 102"], 2),
        "loop_over_bare": round(per_node["loop 50x2"] / per_node["bare loop 100"], 2),
        "per_node_1000_over_10": round(per_node["chain 1000"] / per_node["chain 10"], 2),
        "per_node_10000_over_1000": round(per_node["chain 10000"] / per_node["chain 1000"], 2),
        "build_and_validate_1000_ms": round(build_ms(1000, 9, compiled=False), 1),
        "build_validate_compile_1000_ms": round(build_ms(1000, 9, compiled=True), 1),
        "build_validate_compile_10000_ms": round(build_ms(10_000, 1, compiled=True), 1),
        "bytes_per_node": round(bytes_per_node(1000, compiled=False)),
        "bytes_per_node_with_plan": round(bytes_per_node(1000, compiled=True)),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--json", action="store_true", help="one JSON document")
    args = parser.parse_args()
    figures = measure(args.repeats)
    if args.json:
        sys.stdout.write(json.dumps(figures) + "\n")
    else:
        for name, value in figures.pop("us_per_node").items():
            sys.stdout.write(f"{name:>20}  {value:8.3f} us per node\n")
        for name, value in figures.items():
            sys.stdout.write(f"{name:>34}  {value}\n")
