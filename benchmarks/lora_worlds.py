"""Memory and speed of a base world and two LoRA worlds side by side in one process: `python benchmarks/lora_worlds.py [FILE]`.

The world's language model answers once in each world; that the worlds differ is seen from the loss of one fixed answer, as
texts of weak adapters may agree. `memory_ratio` is the memory of the process with all three worlds to
that with the base alone plus the bytes of the adapters (the aim: at most 1.05); packages are imported before.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil


def stir(world: Any, seed: int, size: float) -> None:
    """Let the adapters of a LoRA world that change nothing yet change a little."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for _, parameter in world.named_trainable_parameters():
        if not parameter.any():
            with torch.no_grad():
                parameter.copy_((torch.rand(parameter.shape, generator=generator) - 0.5) * size)


def measure(file: Path, rank: int, tokens: int) -> dict[str, Any]:
    """Megabytes and tokens per second, and their ratios."""
    import peft  # noqa: F401
    import torch

    from wg_core import World
    from wg_core.levels.lora_world import lora_world
    from wg_core.levels.training import calling

    base = World.from_yaml(file)
    path, model = next((p, b) for p, b in base.block_paths() if b.role == "llm" and hasattr(b, "modules"))
    process = psutil.Process()

    def answer(world: Any) -> tuple[tuple[str, float], float]:
        prompt = "Tell of a storm in the harbour."
        with calling(world, path, training=False) as block:
            began = time.perf_counter()
            out = block.run({"prompt": prompt, "params": {"max_new_tokens": tokens, "temperature": 0}})
            speed = out["usage"]["completion_tokens"] / (time.perf_counter() - began)
            fixed: Any = {"messages": [{"role": "user", "content": prompt}], "answer": "At dawn the sea lay still again."}
            with torch.no_grad():
                loss, _ = block.answer_loss([fixed])  # type: ignore[attr-defined]
            return (out["text"], float(loss)), speed

    answer(base)
    digest = model.weight_hash()
    plain, alone_speed = answer(base)
    alone = process.memory_info().rss
    worlds = [lora_world(base, name, rank=rank) for name in ("first", "second")]
    adapters = 0
    for seed, world in enumerate(worlds):
        stir(world, seed, 0.05)
        adapters += sum(parameter.numel() * parameter.element_size() for _, parameter in world.named_trainable_parameters())
    answers, speeds = zip(*(answer(world) for world in worlds), strict=True)
    again, beside_speed = answer(base)
    together = process.memory_info().rss
    if again != plain or len({loss for _, loss in (plain, *answers)}) != 3 or model.weight_hash() != digest:
        raise SystemExit("the worlds do not differ, or the base changed")
    mega = 1 << 20
    return {
        "world": base.world_id, "rank": rank, "adapters_mb": round(adapters / mega, 1),
        "base_mb": round(alone / mega), "three_worlds_mb": round(together / mega),
        "memory_ratio": round(together / (alone + adapters), 3),
        "base_beside_to_alone_speed": round(beside_speed / alone_speed, 2),
        "adapted_to_base_speed": round(sum(speeds) / len(speeds) / beside_speed, 2),
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=Path("worlds/tidewater.yaml"))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()
    sys.stdout.write(json.dumps(measure(args.file, args.rank, args.tokens)) + "\n")
