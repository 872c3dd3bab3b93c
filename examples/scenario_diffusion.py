"""Diffusion only: a small network learns four shapes and draws what it is asked for, with classifier-free guidance.

Flow matching (Lipman et al. 2022, https://arxiv.org/abs/2210.02747): between a picture (time 0) and noise (time 1) the
network learns the direction; `solver/euler` follows it back. Writes diffusion.png: one column for each shape.
"""

from __future__ import annotations

import sys
import time

import torch
from shapes import SHAPES, SIZE, batch, save, text
from torch import nn

from wg_core import Graph
from wg_core.assembly.registry import default_registry
from wg_core.assembly.roles import Backbone
from wg_core.weights.module import ModuleBlock

DIM, WIDTH, BATCH = 32, 48, 48


class ShapeNet(ModuleBlock, Backbone):
    """A UNet of one level that is told time and condition [B,L,D]: [B,1,16,16] to [B,1,16,16]."""

    role = "backbone"
    ports = Backbone.ports

    def build_modules(self) -> dict[str, nn.Module]:
        def conv(i: int, o: int, **more: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, **more), nn.GroupNorm(8, o), nn.SiLU())

        return {
            "first": nn.Sequential(nn.PixelUnshuffle(2), conv(4, WIDTH)),
            "told": nn.Sequential(nn.Linear(DIM + 9, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, 2 * WIDTH)),
            "deep": nn.Sequential(conv(WIDTH, WIDTH, stride=2), conv(WIDTH, WIDTH), conv(WIDTH, WIDTH), nn.Upsample(scale_factor=2)),
            "last": nn.Sequential(conv(2 * WIDTH, WIDTH), nn.Conv2d(WIDTH, 4, 3, padding=1), nn.PixelShuffle(2)),
        }

    def forward(self, inputs: dict) -> dict:
        net, x = self.modules, inputs["latent"]
        t = torch.as_tensor(inputs["timestep"], dtype=x.dtype).reshape(-1, 1).expand(len(x), 1)
        waves = torch.cat([t, *(f(t * 2**k) for k in range(4) for f in (torch.sin, torch.cos))], dim=1)
        told = inputs["condition"].mean(1) if "condition" in inputs else x.new_zeros(len(x), DIM)
        scale, shift = net["told"](torch.cat([waves, told], dim=1))[:, :, None, None].chunk(2, dim=1)
        hidden = net["first"](x) * (1 + scale) + shift
        return {"pred": net["last"](torch.cat([hidden, net["deep"](hidden)], dim=1))}


def shape_graph(steps: int = 16, scale: float = 2.0) -> Graph:
    """The ready graph of text to image, with our own network as its backbone: `prompt` in, `image` out."""
    default_registry().register("backbone/shapes", ShapeNet)
    return Graph.from_template(
        "text_to_image", tokenizer="tokenizer/bytes", conditioner="conditioner/toy", initializer="initializer/noise",
        backbone="backbone/shapes", guidance="guidance/cfg", solver="solver/euler", codec="codec/identity",
        steps=steps, scale=scale, shape=(1, 1, SIZE, SIZE),
    )  # fmt: skip


def train(graph: Graph, steps: int, seed: int = 0) -> list[float]:
    """The losses; now and then the word is left out, which is what guidance needs."""
    blocks = {name: graph.nodes[name].block for name in ("tok", "txt", "net")}
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(graph.trainable_parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        pictures, labels = batch(BATCH, random)
        words = ["" if torch.rand(1, generator=random) < 0.15 else SHAPES[i] for i in labels]
        told = blocks["tok"].forward({"text": words})
        told = blocks["txt"].forward({"input": told["token_ids"], "attention_mask": told["attention_mask"]})["embedding"]
        noise, t = torch.randn(pictures.shape, generator=random), torch.rand(BATCH, 1, 1, 1, generator=random)
        pred = blocks["net"].forward({"latent": (1 - t) * pictures + t * noise, "timestep": t, "condition": told})["pred"]
        loss = (pred - (noise - pictures)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    graph, began = shape_graph(), time.monotonic()
    losses = train(graph, 350)
    print(f"{sum(p.numel() for p in graph.trainable_parameters())} parameters learned in {time.monotonic() - began:.0f} s: "
          f"loss {losses[0]:.2f} -> {sum(losses[-20:]) / 20:.2f}")  # fmt: skip
    pictures = [graph.run({"prompt": shape, "negative": ""}, seed=3)["image"][0] for shape in SHAPES]
    for shape, picture in zip(SHAPES, pictures, strict=True):
        print(f"\n{shape}\n{text(picture)}")
    save(torch.stack(pictures), "diffusion.png")
    for absent in ("wg_core.levels.pipeline", "wg_core.levels.stage", "wg_core.levels.world", "dagster", "mlflow", "transformers"):
        assert absent not in sys.modules, absent
