"""Any architecture is a class and a registration: one small sample of each family, and three of them trained together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from wg_blocks.testing import check_block_contract
from wg_core import BlockRegistry, Graph, Pipeline, Port
from wg_core.assembly.roles import Backbone
from wg_core.weights.module import ModuleBlock

REGISTRY = BlockRegistry()
WORDS, WIDTH = 12, 16


def inp(name: str) -> Port:
    return Port(name, "in", "tensor")


def out(name: str) -> Port:
    return Port(name, "out", "tensor")


class CausalTransformer(ModuleBlock):
    """Token ids [B,L] to the scores of each next token [B,L,V]."""

    ports = (inp("tokens"), out("logits"))

    def build_modules(self) -> dict[str, nn.Module]:
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True)
        return {"embed": nn.Embedding(WORDS, WIDTH), "body": nn.TransformerEncoder(layer, 1), "head": nn.Linear(WIDTH, WORDS)}

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        net, ids = self.modules, inputs["tokens"]
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return {"logits": net["head"](net["body"](net["embed"](ids), mask=mask, is_causal=True))}


class Denoiser(ModuleBlock, Backbone):
    """The diffusion core: noisy picture [B,1,8,8] and time to the noise in it."""

    role = "backbone"
    ports = Backbone.ports

    def build_modules(self) -> dict[str, nn.Module]:
        return {"net": nn.Sequential(nn.Conv2d(2, WIDTH, 3, padding=1), nn.SiLU(), nn.Conv2d(WIDTH, 1, 3, padding=1))}

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        x = inputs["latent"]
        time = torch.as_tensor(inputs["timestep"], dtype=x.dtype).reshape(-1, 1, 1, 1).expand(len(x), 1, *x.shape[2:])
        return {"pred": self.modules["net"](torch.cat([x, time], dim=1))}


class MessagePassing(ModuleBlock):
    """Atoms [N,F] and bonds [N,N] to one property of the molecule, by two rounds of sums over neighbours."""

    ports = (inp("atoms"), inp("bonds"), out("property"))

    def build_modules(self) -> dict[str, nn.Module]:
        return {"first": nn.Linear(4, WIDTH), "round": nn.Linear(2 * WIDTH, WIDTH), "read": nn.Linear(WIDTH, 1)}

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        net = self.modules
        hidden = net["first"](inputs["atoms"]).relu()
        for _ in range(2):
            hidden = net["round"](torch.cat([hidden, inputs["bonds"] @ hidden], dim=1)).relu()
        return {"property": net["read"](hidden.sum(dim=0))}


class Classifier(ModuleBlock):
    """Pictures [B,1,8,8] to scores [B,3]."""

    ports = (inp("picture"), out("scores"))

    def build_modules(self) -> dict[str, nn.Module]:
        return {"net": nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))}

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"scores": self.modules["net"](inputs["picture"])}


class Autoencoder(ModuleBlock):
    """Pictures [B,1,8,8] through a code [B,6] and back."""

    ports = (inp("picture"), out("code"), out("again"))

    def build_modules(self) -> dict[str, nn.Module]:
        return {"encoder": nn.Sequential(nn.Flatten(), nn.Linear(64, 6)), "decoder": nn.Linear(6, 64)}

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        code = self.modules["encoder"](inputs["picture"])
        return {"code": code, "again": self.modules["decoder"](code).reshape(-1, 1, 8, 8)}


class Recurrent(ModuleBlock):
    """A sequence [B,L,4] to the value that comes next [B,4]."""

    ports = (inp("series"), out("next"))

    def build_modules(self) -> dict[str, nn.Module]:
        return {"rnn": nn.GRU(4, WIDTH, batch_first=True), "head": nn.Linear(WIDTH, 4)}

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"next": self.modules["head"](self.modules["rnn"](inputs["series"])[0][:, -1])}


class Adversaries(ModuleBlock):
    """Noise [B,4] to pictures [B,64], and how real each looks [B,1]."""

    ports = (inp("noise"), out("picture"), out("real"))

    def build_modules(self) -> dict[str, nn.Module]:
        return {"maker": nn.Sequential(nn.Linear(4, 64), nn.Tanh()), "critic": nn.Linear(64, 1)}

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        picture = self.modules["maker"](inputs["noise"])
        return {"picture": picture, "real": self.modules["critic"](picture)}


def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


PICTURES = torch.rand(4, 1, 8, 8, generator=random())
TOKENS = (torch.arange(24).reshape(2, 12) * 5) % WORDS
RING = torch.roll(torch.eye(5), 1, 0) + torch.roll(torch.eye(5), -1, 0)
ATOMS = torch.eye(4)[torch.tensor([0, 1, 0, 2, 3])]
FAMILIES: dict[str, tuple[type[ModuleBlock], dict[str, Any]]] = {
    "lm/causal": (CausalTransformer, {"tokens": TOKENS}),
    "backbone/denoiser": (Denoiser, {"latent": PICTURES, "timestep": 0.5}),
    "predictor/gnn": (MessagePassing, {"atoms": ATOMS, "bonds": RING}),
    "classifier/cnn": (Classifier, {"picture": PICTURES}),
    "autoencoder/small": (Autoencoder, {"picture": PICTURES}),
    "predictor/rnn": (Recurrent, {"series": torch.rand(2, 5, 4, generator=random())}),
    "gan/small": (Adversaries, {"noise": torch.rand(3, 4, generator=random())}),
}
for name, (cls, _) in FAMILIES.items():
    REGISTRY.register(name, cls)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_a_class_and_a_registration(name: str) -> None:
    """04 X-6: each keeps the contract of all blocks, has weights, and every one of them learns."""
    _, inputs = FAMILIES[name]
    block = REGISTRY.build({"block_type": name})
    check_block_contract(block, inputs, registry=REGISTRY)
    parameters = block.trainable_parameters()
    assert parameters
    sum(value.square().mean() for value in block.forward(dict(inputs)).values()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in parameters)


def test_three_families_in_one_pipeline_are_trained_together() -> None:
    """04 X-6: a network of molecules, a language model and a diffusion core; twenty steps, each loss drops."""
    pipeline = Pipeline("mixed")
    parts = (("gnn", "predictor/gnn"), ("lm", "lm/causal"), ("core", "backbone/denoiser"))
    for graph_id, block_type in parts:
        graph = Graph(graph_id)
        graph.add_node(block_type, "net", registry=REGISTRY)
        for direction, ports in (("in", graph.nodes["net"].block.input_ports), ("out", graph.nodes["net"].block.output_ports)):
            for port in ports:
                (graph.expose_input if direction == "in" else graph.expose_output)("net", port.name, port.name)
        pipeline.add_graph(graph)
    draws = random()
    noise = torch.randn(PICTURES.shape, generator=draws)
    inputs = {
        "gnn:atoms": ATOMS, "gnn:bonds": RING, "lm:tokens": TOKENS[:, :-1],
        "core:latent": 0.5 * PICTURES + 0.5 * noise, "core:timestep": 0.5,
    }  # fmt: skip

    def losses() -> torch.Tensor:
        got = pipeline.run(inputs, training=True)
        mass = (got["gnn:property"] - 3.5).square().mean()
        words = nn.functional.cross_entropy(got["lm:logits"].flatten(0, 1), TOKENS[:, 1:].flatten())
        return torch.stack([mass, words, (got["core:pred"] - noise).square().mean()])

    parameters = pipeline.trainable_parameters()
    assert len(parameters) == sum(len(g.child.trainable_parameters()) for g in pipeline.nodes.values())
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    before = losses().detach()
    for _ in range(20):
        optimizer.zero_grad()
        losses().sum().backward()
        optimizer.step()
    after = losses().detach()
    assert bool((after < 0.8 * before).all()), (before, after)
