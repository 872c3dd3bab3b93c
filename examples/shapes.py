"""Pictures made by code, 16x16 pixels of one channel: what the example networks learn from."""

from __future__ import annotations

import torch

SIZE = 16
SHAPES = ("circle", "square", "cross", "stripes")


def draw(shape: str, random: torch.Generator) -> torch.Tensor:
    """One picture [1, 16, 16] in -1..1, of random place and size."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    cy, cx, r = (torch.rand(3, generator=random) * torch.tensor([4, 4, 2]) + torch.tensor([6, 6, 4])).tolist()
    dx, dy = (x - cx).abs(), (y - cy).abs()
    inside = {
        "circle": dx**2 + dy**2 <= r**2,
        "square": torch.maximum(dx, dy) <= r,
        "cross": (torch.minimum(dx, dy) <= 1) & (torch.maximum(dx, dy) <= r),
        "stripes": (x + int(cx)) % 4 < 2,
    }[shape]
    return inside.float()[None] * 2 - 1


def batch(n: int, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(pictures [n, 1, 16, 16], which shape each is [n])."""
    labels = torch.randint(len(SHAPES), (n,), generator=random)
    return torch.stack([draw(SHAPES[i], random) for i in labels]), labels


def text(picture: torch.Tensor) -> str:
    """A picture [1, 16, 16] in -1..1 as lines for the terminal."""
    return "\n".join("".join("##" if v > 0 else " ." for v in row) for row in picture[0])


def save(pictures: torch.Tensor, path: str, scale: int = 8) -> None:
    """Pictures [n, 1, 16, 16] in -1..1 side by side as a PNG."""
    from PIL import Image

    row = torch.cat([*pictures[:, 0]], dim=1).clamp(-1, 1).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    Image.fromarray(((row + 1) * 127.5).to(torch.uint8).numpy()).save(path)
