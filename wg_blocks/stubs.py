"""Identity blocks, one for each role: cheap, deterministic, of the right types, for building and trying structures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wg_blocks import BLOCKS
from wg_blocks.tokens import ByteTokenizer, encode_bytes
from wg_core.assembly import roles
from wg_core.errors import MissingInputError


class IdentityBackbone(roles.Backbone):
    """Predicts the latent itself."""

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"pred": inputs["latent"]}


class IdentitySolver(roles.Solver):
    """Stays where it is."""

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"next_latent": inputs["latent"], "next_timestep": inputs["timestep"]}


class IdentityCodec(roles.Codec):
    """Images are latents. Raises: MissingInputError if no input is set."""

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        pairs = (("encode_image", "encode_latent"), ("decode_latent", "decode_image"))
        outputs = {target: inputs[source] for source, target in pairs if source in inputs}
        if not outputs:
            raise MissingInputError(f"{self.name} needs 'encode_image' or 'decode_latent'; neither is set")
        return outputs


class IdentityConditioner(roles.Conditioner):
    """The input as a tensor: texts as bytes and token ids as numbers [B,L,1]; tensors of floats and dicts as they are."""

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        import torch

        value = inputs["input"]
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            value = encode_bytes(value)[0]
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            value = value.float().unsqueeze(-1)
        return {"embedding": value}


class IdentityTokenizer(ByteTokenizer):
    """Bytes as tokens."""

    def __init__(self) -> None:
        super().__init__()


class IdentityAdapter(roles.SignalAdapter):
    """Gives the condition on."""

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"adapted": inputs["condition"]}


class IdentityGuidance(roles.Guidance):
    """The conditional prediction, uncorrected."""

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"pred_guided": inputs["pred_cond"]}


class IdentityLLM(roles.LLM):
    """Echoes the prompt; of messages the content of the last."""

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"text": _text(inputs["prompt"])}


class IdentityVLM(roles.VLM):
    """Echoes the prompt, else says nothing."""

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"text": inputs.get("prompt", "")}


class IdentityEmbedding(roles.Embedding):
    """Texts as their bytes / 255 (a list, for a batch a list of lists); anything else as it is."""

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        value = inputs["input"]
        if isinstance(value, str):
            value = _bytes(value)
        elif isinstance(value, list):
            value = [_bytes(v) if isinstance(v, str) else v for v in value]
        return {"embedding": value}


class IdentityAgent(roles.Agent):
    """Echoes its context and calls no tool."""

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        context = inputs["context"]
        return {"response": dict(context) if isinstance(context, Mapping) else _text(context)}


class IdentityInitializer(roles.Initializer):
    """Begins with `init_latent`, else with zeros of `shape` (default [1, 4, 8, 8]); time 1."""

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if "init_latent" in inputs:
            return {"latent": inputs["init_latent"], "timestep": 1.0}
        import torch

        return {"latent": torch.zeros([int(n) for n in inputs.get("shape", (1, 4, 8, 8))]), "timestep": 1.0}


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return _text(value.get("content", value.get("text", "")))
    if isinstance(value, Sequence) and value:
        chat = all(isinstance(v, Mapping) and "role" in v for v in value)
        return _text(value[-1]) if chat else "\n".join(_text(v) for v in value)
    return "" if isinstance(value, Sequence) else str(value)


def _bytes(text: str) -> list[float]:
    return [b / 255 for b in text.encode("utf-8")]


def register_stubs(registry: Any) -> None:
    """Register all identity blocks; doing so again changes nothing."""
    for block_type, factory in BLOCKS.items():
        if block_type.endswith("/identity"):
            registry.register(block_type, factory)
