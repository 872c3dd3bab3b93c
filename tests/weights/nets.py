"""Blocks with weights for these tests: plain, tied, nested, with state that is no tensor."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from wg_core import Block, BlockRegistry, Graph, Port
from wg_core.errors import StateDictError
from wg_core.weights.module import ModuleBlock

PORTS = (Port("x", "in", "tensor"), Port("y", "out", "tensor"))


class Net(ModuleBlock):
    """Two linear layers, batch norm and dropout."""

    ports = PORTS
    builds = 0

    def __init__(self, *, width: int = 3, init_seed: int = 0, checkpoint_ref: str | None = None) -> None:
        super().__init__()
        self.width, self.init_seed = width, init_seed

    def build_modules(self) -> dict[str, nn.Module]:
        Net.builds += 1
        enc = nn.Sequential(nn.Linear(self.width, self.width), nn.BatchNorm1d(self.width), nn.Dropout(0.5))
        return {"enc": enc, "head": nn.Linear(self.width, self.width)}

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": self.modules["head"](self.modules["enc"](inputs["x"]))}


class Linear(ModuleBlock):
    """One layer without bias."""

    ports = PORTS

    def __init__(self, *, width: int = 3, init_seed: int = 0, checkpoint_ref: str | None = None) -> None:
        super().__init__()
        self.width, self.init_seed = width, init_seed

    def build_modules(self) -> dict[str, nn.Module]:
        return {"net": nn.Linear(self.width, self.width, bias=False)}

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": self.modules["net"](inputs["x"])}


class Odd(ModuleBlock):
    """Tied, transposed, bfloat16, scalar and integer tensors."""

    ports = PORTS

    def build_modules(self) -> dict[str, nn.Module]:
        net = nn.Module()
        net.embed = nn.Embedding(5, 4)
        net.out = nn.Linear(4, 5, bias=False)
        net.out.weight = net.embed.weight
        net.turned = nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
        net.brief = nn.Parameter(torch.tensor([1.5, -2.25], dtype=torch.bfloat16))
        net.scalar = nn.Parameter(torch.tensor(3.0))
        rows = torch.arange(6)
        net.register_buffer("rows", rows)
        net.register_buffer("view", rows[2:4])
        net.register_buffer("empty", torch.zeros(0, 2))
        net.register_buffer("flags", torch.tensor([True, False]))
        return {"odd": net}

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": inputs["x"]}


class Memory(Block):
    """Keeps texts and a counter; takes no negative count."""

    ports = PORTS

    def __init__(self) -> None:
        super().__init__()
        self.count, self.notes = 0, ["begun"]

    def own_state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "notes": list(self.notes)}

    def load_own_state_dict(self, state: Any) -> None:
        if state["count"] < 0:
            raise StateDictError("count is not negative")
        self.count, self.notes = state["count"], list(state["notes"])

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": inputs["x"]}


class Outer(Block):
    """Sub-blocks two levels deep."""

    ports = PORTS

    def __init__(self, *, depth: int = 2) -> None:
        super().__init__()
        self.parts: dict[str, Block] = {"net": Net(), "memory": Memory()}
        if depth > 1:
            self.parts["deep"] = Outer(depth=depth - 1)

    def get_sub_blocks(self) -> dict[str, Block]:
        return self.parts

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return self.parts["net"].run(inputs)


def registry() -> BlockRegistry:
    """A registry with these blocks."""
    made = BlockRegistry()
    for name, cls in {"net": Net, "linear": Linear, "odd": Odd, "memory": Memory, "outer": Outer}.items():
        made.register(f"test/{name}", cls)
    return made


def chain(*blocks: tuple[str, Block], id: str = "chain") -> Graph:
    """Blocks in a row: x -> ... -> y."""
    graph = Graph(id)
    for node_id, block in blocks:
        graph.add_node(block, node_id)
    for (a, _), (b, _) in itertools.pairwise(blocks):
        graph.add_edge(a, "y", b, "x")
    graph.expose_input(blocks[0][0], "x", "x")
    graph.expose_output(blocks[-1][0], "y", "y")
    return graph


def bits(state: dict[str, Any]) -> dict[str, Any]:
    """A state to compare: tensors as kind, shape and bytes."""
    return {
        k: (v.dtype, tuple(v.shape), v.detach().contiguous().reshape(-1).view(torch.uint8).tolist())
        if isinstance(v, torch.Tensor)
        else v
        for k, v in state.items()
    }


def shaken(block: Any) -> Any:
    """The same entity with other numbers in it."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for b in block.iter_blocks():
            if isinstance(b, ModuleBlock):
                b.materialize()
                for t in b._tensors():
                    if t.is_floating_point():
                        t.add_(torch.rand(t.shape, generator=generator).to(t.dtype))
            if isinstance(b, Memory):
                b.count, b.notes = 7, ["a", "ü"]
    return block


class Reads(Block):
    """A row of numbers out of a text."""

    ports = (Port("x", "in", "text"), Port("y", "out", "tensor"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": torch.tensor([[float(word) for word in inputs["x"].split()]])}


class Tells(Block):
    """A tensor as text."""

    ports = (Port("x", "in", "tensor"), Port("y", "out", "text"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": f"sum {float(inputs['x'].detach().sum()):.3f}"}
