"""Enlarging images without any model."""

from __future__ import annotations

from typing import Any

from wg_core import Block, Port
from wg_core.errors import ConfigError


class Enlarge(Block):
    """Every pixel becomes a square of `factor` times `factor` pixels: image [B,C,H,W] to [B,C,H*factor,W*factor].

    Raises: ConfigError for a factor that is no whole number from 1 to 16.
    """

    ports = (Port("image", "in", "image|tensor"), Port("enlarged", "out", "image|tensor"))

    def __init__(self, *, factor: int = 2) -> None:
        super().__init__()
        if type(factor) is not int or not 1 <= factor <= 16:
            raise ConfigError(f"image/enlarge: factor is {factor!r}; use a whole number from 1 to 16")
        self.factor = factor

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        image = inputs["image"]
        rows, columns = ([i // self.factor for i in range(size * self.factor)] for size in image.shape[-2:])
        return {"enlarged": image[..., rows, :][..., columns]}
