"""What a world whose stages share one model keeps in memory, over one copy of the model: `python benchmarks/shared_model.py`.

Each figure is the growth of the resident memory of a process of its own, after imports: one block that has answered
once, and a world whose five stages each ask the same model, after two steps. `of` says what it is: pages of the weight
file (torch reads them where the file lies), and memory of the process, of which prefixes are keys and values that are
kept of prompts. With `--world FILE` a world file is measured beside it, with all models that it has.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CODE = """
import gc, json, re, sys, tempfile
import torch, transformers
from transformers import LlamaForCausalLM, AutoTokenizer, AutoModelForCausalLM
from wg_blocks.llm_local import CausalLM
from wg_core import State, World
from wg_core.state.store import SnapshotStore
import wg_blocks.terrain, onnxruntime, scipy

def resident():
    gc.collect()
    found = re.findall(r"(VmRSS|RssAnon|RssFile):\\s+(\\d+) kB", open("/proc/self/status").read())
    return {name: int(size) / 1024 for name, size in found}

case = sys.argv[1]
before = resident()
if case == "block":
    blocks = [CausalLM(checkpoint_ref="smollm2-135m-instruct")]
    blocks[0].run({"prompt": "Hi", "params": {"max_new_tokens": 32, "seed": 1}})
else:
    world = World.from_yaml(case)
    world.store = SnapshotStore(tempfile.mkdtemp())
    world.store.blobs.put(b"A note.")
    first = world.step(seed=1, action="a storm lands")
    world.step(first, seed=1)
    blocks = list({id(b): b for b in world.iter_blocks() if isinstance(b, CausalLM)}.values())
after = resident()
grown = {name: round(after[name] - before[name]) for name in before}
print(json.dumps({
    "mib": grown["VmRSS"], "language_models": len(blocks), "of": {
        "weight_file": grown["RssFile"], "process": grown["RssAnon"],
        "prefixes": round(sum(b._prefixes.nbytes for b in blocks) / 2**20, 1)}}))
"""


def grown(case: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", CODE, case], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", help="a world file to measure too")
    given = parser.parse_args()
    block, world = grown("block"), grown(str(Path(__file__).with_name("five_stages.yaml")))
    found = {"one_copy": block, "world": world, "ratio": round(world["mib"] / block["mib"], 2), "aim": 1.3}
    if given.world:
        found[given.world] = grown(given.world)
    sys.stdout.write(json.dumps(found) + "\n")
