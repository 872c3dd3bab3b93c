"""Everything together: Tidewater lives two steps with its models, and its Development is an agent.

A language model writes for four stages, a diffusion model draws the maps, an agent looks into the world with tools
before it says what is to happen. Needs the two default models: `wg models pull`. Writes everything.png.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from wg_core import World
from wg_core.state.store import SnapshotStore

WORLD = Path(__file__).parent.parent / "worlds/tidewater_agent.yaml"


def told(event) -> None:
    if event.kind == "tool_end":
        found = str(event.outputs.get("result", event.data.get("error")))
        print(f"  {event.path}: {dict(event.inputs)} -> {found[:160]}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        world = World.from_yaml(WORLD)
        world.store = SnapshotStore(Path(place) / "snapshots")
        for action in ("a storm lands", None):
            snapshot = world.step(action=action, seed=5, hooks=[told])
            state = snapshot.applied or {}
            print(f"step {snapshot.step}: {', '.join(f'{r.role} {r.seconds:.1f} s' for r in snapshot.stages if r.ran)}")
        print("seen:   ", state["descriptions"]["items"][0]["text"])
        print("told:   ", state["outcome"]["narrative"])
        print("planned:", snapshot.carried["intent"]["text"])
        Path("everything.png").write_bytes(world.store.blobs.get(state["artifacts"]["images"][0]["id"]))
        assert world.store.verify("tidewater_agent") == [] and world.replay(1).same
    for absent in ("dagster", "mlflow", "openai"):
        assert absent not in sys.modules, absent
