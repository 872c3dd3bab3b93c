"""What keeping a world costs: `python benchmarks/snapshots.py [--repeats N] [--folder DIR] [--json]`.

Prints, from one run, each as a ratio to something a reader knows or beside its aim:
a snapshot step whose one part of 16 MB changed, over a plain file of 16 MB written and flushed; a save of content that
did not change, for a small and a large content; the bytes that a step writes over the bytes that changed; and the
engine's own share of a world step (5 stages, 200 nodes with nothing to do), with stage runs only and with the store.
`--folder` is where files are written; choose a disk, for a flush to memory says nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wg_core import Block, Graph, Port, Stage, State, World, WorldContent
from wg_core.state.canonical import canonical_bytes, sha256_bytes
from wg_core.state.content import apply
from wg_core.state.snapshot import Snapshot
from wg_core.state.store import SnapshotStore

SIZE = 16 * 1024 * 1024
NODES = 40
STAGES = ("philosopher", "author", "development", "architect", "creator")


class Give(Block):
    """Gives a value it was made with."""

    ports = (Port("y", "out"),)

    def __init__(self, *, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": self.value}


class Pass(Block):
    """Hands on what it is given."""

    ports = (Port("x", "in"), Port("y", "out"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": inputs["x"]}


# ---- storage -------------------------------------------------------------------------------------------------------


def seconds(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def plain_file(path: Path, data: bytes) -> None:
    """A new file, written and flushed."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def stored_bytes(root: Path) -> int:
    return sum(p.stat().st_size for p in root.rglob("*") if p.is_file())


class Steps:
    """A world's store that is given one snapshot after another, by the doors that a world's step uses."""

    def __init__(self, root: Path, entities: int) -> None:
        self.store = SnapshotStore(root)
        seed = {"characters": [{"id": f"e{i}", "name": f"Name {i}", "note": "n" * 200} for i in range(entities)]}
        self.content = WorldContent.from_seed(seed)
        self.epoch = self.store.acquire("w", "benchmark")
        self.last: Snapshot | None = None
        self.publish()

    def publish(self) -> None:
        root = self.content.save(self.store.blobs)
        step, parent = (self.last.step + 1, self.last.id) if self.last else (0, None)
        snapshot = Snapshot(world_id="w", step=step, parent=parent, content=root)
        self.last = self.store.publish(snapshot, epoch=self.epoch)

    def apply(self, state: State) -> None:
        """Take a state over as the next step; not yet saved."""
        assert self.last is not None
        self.content = apply(self.content, state, step=self.last.step + 1, made_by="benchmark")

    def close(self) -> None:
        self.store.release("w", "benchmark", self.epoch)


def large_part(home: Path, repeats: int) -> dict[str, float]:
    """Medians in seconds of a step with a new part of 16 MB and of a plain file of 16 MB, in turns."""
    steps = Steps(home / "large", 100)
    plain, whole, hashed = [], [], []
    for i in range(repeats):
        data, other = secrets.token_bytes(SIZE), secrets.token_bytes(SIZE)

        def step(part: bytes = data) -> None:
            steps.store.blobs.put(part)
            steps.publish()

        turns = [(plain, lambda o=other, i=i: plain_file(home / f"plain{i}", o)), (whole, step)]
        for took, act in turns if i % 2 else reversed(turns):
            took.append(seconds(act))
        hashed.append(seconds(lambda d=data: sha256_bytes(d)))
        (home / f"plain{i}").unlink()
    steps.close()
    return {n: statistics.median(v) for n, v in (("plain", plain), ("step", whole), ("hash", hashed))}


def unchanged(home: Path, entities: int, repeats: int) -> float:
    """Median seconds of a save of content that is stored already."""
    steps = Steps(home / f"same{entities}", entities)
    took = [seconds(lambda: steps.content.save(steps.store.blobs)) for _ in range(repeats)]
    steps.close()
    return statistics.median(took)


def written(home: Path, entities: int, chronicle: int, part: int = 0, changes: int = 1) -> tuple[int, int]:
    """Bytes that a step adds to the store's folder, and bytes that changed: the part, the records and the entry.

    Of ten steps in a row, after `chronicle` others, the one that adds most beyond what changed.
    """
    from wg_core.levels.example import example_state

    steps = Steps(home / f"bytes{entities}-{chronicle}-{part}-{changes}", entities)

    def state(i: int) -> State:
        blocks = example_state([1, 2, 3, 4, 5], steps.store.blobs.put).to_json()
        ids = [f"e{(i * 37 + k * 11) % entities}" for k in range(changes)]
        made = [{"op": "update", "kind": "entity", "id": id, "fields": {"note": f"note {i}"}} for id in ids]
        return State.of({**blocks, "outcome": {**blocks["outcome"], "changes": made}})

    for i in range(chronicle):
        steps.apply(state(i))
        steps.publish()
    found: list[tuple[int, int]] = []
    for i in range(chronicle, chronicle + (1 if part else 10)):
        new, data = state(i), secrets.token_bytes(part)
        before = stored_bytes(steps.store.root)
        if part:
            steps.store.blobs.put(data)
        records = dict(steps.content.parts())
        steps.apply(new)
        steps.publish()
        added = stored_bytes(steps.store.root) - before
        changed = [p.value for name, p in steps.content.parts() if ":" in name and records.get(name) is not p]
        changed.append(steps.content.chronicle(-1)[0])
        found.append((added, part + sum(len(canonical_bytes(value)) for value in changed)))
    steps.close()
    return max(found, key=lambda f: f[0] - f[1])


