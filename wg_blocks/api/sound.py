"""Sounds on their way to a provider and back: `{waveform, sample_rate}` as WAV, and a wary reader for what comes.

Source of the format: Multimedia Programming Interface and Data Specifications 1.0 (RIFF WAVE), PCM and IEEE float.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wg_core.errors import ApiResponseError, PortValueError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_SAMPLES = 48_000 * 3600  # of all channels together
_STREAMED = 0x7FFFFFFF  # a size at least so large means: until the end (a server that streams does not know it)
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE


def to_wav(waveform: NDArray[np.float32], sample_rate: int) -> bytes:
    """A waveform [channels, samples] in -1..1 as a WAV file of 16 bits."""
    import numpy as np

    pcm = np.rint(np.clip(waveform, -1, 1) * 32767).astype("<i2").T.tobytes()
    channels = waveform.shape[0]
    form = struct.pack("<HHIIHH", _PCM, channels, sample_rate, sample_rate * channels * 2, channels * 2, 16)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(pcm)) + pcm
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def wav_of(value: Any, what: str) -> bytes:
    """A sound of an input, `{waveform [channels, samples] or [samples], sample_rate}`, as WAV. Raises: PortValueError."""
    import numpy as np

    rate = value.get("sample_rate") if isinstance(value, Mapping) else None
    if not isinstance(rate, int) or isinstance(rate, bool) or not 1 <= rate <= 768_000:
        raise PortValueError(f"{what} is {{waveform, sample_rate}}, sample_rate a whole number of Hz, not {rate!r}")
    given = value["waveform"]
    array = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given)
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or not array.size or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise PortValueError(
            f"{what}.waveform is finite float [channels, samples], not {array.dtype} {list(array.shape)}"
        )
    return to_wav(array.astype(np.float32), rate)


def read_wav(data: bytes, what: str) -> dict[str, Any]:
    """`{waveform float32 [channels, samples] in -1..1, sample_rate}` of an untrusted WAV file. Raises: ApiResponseError."""
    import numpy as np

    def wrong(why: str) -> ApiResponseError:
        return ApiResponseError(f"{what}: the {len(data)} bytes are no readable sound (WAV): {why}")

    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise wrong("they do not begin as one")
    at, form = 12, b""
    while at + 8 <= len(data):
        name, (size,) = data[at : at + 4], struct.unpack_from("<I", data, at + 4)
        at += 8
        if name == b"fmt ":
            form = data[at : at + size]
        if name == b"data":
            break
        at += size + size % 2
    else:
        raise wrong("there is no data")
    if len(form) < 16:
        raise wrong("their form is not told")
    kind, channels, rate, _, frame, bits = struct.unpack_from("<HHIIHH", form)
    if kind == _EXTENSIBLE and len(form) >= 26:
        (kind,) = struct.unpack_from("<H", form, 24)
    if (kind, bits) not in ((_PCM, 8), (_PCM, 16), (_PCM, 32), (_FLOAT, 32)):
        raise wrong(f"format {kind} of {bits} bits is not known")
    if not channels or not rate or frame != channels * bits // 8:
        raise wrong(f"{channels} channels of {bits} bits at {rate} Hz do not make frames of {frame} bytes")
    if size < _STREAMED and size > len(data) - at:
        raise wrong(f"{size} bytes of samples are told and {len(data) - at} are there")
    raw = data[at : at + size]
    raw = raw[: len(raw) // frame * frame]
    if not raw or len(raw) // (bits // 8) > MAX_SAMPLES:
        raise wrong("they hold no samples" if not raw else f"they hold more than {MAX_SAMPLES} samples")
    kinds = {
        (_PCM, 8): ("u1", 128, 128),
        (_PCM, 16): ("<i2", 0, 2**15),
        (_PCM, 32): ("<i4", 0, 2**31),
        (_FLOAT, 32): ("<f4", 0, 1),
    }
    stored, zero, scale = kinds[kind, bits]
    wave = (np.frombuffer(raw, stored).astype(np.float64) - zero) / scale
    if not np.isfinite(wave).all():
        raise wrong("a sample is no number")
    return {"waveform": np.ascontiguousarray(wave.reshape(-1, channels).T.astype(np.float32)), "sample_rate": rate}
