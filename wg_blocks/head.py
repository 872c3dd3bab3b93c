"""An output head: a small network on the vectors of a model that may run anywhere, an API among them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wg_core import Port
from wg_core.assembly.roles import Projection
from wg_core.errors import PortValueError
from wg_core.weights.module import ModuleBlock

if TYPE_CHECKING:
    from torch import nn


class OutputHead(ModuleBlock, Projection):
    """Vectors [B, width_in] (or one, [width_in]) to [B, width_out], through `hidden` units if given.

    Trained as any block: the vectors are constants where they come from an API, so no gradient goes further back.

    Raises: PortValueError for vectors of another width.
    """

    role = "projection"
    ports = (Port("tensor", "in", "tensor|list", aliases=("embedding",)), Port("tensor_out", "out", "tensor"))

    def __init__(
        self, *, width_in: int, width_out: int, hidden: int | None = None, init_seed: int = 0, checkpoint_ref: str | None = None
    ) -> None:
        super().__init__()
        self.width_in, self.width_out, self.hidden, self.init_seed = width_in, width_out, hidden, init_seed

    def build_modules(self) -> dict[str, nn.Module]:
        from torch import nn

        if self.hidden is None:
            return {"head": nn.Linear(self.width_in, self.width_out)}
        return {
            "head": nn.Sequential(nn.Linear(self.width_in, self.hidden), nn.GELU(), nn.Linear(self.hidden, self.width_out))
        }

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        import torch

        head = self.modules["head"]
        weight = next(head.parameters())
        given = torch.as_tensor(inputs["tensor"], dtype=weight.dtype, device=weight.device)
        if given.shape[-1:] != (self.width_in,):
            raise PortValueError(f"{self.name}: vectors are {list(given.shape)}, their last dimension must be {self.width_in}")
        return {"tensor_out": head(given)}
