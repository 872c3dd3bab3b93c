"""Texts as bytes: token ids without a vocabulary file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wg_core.assembly.roles import Tokenizer
from wg_core.errors import ConfigError, MissingInputError, PortValueError

if TYPE_CHECKING:
    import torch

PAD = 0
VOCABULARY = 257  # 0 pads, byte b is token b + 1


def encode_bytes(texts: str | Sequence[str], max_length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids int64 [B,L], attention mask int64 [B,L]) of UTF-8 bytes, cut after `max_length`, padded with 0."""
    import torch

    rows = [
        [b + 1 for b in text.encode("utf-8")][:max_length] for text in ([texts] if isinstance(texts, str) else texts)
    ]
    length = max((len(row) for row in rows), default=0) or 1  # an empty text is one pad: a mean over tokens exists
    ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows], dtype=torch.int64)
    ids = ids.reshape(len(rows), length)
    return ids, (ids != PAD).to(torch.int64)


def decode_bytes(ids: torch.Tensor) -> list[str]:
    """The text of each row of token ids [B,L]; what is no UTF-8 becomes U+FFFD.

    Raises: PortValueError for another rank or an id outside 0..256.
    """
    if ids.ndim != 2 or ids.is_floating_point():
        raise PortValueError(f"decode_token_ids takes whole numbers [B, L], not {ids.dtype} {list(ids.shape)}")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < VOCABULARY:
        raise PortValueError(
            f"decode_token_ids holds ids from {int(ids.min())} to {int(ids.max())}; bytes are 1..256, 0 pads"
        )
    return [bytes(t - 1 for t in row if t != PAD).decode("utf-8", errors="replace") for row in ids.tolist()]


class ByteTokenizer(Tokenizer):
    """One token for each byte of UTF-8, at most `max_length` of them; a list of texts is a batch.

    Decoding a batch of one gives a text, a larger one a list of texts.

    Raises: ConfigError for a `max_length` below 1, MissingInputError if neither input is set, PortValueError.
    """

    ports = Tokenizer.ports

    def __init__(self, *, max_length: int | None = None) -> None:
        super().__init__()
        if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
            raise ConfigError(f"tokenizer/bytes: max_length is a whole number from 1, not {max_length!r}")
        self.max_length = max_length

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        outputs: dict[str, Any] = {}
        if "text" in inputs:
            outputs["token_ids"], outputs["attention_mask"] = encode_bytes(inputs["text"], self.max_length)
        if "decode_token_ids" in inputs:
            texts = decode_bytes(inputs["decode_token_ids"])
            outputs["decoded_text"] = texts[0] if len(texts) == 1 else texts
        if not outputs:
            raise MissingInputError(f"{self.name} needs 'text' or 'decode_token_ids'; neither is set")
        return outputs
