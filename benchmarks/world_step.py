"""What a step of a world costs around its models, and how often the language model is loaded.

python benchmarks/world_step.py [--steps N] [--world worlds/tidewater.yaml]

Prints, from one run: seconds of a step of the stub world by itself and through Dagster (same process, models kept),
their difference and ratio; the engine's own share of a step (stages with nothing to do but pass values); and for the
default world the loads of its language model in N steps, the seconds of that load, and seconds of a step; and what
search by meaning adds to it: memory of the embedding model, its load, and its seconds in a step.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path


def steps_alone(home: Path, steps: int) -> list[float]:
    from wg_core import World
    from wg_core.state.store import SnapshotStore

    world = World.from_template("stub", world_id="alone", seed=1)
    world.store = SnapshotStore(home / "alone")
    return timed(lambda: world.step(), steps)


def steps_in_dagster(home: Path, steps: int) -> list[float]:
    import dagster as dg

    from wg_core import World
    from wg_defs.worker import evolve

    folder = home / "worlds"
    folder.mkdir()
    file = World.from_template("stub", world_id="shown", seed=1).save_config(folder / "shown.yaml")
    seconds: list[float] = []
    since = time.perf_counter()

    def note(done: object) -> None:
        nonlocal since
        seconds.append(time.perf_counter() - since)
        since = time.perf_counter()

    os.environ["WG_HOME"] = str(home / "home")
    os.environ["DAGSTER_HOME"] = str(home / "dagster")
    (home / "dagster").mkdir()
    (home / "dagster" / "dagster.yaml").touch()
    with dg.DagsterInstance.get() as instance, contextlib.redirect_stderr(None):
        since = time.perf_counter()
        evolve("shown", steps, folders=[file], instance=instance, mlflow=False, on_step=note)
    return seconds


def timed(act: object, times: int) -> list[float]:
    seconds: list[float] = []
    for _ in range(times):
        since = time.perf_counter()
        act()  # type: ignore[operator]
        seconds.append(time.perf_counter() - since)
    return seconds


def resident() -> int:
    """Bytes of memory that this process holds (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def default_world(path: str, models: Path, home: Path, steps: int) -> None:
    os.environ["WG_HOME"] = str(home / "default")
    (home / "default").mkdir()
    (home / "default" / "models").symlink_to(models)
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401 - an import is no load

    from wg_core import World
    from wg_core.execution.context import Event

    world = World.from_yaml(path)
    llm = next(b for b in world.iter_blocks() if b.block_type == "llm/hf")
    since = time.perf_counter()
    llm.materialize()
    print(f"load of the language model from the store, without imports: {time.perf_counter() - since:.2f} s")
    seen = {id(llm.module)}  # type: ignore[attr-defined]
    near = next((b for b in world.iter_blocks() if b.role == "embedding"), None)
    if near is not None:
        before, since = resident(), time.perf_counter()
        near.materialize()
        near.run({"input": "a storm lands"})
        print(f"the embedding model: loaded and used once in {time.perf_counter() - since:.2f} s, ", end="")
        print(f"adds {(resident() - before) / 2**20:.0f} MiB to {before / 2**20:.0f} MiB")
    seconds: list[float] = []
    searched: list[float] = []

    def note(event: Event) -> None:
        if event.kind == "node_end" and event.node_id == "context":
            searched[-1] += event.elapsed or 0.0

    for _ in range(steps):
        since = time.perf_counter()
        searched.append(0.0)
        world.step(seed=1, hooks=[note])
        seconds.append(time.perf_counter() - since)
        seen.add(id(llm.module))  # type: ignore[attr-defined]
    users = sum(b.block_type == "llm/hf" for b in world.iter_blocks())
    print(f"loads in {steps} steps: {len(seen)} ({users} instance for all stages); a step takes {statistics.median(seconds[1:]):.1f} s")
    print(f"finding what the stages read of the world: {statistics.median(searched[1:]):.2f} s of a step")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    arguments.add_argument("--steps", type=int, default=6)
    arguments.add_argument("--world", default="worlds/tidewater.yaml")
    given = arguments.parse_args()
    models = Path(os.environ.get("WG_HOME") or ".wg").absolute() / "models"
    world = str(Path(given.world).absolute())
    home = Path(tempfile.mkdtemp(prefix="wg-benchmark-"))
    try:
        alone = statistics.median(steps_alone(home, given.steps)[1:])
        shown = statistics.median(steps_in_dagster(home, given.steps)[1:])
        print(f"step of the stub world: alone {alone * 1e3:.0f} ms, in Dagster {shown * 1e3:.0f} ms, ", end="")
        print(f"Dagster adds {(shown - alone) * 1e3:.0f} ms (x{shown / alone:.1f})")
        if models.is_dir():
            default_world(world, models, home, given.steps)
        else:
            print("the default world's models are not here: make models")
    finally:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
