"""The pool: one model reference is one instance, at every level."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wg_core.errors import ConfigError
from wg_core.execution.block import Block, model_key
from wg_core.weights.module import ModuleBlock

if TYPE_CHECKING:
    from wg_core.assembly.registry import BlockRegistry

Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PoolEntry:
    """One shared block, and whether it is pinned."""

    key: Key
    block: Block
    pinned: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of its weights as they lie in memory now; 0 before they are loaded, and for remote models."""
        return sum(b.nbytes for b in self.block.iter_blocks() if isinstance(b, ModuleBlock))


class ModelPool:
    """Blocks by model key: equal key, the very same object; concurrent first users wait for one build."""

    def __init__(self) -> None:
        self._entries: dict[Key, Future[Block]] = {}
        self._pinned: set[Key] = set()
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
            pinned = set(self._pinned)
        return [PoolEntry(key, future.result(), key in pinned) for key, future in done]

    def __len__(self) -> int:
        return len(self.list())

    @property
    def nbytes(self) -> int:
        """Bytes of all weights held."""
        return sum(entry.nbytes for entry in self.list())

    def pin(self, key: Key) -> None:
        """Keep one block from being evicted. Raises: ConfigError for a key that is not held."""
        with self._lock:
            if key not in self._entries:
                raise ConfigError(
                    f"the pool holds no model {'/'.join(key)}; it holds {sorted(map('/'.join, self._entries))}"
                )
            self._pinned.add(key)

    def release(self, key: Key) -> None:
        """Undo `pin`."""
        with self._lock:
            self._pinned.discard(key)

    def evict(self, key: Key) -> None:
        """Close and forget one block; its users load it again. Raises: ConfigError for a pinned one."""
        with self._lock:
            if key in self._pinned:
                raise ConfigError(f"model {'/'.join(key)} is pinned; release it first")
            future = self._entries.pop(key, None)
        if future is not None and future.exception() is None:
            future.result().close()

    def clear(self) -> None:
        """Close and forget all that is not pinned."""
        for entry in self.list():
            if not entry.pinned:
                self.evict(entry.key)


_default = ModelPool()


def default_pool() -> ModelPool:
    """The process-wide pool."""
    return _default
