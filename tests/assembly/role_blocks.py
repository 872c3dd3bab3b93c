"""One small block for each wired role; values are numbers, so that results can be written down."""

from __future__ import annotations

from typing import Any

from wg_core import Block, BlockRegistry, Port
from wg_core.assembly import roles


class Tokenizer(roles.Tokenizer):
    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"token_ids": len(inputs["text"]), "attention_mask": 1}


class Conditioner(roles.Conditioner):
    def __init__(self, *, gain: float = 1) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"embedding": {"value": self.gain * inputs["input"]}}


class Initializer(roles.Initializer):
    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"latent": inputs.get("init_latent", 1.0), "timestep": 0}


class Backbone(roles.Backbone):
    """`pred = rate * latent + timestep`, and the adapter's features where there are some."""

    def __init__(self, *, rate: float = 0.5) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        extra = sum(inputs.get("adapter_features", {}).values())
        return {"pred": self.rate * inputs["latent"] + inputs["timestep"] + extra}


class Guidance(roles.Guidance):
    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        cond = inputs["pred_cond"]
        uncond = inputs.get("pred_uncond", cond)
        return {"pred_guided": uncond + inputs.get("scale", 1) * (cond - uncond)}


class Solver(roles.Solver):
    """`next_latent = latent + pred`, `next_timestep = timestep + 1`."""

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"next_latent": inputs["latent"] + inputs["pred"], "next_timestep": inputs["timestep"] + 1}


class Codec(roles.Codec):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        if "encode_image" in inputs:
            self.calls.append("encode")
            out["encode_latent"] = inputs["encode_image"] / 100
        if "decode_latent" in inputs:
            self.calls.append("decode")
            out["decode_image"] = inputs["decode_latent"] * 100
        return out


class Adapter(roles.SignalAdapter):
    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"adapted": 0.25}


class LoRA(roles.WeightAdapter):
    def __init__(self, *, target: str = "net") -> None:
        super().__init__()
        self.target = target
        self.attached: Block | None = None

    def attach(self, block: Block, *, managed: bool = False) -> None:
        self.attached = block

    def detach(self) -> None:
        self.attached = None


class Agent(roles.Agent):
    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"response": inputs["context"]}


class Calculator(roles.Tool):
    ports = (Port("expression", "in", "text"), Port("result", "out", "number"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"result": float(inputs["expression"])}


class Free(Block):
    """A block without a role."""

    ports = (Port("x", "in", "any", optional=True), Port("y", "out", "any"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": inputs.get("x", 7)}


def registry() -> BlockRegistry:
    """The blocks above as `role/small`, and `free/small`."""
    found = BlockRegistry()
    for cls in (
        Tokenizer, Conditioner, Initializer, Backbone, Guidance, Solver, Codec, Adapter, LoRA, Agent, Calculator, Free,
    ):  # fmt: skip
        name = "lora" if cls is LoRA else "small"
        found.register(f"{cls.role or 'free'}/{name}", cls)
    return found