# ---- a world's step ------------------------------------------------------------------------------------------------


def idle_world(home: Path) -> World:
    """Five stages of 40 nodes: one that holds a valid block of the state, and 39 that hand it on."""
    from wg_core.levels.example import example_state

    store = SnapshotStore(home / "world")
    blocks = example_state([1, 2, 3, 4, 5], store.blobs.put).to_json()
    world = World("idle", store=store, seed=1)
    for role in STAGES:
        stage = Stage(role)
        (block,) = stage.writes
        graph = Graph("g")
        graph.add_node(Give(value=blocks[block]), "n0")
        for i in range(1, NODES):
            graph.add_node(Pass(), f"n{i}")
            graph.add_edge(f"n{i - 1}", "y", f"n{i}", "x")
        graph.expose_output(f"n{NODES - 1}", "y", block)
        stage.add_pipeline(graph)
        world.add_stage(stage)
    return world


def world_step(home: Path, repeats: int) -> tuple[float, float]:
    """Median seconds of a step: the runs of its five stages alone, and with lease, journal, content and snapshot."""
    world = idle_world(home)
    world.step()
    order = [r for r in world.cycle if r in world.stages]

    def stages() -> None:
        state = State()
        for role in (*order[-3:], *order[:-3]):
            result = world.stages[role].step(state)
            assert result.ran, (role, result.reason)
            state = result.state

    stages()
    alone, stored = [], []
    for _ in range(repeats):
        alone.append(seconds(stages))
        stored.append(seconds(world.step))
    return statistics.median(alone), statistics.median(stored)


def measure(home: Path, repeats: int) -> dict[str, Any]:
    gc.collect()
    gc.disable()
    try:
        large = large_part(home, repeats)
        same = {n: unchanged(home, n, repeats) * 1e3 for n in (10, 2000)}
        alone, stored = world_step(home, max(repeats, 15))
    finally:
        gc.enable()
    cases = {
        "small step": (100, 0),
        "2000 entities": (2000, 0),
        "after 200 steps": (100, 200),
        "10 of 1000 entities": (1000, 50, 0, 10),
        "part of 16 MB": (100, 0, SIZE),
    }
    sizes = {name: written(home, *case) for name, case in cases.items()}
    return {
        "large_plain_ms": round(large["plain"] * 1e3, 1),
        "large_step_ms": round(large["step"] * 1e3, 1),
        "large_sha256_ms": round(large["hash"] * 1e3, 1),
        "large_step_over_plain": round(large["step"] / large["plain"], 2),
        "unchanged_save_ms": {f"{n} entities": round(ms, 2) for n, ms in same.items()},
        "written_beyond_changed_bytes": {name: added - changed for name, (added, changed) in sizes.items()},
        "written_over_changed": {name: round(added / changed, 3) for name, (added, changed) in sizes.items()},
        "world_stages_ms": round(alone * 1e3, 2),
        "world_step_with_store_ms": round(stored * 1e3, 2),
        "with_store_over_stages": round(stored / alone, 1),
    }


AIMS = {
    "large_step_over_plain": 1.3,
    "unchanged_save_ms": 1.0,
    "written_beyond_changed_bytes": 4096,
    "world_stages_ms": 1.0,
}


def lines(figures: dict[str, Any]) -> list[str]:
    """One line a figure, with its aim and whether it was met."""
    said: list[str] = []
    for name, value in figures.items():
        for case, number in value.items() if isinstance(value, dict) else [("", value)]:
            aim = AIMS.get(name)
            verdict = "" if aim is None else f"   aim at most {aim:g}: {'met' if number <= aim else 'MISSED'}"
            said.append(f"{f'{name} {case}'.strip():>48}  {number:>10}{verdict}")
    return said


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--folder", default=None, help="where files are written; the system's temporary folder by default")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wg-benchmark-", dir=args.folder) as folder:
        found = measure(Path(folder), args.repeats)
    sys.stdout.write(json.dumps(found) + "\n" if args.json else "\n".join(lines(found)) + "\n")
