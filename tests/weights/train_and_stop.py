"""Trainings one after the other, each in a process of its own, which may kill itself in the middle.

`python train_and_stop.py FOLDER OUT STEP [FOLDER OUT STEP ...]` prints how each ended; STEP -1 lets it finish.
What a killed one left stays beside it in FOLDER.killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from nets import Net
from safetensors.torch import save_file

from wg_core.execution.context import Event
from wg_core.weights.fit import TrainingConfig, fit

CONFIG = TrainingConfig(
    lr=0.05, steps=12, batch_size=2, accumulate=2, schedule="cosine", warmup=3, weight_decay=0.1, clip_norm=1.0,
    save_every=3, eval_every=4, seed=5,
)  # fmt: skip


def train(folder: str, out: str, stop: int) -> None:
    net = Net(width=4).train()
    net.materialize()
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(7, 4, generator=generator)

    def kill(event: Event) -> None:
        if event.kind == "train_step" and event.data["step"] == stop:
            os.kill(os.getpid(), signal.SIGKILL)

    def loss(batch: list[int]) -> torch.Tensor:
        return net.forward({"x": xs[batch]})["y"].square().mean()  # batch norm and dropout: buffers and random numbers count

    buffers = [(f"net:{k}", v) for k, v in net.state_dict().items() if "running" in k or "batches" in k]
    named = [(f"net:{n}", p) for n, p in net.named_trainable_parameters()]
    result = fit(named, list(range(7)), loss, CONFIG, held_out=[1, 2], folder=folder, hooks=[kill], buffers=buffers)
    Path(out).with_suffix(".txt").write_text(f"{result.steps} {result.resumed_at} {result.best_step} {result.held_out}")
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, out)


def main(*given: str) -> None:
    import torch._dynamo  # noqa: F401  what an optimizer would load in each child

    for folder, out, stop in zip(*[iter(given)] * 3, strict=True):
        child = os.fork()
        if not child:
            train(folder, out, int(stop))
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if ended == -signal.SIGKILL:
            shutil.copytree(folder, f"{folder}.killed")
        print(ended)


if __name__ == "__main__":
    main(*sys.argv[1:])
