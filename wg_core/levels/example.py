"""A small valid state, to try a world with."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from wg_core.state.state import BLOCKS, State, block_name


def example_state(blocks: Sequence[int | str], put: Callable[[bytes], str]) -> State:
    """A valid state with just these blocks; its artifact is a small picture, stored through `put`."""
    sha = put(_small_png())
    picture = {"id": sha, "media_type": "image/png", "slot": "images", "uri": f"blob:{sha}", "width": 16, "height": 16}
    examples: dict[str, Any] = {
        "intent": {"text": "The harbour waits for the morning boats."},
        "generation_config": {"requests": [{"id": "r1", "slot": "images", "maker": "map", "params": {}}]},
        "artifacts": {"images": [picture]},
        "descriptions": {"items": [{"artifact_id": sha, "text": "A small blue square.", "facts": {"width": 16}}]},
        "outcome": {"narrative": "Someone painted the harbour wall blue.", "changes": []},
    }
    wanted = [block_name(b) for b in blocks]
    return State.of({b: examples[b] for b in BLOCKS if b in wanted})


def _small_png() -> bytes:
    """A blue square of 16 x 16 pixels (PNG, ISO/IEC 15948)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\x2a\x5c\x8a" * 16) * 16
    header = struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
