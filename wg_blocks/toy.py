"""Tiny torch networks with real parameters, for CPU: training, sharing and checkpoints can be tried without models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wg_blocks.tokens import VOCABULARY, encode_bytes
from wg_core import Port
from wg_core.assembly.roles import Backbone, Codec, Conditioner
from wg_core.errors import MissingInputError, PortValueError
from wg_core.weights.module import ModuleBlock

if TYPE_CHECKING:
    from torch import nn


class ToyBackbone(ModuleBlock, Backbone):
    """A convolution, a mixing layer told about time and condition, a convolution: [B,C,H,W] to [B,C,H,W].

    A condition [B,L,D] is taken as its mean over L. Raises: PortValueError for a condition of another width.
    """

    role = "backbone"
    ports = (
        Port("latent", "in", "tensor", aliases=("x",)),
        Port("timestep", "in", "tensor|number", aliases=("t",)),
        Port("condition", "in", "tensor", True, "concat", aliases=("context", "emb", "encoder_hidden_states")),
        Port(
            "adapter_features", "in", "tensor|dict", True, "dict", description="features [B,C,H,W] added to the latent"
        ),
        Port("pred", "out", "tensor", aliases=("noise", "x0", "v")),
    )

    def __init__(
        self,
        *,
        channels: int = 4,
        width: int = 16,
        condition_dim: int = 32,
        init_seed: int = 0,
        checkpoint_ref: str | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.width, self.condition_dim, self.init_seed = channels, width, condition_dim, init_seed

    def build_modules(self) -> dict[str, nn.Module]:
        from torch import nn

        return {
            "stem": nn.Conv2d(self.channels, self.width, 3, padding=1),
            "time": nn.Linear(1, self.width),
            "condition": nn.Linear(self.condition_dim, self.width),
            "mix": nn.Linear(self.width, self.width),
            "head": nn.Conv2d(self.width, self.channels, 3, padding=1),
        }

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        import torch

        net = self.modules
        latent = inputs["latent"]
        for feature in inputs.get("adapter_features", {}).values():
            latent = latent + feature
        weight = net["time"].weight
        time = torch.as_tensor(inputs["timestep"], dtype=weight.dtype, device=weight.device).reshape(-1, 1)
        told = net["time"](time)
        condition = inputs.get("condition")
        if condition is not None:
            if condition.shape[-1] != self.condition_dim:
                raise PortValueError(
                    f"{self.name}: condition is {list(condition.shape)}, its last dimension must be {self.condition_dim}; "
                    "set condition_dim to the width of the conditioner"
                )
            told = told + net["condition"](condition.mean(dim=1) if condition.ndim == 3 else condition)
        hidden = net["stem"](latent) + told[:, :, None, None]
        hidden = hidden + net["mix"](torch.tanh(hidden).movedim(1, -1)).movedim(-1, 1)
        return {"pred": net["head"](torch.tanh(hidden))}


class ToyCodec(ModuleBlock, Codec):
    """Halves images [B,3,H,W] in 0..1 to latents [B,C,H/2,W/2], and back; not trained.

    Raises: MissingInputError if no input is set.
    """

    role = "codec"
    ports = Codec.ports

    def __init__(self, *, latent_channels: int = 4, init_seed: int = 0, checkpoint_ref: str | None = None) -> None:
        super().__init__()
        self.latent_channels, self.init_seed = latent_channels, init_seed

    def build_modules(self) -> dict[str, nn.Module]:
        from torch import nn

        return {
            "encoder": nn.Conv2d(3, self.latent_channels, 2, stride=2),
            "decoder": nn.ConvTranspose2d(self.latent_channels, 3, 2, stride=2),
        }

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        outputs: dict[str, Any] = {}
        if "encode_image" in inputs:
            outputs["encode_latent"] = self.modules["encoder"](inputs["encode_image"] * 2 - 1)
        if "decode_latent" in inputs:
            outputs["decode_image"] = self.modules["decoder"](inputs["decode_latent"]).sigmoid()
        if not outputs:
            raise MissingInputError(f"{self.name} needs 'encode_image' or 'decode_latent'; neither is set")
        return outputs


class ToyConditioner(ModuleBlock, Conditioner):
    """An embedding for each token [B,L,D], and their mean as `pooled` [B,D]; texts are read as bytes.

    Raises: PortValueError for a tensor that holds no token ids.
    """

    role = "conditioner"
    ports = (
        Port("input", "in", "text|tensor", aliases=("text", "prompt", "token_ids")),
        Port("attention_mask", "in", "tensor", True),
        Port("embedding", "out", "tensor", aliases=("encoder_hidden_states", "condition")),
        Port("pooled", "out", "tensor"),
    )

    def __init__(
        self, *, dim: int = 32, vocabulary: int = VOCABULARY, init_seed: int = 0, checkpoint_ref: str | None = None
    ) -> None:
        super().__init__()
        self.dim, self.vocabulary, self.init_seed = dim, vocabulary, init_seed

    def build_modules(self) -> dict[str, nn.Module]:
        from torch import nn

        return {"tokens": nn.Embedding(self.vocabulary, self.dim), "out": nn.Linear(self.dim, self.dim)}

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        import torch

        ids, mask = inputs["input"], inputs.get("attention_mask")
        if not isinstance(ids, torch.Tensor):
            ids, mask = encode_bytes(ids)
        if ids.ndim != 2 or ids.is_floating_point() or (ids.numel() and int(ids.max()) >= self.vocabulary):
            raise PortValueError(
                f"{self.name}: input is {ids.dtype} {list(ids.shape)}; token ids are whole [B, L] below {self.vocabulary}"
            )
        embedding = self.modules["out"](self.modules["tokens"](ids))
        weight = (torch.ones_like(ids) if mask is None else mask).unsqueeze(-1).to(embedding.dtype)
        embedding = embedding * weight
        return {"embedding": embedding, "pooled": embedding.sum(dim=1) / weight.sum(dim=1).clamp(min=1)}
