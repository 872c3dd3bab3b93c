"""A world only: the whole cycle on stubs, without any model. It lives three steps and remembers them."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from wg_core import World
from wg_core.state.store import SnapshotStore

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        world = World.from_template("stub", world_id="isle")
        world.store = SnapshotStore(Path(place))
        for action in ("a storm lands", None, "a ship is sighted"):
            snapshot = world.step(action=action, seed=7)
            state = snapshot.applied or {}
            print(f"step {snapshot.step}" + (f", {action}" if action else ""))
            print("  stages:", ", ".join(r.role if r.ran else f"({r.role}: {r.reason})" for r in snapshot.stages))
            if "outcome" in state:
                print("  told:  ", state["outcome"]["narrative"])
                print("  drawn: ", *(f"{a['id'][:12]}.png" for a in state["artifacts"]["images"]))
        chronicle = world.content(snapshot.content).chronicle()
        print("remembered:", [entry["step"] for entry in chronicle], "every hash is right:", world.store.verify("isle") == [])
        assert len(chronicle) == 2 and world.store.verify("isle") == []
    for absent in ("dagster", "mlflow", "transformers", "diffusers", "openai"):
        assert absent not in sys.modules, absent
