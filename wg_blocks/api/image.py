"""Pictures from behind an API."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from pydantic import Field

from wg_blocks.api.base import ApiBlock, ApiConfig, Asking, estimate, sha
from wg_blocks.api.pictures import as_image, pngs, read_picture
from wg_blocks.api.providers import Picture, Provider
from wg_blocks.maps import from_png, to_png
from wg_core import Port, current_context
from wg_core.errors import ApiResponseError, ConfigError, PortValueError, did_you_mean
from wg_core.execution.context import drained

_PARAMS: Mapping[str, Any] = {"size": str, "quality": str, "style": str, "background": str}
_SEEDS = 2**31


class ImageConfig(ApiConfig):
    """`size` is WIDTHxHEIGHT; `send_seed` is for servers that take one, which OpenAI's own does not."""

    size: str | None = Field(default=None, pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")
    send_seed: bool = False
    max_response_bytes: int = Field(default=64 << 20, ge=1024, le=1 << 30)


class ApiImage(ApiBlock):
    """A picture [1,3,H,W] in 0..1 for a prompt, or for a prompt and a picture to change.

    `params` are size, quality, style and background, as far as the server knows them.

    Raises: what `ApiBlock` raises, ConfigError for an unknown param; ApiResponseError for what is no whole picture, or
    one of more than 4096x4096 pixels.
    """

    role = "generator"
    config_model: ClassVar[type[ApiConfig]] = ImageConfig
    ports: Sequence[Port] = (
        Port("prompt", "in", "text"),
        Port("image", "in", "image|ref", True),
        Port("params", "in", "dict", True),
        Port("seed", "in", "number", True),
        Port("image_out", "out", "image|ref"),
    )

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        settings: dict[str, Any] = {"size": self.api.size} if self.api.size else {}
        for name, value in (inputs.get("params") or {}).items():
            if name not in _PARAMS or not isinstance(value, str):
                raise ConfigError(
                    f"params.{name} is no setting of {self.name} or no text; {did_you_mean(str(name), _PARAMS)}"
                )
            settings[name] = value
        given: list[bytes] = []
        if "image" in inputs:
            given, _ = pngs(inputs["image"], f"{self.name}.image")
            if len(given) != 1:
                raise PortValueError(f"{self.name}.image is one picture, not {len(given)}")
        context = current_context()
        seed = int(inputs["seed"] if "seed" in inputs else context.node_seed()) % _SEEDS
        asking = Picture(
            self.api.model_id,
            inputs["prompt"],
            {**settings, **self.api.extra_body, **({"seed": seed} if self.api.send_seed else {})},
            seed,
            given[0] if given else None,
        )
        made: dict[str, bytes] = {}
        request = {"prompt": inputs["prompt"], "settings": settings, "seed": seed, "image": [sha(g) for g in given]}
        got = context.ask(self.model, request, partial(self._make, asking, request, made))
        png = made.get(got["answer"]) or context.blobs.get(got["answer"])
        return {"image_out": as_image(from_png(png, self.name))}

    def _make(self, asking: Picture, request: Mapping[str, Any], made: dict[str, bytes]) -> dict[str, Any]:
        ask = Asking[tuple[bytes, int, int]](
            request={**request, "settings": dict(asking.settings)},
            shown=request,
            prompt_tokens=estimate(asking.prompt),
            completion_tokens=0,
            tokens=lambda answer: answer[1:],
            show=lambda answer: f"a picture of {len(answer[0])} bytes",
            to_json=lambda answer: [base64.b64encode(answer[0]).decode(), *answer[1:]],
            of_json=lambda kept: (base64.b64decode(kept[0]), *kept[1:]),
            check=lambda answer: self._pixels(asking, answer[0]),
        )
        (data, _, _), usage = drained(self.ask(ask, partial(_ask, asking)))
        png = to_png(
            self._pixels(asking, data)
        )  # written as artifacts are, so that the record names the bytes that the world keeps
        name = sha(png)
        made[name] = png
        if (context := current_context()).frame is not None:
            context.blobs.put(png)
        return {"answer": name, "usage": usage}

    def _pixels(self, asking: Picture, data: bytes) -> Any:
        """The pixels of an answer. Raises: ApiResponseError for no picture, or one of another size than asked for."""
        pixels = read_picture(data, self.model)
        height, width = pixels.shape[:2]
        wanted = str(asking.settings.get("size", "auto"))
        if wanted not in ("auto", f"{width}x{height}"):
            raise ApiResponseError(f"{self.model}: a picture of {width}x{height} came where {wanted} was asked for")
        return pixels


async def _ask(picture: Picture, provider: Provider) -> tuple[bytes, int, int]:
    return await provider.picture(picture)
