"""Walking over blocks and their parameters: each instance once, whatever shares it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from wg_core.execution.block import Block

Paths = Iterable[tuple[str, Block]]


def sub_paths(path: str, block: Block) -> Iterator[tuple[str, Block]]:
    """`block` under `path` and each sub-block under `path.name`; a shared one comes once for each of its paths."""
    yield path, block
    for name, sub in block.get_sub_blocks().items():
        yield from sub_paths(f"{path}.{name}", sub)


def unique(paths: Paths) -> dict[str, Block]:
    """Each block once, under the first of its paths."""
    found: dict[str, Block] = {}
    seen: set[int] = set()
    for path, block in paths:
        if id(block) not in seen:
            seen.add(id(block))
            found[path] = block
    return found


def own_parameters(block: Block) -> Iterator[tuple[str, Any]]:
    """Parameters of `block` without those of its sub-blocks, as `(name, parameter)`."""
    below = tuple(f"{name}." for name in block.get_sub_blocks())
    for name, parameter in block.named_parameters():
        if not below or not name.startswith(below):
            yield name, parameter


def iter_parameters(paths: Paths) -> Iterator[tuple[str, Any]]:
    """`(path:name, parameter)`; shared blocks and tied parameters once."""
    seen: set[int] = set()
    for path, block in unique(paths).items():
        for name, parameter in own_parameters(block):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{path}:{name}", parameter


def count_parameters(paths: Paths, *, trainable: bool = False) -> int:
    """How many numbers the parameters hold; `trainable`: only those with gradients on."""
    return sum(p.numel() for _, p in iter_parameters(paths) if p.requires_grad or not trainable)


def is_tensor(value: object) -> bool:
    """Whether `value` is a torch tensor; imports nothing."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)
