"""The mode of a run: which blocks learn, and whether gradients are kept."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from wg_core.execution.block import Block


class _Modes:
    """Blocks in the right mode and gradients on or off for the time of a run; everything as before afterwards."""

    def __init__(self, changed: list[tuple[Block, bool]], torch: Any) -> None:
        self.changed = changed
        self.torch = torch

    def __enter__(self) -> None:
        for block, mode in self.changed:
            block.training = mode
            block.mode_changed()
        self.grad = self.torch.set_grad_enabled(False) if self.torch is not None else nullcontext()

    def __exit__(self, *error: Any) -> None:
        self.grad.__exit__(*error)
        for block, mode in self.changed:
            block.training = not mode
            block.mode_changed()


def modes(blocks: Iterable[Block], trained: Iterable[Block] | None) -> AbstractContextManager[None]:
    """`blocks` in the mode for a run, gradients on or off: in training those of `trained` learn, outside it is None."""
    learn = {id(b) for b in trained or ()}
    changed = [(b, id(b) in learn) for b in blocks if (b.training or learn) and b.training is not (id(b) in learn)]
    return _Modes(changed, sys.modules.get("torch") if trained is None else None)
