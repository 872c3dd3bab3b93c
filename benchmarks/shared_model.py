"""What a world whose stages share one model keeps in memory, over one copy of the model: `python benchmarks/shared_model.py`.

Each figure is the growth of the resident memory of a process of its own, after imports: one block that has answered
once, and a world of five stages (author, development, architect, philosopher by language model) that has lived a step.
"""

from __future__ import annotations

import json
import subprocess
import sys

CODE = """
import gc, json, sys, tempfile
import psutil, torch, transformers
from transformers import LlamaForCausalLM, AutoTokenizer, AutoModelForCausalLM
from wg_blocks.llm_local import CausalLM
from wg_core import State, World
from wg_core.state.store import SnapshotStore
import wg_blocks.terrain, onnxruntime, scipy
me = psutil.Process()
world = World.from_yaml("worlds/tidewater.yaml")
world.store = SnapshotStore(tempfile.mkdtemp())
blocks = [b for b in world.iter_blocks() if isinstance(b, CausalLM)]
before = me.memory_info().rss
if sys.argv[1] == "block":
    alone = CausalLM(checkpoint_ref="smollm2-135m-instruct")
    alone.run({"prompt": "Hi", "params": {"max_new_tokens": 8, "seed": 1}})
else:
    first = world.step(seed=1, action="a storm lands")
    world.step(first, seed=1)
gc.collect()
print(json.dumps({"mb": (me.memory_info().rss - before) / 1e6, "blocks": len(blocks)}))
"""


def grown(case: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", CODE, case], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    block, world = grown("block"), grown("world")
    found = {
        "one_copy_mb": round(block["mb"]),
        "world_mb": round(world["mb"]),
        "language_models_in_world": world["blocks"],
    }
    sys.stdout.write(json.dumps({**found, "ratio": round(world["mb"] / block["mb"], 2), "aim": 1.3}) + "\n")
