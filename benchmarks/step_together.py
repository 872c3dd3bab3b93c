"""Three worlds that step together beside the same three one after another: `python benchmarks/step_together.py [FILE]`.

The worlds share one language model: once they are the world and two copies of it, once the world and two LoRA worlds.
`one_after_another_to_together` above 1 is what stepping together gains. Both sides begin from nothing with equal seeds and
take turns; each time is the best of `--repeats`. `asked_at_once` are the answers that were written as one batch, in order.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

from lora_worlds import stir

from wg_core import World, step_together
from wg_core.levels.lora_world import lora_world
from wg_core.state.store import SnapshotStore


def copies(base: World) -> list[World]:
    """The world, and two copies of it over the same blocks."""
    made = [copy(base) for _ in range(3)]
    for world, name in zip(made[1:], ("second", "third"), strict=True):
        world.world_id = name
    return made


def adapted(base: World, rank: int) -> list[World]:
    """The world, and two LoRA worlds on it whose adapters change a little."""
    worlds = [base, *(lora_world(base, name, rank=rank) for name in ("noir", "calm"))]
    for seed, world in enumerate(worlds[1:]):
        stir(world, seed, 0.02)
    return worlds


def measure(worlds: Sequence[World], model: Any, folder: Path, steps: int, repeats: int) -> dict[str, Any]:
    """Seconds of both ways, their ratio, and the sizes of the batches."""
    sizes: list[int] = []
    answer = model.answer_batch

    def noted(requests: Sequence[Any]) -> Any:
        sizes.append(sum(len(request.writers) for request in requests))
        return answer(requests)

    def run(place: str, joint: bool) -> tuple[float, list[Any]]:
        fresh = [copy(world) for world in worlds]
        for world in fresh:
            world.store = SnapshotStore(folder / place)
        began = time.perf_counter()
        made: list[Any] = []
        for _ in range(steps):
            made += step_together(fresh, seed=1) if joint else [world.step(seed=1) for world in fresh]
        return time.perf_counter() - began, made

    run("warm", False)
    alone, joint = [], []
    model.answer_batch = noted
    for repeat in range(repeats):
        sizes.clear()
        alone.append(run(f"alone_{repeat}", False))
        joint.append(run(f"joint_{repeat}", True))
    del model.answer_batch
    (one_by_one, was), (together, made) = min(alone, key=lambda r: r[0]), min(joint, key=lambda r: r[0])
    same = sum(a.id == b.id for a, b in zip(was, made, strict=True))
    tokens = sum(row["completion_tokens"] for snapshot in made for row in snapshot.usage().values())
    return {
        "one_after_another_to_together": round(one_by_one / together, 2),
        "one_after_another_s": round(one_by_one, 1), "together_s": round(together, 1),
        "asked_at_once": sizes, "written_tokens": int(tokens), "equal_snapshots": f"{same} of {len(made)}",
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=Path("worlds/tidewater.yaml"))
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    base = World.from_yaml(args.file)
    model = next(block for block in base.iter_blocks() if block.role == "llm" and block.batches)
    for name, worlds in (("copies", copies(base)), ("lora_worlds", adapted(base, args.rank))):
        with tempfile.TemporaryDirectory() as temp:
            found = measure(worlds, model, Path(temp), args.steps, args.repeats)
        sys.stdout.write(json.dumps({"worlds": name, **found}) + "\n")
        sys.stdout.flush()
