"""Pictures on their way to a provider and back: arrays as PNG, and a wary reader for what comes."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wg_blocks.maps import from_png, to_png
from wg_core import current_context
from wg_core.errors import ApiResponseError, PortValueError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_PIXELS = 4096 * 4096
_FORMATS = ("PNG", "JPEG", "WEBP")
_PNG = b"\x89PNG\r\n\x1a\n"


def pngs(value: Any, what: str) -> tuple[list[bytes], bool]:
    """The pictures of an input as PNG, and whether it is a batch: an array [B,3,H,W] with B > 1, or a list.

    A picture is such an array in 0..1, bytes of an image file, or what names one: an artifact, `blob:<sha256>`.
    Raises: PortValueError.
    """
    import numpy as np

    if isinstance(value, list):
        return [png for v in value for png in pngs(v, what)[0]], True
    if isinstance(value, Mapping):
        value = value.get("id", value.get("uri"))
    if isinstance(value, str):
        value = current_context().blobs.get(value.removeprefix("blob:"))
    if isinstance(value, bytes):
        return [value if value.startswith(_PNG) else to_png(from_png(value, what))], False
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if array.ndim != 4 or array.shape[1] != 3 or not array.size or not np.isfinite(array).all():
        raise PortValueError(f"{what} is a finite image [B, 3, H, W], not {array.dtype} {list(array.shape)}")
    pixels = np.rint(np.clip(array.astype(np.float64), 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return [to_png(np.ascontiguousarray(p)) for p in pixels], len(pixels) > 1


def data_url(png: bytes) -> str:
    """A picture as a URL that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def read_picture(data: bytes, what: str) -> NDArray[np.uint8]:
    """The pixels uint8 [H, W, 3] of an untrusted image file; its size is looked at before it is unpacked.

    Raises: ApiResponseError.
    """
    import numpy as np
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height <= MAX_PIXELS:
                return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ApiResponseError(f"{what}: the {len(data)} bytes are no readable picture ({error})") from None
    raise ApiResponseError(f"{what}: a picture of {width}x{height} pixels is more than {MAX_PIXELS}")


def as_image(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pixels uint8 [H, W, 3] as an image float32 [1, 3, H, W] in 0..1."""
    import numpy as np

    return np.ascontiguousarray(pixels.astype(np.float32).transpose(2, 0, 1)[None] / np.float32(255))
