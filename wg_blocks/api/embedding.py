"""Vectors for texts, from behind an API."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from pydantic import Field

from wg_blocks.api.base import ApiBlock, ApiConfig, Asking, estimate
from wg_blocks.api.providers import Provider
from wg_core import Port, current_context
from wg_core.errors import ApiResponseError, PortValueError
from wg_core.execution.context import drained

BATCH = 256


class EmbeddingConfig(ApiConfig):
    """`dimensions` asks for vectors of that size."""

    dimensions: int | None = Field(default=None, ge=1, le=65536)


class ApiEmbedding(ApiBlock):
    """A vector for a text, a list of vectors for a list of texts; at most 256 texts go into one request.

    Raises: what `ApiBlock` raises, PortValueError for what is no text; ApiResponseError for vectors that are not
    finite, or not all of one size.
    """

    role = "embedding"
    config_model: ClassVar[type[ApiConfig]] = EmbeddingConfig
    ports: Sequence[Port] = (
        Port("input", "in", "text|list"),
        Port("embedding", "out", "list"),
        Port("usage", "out", "dict", optional=True),
    )

    def __init__(self, block_id: str | None = None, *, config: Mapping[str, Any] | None = None) -> None:
        super().__init__(block_id, config=config)
        self._size: int | None = self.api.dimensions

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        given = inputs["input"]
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts):
            raise PortValueError(f"{self.name}: input is a text or a list of texts, none of them empty")
        vectors: list[list[float]] = []
        usage = {"calls": 0, "prompt_tokens": 0, "completion_tokens": 0}
        for start in range(0, len(texts), BATCH):
            some = texts[start : start + BATCH]
            request = {"texts": some, "dimensions": self.api.dimensions}
            got = current_context().ask(self.model, request, partial(self._embed, some))
            vectors += got["answer"]
            usage = {k: n + got["usage"][k] for k, n in usage.items()}
        return {"embedding": vectors[0] if isinstance(given, str) else vectors, "usage": usage}

    def _embed(self, texts: list[str]) -> dict[str, Any]:
        settings = {"dimensions": self.api.dimensions} if self.api.dimensions is not None else {}
        asking = Asking[tuple[list[Any], int]](
            request={"texts": texts, **settings},
            shown={"texts": len(texts), **settings},
            prompt_tokens=sum(map(estimate, texts)),
            completion_tokens=0,
            tokens=lambda answer: (answer[1], 0),
            show=lambda answer: f"{len(answer[0])} vectors",
            to_json=list,
            of_json=tuple,
            check=partial(self._check, len(texts)),
        )
        attempt = partial(_ask, self.api.model_id, texts, {**settings, **self.api.extra_body})
        (vectors, _), usage = drained(self.ask(asking, attempt))
        return {"answer": [[float(x) for x in v] for v in vectors], "usage": usage}

    def _check(self, due: int, answer: tuple[list[Any], int]) -> None:
        """Raises: ApiResponseError for vectors that are none, or of another size than those before."""
        vectors, _ = answer
        if len(vectors) != due:
            raise ApiResponseError(f"{self.model}: {len(vectors)} vectors for {due} texts")
        for vector in vectors:
            if not isinstance(vector, list) or not vector or not all(_number(x) for x in vector):
                raise ApiResponseError(f"{self.model}: a vector is a list of finite numbers, not {str(vector)[:80]}")
            if self._size is None:
                self._size = len(vector)
            if len(vector) != self._size:
                raise ApiResponseError(f"{self.model}: a vector has {len(vector)} numbers where {self._size} are due")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


async def _ask(
    model: str, texts: Sequence[str], settings: Mapping[str, Any], provider: Provider
) -> tuple[list[Any], int]:
    return await provider.embed(model, texts, settings)
