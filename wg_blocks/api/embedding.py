"""Vectors for texts and pictures, from behind an API."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field

from wg_blocks.api.base import ApiBlock, ApiConfig, Asking, estimate, sha
from wg_blocks.api.pictures import data_url, pngs
from wg_blocks.api.providers import Provider
from wg_core import Port, current_context
from wg_core.errors import ApiResponseError, PortValueError
from wg_core.execution.context import drained

BATCH = 256


class EmbeddingConfig(ApiConfig):
    """`dimensions` asks for vectors of that size. `images` is how the server takes pictures, if it does: `object` as
    `{"image": base64}` beside `{"text": ...}` (Jina), `data_url` as texts `data:image/png;base64,...` (Infinity).
    """

    dimensions: int | None = Field(default=None, ge=1, le=65536)
    images: Literal["object", "data_url"] | None = None


class ApiEmbedding(ApiBlock):
    """A vector for a text or picture, a list of vectors for a list of them; at most 256 go into one request.

    A picture is an array [B,3,H,W] in 0..1 (with B > 1 a list of them) or an artifact. Sources of the forms:
    https://jina.ai/embeddings, https://github.com/michaelfeil/infinity.

    Raises: what `ApiBlock` raises, PortValueError for what is neither, or a picture where `images` is not set;
    ApiResponseError for vectors that are not finite, or not all of one size.
    """

    role = "embedding"
    config_model: ClassVar[type[ApiConfig]] = EmbeddingConfig
    ports: Sequence[Port] = (
        Port("input", "in", "text|image|list", description="a text, a picture, or a list of either"),
        Port("embedding", "out", "list"),
        Port("usage", "out", "dict", optional=True),
    )

    def __init__(self, block_id: str | None = None, *, config: Mapping[str, Any] | None = None) -> None:
        super().__init__(block_id, config=config)
        self._size: int | None = self.api.dimensions

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        given = inputs["input"]
        parts = [self._parts(v) for v in (given if isinstance(given, list) else [given])]
        items = [item for part, _ in parts for item in part]
        alone = not isinstance(given, list) and not parts[0][1]
        vectors: list[list[float]] = []
        usage = {"calls": 0, "prompt_tokens": 0, "completion_tokens": 0}
        for start in range(0, len(items), BATCH):
            some = items[start : start + BATCH]
            shown = [v if isinstance(v, str) else {"image": sha(v)} for v in some]
            request = {"texts": shown, "dimensions": self.api.dimensions}
            got = current_context().ask(self.model, request, partial(self._embed, some))
            vectors += got["answer"]
            usage = {k: n + got["usage"][k] for k, n in usage.items()}
        return {"embedding": vectors[0] if alone else vectors, "usage": usage}

    def _parts(self, value: Any) -> tuple[list[str | bytes], bool]:
        """A text, or pictures as PNG; and whether there are several."""
        if isinstance(value, str):
            if not value:
                raise PortValueError(f"{self.name}: input is a text, a picture or a list of them, none of them empty")
            return [value], False
        if isinstance(value, bytes | int | float | list | None):
            raise PortValueError(f"{self.name}: input is a text, a picture or a list of them, not {type(value).__name__}")
        found, several = pngs(value, f"{self.name}.input")
        if self.api.images is None:
            raise PortValueError(
                f"{self.name}: this server is asked for vectors of texts only; if it takes pictures, say how with images "
                "(object or data_url)"
            )
        return [*found], several

    def _wire(self, items: Sequence[str | bytes]) -> list[Any]:
        """The items as the server takes them; texts alone are sent as they are."""
        if self.api.images == "object" and any(isinstance(v, bytes) for v in items):
            return [{"text": v} if isinstance(v, str) else {"image": base64.b64encode(v).decode()} for v in items]
        return [v if isinstance(v, str) else data_url(v) for v in items]

    def _embed(self, items: list[str | bytes]) -> dict[str, Any]:
        texts = [v for v in items if isinstance(v, str)]
        wire = self._wire(items)
        settings = {"dimensions": self.api.dimensions} if self.api.dimensions is not None else {}
        estimated = sum(map(estimate, texts))
        asking = Asking[tuple[list[Any], int]](
            request={"texts": wire, **settings},
            shown={"texts": len(texts), "images": len(items) - len(texts), **settings},
            prompt_tokens=estimated,
            completion_tokens=0,
            tokens=lambda answer: (answer[1] or estimated, 0),  # not every server counts
            show=lambda answer: f"{len(answer[0])} vectors",
            to_json=list,
            of_json=tuple,
            check=partial(self._check, len(items)),
        )
        attempt = partial(_ask, self.api.model_id, wire, {**settings, **self.api.extra_body})
        (vectors, _), usage = drained(self.ask(asking, attempt))
        return {"answer": [[float(x) for x in v] for v in vectors], "usage": usage}

    def _check(self, due: int, answer: tuple[list[Any], int]) -> None:
        """Raises: ApiResponseError for vectors that are none, or of another size than those before."""
        vectors, _ = answer
        if len(vectors) != due:
            raise ApiResponseError(f"{self.model}: {len(vectors)} vectors for {due} inputs")
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
    model: str, texts: Sequence[Any], settings: Mapping[str, Any], provider: Provider
) -> tuple[list[Any], int]:
    return await provider.embed(model, texts, settings)
