"""Speech out and in, through the real client: whole sounds or named errors."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from api_server import ApiServer

from wg_blocks.api.sound import read_wav, to_wav
from wg_core import Block, Graph
from wg_core.assembly.registry import default_registry
from wg_core.errors import ApiResponseError, ConfigError, PortValueError
from wg_core.execution.blobs import MemoryBlobs
from wg_core.execution.calls import CallLog

TONE = (np.sin(np.arange(900) / 9)[None] * 0.5).astype(np.float32)


def test_a_text_is_said(api: Callable[..., Block], server: ApiServer) -> None:
    """01 F-8, F-30, 04 X-1: audio {waveform [channels, samples], sample_rate}; recorded by the bytes, replayed from them."""
    graph = Graph("g")
    graph.add_node(api("speech/api", voice="ash"), "say")
    graph.expose_input("say", "text", name="text")
    graph.expose_output("say", "audio", name="audio")
    log, blobs = CallLog(), MemoryBlobs()
    audio = graph.run({"text": "The bell rings."}, calls=log, blobs=blobs)["audio"]
    assert audio["sample_rate"] == 24000 and audio["waveform"].shape == (1, 1500)
    assert audio["waveform"].dtype == np.float32 and 0.4 < audio["waveform"].max() <= 0.5
    path, _, body = server.seen[0]
    assert path == "/v1/audio/speech" and (body["input"], body["voice"], body["response_format"]) == (
        "The bell rings.",
        "ash",
        "wav",
    )
    assert blobs.has(log.calls[0]["answer"])
    again = graph.run({"text": "The bell rings."}, calls=CallLog(log.calls), blobs=blobs)["audio"]
    assert np.array_equal(again["waveform"], audio["waveform"]) and len(server.seen) == 1
    with pytest.raises(ConfigError, match=r"params\.pitch"):
        api("speech/api").run({"text": "x", "params": {"pitch": 2}})


def test_a_recording_is_written_down(api: Callable[..., Block], server: ApiServer) -> None:
    """01 F-8, F-30, 04 X-1: sent as WAV, with what was said of it."""
    block = api("transcription/api", language="en")
    out = block.run({"audio": {"waveform": TONE, "sample_rate": 16000}, "prompt": "Mara"})
    assert out == {"text": "The bell rings."}
    path, headers, raw = server.seen[0]
    assert path == "/v1/audio/transcriptions" and headers["content-type"].startswith("multipart/form-data")
    assert b"RIFF" in raw and b'name="language"\r\n\r\nen' in raw and b'name="prompt"\r\n\r\nMara' in raw
    for audio in (
        {"waveform": TONE},
        {"waveform": TONE * np.nan, "sample_rate": 1},
        {"waveform": np.zeros((1, 0), "f4"), "sample_rate": 1},
    ):
        with pytest.raises(PortValueError, match="audio"):
            block.run({"audio": audio})
    server.replies.append({"json": {"texts": []}})
    with pytest.raises(ApiResponseError, match="no text"):
        block.run({"audio": {"waveform": TONE, "sample_rate": 16000}})


def wav(
    data: bytes, *, kind: int = 1, channels: int = 1, bits: int = 16, told: int | None = None, frame: int | None = None
) -> bytes:
    form = struct.pack("<HHIIHH", kind, channels, 8000, 0, frame or channels * bits // 8, bits)
    chunks = (
        b"LIST\x03\0\0\0abc\0fmt "
        + struct.pack("<I", 16)
        + form
        + b"data"
        + struct.pack("<I", len(data) if told is None else told)
    )
    return b"RIFF\0\0\0\0WAVE" + chunks + data


def test_sounds_go_round_and_other_forms_are_read() -> None:
    """01 F-8: PCM of 8, 16 and 32 bits, floats, several channels, and a size that a streaming server did not know."""
    back = read_wav(to_wav(np.vstack([TONE, -TONE]), 44100), "x")
    assert back["sample_rate"] == 44100 and np.abs(back["waveform"] - np.vstack([TONE, -TONE])).max() < 1e-4
    for data in (
        wav(b"\x80\xc0", bits=8), wav(struct.pack("<2h", 0, 2**14)), wav(struct.pack("<2i", 0, 2**30), bits=32),
        wav(struct.pack("<2f", 0, 0.5), kind=3, bits=32), wav(struct.pack("<2h", 0, 2**14), told=0xFFFFFFFF),
    ):  # fmt: skip
        assert read_wav(data, "x")["waveform"].tolist() == [[0.0, 0.5]]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"ID3\x03", "do not begin as one"),
        (b'{"error": "no voice"}', "do not begin as one"),
        (b"RIFF\0\0\0\0WAVE", "there is no data"),
        (wav(b"\0\0", told=800), "800 bytes of samples are told and 2 are there"),
        (wav(b""), "hold no samples"),
        (wav(b"\0\0", kind=85), "format 85 of 16 bits is not known"),
        (wav(b"\0\0", frame=7), "do not make frames of 7 bytes"),
        (wav(struct.pack("<f", float("nan")), kind=3, bits=32), "a sample is no number"),
        (b"RIFF\0\0\0\0WAVEdata\2\0\0\0\0\0", "their form is not told"),
    ],
)
def test_sounds_that_are_none(data: bytes, says: str, api: Callable[..., Block], server: ApiServer) -> None:
    """01 A-2: an error, never a result."""
    server.replies.append({"raw": data, "headers": {"Content-Type": "audio/wav"}})
    with pytest.raises(ApiResponseError, match=f"no readable sound .*{says}"):
        api("speech/api").run({"text": "x"})


def test_the_fake_provider_speaks_and_hears() -> None:
    """01 T-23: offline, the same at every run; another text is another sound."""

    def build(block_type: str) -> Any:
        return default_registry().build({"block_type": block_type, "config": {"provider": "fake", "model_id": "m"}})

    one, same, other = (build("speech/api").run({"text": t})["audio"] for t in ("a bell", "a bell", "a gull"))
    assert np.array_equal(one["waveform"], same["waveform"]) and not np.array_equal(one["waveform"], other["waveform"])
    texts = [build("transcription/api").run({"audio": a})["text"] for a in (one, same, other)]
    assert texts[0] == texts[1] != texts[2]
