"""Linear layers that hold their weights as whole numbers of 8 bits: a quarter of the memory, faster where it is the limit.

Weights are rounded symmetrically for each output, and inputs for each call, to 7 bits so that sums of products cannot
overflow on processors without VNNI (Krishnamoorthi 2018, https://arxiv.org/abs/1806.08342; Khudia et al. 2021,
https://arxiv.org/abs/2101.05615, whose kernels are called here). Embeddings and all else stay as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from wg_core.errors import MissingExtraError


def to_int8(model: Any) -> Any:
    """Replace all linear layers below `model`, in place; nothing in it learns from then on.

    Raises: MissingExtraError where this build of torch cannot compute so.
    """
    import torch

    layer_class = _layer_class()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(parent, name, layer_class(child))
    return model.requires_grad_(False)


def packed_bytes(model: Any) -> int:
    """Bytes of the packed weights below `model`, which are no tensors of it."""
    layers = (layer for layer in model.modules() if isinstance(layer, _layer_class()))
    return sum(layer.in_features * layer.out_features for layer in layers)


@lru_cache(maxsize=1)
def _layer_class() -> Any:
    import torch
    from torch import Tensor, nn

    if "fbgemm" not in torch.backends.quantized.supported_engines:
        raise MissingExtraError(
            "weights: int8 needs a build of torch with fbgemm (x86); leave weights out on this machine"
        )

    class Int8Linear(nn.Module):
        """y = W x + b with W in 8 bits; the state is `weight_int8`, `scale` and `bias`."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            weight = linear.weight.detach().float()
            scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.bias = None if linear.bias is None else linear.bias.detach().float()
            self._pack((weight / scale[:, None]).round().to(torch.int8), scale)

        def _pack(self, weight: Tensor, scale: Tensor) -> None:
            with warnings.catch_warnings():  # this way to make a packed weight will go, the operator that uses it stays
                warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
                zeros = torch.zeros(len(scale), dtype=torch.long)
                packed = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
                self._packed = torch.ops.quantized.linear_prepack(packed, self.bias)

        def _unpacked(self) -> tuple[Tensor, Tensor]:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
                weight, _ = torch.ops.quantized.linear_unpack(self._packed)
            return weight.int_repr(), weight.q_per_channel_scales().float()

        def forward(self, x: Tensor) -> Tensor:
            if x.numel() == self.in_features:
                return torch.ops.quantized.linear_dynamic(x, self._packed, True)
            # One scale is found for all rows of a call, so each row is brought to the same size first.
            size = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12)
            return torch.ops.quantized.linear_dynamic(x / size, self._packed, True) * size

        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            weight, scale = self._unpacked()
            destination[f"{prefix}weight_int8"], destination[f"{prefix}scale"] = weight, scale
            if self.bias is not None:
                destination[f"{prefix}bias"] = self.bias

        def _load_from_state_dict(
            self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
            unexpected_keys: list[str], error_msgs: list[str],
        ) -> None:  # fmt: skip
            if self.bias is not None:
                self.bias = state_dict[f"{prefix}bias"].clone()
            self._pack(state_dict[f"{prefix}weight_int8"], state_dict[f"{prefix}scale"])

    return Int8Linear
