"""The pool: one model reference is one instance, at every level."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wg_core.execution.block import Block, model_key

if TYPE_CHECKING:
    from wg_core.assembly.registry import BlockRegistry

Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PoolEntry:
    """One shared block."""

    key: Key
    block: Block


class ModelPool:
    """Blocks by model key: equal key, the very same object; concurrent first users wait for one build."""

    def __init__(self) -> None:
        self._entries: dict[Key, Future[Block]] = {}
        self._lock = threading.Lock()

    def get_or_build(self, config: Mapping[str, Any], registry: BlockRegistry) -> Block:
        """The block of this config; shared if the config names a model and does not say `reuse: false`.

        Raises: what building raises, in every waiting caller.
        """
        from wg_core.assembly.registry import canonical

        block_type, block_id, inner = canonical(config)
        factory = registry.get(block_type, inner.get("backend", "local"))
        key = model_key(
            block_type, inner.get("backend", "local"), inner, getattr(factory, "call_time_keys", frozenset())
        )
        if key is None or inner.get("reuse") is False or not getattr(factory, "poolable", True):
            return registry.build_new(block_type, block_id, inner, self)
        with self._lock:
            future = self._entries.get(key)
            if (
                future is not None
                and future.done()
                and future.exception() is None
                and future.result().weights_changed()
            ):
                future = None  # trained or loaded over: its users keep it, but its reference names other weights
            mine = future is None
            if future is None:
                future = self._entries[key] = Future()
        if mine:
            try:
                block = registry.build_new(block_type, block_id, inner, self)
                block._model_key = key
                future.set_result(block)
            except BaseException as error:
                with self._lock:
                    self._entries.pop(key, None)
                future.set_exception(error)
        return future.result()

    def list(self) -> list[PoolEntry]:
        """What is held now."""
        with self._lock:
            done = [(k, f) for k, f in self._entries.items() if f.done() and f.exception() is None]
        return [PoolEntry(key, future.result()) for key, future in done]

    def __len__(self) -> int:
        return len(self.list())

    def evict(self, key: Key) -> None:
        """Close and forget one block."""
        with self._lock:
            future = self._entries.pop(key, None)
        if future is not None and future.exception() is None:
            future.result().close()

    def clear(self) -> None:
        """Close and forget all."""
        for entry in self.list():
            self.evict(entry.key)


_default = ModelPool()


def default_pool() -> ModelPool:
    """The process-wide pool."""
    return _default
