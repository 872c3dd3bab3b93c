"""Which part of the state a checkpoint keeps: all, what is trained, or what adapters hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from wg_core.execution.block import Block
from wg_core.weights.tree import is_tensor, own_parameters

SCOPES = ("all", "trainable", "adapters")
Keep = Callable[[Block, Mapping[str, Any]], Mapping[str, Any]]


def everything(block: Block, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The whole state of every block."""
    return state


def trained(parameters: Iterable[Any]) -> Keep:
    """Of each block that has one of these parameters: those parameters, buffers and other values, no resting parameter."""
    chosen = {id(p) for p in parameters}

    def keep(block: Block, state: Mapping[str, Any]) -> Mapping[str, Any]:
        own = [p for _, p in own_parameters(block)]
        if not any(id(p) in chosen for p in own):
            return {}
        resting = {p.data_ptr() for p in own if id(p) not in chosen and p.numel()}
        return {k: v for k, v in state.items() if not (is_tensor(v) and v.data_ptr() in resting)}

    return keep


def held_by(is_adapter: Callable[[Block], bool]) -> Keep:
    """The whole state of adapters, nothing of other blocks."""
    return lambda block, state: state if is_adapter(block) else {}
