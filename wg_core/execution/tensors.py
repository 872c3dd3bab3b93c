"""Tensors inside the values that flow: found wherever they lie, without importing torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast


def map_tensors(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with each tensor in it, also in lists, tuples and dicts, replaced by `change(tensor)`."""
    torch = sys.modules.get("torch")
    return value if torch is None else _mapped(value, torch.Tensor, change)


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return change(value)
    if type(value) is dict:
        return {k: _mapped(v, kind, change) for k, v in cast("dict[Any, Any]", value).items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(v, kind, change) for v in value)
    return value
