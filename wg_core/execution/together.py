"""Calls that run side by side: each in a thread or task of its own, with its own place in the running frame."""

from __future__ import annotations

import copy
import inspect
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any, cast

from wg_core.execution.context import FRAME, Event, Frame, Hook


@dataclass(slots=True)
class Beside:
    """One of several calls: what is called for which node, until when; and then what came of it.

    `call` raises nothing that the others should not wait for; what it gives may be awaitable.
    """

    node_id: str
    call: Callable[[dict[str, Any]], Any]
    inputs: dict[str, Any]
    turn: int = 0
    deadline: float | None = None
    outputs: Any = None
    seconds: float = 0.0
    late: bool = False
    context: Context = field(default_factory=copy_context)

    def run(self) -> None:
        began = time.monotonic()
        self.outputs = self.call(self.inputs)
        self._ended(began)

    async def wait(self) -> None:
        began = time.monotonic() - self.seconds
        self.outputs = await self.outputs
        self._ended(began)

    def _ended(self, began: float) -> None:
        now = time.monotonic()
        self.seconds, self.late = now - began, self.deadline is not None and now > self.deadline


def side_by_side(calls: Sequence[Beside], limit: int, frame: Frame) -> dict[str, Any] | Coroutine[Any, Any, dict[str, Any]]:
    """Run the calls, at most `limit` at once and those of one node in their order; the outputs are kept in `calls`.

    Hooks are told one event at a time. What is asynchronous is awaited together, so then the return value is awaitable.
    """
    lock = threading.RLock()
    hooks = tuple(_one_at_a_time(hook, lock) for hook in frame.hooks)
    lines: dict[str, list[Beside]] = {}
    for call in calls:
        own = copy.copy(frame)
        own.node_id, own.turn, own.deadline = call.node_id, call.turn, call.deadline
        own.listen(hooks)
        call.context.run(FRAME.set, own)
        lines.setdefault(call.node_id, []).append(call)
    torch: Any = sys.modules.get("torch")
    grad = torch.is_grad_enabled() if torch is not None else False

    def run(line: list[Beside]) -> None:
        with torch.set_grad_enabled(grad) if torch is not None else nullcontext():
            for call in line:
                call.context.run(call.run)

    with ThreadPoolExecutor(min(limit, len(lines)), "wg-tool") as pool:
        for _ in pool.map(run, lines.values()):
            pass
    later = [call for call in calls if inspect.isawaitable(call.outputs)]
    return _together(later, limit) if later else {}


async def _together(calls: Sequence[Beside], limit: int) -> dict[str, Any]:
    import asyncio

    free = asyncio.Semaphore(limit)

    async def one(call: Beside) -> None:
        async with free:
            await asyncio.create_task(call.wait(), context=call.context)

    await asyncio.gather(*map(one, calls))
    return {}


def _one_at_a_time(hook: Hook, lock: threading.RLock) -> Hook:
    def told(event: Event) -> None:
        with lock:
            cast(Any, hook)(event)

    told.kinds = getattr(hook, "kinds", None)  # type: ignore[attr-defined]
    return told
