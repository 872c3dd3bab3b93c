"""Search by meaning: how near texts are to a query, by any block of role `embedding`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from wg_core import Block, current_context
from wg_core.assembly.registry import default_registry
from wg_core.errors import ConfigError
from wg_core.execution.context import unrecorded
from wg_core.state.canonical import sha256_bytes, sha256_json

Build = Callable[[Mapping[str, Any]], Block]

_KEPT = 50_000
_NEAREST = 64
_vectors: WeakKeyDictionary[Block, dict[str, Any]] = WeakKeyDictionary()
_lock = threading.Lock()


class Search:
    """The ranker that a world's view takes: the cosine between the vectors of a query and of each text.

    Vectors are kept in memory by the text's hash, for all users of one model: an item that did not change is embedded
    once in a process. The order that was found is recorded with the run's model calls, and a replay takes it from there,
    so that it needs no model and does not depend on how a machine rounds.

    Raises: ConfigError for a block of another role.
    """

    def __init__(self, model: Mapping[str, Any], build: Build) -> None:
        self.block = build(model)
        if self.block.role != "embedding":
            raise ConfigError(f"search: {self.block.name!r} has the role {self.block.role!r}; 'embedding' is needed")

    def __call__(self, query: str, texts: Sequence[str]) -> list[float]:
        """The cosine of each text with the query, to four digits; that of all but the nearest 64 counts as -1."""
        request = {"query": query, "texts": sha256_json(list(texts))}
        found = current_context().ask(f"search:{self._model()}", request, lambda: {"answer": self._cosines(query, texts)})
        near = {int(i): float(cosine) for i, cosine in found["answer"]}
        return [near.get(i, -1.0) for i in range(len(texts))]

    def _model(self) -> str:
        config = self.block.config
        return str(config.get("checkpoint_ref") or config.get("model_id") or self.block.block_type)

    def _cosines(self, query: str, texts: Sequence[str]) -> list[list[float]]:
        import numpy

        vectors = self._embedded([query, *texts])
        rows = numpy.stack([vectors[text] for text in (query, *texts)])
        cosines = [round(float(x), 4) for x in rows[1:] @ rows[0]]
        nearest = sorted(range(len(cosines)), key=lambda i: (-cosines[i], i))[:_NEAREST]
        return [[i, cosines[i]] for i in nearest]

    def _embedded(self, texts: Sequence[str]) -> dict[str, Any]:
        import numpy

        with _lock:
            kept = _vectors.setdefault(self.block, {}) if not self.block.weights_changed() else {}
            keys = {text: sha256_bytes(text.encode()) for text in texts}
            new = [text for text, key in keys.items() if key not in kept]
            if new:
                if len(kept) + len(new) > _KEPT:
                    kept.clear()
                    new = list(keys)
                with unrecorded():
                    made = self.block.forward({"input": new})["embedding"]
                if hasattr(made, "detach"):
                    made = made.detach().cpu()
                rows = numpy.asarray(made, dtype=numpy.float32)
                rows = rows / numpy.maximum(numpy.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
                kept.update(zip((keys[text] for text in new), rows, strict=True))
            return {text: kept[key] for text, key in keys.items()}


def searcher(search: Mapping[str, Any] | None, build: Build | None = None) -> Search | None:
    """The search that a block's config describes (`{block_type, config}`), None where it describes none."""
    return Search(search, build or default_registry().build) if search is not None else None
